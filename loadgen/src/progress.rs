//! Shows progress on the standard error: a bar on a terminal, or else a line from time to time.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::print;

/// Interval between two plain lines.
const PAUSE: Duration = Duration::from_secs(5);

/// The progress of a task of known size.
pub struct Progress {
    bar: ProgressBar,
    what: &'static str,
    /// The time of the latest plain line; `None` on a terminal.
    plain: Option<Mutex<Instant>>,
}

impl Progress {
    /// Starts at zero of `total`. A very short task shows nothing.
    #[must_use]
    pub fn new(what: &'static str, total: u64) -> Self {
        if total == 0 {
            return Self { bar: ProgressBar::hidden(), what, plain: None };
        }
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(total) } else { ProgressBar::hidden() };
        bar.set_length(total);
        if let Ok(style) = ProgressStyle::with_template("{prefix:18} {bar:40.cyan/dim} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Self { bar, what, plain: (!terminal).then(|| Mutex::new(Instant::now())) }
    }

    /// Adds `by` to the finished part.
    pub fn advance(&self, by: u64) {
        self.bar.inc(by);
        self.speak(String::new);
    }

    /// Sets the finished part and shows a message.
    pub fn tell(&self, done: u64, message: impl Fn() -> String) {
        self.bar.set_position(done);
        if self.plain.is_none() {
            self.bar.set_message(message());
        }
        self.speak(message);
    }

    fn speak(&self, message: impl Fn() -> String) {
        let Some(latest) = &self.plain else { return };
        let Ok(mut latest) = latest.lock() else { return };
        if latest.elapsed() >= PAUSE {
            *latest = Instant::now();
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
            print::aside(format!("{}: {done}/{all} {}", self.what, message()).trim_end());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
