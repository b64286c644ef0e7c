//! The interface of the stores `sqlite` and `etcd`.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::contents::Contents;
use super::error::StateError;

/// Makes a change in a copy of the contents. It may be called several times, each time with newer contents; the last
/// result counts.
pub(super) type Decision<'a> = &'a mut dyn FnMut(&mut Contents) -> Result<(), StateError>;

/// A store of the contents.
pub(super) trait Store: fmt::Debug + Send {
    /// The current contents: the same value as long as nothing has changed.
    ///
    /// # Errors
    /// The store cannot be reached. A single unreadable table reports its own error when it is used.
    fn contents(&self) -> Result<Arc<Contents>, StateError>;

    /// Makes a change atomically, based on the contents on which it was decided.
    ///
    /// # Errors
    /// The error of `decide`, in which case nothing is changed; or the store cannot be written.
    fn change(&mut self, decide: Decision<'_>) -> Result<(), StateError>;

    /// The log of the baseline that was added under this name at this time, if any.
    ///
    /// # Errors
    /// The store cannot be read.
    fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError>;

    /// How long the name of a removed baseline is reserved, in seconds: until the time of every health certificate that
    /// names it is before that of a baseline which is added afterwards.
    fn reservation(&self) -> i64;

    /// The state of the connection to a remote store; `None` for a local store.
    fn condition(&self) -> Option<Condition>;

    /// The latest time at which the contents are known to have been the newest ones; `None` for a local store, whose
    /// contents always are.
    fn confirmed(&self) -> Option<Instant>;

    /// Another handle to a remote store, which does not wait for a change that this one makes.
    fn another(&self) -> Option<Box<dyn Store>>;

    /// Notifies about new contents and about each confirmation that they are the newest, if the store supports that.
    fn changes(&self) -> Option<watch::Receiver<()>>;
}

/// The state of the connection to a remote store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The connected endpoint, or why there is none.
    pub link: Result<String, String>,
    /// Maximum age of the contents.
    pub age: Duration,
    /// The store's revision of the contents.
    pub revision: i64,
}
