//! Waiting for something that has to happen.

use std::time::Duration;

/// How long a test waits for something that has to happen. Only a failure takes this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `done` again and again until it gives something; panics with `what` after [`PATIENCE`].
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

/// Runs a future to its end, for tests that are not asynchronous themselves.
pub fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
