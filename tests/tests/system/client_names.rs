//! Tests of client certificates that are bound to hosts: another client cannot use a health certificate.

use std::path::Path;

use claviger::config::{Clients, Tls};
use claviger_client::http::{Client, TlsSettings};
use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::attestation::{host_key_request, signed_octets};
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::health::ResultType;
use claviger_tests::authority::{Authority, Pair};
use claviger_tests::{ALGORITHMS, ATTEST, Daemon, HOST, Lab, Options, PATIENCE, ROLL, block, roll_request, run, said};

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

/// Returns the status of a request with this client certificate, and the body of the answer.
fn status(ca: &Path, daemon: &Daemon, client: &Pair, path: &str, json: bool, body: &[u8]) -> (u16, String) {
    let settings = TlsSettings::trusting(ca).showing(&client.0, &client.1);
    let client = Client::with_tls(&daemon.url, &settings).unwrap().with_timeout(PATIENCE);
    let media_type = if json { "application/json" } else { "application/xml" };
    let reply = block(client.post(path, media_type, body.to_vec())).unwrap();
    (reply.status.as_u16(), String::from_utf8_lossy(&reply.body).into_owned())
}

#[test]
fn a_client_acts_only_for_the_host_that_its_certificate_names() {
    let lab = Lab::make(Options::default());
    let plain = lab.serve();
    let health = block(lab.host(plain.client()).attest()).unwrap();
    assert!(plain.stop().success());

    let authority = Authority::new(lab.path(), "ca");
    let server = authority.issue("server", "/CN=server", "IP:127.0.0.1");
    let own = authority.issue("own", "/CN=somebody", &format!("DNS:other,DNS:{}", HOST.to_ascii_uppercase()));
    let own_by_subject = authority.issue("subject", &format!("/O=x/CN={HOST}"), "");
    // The CN does not count if there are DNS names, and a wildcard is not a host's name.
    let others = authority.issue("others", &format!("/CN={HOST}"), "DNS:other,DNS:*");
    lab.configure(|config| {
        config.server.tls =
            Some(Tls { clients: Clients::Hosts(authority.certificate_file()), ..Tls::new(&server.0, &server.1) });
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
        // Also for a health certificate that is cached by now.
        for (path, json, body) in [(ROLL, false, &release), (BATCH, false, &batch), (ATTEST, true, &attestation)] {
            let (status, answer) = status(&authority.certificate_file(), &daemon, client, path, json, body);
            assert_eq!(status, if right { 200 } else { 403 }, "{path} with {}: {answer}", client.0.display());
            let code = if json { "UnauthorizedErrorReply" } else { "HealthCertificateException" };
            assert_eq!(answer.contains(code), !right, "{path}: {answer}");
        }
    }
    assert!(daemon.stop().success());

    // Clients that are bound to hosts must show a certificate.
    let file = lab.config_file();
    let text = std::fs::read_to_string(&file).unwrap();
    let contradiction = text.replace("client_required = true", "client_required = false");
    assert_ne!(contradiction, text);
    std::fs::write(&file, contradiction).unwrap();
    let refused = run(["serve", "--config", lab.config_file().to_str().unwrap()]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("server.tls.client_is_host"), "{}", said(&refused));
}
