//! Waiting for events that must happen.

use std::time::Duration;

/// Time limit for events that must happen. Only a failing test waits this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `done` repeatedly until it returns a value; panics with `what` after [`PATIENCE`].
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a future to its end, for tests that are not async.
pub fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
