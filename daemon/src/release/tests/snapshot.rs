//! A release uses the settings and registry from its start; only a withdrawal in the meantime stops its reply.

use super::*;
use crate::config::AttestMode;
use crate::release::batch;
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::tpm::pcr::PcrValues;
use tokio::task::yield_now;

/// Withdraws something in the middle of a decryption; returns the result and the attempt.
async fn withdrawn_at_the_hsm(stage: &Stage, withdrawal: Withdrawal) -> (Result<Grant, Refusal>, Attempt) {
    let service = Arc::clone(&stage.service);
    stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(move || withdrawal.set(&service, true)));
    let mut attempt = attempt();
    let request = stage.request(&stage.protector()).to_xml();
    let result = asked(stage, &request, &mut attempt).await;
    (result, attempt)
}

#[tokio::test]
async fn what_is_withdrawn_at_the_hsm_fails_no_step_and_leaves_all_the_same_not() {
    for withdrawal in Withdrawal::ALL {
        let (_folder, stage) = stage();
        let (result, attempt) = withdrawn_at_the_hsm(&stage, withdrawal).await;
        let grant = result.expect("the release looked at the registry again");
        let refusal = decide(&stage.service, ApiVersion::V2, &attempt, Ok(grant)).await.unwrap_err();
        assert_eq!(refusal.code, withdrawal.code(), "{withdrawal:?}");
    }
}

#[tokio::test]
async fn what_was_withdrawn_and_given_back_leaves() {
    for withdrawal in Withdrawal::ALL.into_iter().filter(|withdrawal| *withdrawal != Withdrawal::Signer) {
        let (_folder, stage) = stage();
        let (result, attempt) = withdrawn_at_the_hsm(&stage, withdrawal).await;
        withdrawal.set(&stage.service, false);
        assert!(decide(&stage.service, ApiVersion::V2, &attempt, result).await.is_ok(), "{withdrawal:?}");
    }
}

#[tokio::test]
async fn a_host_that_was_replaced_meanwhile_gets_nothing() {
    let (_folder, stage) = stage();
    let service = Arc::clone(&stage.service);
    // Another machine with the same name.
    stage.hsm.plan(
        Operation::Sign,
        Incident::meanwhile(move || {
            change(&service, |state| state.remove_host(HOST));
            change(&service, |state| state.add_host(HOST, b"another key", &Labels::default(), 1));
        }),
    );
    let refusal = released(&stage, &stage.request(&stage.protector()).to_xml()).await.unwrap_err();
    assert_eq!(refusal.code, Code::HealthCertificate);
}

#[tokio::test(start_paused = true)]
async fn settings_that_change_at_the_hsm_are_for_the_next_release() {
    let (_folder, stage) = stage_with(|config| config.release.max_offline_unwraps = 3);
    let service = Arc::clone(&stage.service);
    let reload = move || {
        configure(&service, |config| (config.release.max_offline_unwraps, config.release.deadline_ms) = (7, 1));
    };
    stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(reload));
    // This time is within the old deadline and beyond the new one.
    stage.hsm.plan(Operation::Sign, Incident::Takes(Duration::from_secs(1)));
    let mut attempt = attempt();
    let request = stage.request(&stage.protector()).to_xml();
    let response = asked(&stage, &request, &mut attempt).await.unwrap().confirm(&stage.service).unwrap();
    assert_eq!(stage.open(&response).max_offline_unwraps, 3);
    let egress = String::from_utf8(response.egress_protector).unwrap();
    assert!(egress.contains(" MaxOfflineUnwraps=\"3\""), "{egress}");
    assert_eq!(attempt.deadline() - attempt.started(), Duration::from_secs(5));

    stage.hsm.plan(Operation::Sign, Incident::Takes(Duration::from_secs(1)));
    assert_eq!(asked(&stage, &request, &mut super::attempt()).await.unwrap_err().code, Code::ServiceUnavailable);
    configure(&stage.service, |config| config.release.deadline_ms = 5_000);
    let response = asked(&stage, &request, &mut super::attempt()).await.unwrap().confirm(&stage.service).unwrap();
    assert_eq!(stage.open(&response).max_offline_unwraps, 7);
}

#[tokio::test]
async fn starts_without_the_service_that_are_withdrawn_at_the_hsm_do_not_leave() {
    let (_folder, stage) = stage_with(|config| config.release.max_offline_unwraps = 3);
    let request = stage.request(&stage.protector()).to_xml();
    for (reduced, leaves) in [(0, false), (2, false), (3, true), (9, true)] {
        configure(&stage.service, |config| config.release.max_offline_unwraps = 3);
        let service = Arc::clone(&stage.service);
        let reload = move || configure(&service, |config| config.release.max_offline_unwraps = reduced);
        stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(reload));
        let grant = asked(&stage, &request, &mut attempt()).await.unwrap();
        match grant.confirm(&stage.service) {
            Ok(response) => assert!(leaves && stage.open(&response).max_offline_unwraps == 3),
            Err(refusal) => assert!(!leaves && refusal.code == Code::ServiceUnavailable, "{refusal}"),
        }
    }
}

/// Runs a release that waits for another one, and runs `meanwhile` while it waits.
async fn after_waiting(stage: &Stage, request: Vec<u8>, meanwhile: impl FnOnce()) -> Result<Grant, Refusal> {
    let permit =
        stage.service.admission.admit(&HostAt::new("another", &attempt()), &attempt(), b"a request").await.unwrap();
    let (service, hsm) = (Arc::clone(&stage.service), stage.hsm.clone());
    let waiting = tokio::spawn(async move { roll(&service, &hsm, ApiVersion::V2, &request, &mut attempt()).await });
    while stage.service.admission.load().waiting == 0 {
        yield_now().await;
    }
    meanwhile();
    drop(permit);
    waiting.await.unwrap()
}

#[tokio::test]
async fn a_release_that_waits_for_its_turn_goes_on_with_what_it_began_with() {
    let (_folder, stage) = stage_with(|config| config.release.concurrency = 1);
    let request = stage.request(&stage.protector()).to_xml();
    for withdrawal in [Withdrawal::EncryptionKey, Withdrawal::SigningKey, Withdrawal::Label, Withdrawal::Host] {
        let asked = stage.hsm.asked(Operation::Decrypt);
        let service = &stage.service;
        let grant = after_waiting(&stage, request.clone(), || withdrawal.set(service, true)).await;
        assert_eq!(stage.hsm.asked(Operation::Decrypt), asked + 1, "{withdrawal:?}");
        assert_eq!(grant.unwrap().confirm(service).unwrap_err().code, withdrawal.code());
        // Something that is added in the meantime also counts only for the next release.
        let refused = async |code: Code| {
            let result = roll(service, &stage.hsm, ApiVersion::V2, &request, &mut attempt()).await;
            assert_eq!(result.unwrap_err().code, code, "{withdrawal:?}");
        };
        refused(withdrawal.code()).await;
        if withdrawal != Withdrawal::Host {
            let late = after_waiting(&stage, request.clone(), || withdrawal.set(service, false)).await;
            assert_eq!(late.unwrap_err().code, withdrawal.code(), "{withdrawal:?}");
        }
        withdrawal.set(service, false);
    }
}

#[tokio::test]
async fn a_baseline_that_is_disabled_stops_its_hosts_releases_at_once() {
    let (_folder, stage) = stage_with(|config| {
        config.release.concurrency = 1;
        config.attest.mode = AttestMode::Tpm;
    });
    let service = &stage.service;
    let mut values = PcrValues::default();
    [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
    let added = unix_now();
    change(service, |state| state.add_baseline("base", &values, None, added));
    let of = |certificate: Vec<u8>| {
        RollRequest { health_certificate: certificate, ..stage.request(&stage.protector()) }.to_xml()
    };
    let request = of(stage.measured_certificate("base", added));
    assert!(released(&stage, &request).await.is_ok());

    // While a release waits for its turn, and while it waits for the HSM.
    let grant = after_waiting(&stage, request.clone(), || {
        change(service, |state| state.enable_baseline("base", false));
    });
    assert_eq!(grant.await.unwrap().confirm(service).unwrap_err().code, Code::HealthCertificate);
    assert_eq!(released(&stage, &request).await.unwrap_err().code, Code::HealthCertificate);
    change(service, |state| state.enable_baseline("base", true));
    let of_service = Arc::clone(service);
    let disable = move || change(&of_service, |state| state.enable_baseline("base", false));
    stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(disable));
    assert_eq!(released(&stage, &request).await.unwrap_err().code, Code::HealthCertificate);
    change(service, |state| state.enable_baseline("base", true));
    assert!(released(&stage, &request).await.is_ok());

    // A certificate of another baseline, one from before this baseline was added, and one of host-key mode.
    for certificate in [
        stage.measured_certificate("other", added),
        stage.measured_certificate("base", added - 1),
        stage.health_certificate(added),
    ] {
        assert_eq!(released(&stage, &of(certificate)).await.unwrap_err().code, Code::HealthCertificate);
    }
    configure(service, |config| config.attest.mode = AttestMode::HostKey);
    assert!(released(&stage, &of(stage.health_certificate(added))).await.is_ok());
}

#[tokio::test]
async fn all_items_of_a_batch_go_by_one_snapshot() {
    const ITEMS: usize = 3;
    let (_folder, stage) = stage_with(|config| config.release.concurrency = 1);
    let service = Arc::clone(&stage.service);
    let reload = move || configure(&service, |config| config.release.max_offline_unwraps = 7);
    stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(reload));
    let request = batch_of(&stage, vec![stage.protector(); ITEMS]);
    let batch = async || batch::roll(&stage.service, &stage.hsm, &request, &mut attempt()).await.unwrap();
    let unwraps = |items: Vec<Result<RollResponse, Refusal>>| -> Vec<u32> {
        items.into_iter().map(|item| stage.open(&item.unwrap()).max_offline_unwraps).collect()
    };
    assert_eq!(unwraps(batch().await), [0; ITEMS]);
    assert_eq!(unwraps(batch().await), [7; ITEMS]);

    // Withdrawn during the last item: no item is released.
    let service = Arc::clone(&stage.service);
    let withdraw = Incident::meanwhile(move || Withdrawal::Host.set(&service, true));
    for _ in 1..ITEMS {
        stage.hsm.plan(Operation::Decrypt, Incident::Takes(Duration::ZERO));
    }
    stage.hsm.plan(Operation::Decrypt, withdraw);
    for item in batch().await {
        assert_eq!(item.unwrap_err().code, Code::HealthCertificate);
    }
}

fn batch_of(stage: &Stage, ingress_protectors: Vec<Vec<u8>>) -> Vec<u8> {
    let RollRequest { health_certificate, algorithms, .. } = stage.request(&[]);
    BatchRequest { health_certificate, algorithms, ingress_protectors }.to_xml()
}
