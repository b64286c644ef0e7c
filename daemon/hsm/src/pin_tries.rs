//! Remaining tries of a user PIN, as the token reports them, and the rule when the PIN may be tried.
//!
//! Tokens count wrong PINs and lock themselves. Before every login the worker reads the flags of `CK_TOKEN_INFO`; this
//! costs no try.

use serde::{Deserialize, Serialize};

/// State of the remaining tries, as far as the token reports it. Ordered from most tries to none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum PinTries {
    /// No wrong PIN since the last right one.
    Full,
    /// At least one wrong PIN since the last right one (`CKF_USER_PIN_COUNT_LOW`).
    Low,
    /// The next wrong PIN locks the token (`CKF_USER_PIN_FINAL_TRY`).
    Final,
    /// The PIN is locked (`CKF_USER_PIN_LOCKED`).
    Locked,
}

/// The authority on which a PIN is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Word {
    /// None: a tool only inspects the token.
    Look,
    /// The configuration: the daemon is to serve with this PIN.
    Serve,
    /// An administrator, for this one try.
    Administrator,
}

impl PinTries {
    /// Returns true if a PIN that is not known to be right may be tried.
    pub(crate) fn allow(self, word: Word) -> bool {
        match self {
            PinTries::Full => true,
            PinTries::Low => word != Word::Look,
            PinTries::Final => word == Word::Administrator,
            PinTries::Locked => false,
        }
    }

    /// Returns the meaning of the flag in words.
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            PinTries::Full => "no wrong PIN was tried since the last right one",
            PinTries::Low => "a wrong PIN was tried since the last right one (CKF_USER_PIN_COUNT_LOW)",
            PinTries::Final => "one wrong PIN more locks the token (CKF_USER_PIN_FINAL_TRY)",
            PinTries::Locked => "the token's user PIN is locked (CKF_USER_PIN_LOCKED)",
        }
    }

    /// Returns the action that an administrator can take.
    #[must_use]
    pub fn remedy(self, member: &str) -> String {
        match self {
            PinTries::Full => String::new(),
            PinTries::Low => {
                "log in once with the right PIN (start the daemon, or use the vendor's tool): the token counts \
                              anew after that"
                    .to_owned()
            }
            PinTries::Final => format!(
                "check the PIN file, log in once with the vendor's tool, and the member comes up; or spend the last try with \
                 `claviger hsm probe {member}`"
            ),
            PinTries::Locked => {
                "unlock the user PIN with the vendor's tool (the security officer can), and the member comes up"
                    .to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewer_tries_the_stronger_the_word_that_is_needed() {
        let allowed = |tries: PinTries| [Word::Look, Word::Serve, Word::Administrator].map(|word| tries.allow(word));
        assert_eq!(allowed(PinTries::Full), [true, true, true]);
        assert_eq!(allowed(PinTries::Low), [false, true, true]);
        assert_eq!(allowed(PinTries::Final), [false, false, true]);
        assert_eq!(allowed(PinTries::Locked), [false, false, false]);
    }
}
