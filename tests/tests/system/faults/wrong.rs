//! Tests of wrong results and invalid input: the party at fault is identified, and no wrong result reaches a caller.

use claviger_protocol::algorithm::Oaep;
use claviger_tests::metadata;
use claviger_tests::openloop::Traffic;
use claviger_tests::protector::{with_cipher, with_oaep};

use super::{DEADLINE, MEMBERS, Stage, USUAL, seconds};

async fn corrupt(name: &str, fault: &str, always: bool) {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set("hsm-c", &[fault]);
    stage.until_faults("hsm-c", "corrupt", 2).await;
    if always {
        stage.until_closed("hsm-c", 1).await;
    }
    seconds(2.0).await;
    let corrupt = stage.faulty.stats("hsm-c").faults("corrupt");
    println!("{name}: {corrupt} wrong results, {} closings", stage.closings("hsm-c").await);
    for member in ["hsm-a", "hsm-b"] {
        assert_eq!(stage.closings(member).await, 0, "{member} is blamed");
    }
    stage.faulty.clear("hsm-c");
    let back = stage.until_serves("hsm-c").await;
    println!("{name}: back after {back:.0?}");
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn decryptions_are_wrong() {
    corrupt("C_Decrypt is wrong", "call=C_Decrypt corrupt", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_seventh_decryption_is_wrong() {
    corrupt("every 7th C_Decrypt is wrong", "call=C_Decrypt corrupt every=7", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_are_wrong() {
    corrupt("C_Sign is wrong", "call=C_Sign corrupt", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_ciphertexts_are_their_callers_fault() {
    let stage = Stage::open(USUAL).await;
    let guardian = metadata(&stage.daemon.client()).await;
    let owner = stage.lab.owner();
    let bad: Vec<_> = (0..32)
        .map(|turn| {
            let oaep = if turn % 2 == 0 { Oaep::SHA1 } else { Oaep::SHA256 };
            let (file, _) = with_oaep(&owner, &guardian, oaep);
            with_cipher(&owner, &file, |cipher| {
                let mut cipher = cipher.to_vec();
                // Not the first byte: the number must not exceed the modulus.
                cipher[turn + 1] ^= 1;
                cipher
            })
        })
        .collect();
    let bad = Traffic::of_bad(&stage.lab, &stage.health, &bad);
    let probes = async |member| stage.count("claviger_hsm_calls_total", member, &[("op", "probe")]).await;
    let load = stage.load();
    seconds(0.5).await;
    let mut before = Vec::new();
    for member in MEMBERS {
        before.push(probes(member).await);
    }
    let begun = std::time::Instant::now();
    let flood = bad.start(&stage.daemon, stage.rate * 1.5, DEADLINE);
    seconds(3.0).await;
    let flood = flood.stop().await;
    let took = begun.elapsed().as_secs_f64();
    println!("bad ciphertexts: {}", flood.line());
    for (member, before) in MEMBERS.iter().zip(before) {
        let rate = (probes(member).await - before) as f64 / took;
        println!("bad ciphertexts: {rate:.1} probes a second of {member}");
        // One per 50 ms for each of two ways to decrypt, those at once, and the probes of /ready.
        assert!(rate < 60.0, "{rate:.1} probes a second of {member}");
        assert_eq!(stage.closings(member).await, 0, "{member} is blamed");
    }
    seconds(0.5).await;
    stage.end("beside bad ciphertexts", load).await.assert_all_right();
    flood.assert_all_right();
}
