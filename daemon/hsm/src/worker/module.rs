//! The vendor's library: loading, initialisation and calls.
//!
//! Libraries are never unloaded, because vendors leave threads and exit handlers behind that would run into unmapped
//! memory.

use std::path::{Path, PathBuf};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::ObjectHandle;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use zeroize::Zeroizing;

use crate::code::Function;
use crate::config::{Pin, TokenRef};
use crate::error::{Failure, HsmError};
use crate::worker::discovery;
use crate::worker::ffi::{Direct, TokenFacts};
use crate::worker::pin_flags;

/// A loaded and initialised library.
pub(crate) struct Module {
    path: PathBuf,
    pkcs11: Pkcs11,
    /// `None` if the library can be reached only through cryptoki, which first asks for the length of each result.
    direct: Option<Direct>,
}

impl Module {
    /// Loads and initialises the library, which may use the system's locks. May block for any time in the library. A
    /// library that another user in this process has initialised stays initialised.
    pub(crate) fn load(path: &Path) -> Result<Module, Failure> {
        let unusable = |reason: String| Failure::new(HsmError::Module, format!("{}: {reason}", path.display()));
        let pkcs11 = Pkcs11::new(path).map_err(|error| unusable(error.to_string()))?;
        let direct = Direct::load(path);
        match pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
            Err(error) => return Err(unusable(HsmError::from(error).to_string())),
        }
        Ok(Module { path: path.to_owned(), pkcs11, direct })
    }

    /// Calls `C_Finalize`. No thread may be in a call. May block for any time in the library.
    pub(crate) fn finalize(&self) -> Result<(), HsmError> {
        Ok(self.pkcs11.clone().finalize()?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn pkcs11(&self) -> &Pkcs11 {
        &self.pkcs11
    }

    /// Returns true if an operation takes one call instead of two and permits a login in between.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Searches the current slots for a token. Costs no PIN try.
    pub(crate) fn find_token(&self, token: &TokenRef) -> Result<(Slot, TokenFacts), Failure> {
        let slots = self.pkcs11.get_slots_with_token()?;
        // A broken token must not hide the others.
        let seen: Vec<_> = slots.into_iter().filter_map(|slot| Some((slot, self.token_facts(slot).ok()?))).collect();
        discovery::choose(token, &seen, &self.path)
    }

    pub(crate) fn token_facts(&self, slot: Slot) -> Result<TokenFacts, HsmError> {
        if let Some(direct) = &self.direct {
            return direct.token_facts(slot).map_err(|code| HsmError::new(Function::GetTokenInfo, code));
        }
        let info = self.pkcs11.get_token_info(slot)?;
        Ok(TokenFacts {
            label: info.label().to_owned(),
            serial: info.serial_number().to_owned(),
            initialized: info.token_initialized(),
            user_pin_set: info.user_pin_initialized(),
            pin_tries: pin_flags::tries_of_token(&info),
        })
    }

    /// Calls `C_DecryptInit` and `C_Decrypt` once; `room` is the length of the modulus. If the key requires a login for
    /// every operation, `own_login` logs in between the two calls.
    pub(crate) fn decrypt(
        &self,
        session: &Session,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        own_login: Option<OwnLogin<'_>>,
        ciphertext: &[u8],
        room: usize,
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let Some(direct) = &self.direct else {
            refuse_own_login(own_login)?;
            return Ok(Zeroizing::new(session.decrypt(mechanism, key, ciphertext)?));
        };
        session.decrypt_init(mechanism, key)?;
        own_login.map_or(Ok(()), |login| login(session))?;
        let mut plaintext = Zeroizing::new(vec![0; room]);
        let len = direct
            .decrypt(session, ciphertext, &mut plaintext)
            .map_err(|code| HsmError::new(Function::Decrypt, code))?;
        plaintext.truncate(len);
        Ok(plaintext)
    }

    /// Calls `C_SignInit` and `C_Sign` once; otherwise like [`decrypt`](Self::decrypt).
    pub(crate) fn sign(
        &self,
        session: &Session,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        own_login: Option<OwnLogin<'_>>,
        input: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, HsmError> {
        let Some(direct) = &self.direct else {
            refuse_own_login(own_login)?;
            return Ok(session.sign(mechanism, key, input)?);
        };
        session.sign_init(mechanism, key)?;
        own_login.map_or(Ok(()), |login| login(session))?;
        let mut signature = vec![0; room];
        let len = direct.sign(session, input, &mut signature).map_err(|code| HsmError::new(Function::Sign, code))?;
        signature.truncate(len);
        Ok(signature)
    }
}

/// The login that a key with `CKA_ALWAYS_AUTHENTICATE` requires between the start of an operation and its data.
pub(crate) type OwnLogin<'a> = &'a dyn Fn(&Session) -> Result<(), HsmError>;

/// Logs in for the operation that was started in `session`.
pub(crate) fn login_for_operation(session: &Session, pin: &Pin) -> Result<(), HsmError> {
    Ok(session.login(UserType::ContextSpecific, Some(&pin.to_auth()))?)
}

/// Refuses keys that require such a login: cryptoki starts and finishes an operation in one function.
fn refuse_own_login(login: Option<OwnLogin<'_>>) -> Result<(), HsmError> {
    if login.is_some() {
        return Err(HsmError::LoginPerOperation);
    }
    Ok(())
}
