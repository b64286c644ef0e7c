//! Attestation's messages [MS-HGSA]: JSON, for the server and for its clients, in host-key mode and in TPM mode.

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
pub use strict::MAX_DEPTH;
use strict::{Item, Object};

/// What every `__type` ends in.
const TYPE_SUFFIX: &str = ":#Microsoft.Windows.RemoteAttestation.Core";
const REQUEST: &str = "AttestationRequest";
const HEALTH_CERTIFICATE_REPLY: &str = "HealthCertificateReply";
const SERVICE_INFO_REPLY: &str = "ServiceInfoReply";

/// Content types of `ProvidedContent` that are read: the first in both modes, then those of TPM mode and of host-key mode.
const IDENTITY_KEY: i64 = 1;
const RTPM_CONTEXT: i64 = 2;
const ENDORSEMENT_KEY: i64 = 4;
const HOST_KEY: i64 = 8;
const HOST_KEY_SIGNATURE: i64 = 9;

/// How hosts prove themselves, by its number on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OperationMode {
    /// 1: by a TPM.
    Tpm = 1,
    /// 2: by membership in an Active Directory group. Deprecated by its maker.
    ActiveDirectory = 2,
    /// 3: by a registered host key.
    HostKey = 3,
}

/// A request that cannot be answered whoever sent it: what its `PayloadErrorReply` says to an honest caller.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct PayloadError(pub String);

/// An `AttestationRequest` in host-key mode. Its keys are of accepted strength; its signature is not checked yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostKeyRequest {
    /// The session's GUID, its octets as sent.
    pub session_id: [u8; 16],
    /// What is to be certified, in the order of the request, each once.
    pub requested: Vec<ResultType>,
    /// The host key's octets as sent: they are part of what is signed.
    pub host_key_octets: Vec<u8>,
    /// The identity key's octets as sent: they are part of what is signed.
    pub identity_key_octets: Vec<u8>,
    /// The host key's signature.
    pub signature: Vec<u8>,
    /// The host key.
    pub host_key: RsaPublicKey,
    /// The identity key, which is to be certified.
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

/// A tuple of a request: the type decides whether the item is looked at at all.
#[derive(Deserialize)]
struct Tuple<'a> {
    #[serde(rename = "m_Item1")]
    content_type: i64,
    #[serde(rename = "m_Item2", borrow, default)]
    item: Item<'a>,
}

/// What the requests of both modes have in common: their form is right.
struct Envelope<'a> {
    session_id: [u8; 16],
    requested: Vec<ResultType>,
    /// By their types, each of which is there once.
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

    /// The octets of the content of this type.
    fn content(&self, content_type: i64, name: &str) -> Result<Vec<u8>, PayloadError> {
        let tuple = self.provided.iter().find(|tuple| tuple.0.content_type == content_type);
        match tuple.map(|tuple| &tuple.0.item) {
            Some(Item::Text(text)) => base64(text, name),
            Some(Item::Other) => Err(refuse(format!("{name} is not a string"))),
            None => Err(refuse(format!("ProvidedContent lacks {content_type} ({name})"))),
        }
    }
}

/// A key in any of the forms that hosts send.
fn any_key(octets: &[u8], name: &str) -> Result<RsaPublicKey, PayloadError> {
    RsaPublicKey::from_any(octets).map_err(|e| refuse(format!("{name}: {e}")))
}

impl HostKeyRequest {
    /// Reads the body of a request.
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

    /// What the host key signs: the two keys' octets as sent, host key first.
    #[must_use]
    pub fn signed_octets(&self) -> Vec<u8> {
        signed_octets(&self.host_key_octets, &self.identity_key_octets)
    }

    /// Checks that the host key signed both keys. Whether it is a registered one is the caller's to check.
    ///
    /// # Errors
    /// [`BadSignature`].
    pub fn verify_signature(&self) -> Result<(), BadSignature> {
        let algorithm = SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256);
        self.host_key.verify(algorithm, &self.signed_octets(), &self.signature)
    }
}

/// What a host signs with its host key (RSASSA-PKCS1-v1_5, SHA-256) before it asks: both keys' octets as it sends them.
#[must_use]
pub fn signed_octets(host_key_octets: &[u8], identity_key_octets: &[u8]) -> Vec<u8> {
    [host_key_octets, identity_key_octets].concat()
}

/// The body of a host's request in host-key mode. The keys are octets that [`RsaPublicKey::from_any`] reads.
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

/// The body of an `AttestationRequest` with this content.
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

/// The answer to a request that was granted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCertificateReply {
    /// Each certificate's DER and what it is.
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

/// A reply that is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the attestation server's reply cannot be read: {0}")]
pub struct ReplyError(pub String);

/// Reads a `HealthCertificateReply`: result types and DER certificates, in the order of the reply. They are not judged.
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

/// What `getinfo` answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceInfoReply {
    /// The version of the protocol in use.
    pub functional_level: u32,
    /// See [`OperationMode`].
    pub operation_mode: u8,
    /// The versions of the protocol that could be in use.
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
    /// What a server of this version answers.
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

    /// Reads the body of a reply.
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

/// One reason why a policy refused a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PolicyReason {
    /// The policy's verdict; `false` where it refused the host.
    pub result: bool,
    /// Which policy: base64 of a GUID's 16 bytes [MS-HGSA 2.2.2.13].
    pub reason: String,
}

/// A request that was not granted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ErrorReply {
    /// The request never reached attestation: no such path, a body too large, and so on.
    Error {
        /// The HTTP status that says so.
        status: u16,
    },
    /// The host is not registered, or did not prove that it is the one it says.
    Unauthorized,
    /// The request cannot be understood.
    Payload,
    /// The endpoint is for another mode than the one in use.
    OperationMode {
        /// The mode in use.
        expected: OperationMode,
    },
    /// A policy refused the host.
    PolicyEvaluation {
        /// Which and why.
        reasons: Vec<PolicyReason>,
    },
    /// The host's virtual secure mode is not acceptable.
    VirtualSecureMode,
    /// The host's TPM context is not acceptable.
    Rtpm {
        /// Whether the State is at fault: the host may begin again.
        retryable: bool,
    },
    /// The host's TCG log is not acceptable.
    TcgLogValidation,
    /// The service cannot answer now.
    Unavailable,
}

impl ErrorReply {
    /// The HTTP status to send it with.
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

    /// Whether the same request may succeed later. A wrong mode counts: a client changes its mode, and asks again, only
    /// then [MS-HGSA 3.2.5.4].
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(self, Self::OperationMode { .. } | Self::Rtpm { retryable: true })
            || matches!(self.status(), 408 | 429 | 500..)
    }

    /// The name of the reply's type, without the suffix all types share.
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

    /// The body of the reply. `message` is for people.
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

/// What a client reads in an error reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReceivedError {
    /// The name of its type, without the suffix all types share: `UnauthorizedErrorReply` and so on.
    pub name: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// For people; servers other than Claviger may leave it out.
    pub message: Option<String>,
    /// The mode in use, in an `OperationModeErrorReply`.
    pub expected_operation_mode: Option<u8>,
    /// The reasons in a `PolicyEvaluationErrorReply`.
    pub reasons: Vec<PolicyReason>,
}

/// Reads an error reply.
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

/// Serialises one of the bodies above: structs of strings and numbers, which serde_json cannot fail on.
fn json<T: Serialize>(body: &T) -> Vec<u8> {
    serde_json::to_vec(body).unwrap_or_default()
}

/// The text of a body, without the byte-order mark that some clients write before it.
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

/// Shortens a message that may quote what the other side sent.
fn clip(message: &str) -> String {
    const LONGEST: usize = 200;
    match message.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
        None => message.to_owned(),
    }
}
