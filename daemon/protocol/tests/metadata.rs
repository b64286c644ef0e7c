//! Compares metadata documents with `xmlsec1`, in both directions.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::metadata::{GuardianInformation, Metadata, MetadataError};
use common::{
    COMMUNICATIONS, DS, K, Rng, between, certificate, encryption, encryption_certificate, information, key,
    metadata_file, run, signing, signing_certificate,
};
use data_encoding::BASE64;
use tempfile::TempDir;

/// A directory with the key and certificate of the communications party and of another party.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, index) in [("comm", COMMUNICATIONS), ("other", 11)] {
        let certificate = Certificate::parse(certificate(index)).unwrap().to_pem();
        std::fs::write(directory.path().join(format!("{name}.pem")), certificate).unwrap();
        std::fs::write(directory.path().join(format!("{name}.key")), key(index).to_pkcs8_pem().as_bytes()).unwrap();
    }
    directory
}

/// Verifies with the given certificate's key only. `KeyInfo` and the clock have no influence.
fn xmlsec_verify(directory: &Path, document: &[u8], by: &str) -> Result<(), String> {
    std::fs::write(directory.join("metadata.xml"), document).unwrap();
    let key = format!("{by}.pem");
    let id = format!("{K}:Metadata");
    run(
        directory,
        "xmlsec1",
        &["--verify", "--enabled-key-data", "rsa", "--id-attr:ID", &id, "--pubkey-cert-pem", &key, "metadata.xml"],
    )
    .map(drop)
}

fn with_others(others: usize) -> GuardianInformation {
    GuardianInformation {
        other_signing_certificates: (0..others).map(|i| signing_certificate(i + 2).to_vec()).collect(),
        ..information(1)
    }
}

#[test]
fn xmlsec_and_the_crate_accept_the_same_document() {
    let directory = directory();
    for others in 0..3 {
        let information = with_others(others);
        let document = metadata_file(&information);
        xmlsec_verify(directory.path(), &document, "comm").unwrap();
        assert!(xmlsec_verify(directory.path(), &document, "other").is_err());
        let read = Metadata::parse(&document).unwrap();
        assert_eq!(read.guardian.signing_certificate, information.signing_certificate);
        assert_eq!(read.guardian.encryption_certificate, information.encryption_certificate);
        assert_eq!(read.guardian.other_signing_certificates, information.other_signing_certificates);
        assert_eq!(&read.encryption_key, encryption(1).public());
        assert_eq!(read.communications_certificate.der(), certificate(COMMUNICATIONS));
        for algorithm in SignatureAlgorithm::ALL {
            let information = GuardianInformation {
                encryption_certificate_signature: common::signature(signing(1), algorithm, encryption_certificate(1)),
                ..information.clone()
            };
            let read = Metadata::parse(&metadata_file(&information)).unwrap();
            assert_eq!(read.guardian.encryption_certificate_signature.algorithm, algorithm);
        }
    }
}

/// The two signatures in `GuardianInformation` are verified separately from the XML signature.
#[test]
fn the_guardians_own_signatures_are_checked() {
    let of = |key: usize, octets: &[u8]| common::signature(common::key(key), SignatureAlgorithm::DEFAULT, octets);
    let wrong = |change: &dyn Fn(&mut GuardianInformation)| {
        let mut information = information(1);
        change(&mut information);
        let document = metadata_file(&information);
        Metadata::parse(&document).unwrap_err()
    };
    let signature = |e: MetadataError| assert!(matches!(e, MetadataError::Signature(_)), "{e}");
    signature(wrong(&|i| i.encryption_certificate_signature = of(4, encryption_certificate(1))));
    signature(wrong(&|i| i.encryption_certificate_signature = of(2, signing_certificate(1))));
    signature(wrong(&|i| i.signing_certificate_self_signature = of(4, signing_certificate(1))));
    signature(wrong(&|i| i.signing_certificate_self_signature = of(2, encryption_certificate(1))));
    signature(wrong(&|i| i.encryption_certificate = encryption_certificate(2).to_vec()));
    signature(wrong(&|i| i.signing_certificate = signing_certificate(2).to_vec()));
    signature(wrong(&|i| i.encryption_certificate_signature.algorithm = SignatureAlgorithm::ALL[1]));
    let certificate = |e: MetadataError| assert!(matches!(e, MetadataError::Certificate(..)), "{e}");
    certificate(wrong(&|i| i.encryption_certificate = b"x".to_vec()));
    certificate(wrong(&|i| i.signing_certificate = b"x".to_vec()));
    let document = wrong(&|i| i.signing_certificate = Vec::new());
    assert!(matches!(document, MetadataError::Document(_)), "{document}");
}

/// The position of the text of `element` in the XML signature, without its tags.
fn value(text: &str, element: &str) -> std::ops::Range<usize> {
    let start = text.find(&format!("<ds:{element}>")).unwrap() + element.len() + 5;
    start..start + text[start..].find('<').unwrap()
}

#[test]
fn a_changed_bit_is_refused_by_both() {
    let directory = directory();
    let document = metadata_file(&with_others(1));
    let text = std::str::from_utf8(&document).unwrap();
    let declaration = text.find("<Metadata").unwrap();
    let embedded = value(text, "X509Certificate");
    let mut rng = Rng::new(7);
    let mut changed = document.clone();
    for at in declaration..document.len() {
        let bit = 1 << rng.below(8);
        changed[at] ^= bit;
        match Metadata::parse(&changed) {
            Err(_) => {}
            // An XML signature does not cover its own KeyInfo. If another certificate with the same key is put there,
            // the document is valid, but its certificate does not have the pinned thumbprint.
            Ok(read) if embedded.contains(&at) => {
                assert_ne!(
                    read.communications_certificate.thumbprint(),
                    Certificate::parse(certificate(COMMUNICATIONS)).unwrap().thumbprint()
                );
                assert_eq!(read.guardian.signing_certificate, signing_certificate(1));
            }
            Ok(_) => panic!("octet {at}: {}", String::from_utf8_lossy(&changed[at - 20..at + 20])),
        }
        // Of the bytes that the signature covers, only a sample is changed, because each test starts a process.
        if at % 97 == 0 && !embedded.contains(&at) {
            assert!(xmlsec_verify(directory.path(), &changed, "comm").is_err(), "octet {at}");
        }
        changed[at] ^= bit;
    }
    assert!(Metadata::parse(&changed).is_ok());
}

#[test]
fn another_keys_signature_is_refused() {
    let unsigned = information(1).unsigned(certificate(COMMUNICATIONS));
    let sign = |index: usize, algorithm| key(index).sign(algorithm, unsigned.signed_octets()).unwrap();
    assert!(Metadata::parse(&unsigned.finish(&sign(COMMUNICATIONS, SignatureAlgorithm::DEFAULT))).is_ok());
    for value in [
        sign(11, SignatureAlgorithm::DEFAULT),
        sign(COMMUNICATIONS, SignatureAlgorithm::ALL[1]),
        sign(COMMUNICATIONS, SignatureAlgorithm::ALL[3]),
        vec![0; 256],
    ] {
        let refusal = Metadata::parse(&unsigned.finish(&value)).unwrap_err();
        assert!(matches!(refusal, MetadataError::Signature("signature")), "{refusal}");
    }
    assert!(matches!(Metadata::parse(&unsigned.finish(&[])), Err(MetadataError::Document(_))));
    // KeyInfo has another certificate; the signature is by the right key.
    let other = information(1).unsigned(certificate(11));
    let document = other.finish(&key(COMMUNICATIONS).sign(SignatureAlgorithm::DEFAULT, other.signed_octets()).unwrap());
    assert!(matches!(Metadata::parse(&document), Err(MetadataError::Signature("signature"))));
}

/// A document for xmlsec1 to sign: pretty-printed, with an `ID`.
fn template(uri: &str, root: &str) -> String {
    let text = String::from_utf8(metadata_file(&information(1))).unwrap();
    let information = between(&text, "<GuardianInformation>", "</GuardianInformation>").replace("><", ">\n  <");
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- a template -->\n<Metadata xmlns=\"{K}\" {root} Version=\"1\">\n  {information}\n  \
         <Signature xmlns=\"{DS}\">\n    <SignedInfo>\n      <CanonicalizationMethod Algorithm=\"http://www.w3.org/2001/10/xml-exc-c14n#\"/>\n      \
         <SignatureMethod Algorithm=\"http://www.w3.org/2001/04/xmldsig-more#rsa-sha256\"/>\n      <Reference URI=\"{uri}\">\n        <Transforms>\n          \
         <Transform Algorithm=\"http://www.w3.org/2000/09/xmldsig#enveloped-signature\"/>\n          \
         <Transform Algorithm=\"http://www.w3.org/2001/10/xml-exc-c14n#\"/>\n        </Transforms>\n        \
         <DigestMethod Algorithm=\"http://www.w3.org/2001/04/xmlenc#sha256\"/>\n        <DigestValue></DigestValue>\n      </Reference>\n    \
         </SignedInfo>\n    <SignatureValue/>\n    <KeyInfo>\n      <X509Data>\n        <X509Certificate>{}</X509Certificate>\n      </X509Data>\n    \
         </KeyInfo>\n  </Signature>\n</Metadata>\n",
        BASE64.encode(certificate(COMMUNICATIONS))
    )
}

fn xmlsec_sign(directory: &Path, template: &str) -> Vec<u8> {
    std::fs::write(directory.join("template.xml"), template).unwrap();
    let id = format!("{K}:Metadata");
    run(directory, "xmlsec1", &["--sign", "--id-attr:ID", &id, "--privkey-pem", "comm.key", "template.xml"]).unwrap()
}

#[test]
fn what_xmlsec_signs_is_accepted() {
    let directory = directory();
    for (uri, root) in [
        ("", ""),
        ("", "ID=\"_1\""),
        ("#_1", "ID=\"_1\""),
        ("#metadata-2014", "xmlns:unused=\"urn:unused\" ID='metadata-2014'"),
        ("", "xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\" xsi:schemaLocation=\"urn:a b\""),
    ] {
        let signed = xmlsec_sign(directory.path(), &template(uri, root));
        xmlsec_verify(directory.path(), &signed, "comm").unwrap();
        let read = Metadata::parse(&signed).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&signed)));
        assert_eq!(read.guardian.signing_certificate, signing_certificate(1));
        let changed = String::from_utf8(signed.clone()).unwrap().replacen("<Version>1", "<Version> 1", 1);
        assert!(matches!(Metadata::parse(changed.as_bytes()), Err(MetadataError::Signature("digest"))));
    }
}

/// Valid signatures with other references or transforms than the protocol requires.
#[test]
fn other_references_and_transforms_are_refused() {
    let directory = directory();
    let sound = template("", "");
    let enveloped = "<Transform Algorithm=\"http://www.w3.org/2000/09/xmldsig#enveloped-signature\"/>";
    let exclusive = "<Transform Algorithm=\"http://www.w3.org/2001/10/xml-exc-c14n#\"/>";
    let replaced = |from: &str, to: &str| {
        assert!(sound.contains(from), "{from}");
        sound.replace(from, to)
    };
    let signed_by_xmlsec = [
        replaced("xmlenc#sha256", "xmlenc#sha512"),
        replaced("xmldsig-more#rsa-sha256", "xmldsig-more#rsa-sha512"),
        replaced("xmldsig-more#rsa-sha256", "xmldsig-more#rsa-sha384"),
        replaced(exclusive, ""),
        replaced(exclusive, "<Transform Algorithm=\"http://www.w3.org/TR/2001/REC-xml-c14n-20010315\"/>"),
        replaced(exclusive, "<Transform Algorithm=\"http://www.w3.org/2001/10/xml-exc-c14n#WithComments\"/>"),
        replaced(
            "CanonicalizationMethod Algorithm=\"http://www.w3.org/2001/10/xml-exc-c14n#\"",
            "CanonicalizationMethod Algorithm=\"http://www.w3.org/TR/2001/REC-xml-c14n-20010315\"",
        ),
        replaced(exclusive, &format!("{exclusive}{exclusive}")),
        replaced(
            enveloped,
            &format!(
                "{enveloped}<Transform Algorithm=\"http://www.w3.org/TR/1999/REC-xpath-19991116\"><XPath>not(self::Version)</XPath></Transform>"
            ),
        ),
        replaced("</KeyInfo>", "</KeyInfo><Object>x</Object>"),
        replaced("<KeyInfo>", "<KeyInfo><KeyName>x</KeyName>"),
    ];
    for text in signed_by_xmlsec {
        let signed = xmlsec_sign(directory.path(), &text);
        xmlsec_verify(directory.path(), &signed, "comm").unwrap();
        assert!(
            matches!(Metadata::parse(&signed), Err(MetadataError::Document(_))),
            "{}",
            String::from_utf8_lossy(&signed)
        );
    }
    // xmlsec1 cannot resolve these references, so they are inserted after signing. The document is rejected before any
    // signature is verified.
    let signed = String::from_utf8(xmlsec_sign(directory.path(), &template("", "ID=\"a\""))).unwrap();
    let without = String::from_utf8(xmlsec_sign(directory.path(), &sound)).unwrap();
    for uri in ["#b", "#", "a", "##a", "#A", " ", "#xpointer(/)", "http://example.test/", "metadata.xml"] {
        for signed in [&signed, &without] {
            let changed = signed.replacen("URI=\"\"", &format!("URI=\"{uri}\""), 1);
            assert_ne!(&changed, signed);
            let refusal = Metadata::parse(changed.as_bytes()).unwrap_err();
            assert!(matches!(refusal, MetadataError::Document(_)), "{uri}: {refusal}");
        }
    }
    let changed = signed.replacen("ID=\"a\"", "ID=\"\"", 1).replacen("URI=\"\"", "URI=\"#\"", 1);
    assert!(matches!(Metadata::parse(changed.as_bytes()), Err(MetadataError::Document(_))));
    let changed = signed.replacen(" URI=\"\"", "", 1);
    assert!(matches!(Metadata::parse(changed.as_bytes()), Err(MetadataError::Document(_))));
}

/// The reference covers the root: a genuine document inside another one, or next to other content, proves nothing.
#[test]
fn signature_wrapping_is_refused() {
    let genuine = String::from_utf8(metadata_file(&information(1))).unwrap();
    let genuine = genuine.split_once("?>").unwrap().1;
    let forged = String::from_utf8(metadata_file(&information(2))).unwrap();
    let forged_information = between(&forged, "<GuardianInformation>", "</GuardianInformation>");
    let information = between(genuine, "<GuardianInformation>", "</GuardianInformation>");
    let signature = between(genuine, "<ds:Signature ", "</ds:Signature>");
    let root = |content: &str| format!("<Metadata xmlns=\"{K}\" Version=\"1\">{content}</Metadata>");
    assert!(Metadata::parse(root(&format!("{information}{signature}")).as_bytes()).is_ok());
    for content in [
        format!("{forged_information}{signature}"),
        format!("{forged_information}{information}{signature}"),
        format!("{information}{forged_information}{signature}"),
        format!("{information}{signature}{forged_information}"),
        format!("{signature}{information}"),
        format!("{information}{signature}{signature}"),
        format!(
            "{forged_information}{}",
            signature.replacen("</ds:KeyInfo>", &format!("</ds:KeyInfo><ds:Object>{genuine}</ds:Object>"), 1)
        ),
        format!(
            "{forged_information}{}",
            signature.replacen("<ds:SignedInfo>", &format!("<ds:SignedInfo>{information}"), 1)
        ),
        format!("{genuine}{signature}"),
        format!("<x>{information}</x>{signature}"),
        information.to_owned(),
        signature.to_owned(),
        String::new(),
    ] {
        assert!(Metadata::parse(root(&content).as_bytes()).is_err(), "{content:.200}");
    }
    // Comments are not signed and do not change the values.
    let commented = root(&format!("<!--{forged_information}-->{information}<!--x-->{signature}"));
    assert_eq!(Metadata::parse(commented.as_bytes()).unwrap().guardian.signing_certificate, signing_certificate(1));
}

/// Documents that do not follow the schema are rejected even if they are signed.
#[test]
fn the_shape_is_the_schemas() {
    let directory = directory();
    let sound = template("", "").replacen("</SigningCertificateSelfSignature>", &format!("</SigningCertificateSelfSignature><OtherSigningCertificates><Certificate>{}</Certificate></OtherSigningCertificates>", BASE64.encode(signing_certificate(2))), 1);
    let signed = xmlsec_sign(directory.path(), &sound);
    assert_eq!(Metadata::parse(&signed).unwrap().guardian.other_signing_certificates, [signing_certificate(2)]);
    let others = between(&sound, "<OtherSigningCertificates>", "</OtherSigningCertificates>").to_owned();
    for others in ["<OtherSigningCertificates/>", "<OtherSigningCertificates>\n</OtherSigningCertificates>"] {
        let text = template("", "").replacen(
            "</SigningCertificateSelfSignature>",
            &format!("</SigningCertificateSelfSignature>{others}"),
            1,
        );
        assert!(
            Metadata::parse(&xmlsec_sign(directory.path(), &text))
                .unwrap()
                .guardian
                .other_signing_certificates
                .is_empty()
        );
    }
    // The published schema allows further attributes and elements. They are signed and do not change the values.
    for text in [
        sound.replacen(" Version=\"1\"", " Version=\"1\" Id=\"x\" xmlns:y=\"urn:y\" y:z=\"1\"", 1),
        sound.replacen("</Metadata>", "<Later xmlns=\"urn:x\"><x/>text</Later><Other/></Metadata>", 1),
    ] {
        assert_ne!(text, sound);
        let signed = xmlsec_sign(directory.path(), &text);
        assert_eq!(Metadata::parse(&signed).unwrap().guardian.other_signing_certificates, [signing_certificate(2)]);
        let changed =
            String::from_utf8(signed).unwrap().replacen("</Metadata>", "<Later xmlns=\"urn:x\"/></Metadata>", 1);
        assert!(matches!(Metadata::parse(changed.as_bytes()), Err(MetadataError::Signature("digest"))));
    }
    let mut bad = Vec::new();
    for element in [
        "Version",
        "EncryptionCertificate",
        "SigningCertificate",
        "EncryptionCertificateSignature",
        "SigningCertificateSelfSignature",
    ] {
        let start =
            [format!("<{element}>"), format!("<{element} ")].into_iter().find(|s| sound.contains(s.as_str())).unwrap();
        let whole = between(&sound, &start, &format!("</{element}>"));
        bad.push(sound.replacen(whole, "", 1));
        bad.push(sound.replacen(whole, &whole.repeat(2), 1));
        bad.push(sound.replacen(whole, &format!("<x xmlns=\"urn:x\"/>{whole}"), 1));
        bad.push(sound.replacen(whole, &format!("text{whole}"), 1));
        bad.push(sound.replacen(
            whole,
            &whole.replacen(&format!("<{element}"), &format!("<{element} xmlns=\"urn:x\""), 1),
            1,
        ));
    }
    bad.push(sound.replacen(&others, &others.repeat(2), 1));
    bad.push(sound.replacen("<Certificate>", "<Certificate/><Certificate>", 1));
    bad.push(sound.replace("Certificate>", "certificate>"));
    bad.push(sound.replacen("<Version>1<", "<Version>2<", 1));
    bad.push(sound.replacen("<Version>1<", "<Version>one<", 1));
    bad.push(sound.replacen(" Version=\"1\"", "", 1));
    bad.push(sound.replacen(" Version=\"1\"", " Version=\"2\"", 1));
    bad.push(sound.replacen(" Version=\"1\"", " Version=\"-1\"", 1));
    bad.push(sound.replace("Metadata", "Metadaten"));
    bad.push(sound.replacen(K, "urn:x", 1));
    for text in bad {
        assert_ne!(text, sound);
        let refusal = Metadata::parse(&xmlsec_sign(directory.path(), &text)).unwrap_err();
        assert!(matches!(refusal, MetadataError::Document(_)), "{refusal}: {text:.200}");
    }
}
