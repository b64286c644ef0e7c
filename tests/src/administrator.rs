//! Who administers a running daemon, with the real command line.

use std::process::Output;

use rustix::process::Pid;
use serde_json::Value;

use crate::binary::run;
use crate::lab::Lab;
use crate::tool::said;

/// An administrator of a lab's daemon.
pub struct Administrator<'a>(pub &'a Lab);

impl Administrator<'_> {
    /// Runs a command on the daemon.
    ///
    /// # Panics
    /// When it cannot be run at all.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let config = self.0.config_file();
        run(arguments.iter().copied().chain(["--config", config.to_str().unwrap()]))
    }

    /// What a command says for machines.
    ///
    /// # Panics
    /// When it fails.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The process that serves a member; `None` while there is none.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn worker(&self, member: &str) -> Option<Pid> {
        let listed = self.json(&["hsm", "list"]);
        let found = listed.as_array().unwrap().iter().find(|listed| listed["name"] == member).unwrap();
        Pid::from_raw(i32::try_from(found["worker_pid"].as_i64()?).unwrap())
    }

    /// What a command says when it fails, and nothing else.
    ///
    /// # Panics
    /// When it does not.
    pub fn fault(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stderr).unwrap()
    }
}
