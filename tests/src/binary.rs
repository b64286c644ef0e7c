//! Paths and builds of the programs under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use claviger_hsm::WorkerProgram;

/// Returns the path of the `claviger` binary: that of `CLAVIGER_BIN`, or the workspace's, built now with the profile of
/// this test.
///
/// # Panics
/// If the build fails.
pub fn claviger() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| std::env::var_os("CLAVIGER_BIN").map_or_else(|| build("claviger"), PathBuf::from))
}

/// Returns the program that a cluster in a test or bench runs as worker.
#[must_use]
pub fn worker() -> WorkerProgram {
    WorkerProgram { path: claviger().to_owned(), arguments: vec!["hsm-worker".into()], hidden: Vec::new() }
}

/// Returns the path of the `claviger-loadgen` binary: that of `CLAVIGER_LOADGEN_BIN`, or the workspace's, built now with
/// the profile of this test.
///
/// # Panics
/// If the build fails.
pub fn loadgen() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let build = || build("claviger-loadgen");
    BINARY.get_or_init(|| std::env::var_os("CLAVIGER_LOADGEN_BIN").map_or_else(build, PathBuf::from))
}

/// Variables that cargo sets for the programs it runs.
const ABOUT_THE_TEST: [&str; 5] =
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_NAME", "CARGO_BIN_", "CARGO_PRIMARY_PACKAGE"];

/// Builds the binary that has the same name as its package.
fn build(name: &str) -> PathBuf {
    // The path is …/target/debug/deps/test-0123, or a program one directory above.
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap();
    let folder = if folder.ends_with("deps") { folder.parent().unwrap() } else { folder };
    let target = folder.parent().unwrap();
    let profile = match folder.file_name().and_then(OsStr::to_str).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // Variables that cargo sets for this test's own package must not reach the build. Otherwise build scripts would see a
    // different environment than in a shell, and each build would rebuild everything that depends on them.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| ABOUT_THE_TEST.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(name);
        }
    }
    let built = command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        // With the tests' package in the same build, dependencies get the same features as here, so nothing is built twice.
        .args(["build", "--quiet", "--package", name, "--package", "claviger-tests", "--bin", name])
        .args(["--profile", profile, "--target-dir"])
        .arg(target)
        .output()
        .unwrap();
    assert!(built.status.success(), "{name} does not build:\n{}", String::from_utf8_lossy(&built.stderr));
    folder.join(name)
}

/// Runs `claviger` with these arguments until it ends.
///
/// # Panics
/// If it cannot be started.
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(claviger()).args(arguments).output().unwrap()
}
