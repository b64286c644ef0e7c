//! Evidence: the data that a host sends in step 2, and the checks of it, in order.

use ring::hmac;

use super::Malformed;
use super::context::{Context, Kind};
use super::credential;
use super::log::Log;
use super::pcr::{PcrSet, PcrValues};
use super::public::AttestationKey;
use super::quote::Quote;
use super::signature::Signature;
use super::state::State;
use crate::hash::sha256;

/// Prefix of the qualifying data: its purpose and a final zero byte.
const PURPOSE: &[u8] = b"claviger-tpm-1\0";

/// The PCRs whose values the log has to reproduce.
const REPLAYED: [usize; 4] = [0, 2, 4, 7];

/// The blobs of step 2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evidence<'a> {
    /// The State of step 1, unchanged.
    pub state: &'a [u8],
    /// `TPMS_ATTEST`.
    pub quote: &'a [u8],
    /// `TPMT_SIGNATURE`.
    pub signature: &'a [u8],
    /// The values of the quoted PCRs.
    pub pcr_values: &'a [u8],
    /// The event log.
    pub log: &'a [u8],
}

impl<'a> Evidence<'a> {
    /// Takes the blobs from a Context of step 2.
    ///
    /// # Errors
    /// [`Malformed`] if a blob is missing or an additional one is present.
    pub fn of(context: &Context<'a>) -> Result<Self, Malformed> {
        let kinds = [Kind::State, Kind::Quote, Kind::Signature, Kind::PcrValues, Kind::Log];
        let [state, quote, signature, pcr_values, log] = context.exactly(kinds)?;
        Ok(Self { state, quote, signature, pcr_values, log })
    }

    /// Writes the Context of step 2.
    #[must_use]
    pub fn to_context(&self) -> Vec<u8> {
        super::context::write(&[
            (Kind::State, self.state),
            (Kind::Quote, self.quote),
            (Kind::Signature, self.signature),
            (Kind::PcrValues, self.pcr_values),
            (Kind::Log, self.log),
        ])
    }
}

/// Why evidence is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EvidenceError {
    /// The quote is not from the attestation key, or not for this session.
    #[error("the quote is not this session's: {0}")]
    Quote(&'static str),
    /// The quote covers other PCRs than required, or other values than the host sent.
    #[error("the quote does not cover the PCR values: {0}")]
    Pcrs(&'static str),
    /// The log is malformed, or does not reproduce the quoted values.
    #[error("the event log: {0}")]
    Log(&'static str),
}

/// The facts that evidence proves.
#[derive(Clone, Debug)]
pub struct Proven<'a> {
    /// The quoted PCR values.
    pub values: PcrValues,
    /// The log that reproduces them.
    pub log: Log<'a>,
    /// The quote's restart count.
    pub restart_count: u32,
}

/// The data that a host's TPM signs together with its PCRs. It binds the quote to the credential, the session and the
/// identity key. `identity_key` is content 1 exactly as sent.
#[must_use]
pub fn qualifying_data(credential: &[u8; credential::LENGTH], session_id: &[u8; 16], identity_key: &[u8]) -> [u8; 32] {
    let (key, message) = qualified(credential, session_id, identity_key);
    let mut out = [0; 32];
    out.copy_from_slice(hmac::sign(&key, &message).as_ref());
    out
}

/// The HMAC key and the message of the qualifying data.
fn qualified(
    credential: &[u8; credential::LENGTH],
    session_id: &[u8; 16],
    identity_key: &[u8],
) -> (hmac::Key, Vec<u8>) {
    let message = [PURPOSE, session_id, &sha256(identity_key)].concat();
    (hmac::Key::new(hmac::HMAC_SHA256, credential), message)
}

/// Verifies evidence against the State of its session: signature, quote, PCR values, log. `identity_key` is content 1
/// exactly as sent.
///
/// # Errors
/// [`EvidenceError`] of the first check that fails.
pub fn check<'a>(evidence: &Evidence<'a>, state: &State, identity_key: &[u8]) -> Result<Proven<'a>, EvidenceError> {
    let ak = AttestationKey::parse(&state.ak_public).map_err(|Malformed(why)| EvidenceError::Quote(why))?;
    let signature = Signature::parse(evidence.signature).map_err(|Malformed(why)| EvidenceError::Quote(why))?;
    if !ak.verifies(evidence.quote, &signature) {
        return Err(EvidenceError::Quote("the attestation key did not sign it"));
    }
    let quote = Quote::parse(evidence.quote).map_err(|Malformed(why)| EvidenceError::Quote(why))?;
    let (key, message) = qualified(&state.credential, &state.session_id, identity_key);
    // Compare in constant time.
    if hmac::verify(&key, &message, quote.extra_data).is_err() {
        return Err(EvidenceError::Quote("its qualifying data is of another credential, session or identity key"));
    }
    let values = pcr_values(&quote, state.selection, evidence.pcr_values)?;

    let log = Log::parse(evidence.log).map_err(|Malformed(why)| EvidenceError::Log(why))?;
    let replayed = log.replay();
    if REPLAYED.iter().any(|pcr| replayed.get(*pcr) != values.get(*pcr)) {
        return Err(EvidenceError::Log("its events do not give the quoted PCR values"));
    }
    Ok(Proven { values, log, restart_count: quote.restart_count })
}

/// The PCR values that the quote covers.
fn pcr_values(quote: &Quote<'_>, selection: PcrSet, bytes: &[u8]) -> Result<PcrValues, EvidenceError> {
    if quote.selection != selection.to_selection() {
        return Err(EvidenceError::Pcrs("its selection is not the one that was asked for"));
    }
    if quote.digest != sha256(bytes) {
        return Err(EvidenceError::Pcrs("its digest is of other values"));
    }
    PcrValues::read(selection, bytes).ok_or(EvidenceError::Pcrs("there is not one value for each PCR"))
}
