//! Administration of a running daemon with the real command line.

use std::process::Output;

use rustix::process::Pid;
use serde_json::Value;

use crate::binary::run;
use crate::lab::Lab;
use crate::tool::said;

/// An administrator of a lab's daemon.
pub struct Administrator<'a>(pub &'a Lab);

impl Administrator<'_> {
    /// Runs a command and returns its output.
    ///
    /// # Panics
    /// If the command cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let config = self.0.config_file();
        run(arguments.iter().copied().chain(["--config", config.to_str().unwrap()]))
    }

    /// Runs a command and returns its JSON output.
    ///
    /// # Panics
    /// If the command fails.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Returns the id of the worker process of a member; `None` without a worker.
    ///
    /// # Panics
    /// If no member has this name.
    #[must_use]
    pub fn worker(&self, member: &str) -> Option<Pid> {
        let listed = self.json(&["hsm", "list"]);
        let found = listed.as_array().unwrap().iter().find(|listed| listed["name"] == member).unwrap();
        Pid::from_raw(i32::try_from(found["worker_pid"].as_i64()?).unwrap())
    }

    /// Runs a command that must fail and returns its error message.
    ///
    /// # Panics
    /// If the command succeeds or prints anything else.
    pub fn fault(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stderr).unwrap()
    }
}
