//! Builds and finds the worker program, `examples/worker.rs`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// Returns the path of the program. `cargo test` builds it with all targets of the crate, but `cargo test --test NAME` does
/// not. So it is built here if it is missing or older than the crate.
pub(crate) fn worker() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // The path is …/target/debug/deps/test-0123.
        let test = std::env::current_exe().unwrap();
        let folder = test.parent().unwrap().parent().unwrap();
        let program = folder.join("examples/worker");
        let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let sources = ["src", "examples", "Cargo.toml"].map(|part| newest(&crate_folder.join(part)));
        let built = fs::metadata(&program).and_then(|file| file.modified()).ok();
        if built < sources.into_iter().max() {
            build(folder);
        }
        assert!(program.exists(), "{} is missing", program.display());
        program
    })
}

fn newest(path: &Path) -> SystemTime {
    let below = fs::read_dir(path).into_iter().flatten().map(|entry| newest(&entry.unwrap().path()));
    below.chain([fs::metadata(path).unwrap().modified().unwrap()]).max().unwrap()
}

fn build(folder: &Path) {
    let profile = match folder.file_name().and_then(OsStr::to_str).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Variables that cargo sets for this test's own package must not reach the build, or build scripts run again.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    let built = command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "build",
            "--quiet",
            "--package",
            "claviger-hsm",
            "--example",
            "worker",
            "--profile",
            profile,
            "--target-dir",
        ])
        .arg(folder.parent().unwrap())
        .output()
        .unwrap();
    assert!(built.status.success(), "the worker does not build:\n{}", String::from_utf8_lossy(&built.stderr));
}
