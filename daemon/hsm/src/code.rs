//! PKCS#11 functions and return codes as small `Copy` values that fit into a frame and into an error.

use std::fmt;
use std::sync::OnceLock;

use cryptoki::error::{Rv, RvError};
use serde::{Deserialize, Serialize};

/// Lists the functions once, under cryptoki's names: the standard's names without `C_`.
macro_rules! functions {
    ($($name:ident),* $(,)?) => {
        /// A PKCS#11 function that this crate calls.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
        #[allow(missing_docs)] // The names say it: `Login` is `C_Login`.
        pub enum Function {
            $($name,)*
            /// Any function that is not listed.
            Other,
        }

        impl Function {
            /// Returns the standard's name, such as `C_Login`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Function::$name => concat!("C_", stringify!($name)),)*
                    Function::Other => "PKCS#11",
                }
            }
        }

        impl From<cryptoki::context::Function> for Function {
            fn from(function: cryptoki::context::Function) -> Self {
                match function {
                    $(cryptoki::context::Function::$name => Function::$name,)*
                    _ => Function::Other,
                }
            }
        }
    };
}

functions!(
    Initialize,
    Finalize,
    GetFunctionList,
    GetSlotList,
    GetTokenInfo,
    InitToken,
    InitPIN,
    OpenSession,
    CloseSession,
    GetSessionInfo,
    Login,
    Logout,
    CreateObject,
    DestroyObject,
    GetAttributeValue,
    FindObjectsInit,
    FindObjects,
    DecryptInit,
    Decrypt,
    SignInit,
    Sign,
    GenerateKeyPair,
    GenerateRandom,
);

/// A PKCS#11 return code other than `CKR_OK`, as a number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct ReturnCode(pub u64);

impl ReturnCode {
    /// Returns cryptoki's value for this code.
    pub(crate) fn rv(self) -> RvError {
        match Rv::from(self.0) {
            Rv::Error(error) => error,
            Rv::Ok => RvError::GeneralError,
        }
    }
}

impl From<RvError> for ReturnCode {
    /// cryptoki converts numbers to names only, so the inverse is a table built from that conversion.
    fn from(code: RvError) -> Self {
        static KNOWN: OnceLock<Vec<(RvError, u64)>> = OnceLock::new();
        if let RvError::VendorDefined(number) | RvError::UnknownErrorCode(number) = code {
            return ReturnCode(number);
        }
        let numbers = KNOWN.get_or_init(|| {
            // The standard's codes end a little after CKR_FUNCTION_REJECTED, 0x200.
            (1..0x400)
                .filter_map(|number| match Rv::from(number) {
                    Rv::Error(RvError::UnknownErrorCode(_)) | Rv::Ok => None,
                    Rv::Error(error) => Some((error, number)),
                })
                .collect()
        });
        let found = numbers.iter().find(|(error, _)| *error == code);
        ReturnCode(found.map_or(cryptoki_sys::CKR_GENERAL_ERROR, |(_, number)| *number))
    }
}

impl fmt::Display for ReturnCode {
    /// Writes `CKR_DEVICE_ERROR` for `DeviceError`: cryptoki derives its variants' names from the standard's constants.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.rv();
        match code {
            RvError::VendorDefined(raw) => return write!(f, "CKR_VENDOR_DEFINED_{raw:#x}"),
            RvError::UnknownErrorCode(raw) => return write!(f, "CKR_UNKNOWN_{raw:#x}"),
            _ => {}
        }
        let mut name = String::from("CKR");
        for c in format!("{code:?}").chars() {
            if c.is_ascii_uppercase() {
                name.push('_');
            }
            name.push(c.to_ascii_uppercase());
        }
        f.write_str(&name)
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
            assert_eq!(ReturnCode::from(code).to_string(), name);
        }
    }

    #[test]
    fn every_number_finds_its_way_back() {
        for number in (1..0x400).chain([0x8000_0000, 0x8000_1234]) {
            let Rv::Error(error) = Rv::from(number) else { continue };
            assert_eq!(ReturnCode::from(error), ReturnCode(number), "{error:?}");
        }
    }
}
