//! One table: what a return code means, given the call it came from.
//!
//! | codes | calls | whose | elsewhere? | session | member |
//! |---|---|---|---|---|---|
//! | ENCRYPTED_DATA_INVALID, ENCRYPTED_DATA_LEN_RANGE, DATA_INVALID, DATA_LEN_RANGE | any | caller | for a second opinion | keep | - |
//! | GENERAL_ERROR, FUNCTION_FAILED, ARGUMENTS_BAD, vendor codes | C_Decrypt | unclear: some tokens say so to a bad ciphertext; the known-good probe decides | for a second opinion | keep | - |
//! | KEY_FUNCTION_NOT_PERMITTED, KEY_TYPE_INCONSISTENT, KEY_SIZE_RANGE, ATTRIBUTE_*, TEMPLATE_* | any | nobody: the key is not made for it | no | keep | - |
//! | MECHANISM_INVALID, MECHANISM_PARAM_INVALID, FUNCTION_NOT_SUPPORTED | any | nobody: another vendor may know how | yes | keep | - |
//! | SESSION_HANDLE_INVALID, SESSION_CLOSED, USER_NOT_LOGGED_IN, KEY_HANDLE_INVALID, OBJECT_HANDLE_INVALID, OPERATION_NOT_INITIALIZED | any | member, but no more than a stale handle | if renewing does not help | renew in place | evidence, if renewing does not help |
//! | FUNCTION_FAILED, HOST_MEMORY, DEVICE_MEMORY, FUNCTION_CANCELED, CANCEL, SESSION_COUNT, SESSION_EXISTS | any other | member: busy (AWS CloudHSM throttles so) | yes | keep | evidence |
//! | PIN_INCORRECT, PIN_LOCKED, PIN_EXPIRED, PIN_INVALID, PIN_LEN_RANGE | C_Login | member | yes | end | out, until the configuration is reloaded |
//! | CRYPTOKI_NOT_INITIALIZED | any | member: the module was finalised behind our back | yes | end | down at once; a fresh worker process initialises it |
//! | (worker) not started, start hangs, gone, exited, killed by a signal, unreadable frame, does not read | - | member | yes | - | down at once; a fresh worker process is started with backoff |
//! | (worker) a call runs longer than the watchdog | any | member | yes | - | down at once; the worker is killed when its other calls are done or late |
//! | everything else: broken or lost devices, OPERATION_ACTIVE (the session cannot be used again) | any | member | yes | end | evidence |
//!
//! *Evidence* counts in the member's breaker: enough of it takes the member down. A code that is not in the table counts as the
//! member's fault, because the consequence, a new session and another member, does no harm when that is wrong. The opposite
//! would: a caller's garbage must never take a member down.

use cryptoki::error::RvError;

use crate::code::Function;

/// Whose fault a failure is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultOwner {
    /// The member: counts as evidence against it.
    Member,
    /// The caller: its input is bad.
    Caller,
    /// The member or the caller: the known-good probe decides.
    Unclear,
    /// Neither: what was asked for is not to be had here.
    Nobody,
}

/// What becomes of the session that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionAction {
    /// It goes on.
    Keep,
    /// Session → login → handles, all anew, in place; then the operation is done again.
    Renew,
    /// It ends; another is opened when one is needed.
    End,
}

/// A failure, judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Whose fault it is.
    pub owner: FaultOwner,
    /// Whether another member may succeed.
    pub elsewhere: bool,
    /// What becomes of the session.
    pub session: SessionAction,
}

const BAD_INPUT: Fault = Fault { owner: FaultOwner::Caller, elsewhere: true, session: SessionAction::Keep };
const PERHAPS_INPUT: Fault = Fault { owner: FaultOwner::Unclear, elsewhere: true, session: SessionAction::Keep };
const WRONG_KEY: Fault = Fault { owner: FaultOwner::Nobody, elsewhere: false, session: SessionAction::Keep };
const CANNOT: Fault = Fault { owner: FaultOwner::Nobody, elsewhere: true, session: SessionAction::Keep };
const STALE: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::Renew };
const BUSY: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::Keep };
pub(crate) const BROKEN: Fault = Fault { owner: FaultOwner::Member, elsewhere: true, session: SessionAction::End };

impl Fault {
    /// Judges a return code of a call.
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
                | TemplateInconsistent,
                _,
            ) => WRONG_KEY,
            (MechanismInvalid | MechanismParamInvalid | FunctionNotSupported, _) => CANNOT,
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

/// Codes by which a token refuses OAEP parameters that it does not know.
pub(crate) const PARAMETER_REFUSALS: [RvError; 4] =
    [RvError::ArgumentsBad, RvError::MechanismInvalid, RvError::MechanismParamInvalid, RvError::FunctionNotSupported];

/// Codes after which the same PIN must not be tried again: tokens count, and lock.
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
