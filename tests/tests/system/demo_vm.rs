//! `make demo-vm`, up to the end of the first boot: a real machine, with a signed kernel and a virtual TPM that a released key
//! opened. docs/linux.md has a tape of the whole, which is compared as far as it goes.

use std::fs;
use std::path::Path;
use std::process::Command;

use claviger_tests::{claviger, said, tool};

const PACKAGES: &str = "swtpm swtpm-tools tpm2-tools qemu-system-x86 ovmf sbsigntool systemd-boot-efi busybox-static";

/// A line without what is different each time: numbers in hexadecimal digits, times, ports.
fn lasting(line: &str) -> String {
    let word = |word: &str| {
        let digits = word.bytes().filter(u8::is_ascii_hexdigit).count();
        let volatile = word.contains(':') || digits >= 8 && word.bytes().any(|byte| byte.is_ascii_digit());
        if volatile { "…".to_owned() } else { word.to_owned() }
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_machine_boots_with_the_virtual_tpm_that_its_vault_opened() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::Builder::new().prefix("claviger-demo-vm-").tempdir().unwrap();
    // The kernel is downloaded once.
    let kernel = Path::new(env!("CARGO_TARGET_TMPDIR")).join("demo-vm.vmlinuz");
    let mut command = Command::new(here.join("demo-vm/run"));
    command.arg("--short").arg("--dir").arg(folder.path()).arg("--kernel").arg(kernel).env("CLAVIGER", claviger());
    let output = tool(PACKAGES, &mut command);
    let text = said(&output);
    assert!(output.status.success(), "{text}");

    let page = fs::read_to_string(here.join("../docs/linux.md")).unwrap();
    let (_, tape) = page.split_once("$ make demo-vm\n").unwrap();
    let (tape, _) = tape.split_once("\n== Second start").unwrap();
    let told: Vec<_> = text.lines().map(lasting).collect();
    // The seconds of a boot, and what another version of swtpm says in another way.
    let other = |line: &&str| ["    (", "    swtpm:", "    libtpms"].iter().any(|start| line.starts_with(start));
    for line in tape.lines().filter(|line| !other(line)).map(lasting) {
        assert!(told.contains(&line), "the tape has {line:?}, which is not in\n{text}");
    }
    assert!(tape.lines().count() > 30);
    // The secrets of the vault are in no file of it all, and neither is that of the machine.
    let secret = text.lines().find_map(|line| line.trim().strip_prefix("the virtual TPM gives the secret ")).unwrap();
    let found = tool("grep", Command::new("grep").arg("-rlaF").arg(secret).arg(folder.path()));
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(found.lines().all(|file| file.ends_with("/run/console") || file.ends_with("/run/said")), "{found}");
}
