//! Attacks: signature wrapping, forged chains, XML features that the protocol does not need. Each test checks the code
//! of the refusal.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use claviger_protocol::error::Code;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::protector::Protector;
use claviger_protocol::request::RollRequest;
use common::*;

/// A protector that its owner signed, as text.
fn genuine() -> String {
    String::from_utf8(Draft::new(2).build()).unwrap()
}

/// The `Wrappings` element of a text.
fn wrappings(text: &str) -> &str {
    between(text, "<Wrappings>", "</Wrappings>")
}

fn forged() -> Draft {
    let mut draft = Draft::new(1);
    (draft.parts[0].party, draft.parts[0].parent_party) = (3, 3);
    draft
}

fn refused(text: &str, expected: Code) {
    match accept(text.as_bytes()) {
        Err(refusal) => assert_eq!(refusal.code, expected, "{refusal}"),
        Ok(_) => panic!("accepted: {text}"),
    }
}

/// Checks that the structure is rejected before any signature is verified.
fn malformed(text: &str) {
    match Protector::parse(text.as_bytes()) {
        Err(refusal) => assert_eq!(refusal.code, Code::InvalidProtector, "{refusal}"),
        Ok(_) => panic!("read: {text}"),
    }
}

/// Replaces text. Panics if the document does not change.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from}");
    text.replacen(from, to, 1)
}

#[test]
fn a_signed_element_counts_in_its_place_only() {
    let (text, forged) = (genuine(), forged().wrappings());
    let original = wrappings(&text).to_owned();
    let original_with_prefix = original.replacen("<Wrappings>", &format!("<Wrappings xmlns=\"{K}\">"), 1);
    // The genuine element is hidden in each possible Parameters element; a forged element takes its place.
    for hiding_place in [
        format!(
            "<SignatureValue>{}",
            between(text.rsplit_once("<SignatureValue>").unwrap().1, "", "</SignatureValue>")
        ),
        format!(
            "<SignatureValue>{}",
            between(
                text.split("<TransportKeySignature>").nth(1).unwrap().split_once("<SignatureValue>").unwrap().1,
                "",
                "</SignatureValue>"
            )
        ),
    ] {
        for hidden in [&original, &original_with_prefix, &format!("<x xmlns=''>{original_with_prefix}</x>")] {
            let with = replaced(&text, &hiding_place, &format!("<Parameters>{hidden}</Parameters>{hiding_place}"));
            assert_eq!(code(with.as_bytes()), None, "Parameters of these signatures may hold anything");
            let (before, after) = with.split_once(&original).unwrap();
            refused(&format!("{before}{forged}{after}"), Code::InvalidProtector);
        }
    }
    // The genuine element is hidden in the forged one.
    let value = between(&forged, "<SignatureValue>", "</SignatureValue>");
    let around = forged.replacen(value, &format!("<Parameters>{original}</Parameters>{value}"), 1);
    refused(&text.replacen(&original, &around, 1), Code::InvalidProtector);
    // The forged element is hidden in the genuine one, which changes the signed content.
    let value = between(&original, "<SignatureValue>", "</SignatureValue>");
    let inside = original.replacen(value, &format!("<Parameters>{forged}</Parameters>{value}"), 1);
    refused(&text.replacen(&original, &inside, 1), Code::InvalidProtector);
}

#[test]
fn wrappings_stand_once_and_where_they_belong() {
    let (text, forged) = (genuine(), forged().wrappings());
    let original = wrappings(&text).to_owned();
    let instead = |new: &str| malformed(&replaced(&text, &original, new));
    instead(&format!("{forged}{original}"));
    instead(&format!("{original}{forged}"));
    instead(&format!("{original}{original}"));
    // Nested elements.
    let content = |of: &str| of.replace("<Wrappings>", "").replace("</Wrappings>", "");
    instead(&format!("<Wrappings>{original}</Wrappings>"));
    instead(&format!("<Wrappings>{original}{}</Wrappings>", content(&forged)));
    instead(&format!("<Wrappings>{}{original}</Wrappings>", content(&forged)));
    instead(&format!("<Wrappings><Wrapping>{original}</Wrapping></Wrappings>"));
    // The genuine element in another namespace.
    instead(&original.replacen("<Wrappings>", "<Wrappings xmlns='urn:x'>", 1));
    instead(&original.replacen("<Wrappings>", "<Wrappings xmlns=''>", 1));
    instead(&original.replacen("<Wrappings>", &format!("<Wrappings xmlns='{K} '>"), 1));
    instead(&original.replacen("<Wrappings>", "<Wrappings xmlns='http://schemas.microsoft.com/KPS/2014/07'>", 1));
    instead(&format!("<x:Wrappings xmlns:x='urn:x'>{}</x:Wrappings>", content(&original)));
    instead(&format!("{original}<x:Wrappings xmlns:x='urn:x'>{}</x:Wrappings>", content(&forged)));
    instead(&original.replace("Wrappings>", "wrappings>"));
    // The genuine element in another place.
    instead(&format!("<x>{original}</x>"));
    instead("");
    let without = text.replacen(&original, "", 1);
    malformed(&without.replacen("</TransportKeySignature>", &format!("</TransportKeySignature>{original}"), 1));
    malformed(&without.replacen("</GuardianSignature>", &format!("</GuardianSignature>{original}"), 1));
    malformed(&without.replacen("</GuardianSignature>", &format!("{original}</GuardianSignature>"), 1));
    malformed(&without.replacen("<GuardianSignature", &format!("{original}<GuardianSignature"), 1));
    // Exactly one root is allowed, and it must be the protector.
    malformed(&format!("{text}{text}"));
    malformed(&format!("{text}<x/>"));
    malformed(&format!("<x>{text}</x>"));
    malformed(&format!("{text}text"));
    malformed(&format!("text{text}"));
    malformed(&original_alone(&original));
    // Removing, repeating or moving a single wrapping changes the signed set.
    let parts: Vec<&str> = content_parts(&original);
    for new in [vec![parts[0]], vec![parts[1]], vec![parts[1], parts[0]]] {
        let new = format!("<Wrappings>{}</Wrappings>", new.concat());
        refused(&replaced(&text, &original, &new), Code::InvalidProtector);
    }
}

fn original_alone(wrappings: &str) -> String {
    wrappings.replacen("<Wrappings>", &format!("<Wrappings xmlns='{K}'>"), 1)
}

fn content_parts(wrappings: &str) -> Vec<&str> {
    wrappings
        .split_inclusive("</Wrapping>")
        .map(|p| p.trim_start_matches("<Wrappings>"))
        .filter(|p| p.starts_with("<Wrapping>"))
        .collect()
}

/// The canonical form drops comments, so a comment must not split a value for the parser either.
#[test]
fn comments_do_not_cut_values() {
    let text = genuine();
    let verified = accept(text.as_bytes()).unwrap();
    let mut changed = text.clone();
    for name in
        ["SigningCertificate", "EncryptionCertificate", "SignatureValue", "CipherValue", "h:Salt", "h:KeyLength"]
    {
        for (at, value) in text.match_indices(&format!("<{name}>")) {
            let start = at + value.len();
            let len = text[start..].find('<').unwrap();
            for cut in [0, 1, len / 2, len] {
                for comment in ["<!---->", "<!--<Id>2</Id>-->", "<!--\n- -->"] {
                    changed.clone_from(&text);
                    changed.insert_str(start + cut, comment);
                    let read = accept(changed.as_bytes()).unwrap();
                    assert_eq!(read.protector.signed_octets, verified.protector.signed_octets);
                    assert_eq!(format!("{:?}", read.protector), format!("{:?}", verified.protector));
                }
            }
        }
    }
    // An Id with comments or references must not be readable as two different numbers.
    for (id, read) in [("1<!---->2", 12), ("<!--9-->3<!--9-->", 3), ("1<![CDATA[2]]>3", 123), ("1<!--x-->&#50;", 12)] {
        let mut draft = Draft::new(1);
        (draft.parts[0].id, draft.parts[0].parent, draft.guardian) =
            (id.to_owned(), read.to_string(), read.to_string());
        let verified = accept(&draft.build()).unwrap();
        assert_eq!(verified.protector.wrappings[0].id, read);
        assert_eq!(*open(&verified, 0).unwrap(), draft.key);
        (draft.parts[0].parent, draft.guardian) = ("1".to_owned(), "1".to_owned());
        malformed(&draft.unsigned());
    }
    // An element inside a value is not a comment.
    malformed(&replaced(&text, "<Id>1</Id>", "<Id>1<x/></Id>"));
    malformed(&replaced(&text, "<Id>1</Id>", "<Id>1<Id>1</Id></Id>"));
}

/// A protector with this chain, signed even if the chain is invalid.
fn chain(parts: &[(&str, &str, usize, usize)]) -> Draft {
    let mut draft = Draft::new(1);
    let template = draft.parts[0].clone();
    draft.parts = parts
        .iter()
        .map(|(id, parent, party, parent_party)| Part {
            id: (*id).to_owned(),
            parent: (*parent).to_owned(),
            party: *party,
            parent_party: *parent_party,
            ..template.clone()
        })
        .collect();
    draft.guardian = parts[0].0.to_owned();
    draft.guardian_party = parts[0].2;
    draft
}

#[test]
fn every_chain_ends_at_the_one_owner() {
    let judged = |parts: &[(&str, &str, usize, usize)]| code(&chain(parts).build());
    let wrong = Some(Code::InvalidWrapping);
    // (Id, parent, party, party that signs the certificate)
    assert_eq!(judged(&[("1", "1", 0, 0)]), None);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 0), ("3", "2", 2, 1), ("4", "3", 3, 2)]), None);
    assert_eq!(judged(&[("4", "3", 3, 2), ("3", "2", 2, 1), ("2", "1", 1, 0), ("1", "1", 0, 0)]), None);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 0, 0)]), None, "a party may stand twice");
    // There is no owner.
    assert_eq!(judged(&[("1", "2", 0, 1), ("2", "1", 1, 0)]), wrong);
    assert_eq!(judged(&[("1", "2", 0, 1), ("2", "3", 1, 2), ("3", "1", 2, 0)]), wrong);
    // There are two owners or more.
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "2", 1, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 0), ("3", "3", 2, 2)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "2", 1, 1), ("3", "2", 2, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "2", 1, 1), ("3", "3", 2, 2)]), wrong);
    // Beside the owner there is a cycle of two, a cycle of three, or a branch that leads into a cycle.
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "3", 1, 2), ("3", "2", 2, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "3", 1, 2), ("3", "4", 2, 3), ("4", "2", 3, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "3", 1, 2), ("3", "2", 2, 1), ("4", "2", 3, 1)]), wrong);
    assert_eq!(judged(&[("2", "3", 1, 2), ("3", "2", 2, 1), ("1", "1", 0, 0)]), wrong);
    // The parent does not exist.
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "9", 1, 0)]), wrong);
    assert_eq!(judged(&[("1", "9", 0, 0)]), wrong);
    // Another party than the parent signed.
    assert_eq!(judged(&[("1", "1", 0, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 2)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 0), ("3", "1", 2, 1)]), wrong);
    assert_eq!(judged(&[("1", "1", 0, 0), ("2", "1", 1, 0), ("3", "2", 2, 0)]), wrong);
}

#[test]
fn ids_are_unique() {
    for twice in [("1", "1"), ("2", "002"), ("4294967295", "4294967295"), ("0", "00")] {
        let draft = chain(&[("1", "1", 0, 0), (twice.0, "1", 1, 0), (twice.1, "1", 2, 0)]);
        malformed(&draft.unsigned());
    }
    // The guardian Id must exist, even if the protector is otherwise valid.
    let mut draft = Draft::new(2);
    draft.guardian = "3".to_owned();
    malformed(&draft.unsigned());
}

#[test]
fn signatures_are_by_the_right_keys_over_the_right_octets() {
    // Another party's key made the guardian signature.
    let mut draft = Draft::new(2);
    draft.guardian_party = 1;
    assert_eq!(code(&draft.build()), Some(Code::InvalidProtector));
    draft.guardian = "2".to_owned();
    assert_eq!(code(&draft.build()), None);
    // A certificate or its signature is replaced by another party's. Even the guardian, who signs the whole, cannot do
    // that.
    let draft = Draft::new(3);
    let text = draft.text();
    let encoded = |octets: &[u8]| data_encoding::BASE64.encode(octets);
    for (mine, other, expected) in [
        (signing_certificate(1), signing_certificate(2), Code::InvalidWrapping),
        (encryption_certificate(1), encryption_certificate(2), Code::InvalidWrapping),
        (signing_certificate(1), encryption_certificate(1), Code::InvalidWrapping),
        (signing_certificate(1), b"not a certificate".as_slice(), Code::InvalidWrapping),
        (encryption_certificate(1), b"not a certificate".as_slice(), Code::InvalidWrapping),
        (signing_certificate(0), b"not a certificate".as_slice(), Code::InvalidWrapping),
    ] {
        let signed = draft.sign(&replaced(&text, &encoded(mine), &encoded(other)));
        assert_eq!(code(&signed), Some(expected));
    }
    // The guardian's certificate is checked before the guardian signature, all other certificates after it.
    let broken = |party| unsigned(&replaced(&text, &encoded(signing_certificate(party)), "AAAA"));
    refused(&broken(0), Code::InvalidWrapping);
    refused(&broken(1), Code::InvalidProtector);
    // A certificate with one trailing byte is rejected although the parent signed it.
    let mut longer = signing_certificate(1).to_vec();
    longer.push(0);
    let signature = |octets: &[u8]| encoded(&signing(0).sign(draft.algorithm, octets).unwrap());
    let text = replaced(&text, &encoded(signing_certificate(1)), &encoded(&longer));
    let text = replaced(&text, &signature(signing_certificate(1)), &signature(&longer));
    assert_eq!(code(&draft.sign(&text)), Some(Code::InvalidWrapping));
}

#[test]
fn weak_keys_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let made = |arguments: &str| {
        let arguments =
            format!("req -x509 -nodes -keyout k.pem -outform DER -out c.der -subj /CN=weak -days 30 {arguments}");
        run(directory.path(), "openssl", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
        std::fs::read(directory.path().join("c.der")).unwrap()
    };
    let draft = Draft::new(2);
    let text = draft.text();
    for weak in [made("-newkey rsa:1024"), made("-newkey ec -pkeyopt ec_paramgen_curve:P-256")] {
        for certificate in
            [signing_certificate(1), encryption_certificate(1), signing_certificate(0), encryption_certificate(0)]
        {
            // The signature over the certificate is valid, but the key is not accepted.
            let encoded = |octets: &[u8]| data_encoding::BASE64.encode(octets);
            let mut changed = replaced(&text, &encoded(certificate), &encoded(&weak));
            for party in 0..2 {
                let by = |octets: &[u8]| encoded(&signing(party).sign(draft.algorithm, octets).unwrap());
                changed = changed.replace(&by(certificate), &by(&weak));
            }
            assert_eq!(code(&draft.sign(&changed)), Some(Code::InvalidWrapping));
        }
    }
}

/// The parser allocates memory for every '<' and '=', even in text. Documents with too many must be rejected before that.
#[test]
fn signs_without_meaning_cost_nothing() {
    for sign in ["<", "="] {
        let many = format!("<a><![CDATA[{}]]></a>", sign.repeat(200_001));
        assert!(claviger_protocol::xml::parse(&many).is_err(), "{sign}");
        let few = format!("<a><![CDATA[{}]]></a>", sign.repeat(100_000));
        assert!(claviger_protocol::xml::parse(&few).is_ok(), "{sign}");
    }
}

#[test]
fn forbidden_xml_is_refused_everywhere() {
    let protector = genuine();
    let algorithms = "<TransferKeyEncryptionAlgorithm>http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p</TransferKeyEncryptionAlgorithm>\
        <WrappingKeyEncryptionAlgorithm>http://www.w3.org/2009/xmlenc11#aes256-gcm</WrappingKeyEncryptionAlgorithm>\
        <TransportKeysEncryptionAlgorithm>http://www.w3.org/2009/xmlenc11#aes256-gcm</TransportKeysEncryptionAlgorithm>";
    let request = format!(
        "<RollTransportKeyRequest xmlns=\"{S}\"><IngressProtector>AAAA</IngressProtector><HealthCertificate>AAAA</HealthCertificate>{algorithms}</RollTransportKeyRequest>"
    );
    let metadata = String::from_utf8(metadata_file(&information(1))).unwrap();
    let metadata = metadata.split_once("?>").unwrap().1.to_owned();
    let documents = [
        (&protector, "Protector", "<Id>", "GuardianSignature WrappingId=\"1\""),
        (&request, "RollTransportKeyRequest", "<HealthCertificate>", "HealthCertificate"),
        (&metadata, "Metadata", "<Version>", "GuardianInformation"),
    ];
    let check = |text: &[u8], root: &str, expected: bool| {
        let shown = String::from_utf8_lossy(&text[..text.len().min(300)]);
        match root {
            "Protector" => {
                let outcome = accept(text);
                assert_eq!(outcome.is_ok(), expected, "{shown}");
                assert!(
                    outcome.is_ok_and(|_| true) || Protector::parse(text).unwrap_err().code == Code::InvalidProtector,
                    "{shown}"
                );
            }
            "Metadata" => assert_eq!(Metadata::parse(text).is_ok(), expected, "{shown}"),
            _ => {
                let outcome = RollRequest::parse(text);
                assert_eq!(outcome.is_ok(), expected, "{shown}");
                assert!(
                    outcome.is_ok_and(|_| true) || RollRequest::parse(text).unwrap_err().code == Code::InvalidRequest,
                    "{shown}"
                );
            }
        }
    };
    let laughs = "<!DOCTYPE x [<!ENTITY a \"ha\"><!ENTITY b \"&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;\"><!ENTITY c \"&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;\">]>";
    for (document, root, inside, element) in documents {
        let ok = |text: String| check(text.as_bytes(), root, true);
        let bad = |text: String| check(text.as_bytes(), root, false);
        ok(document.clone());
        // Allowed: XML declaration, byte order mark, comments, white space.
        for head in [
            "<?xml version=\"1.0\"?>",
            "<?xml version='1.0' encoding='UTF-8'?>\n",
            "<?xml version='1.0' encoding='utf-8' standalone='yes' ?>",
            "<?xml\tversion='1.0'\r\nencoding='utf-8'?>",
            "\u{feff}",
            "\u{feff}<?xml version='1.0'?>",
            "<!-- x -->\n",
            "\r\n\t ",
        ] {
            ok(format!("{head}{document}"));
        }
        ok(format!("{document}\n<!-- x -->\n"));
        // Forbidden: document type declarations and entities.
        for head in [
            format!("<!DOCTYPE {root}>"),
            format!("<!DOCTYPE {root} []>"),
            format!("<!DOCTYPE {root} SYSTEM 'file:///etc/passwd'>"),
            format!("<!DOCTYPE {root} PUBLIC '-//X' 'http://127.0.0.1/x.dtd'>"),
            format!("<!DOCTYPE {root} [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"),
            format!("<!DOCTYPE {root} [<!ENTITY % x SYSTEM 'http://127.0.0.1/x'> %x;]>"),
            format!("<!DOCTYPE {root} [<!ATTLIST {root} x CDATA 'y'>]>"),
            format!("<?xml version='1.0'?>\n<!-- x --><!DOCTYPE {root}>"),
            "<!doctype html>".to_owned(),
            laughs.to_owned(),
            "<!ENTITY a 'b'>".to_owned(),
        ] {
            bad(format!("{head}{document}"));
            bad(format!("{document}{head}"));
            bad(replaced(document, inside, &format!("{head}{inside}")));
        }
        bad(format!("{laughs}{}", replaced(document, inside, &format!("{inside}&c;"))));
        for entity in [
            "&a;",
            "&nbsp;",
            "&LT;",
            "&",
            "&;",
            "&#;",
            "&#0;",
            "&#xD800;",
            "&#x110000;",
            "&#1;",
            "&#xFFFF;",
            "&lt",
            "& lt;",
        ] {
            bad(replaced(document, inside, &format!("{inside}{entity}")));
        }
        // Forbidden: processing instructions. A declaration that is not at the start is one too.
        for pi in [
            "<?x?>",
            "<?x y?>",
            "<?xml-stylesheet href='x'?>",
            "<?xml version='1.0'?>",
            "<?xml\tversion='1.0'?>",
            "<?XML version='1.0'?>",
            "<??>",
            "<? ?>",
        ] {
            bad(replaced(document, inside, &format!("{pi}{inside}")));
            bad(replaced(document, inside, &format!("{inside}{pi}")));
            bad(format!("{document}{pi}"));
            bad(format!("<!---->{pi}{document}"));
            bad(format!(" {pi}{document}"));
            bad(format!("<?xml version='1.0'?>{pi}{document}"));
        }
        for pi in [
            "<?x?>",
            "<?xml-stylesheet href='x'?>",
            "<?XML version='1.0'?>",
            "<?xmlversion='1.0'?>",
            "<?xml?>",
            "<?xml ?>",
        ] {
            bad(format!("{pi}{document}"));
        }
        // Forbidden: other encodings.
        for encoding in [
            "utf-16",
            "UTF-16LE",
            "latin1",
            "iso-8859-1",
            "UTF-7",
            "us-ascii",
            "utf8",
            "utf-8 ",
            "",
            "x",
            "UTF-8\u{0}",
            "cp037",
        ] {
            bad(format!("<?xml version='1.0' encoding='{encoding}'?>{document}"));
            bad(format!("<?xml\tversion=\"1.0\"\tencoding=\"{encoding}\"?>{document}"));
            bad(format!("\u{feff}<?xml version='1.0' encoding='{encoding}'?>{document}"));
        }
        let declared = format!("<?xml version='1.0' encoding='utf-16'?>{document}");
        let utf16: Vec<u16> = [0xfeff].into_iter().chain(declared.encode_utf16()).collect();
        check(&utf16.iter().flat_map(|u| u.to_le_bytes()).collect::<Vec<u8>>(), root, false);
        check(&utf16.iter().flat_map(|u| u.to_be_bytes()).collect::<Vec<u8>>(), root, false);
        let mut latin = format!("<!--x-->{document}").into_bytes();
        latin[4] = 0xe9;
        check(&latin, root, false);
        for octets in [&b"\xc0\xbc"[..], b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xe2\x82"] {
            check(&[b"<!--", octets, b"-->", document.as_bytes()].concat(), root, false);
        }
        bad(format!("\u{feff}\u{feff}{document}"));
        // Forbidden: other XML versions, malformed declarations.
        for declaration in [
            "version='1.1'",
            "version='1.10'",
            "version='2.0'",
            "version=''",
            "version='1'",
            "encoding='utf-8'",
            "version='1.0' x='y'",
            "version='1.0' standalone='maybe'",
            "version='1.0' standalone='yes' encoding='utf-8'",
            "version='1.0'encoding='utf-8'",
            "version='1.0' version='1.0'",
            "version=1.0",
            "version='1.0",
            "version",
            "Version='1.0'",
            "version='1.0' encoding='utf-8' encoding='utf-8'",
        ] {
            bad(format!("<?xml {declaration}?>{document}"));
            bad(format!("<?xml\n{declaration} ?>{document}"));
        }
        // Invalid names and namespaces.
        let start = format!("<{element}");
        for attribute in [
            " x:y='1'",
            " xmlns:x=''",
            " xmlns:x=\"\"",
            " xmlns:xmlns='urn:x'",
            " xmlns:xml='urn:x'",
            " xmlns='http://www.w3.org/2000/xmlns/'",
            " xmlns:x='http://www.w3.org/XML/1998/namespace'",
            " Version='1' Version='1'",
            " xmlns:p='urn:x' xmlns:p='urn:x'",
            " xmlns:p='urn:x' xmlns:q='urn:x' p:a='1' q:a='1'",
            " xmlns:p='urn:x' xmlns:q='urn:&#120;' p:a='1' q:a='1'",
            " x",
            " x=1",
            " x='1'y='2'",
            " x='<'",
            " x='&'",
            " x='\u{1}'",
            " xmlns:p='urn:x' p:xmlns='urn:y'",
            " :a='1'",
            " a:='1'",
            " 1a='1'",
            " xmlns:a:b='urn:x'",
        ] {
            bad(replaced(document, &start, &format!("{start}{attribute}")));
        }
        let declaration = if root == "RollTransportKeyRequest" { S } else { K };
        bad(replaced(document, &start, &format!("{start} xmlns='{declaration}' xmlns='{declaration}'")));
        bad(replaced(document, &start, &format!("{start} xmlns='{declaration}' xmlns='urn:x'")));
        bad(replaced(document, &start, &format!("{start} xmlns='urn:x' xmlns='{declaration}'")));
        bad(replaced(document, inside, &inside.replace('<', "<u:")));
        bad(replaced(document, inside, &inside.replace('<', "<:")));
        // Invalid structure.
        bad(document.replacen(&format!("</{root}>"), "", 1));
        bad(document.replacen(&format!("</{root}>"), &format!("</{root}x>"), 1));
        bad(document.replacen(&format!("</{root}>"), &format!("</x:{root}>"), 1));
        bad(document.replacen(&format!("</{root}>"), &format!("</:{root}>"), 1));
        bad(format!("{document}</{root}>"));
        bad(replaced(document, inside, &format!("]]>{inside}")));
        bad(replaced(document, inside, &format!("<!-- -- -->{inside}")));
        bad(replaced(document, inside, &format!("<![CDATA[x]]>{inside}")));
        bad(format!("<![CDATA[ ]]>{document}"));
        bad(String::new());
        bad(" ".to_owned());
        bad("<!-- nothing -->".to_owned());
        // Excessive depth.
        bad(replaced(document, inside, &format!("{}{}{inside}", "<x>".repeat(40), "</x>".repeat(40))));
        bad("<x>".repeat(100_000));
    }
}
