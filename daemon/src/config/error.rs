//! The error of a configuration file: the file, the line, the setting.

use std::fmt;
use std::path::PathBuf;

/// Why a configuration cannot be used: position, setting, problem and remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The configuration file.
    pub file: PathBuf,
    /// The line in it, counted from 1, if known.
    pub line: Option<usize>,
    /// The setting, like `server.listen` or `hsm[1].pin_file` (members are counted from 1).
    pub setting: Option<String>,
    /// The problem.
    pub problem: String,
    /// The remedy.
    pub advice: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(setting) = &self.setting {
            write!(f, ": {setting}")?;
        }
        write!(f, ": {}; {}", self.problem, self.advice)
    }
}

impl std::error::Error for ConfigError {}
