//! What every program of the project does about the process it runs in: output that was not written is an error, signals do
//! not end it at the wrong moment, and a limit on threads gives a message instead of a panic.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod output;
pub mod signals;
pub mod threads;
