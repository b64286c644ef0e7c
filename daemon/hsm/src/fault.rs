//! The fault table: the meaning of a return code, given the function that returned it.
//!
//! | codes | calls | fault owner | elsewhere? | session | member |
//! |---|---|---|---|---|---|
//! | ENCRYPTED_DATA_INVALID, ENCRYPTED_DATA_LEN_RANGE, DATA_INVALID, DATA_LEN_RANGE | any | caller | for a second opinion | keep | - |
//! | GENERAL_ERROR, FUNCTION_FAILED, ARGUMENTS_BAD, vendor codes | C_Decrypt | unclear: some tokens return them for a bad ciphertext; a known-answer test decides | for a second opinion | keep | - |
//! | KEY_FUNCTION_NOT_PERMITTED, KEY_TYPE_INCONSISTENT, KEY_SIZE_RANGE, ATTRIBUTE_*, TEMPLATE_*, MECHANISM_INVALID, MECHANISM_PARAM_INVALID, FUNCTION_NOT_SUPPORTED | any | nobody: the key or the token does not support the operation; attributes of a key and mechanisms differ between tokens | yes | keep | not asked for the same for a while; a known-answer test that fails with it takes the member down |
//! | SESSION_HANDLE_INVALID, SESSION_CLOSED, USER_NOT_LOGGED_IN, KEY_HANDLE_INVALID, OBJECT_HANDLE_INVALID, OPERATION_NOT_INITIALIZED | any | member: a stale handle | if renewal does not help | renew in place | evidence, if renewal does not help |
//! | FUNCTION_FAILED, HOST_MEMORY, DEVICE_MEMORY, FUNCTION_CANCELED, CANCEL, SESSION_COUNT, SESSION_EXISTS | any other | member: busy (AWS CloudHSM throttles this way) | yes | keep | evidence |
//! | PIN_INCORRECT, PIN_LOCKED, PIN_EXPIRED, PIN_INVALID, PIN_LEN_RANGE | C_Login | member | yes | end | out of service until a new PIN is set or an administrator asks for a try |
//! | CRYPTOKI_NOT_INITIALIZED | any | member: something else in its process finalised the module | yes | end | down at once; a fresh worker process initialises it |
//! | (worker) not started, start hangs, gone, exited, killed by a signal, unreadable frame, does not read | - | member | yes | - | down at once; a fresh worker process is started with backoff |
//! | (worker) a call runs longer than the watchdog's time | any | member | yes | - | down at once; the worker is killed when its other calls are done or late |
//! | all others: broken or lost devices, OPERATION_ACTIVE (the session cannot be used again) | any | member | yes | end | evidence |
//!
//! *Evidence* counts in the member's breaker: enough of it takes the member down. A code that is not in the table counts as
//! the member's fault. If that is wrong, the consequence is harmless: a new session and another member. The opposite error
//! is harmful: a caller's invalid input must never take a member down.

use cryptoki::error::RvError;

use crate::code::Function;

/// The party at fault for a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultOwner {
    /// The member; the failure counts as evidence against it.
    Member,
    /// The caller: its input is invalid.
    Caller,
    /// The member or the caller; a known-answer test decides.
    Unclear,
    /// Neither: the key or the token does not support the operation, or the daemon has no room.
    Nobody,
}

/// Action on the session in which the call failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionAction {
    /// The session stays in use.
    Keep,
    /// Session, login and key handles are renewed in place; then the operation is repeated once.
    Renew,
    /// The session is closed; a new one is opened when needed.
    End,
}

/// The judgement of a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The party at fault.
    pub owner: FaultOwner,
    /// True if another member may succeed.
    pub elsewhere: bool,
    /// Action on the session in which the call failed.
    pub session: SessionAction,
}

const BAD_INPUT: Fault = Fault { owner: FaultOwner::Caller, elsewhere: true, session: SessionAction::Keep };
const PERHAPS_INPUT: Fault = Fault { owner: FaultOwner::Unclear, elsewhere: true, session: SessionAction::Keep };
const CANNOT: Fault = Fault { owner: FaultOwner::Nobody, elsewhere: true, session: SessionAction::Keep };
const STALE: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::Renew };
const BUSY: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::Keep };
pub(crate) const BROKEN: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::End };

impl Fault {
    /// Judges a return code of a function.
    pub(crate) fn of(function: Function, code: RvError) -> Fault {
        use RvError::*;
        match (code, function) {
            (EncryptedDataInvalid | EncryptedDataLenRange | DataInvalid | DataLenRange, _) => BAD_INPUT,
            (
                GeneralError | FunctionFailed | ArgumentsBad | VendorDefined(_) | UnknownErrorCode(_),
                Function::Decrypt,
            ) => PERHAPS_INPUT,
            (
                KeyFunctionNotPermitted
                | KeyTypeInconsistent
                | KeySizeRange
                | AttributeReadOnly
                | AttributeSensitive
                | AttributeTypeInvalid
                | AttributeValueInvalid
                | TemplateIncomplete
                | TemplateInconsistent
                | MechanismInvalid
                | MechanismParamInvalid
                | FunctionNotSupported,
                _,
            ) => CANNOT,
            (
                SessionHandleInvalid
                | SessionClosed
                | UserNotLoggedIn
                | KeyHandleInvalid
                | ObjectHandleInvalid
                | OperationNotInitialized,
                _,
            ) => STALE,
            (
                FunctionFailed | HostMemory | DeviceMemory | FunctionCanceled | Cancel | SessionCount | SessionExists,
                _,
            ) => BUSY,
            _ => BROKEN,
        }
    }
}

/// Codes that tokens return for OAEP parameters they do not support.
pub(crate) const PARAMETER_REFUSALS: [RvError; 4] =
    [RvError::ArgumentsBad, RvError::MechanismInvalid, RvError::MechanismParamInvalid, RvError::FunctionNotSupported];

/// Codes after which the same PIN must not be tried again, because tokens count wrong PINs and lock.
pub(crate) const PIN_REFUSALS: [RvError; 5] =
    [RvError::PinIncorrect, RvError::PinLocked, RvError::PinExpired, RvError::PinInvalid, RvError::PinLenRange];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_is_the_callers() {
        for code in
            [RvError::EncryptedDataInvalid, RvError::EncryptedDataLenRange, RvError::DataInvalid, RvError::DataLenRange]
        {
            assert_eq!(Fault::of(Function::Decrypt, code), BAD_INPUT);
        }
    }

    #[test]
    fn a_general_error_depends_on_the_call() {
        for code in [RvError::GeneralError, RvError::FunctionFailed, RvError::ArgumentsBad] {
            assert_eq!(Fault::of(Function::Decrypt, code), PERHAPS_INPUT);
        }
        for call in [Function::Sign, Function::DecryptInit, Function::FindObjects, Function::OpenSession] {
            assert_eq!(Fault::of(call, RvError::GeneralError), BROKEN);
            assert_eq!(Fault::of(call, RvError::FunctionFailed), BUSY);
        }
    }

    #[test]
    fn what_went_stale_is_renewed_in_place() {
        for code in [
            RvError::SessionHandleInvalid,
            RvError::SessionClosed,
            RvError::KeyHandleInvalid,
            RvError::ObjectHandleInvalid,
            RvError::UserNotLoggedIn,
        ] {
            assert_eq!(Fault::of(Function::DecryptInit, code), STALE, "{code:?}");
        }
    }

    #[test]
    fn what_broke_ends() {
        for code in [
            RvError::DeviceRemoved,
            RvError::DeviceError,
            RvError::TokenNotPresent,
            RvError::OperationActive,
            RvError::CryptokiNotInitialized,
            RvError::BufferTooSmall,
            RvError::PinIncorrect,
        ] {
            assert_eq!(Fault::of(Function::Decrypt, code), BROKEN, "{code:?}");
        }
    }
}
