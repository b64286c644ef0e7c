//! What every store does: `sqlite`, `etcd`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::contents::Contents;
use super::error::StateError;

/// Makes a change in a copy of the contents. It may be called several times, each time with newer contents; the last outcome
/// counts.
pub(super) type Decision<'a> = &'a mut dyn FnMut(&mut Contents) -> Result<(), StateError>;

/// Where the contents are kept.
pub(super) trait Store: fmt::Debug + Send {
    /// The contents now: the same value for as long as nothing has changed.
    ///
    /// # Errors
    /// When the store cannot be reached. Single tables that cannot be read say so themselves.
    fn contents(&self) -> Result<Arc<Contents>, StateError>;

    /// Makes a change, all of it or nothing, of the contents that it was decided on.
    ///
    /// # Errors
    /// Those of `decide`, and then nothing is changed; or when the store cannot be written.
    fn change(&mut self, decide: Decision<'_>) -> Result<(), StateError>;

    /// The log of the baseline that was added under this name at this time, if it has one.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError>;

    /// How well a store on other machines is followed; `None` for one on this machine.
    fn condition(&self) -> Option<Condition>;

    /// Tells of new contents, if the store does.
    fn changes(&self) -> Option<watch::Receiver<()>>;
}

/// How well a store on other machines is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The endpoint that is followed; otherwise why none is.
    pub link: Result<String, String>,
    /// How old the contents may be.
    pub age: Duration,
    /// The revision of the store that they have.
    pub revision: i64,
}
