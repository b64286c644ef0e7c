//! Every setting of the daemon: its name, unit, bounds and safe default.
//!
//! The configuration is one TOML file. An unknown setting is an error, because a misspelt one would silently leave a
//! default in force. Relative paths are relative to the folder of the file that names them, so a lab can be moved.
//!
//! The file is parsed into types that have no value for settings that contradict each other (`schema`, `hsm`, `tls`, `pin`); `bounds`
//! checks the numbers. Errors name the line of the setting (`fault`, `line`).

mod bounds;
mod disagreement;
mod error;
mod fault;
mod hsm;
mod line;
mod load;
mod pin;
mod schema;
mod tls;

pub use error::ConfigError;
pub use hsm::{Hsm, TokenName};
pub use pin::{PinError, PinSource};
pub use schema::{Attest, AttestMode, Audit, Config, Log, LogFormat, Release, Server};
pub use tls::{Clients, Tls};
