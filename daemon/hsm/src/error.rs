//! What can go wrong, as callers see it.

use std::path::PathBuf;

use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};

use crate::fault::{BROKEN, Fate, Fault, PIN_REFUSALS, Whose};
use crate::identity::KeyRef;
use crate::keys::KeyId;
use crate::pin_tries::PinTries;

/// What a return code comes to, in a word for labels: `ok`; `refused`, the input is at
/// fault, or may be: for a decryption also when the token gave a result that its check refused; `unable`, this key
/// or token is not made for it; `stale`, a session or handle is to be renewed; `busy`, the token has no room now; `pin`, it
/// refuses the PIN; `broken`, the device is ill or away. For the last four the member is to blame.
pub const RV_CLASSES: [&str; 7] = ["ok", "refused", "unable", "stale", "busy", "pin", "broken"];

/// The class of how a call went, one of [`RV_CLASSES`].
pub(crate) fn class<T>(result: &Result<T, HsmError>) -> &'static str {
    result.as_ref().err().map_or("ok", HsmError::class)
}

/// Why an operation has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HsmError {
    /// A token said no: the return code *and* the call it came from, since one code means different things from different calls.
    #[error("{call}: {rv}")]
    Pkcs11 {
        /// The PKCS#11 function.
        call: &'static str,
        /// The return code as the standard spells it.
        rv: String,
        /// Who is to blame and what follows.
        fault: Fault,
    },
    /// The input does not lead to a result that its own check accepts, and the member is not to blame. Says nothing of
    /// how it failed: a ciphertext that does not decrypt and one that decrypts to the wrong key are the same.
    #[error("the input is not right")]
    Refused {
        /// Whether a token gave a result, which the check refused, rather than an error.
        wrong: bool,
    },
    /// A member's answer is wrong although the input is not: its own check, and the known-good probe, found out.
    #[error("the member gives wrong answers")]
    WrongAnswer,
    /// A call that did not return in time. Its thread is left to itself.
    #[error("{op} hangs at the token")]
    Hung {
        /// What was asked for.
        op: &'static str,
    },
    /// No key with this id and public key, also after looking again.
    #[error("no key {0} on the token")]
    NoSuchKey(KeyRef),
    /// A key with this id is already there.
    #[error("there is already a key {0} on the token")]
    KeyExists(KeyId),
    /// No member could take the call.
    #[error("no HSM can serve: {0}")]
    NoMember(String),
    /// The deadline passed before there was a result.
    #[error("deadline passed")]
    Deadline,
    /// As many calls wait as may wait.
    #[error("too many calls wait for the HSM")]
    QueueFull,
    /// A vendor library could not be loaded or initialised.
    #[error("module {}: {reason}", path.display())]
    Module {
        /// The library.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// No slot holds the token.
    #[error("token {token}: not in any slot of {}", module.display())]
    NoSuchToken {
        /// Which token.
        token: String,
        /// The library that was asked.
        module: PathBuf,
    },
    /// Which of several tokens is meant cannot be known. None was logged in to.
    #[error(
        "token {token}: several tokens of that label: serial {}; the PIN is tried on none of them",
        serials.join(", ")
    )]
    SeveralTokens {
        /// Which token was looked for.
        token: String,
        /// The serial numbers of those that were found.
        serials: Vec<String>,
    },
    /// The token has so few tries left for its PIN that the PIN was not tried.
    #[error("token {token}: the PIN is not tried: {}", tries.meaning())]
    PinNotTried {
        /// Which token.
        token: String,
        /// What it says of its tries.
        tries: PinTries,
    },
    /// The key wants a login for every operation, which this module gives no room for.
    #[error(
        "the key has CKA_ALWAYS_AUTHENTICATE, and this module (see its warning at the start) cannot be called in the order \
         that such keys need"
    )]
    OwnLogin,
    /// A token could not be found or used.
    #[error("token {token}: {reason}")]
    Token {
        /// Which token.
        token: String,
        /// What went wrong.
        reason: String,
    },
}

impl HsmError {
    /// A return code of a call, judged.
    pub(crate) fn new(call: &'static str, code: RvError) -> Self {
        HsmError::Pkcs11 { call, rv: rv_name(code), fault: Fault::of(call, code) }
    }

    /// The token judged the *input*, as opposed to being unavailable: asking again will not help.
    #[must_use]
    pub fn is_data(&self) -> bool {
        self.fault().whose == Whose::Caller
    }

    /// Who is to blame and what follows.
    #[must_use]
    pub fn fault(&self) -> Fault {
        let nobody = |elsewhere| Fault { whose: Whose::Nobody, elsewhere, fate: Fate::Keep };
        match self {
            HsmError::Pkcs11 { fault, .. } => *fault,
            HsmError::Refused { .. } => Fault { whose: Whose::Caller, elsewhere: true, fate: Fate::Keep },
            // Members hold the same keys, but replication may lag.
            HsmError::NoSuchKey(_) | HsmError::QueueFull => nobody(true),
            HsmError::OwnLogin => nobody(true),
            HsmError::KeyExists(_) | HsmError::Deadline => nobody(false),
            HsmError::WrongAnswer
            | HsmError::Hung { .. }
            | HsmError::NoMember(_)
            | HsmError::Module { .. }
            | HsmError::NoSuchToken { .. }
            | HsmError::SeveralTokens { .. }
            | HsmError::PinNotTried { .. }
            | HsmError::Token { .. } => BROKEN,
        }
    }

    /// Whether a member that fails a known-good operation like this does not work: not just late, not just busy elsewhere.
    pub(crate) fn condemns(&self) -> bool {
        let fault = self.fault();
        matches!(self, HsmError::NoSuchKey(_)) || (fault.whose == Whose::Member && fault.fate != Fate::Keep)
    }

    pub(crate) fn class(&self) -> &'static str {
        let Fault { whose, fate, .. } = self.fault();
        match (self, whose, fate) {
            (HsmError::Pkcs11 { rv, .. }, ..) if rv.starts_with("CKR_PIN_") => "pin",
            (HsmError::PinNotTried { .. }, ..) => "pin",
            (_, Whose::Caller | Whose::Unclear, _) => "refused",
            (_, Whose::Nobody, _) => "unable",
            (_, Whose::Member, Fate::Renew) => "stale",
            (_, Whose::Member, Fate::Keep) => "busy",
            (_, Whose::Member, Fate::End) => "broken",
        }
    }

    /// What an administrator has to do before the member can serve; `None`: it may pass by itself, or is not known.
    pub(crate) fn remedy(&self, member: &str) -> Option<String> {
        match self {
            HsmError::SeveralTokens { .. } => {
                Some("name the token by `serial` in place of `token`, or take the others away".to_owned())
            }
            HsmError::PinNotTried { tries, .. } => Some(tries.remedy(member)),
            _ => None,
        }
    }

    /// A token refused the PIN, which is not to be tried again.
    pub(crate) fn refuses_pin(&self) -> bool {
        PIN_REFUSALS.iter().any(|code| self.is_code(*code))
    }

    pub(crate) fn is_code(&self, code: RvError) -> bool {
        matches!(self, HsmError::Pkcs11 { rv, .. } if *rv == rv_name(code))
    }
}

impl From<Error> for HsmError {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(code, function) => HsmError::new(call_name(function), code),
            Error::NullFunctionPointer | Error::NotSupported => {
                HsmError::new("C_GetFunctionList", RvError::FunctionNotSupported)
            }
            // Conversions between integer widths, non-UTF-8 texts: the library answered nonsense.
            other => HsmError::Token { token: "answer".to_owned(), reason: other.to_string() },
        }
    }
}

/// `CKR_DEVICE_ERROR` for `DeviceError`: the crate below names its variants after the standard's constants.
pub(crate) fn rv_name(code: RvError) -> String {
    match code {
        RvError::VendorDefined(raw) => return format!("CKR_VENDOR_DEFINED_{raw:#x}"),
        RvError::UnknownErrorCode(raw) => return format!("CKR_UNKNOWN_{raw:#x}"),
        _ => {}
    }
    let mut name = String::from("CKR");
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// The functions that this crate calls.
fn call_name(function: Function) -> &'static str {
    match function {
        Function::Initialize => "C_Initialize",
        Function::Finalize => "C_Finalize",
        Function::GetFunctionList => "C_GetFunctionList",
        Function::GetSlotList => "C_GetSlotList",
        Function::GetTokenInfo => "C_GetTokenInfo",
        Function::InitToken => "C_InitToken",
        Function::InitPIN => "C_InitPIN",
        Function::OpenSession => "C_OpenSession",
        Function::CloseSession => "C_CloseSession",
        Function::GetSessionInfo => "C_GetSessionInfo",
        Function::Login => "C_Login",
        Function::Logout => "C_Logout",
        Function::CreateObject => "C_CreateObject",
        Function::DestroyObject => "C_DestroyObject",
        Function::GetAttributeValue => "C_GetAttributeValue",
        Function::FindObjectsInit => "C_FindObjectsInit",
        Function::FindObjects => "C_FindObjects",
        Function::DecryptInit => "C_DecryptInit",
        Function::Decrypt => "C_Decrypt",
        Function::SignInit => "C_SignInit",
        Function::Sign => "C_Sign",
        Function::GenerateKeyPair => "C_GenerateKeyPair",
        Function::GenerateRandom => "C_GenerateRandom",
        _ => "PKCS#11",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_spelt_as_in_the_standard() {
        for (code, name) in [
            (RvError::GeneralError, "CKR_GENERAL_ERROR"),
            (RvError::EncryptedDataLenRange, "CKR_ENCRYPTED_DATA_LEN_RANGE"),
            (RvError::RandomNoRng, "CKR_RANDOM_NO_RNG"),
            (RvError::SessionReadWriteSoExists, "CKR_SESSION_READ_WRITE_SO_EXISTS"),
            (RvError::VendorDefined(0x8000_0001), "CKR_VENDOR_DEFINED_0x80000001"),
        ] {
            assert_eq!(rv_name(code), name);
        }
        let error = HsmError::new("C_Sign", RvError::DeviceError);
        assert_eq!(error.to_string(), "C_Sign: CKR_DEVICE_ERROR");
        assert_eq!(error.class(), "broken");
        assert!(error.is_code(RvError::DeviceError));
    }
}
