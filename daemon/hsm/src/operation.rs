//! Kinds of operations, by the names that logs and metrics use.

use serde::{Deserialize, Serialize};

/// What a member is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Operation {
    /// A session is opened, with its login and its search for keys.
    Open,
    /// A private key decrypts.
    Decrypt,
    /// A private key signs.
    Sign,
    /// Random bytes.
    Random,
    /// A known-answer test.
    Probe,
    /// The private keys of the token are listed.
    Keys,
    /// A key pair is generated.
    Generate,
    /// A private key is imported.
    Import,
}

impl Operation {
    /// As in logs and metric labels: `decrypt`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Operation::Open => "open",
            Operation::Decrypt => "decrypt",
            Operation::Sign => "sign",
            Operation::Random => "random",
            Operation::Probe => "probe",
            Operation::Keys => "keys",
            Operation::Generate => "generate",
            Operation::Import => "import",
        }
    }

    /// Whether doing it twice does no harm.
    pub(crate) fn may_repeat(self) -> bool {
        !matches!(self, Operation::Generate | Operation::Import)
    }
}
