//! Locks of this crate: what a panic leaves under one of them is whole, so that it is used on.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a thread has panicked under the lock.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
