//! Configuration of a member: its module, token and PIN, and the time limits of its calls.

use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

use cryptoki::types::AuthPin;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Configuration of one member: one token of one module.
#[derive(Clone, Debug)]
pub struct MemberConfig {
    /// Name of the member in logs, metrics and calls; unique in a cluster.
    pub name: String,
    /// Path of the vendor's PKCS#11 library.
    pub module: PathBuf,
    /// The token within the module.
    pub token: TokenRef,
    /// The user PIN of the token.
    pub pin: Pin,
    /// Environment variables that are set before the module is loaded and initialised.
    pub env: BTreeMap<String, String>,
    /// Members with the lowest priority number serve while any of them can.
    pub priority: u32,
    /// Share of the load within a priority; 0 counts as 1.
    pub weight: u32,
    /// Maximum number of open sessions; 0 counts as 1.
    pub sessions: usize,
    /// Maximum number of calls that wait or run; 0 counts as 1.
    pub queue: usize,
}

/// Identifies a token. Slot numbers are not supported because they are not stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenRef {
    /// By the token's label, without its padding.
    Label(String),
    /// By its serial number, without its padding.
    Serial(String),
}

impl fmt::Display for TokenRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenRef::Label(label) => write!(f, "label {label:?}"),
            TokenRef::Serial(serial) => write!(f, "serial {serial:?}"),
        }
    }
}

/// A PIN. It is zeroised when dropped and never printed.
#[derive(Clone, Serialize, Deserialize)]
pub struct Pin(Zeroizing<String>);

impl Pin {
    /// Takes ownership of the PIN; the string's memory is zeroised when the `Pin` is dropped.
    pub fn new(pin: String) -> Self {
        Pin(Zeroizing::new(pin))
    }

    /// Compares two PINs. The time that the comparison takes reveals only their lengths.
    pub(crate) fn is(&self, other: &Pin) -> bool {
        let (one, other) = (self.0.as_bytes(), other.0.as_bytes());
        one.len() == other.len() && one.iter().zip(other).fold(0, |differ, (a, b)| black_box(differ | (a ^ b))) == 0
    }

    /// Returns the form that `C_Login` takes, which is also zeroised when dropped.
    pub(crate) fn to_auth(&self) -> AuthPin {
        AuthPin::new(self.0.as_str().into())
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[pin]")
    }
}

/// Time limits of calls.
#[derive(Clone, Copy, Debug)]
pub struct CallTimeouts {
    /// A call that runs longer than this counts as hung and takes its member down.
    pub watchdog: Duration,
}
