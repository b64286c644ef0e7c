//! One session of a token with nothing around it: what the token does by itself.
//!
//! No queue, no retry, no judgement, nobody who watches. For measuring what a cluster costs beyond its tokens, and for
//! looking at a token when no daemon runs.

use std::sync::Arc;

use cryptoki::error::{Error, RvError};
use cryptoki::object::ObjectHandle;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use zeroize::Zeroizing;

use crate::config::{MemberConfig, Pin};
use crate::error::HsmError;
use crate::identity::KeyRef;
use crate::key_table::{KeyTable, Purpose};
use crate::keys::{Oaep, SignScheme};
use crate::module::{Module, OwnLogin, login_for_operation};
use crate::pin_tries::Word;
use crate::request::{KnownGood, Request};
use crate::session::{Key, private_keys};

/// A logged-in session and the token's RSA private keys.
pub struct Bare {
    // In this order: the session ends before the module is given back.
    session: Session,
    module: Held,
    slot: Slot,
    keys: KeyTable<ObjectHandle>,
    /// For keys that want a login for every operation.
    pin: Pin,
}

/// A module in use.
struct Held(Arc<Module>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Bare {
    /// Loads the module if nobody has, finds the token, opens a session, logs in once.
    ///
    /// Sets the environment that the module wants: to be called first while the process has one thread.
    ///
    /// The PIN is not tried on a token that says of wrong PINs before: this is for looking, and a look must not bring a token
    /// nearer to its lock.
    ///
    /// # Errors
    /// What the module or the token says; a PIN that is refused has been tried.
    pub fn open(config: &MemberConfig) -> Result<Self, HsmError> {
        let module = Held(Module::acquire(&config.module, &config.env)?);
        let (slot, facts) = module.0.find_token(&config.token)?;
        if !facts.pin_tries.allow(Word::Look) {
            return Err(HsmError::PinNotTried { token: config.token.to_string(), tries: facts.pin_tries });
        }
        let session = module.0.pkcs11().open_ro_session(slot)?;
        match session.login(UserType::User, Some(&config.pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(error) => return Err(error.into()),
        }
        let keys = private_keys(&session)?;
        Ok(Self { session, module, slot, keys, pin: config.pin.clone() })
    }

    /// `C_DecryptInit` with CKM_RSA_PKCS_OAEP and one `C_Decrypt`.
    ///
    /// # Errors
    /// What the token says; [`HsmError::NoSuchKey`].
    pub fn decrypt(&self, key: &KeyRef, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let key = self.key(key, Purpose::Decrypt)?;
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        let login = |session: &Session| login_for_operation(session, &self.pin);
        let login: Option<OwnLogin<'_>> = if key.always_authenticate { Some(&login) } else { None };
        self.module.0.decrypt(&self.session, &oaep.mechanism(), key.handle, login, ciphertext, room)
    }

    /// `C_SignInit` and one `C_Sign`.
    ///
    /// # Errors
    /// What the token says; [`HsmError::NoSuchKey`].
    pub fn sign(&self, key: &KeyRef, scheme: SignScheme, digest: &[u8]) -> Result<Vec<u8>, HsmError> {
        let key = self.key(key, Purpose::Sign)?;
        let login = |session: &Session| login_for_operation(session, &self.pin);
        let login: Option<OwnLogin<'_>> = if key.always_authenticate { Some(&login) } else { None };
        let input = scheme.input(digest);
        self.module.0.sign(&self.session, &scheme.mechanism(), key.handle, login, &input, key.room())
    }

    /// Does an operation whose right result is known.
    ///
    /// # Errors
    /// What the token says; [`HsmError::NoSuchKey`]; [`HsmError::WrongAnswer`].
    pub fn prove(&self, known: &KnownGood) -> Result<(), HsmError> {
        let octets = match &*known.0 {
            Request::Decrypt { key, oaep, ciphertext, .. } => self.decrypt(key, *oaep, ciphertext)?,
            Request::Sign { key, scheme, digest, .. } => Zeroizing::new(self.sign(key, *scheme, digest)?),
            // Nothing else is known.
            _ => return Ok(()),
        };
        if known.0.accepts(&octets) { Ok(()) } else { Err(HsmError::WrongAnswer) }
    }

    /// How many more sessions the token gives, up to `wanted`; they are closed again.
    #[must_use]
    pub fn room_for(&self, wanted: usize) -> usize {
        let open = |_| self.module.0.pkcs11().open_ro_session(self.slot).ok();
        (0..wanted).map_while(open).collect::<Vec<_>>().len()
    }

    fn key(&self, wanted: &KeyRef, purpose: Purpose) -> Result<Key, HsmError> {
        self.keys.find(wanted, purpose).copied().ok_or_else(|| HsmError::NoSuchKey(wanted.clone()))
    }
}
