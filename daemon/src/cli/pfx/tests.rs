//! Files that OpenSSL, NSS and Java write, and forms that they no longer write or do not write yet.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use data_encoding::HEXLOWER;
use ring::{hmac, pbkdf2};
use tempfile::TempDir;

use super::*;

/// Written by `pk12util -o` of NSS 3.87 (BER), and by `keytool -importkeystore` of OpenJDK 17.
const OF_NSS: &[u8] = include_bytes!("testdata/nss.pfx");
const OF_JAVA: &[u8] = include_bytes!("testdata/java.pfx");

struct Files(TempDir);

impl Files {
    /// A key, its certificate and another one.
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        let request = "req -x509 -newkey rsa:2048 -nodes -days 30";
        files.openssl(&format!("{request} -keyout key.pem -out own.pem -subj /CN=own"));
        files.openssl(&format!("{request} -keyout ca.key -out ca.pem -subj /CN=ca"));
        files
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.path()).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn export(&self, password: &str, options: &str) -> Vec<u8> {
        fs::write(self.path().join("password"), password).unwrap();
        // openssl does not accept an empty file as an empty password.
        let password = if password.is_empty() { "pass:" } else { "file:password" };
        let files = format!("-inkey key.pem -in own.pem -out file.pfx -passout {password}");
        self.openssl(format!("pkcs12 -export {files} {options}").trim_end());
        fs::read(self.path().join("file.pfx")).unwrap()
    }

    /// Checks that the file opens and contains the key and its certificate.
    fn opens(&self, file: &[u8], password: &str, what: &str) {
        let (key, certificate) = open(file, password).unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected = fs::read(self.path().join("own.pem")).unwrap();
        assert!(
            certificate == Certificate::from_file(&expected).unwrap() && key.public() == certificate.key(),
            "{what}"
        );
    }
}

fn refused(file: &[u8], password: &str) -> String {
    open(file, password).err().unwrap().to_string()
}

/// An element of DER.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    match content.len() {
        short @ 0..0x80 => out.push(short as u8),
        long => out.extend([&[0x83][..], &(long as u32).to_be_bytes()[1..]].concat()),
    }
    [out, content].concat()
}

/// An element with an indefinite length.
fn open_length(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag, 0x80], content, &[0, 0]].concat()
}

fn pieces(tag: u8, content: &[u8]) -> Vec<u8> {
    open_length(tag, &content.chunks(100).flat_map(|piece| der(tag::OCTET_STRING, &[piece])).collect::<Vec<_>>())
}

/// Converts a file to BER: indefinite lengths wherever possible, all strings in pieces. Structures inside of strings
/// are converted too, `levels` deep, which invalidates a MAC.
fn to_ber(file: &[u8], levels: usize) -> Vec<u8> {
    fn element(of: Element<'_>, levels: usize) -> Vec<u8> {
        match of.tag {
            tag::OCTET_STRING => match Element::parse(of.content) {
                Ok(content) if levels > 0 && content.tag == tag::SEQUENCE => {
                    pieces(0x24, &element(content, levels - 1))
                }
                _ => pieces(0x24, of.content),
            },
            tag::CONTEXT_0_PRIMITIVE => pieces(tag::CONTEXT_0, of.content),
            tag if tag & 0x20 != 0 => {
                let children = of.children().unwrap();
                open_length(tag, &children.iter().flat_map(|child| element(*child, levels)).collect::<Vec<_>>())
            }
            _ => of.raw.to_vec(),
        }
    }
    element(Element::parse(file).unwrap(), levels)
}

/// Replaces the MAC of a file by a PBMAC1 (RFC 9579).
fn with_pbmac1(file: &[u8], password: &str) -> Vec<u8> {
    let (parts, content) = outer(file).unwrap();
    let oid = |hex: &str| der(tag::OBJECT_IDENTIFIER, &[&HEXLOWER.decode(hex.as_bytes()).unwrap()]);
    let prf = der(0x30, &[&oid("2a864886f70d0209"), &[5, 0]]);
    let (salt, length) = (der(tag::OCTET_STRING, &[&[7; 16]]), [2, 1, 32]);
    let kdf = der(0x30, &[&oid("2a864886f70d01050c"), &der(0x30, &[&salt, &[2, 2, 8, 0], &length, &prf])]);
    let algorithm = der(0x30, &[&oid("2a864886f70d01050e"), &der(0x30, &[&kdf, &prf])]);
    let mut key = [0; 32];
    let rounds = std::num::NonZeroU32::new(2048).unwrap();
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &[7; 16], password.as_bytes(), &mut key);
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), &content);
    let info = der(0x30, &[&algorithm, &der(tag::OCTET_STRING, &[mac.as_ref()])]);
    let mac = der(0x30, &[&info, &der(tag::OCTET_STRING, &[b"NOT USED"]), &[2, 1, 1]]);
    der(0x30, &[parts[0].raw, parts[1].raw, &mac])
}

#[test]
fn files_of_openssl_are_read_whatever_their_options() {
    let files = Files::new();
    for options in [
        "",
        "-legacy",
        "-legacy -certpbe PBE-SHA1-RC2-40 -keypbe PBE-SHA1-3DES",
        "-legacy -certpbe PBE-SHA1-RC2-128 -keypbe PBE-SHA1-RC2-128",
        "-legacy -certpbe PBE-SHA1-2DES -keypbe PBE-SHA1-2DES",
        "-legacy -certpbe DES-EDE3-CBC -keypbe DES-EDE3-CBC",
        "-nomac",
        "-noiter -macalg sha1",
        "-macalg sha384 -keypbe AES-192-CBC -certpbe AES-128-CBC",
        "-macalg sha512 -keypbe AES-128-CBC -certpbe AES-128-CBC",
        "-certfile ca.pem -name friendly -caname x",
        "-certpbe NONE",
        "-keypbe NONE -certpbe NONE",
    ] {
        for password in
            ["secret", "Grüße €", "a much longer password than any block of any digest that is used: ".repeat(3).trim()]
        {
            files.opens(&files.export(password, options), password, options);
        }
    }
    for options in ["", "-legacy", "-nomac", "-nomac -keypbe NONE -certpbe NONE"] {
        files.opens(&files.export("", options), "", &format!("no password {options}"));
    }
}

#[test]
fn ber_and_pbmac1_are_read() {
    let files = Files::new();
    for options in ["", "-legacy -certpbe PBE-SHA1-RC2-128"] {
        let file = files.export("secret", options);
        files.opens(&to_ber(&file, 0), "secret", "BER");
        let pbmac1 = with_pbmac1(&file, "secret");
        files.opens(&pbmac1, "secret", "PBMAC1");
        files.opens(&to_ber(&pbmac1, 0), "secret", "PBMAC1 in BER");
        for wrong in ["Secret", ""] {
            assert!(refused(&pbmac1, wrong).contains("the password is wrong"), "{}", refused(&pbmac1, wrong));
            assert!(refused(&to_ber(&file, 0), wrong).contains("the password is wrong"));
        }
    }
    for options in ["-nomac", "-nomac -keypbe NONE -certpbe NONE"] {
        // Converts the list of parts and their bags, but not the certificate, which is always DER.
        files.opens(&to_ber(&files.export("", options), 2), "", "BER inside and outside");
    }
}

#[test]
fn files_of_nss_and_java_are_read() {
    for (file, password) in [(OF_NSS, "secret"), (OF_JAVA, "secret2")] {
        let (key, certificate) = open(file, password).unwrap();
        assert_eq!(key.public(), certificate.key());
        assert!(refused(file, "other").contains("the password is wrong"));
    }
}

#[test]
fn what_is_wrong_is_named_and_the_password_only_where_it_may_be_that() {
    let files = Files::new();
    let file = files.export("secret", "");
    assert!(refused(&file, "wrong").contains("the password is wrong"));
    let without_mac = files.export("secret", "-nomac");
    let said = refused(&without_mac, "wrong");
    assert!(said.contains("it may be the password that is wrong, or the file") && said.contains("no MAC"), "{said}");

    let key = fs::read(files.path().join("key.pem")).unwrap();
    let other_key = files.export("secret", "-legacy -certpbe PBE-SHA1-RC4-128 -keypbe PBE-SHA1-3DES");
    files.openssl("pkcs12 -export -nokeys -in own.pem -out none.pfx -passout pass:secret");
    let no_key = fs::read(files.path().join("none.pfx")).unwrap();
    files.openssl("pkcs12 -export -inkey ca.key -in ca.pem -certfile own.pem -out other.pfx -passout pass:secret");
    files.openssl("ecparam -genkey -name prime256v1 -noout -out ec.key");
    files.openssl("req -x509 -key ec.key -days 30 -subj /CN=ec -out ec.pem");
    files.openssl("pkcs12 -export -inkey ec.key -in ec.pem -out ec.pfx -passout pass:secret");
    let curve = fs::read(files.path().join("ec.pfx")).unwrap();
    files.openssl("pkcs12 -export -nocerts -inkey key.pem -out alone.pfx -passout pass:secret");
    let alone = fs::read(files.path().join("alone.pfx")).unwrap();
    // The last bytes of the file contain the number of iterations.
    let mut slow = file.clone();
    assert_eq!(slow[slow.len() - 4..], [2, 2, 8, 0], "2048");
    let at = slow.len() - 4;
    slow.splice(at.., [2, 4, 0x7f, 0xff, 0xff, 0xff]);
    let slow = {
        // The enclosing lengths grow by two.
        let [version, content, mac] = parts_of(&slow);
        der(0x30, &[version, content, &der(0x30, &[mac])])
    };
    for (file, words) in [
        (&key[..], "it holds a private key by itself; put it and its certificate into one: openssl pkcs12 -export"),
        (b"\xfe\xed\xfe\xed\0\0\0\x02", "Java keystore in the old format (JKS)"),
        (b"", "it is empty"),
        (&file[..file.len() / 2], "it is a damaged PFX: its outermost structure: it is cut off"),
        (&other_key, "RC4 with 128 bits (1.2.840.113549.1.12.1.1), which is not read; export it again with AES"),
        (&no_key, "it holds 0 private keys"),
        (&alone, "it holds no certificate of its private key (certificates: 0"),
        (&curve, "its private key: the key is not an RSA key"),
        (&slow, "hashed 2147483647 times"),
    ] {
        let said = refused(file, "secret");
        assert!(said.contains(words), "{said}\nlacks\n{words}");
        assert!(!said.contains("password is wrong"), "{said}");
    }
    let (key, _) = open(&fs::read(files.path().join("other.pfx")).unwrap(), "secret").unwrap();
    assert!(key.public().modulus_len() == 256, "the own certificate is found among others");
}

/// The parts of a file whose outer lengths may be wrong: version, content, and the MAC's content.
fn parts_of(file: &[u8]) -> [&[u8]; 3] {
    let content = &file[4..];
    let end = 3 + 4 + usize::from(content[5]) * 256 + usize::from(content[6]);
    // The MAC's header has two bytes.
    [&content[..3], &content[3..end], &content[end + 2..]]
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    let files = Files::new();
    let few = "-iter 1 -keypbe AES-128-CBC -certpbe NONE";
    for file in [files.export("secret", &format!("-nomac {few}")), files.export("secret", &format!("-noiter {few}"))] {
        for at in (0..file.len()).filter(|at| *at < 100 || at % 5 == 0 || *at > file.len() - 100) {
            let mut damaged = file.clone();
            damaged[at] ^= 0x80;
            let _ = open(&damaged, "secret");
            assert!(open(&file[..at], "secret").is_err());
        }
    }
}
