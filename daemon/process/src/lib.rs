//! Functions that all programs of the project share. They treat output that could not be written as an error, keep
//! signals from ending the process at a wrong moment, and turn a limit on threads into an error message instead of a
//! panic.
//!
//! Locks, the time of day and the throttle of log lines are also for libraries. They are built without the feature `programs`.

#![forbid(unsafe_code)]

#[cfg(feature = "programs")]
pub mod arguments;
pub mod clock;
pub mod lock;
#[cfg(feature = "programs")]
pub mod manual;
#[cfg(feature = "programs")]
pub mod output;
#[cfg(feature = "programs")]
pub mod signals;
#[cfg(feature = "programs")]
pub mod threads;
pub mod throttle;
