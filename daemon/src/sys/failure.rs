//! Why a command did not come to its end.

/// An error that is only told to a person: a command has no other use for it.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
