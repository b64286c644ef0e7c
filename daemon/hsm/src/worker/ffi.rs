//! All unsafe code of the daemon: environment variables, inherited descriptors, and PKCS#11 functions that are called
//! directly instead of through cryptoki.
//!
//! `C_GetTokenInfo`: cryptoki rejects the whole answer if the token's clock is not in the standard's format, as with
//! opencryptoki. `C_Decrypt` and `C_Sign`: cryptoki's `decrypt()` and `sign()` first ask for the length of the result. This
//! makes two calls, which on a network HSM are two round trips. RSA results are never longer than the modulus, so one call
//! with a buffer of that size is enough.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;
use std::ptr;

use cryptoki::error::{Rv, RvError};
use cryptoki::session::Session;
use cryptoki::slot::Slot;
use cryptoki_sys::{
    CK_BYTE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_TOKEN_INFO, CK_ULONG, CKF_TOKEN_INITIALIZED,
    CKF_USER_PIN_INITIALIZED, CKR_OK,
};
use rustix::process::{Resource, getrlimit};

use crate::pin_tries::PinTries;
use crate::worker::pin_flags;

/// The common signature of `C_Decrypt` and `C_Sign`: input, and a buffer for the result.
type OneCall = unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_BYTE, CK_ULONG, *mut CK_BYTE, *mut CK_ULONG) -> CK_RV;

type GetTokenInfo = unsafe extern "C" fn(CK_SLOT_ID, *mut CK_TOKEN_INFO) -> CK_RV;

/// The facts about a token that the worker uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TokenFacts {
    pub(crate) label: String,
    pub(crate) serial: String,
    pub(crate) initialized: bool,
    pub(crate) user_pin_set: bool,
    pub(crate) pin_tries: PinTries,
}

/// Sets environment variables of the process. Call it before any other thread exists that may read the environment. A
/// thread that only writes to descriptors, such as the log's, never reads it.
pub fn set_env(vars: &BTreeMap<String, String>) {
    for (name, value) in vars {
        set_var(name, value.as_ref());
    }
}

#[expect(clippy::disallowed_methods, reason = "callers come before other threads exist")]
fn set_var(name: &str, value: &OsStr) {
    // The standard library panics on these names and values, and no variable can have them.
    let unusable = name.is_empty() || name.contains(['=', '\0']) || value.as_encoded_bytes().contains(&0);
    if unusable || std::env::var_os(name).as_deref() == Some(value) {
        return;
    }
    // SAFETY: the documentation of `set_env` requires that no thread exists that may read the environment, so nothing reads
    // it while it changes.
    unsafe { std::env::set_var(name, value) };
}

/// The first descriptor after standard input, output and error.
const FIRST_OTHER: RawFd = 3;

/// Closes all descriptors except the standard ones. Only for the start of a process, before it has opened any descriptor.
pub(crate) fn close_inherited() {
    let listed = std::fs::read_dir("/proc/self/fd").map(|entries| {
        let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        entries.filter_map(number).collect::<Vec<RawFd>>()
    });
    let descriptors = listed.unwrap_or_else(|_| {
        let most = getrlimit(Resource::Nofile).current.and_then(|most| RawFd::try_from(most).ok());
        (FIRST_OTHER..most.unwrap_or(RawFd::MAX).min(1 << 20)).collect()
    });
    for descriptor in descriptors.into_iter().filter(|descriptor| *descriptor >= FIRST_OTHER) {
        // The listing's own descriptor is closed by now; to close it again is an error.
        // SAFETY: the number is only queried.
        if rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(descriptor) }).is_err() {
            continue;
        }
        // SAFETY: at this point of the process's life no value owns a descriptor: all open descriptors were inherited.
        unsafe { rustix::io::close(descriptor) };
    }
}

/// Raw functions of a module that cryptoki has also loaded.
pub(crate) struct Direct {
    decrypt: OneCall,
    sign: OneCall,
    get_token_info: GetTokenInfo,
    /// Keeps the library, and so its functions, loaded.
    _library: cryptoki_sys::Pkcs11,
}

impl Direct {
    /// Loads the functions; `None` if they may belong to a different instance of the module than the instance that cryptoki uses.
    pub(crate) fn load(path: &Path) -> Option<Direct> {
        // SAFETY: cryptoki has loaded this path before, so loading runs no new code: dlopen returns the library that is
        // already loaded.
        let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.ok()?;
        let exported = (&library.C_Decrypt, &library.C_Sign, &library.C_GetTokenInfo);
        let (decrypt, sign, get_token_info) = match exported {
            (Ok(decrypt), Ok(sign), Ok(get_token_info)) => (*decrypt, *sign, *get_token_info),
            _ => Self::from_function_list(&library)?,
        };
        Some(Direct { decrypt, sign, get_token_info, _library: library })
    }

    /// Some modules (p11-kit's client) create a new, unconnected instance whenever the function list is requested. Such
    /// modules return two lists at different addresses; all calls to them go through cryptoki.
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
        // SAFETY: the call succeeded and the pointer is not null. The standard says that the module owns the list while the
        // library is loaded. The structure may be packed, so it is copied out instead of borrowed.
        let functions = unsafe { ptr::read_unaligned(list) };
        Some((functions.C_Decrypt?, functions.C_Sign?, functions.C_GetTokenInfo?))
    }

    /// Calls `C_GetTokenInfo` and returns the fields in use.
    pub(crate) fn token_facts(&self, slot: Slot) -> Result<TokenFacts, RvError> {
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: the function comes from the library that `self` keeps loaded, and fills the structure that it gets.
        match Rv::from(unsafe { (self.get_token_info)(slot.into(), &raw mut info) }) {
            Rv::Ok => {}
            Rv::Error(code) => return Err(code),
        }
        // Texts are padded with blanks; some tokens pad them with zeros.
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches([' ', '\0']).to_owned();
        Ok(TokenFacts {
            label: text(&info.label),
            serial: text(&info.serialNumber),
            initialized: info.flags & CKF_TOKEN_INITIALIZED != 0,
            user_pin_set: info.flags & CKF_USER_PIN_INITIALIZED != 0,
            pin_tries: pin_flags::tries_of(info.flags),
        })
    }

    /// Makes one `C_Decrypt` into `output` and returns the length of the result. `C_DecryptInit` must have succeeded on
    /// this session.
    pub(crate) fn decrypt(&self, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        Self::call(self.decrypt, session, input, output)
    }

    /// Makes one `C_Sign` into `output` and returns the length of the result. `C_SignInit` must have succeeded on this
    /// session.
    pub(crate) fn sign(&self, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        Self::call(self.sign, session, input, output)
    }

    fn call(function: OneCall, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize, RvError> {
        let input_len = CK_ULONG::try_from(input.len()).map_err(|_| RvError::DataLenRange)?;
        let mut len = CK_ULONG::try_from(output.len()).map_err(|_| RvError::HostMemory)?;
        // SAFETY: `function` comes from the library that `self` keeps loaded. The session handle is open, and only this
        // thread uses it, since `Session` is not `Sync`. Both buffers have the given lengths. The module only reads the
        // input (the standard's prototype lacks the const) and writes at most `len` bytes of the output.
        let rv = unsafe {
            function(session.handle(), input.as_ptr().cast_mut(), input_len, output.as_mut_ptr(), &raw mut len)
        };
        match Rv::from(rv) {
            // A length beyond the buffer is an invalid answer of the module.
            Rv::Ok => usize::try_from(len).ok().filter(|len| *len <= output.len()).ok_or(RvError::BufferTooSmall),
            Rv::Error(code) => Err(code),
        }
    }
}

/// Calls `C_CloseAllSessions`, which cryptoki lacks: it simulates a token that resets its connections.
#[cfg(test)]
pub(crate) fn close_all_sessions(path: &Path, slot: Slot) -> bool {
    // SAFETY: as in `Direct::load`; the library is already loaded.
    let Ok(library) = (unsafe { cryptoki_sys::Pkcs11::new(path) }) else { return false };
    // SAFETY: the function takes a number and comes from a loaded library.
    library.C_CloseAllSessions.as_ref().is_ok_and(|close| unsafe { close(slot.into()) } == CKR_OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_set_are_passed_over() {
        for name in ["", "A=B", "A\0B"] {
            set_var(name, OsStr::new("x"));
        }
        set_var("CLAVIGER_HSM_TEST", OsStr::new("a\0b"));
        assert!(std::env::var_os("CLAVIGER_HSM_TEST").is_none());
    }
}
