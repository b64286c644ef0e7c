//! Protectors: written by the crate and by hand, parsed, verified, opened, rolled to a new key; and hostile ones.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::build::{Unsigned, fresh_transport_key};
use claviger_protocol::error::Code;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::OwnerError;
use claviger_protocol::protector::{MAX_PROTECTOR, MAX_WRAPPINGS, Protector, transport_key};
use claviger_protocol::verify::{KnownCertificates, Verified, verify};
use common::Rng;
use common::*;
use data_encoding::{BASE64, HEXLOWER, HEXUPPER};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// The release of an ingress protector: a new key for the same parties, signed by `party`.
fn egress(verified: &Verified, party: usize, unwraps: u32) -> (Vec<u8>, [u8; 32]) {
    let key = fresh_transport_key().unwrap();
    let recipients = verified.parties.iter().map(|p| p.encryption.key());
    let unsigned = Unsigned::new(&verified.protector.wrappings, recipients, &key, unwraps).unwrap();
    let algorithm = SignatureAlgorithm::DEFAULT;
    let value = signing(party).sign(algorithm, &unsigned.signed_octets()).unwrap();
    let ours = verified.parties.iter().position(|p| p.signing.key() == signing(party).public()).unwrap();
    let id = verified.protector.wrappings[ours].id;
    (unsigned.finish(id, algorithm, value).unwrap(), *key)
}

/// The canonical form of the `Wrappings` element by xmllint. `name` is the element's qualified name, `declarations` are
/// the namespace declarations that it inherits.
fn xmllint_wrappings(file: &[u8], name: &str, declarations: &str) -> Vec<u8> {
    let text = std::str::from_utf8(file).unwrap();
    let element = between(text, &format!("<{name}"), &format!("</{name}>")).replace(COMMENT, "");
    xmllint_c14n(element.replacen(name, &format!("{name} {declarations}"), 1).as_bytes()).unwrap()
}

const COMMENT: &str = "<!--]]> <Id>9</Id> -->";

#[test]
fn what_an_owner_creates_opens() {
    for guardians in 0..4 {
        let metadata: Vec<Metadata> = (1..=guardians).map(metadata).collect();
        let (file, key) = owner().create(&metadata).unwrap();
        let verified = accept(&file).unwrap();
        assert_eq!(verified.protector.max_offline_unwraps, 0);
        assert_eq!((verified.owner, verified.protector.guardian), (0, 0));
        let ids: Vec<u32> = verified.protector.wrappings.iter().map(|w| w.id).collect();
        assert_eq!(ids, (1..=u32::try_from(guardians).unwrap() + 1).collect::<Vec<_>>());
        for party in 0..=guardians {
            assert_eq!(open(&verified, party).unwrap(), key);
        }
        assert!(open(&verified, guardians + 1).is_err());
        assert_eq!(owner().open(&file).unwrap(), key);
        let canonical = xmllint_wrappings(&file, "Wrappings", &format!("xmlns='{K}'"));
        assert_eq!(canonical, verified.protector.signed_octets);
    }
}

#[test]
fn nobody_is_let_in_beyond_what_services_read() {
    let guardians = vec![metadata(2); MAX_WRAPPINGS];
    let (full, _) = owner().create(&guardians[1..]).unwrap();
    assert_eq!(Protector::parse(&full).unwrap().wrappings.len(), MAX_WRAPPINGS);
    assert!(matches!(owner().create(&guardians), Err(OwnerError::Full)));
    let error = owner().grant(&full, &guardians[0]).err().unwrap();
    assert!(error.to_string().contains("room for 64 parties, the owner and 63 guardians"), "{error}");
}

#[test]
fn a_guardian_is_granted_access_from_its_metadata() {
    let (file, key) = owner().create(&[metadata(1)]).unwrap();
    let granted = owner().grant(&file, &metadata(2)).unwrap();
    let verified = accept(&granted).unwrap();
    for party in 0..3 {
        assert_eq!(open(&verified, party).unwrap(), key);
    }
    let ids: Vec<_> = verified.protector.wrappings.iter().map(|w| (w.id, w.parent)).collect();
    assert_eq!(ids, [(1, 1), (2, 1), (3, 1)]);
    // The lowest free Id is taken, and the owner's Id need not be 1.
    let mut draft = Draft::new(2);
    (draft.parts[0].id, draft.parts[0].parent) = ("7".to_owned(), "7".to_owned());
    (draft.parts[1].id, draft.parts[1].parent) = ("1".to_owned(), "7".to_owned());
    draft.guardian = "7".to_owned();
    let verified = accept(&owner().grant(&draft.build(), &metadata(2)).unwrap()).unwrap();
    let ids: Vec<_> = verified.protector.wrappings.iter().map(|w| (w.id, w.parent)).collect();
    assert_eq!(ids, [(7, 7), (1, 7), (2, 7)]);
    assert_eq!(*open(&verified, 2).unwrap(), draft.key);
    // An owner can neither open nor change another owner's protector.
    assert!(matches!(owner_of(3).open(&file), Err(OwnerError::NotOurs)));
    assert!(matches!(owner_of(1).grant(&file, &metadata(2)), Err(OwnerError::NotOwner)));
    assert!(matches!(owner().open(b"<a/>"), Err(OwnerError::Protector(r)) if r.code == Code::InvalidProtector));
}

#[test]
fn a_revoked_guardian_cannot_open_and_nobody_else_notices() {
    let (file, key) = owner().create(&[metadata(1), metadata(2), metadata(3)]).unwrap();
    let revoked = owner().revoke(&file, |id, _| id == 3).unwrap();
    assert_eq!(revoked.gone, [3]);
    assert_ne!(*revoked.key, *key);
    let (before, after) = (accept(&file).unwrap(), accept(&revoked.file).unwrap());
    for party in [0, 1, 3] {
        assert_eq!(*open(&after, party).unwrap(), *revoked.key);
    }
    assert!(open(&after, 2).is_err());
    let kept = [0, 1, 3].map(|at| &before.protector.wrappings[at]);
    for (kept, new) in kept.into_iter().zip(&after.protector.wrappings) {
        assert_eq!((kept.id, kept.parent), (new.id, new.parent));
        assert_eq!(kept.signing_certificate, new.signing_certificate);
        assert_eq!(kept.signing_certificate_signature.value, new.signing_certificate_signature.value);
        assert_ne!(kept.cipher_value, new.cipher_value);
    }
    // The Id of a removed wrapping is used again.
    let again = accept(&owner().grant(&revoked.file, &metadata(2)).unwrap()).unwrap();
    assert_eq!(again.protector.wrappings.iter().map(|w| w.id).collect::<Vec<_>>(), [1, 2, 4, 3]);

    assert!(matches!(owner().revoke(&file, |_, _| false), Err(OwnerError::NoSuchGuardian)));
    assert!(matches!(owner().revoke(&file, |id, _| id == 1), Err(OwnerError::OwnerStays)));
    assert!(matches!(owner_of(1).revoke(&file, |id, _| id == 3), Err(OwnerError::NotOwner)));
    assert!(matches!(owner().revoke(b"<a/>", |_, _| true), Err(OwnerError::Protector(_))));
}

#[test]
fn with_a_guardian_go_those_it_let_in_and_its_other_wrappings() {
    // 2 vouches for 3, and 3 for 4. Wrapping 5 has the same guardian as 4, but the owner vouches for it.
    let mut draft = Draft::new(4);
    draft.parts.push(Part { id: "5".to_owned(), ..draft.parts[3].clone() });
    draft.parts.push(Part { id: "6".to_owned(), party: 4, ..draft.parts[3].clone() });
    for (at, parent) in [(2, 1), (3, 2)] {
        draft.parts[at].parent = draft.parts[parent].id.clone();
        draft.parts[at].parent_party = parent;
    }
    let file = draft.build();
    assert_eq!(owner().revoke(&file, |id, _| id == 2).unwrap().gone, [2, 3, 4, 5]);
    assert_eq!(owner().revoke(&file, |id, _| id == 5).unwrap().gone, [4, 5]);
    assert_eq!(owner().revoke(&file, |id, _| id == 6).unwrap().gone, [6]);
    // A guardian that vouches for a wrapping with the owner's certificates can still be revoked.
    let mut draft = Draft::new(2);
    draft.parts.push(Part { id: "3".to_owned(), parent: "2".to_owned(), parent_party: 1, ..draft.parts[0].clone() });
    let revoked = owner().revoke(&draft.build(), |id, _| id == 2).unwrap();
    assert_eq!(revoked.gone, [2, 3]);
    assert_eq!(*owner().open(&revoked.file).unwrap(), *revoked.key);
}

#[test]
fn an_owner_is_a_guardian_for_others() {
    let metadata = Metadata::parse(&owner_of(3).metadata().unwrap()).unwrap();
    let (file, key) = owner().create(&[metadata]).unwrap();
    assert_eq!(*owner_of(3).open(&file).unwrap(), *key);
}

#[test]
fn an_egress_keeps_the_parties_and_changes_the_key() {
    let parameters = [
        None,
        Some("<x:a xmlns:x='urn:x' xmlns:unused='urn:u' x:b=\"1\"><x:c/> y &lt;\r\n</x:a>"),
        Some("<a xmlns=''><b xml:lang='de' c='&#9;'/></a>"),
        Some("<Salt>x</Salt><!--no comment--> <p:q xmlns:p='urn:p'/>"),
        Some(""),
        Some(
            "<a xmlns=''><Id xmlns='http://schemas.microsoft.com/kps/2014/07'/></a><b xmlns='urn:b'><c xmlns=''/></b>",
        ),
    ];
    let kept = [
        None,
        Some("<x:a xmlns:x=\"urn:x\" x:b=\"1\"><x:c></x:c> y &lt;\n</x:a>"),
        Some("<a xmlns=\"\"><b c=\"&#x9;\" xml:lang=\"de\"></b></a>"),
        Some("<Salt>x</Salt><p:q xmlns:p=\"urn:p\"></p:q>"),
        Some(""),
        Some(
            "<a xmlns=\"\"><Id xmlns=\"http://schemas.microsoft.com/kps/2014/07\"></Id></a><b xmlns=\"urn:b\"><c xmlns=\"\"></c></b>",
        ),
    ];
    for (parameters, kept) in parameters.into_iter().zip(kept) {
        let mut draft = Draft::new(4);
        draft.parts.swap(0, 2);
        draft.parts[1].parameters = parameters.map(str::to_owned);
        draft.parts[3].algorithm = SignatureAlgorithm::ALL[5];
        (draft.parts[3].oaep, draft.parts[3].oaep_uri) = (Oaep::SHA256, OAEP_11);
        draft.parts[3].oaep_parameters = Some(oaep_parameters(Oaep::SHA256));
        (draft.parts[0].oaep_uri, draft.parts[1].id) = (OAEP_11, "4294967295".to_owned());
        draft.root = " MaxOfflineUnwraps='77'".to_owned();
        let ingress = accept(&draft.build()).unwrap();
        assert_eq!(ingress.protector.max_offline_unwraps, 77);
        for unwraps in [0, 5] {
            let (file, key) = egress(&ingress, 1, unwraps);
            let verified = accept(&file).unwrap();
            assert_eq!(verified.protector.max_offline_unwraps, unwraps);
            assert_eq!(verified.protector.wrappings[verified.protector.guardian].id, 4_294_967_295);
            assert_ne!(key, draft.key);
            for party in 0..4 {
                assert_eq!(*open(&verified, party).unwrap(), key);
            }
            assert_eq!(verified.protector.wrappings[1].signing_certificate_signature.parameters.as_deref(), kept);
            assert_ne!(verified.protector.signed_octets, ingress.protector.signed_octets);
            for (old, new) in ingress.protector.wrappings.iter().zip(&verified.protector.wrappings) {
                assert_eq!((old.id, old.parent), (new.id, new.parent));
                assert_eq!(old.signing_certificate, new.signing_certificate);
                assert_eq!(old.encryption_certificate, new.encryption_certificate);
                for (old, new) in [
                    (&old.signing_certificate_signature, &new.signing_certificate_signature),
                    (&old.encryption_certificate_signature, &new.encryption_certificate_signature),
                ] {
                    assert_eq!((old.algorithm, &old.value), (new.algorithm, &new.value));
                    assert_eq!(old.parameters, new.parameters);
                }
                assert_eq!(
                    (old.encryption.oaep, old.encryption.version_11),
                    (new.encryption.oaep, new.encryption.version_11)
                );
                assert_ne!(old.cipher_value, new.cipher_value);
            }
            let canonical = xmllint_wrappings(&file, "Wrappings", &format!("xmlns='{K}'"));
            assert_eq!(canonical, verified.protector.signed_octets);
            // No white space was added, and a second roll changes only the key.
            let written = String::from_utf8(file).unwrap().replace(kept.unwrap_or("-"), "");
            assert!(!written.contains("> ") && !written.contains('\n'), "{written}");
            let (again, key) = egress(&verified, 2, 0);
            let again = accept(&again).unwrap();
            assert_eq!(*open(&again, 0).unwrap(), key);
            assert_eq!(again.protector.wrappings[1].signing_certificate_signature.parameters.as_deref(), kept);
        }
    }
}

#[test]
fn the_ingress_key_and_another_guardian_do_not_fit_an_egress() {
    let ingress = accept(&Draft::new(3).build()).unwrap();
    let unsigned =
        |key| Unsigned::new(&ingress.protector.wrappings, ingress.parties.iter().map(|p| p.encryption.key()), key, 0);
    let unsigned = unsigned(&fresh_transport_key().unwrap()).unwrap();
    let value = signing(1).sign(SignatureAlgorithm::DEFAULT, &unsigned.signed_octets()).unwrap();
    let file = unsigned.finish(3, SignatureAlgorithm::DEFAULT, value.clone()).unwrap();
    assert_eq!(code(&file), Some(Code::InvalidProtector));
    let file = unsigned.finish(9, SignatureAlgorithm::DEFAULT, value.clone()).unwrap();
    assert_eq!(shape(&file), Some(Code::InvalidProtector));
    let file = unsigned.finish(2, SignatureAlgorithm::ALL[1], value).unwrap();
    assert_eq!(code(&file), Some(Code::InvalidProtector));
    let verified = accept(&Draft::new(1).build()).unwrap();
    assert!(
        !verified
            .protector
            .transport_key_signature
            .verify(&transport_key(&[7; 32]).unwrap(), &verified.protector.signed_octets)
    );
}

fn styles() -> Vec<Style> {
    fn wrapped(value: &str) -> String {
        let lines: Vec<String> = value.as_bytes().chunks(64).map(|l| String::from_utf8_lossy(l).into_owned()).collect();
        format!("\r\n\t {}\n", lines.join("\r\n"))
    }
    fn spaced(value: &str) -> String {
        if value.len() < 12 { format!("\n{value} ") } else { value.chars().map(|c| format!("{c} ")).collect() }
    }
    fn commented(value: &str) -> String {
        let (a, b) = value.split_at(value.len() / 2);
        format!("{COMMENT}{a}{COMMENT}{b}{COMMENT}")
    }
    fn cdata(value: &str) -> String {
        let (a, b) = value.split_at(value.len() / 2);
        format!("<![CDATA[{a}]]>{b}<![CDATA[]]>")
    }
    fn referenced(value: &str) -> String {
        value
            .bytes()
            .enumerate()
            .map(|(i, b)| if i % 3 == 0 { format!("&#{b};") } else { format!("&#x{b:X};") })
            .collect()
    }
    vec![
        PLAIN,
        Style { head: "<?xml version=\"1.0\" encoding=\"utf-8\"?>\r\n", line: "\r\n", ..PLAIN },
        Style { head: "\u{feff}<?xml version='1.0'?>", prefix: "k:", quote: '\'', ..PLAIN },
        Style { head: "\u{feff}", prefix: "\u{fc}-1._:", line: "\n", value: wrapped, ..PLAIN },
        Style { value: spaced, line: "\r", ..PLAIN },
        Style { value: commented, line: "\n<!--]]> <Id>9</Id> -->\n", prefix: "Wrappings:", ..PLAIN },
        Style { value: cdata, quote: '\'', prefix: "xm:", ..PLAIN },
        Style { value: referenced, ..PLAIN },
    ]
}

#[test]
fn every_way_to_write_a_protector_is_read() {
    for style in styles() {
        let mut draft = Draft::new(3);
        let name = format!("{}Wrappings", style.prefix);
        let declared = style.prefix.trim_end_matches(':');
        let declaration = if declared.is_empty() { format!("xmlns='{K}'") } else { format!("xmlns:{declared}='{K}'") };
        draft.style = style;
        // Unused namespaces in scope do not appear in the signed content.
        draft.root =
            " xmlns:unused='urn:unused' xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance' xsi:schemaLocation='a b'"
                .to_owned();
        let file = draft.build();
        let text = String::from_utf8_lossy(&file).into_owned();
        let verified = accept(&file).unwrap_or_else(|e| panic!("{e}: {text}"));
        for party in 0..3 {
            assert_eq!(*open(&verified, party).unwrap_or_else(|e| panic!("{e}: {text}")), draft.key);
        }
        assert_eq!(verified.protector.wrappings[1].signing_certificate, signing_certificate(1));
        let canonical = xmllint_wrappings(&file, &name, &declaration);
        assert_eq!(String::from_utf8_lossy(&canonical), String::from_utf8_lossy(&verified.protector.signed_octets));
        let (file, key) = egress(&verified, 1, 0);
        assert_eq!(*open(&accept(&file).unwrap(), 0).unwrap(), key);
    }
}

#[test]
fn every_signature_algorithm_is_taken() {
    for algorithm in SignatureAlgorithm::ALL {
        let mut draft = Draft::new(2);
        draft.algorithm = algorithm;
        draft.parts.iter_mut().for_each(|p| p.algorithm = algorithm);
        draft.guardian_parameters = Some("<anything xmlns='urn:x'>at all</anything>".to_owned());
        let file = draft.build();
        assert_eq!(*open(&accept(&file).unwrap(), 1).unwrap(), draft.key);
        // A valid signature is rejected under another algorithm's URI.
        let text = String::from_utf8(file).unwrap();
        for other in SignatureAlgorithm::ALL.into_iter().filter(|a| *a != algorithm) {
            let at = text.rfind(algorithm.uri()).unwrap();
            let changed = [&text[..at], other.uri(), &text[at + algorithm.uri().len()..]].concat();
            assert_eq!(code(changed.as_bytes()), Some(Code::InvalidProtector));
        }
    }
}

#[test]
fn unknown_algorithms_are_named() {
    let uris = [
        "http://www.w3.org/2000/09/xmldsig#rsa-sha1",
        "http://www.w3.org/2001/04/xmldsig-more#rsa-md5",
        "http://www.w3.org/2007/05/xmldsig-more#rsa-pss",
        "http://www.w3.org/2001/04/xmlenc#rsa-1_5",
        "http://www.w3.org/2001/04/xmldsig-more#RSA-SHA256",
        "urn:unheard-of",
        "",
    ];
    let text = Draft::new(2).text();
    for known in [RSA_SHA256, MGF1P, HKDF, HMAC] {
        let places: Vec<usize> = text.match_indices(&format!("\"{known}\"")).map(|(at, _)| at + 1).collect();
        assert!(!places.is_empty());
        for at in places {
            for uri in uris {
                let changed = [&text[..at], uri, &text[at + known.len()..]].concat();
                let changed = unsigned(&changed);
                let refusal = Protector::parse(changed.as_bytes()).unwrap_err();
                assert_eq!(refusal.code, Code::UnsupportedAlgorithm, "{refusal}");
                assert!(refusal.message.contains(uri), "{refusal}");
            }
        }
    }
    // White space around a URI is ignored when it is read, but it is signed.
    let mut draft = Draft::new(1);
    draft.parts[0].oaep_uri = " \t\nhttp://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p ";
    assert_eq!(*open(&accept(&draft.build()).unwrap(), 0).unwrap(), draft.key);
}

#[test]
fn the_shape_is_judged_before_the_algorithms() {
    let text = Draft::new(1).unsigned().replace(RSA_SHA256, "urn:x");
    assert_eq!(shape(text.as_bytes()), Some(Code::UnsupportedAlgorithm));
    let text = text.replace("WrappingId=\"1\">", "WrappingId=\"2\">");
    assert_eq!(shape(text.as_bytes()), Some(Code::InvalidProtector));
}

#[test]
fn every_oaep_is_taken() {
    let mut draft = Draft::new(3);
    for (oaep, number) in every_oaep().zip(0..) {
        let part = &mut draft.parts[number % 3];
        (part.oaep, part.oaep_uri, part.oaep_parameters) = (oaep, OAEP_11, Some(oaep_parameters(oaep)));
        let verified = accept(&draft.build()).unwrap();
        assert_eq!(verified.protector.wrappings[number % 3].encryption.oaep, oaep);
        assert_eq!(*open(&verified, number % 3).unwrap_or_else(|e| panic!("{e}: {oaep:?}")), draft.key);
        let (file, key) = egress(&verified, 0, 0);
        let verified = accept(&file).unwrap();
        assert_eq!(verified.protector.wrappings[number % 3].encryption.oaep, oaep);
        assert_eq!(*open(&verified, number % 3).unwrap(), key);
    }
}

#[test]
fn oaep_parameters_are_judged() {
    let x = "http://www.w3.org/2009/xmlenc11#";
    let digest = |uri: &str| format!("<d:DigestMethod xmlns:d='{DS}' Algorithm='{uri}'/>");
    let mgf = |uri: &str| format!("<x:MGF xmlns:x='{x}' Algorithm='{uri}'/>");
    let (sha256, sha1) =
        (digest("http://www.w3.org/2001/04/xmlenc#sha256"), digest("http://www.w3.org/2000/09/xmldsig#sha1"));
    let (mgf512, mgf1) = (mgf(&format!("{x}mgf1sha512")), mgf(&format!("{x}mgf1sha1")));
    let ok = |digest, mgf| Some(Oaep { digest, mgf });
    use claviger_protocol::algorithm::Digest::{Sha1, Sha256, Sha512};
    let cases: Vec<(&'static str, Option<String>, Option<Oaep>)> = vec![
        (MGF1P, None, ok(Sha1, Sha1)),
        (MGF1P, Some(String::new()), None),
        (MGF1P, Some(sha1.clone()), None),
        (OAEP_11, None, ok(Sha1, Sha1)),
        (OAEP_11, Some(String::new()), ok(Sha1, Sha1)),
        (OAEP_11, Some(" <!--c--> ".to_owned()), ok(Sha1, Sha1)),
        (OAEP_11, Some(sha256.clone()), ok(Sha256, Sha1)),
        (OAEP_11, Some(mgf512.clone()), ok(Sha1, Sha512)),
        (OAEP_11, Some(format!("{sha256} {mgf512}")), ok(Sha256, Sha512)),
        (OAEP_11, Some(format!("{mgf512}{sha256}")), ok(Sha256, Sha512)),
        (OAEP_11, Some(format!("{sha1}{mgf1}")), ok(Sha1, Sha1)),
        (OAEP_11, Some(format!("{sha256}{sha256}")), None),
        (OAEP_11, Some(format!("{mgf512}{mgf512}")), None),
        (OAEP_11, Some(digest("urn:x")), None),
        (OAEP_11, Some(mgf("urn:x")), None),
        (OAEP_11, Some(mgf("http://www.w3.org/2001/04/xmlenc#sha256")), None),
        (OAEP_11, Some(digest(&format!("{x}mgf1sha256"))), None),
        (
            OAEP_11,
            Some(format!("<e:OAEPparams xmlns:e='http://www.w3.org/2001/04/xmlenc#'>AAAA</e:OAEPparams>{sha256}")),
            None,
        ),
        (OAEP_11, Some("<e:OAEPparams xmlns:e='http://www.w3.org/2001/04/xmlenc#'/>".to_owned()), None),
        (OAEP_11, Some(sha256.replace(DS, "urn:x")), None),
        (OAEP_11, Some(mgf512.replace(&format!("xmlns:x='{x}'"), "xmlns:x='urn:x'")), None),
        (OAEP_11, Some("<DigestMethod Algorithm='http://www.w3.org/2001/04/xmlenc#sha256'/>".to_owned()), None),
        (OAEP_11, Some(sha256.replace("Algorithm", "algorithm")), None),
        (OAEP_11, Some(sha256.replace("/>", " Id='x'/>")), None),
        (OAEP_11, Some(sha256.replace("/>", "><x/></d:DigestMethod>")), None),
        (OAEP_11, Some(format!("<anything/>{sha256}")), None),
    ];
    for (uri, parameters, expected) in cases {
        let mut draft = Draft::new(1);
        (draft.parts[0].oaep_uri, draft.parts[0].oaep_parameters) = (uri, parameters.clone());
        draft.parts[0].oaep = expected.unwrap_or(Oaep::SHA1);
        match expected {
            Some(oaep) => {
                let verified = accept(&draft.build()).unwrap_or_else(|e| panic!("{e}: {parameters:?}"));
                assert_eq!(verified.protector.wrappings[0].encryption.oaep, oaep, "{parameters:?}");
                assert_eq!(*open(&verified, 0).unwrap(), draft.key);
            }
            None => {
                let text = draft.unsigned();
                assert_eq!(shape(text.as_bytes()), Some(Code::UnsupportedAlgorithm), "{parameters:?}");
            }
        }
    }
}

#[test]
fn key_derivation_parameters_are_judged() {
    const H: &str = "xmlns:h=\"http://www.w3.org/2021/04/xmldsig-more#\"";
    let salt = |octets: &[u8]| format!("<h:Salt>{}</h:Salt>", HEXLOWER.encode(octets));
    let (length, info) = ("<h:KeyLength>32</h:KeyLength>", "<h:Info>00fF</h:Info>");
    let sound = hkdf_params(HMAC, &(salt(&[1; 32]) + length));
    // Valid parameters: (parameters, salt, info).
    let long = vec![9; 1024];
    let default = sound.replace("xmlns:h", "xmlns").replace("<h:", "<").replace("</h:", "</");
    for (parameters, salt, info) in [
        (sound.clone(), vec![1; 32], vec![]),
        (hkdf_params(HMAC, &format!("{}{info}{length}", salt(&[1]))), vec![1], vec![0, 255]),
        (hkdf_params(HMAC, &format!("{}<h:Info/>{length}", salt(&[1]))), vec![1], vec![]),
        (hkdf_params(HMAC, &(salt(&long) + length)), long.clone(), vec![]),
        (
            hkdf_params(
                HMAC,
                &format!("<h:Salt> \n{}<!--x-->{}\t</h:Salt>{length}", HEXUPPER.encode(&[0xab; 9]), "cD"),
            ),
            [vec![0xab; 9], vec![0xcd]].concat(),
            vec![],
        ),
        (hkdf_params(HMAC, &(salt(&[1]) + "<h:KeyLength> 032\n</h:KeyLength>")), vec![1], vec![]),
        (format!("<!--x-->\n{default}\n"), vec![1; 32], vec![]),
        (sound.replace(HMAC, &format!("\n{HMAC} ")), vec![1; 32], vec![]),
    ] {
        let mut draft = Draft::new(2);
        (draft.salt, draft.info, draft.hkdf_parameters) = (salt, info, Some(parameters.clone()));
        let verified = accept(&draft.build()).unwrap_or_else(|e| panic!("{e}: {parameters}"));
        assert_eq!(verified.protector.transport_key_signature.derivation.salt, draft.salt);
        assert_eq!(verified.protector.transport_key_signature.derivation.info, draft.info);
        assert_eq!(*open(&verified, 1).unwrap_or_else(|e| panic!("{e}: {parameters}")), draft.key);
        // Another salt or info gives another key.
        draft.salt[0] ^= 1;
        assert!(open(&accept(&draft.build()).unwrap(), 1).is_err());
    }
    let prf = format!("<h:PRF Algorithm=\"{HMAC}\"/>");
    let open_tag = format!("<h:HKDFParams {H}>");
    let content = |content: String| Some(format!("{open_tag}{content}</h:HKDFParams>"));
    let s = salt(&[1; 32]);
    let bad = [
        None,
        Some(String::new()),
        Some(format!("{sound}{sound}")),
        Some(format!("{sound}<x/>")),
        Some(format!("<x/>{sound}")),
        Some(sound.replace(HKDF_NS, "urn:x")),
        Some(sound.replace(HKDF_NS, K)),
        Some(sound.replace(&format!(" {H}"), &format!(" {H} Id='x'"))),
        Some(hkdf_params("http://www.w3.org/2001/04/xmldsig-more#hmac-sha512", &(s.clone() + length))),
        Some(hkdf_params("", &(s.clone() + length))),
        content(format!("<h:PRF/>{s}{length}")),
        content(format!("<h:PRF Algorithm=\"{HMAC}\" Id=\"x\"/>{s}{length}")),
        content(format!("<h:PRF Algorithm=\"{HMAC}\"><h:x/></h:PRF>{s}{length}")),
        content(format!("{s}{length}")),
        content(format!("{prf}{length}")),
        content(format!("{prf}{s}")),
        content(format!("{s}{prf}{length}")),
        content(format!("{prf}{length}{s}")),
        content(format!("{prf}{info}{s}{length}")),
        content(format!("{prf}{prf}{s}{length}")),
        content(format!("{prf}{s}{s}{length}")),
        content(format!("{prf}{s}{info}{info}{length}")),
        content(format!("{prf}{s}{length}{length}")),
        content(format!("{prf}{s}{length}<h:More/>")),
        content(format!("{prf}{s}{length}text")),
        content(format!("{prf}<h:Salt/>{length}")),
        content(format!("{prf}<h:Salt> </h:Salt>{length}")),
        content(format!("{prf}<h:Salt>abc</h:Salt>{length}")),
        content(format!("{prf}<h:Salt>gg</h:Salt>{length}")),
        content(format!("{prf}<h:Salt>ab cd</h:Salt>{length}")),
        content(format!("{prf}<h:Salt>0x12</h:Salt>{length}")),
        content(format!("{prf}<h:Salt>\u{661}\u{661}</h:Salt>{length}")),
        content(format!("{prf}<h:Salt Id='x'>ab</h:Salt>{length}")),
        content(format!("{prf}<h:Salt>ab<h:x/></h:Salt>{length}")),
        content(format!("{prf}{}{length}", salt(&[1; 1025]))),
        content(format!("{prf}{s}<h:Info>a</h:Info>{length}")),
        content(format!("{prf}{s}<h:Info>xy</h:Info>{length}")),
        content(format!("{prf}{s}<h:KeyLength>31</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength>33</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength>256</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength>0</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength/>")),
        content(format!("{prf}{s}<h:KeyLength>4294967328</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength>-32</h:KeyLength>")),
        content(format!("{prf}{s}<h:KeyLength>32 octets</h:KeyLength>")),
    ];
    for parameters in bad {
        let mut draft = Draft::new(1);
        draft.hkdf_parameters = parameters.clone();
        let text = draft.unsigned();
        assert_eq!(shape(text.as_bytes()), Some(Code::UnsupportedAlgorithm), "{parameters:?}");
    }
}

#[test]
fn numbers_are_read_as_xml_schema_writes_them() {
    // Two notations of the same Id count as duplicates.
    let mut draft = Draft::new(2);
    draft.parts[1].id = "01".to_owned();
    let text = draft.unsigned();
    assert_eq!(shape(text.as_bytes()), Some(Code::InvalidProtector));
    let mut draft = Draft::new(2);
    draft.parts[0].id = " 0001\n".to_owned();
    (draft.parts[0].parent, draft.parts[1].parent, draft.guardian) =
        ("1 ".to_owned(), "01".to_owned(), "+001".to_owned());
    assert_eq!(*open(&accept(&draft.build()).unwrap(), 1).unwrap(), draft.key);
    for (written, read) in [("0", 0), ("007", 7), (" 5\n", 5), ("4294967295", u32::MAX)] {
        let mut draft = Draft::new(1);
        draft.root = format!(" MaxOfflineUnwraps='{written}'");
        assert_eq!(accept(&draft.build()).unwrap().protector.max_offline_unwraps, read);
        let mut draft = Draft::new(1);
        (draft.parts[0].id, draft.parts[0].parent, draft.guardian) =
            (written.to_owned(), written.to_owned(), written.to_owned());
        assert_eq!(accept(&draft.build()).unwrap().protector.wrappings[0].id, read);
    }
    for wrong in
        ["", " ", "-1", "4294967296", "99999999999999999999", "1.0", "0x1", "1 1", "\u{661}", "one", "1e0", "++1"]
    {
        for change in [
            |d: &mut Draft, v: &str| d.root = format!(" MaxOfflineUnwraps='{v}'"),
            |d: &mut Draft, v: &str| d.parts[0].id = v.to_owned(),
            |d: &mut Draft, v: &str| d.parts[0].parent = v.to_owned(),
            |d: &mut Draft, v: &str| d.guardian = v.to_owned(),
        ] {
            let mut draft = Draft::new(1);
            change(&mut draft, wrong);
            let text = draft.unsigned();
            assert_eq!(shape(text.as_bytes()), Some(Code::InvalidProtector), "{wrong:?}");
        }
    }
}

/// All elements except `Parameters` are required. Each occurs once, in its place, without other attributes. Every value
/// is non-empty base64.
#[test]
fn the_schema_is_kept_to_the_letter() {
    let draft = Draft::new(2);
    let text = String::from_utf8(draft.build()).unwrap();
    assert_eq!(code(text.as_bytes()), None);
    let elements = [
        "Wrappings",
        "Wrapping",
        "Id",
        "SigningCertificate",
        "SigningCertificateSignature",
        "Signature",
        "SignatureValue",
        "EncryptionCertificate",
        "EncryptionCertificateSignature",
        "TransportKey",
        "EncryptedData",
        "CipherValue",
        "TransportKeySignature",
        "KeyDerivationMethod",
        "GuardianSignature",
    ];
    let refused = |changed: String, what: &str| {
        assert_ne!(changed, text, "{what}");
        assert_eq!(shape(changed.as_bytes()), Some(Code::InvalidProtector), "{what}");
    };
    for name in elements {
        let element = if name == "Wrapping" {
            between(&text, "<Wrapping>", "</Wrapping>")
        } else {
            let start = [format!("<{name}>"), format!("<{name} ")].into_iter().find(|s| text.contains(s)).unwrap();
            between(&text, &start, &format!("</{name}>"))
        };
        refused(text.replacen(element, &element.repeat(2), 1), &format!("{name} twice"));
        if name != "Wrapping" {
            refused(text.replacen(element, "", 1), &format!("{name} missing"));
        }
        refused(
            text.replacen(element, &element.replacen(&format!("<{name}"), &format!("<{name} Id='x'"), 1), 1),
            &format!("{name} with an attribute"),
        );
        refused(text.replacen(element, &format!("text{element}"), 1), &format!("text before {name}"));
        refused(text.replacen(element, &format!("<x xmlns='urn:x'/>{element}"), 1), &format!("foreign before {name}"));
        refused(text.replacen(element, &format!("{element}<More/>"), 1), &format!("more after {name}"));
        let foreign = element.replacen(&format!("<{name}"), &format!("<{name} xmlns='urn:x'"), 1);
        refused(text.replacen(element, &foreign, 1), &format!("{name} in another namespace"));
        let without = element.replacen(&format!("<{name}"), &format!("<{name} xmlns=''"), 1);
        refused(text.replacen(element, &without, 1), &format!("{name} in no namespace"));
        if ["SigningCertificate", "SignatureValue", "EncryptionCertificate", "CipherValue"].contains(&name) {
            for value in [
                "",
                " ",
                "<!---->",
                "A",
                "AAA",
                "AAA=A",
                "A===",
                "AAAAA",
                "AA-_",
                "AB==",
                "AAAA=",
                "<x/>",
                "AAAA\u{a0}",
                "\u{ff21}AAA",
            ] {
                let changed = format!("<{name}>{value}</{name}>");
                refused(text.replacen(element, &changed, 1), &format!("{name} as {value:?}"));
            }
        }
    }
    let empty = between(&text, "<Wrappings>", "</Wrappings>");
    refused(text.replacen(empty, "<Wrappings/>", 1), "no wrapping");
    refused(text.replace("Protector", "Protektor"), "another root");
    refused(text.replacen(K, S, 1), "another namespace");
    refused(text.replacen(&format!(" xmlns=\"{K}\""), "", 1), "no namespace");
    refused(text.replacen("<Protector", "<Protector Id=\"1\"", 1), "an attribute of the root");
    refused(
        text.replacen("<Protector", "<Protector xmlns:k=\"urn:k\" k:MaxOfflineUnwraps=\"1\"", 1),
        "a foreign attribute",
    );
    for attribute in [
        " ParentWrappingId=\"1\"",
        " WrappingId=\"1\"",
        &format!(" Algorithm=\"{HMAC}\"><SignatureValue"),
        &format!(" Algorithm=\"{HKDF}\""),
        &format!(" Algorithm=\"{MGF1P}\""),
        &format!(" Algorithm=\"{RSA_SHA256}\""),
    ] {
        let without = if attribute.ends_with("SignatureValue") { "><SignatureValue" } else { "" };
        refused(text.replacen(attribute, without, 1), attribute);
    }
    // Text inside Parameters, and attributes on it.
    let with = |inside: &str| {
        text.replacen("<KeyDerivationMethod", "<!---->\n<KeyDerivationMethod", 1).replacen("<Parameters>", inside, 1)
    };
    refused(with("<Parameters>text"), "text in Parameters");
    refused(with("<Parameters Id='x'>"), "an attribute of Parameters");
    // Outside of the signed content, comments and white space have no effect.
    let spaced = text.replacen("<GuardianSignature", "\n<!--x--><GuardianSignature", 1).replacen(
        "</Protector>",
        " </Protector>\n",
        1,
    );
    assert_eq!(code(spaced.as_bytes()), None);
}

#[test]
fn limits_are_where_the_protocol_has_them() {
    assert_eq!((MAX_WRAPPINGS, MAX_PROTECTOR), (64, 524_288));
    // Many wrappings of the same party.
    let mut draft = Draft::new(1);
    draft.parts = (1..=64)
        .map(|id| Part { id: id.to_string(), party: usize::from(id > 1), ..Draft::new(1).parts[0].clone() })
        .collect();
    let file = draft.build();
    let verified = accept(&file).unwrap();
    assert_eq!(verified.protector.wrappings.len(), 64);
    let (file, key) = egress(&verified, 1, 0);
    assert_eq!(*open(&accept(&file).unwrap(), 1).unwrap(), key);
    let mut one_more = draft.clone();
    one_more.parts.push(Part { id: "65".to_owned(), ..draft.parts[1].clone() });
    let text = one_more.unsigned();
    assert_eq!(shape(text.as_bytes()), Some(Code::InvalidProtector));

    // Depth: the Parameters of a certificate's signature have level 6, their content has level 7.
    let nested = |depth: usize| {
        let mut draft = Draft::new(1);
        draft.parts[0].parameters = Some(format!("{}{}", "<a>".repeat(depth - 6), "</a>".repeat(depth - 6)));
        draft
    };
    let file = nested(32).build();
    let (egress_file, _) = egress(&accept(&file).unwrap(), 0, 0);
    assert_eq!(code(&egress_file), None);
    let text = nested(33).unsigned();
    assert_eq!(shape(text.as_bytes()), Some(Code::InvalidProtector));

    // Size: white space after the root, and inside.
    let mut file = Draft::new(1).build();
    file.resize(MAX_PROTECTOR, b' ');
    assert_eq!(code(&file), None);
    file.push(b' ');
    assert_eq!(shape(&file), Some(Code::InvalidProtector));
}

/// An egress protector that would be too large gets the same code as an ingress protector that is too large.
#[test]
fn an_egress_stays_within_the_limit() {
    let mut draft = Draft::new(1);
    // Each element grows from 27 bytes to 53, because an end tag is added.
    draft.parts[0].parameters = Some("<abcdefghijklmnopqrstuvwx/>".repeat(15_000));
    let verified = accept(&draft.build()).unwrap();
    let refusal = Unsigned::new(
        &verified.protector.wrappings,
        verified.parties.iter().map(|p| p.encryption.key()),
        &fresh_transport_key().unwrap(),
        0,
    )
    .unwrap_err();
    assert_eq!(refusal.code, Code::InvalidProtector);
}

/// Positions of the bytes that a signature covers, or that belong to a signature.
fn signed_part(text: &str) -> Vec<usize> {
    let mut part = Vec::new();
    for (from, to) in [
        ("<Wrappings>", "</Wrappings>"),
        ("<Signature Algorithm=\"http://www.w3.org/2001/04/xmldsig-more#hmac", "</Signature>"),
        ("<GuardianSignature", "</GuardianSignature>"),
    ] {
        let start = text.find(from).unwrap();
        part.extend(start..start + between(text, from, to).len());
    }
    part
}

#[test]
fn a_single_changed_bit_is_refused() {
    let draft = Draft::new(2);
    let file = draft.build();
    assert!(open(&accept(&file).unwrap(), 1).is_ok());
    let part = signed_part(std::str::from_utf8(&file).unwrap());
    assert!(part.len() > 7_000, "{}", part.len());
    let mut rng = Rng::new(99);
    let mut changed = file.clone();
    // Changes one bit of each byte; the property test below tries other changes.
    for at in part.iter().copied() {
        let bit = 1 << rng.below(8);
        changed[at] ^= bit;
        let opened = accept(&changed).map_err(|e| e.to_string()).and_then(|v| open(&v, 1).map_err(str::to_owned));
        assert!(opened.is_err(), "octet {at}, bit {bit:#x}: {:?}", String::from_utf8_lossy(&changed[at - 20..at + 20]));
        changed[at] ^= bit;
    }
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    runner
        .run(&(0..part.len(), 1..=255_u8), |(at, bits)| {
            let mut changed = file.clone();
            changed[part[at]] ^= bits;
            // Different white space between attributes has the same canonical form. (No single changed bit turns one
            // white space character into another, so the loop above needs no exception.)
            let space = |octet: u8| matches!(octet, b' ' | b'\t' | b'\r' | b'\n');
            prop_assume!(!(space(file[part[at]]) && space(changed[part[at]])));
            let opened = accept(&changed).map_err(|e| e.to_string()).and_then(|v| open(&v, 1).map_err(str::to_owned));
            prop_assert!(opened.is_err(), "octet {}, {:#x}", part[at], bits);
            Ok(())
        })
        .unwrap();
}

#[test]
fn known_certificates_are_few_and_never_wrong_ones() {
    let file = Draft::new(2).build();
    let known = KnownCertificates::new(8);
    for _ in 0..3 {
        verify(Protector::parse(&file).unwrap(), &known).unwrap();
        assert_eq!(known.len(), 2, "one for each wrapping");
    }
    // Each signature gets another signature's value or another message: nothing may count as known.
    let protector = Protector::parse(&file).unwrap();
    for wrapping in 0..protector.wrappings.len() {
        let mut changed = protector.clone();
        let other = (wrapping + 1) % protector.wrappings.len();
        changed.wrappings[wrapping].encryption_certificate_signature =
            protector.wrappings[other].encryption_certificate_signature.clone();
        assert!(verify(changed, &known).is_err(), "{wrapping}: the value of {other}");
        let mut changed = protector.clone();
        changed.wrappings[wrapping].encryption_certificate = protector.wrappings[other].encryption_certificate.clone();
        assert!(verify(changed, &known).is_err(), "{wrapping}: the certificate of {other}");
        let mut changed = protector.clone();
        changed.wrappings[wrapping].signing_certificate = protector.wrappings[other].signing_certificate.clone();
        assert!(verify(changed, &known).is_err(), "{wrapping}: the signing certificate of {other}");
        let mut changed = protector.clone();
        changed.wrappings[wrapping].signing_certificate_signature =
            protector.wrappings[other].signing_certificate_signature.clone();
        assert!(verify(changed, &known).is_err(), "{wrapping}: the parent's signature of {other}");
    }
    // The number of remembered parties stays bounded.
    let small = KnownCertificates::new(2);
    for _ in 0..5 {
        verify(Protector::parse(&file).unwrap(), &small).unwrap();
        assert!(small.len() <= 4);
    }
}

#[test]
fn hostile_octets_never_panic() {
    let file = Draft::new(2).build();
    let styled = Draft { style: styles().remove(5), ..Draft::new(2) }.build();
    let mut runner = TestRunner::new(Config { cases: 2000, failure_persistence: None, ..Config::default() });
    let tokens = prop::sample::select(
        &["<", ">", "&", "]]>", "<!--", "-->", "\"", "<a>", "</Wrapping>", "xmlns:p=", "\u{1f512}", "&#x1F512;", "/>"]
            [..],
    );
    let changes = prop::collection::vec((any::<prop::sample::Index>(), 0..40_usize, tokens), 0..4);
    runner
        .run(
            &(prop::collection::vec(any::<u8>(), 0..300), "\\PC{0,200}", changes, any::<bool>()),
            |(octets, text, changes, styled_one)| {
                let _ = accept(&octets);
                let _ = accept(text.as_bytes());
                let _ = accept(format!("<Protector xmlns='{K}'>{text}</Protector>").as_bytes());
                let mut changed = if styled_one { styled.clone() } else { file.clone() };
                for (at, len, token) in changes {
                    let at = at.index(changed.len());
                    let end = (at + len).min(changed.len());
                    changed.splice(at..end, token.bytes());
                }
                let _ = accept(&changed);
                let _ = Metadata::parse(&changed);
                Ok(())
            },
        )
        .unwrap();
}

/// Documents of the maximum size, each slow in another way.
fn hostile() -> Vec<(&'static str, String)> {
    let room = MAX_PROTECTOR - 20_000;
    let fill = |unit: &str| unit.repeat(room / unit.len());
    let numbered = |unit: &dyn Fn(usize) -> String| {
        let mut out = String::new();
        for i in 0.. {
            let next = unit(i);
            if out.len() + next.len() > room {
                return out;
            }
            out.push_str(&next);
        }
        out
    };
    let parameters = |inside: String| {
        let mut draft = Draft::new(1);
        draft.parts[0].parameters = Some(inside);
        draft.unsigned()
    };
    let rooted = |root: String, inside: String| {
        let mut draft = Draft::new(1);
        draft.root = root;
        draft.parts[0].parameters = Some(inside);
        draft.unsigned()
    };
    let long = "n".repeat(240);
    let value = |inside: String| {
        let text = Draft::new(1).unsigned();
        text.replacen("<Id>1</Id>", &format!("<Id>{inside}1</Id>"), 1)
    };
    vec![
        ("deep nesting", fill("<a>")),
        ("deep nesting, closed", fill("<a>").chars().take(room / 2).collect::<String>() + &"</a>".repeat(room / 8)),
        ("nesting at the limit, repeated", parameters(fill(&format!("{}{}", "<a>".repeat(25), "</a>".repeat(25))))),
        ("many attributes of one element", parameters(format!("<a{}/>", numbered(&|i| format!(" a{i}=''"))))),
        (
            "the most attributes, again and again",
            parameters(fill(&format!("<a{}/>", (0..32).map(|i| format!(" a{i}=''")).collect::<String>()))),
        ),
        ("an attribute twice", parameters(format!("<a{}/>", fill(" a=''")))),
        ("many declarations on one element", parameters(format!("<a{}/>", numbered(&|i| format!(" xmlns:a{i}='u'"))))),
        ("a declaration on every element", parameters(numbered(&|i| format!("<a xmlns='u{i}'/>")))),
        ("a declaration on every element, most in scope", {
            let scope = |from: usize| (from..from + 31).map(|i| format!(" xmlns:p{i}='u'")).collect::<String>();
            let (open, close) = ((1..3).map(|i| format!("<a{}>", scope(i * 31))).collect::<String>(), "</a>".repeat(2));
            let inside: String = (0..8_100).map(|i| format!("<a xmlns:q='{i}'/>")).collect();
            parameters(format!("{open}{inside}{close}"))
        }),
        ("the same, in scope of thousands of elements without any", {
            let scope = |from: usize| (from..from + 31).map(|i| format!(" xmlns:p{i}='u'")).collect::<String>();
            let (open, close) = ((1..3).map(|i| format!("<a{}>", scope(i * 31))).collect::<String>(), "</a>".repeat(2));
            parameters(format!("{open}{}{close}", fill("<p31:a p32:b=''/>")))
        }),
        ("a long namespace name, used by many siblings", rooted(format!(" xmlns:p='{long}'"), fill("<p:a/>"))),
        ("long namespace names, many used by each sibling", {
            let root: String = (0..30).map(|i| format!(" xmlns:p{i}='{long}{i}'")).collect();
            let child = format!("<a{}/>", (0..30).map(|i| format!(" p{i}:a=''")).collect::<String>());
            rooted(root, fill(&child))
        }),
        ("a long namespace name, used by many siblings below one that does not", {
            rooted(format!(" xmlns:p='{long}'"), format!("<b>{}</b>", fill("<p:a/>")))
        }),
        ("a long namespace name, used by many siblings in a signature that is not kept", {
            let mut draft = Draft::new(1);
            draft.root = format!(" xmlns:p='{long}'");
            draft.guardian_parameters = Some(fill("<p:a/>"));
            draft.unsigned()
        }),
        ("many comments", value(fill("<!---->"))),
        ("many CDATA sections", value(fill("<![CDATA[]]>"))),
        ("many CDATA sections and comments", value(fill("<![CDATA[ ]]><!---->"))),
        ("one long comment", value(format!("<!--{}-->", fill("- ")))),
        ("a comment that does not end", value(format!("<!--{}", fill("-")))),
        ("comments that do not end", value(fill("<!--"))),
        ("less-than signs", fill("<")),
        ("less-than signs in a value", value(fill("<"))),
        ("ampersands", value(fill("&"))),
        ("ampersands and number signs", value(fill("&#"))),
        ("a long character reference", value(format!("&#{};", fill("0")))),
        ("character references", value(fill("&#x20;"))),
        ("predefined entities", value(fill("&amp;"))),
        ("quotes", value(format!("<a {}", fill("\"")))),
        ("equals signs", value(format!("<a {}/>", fill("=")))),
        ("a tag that does not end", value(format!("<a {}", fill(" ")))),
        ("a long name", parameters(format!("<{0}></{0}>", "n".repeat(room / 2)))),
        ("long attribute names", parameters(fill(&format!("<a {}=''/>", "n".repeat(1000))))),
        ("huge text", value(fill(" "))),
        ("huge text of carriage returns", value(fill("\r"))),
        ("huge text of greater-than signs", value(fill(">"))),
        ("huge text of brackets", value(fill("]"))),
        ("line ends", fill("\n")),
        ("tiny elements", parameters(fill("<a/>"))),
        ("tiny elements, fewer than the limit", parameters("<a/>".repeat(16_000))),
        ("tiny elements with closing tags", parameters(fill("<a></a>"))),
        ("tiny elements and text", parameters(format!("<b>{}</b>", fill("<a/>x")))),
        ("wrappings", {
            let wrapping = "<Wrapping><Id>1</Id></Wrapping>";
            Draft::new(1).text_with(&format!("<Wrappings>{}</Wrappings>", fill(wrapping)))
        }),
        ("a huge value", {
            let value = BASE64.encode(&vec![7; room / 4 * 3 - 9]);
            unsigned(&Draft::new(1).text().replace("@HMAC@", &value))
        }),
        ("a huge salt", {
            let mut draft = Draft::new(1);
            draft.hkdf_parameters =
                Some(hkdf_params(HMAC, &format!("<h:Salt>{}</h:Salt><h:KeyLength>32</h:KeyLength>", fill("00"))));
            draft.unsigned()
        }),
        ("a huge algorithm", {
            let text = Draft::new(1).unsigned();
            text.replacen(MGF1P, &fill("u"), 1)
        }),
        ("an XML declaration that does not end", format!("<?xml {}", fill("a='' "))),
        ("an XML declaration full of pseudo-attributes", format!("<?xml{}?><a/>", fill(" version='1.0'"))),
    ]
}

#[test]
fn hostile_documents_are_cheap() {
    let mut slowest = (Duration::ZERO, "");
    for (name, document) in hostile() {
        assert!(document.len() <= MAX_PROTECTOR, "{name}: {}", document.len());
        let start = Instant::now();
        let outcome = Protector::parse(document.as_bytes());
        let took = start.elapsed();
        let outcome = outcome.map_or_else(|e| e.to_string(), |_| "accepted".to_owned());
        println!("{:>9.3} ms  {:>6} octets  {name}: {outcome:.110}", took.as_secs_f64() * 1e3, document.len());
        slowest = slowest.max((took, name));
        // A generous limit, because this is not a benchmark. Quadratic cost would take far longer.
        assert!(took < Duration::from_secs(2), "{name}: {took:?}");
    }
    println!("slowest: {:?} ({})", slowest.0, slowest.1);
}
