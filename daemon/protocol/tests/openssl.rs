//! Compares keys, signatures, certificates and certificate lists with the `openssl` command line.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use claviger_protocol::algorithm::{Digest, Oaep, SignatureAlgorithm, SignatureDigest};
use claviger_protocol::certificate::build::{DistinguishedName, Template, key_id, random_serial};
use claviger_protocol::certificate::{Certificate, CertificateError, CertificateSignatureError, KeyUsage};
use claviger_protocol::health::{self, HealthError, ResultType, SYSTEM_HEALTH_AUTHENTICATION};
use claviger_protocol::input::InputError;
use claviger_protocol::pkcs7;
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey, RsaPublicKey};
use tempfile::TempDir;

const NOW: i64 = 1_800_000_000;
const DIGESTS: [(Digest, &str); 4] =
    [(Digest::Sha1, "sha1"), (Digest::Sha256, "sha256"), (Digest::Sha384, "sha384"), (Digest::Sha512, "sha512")];
const SIGNATURE_DIGESTS: [(SignatureDigest, &str); 3] =
    [(SignatureDigest::Sha256, "sha256"), (SignatureDigest::Sha384, "sha384"), (SignatureDigest::Sha512, "sha512")];

fn key(index: usize) -> &'static RsaPrivateKey {
    static KEYS: [OnceLock<RsaPrivateKey>; 3] = [const { OnceLock::new() }; 3];
    KEYS[index].get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
}

/// A directory in which openssl runs.
struct Openssl(TempDir);

impl Openssl {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), content).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).unwrap()
    }

    fn try_run(&self, command: &str) -> Result<String, String> {
        let output =
            Command::new("openssl").args(command.split_whitespace()).current_dir(self.path()).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(text) } else { Err(text) }
    }

    fn run(&self, command: &str) -> String {
        self.try_run(command).unwrap_or_else(|text| panic!("openssl {command}: {text}"))
    }

    /// Creates a self-signed certificate `name.pem` and its key `name.key`.
    fn certificate(&self, name: &str, arguments: &str) -> Result<Certificate, CertificateError> {
        self.run(&format!("req -x509 -nodes -keyout {name}.key -out {name}.pem -subj /CN={name} -days 30 {arguments}"));
        Certificate::from_pem(std::str::from_utf8(&self.read(&format!("{name}.pem"))).unwrap())
    }
}

#[test]
fn keys_made_by_openssl_are_read() {
    let openssl = Openssl::new();
    for bits in [2048_usize, 3072, 4096] {
        openssl.run(&format!("genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:{bits} -out key.pem"));
        openssl.run("pkey -in key.pem -pubout -out public.pem");
        openssl.run("pkey -in key.pem -pubout -outform DER -out public.der");
        openssl.run("pkcs8 -topk8 -nocrypt -in key.pem -outform DER -out key.der");
        let public = RsaPublicKey::from_file(&openssl.read("public.pem")).unwrap();
        assert_eq!(public.modulus_len(), bits / 8);
        assert_eq!(public.spki_der(), openssl.read("public.der"));
        assert_eq!(RsaPublicKey::from_any(&openssl.read("public.der")).unwrap(), public);
        let private = RsaPrivateKey::from_pkcs8_pem(std::str::from_utf8(&openssl.read("key.pem")).unwrap()).unwrap();
        assert_eq!(private.public(), &public);
        assert_eq!(private.to_pkcs8_der(), openssl.read("key.der"));
        openssl.write("ours.pem", private.to_pkcs8_pem().as_bytes());
        assert!(openssl.run("pkey -in ours.pem -check -noout").contains("Key is valid"));
    }
}

#[test]
fn keys_that_are_too_weak_are_refused() {
    let openssl = Openssl::new();
    let weak = |options: &str| {
        openssl.run(&format!("genpkey -quiet -algorithm RSA {options} -out key.pem"));
        openssl.run("pkey -in key.pem -pubout -out public.pem");
        let private = RsaPrivateKey::from_pkcs8_pem(std::str::from_utf8(&openssl.read("key.pem")).unwrap());
        let public = RsaPublicKey::from_file(&openssl.read("public.pem")).unwrap_err();
        let private = private.unwrap_err();
        assert_eq!(public, InputError::Key(private));
        private
    };
    assert_eq!(weak("-pkeyopt rsa_keygen_bits:1024"), KeyError::ModulusSize(1024));
    assert_eq!(weak("-pkeyopt rsa_keygen_bits:2047"), KeyError::ModulusSize(2047));
    assert_eq!(weak("-pkeyopt rsa_keygen_bits:2048 -pkeyopt rsa_keygen_pubexp:3"), KeyError::Exponent);
    assert_eq!(
        openssl.certificate("weak", "-newkey rsa:1024"),
        Err(CertificateError::Key(KeyError::ModulusSize(1024)))
    );
    let curve = openssl.certificate("curve", "-newkey ec -pkeyopt ec_paramgen_curve:P-256");
    assert_eq!(curve, Err(CertificateError::Key(KeyError::NotRsa)));
    openssl.run("genpkey -quiet -algorithm RSA-PSS -pkeyopt rsa_keygen_bits:2048 -out key.pem");
    openssl.run("pkey -in key.pem -pubout -out public.pem");
    assert_eq!(RsaPublicKey::from_file(&openssl.read("public.pem")), Err(InputError::Key(KeyError::NotRsa)));
    openssl
        .run("genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -pkeyopt rsa_keygen_primes:3 -out key.pem");
    let three = RsaPrivateKey::from_pkcs8_pem(std::str::from_utf8(&openssl.read("key.pem")).unwrap());
    assert_eq!(three.unwrap_err(), KeyError::Format);
}

#[test]
fn signatures_are_understood_both_ways() {
    let openssl = Openssl::new();
    openssl.write("key.pem", key(0).to_pkcs8_pem().as_bytes());
    openssl.run("pkey -in key.pem -pubout -out public.pem");
    openssl.write("message", b"what is signed");
    for (digest, name) in SIGNATURE_DIGESTS {
        for (algorithm, options) in [
            (SignatureAlgorithm::Pkcs1(digest), ""),
            (SignatureAlgorithm::Pss(digest), "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest"),
        ] {
            openssl.write("ours", key(0).sign(algorithm, b"what is signed").unwrap());
            let verified = openssl.run(&format!("dgst -{name} {options} -verify public.pem -signature ours message"));
            assert!(verified.contains("Verified OK"), "{algorithm:?}: {verified}");
            openssl.run(&format!("dgst -{name} {options} -sign key.pem -out theirs message"));
            let theirs = openssl.read("theirs");
            assert_eq!(key(0).public().verify(algorithm, b"what is signed", &theirs), Ok(()), "{algorithm:?}");
        }
        // A signature with another salt length counts as another algorithm.
        openssl.run(&format!(
            "dgst -{name} -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:20 -sign key.pem -out theirs message"
        ));
        let theirs = openssl.read("theirs");
        assert!(key(0).public().verify(SignatureAlgorithm::Pss(digest), b"what is signed", &theirs).is_err());
    }
}

#[test]
fn oaep_is_understood_both_ways() {
    let openssl = Openssl::new();
    openssl.write("key.pem", key(0).to_pkcs8_pem().as_bytes());
    openssl.run("pkey -in key.pem -pubout -out public.pem");
    let plaintext = [0x5a; 32];
    openssl.write("plaintext", plaintext);
    for (digest, digest_name) in DIGESTS {
        for (mgf, mgf_name) in DIGESTS {
            let oaep = Oaep { digest, mgf };
            let options = format!(
                "-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:{digest_name} -pkeyopt rsa_mgf1_md:{mgf_name}"
            );
            openssl.write("ours", key(0).public().encrypt_oaep(oaep, &plaintext).unwrap());
            openssl.run(&format!("pkeyutl -decrypt -inkey key.pem {options} -in ours -out decrypted"));
            assert_eq!(openssl.read("decrypted"), plaintext, "{oaep:?}");
            openssl.run(&format!("pkeyutl -encrypt -pubin -inkey public.pem {options} -in plaintext -out theirs"));
            let decrypted = key(0).decrypt_oaep(oaep, &openssl.read("theirs")).unwrap();
            assert_eq!(decrypted.as_slice(), plaintext, "{oaep:?}");
        }
    }
}

#[test]
fn certificates_made_by_openssl_are_read() {
    let openssl = Openssl::new();
    let arguments = format!(
        "-newkey rsa:3072 -sha384 -subj /C=CH/O=Example/CN=host.example/serialNumber=00ff \
         -addext keyUsage=critical,keyEncipherment,dataEncipherment \
         -addext extendedKeyUsage=serverAuth,{SYSTEM_HEALTH_AUTHENTICATION} -addext subjectAltName=DNS:host.example"
    );
    let certificate = openssl.certificate("host", &arguments).unwrap();
    assert_eq!(certificate.common_name(), Some("host.example"));
    assert_eq!(certificate.subject_serial_number(), Some("00ff"));
    assert_eq!(certificate.subject_der(), certificate.issuer_der());
    assert_eq!(certificate.not_after() - certificate.not_before(), 30 * 24 * 3600);
    assert_eq!(certificate.key().modulus_len(), 384);
    assert!(certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DATA_ENCIPHERMENT));
    assert!(!certificate.has_key_usage(KeyUsage::DIGITAL_SIGNATURE));
    assert!(certificate.has_extended_key_usage(SYSTEM_HEALTH_AUTHENTICATION));
    assert!(certificate.has_extended_key_usage("1.3.6.1.5.5.7.3.1"));
    assert_eq!(certificate.verify_signed_by(certificate.key()), Ok(()));
    openssl.run("x509 -in host.pem -outform DER -out host.der");
    assert_eq!(certificate.der(), openssl.read("host.der"));
    openssl.run("x509 -in host.pem -text -out text.pem");
    assert_eq!(&RsaPublicKey::from_file(&openssl.read("text.pem")).unwrap(), certificate.key());
    let thumbprint = openssl.run("x509 -in host.pem -noout -fingerprint -sha256").replace(':', "").to_lowercase();
    assert!(thumbprint.contains(&data_encoding::HEXLOWER.encode(&certificate.thumbprint())));

    // An X.509 version 1 certificate without extensions.
    openssl.run("req -new -key host.key -subj /CN=old -out old.csr");
    openssl.run("x509 -req -in old.csr -signkey host.key -days 1 -out old.pem");
    assert!(openssl.run("x509 -in old.pem -noout -text").contains("Version: 1"));
    let old = Certificate::from_pem(std::str::from_utf8(&openssl.read("old.pem")).unwrap()).unwrap();
    assert_eq!((old.common_name(), old.key()), (Some("old"), certificate.key()));
    assert_eq!(&RsaPublicKey::from_any(old.der()).unwrap(), certificate.key());
}

#[test]
fn only_strong_issuer_signatures_are_accepted() {
    let openssl = Openssl::new();
    let signed = |options: &str| {
        let certificate = openssl.certificate("signed", &format!("-newkey rsa:2048 {options}")).unwrap();
        certificate.verify_signed_by(certificate.key())
    };
    for (_, digest) in SIGNATURE_DIGESTS {
        assert_eq!(signed(&format!("-{digest}")), Ok(()));
        let pss = format!("-{digest} -sigopt rsa_padding_mode:pss");
        assert_eq!(signed(&format!("{pss} -sigopt rsa_pss_saltlen:digest")), Ok(()), "{digest}");
        let refused = Err(CertificateSignatureError::Algorithm);
        assert_eq!(signed(&format!("{pss} -sigopt rsa_pss_saltlen:20")), refused);
        let mgf = if digest == "sha256" { "sha1" } else { "sha256" };
        assert_eq!(signed(&format!("{pss} -sigopt rsa_pss_saltlen:digest -sigopt rsa_mgf1_md:{mgf}")), refused);
    }
    assert_eq!(signed("-sha1"), Err(CertificateSignatureError::Algorithm));
    assert_eq!(signed("-sha224"), Err(CertificateSignatureError::Algorithm));
    assert_eq!(
        signed("-sha1 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:20"),
        Err(CertificateSignatureError::Algorithm)
    );
}

fn signer() -> Certificate {
    let template = health::signer_template(key(0).public(), NOW - 1000, NOW + 1_000_000_000).unwrap();
    Certificate::parse(&template.to_be_signed().unwrap().sign_with(key(0)).unwrap()).unwrap()
}

fn health_certificate(content: ResultType) -> Certificate {
    let to_be_signed =
        health::issue(&signer(), "host.example", key(1).public(), key(2).public(), content, NOW).unwrap();
    // Another program makes the signature: openssl.
    let openssl = Openssl::new();
    openssl.write("key.pem", key(0).to_pkcs8_pem().as_bytes());
    openssl.write("octets", to_be_signed.octets());
    openssl.run("dgst -sha256 -sign key.pem -out signature octets");
    Certificate::parse(&to_be_signed.assemble(&openssl.read("signature"))).unwrap()
}

#[test]
fn health_certificates_satisfy_openssl() {
    let openssl = Openssl::new();
    openssl.write("signer.pem", signer().to_pem());
    for (content, usages) in [
        (ResultType::EncryptionCertificate, "Key Encipherment, Data Encipherment\n"),
        (ResultType::SigningCertificate, "Digital Signature\n"),
    ] {
        let certificate = health_certificate(content);
        openssl.write("health.pem", certificate.to_pem());
        openssl.write("health.der", certificate.der());
        let verified = openssl.run(&format!("verify -x509_strict -attime {NOW} -CAfile signer.pem health.pem"));
        assert!(verified.contains("health.pem: OK"), "{verified}");
        assert!(openssl.try_run(&format!("verify -attime {} -CAfile signer.pem health.pem", NOW - 301)).is_err());
        assert!(openssl.try_run(&format!("verify -attime {} -CAfile signer.pem health.pem", NOW + 28501)).is_err());

        let text = openssl.run("x509 -in health.pem -noout -text");
        assert!(text.contains("Version: 3"), "{text}");
        assert!(text.contains("Signature Algorithm: sha256WithRSAEncryption"));
        assert!(text.contains("X509v3 Key Usage: critical\n") && text.contains(usages), "{text}");
        let health_usage = "X509v3 Extended Key Usage: \n                1.3.6.1.4.1.311.47.1.1\n";
        assert!(text.contains(health_usage), "not critical, and alone: {text}");
        let host_key = data_encoding::HEXLOWER.encode(&key(1).public().spki_sha256());
        let subject = openssl.run("x509 -in health.pem -noout -subject -nameopt RFC2253,show_type");
        assert!(
            subject.contains(&format!("serialNumber=PRINTABLESTRING:{host_key},CN=UTF8STRING:host.example")),
            "{subject}"
        );
        let dates = openssl.run("x509 -in health.pem -noout -dates");
        assert!(dates.contains("notBefore=Jan 15 07:55:00 2027 GMT\nnotAfter=Jan 15 15:55:00 2027 GMT"), "{dates}");
        let serial = openssl.run("x509 -in health.pem -noout -serial");
        assert_eq!(serial.trim().len(), "serial=".len() + 32, "{serial}");
        let public = openssl.run("x509 -in health.pem -noout -pubkey");
        assert_eq!(&RsaPublicKey::from_file(public.as_bytes()).unwrap(), key(2).public());
        openssl.run("asn1parse -inform DER -in health.der");
        openssl.run("x509 -inform DER -in health.der -outform DER -out again.der");
        assert_eq!(openssl.read("again.der"), certificate.der());
    }
    let text = openssl.run("x509 -in signer.pem -noout -text");
    assert!(text.contains("X509v3 Basic Constraints: critical\n                CA:TRUE\n"), "{text}");
    assert!(text.contains("X509v3 Key Usage: critical\n                Certificate Sign\n"), "{text}");
    assert!(openssl.run(&format!("verify -attime {NOW} -CAfile signer.pem signer.pem")).contains("OK"));
}

#[test]
fn a_health_certificate_signed_with_sha1_or_by_another_is_refused() {
    let openssl = Openssl::new();
    openssl
        .write("config", format!("[x]\nkeyUsage=keyEncipherment\nextendedKeyUsage={SYSTEM_HEALTH_AUTHENTICATION}\n"));
    openssl.write("signer.key", key(0).to_pkcs8_pem().as_bytes());
    openssl.write("other.key", key(1).to_pkcs8_pem().as_bytes());
    openssl.write("signer.pem", signer().to_pem());
    openssl.run("req -new -newkey rsa:2048 -nodes -keyout host.key -subj /CN=h/serialNumber=00 -out host.csr");
    let check = |options: &str| {
        openssl.run(&format!(
            "x509 -req -in host.csr -extfile config -extensions x -days 1 {options} -outform DER -out host.der"
        ));
        let der = openssl.read("host.der");
        let now = Certificate::parse(&der).unwrap().not_before();
        health::check(&der, &[signer()], now).map(|claims| claims.host_name)
    };
    assert_eq!(check("-CA signer.pem -CAkey signer.key -CAcreateserial -sha256"), Ok("h".to_owned()));
    assert_eq!(
        check(
            "-CA signer.pem -CAkey signer.key -CAcreateserial -sha512 -sigopt rsa_padding_mode:pss \
             -sigopt rsa_pss_saltlen:digest"
        ),
        Ok("h".to_owned())
    );
    assert_eq!(check("-CA signer.pem -CAkey signer.key -CAcreateserial -sha1"), Err(HealthError::Issuer));
    assert_eq!(check("-signkey host.key -sha256"), Err(HealthError::Issuer));
}

#[test]
fn far_times_are_written_as_rfc_5280_wants() {
    let openssl = Openssl::new();
    // 2049-12-31T23:59:59Z and one second later.
    for (not_after, kind) in [(2_524_607_999, "UTCTIME"), (2_524_608_000, "GENERALIZEDTIME")] {
        let template = Template {
            subject: DistinguishedName::new("owner"),
            issuer_der: None,
            key: key(0).public().clone(),
            serial: random_serial().unwrap(),
            not_before: 0,
            not_after,
            key_usage: KeyUsage::DIGITAL_SIGNATURE,
            extended_key_usages: Vec::new(),
            ca: None,
            subject_key_id: Some(key_id(key(0).public()).to_vec()),
            authority_key_id: None,
            dns_names: Vec::new(),
        };
        let certificate = Certificate::parse(&template.to_be_signed().unwrap().sign_with(key(0)).unwrap()).unwrap();
        assert_eq!((certificate.not_before(), certificate.not_after()), (0, not_after));
        openssl.write("far.der", certificate.der());
        let parsed = openssl.run("asn1parse -inform DER -in far.der");
        let times: Vec<_> = parsed.lines().filter(|line| line.contains("TIME")).collect();
        assert!(times[0].contains("UTCTIME") && times[1].contains(kind), "{parsed}");
    }
}

#[test]
fn lists_of_certificates_are_read_by_openssl() {
    let openssl = Openssl::new();
    let certificates = [signer(), health_certificate(ResultType::EncryptionCertificate), signer()];
    let mut ders: Vec<&[u8]> = certificates.iter().map(Certificate::der).collect();
    openssl.write("list.p7b", pkcs7::certificates_only(&ders));
    let printed = openssl.run("pkcs7 -inform DER -in list.p7b -print_certs");
    let mut found: Vec<_> = printed
        .split_inclusive("-----END CERTIFICATE-----\n")
        .filter(|text| text.contains("BEGIN"))
        .map(|text| Certificate::from_pem(text).unwrap().der().to_vec())
        .collect();
    ders.sort_unstable();
    assert_eq!(found, ders, "in DER's order");
    found.dedup();
    assert_eq!(found.len(), 3, "two signers with random serials differ");
    openssl.run("pkcs7 -inform DER -in list.p7b -outform DER -out again.p7b");
    assert_eq!(openssl.read("again.p7b"), openssl.read("list.p7b"));
    openssl.write("empty.p7b", pkcs7::certificates_only(&[]));
    assert!(!openssl.run("pkcs7 -inform DER -in empty.p7b -print_certs").contains("BEGIN"));
}
