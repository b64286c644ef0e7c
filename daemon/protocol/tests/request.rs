//! Requests, replies, errors, and the payload that carries the keys.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::{ApiVersion, EncryptedKeys, HostKeys, OpenError, Payload};
use claviger_protocol::protector::transport_key;
use claviger_protocol::request::{RollRequest, RollResponse};
use common::{S, key, run};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const WRAPPINGS: [KeyWrapping; 3] =
    [KeyWrapping::Seal(Sealing::Aes128Gcm), KeyWrapping::Seal(Sealing::Aes256Gcm), KeyWrapping::Aes256Kw];
const SEALINGS: [Sealing; 2] = [Sealing::Aes128Gcm, Sealing::Aes256Gcm];

fn combinations() -> Vec<HostAlgorithms> {
    let mut all = Vec::new();
    for transfer in [Oaep::SHA1, Oaep::SHA256] {
        for wrapping in WRAPPINGS {
            all.extend(SEALINGS.map(|transport| HostAlgorithms { transfer, wrapping, transport }));
        }
    }
    all
}

#[test]
fn a_peek_finds_the_health_certificate_and_never_panics() {
    assert_eq!(RollRequest::peek_health_certificate(text().as_bytes()).unwrap(), [4, 5, 6]);
    let prefixed = text().replace("HealthCertificate>", "s:HealthCertificate>");
    assert_eq!(RollRequest::peek_health_certificate(prefixed.as_bytes()).unwrap(), [4, 5, 6]);
    let broken = text().replace("BAUG", " BA\r\n UG\t");
    assert_ne!(broken, text());
    assert_eq!(RollRequest::peek_health_certificate(broken.as_bytes()).unwrap(), [4, 5, 6]);
    for nothing in [
        "",
        "HealthCertificate>",
        "</HealthCertificate>",
        "<HealthCertificate>",
        "<a>!!</HealthCertificate>",
        "<a></HealthCertificate>",
    ] {
        assert_eq!(RollRequest::peek_health_certificate(nothing.as_bytes()), None, "{nothing}");
    }
    let whole = text();
    for end in 0..whole.len() {
        let _ = RollRequest::peek_health_certificate(&whole.as_bytes()[..end]);
        let _ = RollRequest::peek_health_certificate(&whole.as_bytes()[end..]);
    }
}

const TRANSFER: &str = "http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p";
const WRAPPING: &str = "http://www.w3.org/2001/04/xmlenc#kw-aes256";
const TRANSPORT: &str = "http://www.w3.org/2009/xmlenc11#aes256-gcm";

fn text() -> String {
    format!(
        "<RollTransportKeyRequest xmlns=\"{S}\"><IngressProtector>AQID</IngressProtector><HealthCertificate>BAUG</HealthCertificate>\
         <TransferKeyEncryptionAlgorithm>{TRANSFER}</TransferKeyEncryptionAlgorithm>\
         <WrappingKeyEncryptionAlgorithm>{WRAPPING}</WrappingKeyEncryptionAlgorithm>\
         <TransportKeysEncryptionAlgorithm>{TRANSPORT}</TransportKeysEncryptionAlgorithm></RollTransportKeyRequest>"
    )
}

const ELEMENTS: [&str; 5] = [
    "IngressProtector",
    "HealthCertificate",
    "TransferKeyEncryptionAlgorithm",
    "WrappingKeyEncryptionAlgorithm",
    "TransportKeysEncryptionAlgorithm",
];

/// The code of the refusal, which is the same with an XML parser and, for bodies as they are usually written, without one.
fn code(body: impl AsRef<[u8]>) -> Option<Code> {
    let (body, full) = (body.as_ref(), RollRequest::parse_in_full(body.as_ref()));
    if let Some(plain) = RollRequest::parse_plain(body) {
        assert_eq!(Ok(&plain), full.as_ref());
    }
    let parsed = RollRequest::parse(body);
    assert_eq!(parsed, full);
    parsed.err().map(|e| e.code)
}

#[test]
fn whatever_is_changed_about_a_request_is_judged_the_same() {
    let algorithms = combinations()[1];
    let request = RollRequest { ingress_protector: vec![7; 500], health_certificate: vec![9; 301], algorithms };
    let body = request.to_xml();
    assert_eq!(RollRequest::parse_plain(&body).as_ref(), Some(&request));
    let mut plain = 0;
    let mut judge = |changed: &[u8]| {
        code(changed);
        plain += usize::from(RollRequest::parse_plain(changed).is_some());
    };
    for at in 0..body.len() {
        for bit in 0..8 {
            let mut changed = body.clone();
            changed[at] ^= 1 << bit;
            judge(&changed);
        }
        judge(&body[..at]);
        judge(&[&body[..at], &body[at + 1..]].concat());
        for more in [" ", "\n", "A", "=", "<", "&#65;", "<!-- -->", "<![CDATA[A]]>"] {
            judge(&[&body[..at], more.as_bytes(), &body[at..]].concat());
        }
    }
    for trailing in ["\n", "<!---->", "x", "\0"] {
        judge(&[&body[..], trailing.as_bytes()].concat());
    }
    assert!(plain > 1_000, "{plain} of them were read without a parser");
}

#[test]
fn requests_come_out_as_they_went_in() {
    for algorithms in combinations() {
        for len in [1, 2, 3, 100_000] {
            let request =
                RollRequest { ingress_protector: vec![7; len], health_certificate: vec![9; len + 1], algorithms };
            let read = RollRequest::parse(&request.to_xml()).unwrap();
            assert_eq!(read.ingress_protector, request.ingress_protector);
            assert_eq!(read.health_certificate, request.health_certificate);
            assert_eq!(read.algorithms, algorithms);
        }
    }
}

/// By hand: a writer and a reader that agree in a mistake would not notice.
#[test]
fn a_request_written_by_hand_is_read() {
    let read = RollRequest::parse(text().as_bytes()).unwrap();
    assert_eq!((read.ingress_protector, read.health_certificate), (vec![1, 2, 3], vec![4, 5, 6]));
    assert_eq!(
        read.algorithms,
        HostAlgorithms { transfer: Oaep::SHA1, wrapping: KeyWrapping::Aes256Kw, transport: Sealing::Aes256Gcm }
    );
    let body = RollRequest {
        ingress_protector: vec![1, 2, 3],
        health_certificate: vec![4, 5, 6],
        algorithms: read.algorithms,
    }
    .to_xml();
    assert_eq!(body, format!("<?xml version=\"1.0\" encoding=\"utf-8\"?>{}", text()).into_bytes());
}

#[test]
fn values_are_read_as_xml_schema_allows() {
    let same = |changed: String| {
        assert_ne!(changed, text());
        let read = RollRequest::parse(changed.as_bytes()).unwrap_or_else(|e| panic!("{e}: {changed}"));
        assert_eq!((read.ingress_protector, read.health_certificate), (vec![1, 2, 3], vec![4, 5, 6]), "{changed}");
        assert_eq!(read.algorithms.transfer, Oaep::SHA1);
        assert_eq!(read.algorithms.wrapping, KeyWrapping::Aes256Kw);
    };
    for value in [
        " AQID ",
        "\r\n\tA Q\r\nI\tD\n",
        "<!--x-->AQ<!-- AAAA -->ID<!---->",
        "<![CDATA[AQID]]>",
        "A<![CDATA[QI]]>D",
        "<![CDATA[ ]]>AQID",
        "&#65;&#x51;I&#x44;",
        "&#13;AQID&#10;&#x20;",
        "AQ<!----><![CDATA[I]]>&#x44;\n",
    ] {
        same(text().replacen("AQID", value, 1));
    }
    for value in [
        format!("\n  {TRANSFER}\r\n"),
        format!("<!--x-->{TRANSFER}<!--y-->"),
        format!("<![CDATA[{TRANSFER}]]>"),
        TRANSFER.replace("www", "w<!---->w&#119;"),
        format!("&#9;{TRANSFER}&#13;"),
    ] {
        same(text().replacen(TRANSFER, &value, 1));
    }
    for head in
        ["<?xml version=\"1.0\" encoding=\"UTF-8\"?>\r\n", "\u{feff}", "\u{feff}<?xml version='1.0'?><!--x-->", " \n"]
    {
        same(format!("{head}{}\n", text()));
    }
    let prefixed = text()
        .replace("</", "</s:")
        .replace("xmlns=", "xmlns:s=")
        .replace("><", ">\n<")
        .replace('<', "<s:")
        .replace("<s:/", "</");
    same(prefixed);
    same(text().replacen(
        "<IngressProtector",
        "<IngressProtector xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance' xsi:schemaLocation='a b'",
        1,
    ));
}

#[test]
fn what_is_not_schema_valid_is_an_invalid_request() {
    let sound = text();
    let refused = |changed: String| {
        assert_ne!(changed, sound);
        assert_eq!(code(&changed), Some(Code::InvalidRequest), "{changed}");
    };
    let part = |name: &str| common::between(&sound, &format!("<{name}>"), &format!("</{name}>")).to_owned();
    for (name, next) in ELEMENTS.into_iter().zip(ELEMENTS.into_iter().skip(1).chain(["IngressProtector"])) {
        let (element, other) = (part(name), part(next));
        refused(sound.replacen(&element, "", 1));
        refused(sound.replacen(&element, &element.repeat(2), 1));
        refused(sound.replacen(&element, &format!("{other}{element}"), 1));
        refused(sound.replacen(&element, &format!("<{name}/>"), 1));
        refused(sound.replacen(&element, &format!("<{name}> \n<!--x--></{name}>"), 1));
        refused(sound.replacen(&element, &format!("<{name}><![CDATA[]]></{name}>"), 1));
        refused(sound.replacen(&element, &element.replacen(&format!("<{name}>"), &format!("<{name} x='1'>"), 1), 1));
        refused(sound.replacen(&element, &element.replacen(&format!("<{name}>"), &format!("<{name} xmlns=''>"), 1), 1));
        refused(sound.replacen(&element, &element.replacen(&format!("<{name}>"), &format!("<{name}><x/>"), 1), 1));
        refused(sound.replacen(&element, &format!("text{element}"), 1));
        refused(sound.replacen(&element, &format!("{element}<More/>"), 1));
        refused(sound.replacen(&element, &element.to_lowercase(), 1));
    }
    for value in [
        "A",
        "AQI",
        "AQID=",
        "AQIDA",
        "AQ==ID==",
        "AQ=I",
        "AQ-_",
        "AR==",
        "====",
        "AQID\u{a0}",
        "\u{2003}AQID",
        "0xAQID",
    ] {
        refused(sound.replacen("AQID", value, 1));
        refused(sound.replacen("BAUG", value, 1));
    }
    refused(sound.replacen(S, common::K, 1));
    refused(sound.replacen(&format!(" xmlns=\"{S}\""), "", 1));
    refused(sound.replacen(" xmlns", " x='1' xmlns", 1));
    refused(sound.replace("RollTransportKeyRequest", "RollTransportKeyResponse"));
    refused(sound.replace("RollTransportKeyRequest", "rollTransportKeyRequest"));
    refused(String::new());
    refused("{}".to_owned());
    refused(format!("{sound}{sound}"));
    refused(format!("<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>{sound}"));
    refused(format!("<!DOCTYPE x>{sound}"));
    assert_eq!(code([&[0xff_u8, 0xfe][..], sound.as_bytes()].concat()), Some(Code::InvalidRequest));
}

#[test]
fn unknown_algorithms_are_named_after_the_shape_is_judged() {
    for (known, of) in [(TRANSFER, 0), (WRAPPING, 1), (TRANSPORT, 2)] {
        for uri in [
            "http://www.w3.org/2001/04/xmlenc#rsa-1_5",
            "http://www.w3.org/2001/04/xmlenc#aes256-cbc",
            "http://www.w3.org/2001/04/xmlenc#kw-aes128",
            "http://www.w3.org/2009/xmlenc11#aes192-gcm",
            "HTTP://www.w3.org/2009/xmlenc11#aes256-gcm",
            "urn:x",
            "x &amp; y",
            if of == 0 { TRANSPORT } else { TRANSFER },
            if of == 2 { WRAPPING } else { "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256" },
        ] {
            let changed = text().replacen(&format!(">{known}<"), &format!(">{uri}<"), 1);
            let refusal = RollRequest::parse(changed.as_bytes()).unwrap_err();
            assert_eq!(refusal.code, Code::UnsupportedAlgorithm, "{refusal}");
            assert!(refusal.message.contains(&uri.replace("&amp;", "&")), "{refusal}");
            // The shape comes first.
            assert_eq!(code(changed.replacen("BAUG", "", 1)), Some(Code::InvalidRequest));
        }
    }
    let known = |from: &str, to: &str| {
        RollRequest::parse(text().replacen(&format!(">{from}<"), &format!(">{to}<"), 1).as_bytes()).unwrap().algorithms
    };
    assert_eq!(known(TRANSFER, "http://www.w3.org/2009/xmlenc11#rsa-oaep").transfer, Oaep::SHA256);
    assert_eq!(
        known(WRAPPING, "http://www.w3.org/2009/xmlenc11#aes128-gcm").wrapping,
        KeyWrapping::Seal(Sealing::Aes128Gcm)
    );
    assert_eq!(known(WRAPPING, TRANSPORT).wrapping, KeyWrapping::Seal(Sealing::Aes256Gcm));
    assert_eq!(known(TRANSPORT, "http://www.w3.org/2009/xmlenc11#aes128-gcm").transport, Sealing::Aes128Gcm);
}

#[test]
fn replies_come_out_as_they_went_in() {
    let keys = EncryptedKeys { transfer_key: vec![1; 256], wrapping_key: vec![2; 60], transport_keys: vec![3; 112] };
    let reply = RollResponse { egress_protector: b"<Protector/>".to_vec(), keys };
    let body = reply.to_xml();
    assert_eq!(RollResponse::parse(&body).unwrap(), reply);
    let text = String::from_utf8(body).unwrap();
    let expected = format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?><RollTransportKeyResponse xmlns=\"{S}\"><EgressProtector>PFByb3RlY3Rvci8+</EgressProtector><EncryptedTransferKey>AQEB"
    );
    assert!(text.starts_with(&expected), "{text}");
    for element in ["EgressProtector", "EncryptedTransferKey", "EncryptedWrappingKey", "EncryptedTransportKeys"] {
        let whole = common::between(&text, &format!("<{element}>"), &format!("</{element}>"));
        assert!(RollResponse::parse(text.replacen(whole, "", 1).as_bytes()).is_err());
        assert!(RollResponse::parse(text.replacen(whole, &whole.repeat(2), 1).as_bytes()).is_err());
    }
    assert!(RollResponse::parse(&Refusal::internal().to_xml()).is_err());
    assert!(Refusal::parse(text.as_bytes()).is_err());
}

#[test]
fn errors_are_the_protocols() {
    let table = [
        ("InvalidProtectorException", 400),
        ("InvalidWrappingException", 400),
        ("UnsupportedAlgorithmException", 400),
        ("InvalidRequestException", 400),
        ("HealthCertificateException", 403),
        ("NotFoundException", 404),
        ("MethodNotAllowedException", 405),
        ("RequestTimeoutException", 408),
        ("RequestTooLargeException", 413),
        ("UnsupportedMediaTypeException", 415),
        ("TooManyRequestsException", 429),
        ("ServiceUnavailableException", 503),
        ("InternalErrorException", 500),
    ];
    assert_eq!(Code::ALL.len(), table.len());
    for (name, status) in table {
        let code = Code::ALL.into_iter().find(|c| c.as_str() == name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(code.status(), status, "{name}");
        let refusal = Refusal::new(code, "a <message> & \"more\"");
        let body = String::from_utf8(refusal.to_xml()).unwrap();
        assert_eq!(
            body,
            format!(
                "<?xml version=\"1.0\" encoding=\"utf-8\"?><Error xmlns=\"{S}\"><Code>{name}</Code>\
                 <Message>a &lt;message&gt; &amp; \"more\"</Message></Error>"
            )
        );
        assert_eq!(Refusal::parse(body.as_bytes()).unwrap(), refusal);
    }
    assert!(Refusal::parse(format!("<Error xmlns='{S}'><Code>Nonsense</Code><Message/></Error>").as_bytes()).is_err());
    assert!(
        Refusal::parse(format!("<Error xmlns='{S}'><Message/><Code>NotFoundException</Code></Error>").as_bytes())
            .is_err()
    );
}

/// Whatever a message holds, what is sent is XML, for xmllint as well.
#[test]
fn messages_cannot_break_out() {
    let directory = tempfile::tempdir().unwrap();
    for (message, read) in [
        ("]]></Message><Code>x</Code><!--", "]]></Message><Code>x</Code><!--"),
        ("&amp; &#13; &x;", "&amp; &#13; &x;"),
        ("a\r\nb\rc\td", "a\r\nb\rc\td"),
        ("\u{0}\u{1}\u{8}\u{b}\u{c}\u{1f}", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
        ("\u{fffe}\u{ffff}\u{fffd}", "\u{fffd}\u{fffd}\u{fffd}"),
        ("\u{7f}\u{85}\u{2028}\u{feff}\u{1f512}\u{10ffff}", "\u{7f}\u{85}\u{2028}\u{feff}\u{1f512}\u{10ffff}"),
        ("", ""),
    ] {
        let body = Refusal::request(message).to_xml();
        assert_eq!(Refusal::parse(&body).unwrap().message, read);
        std::fs::write(directory.path().join("error.xml"), &body).unwrap();
        let theirs = run(
            directory.path(),
            "xmllint",
            &["--nonet", "--xpath", "string(//*[local-name()='Message'])", "error.xml"],
        )
        .unwrap();
        assert_eq!(String::from_utf8(theirs).unwrap().trim_end_matches('\n'), read.trim_end_matches('\n'));
    }
    let mut runner = TestRunner::new(Config { cases: 500, failure_persistence: None, ..Config::default() });
    runner
        .run(&any::<String>(), |message| {
            let body = Refusal::request(message.as_str()).to_xml();
            let read = Refusal::parse(&body).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(read.message.chars().count(), message.chars().count());
            Ok(())
        })
        .unwrap();
    // A message that repeats what was sent.
    let refusal = RollRequest::parse(text().replacen(TRANSFER, "urn:&lt;x>&amp;&#13;", 1).as_bytes()).unwrap_err();
    assert_eq!(Refusal::parse(&refusal.to_xml()).unwrap(), refusal);
    assert!(refusal.message.contains("urn:<x>&"));
}

fn payload(max_offline_unwraps: u32) -> Payload {
    let key = |byte| transport_key(&[byte; 32]).unwrap();
    Payload { ingress: key(7), egress: key(9), max_offline_unwraps }
}

#[test]
fn every_combination_of_algorithms_opens() {
    let host = key(0);
    for algorithms in combinations() {
        for (version, unwraps, len) in
            [(ApiVersion::V1, 0, 80), (ApiVersion::V1, 7, 80), (ApiVersion::V2, 0, 84), (ApiVersion::V2, 7, 100)]
        {
            let keys = payload(unwraps).seal(version, HostKeys::fresh(host.public(), algorithms).unwrap()).unwrap();
            assert_eq!(keys.transfer_key.len(), 256);
            // Keys are as long as the algorithm that they are used with.
            let transfer_key = host.decrypt_oaep(algorithms.transfer, &keys.transfer_key).unwrap();
            assert_eq!(transfer_key.len(), if algorithms.wrapping == WRAPPINGS[0] { 16 } else { 32 });
            let wrapping_key_len = if algorithms.transport == Sealing::Aes128Gcm { 16 } else { 32 };
            let overhead = if algorithms.wrapping == KeyWrapping::Aes256Kw { 8 } else { 28 };
            assert_eq!(keys.wrapping_key.len(), wrapping_key_len + overhead);
            assert_eq!(keys.transport_keys.len(), len + 28);
            let open = |keys: &EncryptedKeys, transfer_key: &[u8]| {
                keys.open(transfer_key, algorithms.wrapping, algorithms.transport)
            };
            let opened = open(&keys, &transfer_key).unwrap();
            assert_eq!((*opened.ingress, *opened.egress), ([7; 32], [9; 32]));
            assert_eq!(opened.max_offline_unwraps, if version == ApiVersion::V2 { unwraps } else { 0 });
            // Any other transfer key, any change, any other algorithm: no.
            let mut other = transfer_key.to_vec();
            other[0] ^= 1;
            assert!(open(&keys, &other).is_err());
            assert!(open(&keys, &transfer_key[1..]).is_err());
            for at in [0, 11, 12, keys.wrapping_key.len() - 1] {
                let mut changed = keys.clone();
                changed.wrapping_key[at] ^= 0x80;
                assert!(open(&changed, &transfer_key).is_err());
            }
            for at in [0, 12, keys.transport_keys.len() - 1] {
                let mut changed = keys.clone();
                changed.transport_keys[at] ^= 1;
                assert!(open(&changed, &transfer_key).is_err());
            }
            for len in [0, 1, 12, 27, keys.transport_keys.len() - 1] {
                let mut changed = keys.clone();
                changed.transport_keys.truncate(len);
                assert!(open(&changed, &transfer_key).is_err());
                changed = keys.clone();
                changed.wrapping_key.truncate(len.min(changed.wrapping_key.len() - 1));
                assert!(open(&changed, &transfer_key).is_err());
            }
            for wrapping in WRAPPINGS.into_iter().filter(|w| *w != algorithms.wrapping) {
                assert!(matches!(keys.open(&transfer_key, wrapping, algorithms.transport), Err(OpenError)));
            }
            for transport in SEALINGS.into_iter().filter(|t| *t != algorithms.transport) {
                assert!(matches!(keys.open(&transfer_key, algorithms.wrapping, transport), Err(OpenError)));
            }
            for other in [Oaep::SHA1, Oaep::SHA256].into_iter().filter(|o| *o != algorithms.transfer) {
                assert!(host.decrypt_oaep(other, &keys.transfer_key).is_err());
            }
        }
    }
}

/// With another implementation of AES-GCM's parts: what is under the wrapping key is the published layout.
#[test]
fn keys_are_fresh_every_time() {
    let (host, algorithms) = (key(0), combinations()[3]);
    let seal = || payload(0).seal(ApiVersion::V2, HostKeys::fresh(host.public(), algorithms).unwrap()).unwrap();
    let (one, two) = (seal(), seal());
    let open = |keys: &EncryptedKeys| host.decrypt_oaep(algorithms.transfer, &keys.transfer_key).unwrap();
    assert_ne!(*open(&one), *open(&two));
    assert_ne!(one.wrapping_key[..12], two.wrapping_key[..12]);
    assert_ne!(one.transport_keys[..12], two.transport_keys[..12]);
    assert!(one.open(&open(&two), algorithms.wrapping, algorithms.transport).is_err());
}

/// The ciphertexts, taken apart with ring alone.
#[test]
fn the_octets_are_iv_ciphertext_and_tag() {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let host = key(0);
    let algorithms = HostAlgorithms { transfer: Oaep::SHA256, wrapping: WRAPPINGS[1], transport: Sealing::Aes256Gcm };
    let keys = payload(3).seal(ApiVersion::V2, HostKeys::fresh(host.public(), algorithms).unwrap()).unwrap();
    let open = |key: &[u8], sealed: &[u8]| {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
        let mut rest = sealed[12..].to_vec();
        let len = key
            .open_in_place(Nonce::try_assume_unique_for_key(&sealed[..12]).unwrap(), Aad::empty(), &mut rest)
            .unwrap()
            .len();
        rest.truncate(len);
        rest
    };
    let transfer = host.decrypt_oaep(algorithms.transfer, &keys.transfer_key).unwrap();
    let octets = open(&open(&transfer, &keys.wrapping_key), &keys.transport_keys);
    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let expected = [words(&[100, 2, 2, 32]), vec![7; 32], vec![9; 32], words(&[1, 1, 6, 4, 3])].concat();
    assert_eq!(octets, expected);
}

#[test]
fn hostile_bodies_never_panic() {
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..9_usize), 1..5);
    runner
        .run(&(prop::collection::vec(any::<u8>(), 0..200), changes), |(octets, changes)| {
            let mut changed = text().into_bytes();
            for (at, octet, len) in changes {
                let at = at.index(changed.len());
                let end = (at + len).min(changed.len());
                changed.splice(at..end, [octet]);
            }
            for body in [octets, changed] {
                let _ = (RollRequest::parse(&body), RollResponse::parse(&body), Refusal::parse(&body));
            }
            Ok(())
        })
        .unwrap();
}
