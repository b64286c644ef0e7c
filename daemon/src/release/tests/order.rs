//! The first failure decides the reply, as section 2.1 of the protocol page says.

use super::*;
use crate::config::{Clients, Tls};
use claviger_protocol::health::ResultType;

/// A defect of a request, or of the service at that time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Defect {
    /// An element of the request is missing.
    RequestShape,
    /// An algorithm of the request is not supported.
    RequestAlgorithm,
    /// The health certificate has expired.
    Expired,
    /// The host is disabled.
    Disabled,
    /// The host exceeds its rate.
    Rate,
    /// The guardian signature names a wrapping that does not exist.
    ProtectorShape,
    /// An algorithm of the protector is not supported.
    ProtectorAlgorithm,
    /// The guardian signature is wrong.
    GuardianSignature,
    /// The owner did not sign the guardian's certificate.
    CertificateSignature,
    /// The encryption key is not enabled.
    NotForUs,
    /// The signing key is not enabled.
    SigningKeyMissing,
    /// The key is restricted to other hosts.
    Limited,
    /// No HSM can decrypt.
    NotDecrypted,
    /// The ciphertext does not decrypt.
    Garbled,
    /// The ciphertext decrypts to a key that did not sign the protector.
    WrongKey,
    /// No HSM can sign.
    NotSigned,
    /// The host is disabled during the HSM operations.
    Withdrawn,
}

use Defect::*;

/// All defects with their codes, in the order of the page. Defects in one row are found in the same step.
const PAGE: [&[(Defect, Code)]; 12] = [
    // Step 1.
    &[(RequestShape, Code::InvalidRequest)],
    &[(RequestAlgorithm, Code::UnsupportedAlgorithm)],
    // Step 2.
    &[(Expired, Code::HealthCertificate), (Disabled, Code::HealthCertificate)],
    // "Which requests are limited": between steps 2 and 3.
    &[(Rate, Code::TooManyRequests)],
    // Step 3.
    &[(ProtectorShape, Code::InvalidProtector)],
    &[(ProtectorAlgorithm, Code::UnsupportedAlgorithm)],
    // Steps 4 to 8.
    &[(GuardianSignature, Code::InvalidProtector)],
    &[(CertificateSignature, Code::InvalidWrapping)],
    &[(NotForUs, Code::InvalidWrapping), (SigningKeyMissing, Code::InvalidWrapping), (Limited, Code::InvalidWrapping)],
    &[(NotDecrypted, Code::ServiceUnavailable), (Garbled, Code::InvalidProtector), (WrongKey, Code::InvalidProtector)],
    &[(NotSigned, Code::ServiceUnavailable)],
    // When the decision is recorded.
    &[(Withdrawn, Code::HealthCertificate)],
];

/// The first row with defects that the HSMs find.
const AT_THE_HSMS: usize = 9;

/// The refusal of a request with these defects, and the number of decryptions and signatures.
async fn refusal(defects: &[Defect]) -> (Refusal, [usize; 2]) {
    let has = |defect| defects.contains(&defect);
    let (_folder, stage) = stage_with(|config| config.release.host_rate = 1);
    let Stage { service, hsm, .. } = &stage;

    let protector = protector(&stage, &has);
    let health_certificate = stage.health_certificate(if has(Expired) { unix_now() - 9 * 3600 } else { unix_now() });
    let request = RollRequest { health_certificate, ..stage.request(&protector) };
    let mut body = String::from_utf8(request.to_xml()).unwrap();
    if has(RequestAlgorithm) {
        replace(&mut body, "<TransportKeysEncryptionAlgorithm>", "<TransportKeysEncryptionAlgorithm>urn:");
    }
    if has(RequestShape) {
        replace(&mut body, "WrappingKeyEncryptionAlgorithm>", "Other>");
    }

    for (defect, withdrawal) in [
        (Disabled, Withdrawal::Host),
        (NotForUs, Withdrawal::EncryptionKey),
        (SigningKeyMissing, Withdrawal::SigningKey),
        (Limited, Withdrawal::Label),
    ] {
        if has(defect) {
            withdrawal.set(service, true);
        }
    }
    if has(Rate) {
        exhaust_rate(service);
    }
    if has(NotDecrypted) {
        hsm.plan(Operation::Decrypt, Incident::Fails);
    }
    if has(NotSigned) {
        hsm.plan(Operation::Sign, Incident::Fails);
    }
    if has(Withdrawn) {
        let service = Arc::clone(service);
        let during = if has(NotSigned) { Operation::Decrypt } else { Operation::Sign };
        hsm.plan(during, Incident::meanwhile(move || Withdrawal::Host.set(&service, true)));
    }
    let refusal = released(&stage, body.as_bytes()).await.unwrap_err();
    (refusal, [Operation::Decrypt, Operation::Sign].map(|operation| hsm.asked(operation)))
}

/// A protector of the owner with these defects.
fn protector(stage: &Stage, has: &impl Fn(Defect) -> bool) -> Vec<u8> {
    let (file, key) = stage.owner().create(&[stage.metadata()]).unwrap();
    let mut wrappings = Protector::parse(&file).unwrap().wrappings;
    if has(CertificateSignature) {
        wrappings[1].signing_certificate_signature.value[9] ^= 1;
    }
    let cipher = |cipher: &[u8]| match () {
        () if has(Garbled) => garbled(cipher),
        () if has(WrongKey) => another_key(stage),
        () => cipher.to_vec(),
    };
    let file = signed_by_owner(stage, &wrappings, &key, cipher, has(GuardianSignature));
    let mut text = String::from_utf8(file).unwrap();
    if has(ProtectorAlgorithm) {
        replace(&mut text, OAEP_MGF1P, "urn:unknown");
    }
    if has(ProtectorShape) {
        replace(&mut text, "<GuardianSignature WrappingId=\"1\"", "<GuardianSignature WrappingId=\"9\"");
    }
    text.into_bytes()
}

fn replace(text: &mut String, old: &str, new: &str) {
    assert!(text.contains(old), "no {old} in {text}");
    *text = text.replace(old, new);
}

#[tokio::test]
async fn each_defect_is_refused_as_the_page_says_and_only_the_last_ones_reach_an_hsm() {
    for (row, defects) in PAGE.into_iter().enumerate() {
        for (defect, code) in defects {
            let (refusal, operations) = refusal(&[*defect]).await;
            assert_eq!(refusal.code, *code, "{defect:?}: {refusal:?}");
            assert_eq!(operations, [usize::from(row >= AT_THE_HSMS); 2], "{defect:?}");
        }
    }
}

#[tokio::test]
async fn of_two_defects_the_first_one_decides() {
    for (row, defects) in PAGE.into_iter().enumerate() {
        for (first, _) in defects {
            let alone = refusal(&[*first]).await.0;
            for (second, _) in PAGE[row + 1..].iter().copied().flatten() {
                let (both, _) = refusal(&[*first, *second]).await;
                assert_eq!((both.code, &both.message), (alone.code, &alone.message), "{first:?} and {second:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_ways_in_which_a_transport_key_is_wrong_are_told_alike() {
    assert_eq!(refusal(&[Garbled]).await, refusal(&[WrongKey]).await);
}

#[tokio::test]
async fn a_health_certificate_is_refused_before_the_protector_is_read() {
    let now = unix_now();
    type Change = fn(&Stage);
    let cases: [(&str, i64, ResultType, Change); 7] = [
        ("is out of date", now - 9 * 3600, ResultType::EncryptionCertificate, |_| {}),
        ("is not valid yet", now + 3600, ResultType::EncryptionCertificate, |_| {}),
        ("is for signatures", now, ResultType::SigningCertificate, |_| {}),
        ("has a signer that was revoked", now, ResultType::EncryptionCertificate, |stage| {
            Withdrawal::Signer.set(&stage.service, true);
        }),
        ("is of a host that was disabled", now, ResultType::EncryptionCertificate, |stage| {
            Withdrawal::Host.set(&stage.service, true);
        }),
        ("is of a host that has another key by now", now, ResultType::EncryptionCertificate, |stage| {
            change(&stage.service, |state| state.remove_host(HOST));
            change(&stage.service, |state| state.add_host(HOST, b"another key", &Labels::default(), 1));
        }),
        ("is of another host than the client certificate", now, ResultType::EncryptionCertificate, |stage| {
            configure(&stage.service, |config| {
                config.server.tls =
                    Some(Tls { clients: Clients::Hosts("ca".into()), ..Tls::new("certificate", "key") });
            });
        }),
    ];
    for (what, issued, content, change) in cases {
        let (_folder, stage) = stage();
        change(&stage);
        let health_certificate = stage.health_certificate_of(content, issued);
        let request = RollRequest { health_certificate, ..stage.request(b"no protector") };
        let mut attempt = attempt();
        let refusal = asked(&stage, &request.to_xml(), &mut attempt).await.unwrap_err();
        assert_eq!(refusal.code, Code::HealthCertificate, "{what}: {refusal:?}");
        assert!(!attempt.known, "{what}");
    }
}

#[tokio::test]
async fn a_known_host_is_refused_for_its_rate_before_a_large_request_is_read() {
    let (_folder, stage) = stage_with(|config| config.release.host_rate = 1);
    let request = stage.request(&stage.protector()).to_xml();
    assert!(released(&stage, &request).await.is_ok(), "the host is not known");
    exhaust_rate(&stage.service);
    // The unread parts may have any content, as long as the health certificate can be found.
    let unread = "junk ".repeat(4_000) + std::str::from_utf8(&request).unwrap();
    let charged = stage.service.admission.charged(&host());
    let mut attempt = attempt();
    let refusal = asked(&stage, unread.as_bytes(), &mut attempt).await.unwrap_err();
    assert_eq!(refusal.code, Code::TooManyRequests);
    assert_eq!((attempt.host.as_deref(), attempt.known), (Some(HOST), true));
    assert_eq!(stage.service.admission.charged(&host())[1..], charged[1..], "a refusal for its rate costs nothing");
    assert_eq!(stage.hsm.asked(Operation::Decrypt), 1);
}
