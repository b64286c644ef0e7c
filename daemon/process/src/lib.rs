//! What every program of the project shares. Output that could not be written is an error, signals do not end the process at
//! the wrong moment, and a limit on threads causes an error message instead of a panic.
//!
//! Locks and the time of day are for libraries, too: they are built without the feature `programs`.

#![forbid(unsafe_code)]

#[cfg(feature = "programs")]
pub mod arguments;
pub mod clock;
pub mod lock;
#[cfg(feature = "programs")]
pub mod output;
#[cfg(feature = "programs")]
pub mod signals;
#[cfg(feature = "programs")]
pub mod threads;
