//! PKCS#11 functions and return codes as small values, which fit into a frame and into a `Copy` error.

use std::fmt;
use std::sync::OnceLock;

use cryptoki::error::{Rv, RvError};
use serde::{Deserialize, Serialize};

/// A PKCS#11 function that this crate calls.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // The names say it: `Login` is `C_Login`.
pub enum Function {
    Initialize,
    Finalize,
    GetFunctionList,
    GetSlotList,
    GetTokenInfo,
    InitToken,
    InitPin,
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
    /// Another one.
    Other,
}

impl Function {
    /// As in the standard: `C_Login`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Function::Initialize => "C_Initialize",
            Function::Finalize => "C_Finalize",
            Function::GetFunctionList => "C_GetFunctionList",
            Function::GetSlotList => "C_GetSlotList",
            Function::GetTokenInfo => "C_GetTokenInfo",
            Function::InitToken => "C_InitToken",
            Function::InitPin => "C_InitPIN",
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
            Function::Other => "PKCS#11",
        }
    }
}

impl From<cryptoki::context::Function> for Function {
    fn from(function: cryptoki::context::Function) -> Self {
        use cryptoki::context::Function as F;
        match function {
            F::Initialize => Function::Initialize,
            F::Finalize => Function::Finalize,
            F::GetFunctionList => Function::GetFunctionList,
            F::GetSlotList => Function::GetSlotList,
            F::GetTokenInfo => Function::GetTokenInfo,
            F::InitToken => Function::InitToken,
            F::InitPIN => Function::InitPin,
            F::OpenSession => Function::OpenSession,
            F::CloseSession => Function::CloseSession,
            F::GetSessionInfo => Function::GetSessionInfo,
            F::Login => Function::Login,
            F::Logout => Function::Logout,
            F::CreateObject => Function::CreateObject,
            F::DestroyObject => Function::DestroyObject,
            F::GetAttributeValue => Function::GetAttributeValue,
            F::FindObjectsInit => Function::FindObjectsInit,
            F::FindObjects => Function::FindObjects,
            F::DecryptInit => Function::DecryptInit,
            F::Decrypt => Function::Decrypt,
            F::SignInit => Function::SignInit,
            F::Sign => Function::Sign,
            F::GenerateKeyPair => Function::GenerateKeyPair,
            F::GenerateRandom => Function::GenerateRandom,
            _ => Function::Other,
        }
    }
}

/// A PKCS#11 return code other than `CKR_OK`: the number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct ReturnCode(pub u64);

impl ReturnCode {
    /// The same as cryptoki names it.
    pub(crate) fn rv(self) -> RvError {
        match Rv::from(self.0) {
            Rv::Error(error) => error,
            Rv::Ok => RvError::GeneralError,
        }
    }
}

impl From<RvError> for ReturnCode {
    /// cryptoki knows the way from number to name only, so the way back is a table made from it.
    fn from(code: RvError) -> Self {
        static KNOWN: OnceLock<Vec<(RvError, u64)>> = OnceLock::new();
        if let RvError::VendorDefined(number) | RvError::UnknownErrorCode(number) = code {
            return ReturnCode(number);
        }
        let numbers = KNOWN.get_or_init(|| {
            // The standard's codes end at CKR_FUNCTION_REJECTED, 0x200, and a few after it.
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
    /// `CKR_DEVICE_ERROR` for `DeviceError`: cryptoki names its variants after the standard's constants.
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
