//! Tokens that misbehave on command: `claviger-faulty-token` in front of the real module.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use claviger::config::{Hsm, TokenName};
use claviger_faulty_token::{CONTROL_VARIABLE, MODULE_FILE, MODULE_VARIABLE, check};
use rustix::process::Pid;
use serde_json::Value;

use crate::lab::Lab;
use crate::process::lives;
use crate::wait::until;

/// File name of the library. It is built together with every program that links this crate.
const LIBRARY: &str = "libclaviger_faulty_token.so";

/// The faulty module in front of a real module, with its own control files.
#[derive(Clone, Debug)]
struct Faulty {
    file: PathBuf,
    control: PathBuf,
    real: PathBuf,
}

impl Faulty {
    /// Uses the control files in `folder/NAME.control`; `file` is a copy of the library.
    fn new(folder: &Path, name: &str, file: PathBuf, real: PathBuf) -> Self {
        let control = folder.join(format!("{name}.control"));
        fs::create_dir_all(&control).unwrap();
        Self { file, control, real }
    }

    fn module_file(&self) -> &Path {
        &self.file
    }

    /// Returns the environment variables that the module needs when it is loaded.
    fn env(&self) -> BTreeMap<String, String> {
        let text = |path: &Path| path.display().to_string();
        BTreeMap::from([
            (MODULE_VARIABLE.to_owned(), text(&self.real)),
            (CONTROL_VARIABLE.to_owned(), text(&self.control)),
        ])
    }

    /// Sets the faults of a token; `faults` are lines of its control file.
    ///
    /// # Panics
    /// If a line is invalid.
    fn set(&self, label: &str, faults: &[&str]) {
        self.write(label, false, faults);
    }

    /// Sets the faults of the module as a whole.
    ///
    /// # Panics
    /// If a line is invalid.
    fn set_module(&self, faults: &[&str]) {
        self.write(MODULE_FILE, true, faults);
    }

    fn write(&self, file: &str, of_module: bool, faults: &[&str]) {
        let text = faults.join("\n");
        check(&text, of_module).unwrap_or_else(|error| panic!("{error}"));
        let new = self.control.join(format!("{file}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, self.control.join(file)).unwrap();
    }

    /// Ends the faults of the token. Handles that became invalid stay invalid.
    fn clear(&self, label: &str) {
        let _ = fs::remove_file(self.control.join(label));
    }

    /// Ends the faults of the module.
    fn clear_module(&self) {
        self.clear(MODULE_FILE);
    }

    /// Returns the counts of a token over all processes so far, at most some 50 ms old. Calls that may soon end their
    /// process are counted at once. See `claviger-faulty-token`.
    ///
    /// # Panics
    /// If the statistics cannot be read.
    fn stats(&self, label: &str) -> Stats {
        let mut stats = Stats::default();
        for pid in self.processes(label) {
            let text = fs::read(self.control.join(format!("{label}.{}.stats", pid.as_raw_nonzero()))).unwrap();
            stats.add(&serde_json::from_slice(&text).unwrap(), lives(pid));
        }
        stats
    }

    /// Returns the processes that have statistics about a label. The directory is listed twice, since one listing may miss
    /// a file that is replaced meanwhile.
    fn processes(&self, label: &str) -> HashSet<Pid> {
        let list = || fs::read_dir(&self.control).unwrap();
        let names = list().chain(list()).map(|entry| entry.unwrap().file_name());
        names.filter_map(|name| process_of(name.to_str()?, label)).collect()
    }

    /// Returns the counts of the module, which include the calls of its tokens.
    fn module_stats(&self) -> Stats {
        self.stats(MODULE_FILE)
    }
}

/// Copies the library to a file.
fn install(file: &Path) {
    // The program is …/target/debug/deps/test-0123, or one directory above; the library was built with it.
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap();
    let built = if folder.ends_with("deps") { folder.join(LIBRARY) } else { folder.join("deps").join(LIBRARY) };
    fs::copy(&built, file).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
}

/// Returns the process whose statistics about this label have this file name.
fn process_of(name: &str, label: &str) -> Option<Pid> {
    Pid::from_raw(name.strip_prefix(label)?.strip_prefix('.')?.strip_suffix(".stats")?.parse().ok()?)
}

/// Counts of the faulty module over all processes that loaded it; counts of the present include only living processes.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    calls: BTreeMap<String, u64>,
    faults: BTreeMap<String, u64>,
    sessions: u64,
    hanging: u64,
    in_progress: u64,
    most_in_progress: u64,
    processes: u64,
}

impl Stats {
    /// Adds the counts of one process.
    fn add(&mut self, counted: &Value, lives: bool) {
        for (sums, counts) in [(&mut self.calls, &counted["calls"]), (&mut self.faults, &counted["faults"])] {
            for (name, count) in counts.as_object().into_iter().flatten() {
                *sums.entry(name.clone()).or_default() += count.as_u64().unwrap();
            }
        }
        let number = |name: &str| counted[name].as_u64().unwrap();
        if lives {
            self.sessions += number("sessions");
            self.hanging += number("hanging");
            self.in_progress += number("in_progress");
        }
        self.most_in_progress = self.most_in_progress.max(number("most_in_progress"));
        self.processes += 1;
    }

    /// Returns the number of calls of a function.
    #[must_use]
    pub fn calls(&self, name: &str) -> u64 {
        self.calls.get(name).copied().unwrap_or(0)
    }

    /// Returns the number of faults of a kind: `rv`, `delay`, `hang`, `deed`, `corrupt`, `throttle`, `absent`,
    /// `session_limit`, `stale` (items that became stale), `stale_handle` (objects refused for it); for a module also
    /// `dead` and `no_slots`.
    #[must_use]
    pub fn faults(&self, kind: &str) -> u64 {
        self.faults.get(kind).copied().unwrap_or(0)
    }

    /// Returns the number of open sessions.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.sessions
    }

    /// Returns the number of calls that hang now.
    #[must_use]
    pub fn hanging(&self) -> u64 {
        self.hanging
    }

    /// Returns the number of calls in progress, including those that hang.
    #[must_use]
    pub fn in_progress(&self) -> u64 {
        self.in_progress
    }

    /// Returns the maximum number of calls that were in progress at once in one process.
    #[must_use]
    pub fn most_in_progress(&self) -> u64 {
        self.most_in_progress
    }

    /// Returns the number of processes that have counted anything.
    #[must_use]
    pub fn processes(&self) -> u64 {
        self.processes
    }
}

/// The members of a lab that use the faulty module: their names in the configuration (`hsm-a` …) and the labels of their
/// tokens.
pub struct FaultyMembers(BTreeMap<String, (Faulty, String)>);

impl Lab {
    /// Puts the faulty module in front of every member, in the configuration. Must be called once, before the lab is
    /// served. All members use the same library, and each has its own control files.
    ///
    /// # Panics
    /// If the library cannot be copied.
    #[must_use]
    pub fn behind_faulty(&self) -> FaultyMembers {
        let library = self.file("faulty").join("faulty.so");
        self.put_behind(|folder, hsm| Faulty::new(folder, &hsm.name, library.clone(), hsm.module.clone()), &[&library])
    }

    /// Does the same for programs that load the modules of several members into one process, such as a measurement of bare
    /// tokens. Each member gets its own copies of both libraries, so that members share nothing in that process.
    ///
    /// # Panics
    /// If a library cannot be copied.
    #[must_use]
    pub fn behind_faulty_copies(&self) -> FaultyMembers {
        let copies = |folder: &Path, hsm: &Hsm| {
            let (file, real) = (folder.join(format!("{}.so", hsm.name)), folder.join(format!("{}.real.so", hsm.name)));
            install(&file);
            fs::copy(&hsm.module, &real).unwrap_or_else(|error| panic!("{}: {error}", hsm.module.display()));
            Faulty::new(folder, &hsm.name, file, real)
        };
        self.put_behind(copies, &[])
    }

    fn put_behind(&self, faulty: impl Fn(&Path, &Hsm) -> Faulty, libraries: &[&Path]) -> FaultyMembers {
        let folder = self.file("faulty");
        fs::create_dir_all(&folder).unwrap();
        libraries.iter().for_each(|library| install(library));
        let mut members = BTreeMap::new();
        self.configure(|config| {
            for hsm in &mut config.hsm {
                let faulty = faulty(&folder, hsm);
                hsm.module = faulty.module_file().to_owned();
                // Added to `[env]`, which configures the real module.
                hsm.env.extend(faulty.env());
                let TokenName::Label(label) = hsm.token.clone() else { panic!("{:?} has no label", hsm.token) };
                members.insert(hsm.name.clone(), (faulty, label));
            }
        });
        FaultyMembers(members)
    }
}

impl FaultyMembers {
    /// Returns a member's module and the label of its token.
    fn of(&self, member: &str) -> (&Faulty, &str) {
        let (faulty, label) = self.0.get(member).unwrap_or_else(|| panic!("no member {member}"));
        (faulty, label)
    }

    /// Sets the faults of a member's token. See `claviger-faulty-token` for the lines.
    pub fn set(&self, member: &str, faults: &[&str]) {
        let (faulty, label) = self.of(member);
        faulty.set(label, faults);
    }

    /// Ends the faults of a member's token.
    pub fn clear(&self, member: &str) {
        let (faulty, label) = self.of(member);
        faulty.clear(label);
    }

    /// Sets the faults of a member's module; other members are not affected.
    pub fn set_module(&self, member: &str, faults: &[&str]) {
        self.of(member).0.set_module(faults);
    }

    /// Sets the faults of every member's module.
    pub fn set_all_modules(&self, faults: &[&str]) {
        self.0.values().for_each(|(faulty, _)| faulty.set_module(faults));
    }

    /// Ends the faults of a member's module.
    pub fn clear_module(&self, member: &str) {
        self.of(member).0.clear_module();
    }

    /// Ends all faults.
    pub fn clear_all(&self) {
        for (faulty, label) in self.0.values() {
            faulty.clear(label);
            faulty.clear_module();
        }
    }

    /// Returns the counts of a member's token.
    #[must_use]
    pub fn stats(&self, member: &str) -> Stats {
        let (faulty, label) = self.of(member);
        faulty.stats(label)
    }

    /// Returns the counts of a member's module.
    #[must_use]
    pub fn module_stats(&self, member: &str) -> Stats {
        self.of(member).0.module_stats()
    }

    /// Waits until the counts of a member's token satisfy `wanted`.
    ///
    /// # Panics
    /// If they do not within the time limit.
    pub fn until(&self, member: &str, what: &str, wanted: impl Fn(&Stats) -> bool) -> Stats {
        until(what, || Some(self.stats(member)).filter(|stats| wanted(stats)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_tell_whose_they_are() {
        let process = |name, label| process_of(name, label).map(Pid::as_raw_nonzero).map(i32::from);
        assert_eq!(process("claviger-a.123.stats", "claviger-a"), Some(123));
        assert_eq!(process("module.7.stats", MODULE_FILE), Some(7));
        for other in
            ["claviger-a.123.stats.new", "claviger-a.stats", "claviger-a", "claviger-a.done", "claviger-ab.1.stats"]
        {
            assert_eq!(process(other, "claviger-a"), None, "{other}");
        }
    }

    #[test]
    fn what_is_over_is_not_counted_as_now() {
        let counted = serde_json::json!({
            "calls": {"C_Login": 1, "C_Sign": 7}, "faults": {"rv": 2},
            "sessions": 5, "hanging": 1, "in_progress": 3, "most_in_progress": 4,
        });
        let mut stats = Stats::default();
        stats.add(&counted, false);
        assert_eq!((stats.calls("C_Sign"), stats.faults("rv"), stats.most_in_progress()), (7, 2, 4));
        assert_eq!((stats.sessions(), stats.hanging(), stats.in_progress()), (0, 0, 0));
        stats.add(&counted, true);
        assert_eq!((stats.calls("C_Login"), stats.calls("C_Sign"), stats.faults("rv")), (2, 14, 4));
        assert_eq!((stats.sessions(), stats.hanging(), stats.in_progress(), stats.most_in_progress()), (5, 1, 3, 4));
        assert_eq!((stats.processes(), stats.calls("C_Encrypt"), stats.faults("hang")), (2, 0, 0));
    }
}
