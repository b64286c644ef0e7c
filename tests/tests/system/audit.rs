//! Tests of the audit trail: a decision that cannot be recorded is not carried out, and recorded decisions can be found.

use std::time::Duration;

use claviger_protocol::attestation::parse_error_reply;
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::error::{Code, Refusal};
use claviger_tests::{ALGORITHMS, ATTEST, Lab, Options, ROLL, open_release, roll_request, run, said, until};

#[tokio::test]
async fn nothing_is_released_while_the_trail_cannot_be_written() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let health = lab.host(daemon.client()).attest().await.unwrap();
    assert!(daemon.stop().success());
    let trail = lab.file("state/audit.jsonl");
    std::fs::rename(&trail, lab.file("state/audit.old")).unwrap();
    std::os::unix::fs::symlink("/dev/full", &trail).unwrap();

    // The daemon starts: the trail can be opened, and requests that only read are served.
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let client = daemon.client();
    let request = roll_request(&health, &lab.protector());
    for turn in 1..=3 {
        let reply = client.post(ROLL, "application/xml", request.clone()).await.unwrap();
        assert_eq!(reply.status, 503);
        assert!(reply.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
        let refusal = Refusal::parse(&reply.body).unwrap();
        assert_eq!(refusal.code, Code::ServiceUnavailable);
        let text = String::from_utf8_lossy(&reply.body);
        assert!(!text.contains("EgressProtector") && !text.contains("Encrypted") && reply.body.len() < 1000, "{text}");
        let metrics = daemon.metrics().await;
        assert_eq!(metrics.count("claviger_releases_total", &[("outcome", "ServiceUnavailableException")]), turn);
        assert_eq!(metrics.count("claviger_releases_total", &[("outcome", "success")]), 0);
        assert_eq!(metrics.count("claviger_audit_errors_total", &[]), turn, "audit errors of {turn} records");
    }
    // A refusal releases nothing, so it needs no line: it is counted.
    let reply = client.post(ROLL, "application/xml", "<x/>").await.unwrap();
    assert_eq!((reply.status.as_u16(), Refusal::parse(&reply.body).unwrap().code), (400, Code::InvalidRequest));
    let reply = client.post(ATTEST, "application/json", "{}").await.unwrap();
    assert_eq!(parse_error_reply(&reply.body).unwrap().name, "PayloadErrorReply");
    let refused = lab.host(daemon.client()).attest().await.unwrap_err().to_string();
    assert!(refused.contains("503 UnavailableErrorReply"), "{refused}");

    // Hosts cannot be registered or removed either.
    let config = lab.config_file();
    let config = config.to_str().unwrap();
    let removed = run(["hosts", "remove", "demo-host", "--config", config]);
    assert!(!removed.status.success() && said(&removed).contains("audit trail"), "{}", said(&removed));
    assert!(said(&run(["hosts", "list", "--config", config])).contains("demo-host"));

    // The disk has room again: the next release succeeds, without a restart.
    std::fs::remove_file(&trail).unwrap();
    let reply = client.post(ROLL, "application/xml", request).await.unwrap();
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    let (keys, _) = open_release(&reply.body, &lab.identity()).unwrap();
    assert!(*lab.owner().open(&lab.protector()).unwrap() == *keys.ingress);
    lab.host(daemon.client()).attest().await.unwrap();
    assert!(daemon.stop().success());
    let told = lab.audit();
    let of =
        |event: &str, outcome: &str| told.iter().filter(|l| l["event"] == event && l["outcome"] == outcome).count();
    assert_eq!((of("release", "success"), of("attest", "success")), (1, 1), "{told:?}");
    // The refusals were counted meanwhile: three releases and one attestation for lack of the trail, and two anonymous
    // requests.
    assert_eq!(of("release", "ServiceUnavailableException"), 3, "{told:?}");
    assert_eq!(of("attest", "UnavailableErrorReply"), 1, "{told:?}");
    assert_eq!((of("release", "InvalidRequestException"), of("attest", "PayloadErrorReply")), (1, 1), "{told:?}");
    assert_eq!(told.len(), 8, "{told:?}");
}

/// The id is in the answer, in the audit line and in every log line: of one release that no HSM served, and of one item of
/// a batch.
#[tokio::test]
async fn a_request_has_one_id_everywhere() {
    let lab = Lab::make(Options { hsms: 1, ..Options::default() });
    let daemon = lab.serve();
    let health = lab.host(daemon.client()).attest().await.unwrap();
    assert!(daemon.stop().success());
    let faulty = lab.behind_faulty();
    let daemon = lab.serve();
    faulty.set("hsm-a", &["call=* rv=CKR_DEVICE_ERROR"]);
    let client = daemon.client();
    let mut ids = Vec::new();
    let mut requests = vec![(ROLL, roll_request(&health, &lab.protector()))];
    let (health_certificate, ingress_protectors) = (health, vec![lab.protector()]);
    let batch = BatchRequest { health_certificate, algorithms: ALGORITHMS, ingress_protectors };
    requests.push(("/KeyProtection/service/v2.0/RollTransportKeys", batch.to_xml()));
    for (path, request) in requests {
        // The log has at most one such line per second.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let reply = client.post(path, "application/xml", request).await.unwrap();
        ids.push(reply.headers["x-request-id"].to_str().unwrap().to_owned());
    }
    let [single, batch] = ids.as_slice() else { panic!() };
    // Refusals are counted, and the first ones of a second are listed.
    let recorded = || {
        let trail = lab.trail();
        let requests = trail.iter().filter_map(|line| line["requests"].as_array()).flatten();
        requests.map(|request| request.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let both = [single.clone(), format!("{batch}.1")];
    until("both are in the trail", || recorded().ends_with(&both).then_some(()));
    for id in [single, batch] {
        daemon.process.line(|line| (line.contains("no HSM served a release") && line.contains(id)).then_some(()));
    }
    let of_item = format!("{batch}.1");
    daemon.process.line(|line| (line.contains("no HSM served a release") && line.contains(&of_item)).then_some(()));
}
