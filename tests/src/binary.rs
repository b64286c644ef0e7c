//! The program under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The `claviger` binary: that of `CLAVIGER_BIN`, or the workspace's, built now with the profile of this test.
///
/// # Panics
/// When it does not build.
pub fn claviger() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("CLAVIGER_BIN") {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    // …/target/debug/deps/test-0123
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap();
    let target = folder.parent().unwrap();
    let profile = match folder.file_name().and_then(OsStr::to_str).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        // With the tests' package beside it the dependencies have the features that they have here: nothing is built twice.
        .args(["build", "--quiet", "--package", "claviger", "--package", "claviger-tests", "--bin", "claviger"])
        .args(["--profile", profile, "--target-dir"])
        .arg(target)
        .output()
        .unwrap();
    assert!(built.status.success(), "claviger does not build:\n{}", String::from_utf8_lossy(&built.stderr));
    folder.join("claviger")
}

/// Runs `claviger` with these arguments to its end.
///
/// # Panics
/// When it cannot be run at all.
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(claviger()).args(arguments).output().unwrap()
}
