//! The tokens that a release costs: from the host's own bucket, from its bucket for early failures, and from its
//! address's bucket for unknown senders.

use super::*;
use crate::release::batch;
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::protector::MAX_PROTECTOR;

/// Decryptions of a wrong transport key after the first one.
const REPEATED: u32 = REJECTION_QUORUM as u32 - 1;
const BYTES_FOR_A_TOKEN: usize = 64 * 1024;

/// Time is paused, so no token comes back.
fn metered() -> (TempDir, Stage) {
    metered_with(|_| {})
}

fn metered_with(configure: impl FnOnce(&mut Config)) -> (TempDir, Stage) {
    stage_with(|config| {
        let (release, server) = (&mut config.release, &mut config.server);
        (release.host_rate, release.host_burst) = (1, 1_000);
        (release.refused_rate, release.refused_burst) = (1, 1_000);
        (server.stranger_rate, server.stranger_burst) = (1, 1_000);
        configure(config);
    })
}

/// The result of this request, and the tokens that are missing in the buckets afterwards.
async fn costs(stage: &Stage, body: &[u8]) -> (Option<Code>, [u32; 3]) {
    let mut attempt = attempt();
    let result = asked(stage, body, &mut attempt).await;
    let result = result.and_then(|grant| grant.confirm(&stage.service));
    (result.err().map(|refusal| refusal.code), stage.service.admission.charged(&host()))
}

#[tokio::test(start_paused = true)]
async fn what_is_granted_costs_its_host_a_token() {
    let (_folder, stage) = metered();
    let request = stage.request(&stage.protector()).to_xml();
    assert_eq!(costs(&stage, &request).await, (None, [1, 0, 0]));
    assert_eq!(costs(&stage, &request).await, (None, [2, 0, 0]));
}

#[tokio::test(start_paused = true)]
async fn what_no_host_answers_for_costs_the_address() {
    let (_folder, stage) = metered();
    let request = String::from_utf8(stage.request(&stage.protector()).to_xml()).unwrap();
    let unshaped = request.replace("WrappingKeyEncryptionAlgorithm>", "Other>");
    let unknown = request.replace("<TransportKeysEncryptionAlgorithm>", "<TransportKeysEncryptionAlgorithm>urn:");
    let expired = RollRequest {
        health_certificate: stage.health_certificate(unix_now() - 9 * 3600),
        ..stage.request(&stage.protector())
    };
    let expired = String::from_utf8(expired.to_xml()).unwrap();
    let cases = [
        (&unshaped, Code::InvalidRequest),
        (&unknown, Code::UnsupportedAlgorithm),
        (&expired, Code::HealthCertificate),
    ];
    for ((body, code), refused) in cases.into_iter().zip(1..) {
        assert_eq!(costs(&stage, body.as_bytes()).await, (Some(code), [0, 0, refused]));
    }
    Withdrawal::Host.set(&stage.service, true);
    assert_eq!(costs(&stage, request.as_bytes()).await, (Some(Code::HealthCertificate), [0, 0, 4]));
}

#[tokio::test(start_paused = true)]
async fn what_fails_before_a_decryption_is_charged_apart_as_long_as_it_may() {
    let (_folder, stage) = metered_with(|config| config.release.refused_burst = 4);
    let right = String::from_utf8(stage.protector()).unwrap();
    let unshaped = right.replace("<GuardianSignature WrappingId=\"1\"", "<GuardianSignature WrappingId=\"9\"");
    let unknown = right.replacen(OAEP_MGF1P, "urn:unknown", 1);
    let unsigned = right.replacen("<Id>2</Id>", "<Id>3</Id>", 1);
    let body = |protector: &str| stage.request(protector.as_bytes()).to_xml();
    let early = |refused| [0, refused, 0];
    assert_eq!(costs(&stage, &body(&unshaped)).await, (Some(Code::InvalidProtector), early(1)));
    assert_eq!(costs(&stage, &body(&unknown)).await, (Some(Code::UnsupportedAlgorithm), early(2)));
    assert_eq!(costs(&stage, &body(&unsigned)).await, (Some(Code::InvalidProtector), early(3)));
    Withdrawal::EncryptionKey.set(&stage.service, true);
    assert_eq!(costs(&stage, &body(&right)).await, (Some(Code::InvalidWrapping), early(4)));
    // That bucket is empty: from now on, a failure costs as much as a release.
    assert_eq!(costs(&stage, &body(&right)).await, (Some(Code::InvalidWrapping), [1, 4, 0]));
    assert_eq!(costs(&stage, &body(&unshaped)).await, (Some(Code::InvalidProtector), [2, 4, 0]));
    assert_eq!(stage.hsm.asked(Operation::Decrypt), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_transport_key_costs_all_its_decryptions_and_a_failing_hsm_only_the_release() {
    let wrong = 1 + REPEATED;
    let cases: [(bool, &[Operation], Code, u32); 6] = [
        (false, &[Operation::Decrypt], Code::ServiceUnavailable, 1),
        (false, &[Operation::Sign], Code::ServiceUnavailable, 1),
        (false, &[Operation::Decrypt, Operation::Sign], Code::ServiceUnavailable, 1),
        (true, &[], Code::InvalidProtector, wrong),
        (true, &[Operation::Sign], Code::InvalidProtector, wrong),
        // The wrong result was not detected.
        (true, &[Operation::Decrypt], Code::ServiceUnavailable, 1),
    ];
    for (wrong_key, failing, code, tokens) in cases {
        let (_folder, stage) = metered();
        let protector = if wrong_key { with_wrong_key(&stage) } else { stage.protector() };
        failing.iter().for_each(|operation| stage.hsm.plan(*operation, Incident::Fails));
        let costs = costs(&stage, &stage.request(&protector).to_xml()).await;
        assert_eq!(costs, (Some(code), [tokens, 0, 0]), "wrong key: {wrong_key}, failing: {failing:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_withdrawn_meanwhile_costs_what_was_done() {
    let (_folder, stage) = metered();
    let service = Arc::clone(&stage.service);
    stage.hsm.plan(Operation::Decrypt, Incident::meanwhile(move || Withdrawal::Host.set(&service, true)));
    let request = stage.request(&stage.protector()).to_xml();
    assert_eq!(costs(&stage, &request).await, (Some(Code::HealthCertificate), [1, 0, 0]));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_let_in_costs_no_more_than_its_place_in_the_queue() {
    let (_folder, stage) = metered_with(|config| (config.release.host_burst, config.release.concurrency) = (2, 1));
    let request = stage.request(&stage.protector()).to_xml();
    let permit =
        stage.service.admission.admit(&HostAt::new("another", &attempt()), &attempt(), b"a request").await.unwrap();
    let begun = standstill::now();
    assert_eq!(costs(&stage, &request).await, (Some(Code::ServiceUnavailable), [0, 0, 0]));
    assert_eq!(standstill::since(begun), Duration::from_secs(5), "the token came back while it waited");
    drop(permit);
    for (code, tokens) in [(None, 1), (None, 2), (Some(Code::TooManyRequests), 2), (Some(Code::TooManyRequests), 2)] {
        assert_eq!(costs(&stage, &request).await, (code, [tokens, 0, 0]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_protector_costs_by_its_size_and_by_its_rsa_operations() {
    const GUARDIANS: u32 = 20;
    // The guardian signature; one signature over the guardian's signing certificate, which is the same each time, and
    // one over the owner's; one signature over each encryption certificate; and one encryption for each party.
    const FIRST: u32 = 1 + 2 + (1 + GUARDIANS) + (1 + GUARDIANS);
    // The certificates are known.
    const AGAIN: u32 = 1 + (1 + GUARDIANS);
    const OPERATIONS_FOR_A_TOKEN: u32 = 32;

    let (_folder, stage) = metered();
    let guardians = vec![stage.metadata(); GUARDIANS as usize];
    let (protector, _) = stage.owner().create(&guardians).unwrap();
    let bytes = u32::try_from(protector.len() / BYTES_FOR_A_TOKEN).unwrap();
    let request = stage.request(&protector).to_xml();
    let first = FIRST.div_ceil(OPERATIONS_FOR_A_TOKEN) + bytes;
    assert_eq!((first, bytes), (3, 1), "the case is no other one than the usual");
    assert_eq!(costs(&stage, &request).await, (None, [first, 0, 0]));
    let again = AGAIN.div_ceil(OPERATIONS_FOR_A_TOKEN) + bytes;
    assert_eq!(costs(&stage, &request).await, (None, [first + again, 0, 0]));
    // A request that is refused early causes no encryption.
    Withdrawal::SigningKey.set(&stage.service, true);
    let early = [first + again, 1 + bytes, 0];
    assert_eq!(costs(&stage, &request).await, (Some(Code::InvalidWrapping), early));
}

#[tokio::test(start_paused = true)]
async fn a_protector_that_cannot_be_written_again_is_decrypted_at_its_senders_cost() {
    let (_folder, stage) = metered();
    let protector = that_grows_beyond_the_limit(&stage);
    assert!(protector.len() <= MAX_PROTECTOR);
    let bytes = u32::try_from(protector.len() / BYTES_FOR_A_TOKEN).unwrap();
    let costs = costs(&stage, &stage.request(&protector).to_xml()).await;
    assert_eq!(costs, (Some(Code::InvalidProtector), [1 + bytes + REPEATED, 0, 0]));
    assert_eq!([Operation::Decrypt, Operation::Sign].map(|operation| stage.hsm.asked(operation)), [1, 0]);
}

/// A protector within the size limit whose canonical form exceeds it.
fn that_grows_beyond_the_limit(stage: &Stage) -> Vec<u8> {
    const EMPTY: usize = 8_000;
    let (owner, algorithm) = (stage.owner(), SignatureAlgorithm::DEFAULT);
    let (file, key) = owner.create(&[stage.metadata()]).unwrap();
    let mut wrappings = Protector::parse(&file).unwrap().wrappings;
    wrappings[1].signing_certificate_signature.parameters = Some("<p xmlns=\"urn:x\">here</p>".to_owned());
    let recipients = [owner, stage.guardian()].map(|party| party.encryption_key.public());
    let unsigned = Unsigned::new(&wrappings, recipients, &key, 0).unwrap();
    let filled = |bytes: &[u8], element: &str| {
        let filling = element.repeat(EMPTY) + &"x".repeat(MAX_PROTECTOR - 40_000 - file.len());
        String::from_utf8(bytes.to_vec()).unwrap().replace("here", &filling).into_bytes()
    };
    let signature = owner.signing_key.sign(algorithm, &filled(&unsigned.signed_octets(), "<a></a>")).unwrap();
    filled(&unsigned.finish(1, algorithm, signature).unwrap(), "<a/>")
}

#[tokio::test(start_paused = true)]
async fn each_item_of_a_batch_costs_as_a_release_of_its_own() {
    let (_folder, stage) = metered_with(|config| config.release.host_burst = 8);
    let RollRequest { health_certificate, algorithms, .. } = stage.request(&[]);
    let mut broken = stage.protector();
    broken.truncate(1_000);
    let items = [stage.protector(), broken, with_wrong_key(&stage)];
    let ingress_protectors: Vec<_> = items.iter().cycle().take(9).cloned().collect();
    let body = BatchRequest { health_certificate, algorithms, ingress_protectors }.to_xml();
    // The audit trail writes on its own thread, which paused time does not wait for. One token comes back each second.
    tokio::time::resume();
    let begun = standstill::now();
    let items = batch::roll(&stage.service, &stage.hsm, &body, &mut attempt()).await.unwrap();
    let codes: Vec<_> = items.into_iter().map(|item| item.err().map(|refusal| refusal.code)).collect();
    let usual = [None, Some(Code::InvalidProtector), Some(Code::InvalidProtector)];
    assert_eq!(codes[..8], usual.iter().cycle().take(8).copied().collect::<Vec<_>>()[..]);
    assert_eq!(codes[8], Some(Code::TooManyRequests), "one more than the host may ask for");
    // Eight were admitted. The three malformed ones gave their token back; the two with wrong keys cost more.
    let [hosts, early, strangers] = stage.service.admission.charged(&host());
    let back = u32::try_from(standstill::since(begun).as_secs()).unwrap() + 1;
    let (due, due_early) = (5 + 2 * REPEATED, 3);
    assert!((due.saturating_sub(back)..=due).contains(&hosts), "{hosts}");
    assert!((due_early - back.min(due_early)..=due_early).contains(&early), "{early}");
    assert_eq!(strangers, 0);
}
