//! The host side of attestation with a TPM.
//!
//! Nothing is stored in the TPM. If the TPM keeps no endorsement key, the key is derived from the TPM's own seed. The
//! attestation key is also derived, in the endorsement hierarchy.

mod device;

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use claviger_protocol::attestation::tpm::endorsement_key_of;
use claviger_protocol::rsa_key::RsaPublicKey;
use claviger_protocol::tpm::context::{self, Context, Kind, MAX_LOG};
use claviger_protocol::tpm::evidence::{Evidence, qualifying_data};
use claviger_protocol::tpm::log::{Bank, Log};
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};
use claviger_protocol::tpm::public;
use claviger_protocol::tpm::quote::Quote;
use zeroize::Zeroizing;

pub use self::device::TpmError;
use self::device::{Auth, Tpm};

/// The TPM device on Linux.
pub const DEVICE: &str = "/dev/tpmrm0";
/// The event log of firmware and boot loader on Linux.
pub const EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Permanent handles: the endorsement hierarchy, and the null hierarchy.
const ENDORSEMENT: u32 = 0x4000_000b;
const NULL: u32 = 0x4000_0007;
/// The handle at which TCG expects the RSA endorsement key, if the TPM keeps it.
const EK_HANDLE: u32 = 0x8101_0001;
/// The NV index of the certificate of that key.
const EK_CERTIFICATE: u32 = 0x01c0_0002;

/// TPM commands: name and command code.
const CREATE_PRIMARY: (&str, u32) = ("TPM2_CreatePrimary", 0x131);
const NV_READ: (&str, u32) = ("TPM2_NV_Read", 0x14e);
const ACTIVATE_CREDENTIAL: (&str, u32) = ("TPM2_ActivateCredential", 0x147);
const POLICY_SECRET: (&str, u32) = ("TPM2_PolicySecret", 0x151);
const QUOTE: (&str, u32) = ("TPM2_Quote", 0x158);
const FLUSH_CONTEXT: (&str, u32) = ("TPM2_FlushContext", 0x165);
const NV_READ_PUBLIC: (&str, u32) = ("TPM2_NV_ReadPublic", 0x169);
const READ_PUBLIC: (&str, u32) = ("TPM2_ReadPublic", 0x173);
const START_AUTH_SESSION: (&str, u32) = ("TPM2_StartAuthSession", 0x176);
const PCR_EXTEND: (&str, u32) = ("TPM2_PCR_Extend", 0x182);
const PCR_READ: (&str, u32) = ("TPM2_PCR_Read", 0x17e);

/// Bytes of non-volatile memory that one command reads. Every TPM supports this size.
const NV_CHUNK: u16 = 512;
/// Largest certificate that is read from non-volatile memory, in bytes.
const MAX_NV: u16 = 8 * 1024;
/// Number of attempts to read PCR values that match the quote. A PCR may change between the quote and the read.
const READINGS: u32 = 5;

/// The locations of a host's TPM and event log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmPlace {
    /// `/dev/tpmrm0`, or the socket of a software TPM.
    pub device: PathBuf,
    /// The event log.
    pub log: PathBuf,
}

/// A TPM between the two steps of an attestation.
pub struct Session {
    tpm: Tpm,
    place: TpmPlace,
    endorsement_key: u32,
    /// `true` if the TPM keeps the endorsement key itself. The key is then not flushed.
    ek_is_kept: bool,
    attestation_key: u32,
    /// The endorsement key and certificate, sent as content 4.
    pub endorsement: Endorsement,
    /// The `TPMT_PUBLIC` of the attestation key.
    ak_public: Vec<u8>,
}

/// The public endorsement key of a TPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endorsement {
    /// The public key.
    pub key: RsaPublicKey,
    /// Its certificate (DER), if the TPM has a certificate of this key.
    pub certificate: Option<Vec<u8>>,
}

impl Endorsement {
    /// The content that a host sends: the certificate if there is one, or else the bare key.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        self.certificate.as_deref().unwrap_or_else(|| self.key.spki_der())
    }
}

/// Reads the endorsement key of the TPM at `place`. Blocks.
///
/// # Errors
/// [`TpmError`].
pub fn endorsement(place: &TpmPlace) -> Result<Endorsement, TpmError> {
    let mut tpm = Tpm::open(&place.device)?;
    let (handle, is_kept, endorsement) = find_endorsement(&mut tpm)?;
    if !is_kept {
        flush(&mut tpm, handle)?;
    }
    Ok(endorsement)
}

/// Extends the PCRs of the TPM with the events of a log, as firmware does. For demonstrations with a software TPM.
/// Blocks.
///
/// # Errors
/// [`TpmError`].
pub fn measure(place: &TpmPlace, log: &Log<'_>) -> Result<(), TpmError> {
    let mut tpm = Tpm::open(&place.device)?;
    for event in log.events().filter(|event| event.extends()) {
        let digest = event.digest(Bank::Sha256).unwrap_or_default();
        // One digest, of SHA-256.
        let parameters = [&[0, 0, 0, 1, 0x00, 0x0b][..], digest].concat();
        tpm.run(PCR_EXTEND, &[event.pcr], &[Auth::Empty], &parameters)?;
    }
    Ok(())
}

impl Session {
    /// Opens the TPM and makes its keys. Blocks.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn begin(place: TpmPlace) -> Result<Self, TpmError> {
        let mut tpm = Tpm::open(&place.device)?;
        let (endorsement_key, ek_is_kept, endorsement) = find_endorsement(&mut tpm)?;
        let (attestation_key, ak_public) = match create_primary(&mut tpm, &public::attestation_template()) {
            Ok(made) => made,
            Err(error) => {
                if !ek_is_kept {
                    // Without a resource manager, a key that is left in the TPM takes a slot from every other program.
                    let _ = flush(&mut tpm, endorsement_key);
                }
                return Err(error);
            }
        };
        Ok(Self { tpm, place, endorsement_key, ek_is_kept, attestation_key, endorsement, ak_public })
    }

    /// The Context of step 1.
    #[must_use]
    pub(crate) fn first_context(&self) -> Vec<u8> {
        context::write(&[(Kind::AkPublic, &self.ak_public)])
    }

    /// The Context of step 2. It answers the Context `received` from the service, for this session and this identity
    /// key. `identity` must be the same bytes that are sent as content 1. Blocks.
    ///
    /// # Errors
    /// [`TpmError`].
    pub(crate) fn second_context(
        &mut self,
        received: &[u8],
        session_id: &[u8; 16],
        identity_key: &[u8],
    ) -> Result<Vec<u8>, TpmError> {
        let malformed = |error: claviger_protocol::tpm::Malformed| {
            TpmError::Answer(format!("the service's Context cannot be read: {error}"))
        };
        let received = Context::parse(received).map_err(malformed)?;
        let kinds = [Kind::State, Kind::IdObject, Kind::EncryptedSecret, Kind::PcrSelection];
        let [state, id_object, secret, selection] = received.exactly(kinds).map_err(malformed)?;
        let set = PcrSet::from_selection(selection).map_err(malformed)?;

        let credential = self.activate(id_object, secret)?;
        let nonce = qualifying_data(&credential, session_id, identity_key);
        let (quote, signature, values) = self.quote(&nonce, set)?;
        let log = self.log()?;
        let evidence =
            Evidence { state, quote: &quote, signature: &signature, pcr_values: &values.to_bytes(), log: &log };
        Ok(evidence.to_context())
    }

    fn activate(&mut self, id_object: &[u8], secret: &[u8]) -> Result<Zeroizing<[u8; 32]>, TpmError> {
        let mut parameters = sized(&[0; 32]); // nonce
        parameters.extend_from_slice(&sized(&[])); // salt
        parameters.push(1); // a policy session
        parameters.extend_from_slice(&[0x00, 0x10, 0x00, 0x0b]); // no parameter encryption, SHA-256
        let response = self.tpm.run(START_AUTH_SESSION, &[NULL, NULL], &[], &parameters)?;
        let policy = Fields(&response).handle()?;

        // Nonce, command digest, policy reference, no expiration.
        let parameters = [&[0; 6][..], &[0; 4]].concat();
        let activated =
            self.tpm.run(POLICY_SECRET, &[ENDORSEMENT, policy], &[Auth::Empty], &parameters).and_then(|_| {
                let parameters = [sized(id_object), sized(secret)].concat();
                let handles = [self.attestation_key, self.endorsement_key];
                self.tpm.run(ACTIVATE_CREDENTIAL, &handles, &[Auth::Empty, Auth::Policy(policy)], &parameters)
            });
        let response = match activated {
            Ok(response) => response,
            Err(error) => {
                // The TPM has already closed a policy session that was used.
                let _ = flush(&mut self.tpm, policy);
                return Err(error);
            }
        };
        let mut fields = Fields(&response);
        let mut parameters = fields.parameters()?;
        let received = parameters.sized()?;
        // The credential is copied directly into memory that is zeroised. An array by value would leave a copy on the
        // stack.
        let mut credential = Zeroizing::new([0; 32]);
        if received.len() != credential.len() {
            return Err(TpmError::Answer("the credential is not of 32 bytes".to_owned()));
        }
        credential.copy_from_slice(received);
        Ok(credential)
    }

    /// Makes a quote. Returns the quote, its signature, and the PCR values that it covers.
    fn quote(&mut self, nonce: &[u8; 32], set: PcrSet) -> Result<(Vec<u8>, Vec<u8>, PcrValues), TpmError> {
        let selection = set.to_selection();
        for _ in 0..READINGS {
            // The null scheme: the key's own scheme applies.
            let parameters = [&sized(nonce)[..], &[0x00, 0x10], &selection].concat();
            let response = self.tpm.run(QUOTE, &[self.attestation_key], &[Auth::Empty], &parameters)?;
            let mut parameters = Fields(&response).parameters()?;
            let quote = parameters.sized()?.to_vec();
            let signature = parameters.0.to_vec();
            let values = self.pcrs(set)?;
            let parsed = Quote::parse(&quote).map_err(|error| TpmError::Answer(format!("the quote: {error}")))?;
            if parsed.digest == values.digest() {
                return Ok((quote, signature, values));
            }
        }
        Err(TpmError::Answer("the PCRs change all the time".to_owned()))
    }

    /// Reads the PCR values. One command returns only some of them.
    fn pcrs(&mut self, set: PcrSet) -> Result<PcrValues, TpmError> {
        let mut values = PcrValues::default();
        let missing = |values: &PcrValues| set.iter().filter(|pcr| values.get(*pcr).is_none()).collect::<PcrSet>();
        loop {
            let wanted = missing(&values);
            if wanted.is_empty() {
                return Ok(values);
            }
            let response = self.tpm.run(PCR_READ, &[], &[], &wanted.to_selection())?;
            let mut fields = Fields(&response);
            fields.take(4)?; // the counter of changes
            let got = PcrSet::from_selection(fields.take(10)?).map_err(|error| TpmError::Answer(error.to_string()))?;
            let count = fields.u32()? as usize;
            if count == 0 || count != got.len() {
                return Err(TpmError::Answer("the TPM has no SHA-256 bank of PCRs".to_owned()));
            }
            for pcr in got.iter() {
                let value = fields.sized()?.try_into();
                let value = value.map_err(|_| TpmError::Answer("a PCR value is not of 32 bytes".to_owned()))?;
                values.set(pcr, value);
            }
        }
    }

    /// Reads the whole event log.
    fn log(&self) -> Result<Vec<u8>, TpmError> {
        let path = &self.place.log;
        let failed = |source| TpmError::Log { path: path.clone(), source };
        let mut log = Vec::with_capacity(64 * 1024);
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_LOG as u64 + 1).read_to_end(&mut log).map_err(failed)?;
        if log.is_empty() || log.len() > MAX_LOG {
            let problem = if log.is_empty() { "it is empty" } else { "it is longer than 512 KiB" };
            return Err(failed(std::io::Error::other(problem)));
        }
        Ok(log)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A resource manager would flush the keys itself; a software TPM does not.
        let _ = flush(&mut self.tpm, self.attestation_key);
        if !self.ek_is_kept {
            let _ = flush(&mut self.tpm, self.endorsement_key);
        }
    }
}

/// Finds the endorsement key. Returns its handle, `true` if the TPM keeps it, and its public part.
fn find_endorsement(tpm: &mut Tpm) -> Result<(u32, bool, Endorsement), TpmError> {
    let kept = tpm.run(READ_PUBLIC, &[EK_HANDLE], &[], &[]).ok().and_then(|response| {
        let public = Fields(&response).sized().ok()?;
        public::endorsement_key(public).ok()
    });
    if let Some(key) = kept {
        return Ok((EK_HANDLE, true, with_certificate(tpm, key)?));
    }
    let (handle, public) = create_primary(tpm, &public::endorsement_template())?;
    let key = public::endorsement_key(&public);
    let key = key.map_err(|error| TpmError::Answer(format!("the endorsement key: {error}")));
    match key.and_then(|key| with_certificate(tpm, key)) {
        Ok(endorsement) => Ok((handle, false, endorsement)),
        Err(error) => {
            // A TPM without a resource manager has few slots for keys, and keeps this key until it is flushed.
            let _ = flush(tpm, handle);
            Err(error)
        }
    }
}

/// Adds the certificate that the TPM stores, if it is a certificate of this key.
fn with_certificate(tpm: &mut Tpm, key: RsaPublicKey) -> Result<Endorsement, TpmError> {
    let certificate = read_certificate(tpm)?;
    // Some TPMs store a certificate of another key.
    let certificate = certificate.filter(|der| endorsement_key_of(der).is_ok_and(|certified| certified == key));
    Ok(Endorsement { key, certificate })
}

/// Reads the certificate from the TPM, if there is one: DER, without padding.
fn read_certificate(tpm: &mut Tpm) -> Result<Option<Vec<u8>>, TpmError> {
    let response = match tpm.run(NV_READ_PUBLIC, &[EK_CERTIFICATE], &[], &[]) {
        Ok(response) => response,
        Err(TpmError::Refused { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut fields = Fields(&response);
    let public = fields.sized()?;
    let size = public.last_chunk().map(|size| u16::from_be_bytes(*size)).unwrap_or_default().min(MAX_NV);
    let mut bytes = Vec::with_capacity(size.into());
    while bytes.len() < usize::from(size) {
        let offset = bytes.len() as u16;
        let length = NV_CHUNK.min(size - offset);
        let parameters = [length.to_be_bytes(), offset.to_be_bytes()].concat();
        let response = match tpm.run(NV_READ, &[EK_CERTIFICATE, EK_CERTIFICATE], &[Auth::Empty], &parameters) {
            Ok(response) => response,
            // This certificate is not readable for everybody. The bare key is sufficient.
            Err(TpmError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut parameters = Fields(&response).parameters()?;
        let chunk = parameters.sized()?;
        if chunk.is_empty() {
            return Err(TpmError::Answer("the TPM gives no more of its certificate".to_owned()));
        }
        bytes.extend_from_slice(chunk);
    }
    Ok(der_length(&bytes).and_then(|length| bytes.get(..length)).map(<[u8]>::to_vec))
}

/// Length in bytes of the DER element at the start of `bytes`.
fn der_length(bytes: &[u8]) -> Option<usize> {
    match *bytes {
        [0x30, short, ..] if short < 0x80 => Some(2 + usize::from(short)),
        [0x30, 0x81, length, ..] => Some(3 + usize::from(length)),
        [0x30, 0x82, high, low, ..] => Some(4 + usize::from(u16::from_be_bytes([high, low]))),
        _ => None,
    }
}

/// Makes a primary key in the endorsement hierarchy. Returns its handle and its `TPMT_PUBLIC`.
fn create_primary(tpm: &mut Tpm, template: &[u8]) -> Result<(u32, Vec<u8>), TpmError> {
    // No password, no data; the template; no outside information, no PCRs.
    let parameters = [&[0, 4, 0, 0, 0, 0][..], &sized(template), &[0; 2], &[0; 4]].concat();
    let response = tpm.run(CREATE_PRIMARY, &[ENDORSEMENT], &[Auth::Empty], &parameters)?;
    let mut fields = Fields(&response);
    let handle = fields.handle()?;
    let public = fields.parameters()?.sized()?.to_vec();
    Ok((handle, public))
}

fn flush(tpm: &mut Tpm, handle: u32) -> Result<(), TpmError> {
    tpm.run(FLUSH_CONTEXT, &[], &[], &handle.to_be_bytes()).map(drop)
}

/// Prefixes bytes with their length.
fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

/// The fields of a response that are not read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], TpmError> {
        let short = || TpmError::Answer("a response of the TPM ends in the middle of a field".to_owned());
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, TpmError> {
        Ok(self.take(4)?.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn handle(&mut self) -> Result<u32, TpmError> {
        self.u32()
    }

    /// Reads the parameters of a response that ends with authorizations.
    fn parameters(&mut self) -> Result<Fields<'a>, TpmError> {
        let length = self.u32()? as usize;
        self.take(length).map(Fields)
    }

    fn sized(&mut self) -> Result<&'a [u8], TpmError> {
        let length = self.take(2)?.iter().fold(0, |value, byte| value << 8 | usize::from(*byte));
        self.take(length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use super::*;

    const HANDLE: u32 = 0x8000_0001;

    /// Starts a TPM that keeps no endorsement key and makes one with this modulus. Its reply about the certificate is
    /// truncated. The thread returns the flushed handles when the connection closes.
    fn broken_tpm(socket: &Path, modulus: u8) -> std::thread::JoinHandle<Vec<u32>> {
        let listener = UnixListener::bind(socket).unwrap();
        let mut public = public::endorsement_template();
        let at = public.len() - 256;
        public[at..].fill(modulus);
        let parameters = sized(&public);
        let made = [&HANDLE.to_be_bytes()[..], &(parameters.len() as u32).to_be_bytes(), &parameters].concat();
        std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut flushed = Vec::new();
            let mut header = [0; 10];
            while connection.read_exact(&mut header).is_ok() {
                let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
                let mut parameters = vec![0; number(&header[2..6]) as usize - header.len()];
                connection.read_exact(&mut parameters).unwrap();
                let (code, body) = match number(&header[6..]) {
                    code if code == CREATE_PRIMARY.1 => (0, &made[..]),
                    code if code == NV_READ_PUBLIC.1 => (0, &[0, 9][..]),
                    code if code == FLUSH_CONTEXT.1 => {
                        flushed.push(number(&parameters));
                        (0, &[][..])
                    }
                    _ => (0x18b_u32, &[][..]),
                };
                let size = (header.len() + body.len()) as u32;
                let response = [&[0x80, 1][..], &size.to_be_bytes(), &code.to_be_bytes(), body].concat();
                connection.write_all(&response).unwrap();
            }
            flushed
        })
    }

    #[test]
    fn an_endorsement_key_that_cannot_be_used_is_flushed() {
        // An even modulus is not a valid RSA key.
        for (modulus, problem) in [(0xff, "ends in the middle of a field"), (0xfe, "the endorsement key: ")] {
            let folder = tempfile::tempdir().unwrap();
            let place = TpmPlace { device: folder.path().join("tpm"), log: PathBuf::new() };
            let tpm = broken_tpm(&place.device, modulus);
            let error = endorsement(&place).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
            assert_eq!(tpm.join().unwrap(), [HANDLE]);
        }
    }

    #[test]
    fn the_length_of_a_certificate_is_that_of_its_der() {
        assert_eq!(der_length(&[0x30, 3, 1, 1, 1, 0xff, 0xff]), Some(5));
        assert_eq!(der_length(&[0x30, 0x81, 0x80]), Some(131));
        assert_eq!(der_length(&[0x30, 0x82, 4, 1]), Some(1029));
        for bad in [&[][..], &[0x30], &[0x31, 1, 0], &[0x30, 0x83, 1, 1, 1], &[0xff; 4]] {
            assert_eq!(der_length(bad), None);
        }
    }

    #[test]
    fn fields_end_where_the_response_ends() {
        let mut fields = Fields(&[0, 0, 0, 4, 0, 2, 7, 8, 9]);
        let mut parameters = fields.parameters().unwrap();
        assert_eq!(parameters.sized().unwrap(), [7, 8]);
        assert_eq!(fields.0, [9]);
        assert!(fields.sized().is_err());
        assert!(Fields(&[0, 3, 1, 2]).sized().is_err());
        assert!(Fields(&[0, 0, 0, 5, 1]).parameters().is_err());
    }
}
