//! The JSON messages of attestation: accepted and rejected input, error texts, and that no input panics.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::OnceLock;

use claviger_protocol::algorithm::{SignatureAlgorithm, SignatureDigest};
use claviger_protocol::attestation::{
    self, ErrorReply, HealthCertificateReply, HostKeyRequest, OperationMode, PolicyReason, ResultType,
    ServiceInfoReply, host_key_request, parse_error_reply, parse_health_certificate_reply, signed_octets,
};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health;
use claviger_protocol::rsa_key::{BadSignature, RsaPrivateKey, RsaPublicKey};
use data_encoding::BASE64;
use proptest::prelude::*;
use serde_json::{Value, json};

fn key(index: usize) -> &'static RsaPrivateKey {
    static KEYS: [OnceLock<RsaPrivateKey>; 2] = [const { OnceLock::new() }; 2];
    KEYS[index].get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
}

fn sign(key: &RsaPrivateKey, octets: &[u8]) -> Vec<u8> {
    key.sign(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256), octets).unwrap()
}

fn good_body() -> &'static [u8] {
    static BODY: OnceLock<Vec<u8>> = OnceLock::new();
    BODY.get_or_init(|| {
        let (host, identity) = (key(0).public().spki_der(), key(1).public().spki_der());
        let signature = sign(key(0), &signed_octets(host, identity));
        host_key_request([7; 16], &[ResultType::EncryptionCertificate], host, identity, &signature)
    })
}

fn good() -> Value {
    serde_json::from_slice(good_body()).unwrap()
}

fn parse(body: &Value) -> Result<HostKeyRequest, String> {
    HostKeyRequest::parse(&serde_json::to_vec(body).unwrap()).map_err(|e| e.to_string())
}

/// Parses the valid request after a change.
fn changed(change: impl FnOnce(&mut Value)) -> Result<HostKeyRequest, String> {
    let mut body = good();
    change(&mut body);
    parse(&body)
}

#[track_caller]
fn refused(result: Result<HostKeyRequest, String>, because: &str) {
    let message = result.unwrap_err();
    assert!(message.contains(because), "{message:?} does not say {because:?}");
    assert!(message.len() < 400, "{message}");
}

/// Parses the valid request with `new` in place of the text `old`.
fn text_with(old: &str, new: &str) -> Result<HostKeyRequest, String> {
    let text = std::str::from_utf8(good_body()).unwrap();
    assert!(text.contains(old), "{old}");
    HostKeyRequest::parse(text.replacen(old, new, 1).as_bytes()).map_err(|e| e.to_string())
}

#[test]
fn a_request_is_read_as_it_was_built() {
    let request = HostKeyRequest::parse(good_body()).unwrap();
    assert_eq!(request.session_id, [7; 16]);
    assert_eq!(request.requested, [ResultType::EncryptionCertificate]);
    assert_eq!(&request.host_key, key(0).public());
    assert_eq!(&request.identity_key, key(1).public());
    let both = [key(0).public().spki_der(), key(1).public().spki_der()].concat();
    assert_eq!(request.signed_octets(), both);
    assert_eq!(request.verify_signature(), Ok(()));
    let text = std::str::from_utf8(good_body()).unwrap();
    assert!(text.starts_with(r#"{"__type":"AttestationRequest:#Microsoft.Windows.RemoteAttestation.Core","#), "{text}");
}

#[test]
fn the_octets_as_sent_are_what_is_signed() {
    // The same two keys in two other encodings.
    let host = key(0).public().to_bcrypt_blob();
    let template = health::signer_template(key(1).public(), 0, 1).unwrap();
    let identity = template.to_be_signed().unwrap().sign_with(key(1)).unwrap();
    let signature = sign(key(0), &[&host[..], &identity].concat());
    let body = host_key_request([0; 16], &[ResultType::SigningCertificate], &host, &identity, &signature);
    let request = HostKeyRequest::parse(&body).unwrap();
    assert_eq!((&request.host_key, &request.identity_key), (key(0).public(), key(1).public()));
    assert_eq!((&request.host_key_octets, &request.identity_key_octets), (&host, &identity));
    assert_eq!(request.verify_signature(), Ok(()));
    // A signature over the canonical encodings does not match, because other bytes were sent.
    let canonical = signed_octets(key(0).public().spki_der(), key(1).public().spki_der());
    for wrong in [sign(key(0), &canonical), sign(key(1), &[&host[..], &identity].concat()), Vec::new()] {
        let body = host_key_request([0; 16], &[ResultType::SigningCertificate], &host, &identity, &wrong);
        assert_eq!(HostKeyRequest::parse(&body).unwrap().verify_signature(), Err(BadSignature));
    }
}

#[test]
fn the_type_may_be_missing_but_not_wrong() {
    assert!(changed(|body| drop(body.as_object_mut().unwrap().remove("__type"))).is_ok());
    for wrong in [
        json!("TpmRequestInitial:#Microsoft.Windows.RemoteAttestation.Core"),
        json!("AttestationRequest"),
        json!("attestationRequest:#Microsoft.Windows.RemoteAttestation.Core"),
        json!("AttestationRequest:#Microsoft.Windows.RemoteAttestation.Core "),
        json!(""),
    ] {
        refused(changed(|body| body["__type"] = wrong), "__type is not AttestationRequest:#");
    }
    for wrong in [Value::Null, json!(1), json!([])] {
        refused(changed(|body| body["__type"] = wrong), "expected a string");
    }
}

#[test]
fn every_other_member_must_be_there() {
    for name in ["SessionId", "RequestedContent", "ProvidedContent"] {
        refused(changed(|body| drop(body.as_object_mut().unwrap().remove(name))), &format!("missing field `{name}`"));
        for wrong in [Value::Null, json!(1), json!({}), json!(true)] {
            refused(changed(|body| body[name] = wrong), "invalid type");
        }
    }
    refused(changed(|body| body["ProvidedContent"][1] = json!({ "m_Item2": "" })), "missing field `m_Item1`");
    for (index, missing) in
        ["1 (VirtualSecureModeIdentityKey)", "8 (HostKeyPublicKey)", "9 (HostKeySignature)"].into_iter().enumerate()
    {
        let result = changed(|body| drop(body["ProvidedContent"].as_array_mut().unwrap().remove(index)));
        refused(result, &format!("lacks {missing}"));
        let result = changed(|body| drop(body["ProvidedContent"][index].as_object_mut().unwrap().remove("m_Item2")));
        refused(result, "is not a string");
        for wrong in [Value::Null, json!(1), json!([""]), json!({ "a": 1 })] {
            refused(changed(|body| body["ProvidedContent"][index]["m_Item2"] = wrong), "is not a string");
        }
    }
    refused(changed(|body| body["ProvidedContent"] = json!([])), "lacks 8");
}

#[test]
fn the_session_id_has_16_octets() {
    for octets in [0, 15, 17, 32] {
        refused(changed(|body| body["SessionId"] = json!(BASE64.encode(&vec![1; octets]))), "not 16 octets");
    }
}

#[test]
fn base64_is_strict() {
    let good = BASE64.encode(&[7; 16]);
    assert_eq!(good, "BwcHBwcHBwcHBwcHBwcHBw==");
    for wrong in [
        "BwcHBwcHBwcHBwcHBwcHBw",
        "BwcHBwcHBwcHBwcHBwcHBw=",
        "BwcHBwcHBwcHBwcHBwcHBx==",
        " BwcHBwcHBwcHBwcHBwcHBw==",
        "BwcHBwcHBwcHBwcHBwcHBw==\n",
        "BwcHBwcHBwcH\r\nBwcHBwcHBw==",
        "BwcHBwcHBwcHBwcHBwcHB-==",
    ] {
        refused(changed(|body| body["SessionId"] = json!(wrong)), "SessionId is not base64");
    }
    refused(
        changed(|body| body["ProvidedContent"][0]["m_Item2"] = json!("!")),
        "VirtualSecureModeIdentityKey is not base64",
    );
    refused(changed(|body| body["ProvidedContent"][2]["m_Item2"] = json!("A")), "HostKeySignature is not base64");
    // An escaped character has the same meaning.
    assert!(text_with("BwcH", "\\u0042wcH").is_ok());
}

#[test]
fn requested_content() {
    let requested = |numbers: Value| changed(|body| body["RequestedContent"] = numbers);
    use ResultType::{EncryptionCertificate, SigningCertificate};
    assert_eq!(requested(json!([2, 1])).unwrap().requested, [SigningCertificate, EncryptionCertificate]);
    assert_eq!(requested(json!([1, 2, 1, 2, 2])).unwrap().requested, [EncryptionCertificate, SigningCertificate]);
    refused(requested(json!([])), "RequestedContent is empty");
    refused(requested(json!([1, 3])), "is not served");
    for unknown in [0_i64, -1, 4, 257, 4_294_967_297] {
        refused(requested(json!([1, unknown])), "is not known");
    }
    for wrong in [json!(1.0), json!(1.5), json!("1"), json!(null), json!([1]), json!(1e300), json!(u64::MAX)] {
        refused(requested(json!([wrong])), "invalid");
    }
}

#[test]
fn content_of_other_types_is_not_looked_at() {
    for item in
        [json!("not base64!"), json!(null), json!(1), json!(-1), json!(1.5), json!(true), json!([[]]), json!({"a": {}})]
    {
        for number in [2_i64, 3, 4, 5, 7, 10, 99, -1, i64::MAX] {
            let result = changed(|body| {
                let content = body["ProvidedContent"].as_array_mut().unwrap();
                content.insert(1, json!({ "m_Item1": number, "m_Item2": item }));
            });
            assert_eq!(result.unwrap(), HostKeyRequest::parse(good_body()).unwrap());
        }
    }
}

#[test]
fn a_content_type_twice_is_refused() {
    for number in [1, 8, 9] {
        let result = changed(|body| {
            let content = body["ProvidedContent"].as_array_mut().unwrap();
            let same = content.iter().find(|tuple| tuple["m_Item1"] == number).unwrap().clone();
            content.push(same);
        });
        refused(result, &format!("ProvidedContent {number} is there twice"));
    }
    for number in [2, 99] {
        let result = changed(|body| {
            let content = body["ProvidedContent"].as_array_mut().unwrap();
            content.insert(0, json!({ "m_Item1": number, "m_Item2": "" }));
            content.push(json!({ "m_Item1": number, "m_Item2": "AA==" }));
        });
        refused(result, &format!("ProvidedContent {number} is there twice"));
    }
}

#[test]
fn numbers_of_content_are_integers() {
    for wrong in [json!("8"), json!(8.0), json!(null), json!(1e20)] {
        refused(changed(|body| body["ProvidedContent"][1]["m_Item1"] = wrong), "invalid");
    }
}

#[test]
fn keys_are_judged() {
    let weak = RsaPublicKey::from_components(&[0xff; 128], &[1, 0, 1]).unwrap_err().to_string();
    // The SubjectPublicKeyInfo of a 1024-bit key.
    let spki = {
        let mut spki =
            data_encoding::HEXLOWER.decode(b"30819f300d06092a864886f70d010101050003818d0030818902818100").unwrap();
        spki.extend([0xff; 128]);
        spki.extend([2, 3, 1, 0, 1]);
        BASE64.encode(&spki)
    };
    for (index, name) in [(0, "VirtualSecureModeIdentityKey"), (1, "HostKeyPublicKey")] {
        let with = |item: &str| changed(|body| body["ProvidedContent"][index]["m_Item2"] = json!(item));
        refused(with(&spki), &format!("{name}: {weak}"));
        refused(with(""), &format!("{name}: the key is in none of the accepted formats"));
        let longer = [key(1).public().spki_der(), &[0]].concat();
        refused(with(&BASE64.encode(&longer)), &format!("{name}: there are octets after the key"));
    }
}

#[test]
fn objects_are_objects_and_arrays_arrays() {
    for text in ["", " ", "null", "1", "\"x\"", "[]", "{", "{}", "{}{}", "[{}]", "\u{feff}{}", "{\"SessionId\":}"] {
        assert!(HostKeyRequest::parse(text.as_bytes()).is_err(), "{text}");
    }
    // serde accepts arrays for structs; the protocol does not.
    let body = good();
    let list = json!([body["__type"], body["SessionId"], body["RequestedContent"], body["ProvidedContent"]]);
    refused(parse(&list), "expected an object");
    let tuple = body["ProvidedContent"][0].clone();
    let tuple = json!([tuple["m_Item1"], tuple["m_Item2"]]);
    refused(changed(|body| body["ProvidedContent"][0] = tuple), "expected an object");
}

#[test]
fn nothing_follows_the_value() {
    let text = std::str::from_utf8(good_body()).unwrap();
    assert!(HostKeyRequest::parse(format!(" \r\n\t{text} \n").as_bytes()).is_ok());
    for tail in ["x", "{}", ",", "\0", "null", "]"] {
        assert!(HostKeyRequest::parse(format!("{text}{tail}").as_bytes()).is_err(), "{tail}");
    }
}

#[test]
fn text_is_utf_8() {
    let text = std::str::from_utf8(good_body()).unwrap();
    let mut octets = text.replacen("{", "{\"x\":\"y\",", 1).into_bytes();
    assert!(HostKeyRequest::parse(&octets).is_ok());
    octets[6] = 0xff;
    refused(HostKeyRequest::parse(&octets).map_err(|e| e.to_string()), "UTF-8");
    let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    refused(HostKeyRequest::parse(&wide).map_err(|e| e.to_string()), "UTF-16");
}

#[test]
fn a_byte_order_mark_may_stand_before_requests_and_replies() {
    let marked = |body: &[u8]| [b"\xef\xbb\xbf", body].concat();
    assert_eq!(HostKeyRequest::parse(&marked(good_body())), HostKeyRequest::parse(good_body()));
    assert!(HostKeyRequest::parse(&marked(&marked(good_body()))).is_err(), "one is enough");
    let reply = HealthCertificateReply { content: vec![(ResultType::EncryptionCertificate, vec![1, 2, 3])] };
    assert_eq!(parse_health_certificate_reply(&marked(&reply.to_json())).unwrap(), [(1, vec![1, 2, 3])]);
}

#[test]
fn a_member_twice_is_refused_at_any_level() {
    let extra = |member: &str| text_with("{", &format!("{{{member},"));
    assert!(extra(r#""Unknown":{"a":1,"b":{"a":[{"c":1},{"c":1}]}}"#).is_ok());
    refused(extra(r#""SessionId":"BwcHBwcHBwcHBwcHBwcHBw==""#), r#"member "SessionId" is there twice"#);
    refused(extra(r#""\u0053essionId":"BwcHBwcHBwcHBwcHBwcHBw==""#), r#"member "SessionId" is there twice"#);
    refused(extra(r#""x":1,"x":1"#), r#"member "x" is there twice"#);
    refused(extra(r#""x":1,"y":2,"\u0078":1"#), r#"member "x" is there twice"#);
    refused(extra(r#""x":[[{"y":1,"y":2}]]"#), r#"member "y" is there twice"#);
    refused(extra(r#""x":{"":{},"":{}}"#), r#"member "" is there twice"#);
    refused(text_with(r#""m_Item1":8"#, r#""m_Item1":8,"m_Item1":8"#), r#"member "m_Item1" is there twice"#);
    // Names are case-sensitive, and an error text does not repeat a long name completely.
    assert!(extra(r#""sessionid":1,"__TYPE":2"#).is_ok());
    let long = "n".repeat(10_000);
    refused(extra(&format!(r#""{long}":1,"{long}":1"#)), "nnn");
}

#[test]
fn depth_is_counted_from_the_root() {
    // The root has level 1, so a member may contain 31 more levels.
    let nested = |levels: usize| format!(r#"{{"x":{}{},"#, "[".repeat(levels), "]".repeat(levels));
    assert!(text_with("{", &nested(31)).is_ok());
    refused(text_with("{", &nested(32)), "nested deeper than 32 levels");
    let nested = |levels: usize| format!(r#"{{"x":{}1{},"#, r#"{"y":"#.repeat(levels), "}".repeat(levels));
    assert!(text_with("{", &nested(31)).is_ok());
    refused(text_with("{", &nested(32)), "nested deeper than 32 levels");
    for bomb in ["[", "{\"a\":", "[{\"a\":"] {
        let result = HostKeyRequest::parse(bomb.repeat(1 << 18).as_bytes());
        refused(result.map_err(|e| e.to_string()), "nested deeper than 32 levels");
    }
}

#[test]
fn a_megabyte_of_rubbish_is_refused() {
    let members: String = (0..80_000).map(|number| format!("\"{number}\":[],")).collect();
    for text in [
        "a".repeat(1 << 20),
        "\"".repeat(1 << 20),
        " ".repeat(1 << 20),
        format!("[{}1]", "1,".repeat(1 << 19)),
        format!("{{\"RequestedContent\":[{}1]}}", "1,".repeat(1 << 19)),
        format!("{{\"SessionId\":\"{}\"}}", "A".repeat(1 << 20)),
        format!("{{\"__type\":\"{}\"}}", "A".repeat(1 << 20)),
        format!("{{{members}\"x\":1}}"),
        format!("{{\"ProvidedContent\":[{}{{\"m_Item1\":1}}]}}", "{\"m_Item1\":2},".repeat(70_000)),
    ] {
        let result = HostKeyRequest::parse(text.as_bytes()).map_err(|e| e.to_string());
        refused(result, "");
    }
}

#[test]
fn replies_start_with_their_type() {
    let reply = HealthCertificateReply {
        content: vec![
            (ResultType::EncryptionCertificate, b"one".to_vec()),
            (ResultType::SigningCertificate, b"two".to_vec()),
        ],
    };
    let body = reply.to_json();
    assert_eq!(
        std::str::from_utf8(&body).unwrap(),
        r##"{"__type":"HealthCertificateReply:#Microsoft.Windows.RemoteAttestation.Core","Content":[{"m_Item1":1,"m_Item2":"b25l"},{"m_Item1":2,"m_Item2":"dHdv"}]}"##
    );
    assert_eq!(parse_health_certificate_reply(&body).unwrap(), [(1, b"one".to_vec()), (2, b"two".to_vec())]);

    let info = ServiceInfoReply::new(OperationMode::HostKey);
    let body = info.to_json();
    assert_eq!(
        std::str::from_utf8(&body).unwrap(),
        r##"{"__type":"ServiceInfoReply:#Microsoft.Windows.RemoteAttestation.Core","FunctionalLevel":2,"OperationMode":3,"SupportedFunctionalLevels":[1,2]}"##
    );
    assert_eq!(ServiceInfoReply::parse(&body).unwrap(), info);

    for wrong in [&b"{}"[..], b"[]", b"\xff", b"", &reply.to_json()[1..], &ErrorReply::Payload.to_json("no")] {
        assert!(parse_health_certificate_reply(wrong).is_err());
        assert!(ServiceInfoReply::parse(wrong).is_err());
    }
    assert!(ServiceInfoReply::parse(&reply.to_json()).is_err());
    let bad = String::from_utf8(reply.to_json()).unwrap().replace("b25l", "b25");
    assert!(parse_health_certificate_reply(bad.as_bytes()).is_err());
}

#[test]
fn errors_say_what_the_page_says() {
    let reasons = vec![PolicyReason { result: false, reason: "AAAAAAAAAAAAAAAAAAAAAA==".to_owned() }];
    let expected = OperationMode::HostKey;
    for (reply, name, status, retryable) in [
        (ErrorReply::Error { status: 404 }, "ErrorReply", 404, false),
        (ErrorReply::Error { status: 413 }, "ErrorReply", 413, false),
        (ErrorReply::Error { status: 429 }, "ErrorReply", 429, true),
        (ErrorReply::Unauthorized, "UnauthorizedErrorReply", 403, false),
        (ErrorReply::Payload, "PayloadErrorReply", 400, false),
        (ErrorReply::OperationMode { expected }, "OperationModeErrorReply", 409, true),
        (ErrorReply::PolicyEvaluation { reasons: reasons.clone() }, "PolicyEvaluationErrorReply", 403, false),
        (ErrorReply::VirtualSecureMode, "VirtualSecureModeErrorReply", 403, false),
        (ErrorReply::Rtpm { retryable: false }, "RtpmErrorReply", 403, false),
        (ErrorReply::Rtpm { retryable: true }, "RtpmErrorReply", 403, true),
        (ErrorReply::TcgLogValidation, "TcgLogValidationErrorReply", 403, false),
        (ErrorReply::Unavailable, "UnavailableErrorReply", 503, true),
    ] {
        assert_eq!((reply.status(), reply.retryable()), (status, retryable), "{name}");
        let body = reply.to_json("a \"word\"");
        let start =
            format!(r##"{{"__type":"{name}:#Microsoft.Windows.RemoteAttestation.Core","Retryable":{retryable},"##);
        assert!(body.starts_with(start.as_bytes()), "{}", String::from_utf8_lossy(&body));
        let received = parse_error_reply(&body).unwrap();
        assert_eq!((received.name.as_str(), received.retryable), (name, retryable));
        assert_eq!(received.message.as_deref(), Some("a \"word\""));
        let mode = matches!(reply, ErrorReply::OperationMode { .. }).then_some(3);
        assert_eq!(received.expected_operation_mode, mode);
        let given = if matches!(reply, ErrorReply::PolicyEvaluation { .. }) { &reasons[..] } else { &[] };
        assert_eq!(received.reasons, given);
    }
    let foreign = br##"{"__type":"RtpmErrorReply:#Microsoft.Windows.RemoteAttestation.Core","Retryable":true}"##;
    assert_eq!(parse_error_reply(foreign).unwrap().message, None);
    for wrong in [&b"{}"[..], b"[]", b"<html>", br#"{"__type":"ErrorReply","Retryable":true}"#] {
        assert!(parse_error_reply(wrong).is_err());
    }
    assert!(parse_error_reply(&ServiceInfoReply::new(expected).to_json()).is_err());
}

fn certificate() -> &'static [u8] {
    static DER: OnceLock<Vec<u8>> = OnceLock::new();
    DER.get_or_init(|| {
        let template = health::signer_template(key(0).public(), 0, 1_000_000).unwrap();
        let signer = template.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        let signer = Certificate::parse(&signer).unwrap();
        let what = ResultType::EncryptionCertificate;
        let to_be_signed = health::issue(&signer, "host", key(0).public(), key(1).public(), what, 1000).unwrap();
        to_be_signed.sign_with(key(0)).unwrap()
    })
}

/// Calls every parser of external data.
fn read_everything(octets: &[u8]) {
    let _ = HostKeyRequest::parse(octets);
    let _ = parse_health_certificate_reply(octets);
    let _ = parse_error_reply(octets);
    let _ = ServiceInfoReply::parse(octets);
    let _ = RsaPublicKey::from_any(octets);
    let _ = RsaPublicKey::from_file(octets);
    let _ = RsaPrivateKey::from_pkcs8_der(octets);
    if let Ok(text) = std::str::from_utf8(octets) {
        let _ = Certificate::from_pem(text);
        let _ = RsaPrivateKey::from_pkcs8_pem(text);
    }
    if let Ok(certificate) = Certificate::parse(octets) {
        let _ = certificate.verify_signed_by(key(0).public());
        let _ = certificate.key().encrypt_oaep(
            claviger_protocol::algorithm::Oaep {
                digest: claviger_protocol::algorithm::Digest::Sha256,
                mgf: claviger_protocol::algorithm::Digest::Sha256,
            },
            b"x",
        );
        let _ = health::check(octets, std::slice::from_ref(&certificate), 1000);
        let _ = Certificate::from_pem(&certificate.to_pem()).unwrap();
    }
    let _ = key(0).decrypt_oaep(
        claviger_protocol::algorithm::Oaep {
            digest: claviger_protocol::algorithm::Digest::Sha256,
            mgf: claviger_protocol::algorithm::Digest::Sha1,
        },
        octets,
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..600)) {
        read_everything(&octets);
    }

    #[test]
    fn changed_octets_never_panic(
        form in 0_usize..6,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut octets = match form {
            0 => good_body().to_vec(),
            1 => certificate().to_vec(),
            2 => key(0).public().spki_der().to_vec(),
            3 => key(0).public().to_bcrypt_blob(),
            4 => key(0).to_pkcs8_der().to_vec(),
            _ => Certificate::parse(certificate()).unwrap().to_pem().into_bytes(),
        };
        for (index, value) in changes {
            let at = index.index(octets.len());
            octets[at] = value;
        }
        if let Some(cut) = cut {
            octets.truncate(cut.index(octets.len()));
        }
        read_everything(&octets);
    }

    #[test]
    fn json_like_text_never_panics(text in r#"([\[\]{}:,0-9"eE.\-]|null|true|"m_Item1"|"SessionId"|\\u00){0,200}"#) {
        read_everything(text.as_bytes());
    }

    #[test]
    fn no_changed_health_certificate_is_accepted(at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let template = health::signer_template(key(0).public(), 0, 1_000_000).unwrap();
        let signer = template.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        let signer = [Certificate::parse(&signer).unwrap()];
        prop_assert!(health::check(certificate(), &signer, 1000).is_ok());
        let mut changed = certificate().to_vec();
        let at = at.index(changed.len());
        changed[at] ^= flip;
        prop_assert!(health::check(&changed, &signer, 1000).is_err());
    }
}

#[test]
fn result_types_have_the_pages_numbers() {
    assert_eq!(attestation::ResultType::EncryptionCertificate.number(), 1);
    assert_eq!(attestation::ResultType::SigningCertificate.number(), 2);
}
