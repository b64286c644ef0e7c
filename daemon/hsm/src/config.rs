//! What a member is made of.

use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

use cryptoki::types::AuthPin;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// One token of one module.
#[derive(Clone, Debug)]
pub struct MemberConfig {
    /// Names the member in logs, metrics and calls; unique in a cluster.
    pub name: String,
    /// The vendor's PKCS#11 library.
    pub module: PathBuf,
    /// Which token of the module.
    pub token: TokenRef,
    /// The user PIN of the token.
    pub pin: Pin,
    /// Environment variables that the module sees when it is loaded and initialised.
    pub env: BTreeMap<String, String>,
    /// Members with the smallest priority serve while any of them can.
    pub priority: u32,
    /// Share of the load within a priority; 0 counts as 1.
    pub weight: u32,
    /// How many sessions to open at most; 0 counts as 1.
    pub sessions: usize,
    /// How many calls may wait or run at most; 0 counts as 1.
    pub queue: usize,
}

/// How a token is recognised. Slot numbers are not stable, so they are not offered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenRef {
    /// By `CKA_LABEL` of the token, without its padding.
    Label(String),
    /// By serial number, without its padding.
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
    /// Takes the PIN over; the string's memory is zeroised when the PIN is dropped.
    pub fn new(pin: String) -> Self {
        Pin(Zeroizing::new(pin))
    }

    /// Whether it is the same one. The time this takes tells no more than the lengths.
    pub(crate) fn is(&self, other: &Pin) -> bool {
        let (one, other) = (self.0.as_bytes(), other.0.as_bytes());
        one.len() == other.len() && one.iter().zip(other).fold(0, |differ, (a, b)| black_box(differ | (a ^ b))) == 0
    }

    /// The form that `C_Login` takes; it too is zeroised when dropped.
    pub(crate) fn to_auth(&self) -> AuthPin {
        AuthPin::new(self.0.as_str().into())
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[pin]")
    }
}

/// How long calls may take.
#[derive(Clone, Copy, Debug)]
pub struct CallTimeouts {
    /// A call that has run for so long hangs: its member is closed.
    pub watchdog: Duration,
}
