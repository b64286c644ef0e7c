//! Tests that `/live`, `/ready` and `/metrics` are correct.

use claviger::config::TokenName;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{ATTEST, Lab, METADATA, Options, ROLL, roll_request};

#[tokio::test]
async fn a_daemon_is_ready_while_a_token_really_works() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let daemon = lab.serve();
    let ready = daemon.until_ready_is(200).await;
    assert!(ready.body.starts_with(b"ready: hsm-"), "{ready:?}");
    let live = daemon.probe("/live").await;
    assert_eq!((live.status.as_u16(), &live.body[..]), (200, &b"live\n"[..]));
    let metrics = daemon.probe("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let page = std::str::from_utf8(&metrics.body).unwrap();
    for line in page.lines().filter(|line| line.starts_with("# TYPE ")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(page.contains(&format!("# HELP {name} ")), "{name} has no help");
    }
    // All counters exist from the start, with the value zero.
    let series = daemon.metrics().await;
    assert_eq!(
        series.count("claviger_releases_total", &[("outcome", "HealthCertificateException"), ("api", "v1.0")]),
        0
    );
    assert_eq!(series.count("claviger_build_info", &[]), 1);
    assert_eq!(daemon.probe("/nothing").await.status, 404);
    // The two listeners have separate paths.
    assert_eq!(daemon.probe(METADATA).await.status, 404);
    assert_eq!(daemon.client().get("/metrics").await.unwrap().status, 404);
    assert!(daemon.stop().success());
}

#[tokio::test]
async fn tokens_that_go_away_are_noticed() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let request = roll_request(&health, &lab.protector());
    std::fs::rename(lab.file("tokens"), lab.file("away")).unwrap();
    let not_ready = daemon.until_ready_is(503).await;
    let text = String::from_utf8_lossy(&not_ready.body);
    assert!(text.starts_with("not ready: hsm-a: ") && text.contains("hsm-b: "), "{text}");
    assert_eq!(daemon.probe("/live").await.status, 200);
    let reply = daemon.client().post(ROLL, "application/xml", request.clone()).await.unwrap();
    assert_eq!(reply.status, 503, "{}", String::from_utf8_lossy(&reply.body));
    assert!(reply.headers.contains_key("retry-after"));

    // The members come back without a restart by an administrator.
    std::fs::rename(lab.file("away"), lab.file("tokens")).unwrap();
    daemon.until_ready_is(200).await;
    assert_eq!(daemon.client().post(ROLL, "application/xml", request).await.unwrap().status, 200);
    assert!(daemon.stop().success());
}

#[tokio::test]
async fn one_good_token_is_enough_and_none_is_not() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    // The first member has the higher rank.
    lab.configure(|config| config.hsm[0].token = TokenName::Label("no such token".to_owned()));
    let daemon = lab.serve();
    let ready = daemon.until_ready_is(200).await;
    assert_eq!(&ready.body[..], b"ready: hsm-b decrypts and signs\n");
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    for _ in 0..10 {
        host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    }
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.count("claviger_releases_total", &[("outcome", "success")]), 10);
    assert_eq!(metrics.count("claviger_hsm_sessions_open", &[("hsm", "hsm-a")]), 0);
    assert!(daemon.stop().success());

    lab.configure(|config| config.hsm[1].token = TokenName::Label("nor this one".to_owned()));
    let daemon = lab.serve();
    let not_ready = daemon.until_ready_is(503).await;
    let text = String::from_utf8_lossy(&not_ready.body);
    assert!(text.contains("no such token") && text.contains("nor this one"), "{text}");
    assert_eq!(daemon.probe("/live").await.status, 200);
    let client = daemon.client();
    let reply = client.post(ROLL, "application/xml", roll_request(&health, &lab.protector())).await.unwrap();
    assert_eq!(reply.status, 503, "{}", String::from_utf8_lossy(&reply.body));
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(client.get(METADATA).await.unwrap().status, 503);
    // Requests that need no token are still judged and answered.
    assert_eq!(client.post(ROLL, "application/xml", "<x/>").await.unwrap().status, 400);
    assert_eq!(client.post(ATTEST, "application/json", "{}").await.unwrap().status, 400);
    assert_eq!(client.get("/Attestation/getinfo").await.unwrap().status, 200);
    let refused = lab.host(daemon.client()).attest().await.unwrap_err().to_string();
    assert!(refused.contains("503 UnavailableErrorReply"), "{refused}");
    assert!(daemon.stop().success());
}

#[tokio::test]
async fn a_daemon_that_cannot_write_its_trail_is_not_ready_until_it_can() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let request = roll_request(&health, &lab.protector());
    let (trail, away) = (lab.file("state/audit.jsonl"), lab.file("state/audit.jsonl.1"));
    std::fs::rename(&trail, &away).unwrap();
    std::os::unix::fs::symlink("/dev/full", &trail).unwrap();
    daemon.process.hang_up();
    let refused = async || daemon.client().post(ROLL, "application/xml", request.clone()).await.unwrap().status == 503;
    let begun = std::time::Instant::now();
    while !refused().await {
        assert!(begun.elapsed() < claviger_tests::PATIENCE, "the trail is written all the same");
    }
    let not_ready = daemon.until_ready_is(503).await;
    let text = String::from_utf8_lossy(&not_ready.body);
    assert!(text.contains("audit trail"), "{text}");
    // No request comes meanwhile: the daemon finds out by itself.
    std::fs::remove_file(&trail).unwrap();
    daemon.until_ready_is(200).await;
    // A line of its own shows it, or the line with the refusals that were counted meanwhile.
    let found_out = |line: &serde_json::Value| line["event"] == "audit.resumed" || line["event"] == "refusals";
    assert!(lab.trail().iter().any(found_out), "{:?}", lab.trail());
    assert_eq!(daemon.client().post(ROLL, "application/xml", request.clone()).await.unwrap().status, 200);
    assert!(daemon.stop().success());
}
