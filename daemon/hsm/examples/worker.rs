//! The worker process by itself, for tests of the crate: `claviger hsm-worker` does the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    claviger_hsm::worker::run()
}
