//! For every change to a protector, the fast path for known wrapping sets gives the same result as the full path.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::build::fresh_transport_key;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::protector::{MAX_PROTECTOR, Protector};
use claviger_protocol::work::Work;
use claviger_protocol::wrapping_set::{Ingress, KnownSets};
use common::*;
use data_encoding::BASE64;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// A protector from a service for these parties, and tables that know its set. The owner signed it.
fn known(parties: usize) -> (KnownSets, Vec<u8>) {
    let sets = KnownSets::new(100);
    let first = Draft::new(parties).build();
    let ingress = sets.read(&first, &sha256(&first), &mut Work::default()).unwrap();
    sets.remember(&ingress.set);
    let file = rolled(&ingress, 0);
    assert!(by_skeleton(&sets, &file).is_some_and(|read| read.is_ok()), "the set is known");
    (sets, file)
}

/// A fresh protector of the set, signed by the owner.
fn rolled(ingress: &Ingress, unwraps: u32) -> Vec<u8> {
    let key = fresh_transport_key().unwrap();
    let unsigned = ingress.set.protect(&key, unwraps).unwrap();
    let value = signing(0).sign(SignatureAlgorithm::DEFAULT, &unsigned.signed_octets()).unwrap();
    assert!(signing(0).public().verify_digest(unsigned.signed_sha256().as_ref(), &value).is_ok());
    let file = unsigned.finish(1, SignatureAlgorithm::DEFAULT, value).unwrap();
    assert_eq!(unsigned.file_sha256(&file).as_ref(), sha256(&file));
    file
}

fn by_skeleton(sets: &KnownSets, file: &[u8]) -> Option<Result<Ingress, Refusal>> {
    sets.read_known(file, &sha256(file), &mut Work::default())
}

/// Reads `file` on both paths, which must agree. Returns the code of the refusal, and whether the fast path was used.
fn judged(sets: &KnownSets, file: &[u8]) -> (Option<Code>, bool) {
    let full = accept(file);
    let by_skeleton = by_skeleton(sets, file);
    let sufficed = by_skeleton.is_some();
    if let Some(read) = by_skeleton {
        same_answer(&full, &read);
    }
    same_answer(&full, &sets.read(file, &sha256(file), &mut Work::default()));
    (full.err().map(|refusal| refusal.code), sufficed)
}

/// The same, but signs the changed document again if it can still be signed.
fn judged_when_signed_again(sets: &KnownSets, text: &str) -> (Option<Code>, bool) {
    let Ok(parsed) = Protector::parse(text.as_bytes()) else { return judged(sets, text.as_bytes()) };
    let value = signing(0).sign(SignatureAlgorithm::DEFAULT, &parsed.signed_octets).unwrap();
    let start = text.rfind("<SignatureValue>").unwrap() + "<SignatureValue>".len();
    let end = start + text[start..].find('<').unwrap();
    judged(sets, format!("{}{}{}", &text[..start], BASE64.encode(&value), &text[end..]).as_bytes())
}

#[test]
fn every_byte_that_is_changed_is_judged_the_same() {
    let (sets, file) = known(2);
    let (mut by_skeleton, mut unchanged) = (0, 0);
    for at in 0..file.len() {
        // Changes another bit at each position. Positions outside of the certificates are changed twice.
        for turn in 0..if (600..5_000).contains(&at) { 1 } else { 2 } {
            let mut changed = file.clone();
            changed[at] ^= 1 << ((at + 3 * turn) % 8);
            let (code, sufficed) = judged(&sets, &changed);
            // Changes of white space, and of bytes that no signature covers, may have no effect.
            unchanged += usize::from(code.is_none());
            by_skeleton += usize::from(sufficed);
        }
    }
    assert!(by_skeleton > 300, "{by_skeleton} changed values were read by the skeleton");
    assert!(unchanged < 200, "{unchanged} changes of a signed document were not found");
}

#[test]
fn every_cut_and_every_byte_that_is_gone_is_judged_the_same() {
    let (sets, file) = known(1);
    for at in 0..file.len() {
        assert!(judged(&sets, &file[..at]).0.is_some());
        let gone = [&file[..at], &file[at + 1..]].concat();
        judged(&sets, &gone);
    }
    for trailing in ["\n", " ", "<!---->", "x", "\0"] {
        judged(&sets, &[&file[..], trailing.as_bytes()].concat());
    }
}

#[test]
fn values_that_are_written_otherwise_are_judged_the_same() {
    let (sets, file) = known(2);
    let text = String::from_utf8(file).unwrap();
    let cipher =
        between(&text, "<CipherValue>", "</CipherValue>").replace("<CipherValue>", "").replace("</CipherValue>", "");
    let salt = between(&text, "<h:Salt>", "</h:Salt>").to_owned();
    let mac = between(&text, "xmldsig-more#hmac-sha256\"><SignatureValue>", "</SignatureValue>").to_owned();
    let mut cases = Vec::new();
    let short = BASE64.encode(&[7; 255]);
    let long = BASE64.encode(&[7; 300]);
    let mut unused_bits = cipher.clone();
    unused_bits.replace_range(cipher.len() - 3..cipher.len() - 2, "R");
    for value in [
        "",
        "=",
        "====",
        "A",
        "AA",
        "AA=",
        "AA==",
        "AB==",
        "AAAA",
        "AAAA====",
        "AA==AA==",
        "A A=",
        " ",
        "&#65;AAA",
        "<![CDATA[AAAA]]>",
        "AAAA<!-- -->",
        "<a/>",
        "\u{e4}AAA",
        "-_-_",
        &short,
        &long,
        &unused_bits,
        &format!(" {cipher}"),
        &format!("{cipher}\n"),
        &format!("{}\n{}", &cipher[..64], &cipher[64..]),
        &format!("{cipher}{cipher}"),
    ] {
        cases.push(text.replacen(&cipher, value, 1));
        cases.push(text.replacen(
            &mac,
            &format!("xmldsig-more#hmac-sha256\"><SignatureValue>{value}</SignatureValue>"),
            1,
        ));
    }
    for value in [
        "",
        "00",
        &"0".repeat(62),
        &"0".repeat(66),
        &"0".repeat(64),
        &"A".repeat(64),
        &"g".repeat(64),
        &"0".repeat(2050),
    ] {
        cases.push(text.replacen(&salt, &format!("<h:Salt>{value}</h:Salt>"), 1));
    }
    cases.push(text.replacen(
        &salt,
        &salt.to_ascii_uppercase().replace("<H:SALT>", "<h:Salt>").replace("</H:SALT>", "</h:Salt>"),
        1,
    ));
    cases.push(text.replacen(&salt, &format!("{salt}<h:Info>00</h:Info>"), 1));
    for number in ["", "0", "1", "01", "+1", "-1", " 1", "1 ", "2", "3", "4294967295", "4294967296", "1x", "\u{661}"] {
        cases.push(text.replacen("WrappingId=\"1\"><Signature", &format!("WrappingId=\"{number}\"><Signature"), 1));
        cases.push(text.replacen("><Wrappings>", &format!(" MaxOfflineUnwraps=\"{number}\"><Wrappings>"), 1));
        cases.push(text.replacen("<Id>1</Id>", &format!("<Id>{number}</Id>"), 1));
        cases.push(text.replacen("<Id>2</Id>", &format!("<Id>{number}</Id>"), 1));
        cases.push(text.replacen("ParentWrappingId=\"1\"", &format!("ParentWrappingId=\"{number}\""), 2));
    }
    for uri in SignatureAlgorithm::ALL.map(SignatureAlgorithm::uri).into_iter().chain(["", "urn:x", " urn:x", "&amp;"])
    {
        let at = text.rfind("<Signature Algorithm=\"").unwrap() + "<Signature Algorithm=\"".len();
        let end = at + text[at..].find('"').unwrap();
        cases.push(format!("{}{uri}{}", &text[..at], &text[end..]));
    }
    let mut codes = std::collections::HashSet::new();
    let mut by_skeleton = 0;
    for case in &cases {
        for (code, sufficed) in [judged(&sets, case.as_bytes()), judged_when_signed_again(&sets, case)] {
            codes.insert(code);
            by_skeleton += usize::from(sufficed);
        }
    }
    assert!(codes.contains(&None) && codes.contains(&Some(Code::InvalidProtector)));
    assert!(codes.contains(&Some(Code::UnsupportedAlgorithm)));
    assert!(by_skeleton > 20 && by_skeleton < cases.len(), "{by_skeleton} of {}", cases.len());
}

#[test]
fn a_guardian_may_sign_by_any_algorithm() {
    let (sets, file) = known(2);
    let text = String::from_utf8(file).unwrap();
    let octets = Protector::parse(text.as_bytes()).unwrap().signed_octets;
    let at = text.rfind("<Signature Algorithm=\"").unwrap();
    for algorithm in SignatureAlgorithm::ALL {
        for right in [true, false] {
            let mut value = signing(1).sign(algorithm, &octets).unwrap();
            value[17] ^= u8::from(!right);
            let file = format!(
                "{}<Signature Algorithm=\"{}\"><SignatureValue>{}</SignatureValue></Signature></GuardianSignature></Protector>",
                &text[..at].replace("<GuardianSignature WrappingId=\"1\"", "<GuardianSignature WrappingId=\"2\""),
                algorithm.uri(),
                BASE64.encode(&value)
            );
            assert_eq!(
                judged(&sets, file.as_bytes()),
                ((!right).then_some(Code::InvalidProtector), true),
                "{algorithm:?}"
            );
        }
    }
}

#[test]
fn what_is_moved_or_spaced_out_is_judged_the_same() {
    let (sets, file) = known(3);
    let text = String::from_utf8(file).unwrap();
    let wrapping = |at: usize| {
        let start = text.match_indices("<Wrapping>").nth(at).unwrap().0;
        text[start..].split_inclusive("</Wrapping>").next().unwrap().to_owned()
    };
    let [one, two, three] = [wrapping(0), wrapping(1), wrapping(2)];
    let all = format!("{one}{two}{three}");
    for order in [[&two, &one, &three], [&one, &three, &two], [&one, &one, &two], [&three, &three, &three]] {
        judged(&sets, text.replace(&all, &order.map(String::as_str).concat()).as_bytes());
        judged_when_signed_again(&sets, &text.replace(&all, &order.map(String::as_str).concat()));
    }
    for fewer in ["", &one, &two, &format!("{one}{two}"), &format!("{all}{two}")] {
        judged_when_signed_again(&sets, &text.replace(&all, fewer));
    }
    // The values of two holes are exchanged: the set still matches, and only the signatures detect the change.
    let hole = |of: &str| between(of, "<CipherValue>", "</CipherValue>").to_owned();
    let swapped =
        text.replacen(&hole(&one), "@", 1).replacen(&hole(&two), &hole(&one), 1).replacen('@', &hole(&two), 1);
    assert_eq!(judged(&sets, swapped.as_bytes()), (Some(Code::InvalidProtector), true));
    assert_eq!(judged_when_signed_again(&sets, &swapped), (None, true));
    for at in text.match_indices('>').map(|(at, _)| at + 1).chain([0]).collect::<Vec<_>>() {
        for space in [" ", "\n", "\r\n", "<!-- x -->", "\u{feff}"] {
            let spaced = format!("{}{space}{}", &text[..at], &text[at..]);
            assert!(!judged(&sets, spaced.as_bytes()).1, "{at}");
        }
    }
}

#[test]
fn a_protector_that_its_writer_shaped_is_of_the_same_set() {
    let (sets, file) = known(3);
    let style = Style { prefix: "k:", line: "\n", quote: '\'', ..PLAIN };
    let shaped = Draft { style, ..Draft::new(3) }.build();
    assert!(by_skeleton(&sets, &shaped).is_none());
    let [shaped, written] =
        [&shaped, &file].map(|file| sets.read(file, &sha256(file), &mut Work::default()).unwrap().set);
    assert!(std::sync::Arc::ptr_eq(&shaped, &written));
}

#[test]
fn a_signature_that_was_found_right_is_not_checked_again() {
    let (sets, file) = known(2);
    let work = |file: &[u8], sha256: &[u8; 32]| {
        let mut work = Work::default();
        let code = sets.read_known(file, sha256, &mut work).unwrap().err().map(|refusal| refusal.code);
        (code, work.operations())
    };
    // `known` has already read this file.
    assert_eq!(work(&file, &sha256(&file)), (None, 0));
    let ingress = sets.read(&file, &sha256(&file), &mut Work::default()).unwrap();
    let fresh = rolled(&ingress, 0);
    assert_eq!(work(&fresh, &sha256(&fresh)), (None, 1));
    assert_eq!(work(&fresh, &sha256(&fresh)), (None, 0));
    let made = rolled(&ingress, 7);
    sets.know_file(sha256(&made));
    assert_eq!(work(&made, &sha256(&made)), (None, 0));
    let mut wrong = fresh.clone();
    let at = wrong.len() - 100;
    wrong[at] = if wrong[at] == b'A' { b'B' } else { b'A' };
    for _ in 0..2 {
        assert_eq!(work(&wrong, &sha256(&wrong)), (Some(Code::InvalidProtector), 1), "a wrong one is never known");
    }
}

#[test]
fn sets_differ_by_everything_but_the_keys_in_their_holes() {
    let sets = KnownSets::new(100);
    let base = Draft::new(3);
    let mut variants = vec![base.clone(); 6];
    variants[1].parts[1].id = "9".to_owned();
    variants[2].parts.swap(1, 2);
    (variants[3].parts[2].parent, variants[3].parts[2].parent_party) = ("2".to_owned(), 1);
    variants[4].parts[1].parameters = Some("<a xmlns=\"urn:a\">&amp;</a>".to_owned());
    (variants[5].parts[1].oaep_uri, variants[5].parts[1].oaep) = (OAEP_11, Oaep::SHA256);
    variants[5].parts[1].oaep_parameters = Some(oaep_parameters(Oaep::SHA256));
    let mut identities = std::collections::HashSet::new();
    let mut files = Vec::new();
    for draft in &variants {
        let file = draft.build();
        let ingress = sets.read(&file, &sha256(&file), &mut Work::default()).unwrap();
        sets.remember(&ingress.set);
        identities.insert(ingress.set.identity());
        files.push((rolled(&ingress, 0), ingress.set.identity()));
    }
    assert_eq!(identities.len(), variants.len());
    for (file, identity) in &files {
        let read = by_skeleton(&sets, file).map(|read| read.unwrap().set.identity());
        assert!(read.is_none() || read == Some(*identity));
        assert_eq!(sets.read(file, &sha256(file), &mut Work::default()).unwrap().set.identity(), *identity);
        judged(&sets, file);
    }
    let found = files.iter().filter(|(file, _)| by_skeleton(&sets, file).is_some()).count();
    assert!(found >= 4, "{found} of sets that look alike are known");
}

#[test]
fn a_set_weighs_as_much_as_its_text_its_certificates_and_their_keys() {
    let memory = [2, 3, 4].map(|parties| {
        let (sets, file) = known(parties);
        let set = sets.read(&file, &sha256(&file), &mut Work::default()).unwrap().set;
        let certificates = set.wrappings().iter().map(|wrapping| &wrapping.party);
        let certificates = certificates
            .map(|party| [&party.signing, &party.encryption].map(|of| of.der().len() + 2 * of.key().modulus().len()));
        let least = set.size() + certificates.flatten().sum::<usize>();
        assert!((least..4 * least).contains(&set.memory()), "{} of {least}", set.memory());
        set.memory()
    });
    assert!(memory.is_sorted());
}

#[test]
fn a_set_outlives_the_process_that_met_it() {
    let (sets, file) = known(3);
    let ingress = sets.read(&file, &sha256(&file), &mut Work::default()).unwrap();
    let document = ingress.set.to_document();
    let later = KnownSets::new(100);
    assert!(by_skeleton(&later, &file).is_none());
    assert_eq!(later.restore(&document).unwrap().identity(), ingress.set.identity());
    assert!(by_skeleton(&later, &file).is_some_and(|read| read.is_ok()));
    // The document contains no secret and no ciphertext.
    let text = String::from_utf8(document.clone()).unwrap();
    assert_eq!(text.matches("<CipherValue>AA==</CipherValue>").count(), 3);
    // A restored set is treated like one that was received.
    let other = KnownSets::new(100);
    for at in (0..document.len()).step_by(7) {
        let mut changed = document.clone();
        changed[at] ^= 1;
        if let Some(set) = other.restore(&changed) {
            assert_eq!(set.identity(), ingress.set.identity(), "{at}: a change outside of the set");
        }
    }
    let mut draft = Draft::new(3);
    draft.parts[1].parent_party = 2;
    assert!(other.restore(draft.unsigned().as_bytes()).is_none(), "nobody vouches for it");
}

#[test]
fn a_large_value_in_a_hole_is_judged_the_same() {
    let (sets, file) = known(1);
    let text = String::from_utf8(file).unwrap();
    let hole = between(&text, "<CipherValue>", "</CipherValue>");
    for bytes in [MAX_PROTECTOR / 4 * 3 - 4_000, MAX_PROTECTOR / 4 * 3] {
        let large = text.replacen(hole, &format!("<CipherValue>{}</CipherValue>", BASE64.encode(&vec![1; bytes])), 1);
        judged(&sets, large.as_bytes());
        judged_when_signed_again(&sets, &large);
    }
}

#[test]
fn random_changes_are_judged_the_same() {
    let (sets, file) = known(2);
    let text = String::from_utf8(file).unwrap();
    let alphabet = [
        "<",
        ">",
        "\"",
        "=",
        "A",
        "/",
        " ",
        "\n",
        "&",
        "<CipherValue>",
        "</CipherValue>",
        "</Wrapping>",
        "<!--",
        "-->",
        "0",
    ];
    let change = (0..text.len(), 0..3_usize, 0..alphabet.len());
    let mut runner = TestRunner::new(Config { cases: 1_500, failure_persistence: None, ..Config::default() });
    runner
        .run(&(prop::collection::vec(change, 1..4), any::<bool>()), |(changes, again)| {
            let mut changed = text.clone();
            for (at, kind, with) in changes {
                let at = at.min(changed.len() - 1);
                match kind {
                    0 => changed.insert_str(at, alphabet[with]),
                    1 => changed.replace_range(at..=at, ""),
                    _ => changed.replace_range(at..=at, alphabet[with]),
                }
            }
            if again {
                judged_when_signed_again(&sets, &changed)
            } else {
                judged(&sets, changed.as_bytes())
            };
            Ok(())
        })
        .unwrap();
}
