//! Client certificates that are bound to hosts: a health certificate in other hands is worth nothing.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use claviger::config::Tls;
use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::attestation::{host_key_request, signed_octets};
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::health::ResultType;
use claviger_tests::{ALGORITHMS, ATTEST, Daemon, HOST, Lab, Options, ROLL, block, roll_request, run, said, tool};

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

fn openssl(arguments: &[&str]) {
    let output = tool("openssl", Command::new("openssl").args(arguments));
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A throw-away authority, and certificates from it.
struct Authority<'a>(&'a Lab);

impl<'a> Authority<'a> {
    fn new(lab: &'a Lab) -> Self {
        let (key, certificate) = (lab.file("ca.key"), lab.file("ca.pem"));
        let subject = ["-subj", "/CN=throw-away CA"];
        let out = ["-keyout", text(&key), "-out", text(&certificate)];
        openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"][..], &subject, &out].concat());
        Self(lab)
    }

    /// A certificate and its key, for this subject and with this subjectAltName, if any.
    fn certificate(&self, file: &str, subject: &str, alternative: &str) -> (PathBuf, PathBuf) {
        let path = |end: &str| self.0.file(&format!("{file}.{end}"));
        let (key, certificate, extensions) = (path("key"), path("pem"), path("ext"));
        let alternative =
            if alternative.is_empty() { String::new() } else { format!("subjectAltName={alternative}\n") };
        std::fs::write(&extensions, format!("basicConstraints=CA:false\n{alternative}")).unwrap();
        let request = path("csr");
        let made = ["-newkey", "rsa:2048", "-nodes", "-keyout", text(&key), "-out", text(&request)];
        openssl(&[&["req", "-new", "-subj", subject][..], &made].concat());
        let (ca, ca_key) = (self.0.file("ca.pem"), self.0.file("ca.key"));
        let by = ["-CA", text(&ca), "-CAkey", text(&ca_key), "-CAcreateserial", "-days", "30"];
        let files = ["-in", text(&request), "-out", text(&certificate), "-extfile", text(&extensions)];
        openssl(&[&["x509", "-req"][..], &by, &files].concat());
        (certificate, key)
    }
}

/// The status of a request with this client certificate, and the body of its answer.
fn status(
    lab: &Lab,
    daemon: &Daemon,
    client: &(PathBuf, PathBuf),
    path: &str,
    json: bool,
    body: &[u8],
) -> (u16, String) {
    let (sent, received) = (lab.file("sent"), lab.file("received"));
    std::fs::write(&sent, body).unwrap();
    let media_type = if json { "application/json" } else { "application/xml" };
    let ca = lab.file("ca.pem");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--cacert", text(&ca), "--cert", text(&client.0), "--key", text(&client.1)]);
    curl.args(["--header", &format!("Content-Type: {media_type}"), "--data-binary", &format!("@{}", text(&sent))]);
    curl.args(["--output", text(&received), "--write-out", "%{http_code}"]);
    let output = tool("curl", curl.arg(format!("https://{}{path}", daemon.address())));
    assert!(output.status.success(), "{}", said(&output));
    let answer = std::fs::read(&received).unwrap();
    (String::from_utf8(output.stdout).unwrap().parse().unwrap(), String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn a_client_acts_only_for_the_host_that_its_certificate_names() {
    let lab = Lab::make(Options::default());
    let plain = lab.serve();
    let health = block(lab.host(plain.client()).attest()).unwrap();
    assert!(plain.stop().success());

    let authority = Authority::new(&lab);
    let server = authority.certificate("server", "/CN=server", "IP:127.0.0.1");
    let own = authority.certificate("own", "/CN=somebody", &format!("DNS:other,DNS:{}", HOST.to_ascii_uppercase()));
    let own_by_subject = authority.certificate("subject", &format!("/O=x/CN={HOST}"), "");
    // The CN does not count where there are DNS names, and a wildcard is no host's name.
    let others = authority.certificate("others", &format!("/CN={HOST}"), "DNS:other,DNS:*");
    lab.configure(|config| {
        config.server.tls = Some(Tls {
            client_ca: Some(lab.file("ca.pem")),
            client_required: true,
            client_is_host: true,
            ..Tls::new(&server.0, &server.1)
        });
    });
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));

    let (host_key, identity) = (lab.key("host/hostkey.pem"), lab.identity());
    let [host, idk] = [host_key.public(), identity.public()].map(|key| key.spki_der());
    let signature = host_key.sign(SignatureAlgorithm::DEFAULT, &signed_octets(host, idk)).unwrap();
    let attestation = host_key_request([7; 16], &[ResultType::EncryptionCertificate], host, idk, &signature);
    let release = roll_request(&health, &lab.protector());
    let batch = BatchRequest {
        health_certificate: health.clone(),
        algorithms: ALGORITHMS,
        ingress_protectors: vec![lab.protector()],
    };
    let batch = batch.to_xml();
    for (client, right) in [(&own, true), (&own_by_subject, true), (&others, false)] {
        // Also for a health certificate that is known by now.
        for (path, json, body) in [(ROLL, false, &release), (BATCH, false, &batch), (ATTEST, true, &attestation)] {
            let (status, answer) = status(&lab, &daemon, client, path, json, body);
            assert_eq!(status, if right { 200 } else { 403 }, "{path} with {}: {answer}", text(&client.0));
            let code = if json { "UnauthorizedErrorReply" } else { "HealthCertificateException" };
            assert_eq!(answer.contains(code), !right, "{path}: {answer}");
        }
    }
    assert!(daemon.stop().success());

    // Bound to hosts, clients have to show a certificate.
    lab.configure(|config| config.server.tls.as_mut().unwrap().client_required = false);
    let refused = run(["serve", "--config", lab.config_file().to_str().unwrap()]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("server.tls.client_is_host"), "{}", said(&refused));
}
