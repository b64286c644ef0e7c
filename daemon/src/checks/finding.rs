//! What a check found, and how bad it is.

use serde::{Deserialize, Serialize};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Keys are released, and something is to be done all the same.
    Warning,
    /// Keys are not released, not by every HSM, or not safely.
    Error,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The check: `configuration`, `pin`, `tls`, `folder`, `socket`, `port`, `state`, `certificate`, `audit`, `clock`, `module`, `token`,
    /// `login`, `key`, `sessions` or `hsm`.
    pub check: String,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do; nothing where all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
}

impl Finding {
    pub(crate) fn ok(check: &str, what: impl Into<String>) -> Self {
        Self { check: check.to_owned(), level: Level::Ok, what: what.into(), todo: None }
    }

    pub(crate) fn warning(check: &str, what: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check: check.to_owned(), level: Level::Warning, what: what.into(), todo: Some(todo.into()) }
    }

    pub(crate) fn error(check: &str, what: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check: check.to_owned(), level: Level::Error, what: what.into(), todo: Some(todo.into()) }
    }
}
