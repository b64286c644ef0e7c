//! A module in a single-process tool, which may use it several times. The last user finalises it.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use claviger_process::lock::lock;
use cryptoki::session::UserType;
use cryptoki::slot::Slot;

use crate::config::Pin;
use crate::error::{Failure, HsmError};
use crate::worker::ffi::TokenFacts;
use crate::worker::module::Module;

/// Number of users of each library in this process.
static USERS: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// A module in use.
pub(crate) struct Used(Module);

impl Used {
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        // Held during initialisation, so that no other user finalises the library meanwhile.
        let mut users = lock(&USERS);
        let module = Module::load(path)?;
        *users.entry(path.to_owned()).or_default() += 1;
        Ok(Used(module))
    }
}

impl Deref for Used {
    type Target = Module;

    fn deref(&self) -> &Module {
        &self.0
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut users = lock(&USERS);
        let Some(count) = users.get_mut(self.0.path()) else { return };
        *count -= 1;
        if *count == 0 {
            users.remove(self.0.path());
            // A tool ignores errors of finalisation.
            let _ = self.0.finalize();
        }
    }
}

/// Initialises the first uninitialised token of a module and sets its user PIN. For labs and tests.
///
/// # Errors
/// Returns the module's error; [`HsmError::NoSuchToken`] if no slot has an uninitialised token.
pub fn init_token(module: &Path, label: &str, so_pin: &Pin, user_pin: &Pin) -> Result<(), Failure> {
    let module = Used::load(module)?;
    let find = |wanted: &dyn Fn(&TokenFacts) -> bool| -> Result<Option<Slot>, HsmError> {
        let slots = module.pkcs11().get_slots_with_token()?;
        Ok(slots.into_iter().find(|slot| module.token_facts(*slot).is_ok_and(|facts| wanted(&facts))))
    };
    let missing = |why: &str| Failure::new(HsmError::NoSuchToken, format!("label {label:?}: {why}"));
    let blank = find(&|facts| !facts.initialized)?.ok_or_else(|| missing("no slot has an uninitialised token"))?;
    module.pkcs11().init_token(blank, &so_pin.to_auth(), label)?;
    // The token may have moved to another slot. Other tokens with the same label already have a user PIN.
    let fresh = find(&|facts| facts.initialized && !facts.user_pin_set && facts.label == label)?
        .ok_or_else(|| missing("gone after it was initialised"))?;
    let session = module.pkcs11().open_rw_session(fresh)?;
    session.login(UserType::So, Some(&so_pin.to_auth()))?;
    let set = session.init_pin(&user_pin.to_auth());
    session.logout()?;
    Ok(set?)
}
