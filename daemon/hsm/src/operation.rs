//! Kinds of operations, with the names that logs and metrics use.

use serde::{Deserialize, Serialize};

/// A kind of operation at a member.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Operation {
    /// Opens a session: login and search for keys included.
    Open,
    /// Decrypts with a private key.
    Decrypt,
    /// Signs with a private key.
    Sign,
    /// Generates random bytes.
    Random,
    /// Runs a known-answer test.
    Probe,
    /// Lists the private keys of the token.
    Keys,
    /// Generates a key pair.
    Generate,
    /// Imports a private key.
    Import,
    /// Destroys a key pair.
    Destroy,
}

impl Operation {
    /// Returns the name for logs and metric labels, such as `decrypt`.
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
            Operation::Destroy => "destroy",
        }
    }

    /// Returns true if the operation may safely be done twice.
    pub(crate) fn may_repeat(self) -> bool {
        !matches!(self, Operation::Generate | Operation::Import | Operation::Destroy)
    }
}
