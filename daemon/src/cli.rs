//! The commands that ask a running daemon, and the formatting of its replies. [`tenant`] has the tenant's commands,
//! which work on files without a daemon.

pub mod audit;
mod baselines;
pub mod configuration;
mod confirm;
pub mod doctor;
pub mod host;
mod hosts;
mod hsm;
pub mod init;
mod keys;
pub mod migrate;
mod nodes;
pub mod pfx;
pub mod place;
mod progress;
mod reload;
mod secret;
mod signers;
mod table;
mod target;
pub mod tenant;
pub mod transfer;

pub use crate::sys::failure::Failure;
pub use baselines::{Baselines, baselines};
pub use hosts::{Hosts, hosts};
pub use hsm::{Hsm, hsm};
pub use keys::{Keys, keys};
pub use nodes::{Nodes, nodes};
pub use reload::{Reload, reload};
pub use signers::{Signers, signers};
pub use target::{Target, rsa_bits};
