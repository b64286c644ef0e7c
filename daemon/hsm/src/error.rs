//! Errors as callers see them: small `Copy` values. Details for people, such as a path or a message of a library, travel
//! beside the error in a [`Failure`].

use std::fmt;

use cryptoki::error::{Error, RvError};
use serde::{Deserialize, Serialize};

use crate::code::{Function, ReturnCode};
use crate::fault::{BROKEN, Fault, FaultOwner, PIN_REFUSALS, SessionAction};
use crate::operation::Operation;
use crate::pin_tries::PinTries;

/// Classes of return codes, used as metric labels. `ok`; `refused`: the input is invalid or may be (for a decryption this
/// includes a result that its check rejected); `unable`: the key or token does not support the operation; `stale`: a
/// session or handle must be renewed; `busy`: the token has no capacity now; `pin`: the token refuses the PIN; `broken`:
/// the device fails or is missing. The last four are faults of the member.
pub const RV_CLASSES: [&str; 7] = ["ok", "refused", "unable", "stale", "busy", "pin", "broken"];

/// Returns the class of a call's result, one of [`RV_CLASSES`].
pub(crate) fn class<T>(result: &Result<T, HsmError>) -> &'static str {
    result.as_ref().err().map_or("ok", |error| error.class())
}

/// Reason why an operation has no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum HsmError {
    /// A token returned an error: the function *and* its return code, since the meaning of a code depends on the function.
    #[error("{}: {_1}", _0.name())]
    Pkcs11(Function, ReturnCode),
    /// The input gives no result that the operation's check accepts, and the member is not at fault. The text is the same
    /// for a ciphertext that does not decrypt and for a ciphertext that decrypts to a wrong key.
    #[error("the input is not right")]
    Refused {
        /// True if a token gave a result that the check rejected; false if the token returned an error.
        wrong: bool,
    },
    /// The member's result is wrong although the input is valid. The check of the result and a known-answer test show it.
    #[error("the member gives wrong answers")]
    WrongAnswer,
    /// A call did not return in time. Its worker process is killed.
    #[error("{} hangs at the token", _0.name())]
    Hung(Operation),
    /// The member's worker process ended or broke the protocol of its socket.
    #[error("{0}")]
    Worker(WorkerFault),
    /// The token holds no key with this id and public key, even after a fresh search.
    #[error("no such key on the token")]
    NoSuchKey,
    /// The key does not work on this token, although the token works with another key or in another way.
    #[error("the key does not work on the token")]
    FaultyKey,
    /// The token already holds a key with this id.
    #[error("the token already has a key with this id")]
    KeyExists,
    /// The deadline passed before there was a result.
    #[error("deadline passed")]
    Deadline,
    /// The queue of waiting calls is full.
    #[error("too many calls wait for the HSM")]
    QueueFull,
    /// Every member is down, drained or removed.
    #[error("no HSM can serve: all members are down or drained")]
    NoneServing,
    /// This member is down, drained or removed.
    #[error("this HSM does not serve now")]
    NotServing,
    /// A member that rejected the input did not prove that it works, or was proved wrong a short time ago, so its rejection
    /// is not trusted.
    #[error(
        "no HSM can serve: the HSMs that rejected the input did not prove that they work, so they are not believed"
    )]
    NotCredible,
    /// A cluster needs at least one member.
    #[error("no HSM is configured")]
    NoMembers,
    /// No member has this name.
    #[error("no HSM has this name")]
    UnknownMember,
    /// A member's name must be unique, must not be empty and must not contain a zero byte.
    #[error("an HSM's name must be unique and must not be empty")]
    UnfitName,
    /// The last member cannot be removed.
    #[error("the only HSM cannot be removed")]
    LastMember,
    /// The reply does not belong to the request.
    #[error("unexpected reply")]
    UnexpectedReply,
    /// The vendor's library could not be loaded or initialised.
    #[error("the module cannot be used")]
    Module,
    /// No slot of the module holds the token.
    #[error("the token is not in any slot of the module")]
    NoSuchToken,
    /// Several tokens have the configured label. The PIN is tried on none of them.
    #[error("several tokens of that label; the PIN is tried on none of them")]
    SeveralTokens,
    /// The PIN was not tried because the token reports too few remaining tries.
    #[error("the PIN is not tried: {}", _0.meaning())]
    PinNotTried(PinTries),
    /// The token refused the PIN earlier. The PIN is not tried again until a different one is set.
    #[error("the token refused the PIN, which is not tried again until there is another one")]
    PinRefused,
    /// The key requires a login for every operation, and this module cannot be called in that order.
    #[error(
        "the key has CKA_ALWAYS_AUTHENTICATE, and this module (see its warning at the start) cannot be called in the order \
         that such keys need"
    )]
    LoginPerOperation,
    /// The library's answer violates the standard.
    #[error("the module gave an answer that makes no sense")]
    Nonsense,
}

/// Fault of a worker process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum WorkerFault {
    /// The process could not be started.
    #[error("the worker process cannot be started")]
    NotStarted,
    /// The process did not come up in time: the module hangs in loading, initialisation or login.
    #[error("the module hangs at its start")]
    StartHangs,
    /// Its socket closed; its exit status is not known yet.
    #[error("the worker process ended")]
    Gone,
    /// The process exited with this status.
    #[error("the worker process exited with status {0}")]
    Exited(i32),
    /// A signal ended the process: the vendor's library crashed, or someone killed it.
    #[error("the worker process was ended by signal {0}")]
    Signal(i32),
    /// The process sent a frame that cannot be decoded.
    #[error("the worker process sent a frame that cannot be read")]
    Unreadable,
    /// The process does not read its socket.
    #[error("the worker process does not read its socket")]
    Deaf,
    /// The process inherited an environment variable that has since been hidden from workers.
    #[error("the worker process is replaced, since it has inherited a variable that is hidden now")]
    Replaced,
    /// The process sent more reports per second than the daemon accepts.
    #[error("the worker process sends too many reports")]
    Floods,
}

impl HsmError {
    /// Creates the error for a return code of a function.
    pub(crate) fn new(function: Function, code: RvError) -> Self {
        HsmError::Pkcs11(function, code.into())
    }

    /// Returns true if the token judged the *input*, not its own state: a repeated call would fail the same way.
    #[must_use]
    pub fn is_data(self) -> bool {
        self.fault().owner == FaultOwner::Caller
    }

    /// Returns the fault that this error stands for: its owner and the consequences.
    #[must_use]
    pub fn fault(self) -> Fault {
        let nobody = |elsewhere| Fault { owner: FaultOwner::Nobody, elsewhere, session: SessionAction::Keep };
        match self {
            HsmError::Pkcs11(function, code) => Fault::of(function, code.rv()),
            HsmError::Refused { .. } => {
                Fault { owner: FaultOwner::Caller, elsewhere: true, session: SessionAction::Keep }
            }
            // Members hold the same keys, but replication may lag.
            HsmError::NoSuchKey | HsmError::FaultyKey | HsmError::QueueFull | HsmError::LoginPerOperation => {
                nobody(true)
            }
            HsmError::KeyExists
            | HsmError::Deadline
            | HsmError::NoMembers
            | HsmError::UnknownMember
            | HsmError::UnfitName
            | HsmError::LastMember => nobody(false),
            HsmError::WrongAnswer
            | HsmError::Hung(_)
            | HsmError::Worker(_)
            | HsmError::NoneServing
            | HsmError::NotServing
            | HsmError::NotCredible
            | HsmError::UnexpectedReply
            | HsmError::Module
            | HsmError::NoSuchToken
            | HsmError::SeveralTokens
            | HsmError::PinNotTried(_)
            | HsmError::PinRefused
            | HsmError::Nonsense => BROKEN,
        }
    }

    /// Returns true if the key or the token does not support the use of a private key that was asked for.
    pub(crate) fn is_inability(self) -> bool {
        match self {
            HsmError::Pkcs11(Function::DecryptInit | Function::Decrypt | Function::SignInit | Function::Sign, _) => {
                self.fault().owner == FaultOwner::Nobody
            }
            error => error == HsmError::LoginPerOperation,
        }
    }

    /// Returns true if a known-answer test that fails with this error proves the member faulty, not merely late or busy.
    pub(crate) fn condemns(self) -> bool {
        let fault = self.fault();
        self == HsmError::NoSuchKey
            || self.is_inability()
            || (fault.owner == FaultOwner::Member && fault.session != SessionAction::Keep)
    }

    pub(crate) fn class(self) -> &'static str {
        let Fault { owner, session, .. } = self.fault();
        match (self, owner, session) {
            _ if self.refuses_pin() => "pin",
            (HsmError::PinNotTried(_) | HsmError::PinRefused, ..) => "pin",
            (_, FaultOwner::Caller | FaultOwner::Unclear, _) => "refused",
            (_, FaultOwner::Nobody, _) => "unable",
            (_, FaultOwner::Member, SessionAction::Renew) => "stale",
            (_, FaultOwner::Member, SessionAction::Keep) => "busy",
            (_, FaultOwner::Member, SessionAction::End) => "broken",
        }
    }

    /// Returns the action an administrator must take before the member can serve; `None` if the fault may pass by itself or
    /// is unknown.
    #[must_use]
    pub fn remedy(self, member: &str) -> Option<String> {
        match self {
            HsmError::SeveralTokens => {
                Some("name the token by `serial` in place of `token`, or take the others away".to_owned())
            }
            HsmError::PinNotTried(tries) => Some(tries.remedy(member)),
            _ => None,
        }
    }

    /// Returns true if the token refused the PIN, which must not be tried again.
    pub(crate) fn refuses_pin(self) -> bool {
        PIN_REFUSALS.iter().any(|code| self.is_code(*code))
    }

    pub(crate) fn is_code(self, wanted: RvError) -> bool {
        matches!(self, HsmError::Pkcs11(_, code) if code.rv() == wanted)
    }
}

impl From<Error> for HsmError {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(code, function) => HsmError::new(function.into(), code),
            Error::NullFunctionPointer | Error::NotSupported => {
                HsmError::new(Function::GetFunctionList, RvError::FunctionNotSupported)
            }
            // Integers that do not fit and texts that are not UTF-8.
            _ => HsmError::Nonsense,
        }
    }
}

/// An error with details for people: a path, serial numbers, a message of the library.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{error}{}", Detail(detail))]
pub struct Failure {
    /// The error itself, on which code decides.
    pub error: HsmError,
    /// Further details; may be empty.
    pub detail: String,
}

struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

impl Failure {
    pub(crate) fn new(error: HsmError, detail: impl Into<String>) -> Self {
        Failure { error, detail: detail.into() }
    }
}

impl From<HsmError> for Failure {
    fn from(error: HsmError) -> Self {
        Failure { error, detail: String::new() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        HsmError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_function_and_code() {
        let error = HsmError::new(Function::Sign, RvError::DeviceError);
        assert_eq!(error.to_string(), "C_Sign: CKR_DEVICE_ERROR");
        assert_eq!(error.class(), "broken");
        assert!(error.is_code(RvError::DeviceError));
        assert_eq!(
            Failure::new(HsmError::Module, "/lib/x.so: not found").to_string(),
            "the module cannot be used: /lib/x.so: not found"
        );
    }

    #[test]
    fn a_refused_pin_has_its_own_class() {
        for code in PIN_REFUSALS {
            let error = HsmError::new(Function::Login, code);
            assert!(error.refuses_pin() && error.class() == "pin", "{error}");
        }
    }
}
