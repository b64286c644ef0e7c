//! One session of a token without any of the cluster's machinery.
//!
//! There is no worker process, no queue, no retry, no judgement and no watchdog. This is for measuring the cost that a
//! cluster adds to its tokens, and for inspecting a token while no daemon runs.

use cryptoki::error::{Error, RvError};
use cryptoki::object::ObjectHandle;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use zeroize::Zeroizing;

use crate::config::{MemberConfig, Pin};
use crate::error::{Failure, HsmError};
use crate::identity::{KeyId, KeyRef};
use crate::job::KnownAnswerTest;
use crate::keys::{Oaep, SignScheme};
use crate::link::Request;
use crate::pin_tries::Word;
use crate::worker::ffi::set_env;
use crate::worker::key_table::{KeyTable, Purpose};
use crate::worker::mechanism;
use crate::worker::module::{OwnLogin, login_for_operation};
use crate::worker::objects::{Key, private_keys};
use crate::worker::tool::Used;

/// A session that is logged in, with the token's RSA private keys.
pub struct RawSession {
    // The order of the fields matters: the session is closed before the module is released.
    session: Session,
    module: Used,
    slot: Slot,
    keys: KeyTable<ObjectHandle>,
    /// Used for keys that require a login for every operation.
    pin: Pin,
}

impl RawSession {
    /// Loads the module, finds the token, opens a session and logs in once.
    ///
    /// Sets the environment variables of `config`, so call it while the process has only one thread.
    ///
    /// Does not try the PIN if the token reports earlier wrong PINs: an inspection must not bring a token nearer to its
    /// lock.
    ///
    /// # Errors
    /// Returns the error of the module or the token. If the error is a refused PIN, the PIN has been tried.
    pub fn open(config: &MemberConfig) -> Result<Self, Failure> {
        set_env(&config.env);
        let module = Used::load(&config.module)?;
        let (slot, facts) = module.find_token(&config.token)?;
        if !facts.pin_tries.allow(Word::Look) {
            return Err(Failure::new(HsmError::PinNotTried(facts.pin_tries), format!("token {}", config.token)));
        }
        let session = module.pkcs11().open_ro_session(slot)?;
        match session.login(UserType::User, Some(&config.pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(error) => return Err(error.into()),
        }
        let keys = private_keys(&session)?;
        Ok(Self { session, module, slot, keys, pin: config.pin.clone() })
    }

    /// Calls `C_DecryptInit` with CKM_RSA_PKCS_OAEP and `C_Decrypt` once.
    ///
    /// # Errors
    /// Returns the token's error; [`HsmError::NoSuchKey`].
    pub fn decrypt(&self, key: &KeyRef, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let key = self.key(key, Purpose::Decrypt)?;
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        let login = |session: &Session| login_for_operation(session, &self.pin);
        let login: Option<OwnLogin<'_>> = if key.always_authenticate { Some(&login) } else { None };
        let mechanism = mechanism::decryption(oaep);
        self.module.decrypt(&self.session, &mechanism, key.handle, login, ciphertext, room)
    }

    /// Calls `C_SignInit` and `C_Sign` once.
    ///
    /// # Errors
    /// Returns the token's error; [`HsmError::NoSuchKey`].
    pub fn sign(&self, key: &KeyRef, scheme: SignScheme, digest: &[u8]) -> Result<Vec<u8>, HsmError> {
        let key = self.key(key, Purpose::Sign)?;
        let login = |session: &Session| login_for_operation(session, &self.pin);
        let login: Option<OwnLogin<'_>> = if key.always_authenticate { Some(&login) } else { None };
        let input = mechanism::signed_input(scheme, digest);
        self.module.sign(&self.session, &mechanism::signature(scheme), key.handle, login, &input, key.room())
    }

    /// Runs a known-answer test.
    ///
    /// # Errors
    /// Returns the token's error; [`HsmError::NoSuchKey`]; [`HsmError::WrongAnswer`].
    pub fn self_test(&self, known: &KnownAnswerTest) -> Result<(), HsmError> {
        let bytes = match postcard::from_bytes(&known.0.request) {
            Ok(Request::Decrypt { id, public, oaep, ciphertext }) => {
                self.decrypt(&KeyRef { id: KeyId(id.to_vec()), public }, oaep, ciphertext)?
            }
            Ok(Request::Sign { id, public, scheme, digest }) => {
                Zeroizing::new(self.sign(&KeyRef { id: KeyId(id.to_vec()), public }, scheme, digest)?)
            }
            _ => return Err(HsmError::UnexpectedReply),
        };
        if known.0.accepts(&bytes) { Ok(()) } else { Err(HsmError::WrongAnswer) }
    }

    /// Returns the number of further sessions that the token grants, at most `wanted`. The sessions are closed again.
    #[must_use]
    pub fn room_for(&self, wanted: usize) -> usize {
        let open = |_| self.module.pkcs11().open_ro_session(self.slot).ok();
        (0..wanted).map_while(open).collect::<Vec<_>>().len()
    }

    fn key(&self, wanted: &KeyRef, purpose: Purpose) -> Result<Key, HsmError> {
        self.keys.find(&wanted.id.0, wanted.public, purpose).copied().ok_or(HsmError::NoSuchKey)
    }
}
