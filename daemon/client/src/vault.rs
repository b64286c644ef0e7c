//! The vault of a virtual machine: one file with the machine's protector and its secrets, sealed with the protector's
//! transport key. docs/vault.md describes the format and the steps of a start.
//!
//! | what | module |
//! |---|---|
//! | the secrets, by name | [`secrets`] |
//! | the file's format: seal and open, without I/O | [`format`](mod@format) |
//! | replacing a vault by its successor on the disk | [`file`](mod@file) |
//! | the newest generation that this host has seen | [`seen`] |

pub mod file;
pub mod format;
pub mod secrets;
pub mod seen;
