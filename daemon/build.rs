//! Says which commit is built: that of `CLAVIGER_COMMIT` where it is set, or else that of the repository, if there is one.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=CLAVIGER_COMMIT");
    println!("cargo::rerun-if-changed=build.rs");
    let commit = std::env::var("CLAVIGER_COMMIT").ok().or_else(commit).unwrap_or_default();
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = if commit.is_empty() { version } else { format!("{version} ({commit})") };
    println!("cargo::rustc-env=CLAVIGER_COMMIT={commit}");
    println!("cargo::rustc-env=CLAVIGER_VERSION={version}");
}

/// `None` without git, and in an unpacked archive, which may lie in a repository of something else.
fn commit() -> Option<String> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()? != own.canonicalize().ok()? {
        return None;
    }
    // The log of HEAD grows with every commit and checkout.
    let log = own.join("daemon").join(git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    if log.exists() {
        println!("cargo::rerun-if-changed={}", log.display());
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
