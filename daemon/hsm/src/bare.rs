//! One session of a token with nothing around it: what the token does by itself.
//!
//! No queue, no retry, no judgement, nobody who watches. For measuring what a cluster costs beyond its tokens, and for
//! looking at a token when no daemon runs.

use std::collections::HashMap;
use std::sync::Arc;

use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use zeroize::Zeroizing;

use crate::config::MemberConfig;
use crate::error::HsmError;
use crate::keys::{KeyId, Oaep, SignScheme};
use crate::module::Module;
use crate::request::{KnownGood, Request};
use crate::session::{Key, private_keys};

/// A logged-in session and the token's RSA private keys.
pub struct Bare {
    // In this order: the session ends before the module is given back.
    session: Session,
    module: Held,
    slot: Slot,
    keys: HashMap<KeyId, Key>,
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
    /// # Errors
    /// What the module or the token says; a PIN that is refused has been tried.
    pub fn open(config: &MemberConfig) -> Result<Self, HsmError> {
        let module = Held(Module::acquire(&config.module, &config.env)?);
        let slot = module.0.find_token(&config.token)?;
        let session = module.0.pkcs11().open_ro_session(slot)?;
        match session.login(UserType::User, Some(&config.pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(error) => return Err(error.into()),
        }
        let keys = private_keys(&session, &config.name)?;
        Ok(Self { session, module, slot, keys })
    }

    /// `C_DecryptInit` with CKM_RSA_PKCS_OAEP and one `C_Decrypt`.
    ///
    /// # Errors
    /// What the token says; [`HsmError::NoSuchKey`].
    pub fn decrypt(&self, key: &KeyId, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let key = self.key(key)?;
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        self.module.0.decrypt(&self.session, &oaep.mechanism(), key.handle, ciphertext, room)
    }

    /// `C_SignInit` and one `C_Sign`.
    ///
    /// # Errors
    /// What the token says; [`HsmError::NoSuchKey`].
    pub fn sign(&self, key: &KeyId, scheme: SignScheme, digest: &[u8]) -> Result<Vec<u8>, HsmError> {
        let key = self.key(key)?;
        self.module.0.sign(&self.session, &scheme.mechanism(), key.handle, &scheme.input(digest), key.room())
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

    fn key(&self, id: &KeyId) -> Result<Key, HsmError> {
        self.keys.get(id).copied().ok_or_else(|| HsmError::NoSuchKey(id.clone()))
    }
}
