//! Remaining PIN tries of a token, from the flags of `CK_TOKEN_INFO`.

use cryptoki::slot::TokenInfo;
use cryptoki_sys::{CK_FLAGS, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY, CKF_USER_PIN_LOCKED};

use crate::pin_tries::PinTries;

/// Several flags may be set; the most severe one counts.
pub(crate) fn tries_of(flags: CK_FLAGS) -> PinTries {
    if flags & CKF_USER_PIN_LOCKED != 0 {
        PinTries::Locked
    } else if flags & CKF_USER_PIN_FINAL_TRY != 0 {
        PinTries::Final
    } else if flags & CKF_USER_PIN_COUNT_LOW != 0 {
        PinTries::Low
    } else {
        PinTries::Full
    }
}

/// Does the same for cryptoki's form of the flags.
pub(crate) fn tries_of_token(info: &TokenInfo) -> PinTries {
    let flag = |set, flag| if set { flag } else { 0 };
    tries_of(
        flag(info.user_pin_count_low(), CKF_USER_PIN_COUNT_LOW)
            | flag(info.user_pin_final_try(), CKF_USER_PIN_FINAL_TRY)
            | flag(info.user_pin_locked(), CKF_USER_PIN_LOCKED),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_flag_counts() {
        assert_eq!(tries_of(0), PinTries::Full);
        assert_eq!(tries_of(CKF_USER_PIN_COUNT_LOW), PinTries::Low);
        assert_eq!(tries_of(CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY), PinTries::Final);
        assert_eq!(tries_of(CKF_USER_PIN_FINAL_TRY | CKF_USER_PIN_LOCKED), PinTries::Locked);
        // Other flags say nothing about tries.
        assert_eq!(tries_of(!(CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY | CKF_USER_PIN_LOCKED)), PinTries::Full);
    }
}
