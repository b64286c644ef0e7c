//! Tests of the service's output with independent programs: xmlsec1, xmllint, openssl.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use claviger::config::Tls;
use claviger_protocol::certificate::Certificate;
use claviger_tests::raw::{get, post};
use claviger_tests::{HOST, Lab, METADATA, Options, ROLL, block, metadata, open_release, roll_request, said, tool};

fn openssl(arguments: &[&str], file: &Path) -> Output {
    tool("openssl", Command::new("openssl").args(arguments).arg(file))
}

#[tokio::test]
async fn documents_and_certificates_hold_for_other_programs() {
    let (daemon, lab) = Lab::start(Options::default());
    let client = daemon.client();
    let document = client.get(METADATA).await.unwrap().body;
    let [file, pinned] = [lab.file("metadata.xml"), lab.file("communications.pem")];
    std::fs::write(&file, &document).unwrap();
    std::fs::write(&pinned, metadata(&client).await.communications_certificate.to_pem()).unwrap();
    let lint = tool("libxml2-utils", Command::new("xmllint").arg("--noout").arg(&file));
    assert!(lint.status.success() && said(&lint).is_empty(), "{}", said(&lint));
    let verify = |file: &Path| {
        let mut command = Command::new("xmlsec1");
        tool(
            "xmlsec1",
            command.args(["--verify", "--enabled-key-data", "x509", "--trusted-pem"]).arg(&pinned).arg(file),
        )
    };
    let verified = verify(&file);
    assert!(verified.status.success(), "{}", said(&verified));
    // One changed character in a certificate.
    let mut changed = document.to_vec();
    let at = changed.windows(12).position(|w| w == b"Certificate>").unwrap() + 100;
    changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
    let other = lab.file("changed.xml");
    std::fs::write(&other, changed).unwrap();
    assert!(!verify(&other).status.success());

    // The signers, as PKCS#7.
    let reply = client.get("/Attestation/v2.0/signingCertificates").await.unwrap();
    assert_eq!(reply.headers["content-type"], "application/x-pkcs7-certificates");
    let pkcs7 = lab.file("signers.p7b");
    std::fs::write(&pkcs7, &reply.body).unwrap();
    let printed = openssl(&["pkcs7", "-inform", "DER", "-print_certs", "-in"], &pkcs7);
    let text = said(&printed);
    assert!(printed.status.success() && text.matches("BEGIN CERTIFICATE").count() == 1, "{text}");
    let signer = lab.file("signer.pem");
    std::fs::write(&signer, &printed.stdout).unwrap();

    // A health certificate and its issuer.
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let health_file = lab.file("health.pem");
    std::fs::write(&health_file, Certificate::parse(&health).unwrap().to_pem()).unwrap();
    let shown = openssl(&["x509", "-noout", "-text", "-in"], &health_file);
    let text = said(&shown);
    for expected in [
        "Version: 3",
        "Signature Algorithm: sha256WithRSAEncryption",
        &format!("CN = {HOST}"),
        "serialNumber = ",
        "Key Encipherment, Data Encipherment",
        "1.3.6.1.4.1.311.47.1.1",
        "Public-Key: (2048 bit)",
    ] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
    let chain = tool(
        "openssl",
        Command::new("openssl").args(["verify", "-x509_strict", "-CAfile"]).arg(&signer).arg(&health_file),
    );
    assert!(chain.status.success(), "{}", said(&chain));
    let chain = tool("openssl", Command::new("openssl").args(["verify", "-CAfile"]).arg(&pinned).arg(&health_file));
    assert!(!chain.status.success(), "{}", said(&chain));
    assert!(daemon.stop().success());
}

/// Returns the output of `openssl s_client` for `request`.
fn s_client(address: &str, ca: &Path, version: &str, request: &[u8]) -> Output {
    let mut command = Command::new("openssl");
    command.args([
        "s_client",
        "-quiet",
        "-verify_return_error",
        "-servername",
        "localhost",
        version,
        "-connect",
        address,
    ]);
    command.arg("-CAfile").arg(ca).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("openssl is missing: apt-get install openssl");
    let mut stdin = child.stdin.take().unwrap();
    // After a refused handshake, the program ends before it reads.
    let _ = stdin.write_all(request);
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    output
}

#[test]
fn tls_is_served() {
    let lab = Lab::make(Options::default());
    let plain = lab.serve();
    let health = block(lab.host(plain.client()).attest()).unwrap();
    assert!(plain.stop().success());
    let [certificate, key] = ["tls.pem", "tls.key"].map(|name| lab.file(name));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    command.args(["-addext", "subjectAltName=DNS:localhost", "-out"]).arg(&certificate).arg("-keyout").arg(&key);
    let made = tool("openssl", &mut command);
    assert!(made.status.success(), "{}", said(&made));
    lab.configure(|config| config.server.tls = Some(Tls::new(&certificate, key)));
    let daemon = lab.serve();
    let address = daemon.url.strip_prefix("https://").unwrap();

    let closing = |request: Vec<u8>| {
        let text = String::from_utf8(request).unwrap();
        text.replacen("Host: test\r\n", "Host: localhost\r\nConnection: close\r\n", 1).into_bytes()
    };
    let document = closing(get(METADATA));
    let release = closing(post(ROLL, "application/xml", &roll_request(&health, &lab.protector())));
    for version in ["-tls1_2", "-tls1_3"] {
        let output = s_client(address, &certificate, version, &document);
        let text = said(&output);
        assert!(text.contains("HTTP/1.1 200 OK") && text.contains("</Metadata>"), "{version}: {text}");
        let output = s_client(address, &certificate, version, &release);
        let text = said(&output);
        assert!(text.contains("HTTP/1.1 200 OK"), "{version}: {text}");
        let body = output.stdout.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let (keys, _) = open_release(&output.stdout[body..], &lab.identity()).unwrap();
        assert!(*lab.owner().open(&lab.protector()).unwrap() == *keys.ingress);
    }
    // Old TLS versions and connections without TLS get nothing and do no harm.
    assert!(!said(&s_client(address, &certificate, "-tls1_1", &document)).contains("HTTP/1.1"));
    let mut plain = claviger_tests::raw::Connection::open(address.parse().unwrap()).unwrap();
    let silence = plain.exchange(&get(METADATA)).unwrap_err();
    assert!(!format!("{silence:?}").contains("HTTP/1.1"), "{silence:?}");
    let output = s_client(address, &certificate, "-tls1_3", &document);
    assert!(said(&output).contains("HTTP/1.1 200 OK"), "{}", said(&output));
    assert!(daemon.stop().success());
}
