//! All settings of the daemon: name, unit, limits and default.
//!
//! The configuration is one TOML file. An unknown setting is an error, because a misspelt setting would silently keep
//! its default. Relative paths are relative to the folder of the configuration file, so a lab can be moved.
//!
//! The file is parsed into types that have no value for settings that contradict each other (`schema`, `hsm`, `tls`, `pin`); `bounds`
//! checks the numbers. Errors name the line of the setting (`fault`, `line`).

mod bounds;
mod disagreement;
mod error;
mod etcd;
mod fault;
mod hsm;
mod line;
mod load;
mod pin;
pub(crate) mod reference;
mod schema;
mod tls;

pub use error::ConfigError;
pub use etcd::{Etcd, Link};
pub use hsm::{Hsm, TokenName};
pub use pin::{PinError, PinSource};
pub use schema::{Attest, AttestMode, Audit, Config, Log, LogFormat, Release, Server};
pub use tls::{Clients, Tls};
