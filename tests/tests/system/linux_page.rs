//! docs/linux.md, command for command: from nothing to a machine whose virtual TPM runs.

use std::fs;
use std::path::Path;
use std::process::Command;

use claviger_tests::qemu::qemu_img;
use claviger_tests::tpm::maker;
use claviger_tests::{Lab, Options, block, claviger, metadata, said, tool};

/// The commands of a page: its blocks of `sh`.
fn commands(page: &str) -> String {
    page.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect()
}

/// Waits for a socket of a program in the background, and for the firmware that looks for something to boot; ends the programs with the shell.
const PROLOGUE: &str = "set -euo pipefail\n\
    trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n\
    boots() { for i in $(seq 1800); do if grep -q BdsDxe \"$1\"; then return; fi; sleep 0.1; done; echo \"no boot\"; exit 9; }\n\
    ready() { for i in $(seq 600); do if [ -S \"$1\" ]; then return; fi; sleep 0.1; done; echo \"no $1\"; exit 9; }\n";

#[test]
fn every_command_of_the_page_does_what_it_says() {
    let (daemon, lab) = Lab::start(Options::default());
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/linux.md")).unwrap();
    let guardian = block(metadata(&daemon.client()));
    let pin = ring::digest::digest(&ring::digest::SHA256, &guardian.guardian.signing_certificate);
    let setup = maker(lab.path());
    let path = |name: &str| lab.file(name).display().to_string();
    let agent = "--agent /run/claviger-host/agent.sock";
    let mut script = commands(&page);
    // The test's places instead of a host's. Each is in the page.
    for (told, here) in [
        (" --ca /etc/claviger-host/ca.pem", String::new()),
        ("https://hgs.example", daemon.url.clone()),
        ("http://hgs.example:8080", daemon.url.clone()),
        ("5f1c…", data_encoding::HEXLOWER.encode(pin.as_ref())),
        ("--tpm-state", format!("--tpm-setup {} --tpm-state", setup.display())),
        (agent, format!("{agent} --seen {}", path("seen"))),
        (" -accel kvm -m 2048", " -m 256".to_owned()),
        ("web-1.qcow2 &\n", format!("web-1.qcow2 &\nboots {}\n", path("run/web-1.console"))),
        ("/var/lib/claviger-host", path("node-17")),
        ("agent.sock --dir", "agent.sock --metrics 127.0.0.1:0 --dir".to_owned()),
        ("--terminate &\n", "--terminate &\nready /run/claviger-host/web-1.tpm.sock\n".to_owned()),
        ("/run/claviger-host", path("run")),
    ] {
        assert!(script.contains(told), "{told} is not in the page any more");
        script = script.replace(told, &here);
    }
    let agent_line = script.lines().find(|line| line.starts_with("claviger host agent ")).unwrap().to_owned();
    script = script.replace(&agent_line, &format!("{agent_line}\nready {}", path("run/agent.sock")));
    fs::create_dir(lab.file("owner")).unwrap();
    let qemu_img = qemu_img(&lab.file("."));
    let folders = [qemu_img.parent(), claviger().parent()].map(|folder| folder.unwrap().display().to_string());
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("{PROLOGUE}{script}")).current_dir(lab.file("owner"));
    shell
        .env("PATH", format!("{}:{}", folders.join(":"), std::env::var("PATH").unwrap()))
        .env("CLAVIGER_CONFIG", lab.config_file());
    let ran = tool("bash swtpm swtpm-tools qemu-system-x86 qemu-utils ovmf", &mut shell);
    let said = said(&ran);
    assert!(ran.status.success(), "{said}\n--- of ---\n{script}");
    for expected in [
        "made host key",
        "listening on",
        "web-1.vault is made, generation 1",
        "has the secret disk-key now, generation 2",
        "web-1.vault is open, generation 3",
        "web-1.vault is open, generation 5",
        "\n64\n",
        "generation  6",
        "has a fresh key, generation 7",
        "web-1.vault opens, generation 7; its secrets:\n  disk-key\n  state-key",
    ] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
}
