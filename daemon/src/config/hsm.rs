//! `[[hsm]]`: one member of the cluster.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::disagreement::{Disagreement, one_of};
use super::pin::{PinError, PinSource};

/// `[[hsm]]`: one member, which is one token of one PKCS#11 module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "HsmSection", into = "HsmSection")]
#[schemars(with = "HsmSection")]
pub struct Hsm {
    /// The member's name in logs, metrics and commands.
    pub name: String,
    /// The vendor's PKCS#11 library.
    pub module: PathBuf,
    /// The token within the module.
    pub token: TokenName,
    /// The place of the user PIN.
    pub pin: PinSource,
    /// Tier. Only members with the smallest number among the usable ones get calls.
    pub priority: u32,
    /// Share of the load within its tier.
    pub weight: u32,
    /// Number of sessions opened on the token.
    pub sessions: usize,
    /// Environment variables of this member's module, in addition to the file's `[env]`.
    pub env: BTreeMap<String, String>,
}

/// The name of a token among the slots of its module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TokenName {
    /// Its label.
    Label(String),
    /// Its serial number.
    Serial(String),
}

impl TokenName {
    fn is_empty(&self) -> bool {
        let (Self::Label(name) | Self::Serial(name)) = self;
        name.is_empty()
    }
}

impl Hsm {
    /// A member with the default priority, weight and number of sessions, and no environment of its own.
    #[must_use]
    pub fn new(name: String, module: PathBuf, token: TokenName, pin: PinSource) -> Self {
        Self { name, module, token, pin, priority: 0, weight: one(), sessions: eight(), env: BTreeMap::new() }
    }

    /// Reads the user PIN; see [`PinSource::read`]. Blocks on the file.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn read_pin(&self) -> Result<Zeroizing<String>, PinError> {
        self.pin.read(&self.name)
    }
}

/// One token of one PKCS#11 module. All members hold the same keys.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HsmSection {
    /// The member's name in logs, metrics and commands: 1 to 64 letters, digits, `.`, `-` or `_`; unique.
    name: String,
    /// The vendor's PKCS#11 library. Even a bare file name is relative to the folder of the configuration file.
    module: PathBuf,
    /// The token's label. Exactly one of `token` and `serial` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    /// The token's serial number. Exactly one of `token` and `serial` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// File with the user PIN; one trailing newline is ignored. Exactly one of `pin_file` and `pin_env` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin_file: Option<PathBuf>,
    /// Environment variable with the user PIN. Exactly one of `pin_file` and `pin_env` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin_env: Option<String>,
    /// Priority, 0 to 4,294,967,295: of the members that are up, those with the smallest number are used. Default: 0.
    #[serde(default)]
    priority: u32,
    /// Share of the load within its priority, 1 to 1,000. Default: 1.
    #[serde(default = "one")]
    weight: u32,
    /// Number of sessions on the token, each with its own thread, 1 to 1,024. Default: 8.
    #[serde(default = "eight")]
    sessions: usize,
    /// Like the file's `[env]`, for this member's worker process only. Default: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    env: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

fn eight() -> usize {
    8
}

impl TryFrom<HsmSection> for Hsm {
    type Error = Disagreement;

    fn try_from(section: HsmSection) -> Result<Self, Disagreement> {
        let HsmSection { name, module, token, serial, pin_file, pin_env, priority, weight, sessions, env } = section;
        let token = one_of(
            ("token", token.map(TokenName::Label)),
            ("serial", serial.map(TokenName::Serial)),
            TokenName::is_empty,
        )?;
        let pin = one_of(
            ("pin_file", pin_file.map(PinSource::File)),
            ("pin_env", pin_env.map(PinSource::Env)),
            PinSource::is_empty,
        )?;
        Ok(Self { name, module, token, pin, priority, weight, sessions, env })
    }
}

impl From<Hsm> for HsmSection {
    fn from(hsm: Hsm) -> Self {
        let Hsm { name, module, token, pin, priority, weight, sessions, env } = hsm;
        let (token, serial) = match token {
            TokenName::Label(label) => (Some(label), None),
            TokenName::Serial(serial) => (None, Some(serial)),
        };
        let (pin_file, pin_env) = match pin {
            PinSource::File(path) => (Some(path), None),
            PinSource::Env(variable) => (None, Some(variable)),
        };
        Self { name, module, token, serial, pin_file, pin_env, priority, weight, sessions, env }
    }
}
