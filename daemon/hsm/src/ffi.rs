//! All unsafe code of the daemon: environment variables, and the PKCS#11 functions that are called past cryptoki.
//!
//! `C_GetTokenInfo`: cryptoki refuses the whole answer when the token's clock is not in the standard's format, which
//! opencryptoki's is not. `C_Decrypt` and `C_Sign`: cryptoki's `decrypt()` and `sign()` ask for the length of the result
//! before they ask for the result: two calls, and on a network HSM two round trips. RSA results are never longer than the
//! modulus, so one call into a buffer of that size does.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::ptr;

use cryptoki::error::{Rv, RvError};
use cryptoki::session::Session;
use cryptoki::slot::Slot;
use cryptoki_sys::{
    CK_BYTE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_TOKEN_INFO, CK_ULONG, CKF_TOKEN_INITIALIZED,
    CKF_USER_PIN_INITIALIZED, CKR_OK,
};

use crate::pin_tries::PinTries;

/// `C_Decrypt` and `C_Sign` have the same shape: input, and room for a result.
type OneCall = unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_BYTE, CK_ULONG, *mut CK_BYTE, *mut CK_ULONG) -> CK_RV;

type GetTokenInfo = unsafe extern "C" fn(CK_SLOT_ID, *mut CK_TOKEN_INFO) -> CK_RV;

/// What matters about a token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TokenFacts {
    pub(crate) label: String,
    pub(crate) serial: String,
    pub(crate) initialized: bool,
    pub(crate) user_pin_set: bool,
    pub(crate) pin_tries: PinTries,
}

/// Sets environment variables of the process. Call before any other thread exists that may read the environment: one that only
/// writes to descriptors, as that of the log does, never looks at it.
pub fn set_env(vars: &BTreeMap<String, String>) {
    for (name, value) in vars {
        set_var(name, Some(value.as_ref()));
    }
}

/// Sets or removes one variable, if that changes anything. The same rule holds: no other threads.
pub(crate) fn set_var(name: &str, value: Option<&OsStr>) {
    // The standard library panics at these, so they cannot name a variable anyway.
    let unusable = name.is_empty()
        || name.contains(['=', '\0'])
        || value.is_some_and(|value| value.as_encoded_bytes().contains(&0));
    if unusable || std::env::var_os(name).as_deref() == value {
        return;
    }
    match value {
        // SAFETY: callers are told, here and in the documentation of `Cluster::load` and `set_env`, to come before threads
        // exist that may read the environment, so that nothing reads it while it changes.
        Some(value) => unsafe { std::env::set_var(name, value) },
        // SAFETY: as above.
        None => unsafe { std::env::remove_var(name) },
    }
}

/// Changes the value of a variable that exists, while other threads may live. Whether the variable is as wanted now: making
/// and removing one moves others around, and is refused.
pub(crate) fn change_var(name: &str, value: Option<&OsStr>) -> bool {
    let is = std::env::var_os(name);
    if is.as_deref() == value {
        return true;
    }
    match (is, value) {
        (Some(_), Some(value)) if cfg!(target_env = "gnu") && !value.as_encoded_bytes().contains(&0) => {
            // SAFETY: Rust's own readers are kept out by the standard library's lock. For readers in C, glibc's setenv puts
            // the new string into the existing variable's place with one pointer store, neither moves the array nor frees
            // the old string (it keeps every string it ever made), so that a getenv at the same time finds one or the other.
            unsafe { std::env::set_var(name, value) };
            true
        }
        _ => false,
    }
}

/// Raw functions of a module that cryptoki has loaded too.
pub(crate) struct Direct {
    decrypt: OneCall,
    sign: OneCall,
    get_token_info: GetTokenInfo,
    /// Keeps the library loaded, and with it the functions.
    _library: cryptoki_sys::Pkcs11,
}

impl Direct {
    /// `None` when there is no way to be sure of reaching the same module instance that cryptoki talks to.
    pub(crate) fn load(path: &Path) -> Option<Direct> {
        // SAFETY: cryptoki has loaded this very path before, so loading runs no new code: dlopen hands out the library that
        // is already there.
        let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.ok()?;
        let exported = (&library.C_Decrypt, &library.C_Sign, &library.C_GetTokenInfo);
        let (decrypt, sign, get_token_info) = match exported {
            (Ok(decrypt), Ok(sign), Ok(get_token_info)) => (*decrypt, *sign, *get_token_info),
            _ => Self::from_function_list(&library)?,
        };
        Some(Direct { decrypt, sign, get_token_info, _library: library })
    }

    /// Some modules (p11-kit's client) make a new, unconnected instance whenever they are asked for their functions. They
    /// are recognised by two lists at different places, and left to cryptoki.
    fn from_function_list(library: &cryptoki_sys::Pkcs11) -> Option<(OneCall, OneCall, GetTokenInfo)> {
        let get = *library.C_GetFunctionList.as_ref().ok()?;
        let mut lists = [ptr::null_mut(); 2];
        for list in &mut lists {
            // SAFETY: `list` points to a writable pointer; C_GetFunctionList may be called at any time, even before
            // C_Initialize.
            if unsafe { get(list) } != CKR_OK || list.is_null() {
                return None;
            }
        }
        let [list, again] = lists;
        if list != again {
            return None;
        }
        // SAFETY: the call succeeded and the pointer is not null; the standard has the module own the list for as long as the
        // library is loaded. The structure may be packed, so it is copied out rather than referred to.
        let functions = unsafe { ptr::read_unaligned(list) };
        Some((functions.C_Decrypt?, functions.C_Sign?, functions.C_GetTokenInfo?))
    }

    /// `C_GetTokenInfo`, without what nobody asks for.
    pub(crate) fn token_facts(&self, slot: Slot) -> Result<TokenFacts, RvError> {
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: the function comes from the library that `self` keeps loaded, and fills the structure that it is given.
        match Rv::from(unsafe { (self.get_token_info)(slot.into(), &raw mut info) }) {
            Rv::Ok => {}
            Rv::Error(code) => return Err(code),
        }
        // Texts are padded with blanks; some tokens pad with zeros.
        let text = |octets: &[u8]| String::from_utf8_lossy(octets).trim_end_matches([' ', '\0']).to_owned();
        Ok(TokenFacts {
            label: text(&info.label),
            serial: text(&info.serialNumber),
            initialized: info.flags & CKF_TOKEN_INITIALIZED != 0,
            user_pin_set: info.flags & CKF_USER_PIN_INITIALIZED != 0,
            pin_tries: PinTries::of(info.flags),
        })
    }

    /// One `C_Decrypt` into `output`; how much of it was filled. `C_DecryptInit` must have succeeded on this session.
    pub(crate) fn decrypt(&self, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        Self::call(self.decrypt, session, input, output)
    }

    /// One `C_Sign` into `output`; how much of it was filled. `C_SignInit` must have succeeded on this session.
    pub(crate) fn sign(&self, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        Self::call(self.sign, session, input, output)
    }

    fn call(function: OneCall, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        let input_len = CK_ULONG::try_from(input.len()).map_err(|_| RvError::DataLenRange)?;
        let mut len = CK_ULONG::try_from(output.len()).map_err(|_| RvError::HostMemory)?;
        // SAFETY: `function` comes from the library that `self` keeps loaded. The session handle is open, and used by this
        // thread alone, since `Session` is not `Sync`. Both buffers are as long as is said; the module only reads the input
        // (the standard's prototype lacks the const) and writes no more than `len` octets of the output.
        let rv = unsafe {
            function(session.handle(), input.as_ptr().cast_mut(), input_len, output.as_mut_ptr(), &raw mut len)
        };
        match Rv::from(rv) {
            // A module that claims more than there was room for is not believed.
            Rv::Ok => usize::try_from(len).ok().filter(|len| *len <= output.len()).ok_or(RvError::BufferTooSmall),
            Rv::Error(code) => Err(code),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_set_are_passed_over() {
        for name in ["", "A=B", "A\0B"] {
            set_var(name, Some(OsStr::new("x")));
        }
        set_var("CLAVIGER_HSM_TEST", Some(OsStr::new("a\0b")));
        assert!(std::env::var_os("CLAVIGER_HSM_TEST").is_none());
    }
}
