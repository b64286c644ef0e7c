//! The messages of attestation [MS-HGSA]: JSON for servers and clients, in host-key mode and TPM mode.

mod strict;
pub mod tpm;

use std::borrow::Cow;

use data_encoding::BASE64;
use serde::{Deserialize, Serialize};

use crate::algorithm::{SignatureAlgorithm, SignatureDigest};
use crate::encoding;
pub use crate::health::ResultType;
use crate::pem::{self, TextError};
use crate::rsa_key::{BadSignature, RsaPublicKey};
use strict::{Item, Object};

/// Suffix of every `__type`.
const TYPE_SUFFIX: &str = ":#Microsoft.Windows.RemoteAttestation.Core";
const REQUEST: &str = "AttestationRequest";
const HEALTH_CERTIFICATE_REPLY: &str = "HealthCertificateReply";
const SERVICE_INFO_REPLY: &str = "ServiceInfoReply";

/// The content types of `ProvidedContent` that this service reads. The first is used in both modes, the next ones in
/// TPM mode, the last ones in host-key mode.
const IDENTITY_KEY: i64 = 1;
const RTPM_CONTEXT: i64 = 2;
const ENDORSEMENT_KEY: i64 = 4;
const HOST_KEY: i64 = 8;
const HOST_KEY_SIGNATURE: i64 = 9;

/// The modes of attestation, with their numbers on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OperationMode {
    /// 1: the host proves itself with its TPM.
    Tpm = 1,
    /// 2: the host is a member of an Active Directory group. Microsoft has deprecated this mode.
    ActiveDirectory = 2,
    /// 3: the host proves itself with a registered host key.
    HostKey = 3,
}

/// A request that is invalid for any sender. The text is the message of the `PayloadErrorReply`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct PayloadError(pub String);

/// An `AttestationRequest` in host-key mode. Its keys are strong enough; its signature is not verified yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostKeyRequest {
    /// The session's GUID, the bytes exactly as sent.
    pub session_id: [u8; 16],
    /// The requested certificates in the order of the request, without duplicates.
    pub requested: Vec<ResultType>,
    /// The host key's bytes exactly as sent: the signature covers them.
    pub host_key_octets: Vec<u8>,
    /// The identity key's bytes exactly as sent: the signature covers them.
    pub identity_key_octets: Vec<u8>,
    /// The host key's signature.
    pub signature: Vec<u8>,
    /// The host key.
    pub host_key: RsaPublicKey,
    /// The identity key that the host wants certified.
    pub identity_key: RsaPublicKey,
}

#[derive(Deserialize)]
struct RequestBody<'a> {
    #[serde(rename = "__type", default, deserialize_with = "strict::present")]
    type_name: Option<String>,
    #[serde(rename = "SessionId", borrow)]
    session_id: Cow<'a, str>,
    #[serde(rename = "RequestedContent")]
    requested: Vec<i64>,
    #[serde(rename = "ProvidedContent", borrow)]
    provided: Vec<Object<Tuple<'a>>>,
}

/// A tuple of a request. Its type decides whether the item is read at all.
#[derive(Deserialize)]
struct Tuple<'a> {
    #[serde(rename = "m_Item1")]
    content_type: i64,
    #[serde(rename = "m_Item2", borrow, default)]
    item: Item<'a>,
}

/// The part that requests of both modes have in common, with a valid structure.
struct Envelope<'a> {
    session_id: [u8; 16],
    requested: Vec<ResultType>,
    /// One tuple for each type.
    provided: Vec<Object<Tuple<'a>>>,
}

impl<'a> Envelope<'a> {
    fn parse(body: &'a [u8]) -> Result<Self, PayloadError> {
        let text = utf8(body).map_err(|problem| refuse(format!("the request is {problem}")))?;
        strict::check(text).map_err(|e| refuse_json(&e))?;
        let Object(body) = serde_json::from_str::<Object<RequestBody<'_>>>(text).map_err(|e| refuse_json(&e))?;
        if body.type_name.is_some_and(|name| name.strip_suffix(TYPE_SUFFIX) != Some(REQUEST)) {
            return Err(refuse(format!("__type is not {REQUEST}{TYPE_SUFFIX}")));
        }
        let session_id = base64(&body.session_id, "SessionId")?;
        let session_id = session_id.try_into().map_err(|_| refuse("SessionId is not 16 octets long"))?;

        let mut requested = Vec::new();
        for number in body.requested {
            let result_type = match number {
                1 => ResultType::EncryptionCertificate,
                2 => ResultType::SigningCertificate,
                3 => return Err(refuse("RequestedContent 3 (CA certificate) is not served")),
                _ => return Err(refuse(format!("RequestedContent {number} is not known"))),
            };
            if !requested.contains(&result_type) {
                requested.push(result_type);
            }
        }
        if requested.is_empty() {
            return Err(refuse("RequestedContent is empty"));
        }

        let mut provided = body.provided;
        provided.sort_by_key(|tuple| tuple.0.content_type);
        for pair in provided.windows(2) {
            if let [first, second] = pair
                && first.0.content_type == second.0.content_type
            {
                return Err(refuse(format!("ProvidedContent {} is there twice", first.0.content_type)));
            }
        }
        Ok(Self { session_id, requested, provided })
    }

    /// The bytes of the content of this type.
    fn content(&self, content_type: i64, name: &str) -> Result<Vec<u8>, PayloadError> {
        let tuple = self.provided.iter().find(|tuple| tuple.0.content_type == content_type);
        match tuple.map(|tuple| &tuple.0.item) {
            Some(Item::Text(text)) => base64(text, name),
            Some(Item::Other) => Err(refuse(format!("{name} is not a string"))),
            None => Err(refuse(format!("ProvidedContent lacks {content_type} ({name})"))),
        }
    }
}

/// Parses a key in any of the forms that hosts send.
fn any_key(octets: &[u8], name: &str) -> Result<RsaPublicKey, PayloadError> {
    RsaPublicKey::from_any(octets).map_err(|e| refuse(format!("{name}: {e}")))
}

impl HostKeyRequest {
    /// Parses the body of a request.
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn parse(body: &[u8]) -> Result<Self, PayloadError> {
        let envelope = Envelope::parse(body)?;
        let host_key_octets = envelope.content(HOST_KEY, "HostKeyPublicKey")?;
        let identity_key_octets = envelope.content(IDENTITY_KEY, "VirtualSecureModeIdentityKey")?;
        let signature = envelope.content(HOST_KEY_SIGNATURE, "HostKeySignature")?;
        Ok(Self {
            session_id: envelope.session_id,
            requested: envelope.requested,
            host_key: any_key(&host_key_octets, "HostKeyPublicKey")?,
            identity_key: any_key(&identity_key_octets, "VirtualSecureModeIdentityKey")?,
            host_key_octets,
            identity_key_octets,
            signature,
        })
    }

    /// The bytes that the host key signs: host key, then identity key, exactly as sent.
    #[must_use]
    pub fn signed_octets(&self) -> Vec<u8> {
        signed_octets(&self.host_key_octets, &self.identity_key_octets)
    }

    /// Verifies that the host key signed both keys. The caller has to check that the host key is registered.
    ///
    /// # Errors
    /// [`BadSignature`].
    pub fn verify_signature(&self) -> Result<(), BadSignature> {
        let algorithm = SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256);
        self.host_key.verify(algorithm, &self.signed_octets(), &self.signature)
    }
}

/// The bytes that a host signs with its host key (RSASSA-PKCS1-v1_5, SHA-256) before its request: both keys, exactly as
/// it will send them.
#[must_use]
pub fn signed_octets(host_key_octets: &[u8], identity_key_octets: &[u8]) -> Vec<u8> {
    [host_key_octets, identity_key_octets].concat()
}

/// Writes the body of a host's request in host-key mode. [`RsaPublicKey::from_any`] must be able to read the keys.
#[must_use]
pub fn host_key_request(
    session_id: [u8; 16],
    requested: &[ResultType],
    host_key_octets: &[u8],
    identity_key_octets: &[u8],
    signature: &[u8],
) -> Vec<u8> {
    let provided = [(IDENTITY_KEY, identity_key_octets), (HOST_KEY, host_key_octets), (HOST_KEY_SIGNATURE, signature)];
    request(session_id, requested, &provided)
}

/// Writes the body of an `AttestationRequest` with this content.
fn request(session_id: [u8; 16], requested: &[ResultType], provided: &[(i64, &[u8])]) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Body {
        #[serde(rename = "__type")]
        type_name: String,
        session_id: String,
        requested_content: Vec<u32>,
        provided_content: Vec<TupleOut<i64>>,
    }
    json(&Body {
        type_name: type_name(REQUEST),
        session_id: BASE64.encode(&session_id),
        requested_content: requested.iter().map(|result_type| result_type.number()).collect(),
        provided_content: provided.iter().map(|(number, octets)| TupleOut::new(*number, octets)).collect(),
    })
}

#[derive(Serialize)]
struct TupleOut<N> {
    #[serde(rename = "m_Item1")]
    number: N,
    #[serde(rename = "m_Item2")]
    octets: String,
}

impl<N> TupleOut<N> {
    fn new(number: N, octets: &[u8]) -> Self {
        Self { number, octets: BASE64.encode(octets) }
    }
}

/// The reply to a successful request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCertificateReply {
    /// The certificates in DER, with their kinds.
    pub content: Vec<(ResultType, Vec<u8>)>,
}

impl HealthCertificateReply {
    /// The body of the reply.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Body {
            #[serde(rename = "__type")]
            type_name: String,
            content: Vec<TupleOut<u32>>,
        }
        json(&Body {
            type_name: type_name(HEALTH_CERTIFICATE_REPLY),
            content: self.content.iter().map(|(what, der)| TupleOut::new(what.number(), der)).collect(),
        })
    }
}

/// A reply that cannot be parsed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the attestation server's reply cannot be read: {0}")]
pub struct ReplyError(pub String);

/// Parses a `HealthCertificateReply`: result types and DER certificates, in the order of the reply. The certificates
/// are not validated.
///
/// # Errors
/// [`ReplyError`].
pub fn parse_health_certificate_reply(body: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, ReplyError> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(rename = "__type")]
        type_name: String,
        #[serde(rename = "Content", borrow)]
        content: Vec<Object<ReplyTuple<'a>>>,
    }
    #[derive(Deserialize)]
    struct ReplyTuple<'a> {
        #[serde(rename = "m_Item1")]
        result_type: u32,
        #[serde(rename = "m_Item2", borrow)]
        certificate: Cow<'a, str>,
    }
    let Object(body): Object<Body<'_>> = reply(body)?;
    if body.type_name.strip_suffix(TYPE_SUFFIX) != Some(HEALTH_CERTIFICATE_REPLY) {
        return Err(ReplyError(clip(&format!("its __type is {}", body.type_name))));
    }
    let decode = |Object(tuple): &Object<ReplyTuple<'_>>| {
        let der = base64(&tuple.certificate, "a certificate").map_err(|PayloadError(message)| ReplyError(message))?;
        Ok((tuple.result_type, der))
    };
    body.content.iter().map(decode).collect()
}

/// The reply of `getinfo`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceInfoReply {
    /// The version of the protocol in use.
    pub functional_level: u32,
    /// The number of the [`OperationMode`].
    pub operation_mode: u8,
    /// The protocol versions that the server supports.
    pub supported_functional_levels: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceInfoBody {
    #[serde(rename = "__type")]
    type_name: String,
    functional_level: u32,
    operation_mode: u8,
    supported_functional_levels: Vec<u32>,
}

impl ServiceInfoReply {
    /// The reply of this version of the server.
    #[must_use]
    pub fn new(mode: OperationMode) -> Self {
        Self { functional_level: 2, operation_mode: mode as u8, supported_functional_levels: vec![1, 2] }
    }

    /// The body of the reply.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        json(&ServiceInfoBody {
            type_name: type_name(SERVICE_INFO_REPLY),
            functional_level: self.functional_level,
            operation_mode: self.operation_mode,
            supported_functional_levels: self.supported_functional_levels.clone(),
        })
    }

    /// Parses the body of a reply.
    ///
    /// # Errors
    /// [`ReplyError`].
    pub fn parse(body: &[u8]) -> Result<Self, ReplyError> {
        let Object(body): Object<ServiceInfoBody> = reply(body)?;
        if body.type_name.strip_suffix(TYPE_SUFFIX) != Some(SERVICE_INFO_REPLY) {
            return Err(ReplyError(clip(&format!("its __type is {}", body.type_name))));
        }
        Ok(Self {
            functional_level: body.functional_level,
            operation_mode: body.operation_mode,
            supported_functional_levels: body.supported_functional_levels,
        })
    }
}

/// A policy that refused a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PolicyReason {
    /// The policy's verdict: `false` if it refused the host.
    pub result: bool,
    /// The policy: base64 of a GUID's 16 bytes [MS-HGSA 2.2.2.13].
    pub reason: String,
}

/// The reply to a request that was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ErrorReply {
    /// The request did not reach attestation: for example an unknown path, or a body that is too large.
    Error {
        /// The HTTP status.
        status: u16,
    },
    /// The host is not registered, or did not prove its identity.
    Unauthorized,
    /// The request cannot be parsed.
    Payload,
    /// The endpoint belongs to another mode than the current one.
    OperationMode {
        /// The current mode.
        expected: OperationMode,
    },
    /// A policy refused the host.
    PolicyEvaluation {
        /// The policies that refused the host.
        reasons: Vec<PolicyReason>,
    },
    /// The host's virtual secure mode is not acceptable.
    VirtualSecureMode,
    /// The host's TPM context is not acceptable.
    Rtpm {
        /// Whether the State caused the refusal: then the host may start again with step 1.
        retryable: bool,
    },
    /// The host's TCG log is not acceptable.
    TcgLogValidation,
    /// The service is temporarily unable to answer.
    Unavailable,
}

impl ErrorReply {
    /// The HTTP status of the reply.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Error { status } => *status,
            Self::Payload => 400,
            Self::Unauthorized
            | Self::PolicyEvaluation { .. }
            | Self::VirtualSecureMode
            | Self::Rtpm { .. }
            | Self::TcgLogValidation => 403,
            Self::OperationMode { .. } => 409,
            Self::Unavailable => 503,
        }
    }

    /// Whether the same request may succeed later. `OperationMode` counts as retryable, because only then a client
    /// changes its mode and tries again [MS-HGSA 3.2.5.4].
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(self, Self::OperationMode { .. } | Self::Rtpm { retryable: true })
            || matches!(self.status(), 408 | 429 | 500..)
    }

    /// The name of the reply's type, without the common suffix.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Error { .. } => "ErrorReply",
            Self::Unauthorized => "UnauthorizedErrorReply",
            Self::Payload => "PayloadErrorReply",
            Self::OperationMode { .. } => "OperationModeErrorReply",
            Self::PolicyEvaluation { .. } => "PolicyEvaluationErrorReply",
            Self::VirtualSecureMode => "VirtualSecureModeErrorReply",
            Self::Rtpm { .. } => "RtpmErrorReply",
            Self::TcgLogValidation => "TcgLogValidationErrorReply",
            Self::Unavailable => "UnavailableErrorReply",
        }
    }

    /// The body of the reply. `message` is a text for people.
    #[must_use]
    pub fn to_json(&self, message: &str) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Body<'a> {
            #[serde(rename = "__type")]
            type_name: String,
            retryable: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            expected_operation_mode: Option<u8>,
            #[serde(skip_serializing_if = "Option::is_none")]
            reasons: Option<&'a [PolicyReason]>,
            message: &'a str,
        }
        json(&Body {
            type_name: type_name(self.name()),
            retryable: self.retryable(),
            expected_operation_mode: match self {
                Self::OperationMode { expected } => Some(*expected as u8),
                _ => None,
            },
            reasons: match self {
                Self::PolicyEvaluation { reasons } => Some(reasons),
                _ => None,
            },
            message,
        })
    }
}

/// The parts of an error reply that a client reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReceivedError {
    /// The name of its type without the common suffix, for example `UnauthorizedErrorReply`.
    pub name: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// A text for people. Servers other than Claviger may omit it.
    pub message: Option<String>,
    /// The server's mode, in an `OperationModeErrorReply`.
    pub expected_operation_mode: Option<u8>,
    /// The reasons in a `PolicyEvaluationErrorReply`.
    pub reasons: Vec<PolicyReason>,
}

/// Parses an error reply.
///
/// # Errors
/// [`ReplyError`].
pub fn parse_error_reply(body: &[u8]) -> Result<ReceivedError, ReplyError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Body {
        #[serde(rename = "__type")]
        type_name: String,
        retryable: bool,
        message: Option<String>,
        expected_operation_mode: Option<u8>,
        #[serde(default)]
        reasons: Vec<Object<PolicyReason>>,
    }
    let Object(body): Object<Body> = reply(body)?;
    match body.type_name.strip_suffix(TYPE_SUFFIX) {
        Some(name) if name.ends_with("ErrorReply") => Ok(ReceivedError {
            name: name.to_owned(),
            retryable: body.retryable,
            message: body.message,
            expected_operation_mode: body.expected_operation_mode,
            reasons: body.reasons.into_iter().map(|reason| reason.0).collect(),
        }),
        _ => Err(ReplyError(clip(&format!("its __type is {}", body.type_name)))),
    }
}

fn type_name(name: &str) -> String {
    [name, TYPE_SUFFIX].concat()
}

/// Serialises a body. The bodies above consist of strings and numbers, for which serde_json cannot fail.
fn json<T: Serialize>(body: &T) -> Vec<u8> {
    serde_json::to_vec(body).unwrap_or_default()
}

/// The text of a body. Some clients put a byte-order mark in front; it is removed.
fn utf8(body: &[u8]) -> Result<&str, &'static str> {
    pem::text(body).map_err(|error| match error {
        TextError::Utf16 => "UTF-16, not UTF-8",
        TextError::NotUtf8 | TextError::Nul => "not UTF-8",
    })
}

fn reply<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ReplyError> {
    let text = utf8(body).map_err(|problem| ReplyError(format!("it is {problem}")))?;
    strict::check(text).and_then(|()| serde_json::from_str(text)).map_err(|e| ReplyError(clip(&e.to_string())))
}

fn base64(text: &str, name: &str) -> Result<Vec<u8>, PayloadError> {
    encoding::strict_base64(text.as_bytes()).ok_or_else(|| refuse(format!("{name} is not base64")))
}

fn refuse(message: impl Into<String>) -> PayloadError {
    PayloadError(message.into())
}

fn refuse_json(error: &serde_json::Error) -> PayloadError {
    PayloadError(clip(&error.to_string()))
}

/// Shortens a message that may quote data from the other side.
fn clip(message: &str) -> String {
    const LONGEST: usize = 200;
    match message.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
        None => message.to_owned(),
    }
}
