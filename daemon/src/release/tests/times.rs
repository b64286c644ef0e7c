//! Deadlines and the times of refusals, on paused time.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn an_hsm_that_is_too_slow_is_waited_for_until_the_deadline() {
    for operation in [Operation::Decrypt, Operation::Sign] {
        let (_folder, stage) = stage_with(|config| config.release.deadline_ms = 3_000);
        let request = stage.request(&stage.protector()).to_xml();
        stage.hsm.plan(operation, Incident::Takes(60 * SECOND));
        let mut attempt = attempt();
        let refusal = asked(&stage, &request, &mut attempt).await.unwrap_err();
        assert_eq!(refusal.code, Code::ServiceUnavailable, "{operation:?}");
        assert_eq!(standstill::since(attempt.started()), 3 * SECOND, "{operation:?}");
        assert_eq!(attempt.spent().hsm, Some(3 * SECOND), "{operation:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_two_operations_run_at_the_same_time() {
    let (_folder, stage) = stage();
    stage.hsm.plan(Operation::Decrypt, Incident::Takes(3 * SECOND));
    stage.hsm.plan(Operation::Sign, Incident::Takes(2 * SECOND));
    let mut attempt = attempt();
    let request = stage.request(&stage.protector()).to_xml();
    asked(&stage, &request, &mut attempt).await.unwrap();
    assert_eq!(attempt.spent().hsm, Some(3 * SECOND));
}

#[tokio::test(start_paused = true)]
async fn a_release_whose_turn_does_not_come_is_refused_at_the_deadline() {
    let (_folder, stage) = stage_with(|config| config.release.concurrency = 1);
    let _permit =
        stage.service.admission.admit(&HostAt::new("another", &attempt()), &attempt(), b"a request").await.unwrap();
    let mut attempt = attempt();
    let request = stage.request(&stage.protector()).to_xml();
    let refusal = asked(&stage, &request, &mut attempt).await.unwrap_err();
    assert_eq!(refusal.code, Code::ServiceUnavailable);
    assert_eq!((attempt.spent().total, attempt.spent().queue), (5 * SECOND, Some(5 * SECOND)));
    assert_eq!(attempt.spent().hsm, None);
    assert_eq!(stage.hsm.asked(Operation::Decrypt), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_transport_key_is_refused_on_a_grid_of_time() {
    let (_folder, stage) = stage();
    let millis = Duration::from_millis;
    let body = stage.request(&with_wrong_key(&stage)).to_xml();
    for (decryption, leaves) in [(0, 25), (24, 25), (25, 50), (31, 50), (2_000, 2_025)] {
        stage.hsm.plan(Operation::Decrypt, Incident::Takes(millis(decryption)));
        let mut attempt = attempt();
        let refusal = asked(&stage, &body, &mut attempt).await.unwrap_err();
        assert_eq!(refusal.code, Code::InvalidProtector);
        assert_eq!(attempt.spent().total, millis(leaves), "after {decryption} ms");
        assert_eq!(attempt.spent().hsm, Some(millis(leaves)), "the time on record is on the grid, too");
    }
}
