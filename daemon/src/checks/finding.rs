//! The finding of a check, and its severity.

use serde::{Deserialize, Serialize};

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// No problem.
    Ok,
    /// Keys are released, but an administrator should act.
    Warning,
    /// Keys are not released, or not by every HSM, or not safely.
    Error,
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Name of the check: `configuration`, `pin`, `tls`, `folder`, `socket`, `port`, `state`, `certificate`, `audit`,
    /// `clock`, `module`, `token`, `login`, `key`, `sessions`, `hsm`, `etcd`, `nodes` or `user`.
    pub check: String,
    /// Severity.
    pub level: Level,
    /// The finding.
    pub what: String,
    /// The remedy; `None` if there is no problem.
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
