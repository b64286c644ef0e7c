//! The daemon on tokens that misbehave on command: what reaches which member.

#![allow(clippy::unwrap_used)]

use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Daemon, Instances, Lab, Options};

async fn release(daemon: &Daemon, lab: &Lab, times: usize) {
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    for _ in 0..times {
        host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    }
}

async fn faults_reach_their_member(instances: Instances) {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let faulty = lab.behind_faulty(instances);
    faulty.set("hsm-a", &["call=C_Decrypt rv=CKR_DEVICE_ERROR"]);
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    release(&daemon, &lab, 10).await;
    let (a, b) = (faulty.of("hsm-a").0, faulty.of("hsm-b").0);
    assert_eq!(a.module_file() == b.module_file(), instances == Instances::Shared);
    let ill = faulty.until("hsm-a", "a decryption on hsm-a", |stats| stats.faults("rv") > 0);
    assert_eq!(ill.faults("rv"), ill.calls("C_Decrypt"));
    let well = faulty.until("hsm-b", "ten decryptions on hsm-b", |stats| stats.calls("C_Decrypt") >= 10);
    assert_eq!(well.faults("rv"), 0);
    assert_eq!((well.calls("C_Login"), well.hanging()), (1, 0));
    faulty.clear_all();
    release(&daemon, &lab, 10).await;
    assert!(daemon.stop().success());
    assert_eq!(faulty.stats("hsm-a").sessions() + faulty.stats("hsm-b").sessions(), 0);
    // At the end; and before, when an ill member was all that its instance had and was closed.
    let finalized = faulty.module_stats("hsm-a").calls("C_Finalize");
    assert!(finalized == 1 || instances == Instances::Own && finalized > 1, "{finalized}");
}

#[tokio::test(flavor = "multi_thread")]
async fn through_one_instance() {
    faults_reach_their_member(Instances::Shared).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_an_instance_for_each() {
    faults_reach_their_member(Instances::Own).await;
}
