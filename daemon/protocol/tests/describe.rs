//! Descriptions of valid and of rejected protectors.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::describe::{Description, SignatureState, describe};
use claviger_protocol::error::Code;
use claviger_protocol::protector::MAX_PROTECTOR;
use common::*;
use data_encoding::BASE64;

/// The states of all signatures: the guardian signature, then two for each wrapping.
fn states(description: &Description) -> Vec<&SignatureState> {
    let of = |w: usize| {
        let wrapping = &description.wrappings[w];
        [&wrapping.signing_signature.state, &wrapping.encryption_signature.state]
    };
    std::iter::once(&description.guardian_signature.state)
        .chain((0..description.wrappings.len()).flat_map(of))
        .collect()
}

#[test]
fn a_right_protector_is_told_whole() {
    let mut draft = Draft::new(3);
    draft.root = " MaxOfflineUnwraps='7'".to_owned();
    draft.parts[2].algorithm = SignatureAlgorithm::ALL[5];
    let told = describe(&draft.build());
    assert!(told.readable && told.verdict.is_ok());
    assert_eq!((told.max_offline_unwraps, told.guardian, told.wrappings_left_out), (Some(7), Some(1), 0));
    assert!(states(&told).into_iter().all(|state| *state == SignatureState::Holds), "{told:?}");
    assert_eq!(told.transport_key_signature.as_deref(), Some(HMAC));
    assert_eq!(told.key_derivation.as_deref(), Some(HKDF));
    let parties: Vec<_> = told.wrappings.iter().map(|w| (w.id, w.parent, w.is_owner())).collect();
    assert_eq!(parties, [(Some(1), Some(1), true), (Some(2), Some(1), false), (Some(3), Some(1), false)]);
    let last = &told.wrappings[2];
    assert_eq!(last.signing.as_ref().unwrap().der(), signing_certificate(2));
    assert_eq!(last.encryption.as_ref().unwrap().der(), encryption_certificate(2));
    assert_eq!(last.signing_signature.algorithm.as_deref(), Some(SignatureAlgorithm::ALL[5].uri()));
    assert_eq!(last.algorithm.as_deref(), Some(MGF1P));
}

#[test]
fn what_is_wrong_is_told_where_it_is() {
    let file = String::from_utf8(Draft::new(3).build()).unwrap();
    let told = |old: &str, new: &str| {
        assert!(file.contains(old), "{old}");
        describe(file.replacen(old, new, 1).as_bytes())
    };
    // Replacing a certificate invalidates both signatures that cover it, and the signatures of its key.
    let [own, other] = [1, 2].map(|party| BASE64.encode(encryption_certificate(party)));
    let changed = told(&own, &other);
    assert_eq!(changed.verdict.as_ref().unwrap_err().code, Code::InvalidProtector);
    use SignatureState::{Holds, Wrong};
    assert_eq!(states(&changed), [&Wrong, &Holds, &Holds, &Holds, &Wrong, &Holds, &Holds]);
    // If a certificate cannot be read, the rest is still described.
    let broken = told(&BASE64.encode(signing_certificate(1)), "AAAA");
    assert!(broken.wrappings[1].signing.is_err() && broken.wrappings[2].signing.is_ok());
    assert_eq!(broken.wrappings[1].signing_signature.state, Wrong);
    assert!(
        matches!(&broken.wrappings[1].encryption_signature.state, SignatureState::Unchecked(why) if why.contains("signing"))
    );
    for (old, new) in [
        ("<Id>2</Id>", "<Id>x</Id>"),
        ("<Id>2</Id>", "<Id>3</Id>"),
        ("<Id>2</Id>", ""),
        ("ParentWrappingId=\"1\"", ""),
        ("ParentWrappingId=\"1\"", "ParentWrappingId=\"9\""),
        ("WrappingId=\"1\"", "WrappingId=\"9\""),
        ("rsa-sha256", "rsa-sha1"),
        ("rsa-oaep-mgf1p", "nonsense"),
        ("<SigningCertificate>", "<SigningCertificate>*"),
        ("<GuardianSignature", "<Other/><GuardianSignature"),
        ("TransportKeySignature>", "Strange>"),
    ] {
        let text = file.replacen(old, new, 1).replace(
            "</TransportKeySignature>",
            if new == "Strange>" { "</Strange>" } else { "</TransportKeySignature>" },
        );
        let told = describe(text.as_bytes());
        assert!(told.readable, "{old} {new}");
        assert!(told.verdict.is_err(), "{old} {new}");
        assert_eq!(told.wrappings.len(), 3, "{old} {new}");
    }
    let told = told("WrappingId=\"1\"", "WrappingId=\"9\"");
    assert_eq!(told.wrappings[0].parent, Some(9), "the first one is a parent's");
    assert!(
        matches!(&told.wrappings[0].signing_signature.state, SignatureState::Unchecked(why) if why.contains("parent"))
    );
}

#[test]
fn what_is_no_protector_has_a_verdict_and_nothing_else() {
    let large = vec![b' '; MAX_PROTECTOR + 1];
    for file in [&b""[..], b"x", b"<a/>", b"<Protector/>", &[0xff; 9], b"<!DOCTYPE a><a/>", &large] {
        let told = describe(file);
        assert!(told.verdict.is_err() && !told.readable && told.wrappings.is_empty(), "{told:?}");
    }
    let empty = describe(format!("<Protector xmlns='{K}'/>").as_bytes());
    assert!(empty.verdict.is_err() && empty.readable && empty.wrappings.is_empty());
}

#[test]
fn more_wrappings_than_allowed_are_counted_only() {
    let mut draft = Draft::new(1);
    let part = draft.parts[0].clone();
    draft.parts.extend((2..=70).map(|id| Part { id: id.to_string(), ..part.clone() }));
    let told = describe(draft.text().as_bytes());
    assert!(told.verdict.is_err());
    assert_eq!((told.wrappings.len(), told.wrappings_left_out), (64, 6));
}

#[test]
fn nothing_that_is_cut_or_changed_stops_it() {
    let file = Draft::new(2).build();
    let mut rng = Rng::new(3);
    for _ in 0..300 {
        let mut changed = file.clone();
        for _ in 0..=rng.below(3) {
            let at = rng.below(changed.len());
            changed[at] ^= 1 << rng.below(8);
        }
        changed.truncate(changed.len() - if rng.below(4) == 0 { rng.below(changed.len()) } else { 0 });
        let told = describe(&changed);
        assert_eq!(told.verdict.is_ok(), accept(&changed).is_ok());
    }
}
