//! Records of a release: the audit trail, the metrics and the counts of used keys.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use super::*;
use crate::observe::audit::SUCCESS;
use crate::registry::keys::key_ref;
use crate::service::testing::trail;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use ring::digest;
use serde_json::Value;

fn sha256(bytes: &[u8]) -> Value {
    HEXLOWER.encode(digest::digest(&digest::SHA256, bytes).as_ref()).into()
}

/// The non-null values of a line, by name.
fn values(line: &Value) -> BTreeMap<&str, &Value> {
    line.as_object().unwrap().iter().map(|(name, value)| (name.as_str(), value)).collect()
}

/// The whole content of the audit file.
async fn text(stage: &Stage) -> String {
    stage.service.audit.write_summary().await;
    std::fs::read_to_string(stage.service.config.load().server.audit_file()).unwrap()
}

/// How often the service's two keys were counted: for decryptions, for signatures.
fn used(stage: &Stage) -> [u64; 2] {
    let releases = stage.service.usage.releases(unix_now()).unwrap();
    [&stage.guardian().encryption_key, &stage.guardian().signing_key].map(|key| {
        let public = key.public();
        releases.of(&key_ref(&public.spki_sha256()[..20], public))
    })
}

/// Runs one release; returns its result and its attempt.
async fn decided(stage: &Stage, body: &[u8]) -> (Result<RollResponse, Refusal>, Attempt) {
    let mut attempt = attempt();
    let result = asked(stage, body, &mut attempt).await;
    (decide(&stage.service, ApiVersion::V2, &attempt, result).await, attempt)
}

#[tokio::test]
async fn a_grant_has_one_line_that_says_what_was_released_to_whom() {
    let (_folder, stage) = stage();
    let protector = stage.protector();
    let (response, attempt) = decided(&stage, &stage.request(&protector).to_xml()).await;
    let response = response.unwrap();
    let lines = trail(&stage.service);
    let [line] = &lines[..] else { panic!("{lines:?}") };
    let owner = thumbprint(&stage.owner().signing_certificate);
    let guardian_key = thumbprint(&stage.guardian().encryption_certificate);
    let expected: [(&str, Value); 11] = [
        ("request", attempt.request.clone().into()),
        ("event", "release".into()),
        ("api", "v2.0".into()),
        ("address", ADDRESS.into()),
        ("host", HOST.into()),
        ("outcome", SUCCESS.into()),
        ("protector", sha256(&protector)),
        ("egress", sha256(&response.egress_protector)),
        ("owner", owner.into()),
        ("guardian_key", guardian_key.into()),
        ("hsm", MEMBER.into()),
    ];
    for (name, value) in &expected {
        assert_eq!(line[*name], *value, "{name}");
    }
    let others: Vec<_> =
        values(line).into_keys().filter(|name| expected.iter().all(|(known, _)| known != name)).collect();
    assert_eq!(others, ["health_serial", "identity_key", "ms", "n", "node", "prev", "time"]);
    assert_eq!(used(&stage), [1, 1]);

    // Neither transport key is in the line, nor any text long enough to contain one.
    let keys = stage.open(&response);
    let text = text(&stage).await;
    for key in [&keys.ingress, &keys.egress] {
        for secret in [HEXLOWER.encode(&key[..]), BASE64.encode(&key[..])] {
            assert!(!text.contains(&secret[..16]), "{text}");
        }
    }
    assert_eq!(text.matches(&attempt.request).count(), 1, "recorded twice: {text}");
}

/// The names of the fields of the line after a release that was refused with `code` and recorded once.
async fn refused(stage: &Stage, protector: &[u8], code: Code) -> Vec<String> {
    const ALWAYS: [&str; 8] = ["event", "ms", "n", "node", "outcome", "prev", "request", "time"];
    let (result, attempt) = decided(stage, &stage.request(protector).to_xml()).await;
    assert_eq!(result.unwrap_err().code, code);
    let lines = trail(&stage.service);
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((&line["event"], &line["outcome"]), (&"release".into(), &code.as_str().into()));
    assert_eq!(text(stage).await.matches(&attempt.request).count(), 1, "recorded twice");
    assert_eq!(used(stage), [0, 0]);
    values(line).into_keys().filter(|name| !ALWAYS.contains(name)).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_refusal_to_a_host_has_one_line_that_says_how_far_it_came() {
    let expected = |more: &[&'static str]| {
        let asked = ["host", "identity_key", "health_serial", "protector", "address", "api"];
        let mut names = [&asked[..], more].concat();
        names.sort_unstable();
        names
    };
    let (_folder, broken) = stage();
    let protector = &broken.protector()[..1_000];
    assert_eq!(refused(&broken, protector, Code::InvalidProtector).await, expected(&[]));

    let (_folder, not_for_us) = stage();
    Withdrawal::EncryptionKey.set(&not_for_us.service, true);
    let names = refused(&not_for_us, &not_for_us.protector(), Code::InvalidWrapping).await;
    assert_eq!(names, expected(&["owner"]));

    let (_folder, wrong) = stage();
    let names = refused(&wrong, &with_wrong_key(&wrong), Code::InvalidProtector).await;
    assert_eq!(names, expected(&["owner", "guardian_key"]));

    // A protector was made, but not given out.
    let (_folder, withdrawn) = stage();
    let service = Arc::clone(&withdrawn.service);
    withdrawn.hsm.plan(Operation::Sign, Incident::meanwhile(move || Withdrawal::Host.set(&service, true)));
    let names = refused(&withdrawn, &withdrawn.protector(), Code::HealthCertificate).await;
    assert_eq!(names, expected(&["owner", "guardian_key", "hsm"]));
}

#[tokio::test]
async fn what_fails_or_comes_from_strangers_is_counted_once() {
    let (_folder, stage) = stage_with(|config| config.release.host_rate = 1);
    let request = stage.request(&stage.protector()).to_xml();
    let mut requests = Vec::new();
    stage.hsm.plan(Operation::Decrypt, Incident::Fails);
    for (body, code) in [
        (&request[..], Code::ServiceUnavailable),
        (&b"<nothing/>"[..], Code::InvalidRequest),
        (&request[..], Code::TooManyRequests),
    ] {
        if code == Code::TooManyRequests {
            exhaust_rate(&stage.service);
        }
        let (result, attempt) = decided(&stage, body).await;
        assert_eq!(result.unwrap_err().code, code);
        requests.push(attempt.request);
    }
    assert!(trail(&stage.service).is_empty());
    let text = text(&stage).await;
    let mut counted: Vec<(Value, Value)> =
        trail(&stage.service).iter().map(|line| (line["host"].clone(), line["outcomes"].clone())).collect();
    counted.sort_by_key(|(host, _)| host.is_null());
    let host = serde_json::json!({ "ServiceUnavailableException": 1, "TooManyRequestsException": 1 });
    let strangers = serde_json::json!({ "InvalidRequestException": 1 });
    assert_eq!(counted, [(HOST.into(), host), (Value::Null, strangers)]);
    for request in requests {
        assert_eq!(text.matches(&request).count(), 1, "{text}");
    }
    assert_eq!(used(&stage), [0, 0]);
}

#[tokio::test]
async fn what_cannot_be_recorded_does_not_leave() {
    let folder = folder();
    let full = |config: &mut Config| {
        std::fs::create_dir_all(&config.server.state).unwrap();
        symlink("/dev/full", config.server.audit_file()).unwrap();
    };
    let stage = Stage::new(folder.path(), full);
    let (result, _) = decided(&stage, &stage.request(&stage.protector()).to_xml()).await;
    let refusal = result.unwrap_err();
    assert_eq!(
        (refusal.code, refusal.message.as_str()),
        (Code::ServiceUnavailable, crate::observe::audit::NOT_RECORDED)
    );
    assert_eq!(stage.hsm.asked(Operation::Decrypt), 1);
    assert_eq!(used(&stage), [0, 0]);
}

/// The non-zero series of the releases, with their values.
fn counters(handle: &PrometheusHandle, name: &str) -> BTreeMap<String, String> {
    let page = handle.render();
    let series = page.lines().filter_map(|line| line.strip_prefix(name)).filter(|rest| rest.starts_with('{'));
    series.map(|rest| rest.rsplit_once(' ').unwrap()).map(|(name, value)| (name.into(), value.into())).collect()
}

#[tokio::test]
async fn each_outcome_is_counted_under_its_own_labels() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _recording = ::metrics::set_default_local_recorder(&recorder);
    let (_folder, stage) = stage();
    let right = stage.request(&stage.protector()).to_xml();
    let wrong = stage.request(&with_wrong_key(&stage)).to_xml();
    for _ in 0..2 {
        assert!(released(&stage, &right).await.is_ok());
    }
    let refused = async |body: &[u8]| released(&stage, body).await.unwrap_err().code.as_str();
    stage.hsm.plan(Operation::Sign, Incident::Fails);
    let mut seen = vec![SUCCESS, refused(&right).await, refused(&wrong).await, refused(b"").await];
    Withdrawal::SigningKey.set(&stage.service, true);
    seen.push(refused(&right).await);
    assert!(seen.iter().all(|outcome| outcomes().contains(outcome)), "{seen:?}");

    let expected = [
        ("InvalidProtectorException", "1"),
        ("InvalidRequestException", "1"),
        ("InvalidWrappingException", "1"),
        ("ServiceUnavailableException", "1"),
        ("success", "2"),
    ];
    let expected =
        expected.map(|(outcome, count)| (format!("{{outcome=\"{outcome}\",api=\"v2.0\"}}"), count.to_owned()));
    assert_eq!(counters(&handle, "claviger_releases_total"), BTreeMap::from(expected));
    let certificate = crate::registry::keys::short_name(stage.guardian().encryption_certificate.der());
    let keys = BTreeMap::from([(format!("{{certificate=\"{certificate}\"}}"), "2".to_owned())]);
    assert_eq!(counters(&handle, "claviger_key_releases_total"), keys);
    let classes = counters(&handle, "claviger_release_duration_seconds_count");
    let classes = classes.into_iter().map(|(labels, count)| (labels, count.parse().unwrap())).collect::<Vec<_>>();
    let of = |class: &str, count: u32| (format!("{{class=\"{class}\"}}"), count);
    assert_eq!(classes, [of("failed", 1), of("refused", 3), of("success", 2)]);
}
