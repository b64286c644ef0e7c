//! The messages of TPM mode (protocol page, section 3.1).

use data_encoding::BASE64;
use serde::{Deserialize, Serialize};

use super::{
    ENDORSEMENT_KEY, Envelope, IDENTITY_KEY, Object, PayloadError, RTPM_CONTEXT, ReplyError, ResultType, TYPE_SUFFIX,
    any_key, base64, clip, json, refuse, reply, request, type_name,
};
use crate::rsa_key::RsaPublicKey;
use crate::tpm::Malformed;
use crate::tpm::context::{Context, Kind};

const REPLY_CONTINUE: &str = "TpmReplyContinue";

/// Bits of an endorsement key.
const EK_BITS: usize = 2048;
/// Public exponent of an endorsement key: 65537.
const EK_EXPONENT: &[u8] = &[1, 0, 1];

/// An `AttestationRequest` in TPM mode. Its structure and its keys are valid; its Context is not checked yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TpmRequest {
    /// The session's GUID, the bytes exactly as sent.
    pub session_id: [u8; 16],
    /// The requested certificates in the order of the request, without duplicates.
    pub requested: Vec<ResultType>,
    /// The endorsement key.
    pub endorsement_key: RsaPublicKey,
    /// The Context, exactly as sent.
    pub context: Vec<u8>,
    /// The identity key and its bytes exactly as sent; in step 2 only.
    pub identity_key: Option<(RsaPublicKey, Vec<u8>)>,
}

impl TpmRequest {
    /// Parses the body of a request of either step. A request whose Context contains a State belongs to step 2, any
    /// other to step 1.
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn parse(body: &[u8]) -> Result<Self, PayloadError> {
        let envelope = Envelope::parse(body)?;
        let endorsement_key = envelope.content(ENDORSEMENT_KEY, "EndorsementKeyCertificate")?;
        let endorsement_key = endorsement_key_of(&endorsement_key)?;
        let context = envelope.content(RTPM_CONTEXT, "RtpmContext")?;
        let identity_key = if is_step_2(&context) {
            let octets = envelope.content(IDENTITY_KEY, "VirtualSecureModeIdentityKey")?;
            Some((any_key(&octets, "VirtualSecureModeIdentityKey")?, octets))
        } else {
            None
        };
        let Envelope { session_id, requested, .. } = envelope;
        Ok(Self { session_id, requested, endorsement_key, context, identity_key })
    }

    /// The request's Context.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn context(&self) -> Result<Context<'_>, Malformed> {
        Context::parse(&self.context)
    }
}

/// Whether a Context holds a State.
fn is_step_2(context: &[u8]) -> bool {
    Context::parse(context).is_ok_and(|context| context.get(Kind::State).is_some())
}

/// The endorsement key from an X.509 certificate or a SubjectPublicKeyInfo: RSA with 2048 bits and exponent 65537.
///
/// # Errors
/// [`PayloadError`].
pub fn endorsement_key_of(octets: &[u8]) -> Result<RsaPublicKey, PayloadError> {
    const NAME: &str = "EndorsementKeyCertificate";
    if octets.starts_with(b"RSA1") {
        return Err(refuse(format!("{NAME} is neither a certificate nor a SubjectPublicKeyInfo")));
    }
    let key = any_key(octets, NAME)?;
    if !is_endorsement_key(&key) {
        return Err(refuse(format!("{NAME} is not an RSA key of 2048 bits with exponent 65537")));
    }
    Ok(key)
}

/// Whether a key fits TCG's default template for endorsement keys.
#[must_use]
pub fn is_endorsement_key(key: &RsaPublicKey) -> bool {
    key.modulus().len() * 8 == EK_BITS
        && key.modulus().first().is_some_and(|first| first >> 7 == 1)
        && key.exponent() == EK_EXPONENT
}

/// Writes the body of a host's request of step 1. `endorsement_key` is content 4.
#[must_use]
pub fn first_request(
    session_id: [u8; 16],
    requested: &[ResultType],
    endorsement_key: &[u8],
    context: &[u8],
) -> Vec<u8> {
    request(session_id, requested, &[(ENDORSEMENT_KEY, endorsement_key), (RTPM_CONTEXT, context)])
}

/// Writes the body of a host's request of step 2. `endorsement_key` is content 4, `identity_key` is content 1.
#[must_use]
pub fn second_request(
    session_id: [u8; 16],
    requested: &[ResultType],
    endorsement_key: &[u8],
    identity_key: &[u8],
    context: &[u8],
) -> Vec<u8> {
    let provided = [(ENDORSEMENT_KEY, endorsement_key), (IDENTITY_KEY, identity_key), (RTPM_CONTEXT, context)];
    request(session_id, requested, &provided)
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ContinueBody {
    #[serde(rename = "__type")]
    type_name: String,
    rtpm_active_context: String,
}

/// Writes the body of the reply to step 1.
#[must_use]
pub fn continue_reply(context: &[u8]) -> Vec<u8> {
    json(&ContinueBody { type_name: type_name(REPLY_CONTINUE), rtpm_active_context: BASE64.encode(context) })
}

/// Parses the reply to step 1 and returns its Context.
///
/// # Errors
/// [`ReplyError`].
pub fn parse_continue_reply(body: &[u8]) -> Result<Vec<u8>, ReplyError> {
    let Object(body): Object<ContinueBody> = reply(body)?;
    if body.type_name.strip_suffix(TYPE_SUFFIX) != Some(REPLY_CONTINUE) {
        return Err(ReplyError(clip(&format!("its __type is {}", body.type_name))));
    }
    base64(&body.rtpm_active_context, "RtpmActiveContext").map_err(|PayloadError(message)| ReplyError(message))
}
