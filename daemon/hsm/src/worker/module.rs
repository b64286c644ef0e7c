//! A vendor's library: loaded, initialised, and called.
//!
//! Libraries are never unloaded: vendors leave threads and exit handlers behind that would run into unmapped memory.

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

/// A library that is initialised.
pub(crate) struct Module {
    path: PathBuf,
    pkcs11: Pkcs11,
    /// `None` when only cryptoki's probing calls reach the instance.
    direct: Option<Direct>,
}

impl Module {
    /// Loads and initialises it; it may use the system's locks. May block as long as the vendor likes. One that is initialised
    /// already, by another user in this process, stays so.
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

    /// `C_Finalize`, when no thread is in a call. May block as long as the vendor likes.
    pub(crate) fn finalize(&self) -> Result<(), HsmError> {
        Ok(self.pkcs11.clone().finalize()?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn pkcs11(&self) -> &Pkcs11 {
        &self.pkcs11
    }

    /// Whether an operation takes one call rather than two, and can have a login in between.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Looks a token up among the slots there are now. Costs no try of its PIN.
    pub(crate) fn find_token(&self, token: &TokenRef) -> Result<(Slot, TokenFacts), Failure> {
        let slots = self.pkcs11.get_slots_with_token()?;
        // One broken token must not hide the others.
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

    /// `C_DecryptInit` and one `C_Decrypt`; `room` is the length of the modulus. A key that wants a login for every
    /// operation gets it in between, by `own_login`.
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

    /// `C_SignInit` and one `C_Sign`; the rest is as in [`decrypt`](Self::decrypt).
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

/// The login that a key with `CKA_ALWAYS_AUTHENTICATE` wants between the start of an operation and its data.
pub(crate) type OwnLogin<'a> = &'a dyn Fn(&Session) -> Result<(), HsmError>;

/// Logs in for the operation that was started in `session`.
pub(crate) fn login_for_operation(session: &Session, pin: &Pin) -> Result<(), HsmError> {
    Ok(session.login(UserType::ContextSpecific, Some(&pin.to_auth()))?)
}

/// cryptoki starts and finishes an operation in one function, with no room for a login in between.
fn refuse_own_login(login: Option<OwnLogin<'_>>) -> Result<(), HsmError> {
    if login.is_some() {
        return Err(HsmError::LoginPerOperation);
    }
    Ok(())
}
