//! The head of every report: what was tested, on which machine and how.

use claviger_process::clock::since_1970;
use serde::{Deserialize, Serialize};

use crate::site::Hsm;
use crate::units;

/// A member of the cluster, as it was before the load.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Member {
    /// The name in the daemon's configuration.
    pub name: String,
    /// The token: `label "…"` or `serial "…"`.
    pub token: String,
    /// `up`, or the reason why the member is not up.
    pub state: String,
    /// Number of sessions that may be open.
    pub sessions: usize,
}

impl From<&Hsm> for Member {
    fn from(hsm: &Hsm) -> Self {
        let (name, token, state) = (hsm.name.clone(), hsm.token.clone(), hsm.state.clone());
        Self { name, token, state, sessions: hsm.sessions.wanted }
    }
}

/// The machine that this program runs on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The processor model, as the system reports it.
    pub processor: String,
    /// Number of processors.
    pub processors: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The operating system and its version.
    pub system: String,
}

impl Machine {
    /// Describes the machine that this program runs on. A field is empty if the system does not report it.
    #[must_use]
    pub fn here() -> Self {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let kibibytes = field(&read("/proc/meminfo"), "MemTotal");
        let kibibytes = kibibytes.split(' ').next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory: kibibytes * 1024,
            system: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
        }
    }

    fn stated(&self) -> String {
        let processor = if self.processor.is_empty() { "processor not known" } else { &self.processor };
        let memory = self.memory as f64 / f64::from(1 << 30);
        format!("{} × {processor}, {memory:.1} GiB, {}", self.processors, self.system)
    }
}

/// The test, the daemon and the machine of a report.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct About {
    /// The title of the report, if one was given.
    pub title: Option<String>,
    /// The command line, quoted for a shell.
    pub command: String,
    /// The name and version of this program.
    pub generator: String,
    /// Start of the command, in seconds since 1970.
    pub at: u64,
    /// Version and commit of the daemon; `None` if unknown.
    pub daemon: Option<String>,
    /// Members of the daemon's cluster; empty if unknown.
    pub hsms: Vec<Member>,
    /// The machine that this program ran on.
    pub machine: Machine,
    /// `true` if the daemon ran on the same machine; `None` if this is unknown or there was no daemon.
    pub daemon_is_here: Option<bool>,
}

impl About {
    /// Describes this call of the program. The fields about the daemon are empty.
    #[must_use]
    pub fn this_call(title: Option<&str>) -> Self {
        let words: Vec<_> = std::env::args().collect();
        let name = words.first().map(|name| name.rsplit('/').next().unwrap_or(name).to_owned());
        let words: Vec<_> = name.into_iter().chain(words.into_iter().skip(1)).map(|word| quoted(&word)).collect();
        Self {
            title: title.map(str::to_owned),
            command: words.join(" "),
            generator: concat!("claviger-loadgen ", env!("CARGO_PKG_VERSION")).to_owned(),
            at: since_1970().as_secs(),
            daemon: None,
            hsms: Vec::new(),
            machine: Machine::here(),
            daemon_is_here: None,
        }
    }

    /// Names and values for a table. `with_daemon` adds the rows about the daemon.
    #[must_use]
    pub fn facts(&self, with_daemon: bool) -> Vec<[String; 2]> {
        let mut facts = vec![["command".to_owned(), self.command.clone()]];
        let mut add = |name: &str, value: String| facts.push([name.to_owned(), value]);
        if with_daemon {
            let not_known = || "not known: the daemon's metrics address was not reached (--metrics)".to_owned();
            add("daemon", self.daemon.clone().unwrap_or_else(not_known));
            let hsm = |hsm: &Member| {
                let token = if hsm.token.is_empty() { String::new() } else { format!("{}, ", hsm.token) };
                format!("{} ({token}{} sessions, {})", hsm.name, hsm.sessions, hsm.state)
            };
            let hsms: Vec<_> = self.hsms.iter().map(hsm).collect();
            add("HSMs", if hsms.is_empty() { "not known".to_owned() } else { hsms.join("; ") });
        }
        let here = match self.daemon_is_here {
            Some(true) => "; the daemon ran on it, too",
            Some(false) => "; the daemon ran elsewhere",
            None => "",
        };
        add(if with_daemon { "generator's machine" } else { "machine" }, format!("{}{here}", self.machine.stated()));
        add("by", format!("{}, {}", self.generator, units::date(self.at)));
        facts
    }
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        for (word, expected) in [
            ("--profile", "--profile"),
            ("10s@100,30s@100..500", "10s@100,30s@100..500"),
            ("p99<100ms", "'p99<100ms'"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }

    #[test]
    fn a_report_says_what_it_is_about() {
        let hsm = Member { name: "a".to_owned(), token: "label \"t\"".to_owned(), state: "up".to_owned(), sessions: 8 };
        let about = About {
            daemon: Some("claviger 1.2.3".to_owned()),
            hsms: vec![hsm],
            daemon_is_here: Some(true),
            ..About::this_call(Some("night"))
        };
        let facts = about.facts(true);
        let value = |name: &str| facts.iter().find(|[known, _]| known == name).map_or("", |[_, value]| value);
        assert_eq!((value("daemon"), value("HSMs")), ("claviger 1.2.3", "a (label \"t\", 8 sessions, up)"));
        assert!(
            value("generator's machine").contains("GiB, Linux ")
                && value("generator's machine").ends_with("on it, too")
        );
        assert!(value("command").starts_with("claviger_loadgen-"), "{}", value("command"));
        assert_eq!(about.facts(false).len(), 3);
    }
}
