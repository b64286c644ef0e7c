//! A session that is logged in, with its table of key handles and its operations.
//!
//! The handles belong to the session and become invalid when it closes.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki_sys::CK_ULONG;
use zeroize::Zeroizing;

use crate::code::Function;
use crate::error::{Failure, HsmError};
use crate::fault::{FaultOwner, PARAMETER_REFUSALS};
use crate::identity::{Fingerprint, KeyId};
use crate::keys::{NewKey, Oaep, RsaPrivateParts, RsaPublic};
use crate::link::{Cost, Level, Report, Request, Value};
use crate::worker::clock::thread_time;
use crate::worker::key_table::{FoundKey, KeyTable, Purpose};
use crate::worker::module::OwnLogin;
use crate::worker::objects::{
    Key, SecretTemplate, expect_id, private_keys, private_numbers, private_template, public_objects, public_template,
    read_public,
};
use crate::worker::token::{Scheme, Token};
use crate::worker::{mechanism, oaep};

/// Minimum time between a search that did not find a key and the next search of the same session.
const SEARCH_PAUSE: Duration = Duration::from_secs(2);

/// The session and the state that ends with it.
pub(crate) struct OpenSession {
    token: Arc<Token>,
    session: Session,
    keys: KeyTable<ObjectHandle>,
    /// Number of keys that had been created on the token when `keys` was filled.
    keys_made: u64,
    /// Time of the last search for a missing key that failed.
    searched_again: Option<Instant>,
    cost: Cell<Cost>,
}

impl OpenSession {
    /// Logs in if necessary and opens a session, which is to be [prepared](Self::prepare) before its first operation.
    pub(crate) fn open(token: &Arc<Token>) -> Result<Self, Failure> {
        let slot = token.ensure_login()?;
        let pkcs11 = token.module.pkcs11();
        let session = match pkcs11.open_rw_session(slot) {
            // A write-protected token can still decrypt and sign.
            Err(Error::Pkcs11(RvError::TokenWriteProtected, _)) => pkcs11.open_ro_session(slot),
            session => session,
        }?;
        Ok(OpenSession {
            token: Arc::clone(token),
            session,
            keys: KeyTable::default(),
            keys_made: 0,
            searched_again: None,
            cost: Cell::default(),
        })
    }

    /// Searches for the keys.
    pub(crate) fn prepare(&mut self) -> Result<(), HsmError> {
        self.search()?;
        self.token.try_out(|| self.find_schemes());
        Ok(())
    }

    /// Performs a request, and returns the result and the cost of the token's part.
    pub(crate) fn perform(&mut self, request: &Request<'_>) -> (Result<Value, HsmError>, Cost) {
        self.cost.take();
        let result = self.dispatch(request);
        (result, self.cost.take())
    }

    fn dispatch(&mut self, request: &Request<'_>) -> Result<Value, HsmError> {
        match request {
            Request::Decrypt { id, public, oaep, ciphertext } => {
                let key = self.key(id, *public, Purpose::Decrypt)?;
                self.decrypt(key, *oaep, ciphertext).map(Value::Bytes)
            }
            Request::Sign { id, public, scheme, digest } => {
                let key = self.key(id, *public, Purpose::Sign)?;
                let login = |session: &Session| self.token.login_for_operation(session);
                let (room, own_login) = (key.room(), self.own_login(key, &login)?);
                let input = mechanism::signed_input(*scheme, digest);
                let (module, mechanism) = (&self.token.module, mechanism::signature(*scheme));
                self.timed(|| module.sign(&self.session, &mechanism, key.handle, own_login, &input, room))
                    .map(|signature| Value::Bytes(Zeroizing::new(signature)))
            }
            Request::Random(len) => {
                let mut bytes = Zeroizing::new(vec![0; usize::from(*len)]);
                self.timed(|| self.session.generate_random_slice(&mut bytes))?;
                Ok(Value::Bytes(bytes))
            }
            Request::Ping => {
                self.timed(|| self.session.get_session_info())?;
                Ok(Value::Done)
            }
            Request::Keys { search } => {
                if *search { self.search() } else { self.refresh() }?;
                Ok(Value::Keys(self.keys.list()))
            }
            Request::Generate(spec) => self.generate(spec).map(Value::Public),
            Request::Import(spec, parts) => self.import(spec, parts).map(|()| Value::Done),
            Request::Destroy { id, public } => self.destroy(id, *public).map(|()| Value::Done),
            // The worker handles these before any session.
            Request::Start(_) | Request::SetPin(..) => Err(HsmError::UnexpectedReply),
        }
    }

    /// Makes PKCS#11 calls and adds up their cost.
    fn timed<T>(&self, calls: impl FnOnce() -> T) -> T {
        let (started, before) = (Instant::now(), thread_time());
        let result = calls();
        let spent = Cost { took: started.elapsed(), processor: thread_time().saturating_sub(before) };
        let sum = self.cost.get();
        self.cost.set(Cost { took: sum.took + spent.took, processor: sum.processor + spent.processor });
        result
    }

    /// Returns `login` if the key requires a login for every operation. Called before an operation is started in the
    /// session.
    fn own_login<'l>(&self, key: Key, login: OwnLogin<'l>) -> Result<Option<OwnLogin<'l>>, HsmError> {
        if !key.always_authenticate {
            return Ok(None);
        }
        self.token.pin_may_be_tried()?;
        Ok(Some(login))
    }

    /// Searches the token once for all RSA private keys.
    fn search(&mut self) -> Result<(), HsmError> {
        // Read before the search: a key created meanwhile causes one unnecessary search, never a missing one.
        let keys_made = self.token.keys_made();
        self.token.report(&Report::KeySearch);
        self.keys = self.timed(|| private_keys(&self.session))?;
        self.token.say_oddities(self.keys.oddities());
        self.keys_made = keys_made;
        Ok(())
    }

    /// Repeats the search if the table is known to be outdated.
    fn refresh(&mut self) -> Result<(), HsmError> {
        if self.keys_made == self.token.keys_made() {
            return Ok(());
        }
        self.search()
    }

    fn key(&mut self, id: &[u8], public: Fingerprint, purpose: Purpose) -> Result<Key, HsmError> {
        if let Some(key) = self.keys.find(id, public, purpose) {
            return Ok(*key);
        }
        self.search_again()?;
        self.keys.find(id, public, purpose).copied().ok_or(HsmError::NoSuchKey)
    }

    /// Repeats the search, since a key that is not in the table may have been created elsewhere meanwhile. Requests for
    /// keys that do not exist must not cause a search each.
    fn search_again(&mut self) -> Result<(), HsmError> {
        if self.searched_again.is_none_or(|at| at.elapsed() >= SEARCH_PAUSE) {
            self.searched_again = Some(Instant::now());
            self.search()
        } else {
            self.refresh()
        }
    }

    fn decrypt(&self, key: Key, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        if ciphertext.len() != room {
            // The token would return the same error, at the cost of an operation.
            return Err(HsmError::new(Function::Decrypt, RvError::EncryptedDataLenRange));
        }
        let scheme = self.scheme(key, oaep)?;
        let decrypted = self.decrypt_as(scheme, key, oaep, ciphertext);
        match &decrypted {
            // A success is an answer, if no trial gave one.
            Ok(_) => self.token.remember_scheme(oaep, Some(scheme)),
            // The scheme was found out with another key, and this key may permit another mechanism.
            Err(error @ HsmError::Pkcs11(..)) if error.is_inability() => {
                self.token.remember_scheme(oaep, None);
                let of_this_key = self.scheme(key, oaep)?;
                if of_this_key != scheme {
                    return self.decrypt_as(of_this_key, key, oaep, ciphertext);
                }
            }
            Err(_) => {}
        }
        decrypted
    }

    fn decrypt_as(
        &self,
        scheme: Scheme,
        key: Key,
        oaep: Oaep,
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        let mechanism = match scheme {
            Scheme::Native => mechanism::decryption(oaep),
            Scheme::Raw => Mechanism::RsaX509,
        };
        let login = |session: &Session| self.token.login_for_operation(session);
        let own_login = self.own_login(key, &login)?;
        let module = &self.token.module;
        let number =
            self.timed(|| module.decrypt(&self.session, &mechanism, key.handle, own_login, ciphertext, room))?;
        match scheme {
            Scheme::Native => Ok(number),
            Scheme::Raw => {
                // Some tokens strip leading zeros, because they treat the result as a number.
                let zeros = room
                    .checked_sub(number.len())
                    .ok_or_else(|| HsmError::new(Function::Decrypt, RvError::GeneralError))?;
                let mut block = Zeroizing::new(vec![0; room]);
                block.split_at_mut(zeros).1.copy_from_slice(&number);
                oaep::unpad(oaep, &block).ok_or_else(|| HsmError::new(Function::Decrypt, RvError::EncryptedDataInvalid))
            }
        }
    }

    /// Returns how this token decrypts with these parameters: the known scheme, or else the result of a trial with this
    /// key. If the trial gives no answer, the token is assumed to remove the padding.
    fn scheme(&self, key: Key, oaep: Oaep) -> Result<Scheme, HsmError> {
        if let Some(scheme) = self.token.scheme(oaep) {
            return Ok(scheme);
        }
        let found = self.find_scheme(key, oaep)?;
        self.token.remember_scheme(oaep, found);
        Ok(found.unwrap_or(Scheme::Native))
    }

    /// Tries every combination with some key that may decrypt. Without such a key, the first decryption runs the trials.
    fn find_schemes(&self) -> bool {
        let Some(key) = self.keys.any_that_decrypts().copied() else { return false };
        // If a trial gives no answer, the first decryption with those parameters repeats it.
        Oaep::all().all(|oaep| self.scheme(key, oaep).is_ok())
    }

    /// Decrypts a meaningless block with the native mechanism; `None` if that gives no answer. No operation stays open.
    fn find_scheme(&self, key: Key, oaep: Oaep) -> Result<Option<Scheme>, HsmError> {
        let room = key.room();
        // The number is smaller than any modulus of its length, because the first bit of a modulus is set.
        let mut nonsense = vec![0x55; room];
        if let Some(first) = nonsense.first_mut() {
            *first = 0;
        }
        let login = |session: &Session| self.token.login_for_operation(session);
        let own_login = self.own_login(key, &login)?;
        let (module, mechanism) = (&self.token.module, mechanism::decryption(oaep));
        let tried = self.timed(|| module.decrypt(&self.session, &mechanism, key.handle, own_login, &nonsense, room));
        scheme_of_trial(tried.map(drop))
    }

    fn generate(&mut self, spec: &NewKey) -> Result<RsaPublic, HsmError> {
        self.expect_free(&spec.id)?;
        let mut public = public_template(spec);
        public.push(Attribute::ModulusBits(CK_ULONG::from(spec.bits).into()));
        public.push(Attribute::PublicExponent(vec![1, 0, 1]));
        let (public, private) = self.timed(|| {
            self.session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private_template(spec))
        })?;
        // A key is of no use if the token does not reveal its public key.
        let key = self.timed(|| read_public(&self.session, public))?.ok_or(HsmError::Nonsense)?;
        self.add(spec, private, &key);
        Ok(key)
    }

    fn import(&mut self, spec: &NewKey, parts: &RsaPrivateParts) -> Result<(), HsmError> {
        self.expect_absent(&spec.id, &parts.n)?;
        let mut public = public_template(spec);
        public.extend([
            Attribute::Class(ObjectClass::PUBLIC_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Modulus(parts.n.clone()),
            Attribute::PublicExponent(parts.e.clone()),
        ]);
        let mut private = SecretTemplate(private_template(spec));
        private.0.extend([Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::RSA)]);
        private.0.extend(private_numbers(parts));
        let private = self.timed(|| self.session.create_object(&private.0))?;
        if let Err(error) = self.timed(|| self.session.create_object(&public)) {
            // Half a key would block the next attempt.
            if let Err(left) = self.session.destroy_object(private) {
                let left = HsmError::from(left);
                self.token.note(Level::Error, &format!("half an imported key is left, key {}: {left}", spec.id));
            }
            return Err(error.into());
        }
        self.add(spec, private, &RsaPublic { n: parts.n.clone(), e: parts.e.clone() });
        Ok(())
    }

    /// Destroys all objects of a key. The private ones go first: without them the key is useless, and a public object
    /// that is left does no harm.
    fn destroy(&mut self, id: &[u8], public: Fingerprint) -> Result<(), HsmError> {
        self.search()?;
        let handles = self.keys.handles_of(id, public);
        if handles.is_empty() {
            return Err(HsmError::NoSuchKey);
        }
        for handle in handles {
            self.timed(|| self.session.destroy_object(handle))?;
        }
        // The tables of all sessions name a handle that is gone.
        self.token.key_made();
        for handle in public_objects(&self.session, id, public)? {
            self.timed(|| self.session.destroy_object(handle))?;
        }
        self.search()
    }

    /// A new key gets an id that no other key has.
    fn expect_free(&mut self, id: &KeyId) -> Result<(), HsmError> {
        expect_id(id)?;
        if !self.keys.has_id(id) {
            self.search_again()?;
        }
        if self.keys.has_id(id) { Err(HsmError::KeyExists) } else { Ok(()) }
    }

    /// An imported key may share its id with other keys, but must not be on the token already.
    fn expect_absent(&mut self, id: &KeyId, modulus: &[u8]) -> Result<(), HsmError> {
        expect_id(id)?;
        if !self.keys.holds(id, modulus) {
            self.search_again()?;
        }
        if self.keys.holds(id, modulus) { Err(HsmError::KeyExists) } else { Ok(()) }
    }

    /// Adds the new key to this session's table; the tables of the other sessions become outdated.
    fn add(&mut self, spec: &NewKey, handle: ObjectHandle, key: &RsaPublic) {
        let up_to_date = self.keys_made == self.token.keys_made();
        let made = self.token.key_made();
        self.keys.insert(FoundKey {
            handle,
            id: spec.id.0.clone(),
            label: spec.label.clone(),
            n: key.n.clone(),
            e: key.e.clone(),
            decrypts: spec.usage.decrypts(),
            signs: spec.usage.signs(),
            always_authenticate: false,
        });
        if up_to_date {
            self.keys_made = made;
        }
    }
}

/// Returns what the decryption of a meaningless block with the native mechanism shows; `None` if it shows nothing. For
/// parameters that they do not support, some tokens return an error from `C_DecryptInit` and others from `C_Decrypt`; any
/// other answer is about the block.
fn scheme_of_trial(tried: Result<(), HsmError>) -> Result<Option<Scheme>, HsmError> {
    let refused = |error: &HsmError| PARAMETER_REFUSALS.iter().any(|code| error.is_code(*code));
    match tried {
        Err(error) if refused(&error) => Ok(Some(Scheme::Raw)),
        // The token is busy or broken and gave no answer.
        Err(error) if error.fault().owner == FaultOwner::Member => Err(error),
        // The key may not decrypt, so the parameters stay unknown.
        Err(error @ HsmError::Pkcs11(function, _)) if function != Function::Decrypt => Err(error),
        // The module has no call for a login in between, so the parameters stay unknown.
        Err(error @ HsmError::LoginPerOperation) => Err(error),
        // Some tokens return this for a meaningless block, and others if they have no room.
        Err(error) if error.is_code(RvError::FunctionFailed) => Ok(None),
        _ => Ok(Some(Scheme::Native)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_without_an_answer_decides_nothing() {
        let error = |function, code| HsmError::new(function, code);
        let (init, decrypt) = (Function::DecryptInit, Function::Decrypt);
        for (tried, expected) in [
            (Ok(()), Some(Scheme::Native)),
            (Err(error(decrypt, RvError::EncryptedDataInvalid)), Some(Scheme::Native)),
            (Err(error(decrypt, RvError::GeneralError)), Some(Scheme::Native)),
            (Err(error(init, RvError::MechanismParamInvalid)), Some(Scheme::Raw)),
            (Err(error(decrypt, RvError::ArgumentsBad)), Some(Scheme::Raw)),
            (Err(error(decrypt, RvError::FunctionFailed)), None),
        ] {
            assert_eq!(scheme_of_trial(tried), Ok(expected), "{tried:?}");
        }
        for busy in [
            error(decrypt, RvError::DeviceMemory),
            error(decrypt, RvError::HostMemory),
            error(decrypt, RvError::FunctionCanceled),
            error(init, RvError::FunctionFailed),
            error(init, RvError::KeyFunctionNotPermitted),
            error(decrypt, RvError::DeviceError),
        ] {
            assert_eq!(scheme_of_trial(Err(busy)), Err(busy));
        }
    }
}
