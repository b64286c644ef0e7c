//! The error type of commands.

/// An error that is only printed for a person.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
