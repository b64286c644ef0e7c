//! Tokens that misbehave on command: `claviger-faulty-token` between the daemon and the real module.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use claviger_faulty_token::{CONTROL_VARIABLE, MODULE_FILE, MODULE_VARIABLE, check};
use serde_json::Value;

use crate::{Lab, until};

/// The library, which is built wherever something links this crate.
const LIBRARY: &str = "libclaviger_faulty_token.so";

/// One instance of the faulty module: a copy of its library, with control files of its own.
#[derive(Clone, Debug)]
pub struct Faulty {
    file: PathBuf,
    control: PathBuf,
    real: PathBuf,
}

impl Faulty {
    /// Copies the library to `folder/NAME.so`; its control files are in `folder/NAME.control`.
    ///
    /// # Panics
    /// When it cannot be copied.
    #[must_use]
    pub fn install(folder: &Path, name: &str, real: &Path) -> Self {
        let file = folder.join(format!("{name}.so"));
        let control = folder.join(format!("{name}.control"));
        fs::create_dir_all(&control).unwrap();
        // …/target/debug/deps/test-0123, or a program a folder above, and the library that was built with it.
        let program = std::env::current_exe().unwrap();
        let folder = program.parent().unwrap();
        let built = if folder.ends_with("deps") { folder.join(LIBRARY) } else { folder.join("deps").join(LIBRARY) };
        fs::copy(&built, &file).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
        Self { file, control, real: real.to_owned() }
    }

    /// The same, in front of a copy of the real module: nothing is shared with other instances in one process.
    ///
    /// # Panics
    /// When one of them cannot be copied.
    #[must_use]
    pub fn install_alone(folder: &Path, name: &str, real: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        let copy = folder.join(format!("{name}.real.so"));
        fs::copy(real, &copy).unwrap_or_else(|error| panic!("{}: {error}", real.display()));
        Self::install(folder, name, &copy)
    }

    /// The library to load.
    #[must_use]
    pub fn module_file(&self) -> &Path {
        &self.file
    }

    /// What has to be in the environment when it is loaded.
    #[must_use]
    pub fn env(&self) -> BTreeMap<String, String> {
        let text = |path: &Path| path.display().to_string();
        BTreeMap::from([
            (MODULE_VARIABLE.to_owned(), text(&self.real)),
            (CONTROL_VARIABLE.to_owned(), text(&self.control)),
        ])
    }

    /// The faults of a token from now on; `faults` are lines of its control file.
    ///
    /// # Panics
    /// When a line is wrong.
    pub fn set(&self, label: &str, faults: &[&str]) {
        self.write(label, false, faults);
    }

    /// The faults of the module as a whole from now on.
    ///
    /// # Panics
    /// When a line is wrong.
    pub fn set_module(&self, faults: &[&str]) {
        self.write(MODULE_FILE, true, faults);
    }

    fn write(&self, file: &str, of_module: bool, faults: &[&str]) {
        let text = faults.join("\n");
        check(&text, of_module).unwrap_or_else(|error| panic!("{error}"));
        let new = self.control.join(format!("{file}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, self.control.join(file)).unwrap();
    }

    /// The token behaves from now on; what became invalid stays so.
    pub fn clear(&self, label: &str) {
        let _ = fs::remove_file(self.control.join(label));
    }

    /// The module behaves from now on.
    pub fn clear_module(&self) {
        self.clear(MODULE_FILE);
    }

    /// What the token was asked, as of some 50 ms ago; calls that hang are told at once, and after `C_Finalize` it is all.
    #[must_use]
    pub fn stats(&self, label: &str) -> Stats {
        // Not written yet is nothing counted yet.
        let text = fs::read(self.control.join(format!("{label}.stats"))).unwrap_or_default();
        Stats(serde_json::from_slice(&text).unwrap_or_default())
    }

    /// What the module was asked, calls of tokens among it.
    #[must_use]
    pub fn module_stats(&self) -> Stats {
        self.stats(MODULE_FILE)
    }
}

/// What the faulty module counted since it was loaded.
#[derive(Clone, Debug)]
pub struct Stats(Value);

impl Stats {
    /// Calls of a function.
    #[must_use]
    pub fn calls(&self, name: &str) -> u64 {
        self.0["calls"][name].as_u64().unwrap_or(0)
    }

    /// Faults: `rv`, `delay`, `hang`, `corrupt`, `throttle`, `absent`, `session_limit`, `stale` (what became so),
    /// `stale_handle` (objects refused for it); of a module also `dead` and `no_slots`.
    #[must_use]
    pub fn faults(&self, kind: &str) -> u64 {
        self.0["faults"][kind].as_u64().unwrap_or(0)
    }

    /// Sessions that are open.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.number("sessions")
    }

    /// Calls that hang now.
    #[must_use]
    pub fn hanging(&self) -> u64 {
        self.number("hanging")
    }

    /// Calls in progress, those that hang among them.
    #[must_use]
    pub fn in_progress(&self) -> u64 {
        self.number("in_progress")
    }

    /// The most calls that were ever in progress at once.
    #[must_use]
    pub fn most_in_progress(&self) -> u64 {
        self.number("most_in_progress")
    }

    fn number(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap_or(0)
    }
}

/// How many instances the members of a lab have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instances {
    /// One for all: what becomes of the module becomes of every member.
    Shared,
    /// One for each: copies of both libraries.
    Own,
}

/// The members of a lab that go through the faulty module, by their names in the configuration (`hsm-a` …).
pub struct FaultyMembers(BTreeMap<String, (Faulty, String)>);

impl Lab {
    /// Puts the faulty module between the daemon and every member, in the configuration; to be called once, before the lab
    /// is served.
    ///
    /// # Panics
    /// When a library cannot be copied.
    #[must_use]
    pub fn behind_faulty(&self, instances: Instances) -> FaultyMembers {
        let folder = self.file("faulty");
        let mut members = BTreeMap::new();
        self.configure(|config| {
            let shared = match instances {
                Instances::Shared => Some(Faulty::install(&folder, "all", &config.hsm[0].module)),
                Instances::Own => None,
            };
            for hsm in &mut config.hsm {
                let own = || Faulty::install_alone(&folder, &hsm.name, &hsm.module);
                let faulty = shared.clone().unwrap_or_else(own);
                hsm.module = faulty.module_file().to_owned();
                // A member's table says all that its instance needs.
                hsm.env.extend(config.env.clone());
                hsm.env.extend(faulty.env());
                members.insert(hsm.name.clone(), (faulty, hsm.token.clone().unwrap()));
            }
        });
        FaultyMembers(members)
    }
}

impl FaultyMembers {
    /// A member's instance and the label of its token.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn of(&self, member: &str) -> (&Faulty, &str) {
        let (faulty, label) = self.0.get(member).unwrap_or_else(|| panic!("no member {member}"));
        (faulty, label)
    }

    /// The faults of a member's token from now on. See `claviger-faulty-token` for the lines.
    pub fn set(&self, member: &str, faults: &[&str]) {
        let (faulty, label) = self.of(member);
        faulty.set(label, faults);
    }

    /// A member's token behaves from now on.
    pub fn clear(&self, member: &str) {
        let (faulty, label) = self.of(member);
        faulty.clear(label);
    }

    /// The faults of a member's module from now on, and so of all that share it.
    pub fn set_module(&self, member: &str, faults: &[&str]) {
        self.of(member).0.set_module(faults);
    }

    /// A member's module behaves from now on.
    pub fn clear_module(&self, member: &str) {
        self.of(member).0.clear_module();
    }

    /// Everything behaves from now on.
    pub fn clear_all(&self) {
        for (faulty, label) in self.0.values() {
            faulty.clear(label);
            faulty.clear_module();
        }
    }

    /// What a member's token was asked.
    #[must_use]
    pub fn stats(&self, member: &str) -> Stats {
        let (faulty, label) = self.of(member);
        faulty.stats(label)
    }

    /// What a member's module was asked.
    #[must_use]
    pub fn module_stats(&self, member: &str) -> Stats {
        self.of(member).0.module_stats()
    }

    /// Waits until a member's token has counted what is wanted.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn until(&self, member: &str, what: &str, wanted: impl Fn(&Stats) -> bool) -> Stats {
        until(what, || Some(self.stats(member)).filter(|stats| wanted(stats)))
    }
}
