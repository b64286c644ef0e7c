//! The scope of one control file: its current faults and its counts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use claviger_process::lock::lock;
use cryptoki_sys::CK_RV;

use crate::MODULE_FILE;
use crate::faults::Faults;

/// Polling period of a call that hangs.
const POLL: Duration = Duration::from_millis(5);
/// Calls that are counted on disk before they are made, because they begin actions that may end the process. Other calls
/// are too frequent for that.
const AT_ONCE: [&str; 5] = ["C_Initialize", "C_GetSlotList", "C_GetTokenInfo", "C_OpenSession", "C_Login"];

/// A token, or the module as a whole.
pub(crate) struct Scope {
    /// `None` for a token without a label, which never misbehaves.
    file: Option<PathBuf>,
    current: Mutex<Current>,
    counts: Mutex<Counts>,
    reporting: Mutex<()>,
}

struct Current {
    version: Option<Version>,
    faults: Arc<Faults>,
}

/// Identifies a file among those that were renamed to the same name.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Default)]
struct Counts {
    calls: BTreeMap<&'static str, u64>,
    faults: BTreeMap<&'static str, u64>,
    sessions: u64,
    in_progress: u64,
    most_in_progress: u64,
    hanging: u64,
    changed: bool,
}

/// Decision about one call.
#[derive(Clone, Copy, Default)]
pub(crate) struct Plan {
    /// The code with which the call must fail.
    pub(crate) refused: Option<CK_RV>,
    /// True if the result must be corrupted.
    pub(crate) corrupt: bool,
}

/// A call in progress.
pub(crate) struct Entered<'a>(&'a Scope);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.count(|counts| counts.in_progress -= 1);
    }
}

impl Scope {
    pub(crate) fn new(control: &Path, name: &str) -> Self {
        // A label is not trusted as a file name.
        let file = (!name.is_empty()).then(|| control.join(name.replace('/', "_")));
        let current = Mutex::new(Current { version: None, faults: Arc::default() });
        Self { file, current, counts: Mutex::default(), reporting: Mutex::default() }
    }

    fn is_module(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.ends_with(MODULE_FILE))
    }

    /// Returns the current faults. `appeared` is called with new faults before any other thread sees them.
    pub(crate) fn faults(&self, appeared: impl FnOnce(&Faults)) -> Arc<Faults> {
        let mut current = lock(&self.current);
        let version = self.file.as_ref().and_then(|file| Some(Version::of(&file.metadata().ok()?)));
        if version != current.version {
            let read = version.and_then(|_| self.read().ok());
            current.version = read.as_ref().map(|(version, _)| *version);
            current.faults = Arc::new(read.map(|(_, faults)| faults).unwrap_or_default());
            appeared(&current.faults);
        }
        current.faults.clone()
    }

    /// Reads the version and the text together: a file that replaces it meanwhile is seen next time.
    fn read(&self) -> std::io::Result<(Version, Faults)> {
        let path = self.file.as_deref().unwrap_or(Path::new(""));
        let mut file = File::open(path)?;
        let version = Version::of(&file.metadata()?);
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let faults = Faults::parse(&text, self.is_module()).unwrap_or_else(|error| {
            // There is no other way to report it.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("{}: {error}", path.display());
            }
            Faults::default()
        });
        Ok((version, faults))
    }

    /// Counts a call, which is in progress until the returned value is dropped.
    pub(crate) fn enter(&self, name: &'static str) -> Entered<'_> {
        self.count(|counts| {
            *counts.calls.entry(name).or_default() += 1;
            counts.in_progress += 1;
            counts.most_in_progress = counts.most_in_progress.max(counts.in_progress);
        });
        if AT_ONCE.contains(&name) {
            self.report();
        }
        Entered(self)
    }

    /// Decides about a call that has entered; sleeps and hangs here for any time. `now` returns [`Scope::faults`] and
    /// performs the actions of new faults. `has_result` tells if the call has a result to corrupt. `absence` is the return
    /// code for an absent token, if the call notices it.
    pub(crate) fn plan(
        &self,
        name: &'static str,
        has_result: bool,
        absence: Option<CK_RV>,
        now: impl Fn() -> Arc<Faults>,
    ) -> Plan {
        let mut plan = Plan::default();
        let faults = now();
        if let (Some(absent), Some(rv)) = (faults.absent, absence) {
            self.fault("absent");
            plan.refused = Some(absent.rv.unwrap_or(rv));
        }
        if let Some(throttle) = faults.throttle
            && lock(&self.counts).in_progress > throttle.limit
        {
            self.fault("throttle");
            plan.refused.get_or_insert(throttle.rv);
        }
        for rule in &faults.rules {
            if !rule.applies(name, has_result) {
                continue;
            }
            if !rule.delay.is_zero() {
                self.fault("delay");
                std::thread::sleep(rule.delay);
            }
            if rule.hang {
                self.hang(|| Arc::ptr_eq(&now(), &faults));
            }
            if let Some(deed) = rule.deed
                && self.claim()
            {
                self.fault("deed");
                deed.perform();
            }
            if rule.corrupt {
                self.fault("corrupt");
                plan.corrupt = true;
            }
            if let Some(rv) = rule.rv {
                self.fault("rv");
                plan.refused.get_or_insert(rv);
            }
        }
        plan
    }

    /// Renames the control file. Returns false if another call or process did it first.
    fn claim(&self) -> bool {
        let taken = |file: &PathBuf| std::fs::rename(file, with_suffix(file, "done")).is_ok();
        self.file.as_ref().is_some_and(taken)
    }

    /// Hangs until `go_on`. Writes the counts at once before and after, so that a reader who saw the end of this call does
    /// not take it for the next one.
    fn hang(&self, go_on: impl Fn() -> bool) {
        self.count(|counts| counts.hanging += 1);
        self.fault("hang");
        while go_on() {
            std::thread::sleep(POLL);
        }
        self.count(|counts| counts.hanging -= 1);
        self.report();
    }

    /// Counts a fault and writes the counts, because the process may be killed for this fault. Delays are too frequent for
    /// that.
    pub(crate) fn fault(&self, kind: &'static str) {
        self.count(|counts| *counts.faults.entry(kind).or_default() += 1);
        if kind != "delay" {
            self.report();
        }
    }

    /// Counts a session that is about to be opened, if there is room; returns true if there is.
    pub(crate) fn reserve_session(&self, most: Option<u64>) -> bool {
        let mut counts = lock(&self.counts);
        let room = most.is_none_or(|most| counts.sessions < most);
        counts.sessions += u64::from(room);
        counts.changed = true;
        room
    }

    /// Subtracts sessions that have ended.
    pub(crate) fn forget_sessions(&self, number: u64) {
        self.count(|counts| counts.sessions -= number);
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = lock(&self.counts);
        change(&mut counts);
        counts.changed = true;
    }

    /// Writes the counts, if they have changed.
    pub(crate) fn report(&self) {
        let Some(file) = &self.file else { return };
        let _one_at_a_time = lock(&self.reporting);
        let mut counts = lock(&self.counts);
        if !std::mem::take(&mut counts.changed) {
            return;
        }
        let text = counts.to_json();
        drop(counts);
        // Another process with the same token has its own counts.
        let stats = with_suffix(file, &format!("{}.stats", std::process::id()));
        let temporary = with_suffix(&stats, "new");
        // A missing directory, at the end of a test, is no reason to fail.
        let _ = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, stats));
    }
}

fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Counts {
    fn to_json(&self) -> String {
        let object = |counts: &BTreeMap<&str, u64>| {
            let members: Vec<_> = counts.iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
            members.join(", ")
        };
        let mut json = String::new();
        let _ = writeln!(json, "{{\"calls\": {{{}}},", object(&self.calls));
        let _ = writeln!(json, " \"faults\": {{{}}},", object(&self.faults));
        let _ = writeln!(json, " \"sessions\": {}, \"hanging\": {},", self.sessions, self.hanging);
        let (now, most) = (self.in_progress, self.most_in_progress);
        let _ = writeln!(json, " \"in_progress\": {now}, \"most_in_progress\": {most}}}");
        json
    }
}
