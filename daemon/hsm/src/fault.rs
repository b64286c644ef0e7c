//! One table: what a return code means, given the call it came from.
//!
//! | codes | calls | whose | elsewhere? | session |
//! |---|---|---|---|---|
//! | ENCRYPTED_DATA_INVALID, ENCRYPTED_DATA_LEN_RANGE, DATA_INVALID, DATA_LEN_RANGE | any | caller | no | keep |
//! | GENERAL_ERROR, FUNCTION_FAILED, ARGUMENTS_BAD, vendor codes | C_Decrypt | unclear: some tokens say so to a bad ciphertext | yes | keep |
//! | KEY_FUNCTION_NOT_PERMITTED, KEY_TYPE_INCONSISTENT, KEY_SIZE_RANGE, ATTRIBUTE_*, TEMPLATE_* | any | unclear: the key is not made for it | no | keep |
//! | MECHANISM_INVALID, MECHANISM_PARAM_INVALID, FUNCTION_NOT_SUPPORTED | any | unclear: another vendor may know how | yes | keep |
//! | SESSION_COUNT, HOST_MEMORY, DEVICE_MEMORY, FUNCTION_CANCELED, CANCEL | any | unclear: busy, not broken | yes | keep |
//! | everything else: lost sessions and handles, lost logins, lost or broken devices, PINs | any | member | yes | rebuild |
//!
//! What is not in the table counts as the member's fault, because the answer to that, a new session and another member, does
//! no harm when it was wrong. The other way round it would: a caller's garbage must never close a member.

use cryptoki::error::RvError;

/// Who is to blame for a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// The member: it sits out for a while.
    Member,
    /// The caller: its input is bad.
    Caller,
    /// Cannot be told from one answer, or nobody.
    Unclear,
}

/// What becomes of the session that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It ends, and so do the others of its generation: session → login → handles, all anew.
    Rebuild,
}

/// A failure, judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Who is to blame.
    pub whose: Whose,
    /// Whether another member may succeed.
    pub retry: bool,
    /// What becomes of the session.
    pub fate: Fate,
}

const BAD_INPUT: Fault = Fault { whose: Whose::Caller, retry: false, fate: Fate::Keep };
const PERHAPS_INPUT: Fault = Fault { whose: Whose::Unclear, retry: true, fate: Fate::Keep };
const WRONG_KEY: Fault = Fault { whose: Whose::Unclear, retry: false, fate: Fate::Keep };
const CANNOT: Fault = Fault { whose: Whose::Unclear, retry: true, fate: Fate::Keep };
const BROKEN: Fault = Fault { whose: Whose::Member, retry: true, fate: Fate::Rebuild };

impl Fault {
    /// Judges a return code of a call.
    pub(crate) fn of(call: &str, code: RvError) -> Fault {
        use RvError::*;
        match (code, call) {
            (EncryptedDataInvalid | EncryptedDataLenRange | DataInvalid | DataLenRange, _) => BAD_INPUT,
            (GeneralError | FunctionFailed | ArgumentsBad | VendorDefined(_) | UnknownErrorCode(_), "C_Decrypt") => {
                PERHAPS_INPUT
            }
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
            (SessionCount | HostMemory | DeviceMemory | FunctionCanceled | Cancel, _) => CANNOT,
            _ => BROKEN,
        }
    }

    /// The same answer from a second try: what was unclear about a decryption is the input's fault after all.
    pub(crate) fn repeated(call: &str, first: Fault, second: Fault) -> Fault {
        if call == "C_Decrypt" && first == PERHAPS_INPUT && second == PERHAPS_INPUT { BAD_INPUT } else { second }
    }
}

/// Codes by which a token refuses OAEP parameters that it does not know.
pub(crate) const PARAMETER_REFUSALS: [RvError; 4] =
    [RvError::ArgumentsBad, RvError::MechanismInvalid, RvError::MechanismParamInvalid, RvError::FunctionNotSupported];

/// Codes after which the same PIN must not be tried again: tokens count, and lock.
pub(crate) fn refuses_pin(code: RvError) -> bool {
    matches!(
        code,
        RvError::PinIncorrect | RvError::PinLocked | RvError::PinExpired | RvError::PinInvalid | RvError::PinLenRange
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_never_touches_a_member() {
        for code in
            [RvError::EncryptedDataInvalid, RvError::EncryptedDataLenRange, RvError::DataInvalid, RvError::DataLenRange]
        {
            assert_eq!(Fault::of("C_Decrypt", code), BAD_INPUT);
        }
    }

    #[test]
    fn a_general_error_depends_on_the_call() {
        let decrypt = Fault::of("C_Decrypt", RvError::GeneralError);
        assert_eq!(decrypt.whose, Whose::Unclear);
        assert_eq!(decrypt.fate, Fate::Keep);
        for call in ["C_Sign", "C_DecryptInit", "C_FindObjects", "C_OpenSession"] {
            assert_eq!(Fault::of(call, RvError::GeneralError), BROKEN);
        }
    }

    #[test]
    fn only_the_same_doubt_twice_is_certainty() {
        let unclear = Fault::of("C_Decrypt", RvError::GeneralError);
        let broken = Fault::of("C_Decrypt", RvError::DeviceError);
        assert_eq!(Fault::repeated("C_Decrypt", unclear, unclear).whose, Whose::Caller);
        assert_eq!(Fault::repeated("C_Decrypt", broken, unclear), unclear);
        assert_eq!(Fault::repeated("C_Decrypt", unclear, broken), broken);
        let cannot = Fault::of("C_DecryptInit", RvError::MechanismInvalid);
        assert_eq!(Fault::repeated("C_DecryptInit", cannot, cannot), cannot);
    }

    #[test]
    fn what_is_lost_is_rebuilt_and_tried_elsewhere() {
        for code in [
            RvError::SessionHandleInvalid,
            RvError::SessionClosed,
            RvError::KeyHandleInvalid,
            RvError::ObjectHandleInvalid,
            RvError::UserNotLoggedIn,
            RvError::DeviceRemoved,
            RvError::DeviceError,
            RvError::TokenNotPresent,
            RvError::CryptokiNotInitialized,
            RvError::OperationActive,
            RvError::BufferTooSmall,
            RvError::PinIncorrect,
        ] {
            assert_eq!(Fault::of("C_Decrypt", code), BROKEN, "{code:?}");
        }
    }

    #[test]
    fn a_busy_token_is_not_a_broken_one() {
        assert_eq!(Fault::of("C_OpenSession", RvError::SessionCount), CANNOT);
    }
}
