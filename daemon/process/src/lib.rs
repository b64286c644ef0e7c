//! Process handling that every program of the project shares. Output that could not be written is an error, signals do
//! not end the process at the wrong moment, and a limit on threads causes an error message instead of a panic.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod output;
pub mod signals;
pub mod threads;
