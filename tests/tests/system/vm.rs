//! The vault of a virtual machine: `claviger host vm …` against a real daemon on a soft token.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use claviger_client::vault::file;
use claviger_client::vault::secrets::Secrets;
use claviger_tests::tpm::maker;
use claviger_tests::{Daemon, Lab, Options, Process, block, claviger, metadata, said, tool, until};
use serde_json::Value;

/// A host with one vault, in a lab that is served.
struct Vm {
    lab: Lab,
    daemon: Daemon,
    vault: PathBuf,
}

impl Vm {
    fn start() -> Self {
        let (daemon, lab) = Lab::start(Options::default());
        let vault = lab.file("vm.vault");
        Self { lab, daemon, vault }
    }

    /// A command that asks the service. `after` comes last.
    fn command(&self, name: &str, before: &[&str], after: &[&str]) -> Command {
        let mut command = Command::new(claviger());
        command.args(["host", "vm", name]).args(before);
        command.args(["--url", &self.daemon.url, "--dir"]).arg(self.lab.file("host"));
        if !after.contains(&"--seen") {
            command.arg("--seen").arg(self.lab.file("seen"));
        }
        command.args(after);
        command
    }

    fn run(&self, name: &str, before: &[&str], after: &[&str]) -> Output {
        self.command(name, before, after).output().unwrap()
    }

    fn done(&self, name: &str, before: &[&str], after: &[&str]) -> Output {
        let output = self.run(name, before, after);
        assert!(output.status.success(), "{name}: {}", said(&output));
        output
    }

    fn refused(&self, name: &str, before: &[&str], after: &[&str]) -> String {
        let before_it = fs::read(&self.vault).unwrap();
        let output = self.run(name, before, after);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", said(&output));
        assert!(fs::read(&self.vault).unwrap() == before_it, "{name} refused, and changed the vault");
        said(&output)
    }

    fn create(&self, options: &[&str]) {
        let protector = self.protector();
        let before = ["--protector", text(&protector), "--vault", text(&self.vault)];
        self.done("create", &[&before, options].concat(), &[]);
    }

    fn protector(&self) -> PathBuf {
        self.lab.file("tenant/vm-0001.protector.xml")
    }

    /// What `open` hands to a program for this secret.
    fn opened(&self, name: &str) -> Vec<u8> {
        let read = format!("cat /dev/fd/{{{name}}}");
        self.done("open", &[text(&self.vault)], &["--", "sh", "-c", &read]).stdout
    }

    /// What the owner finds in the vault, with nobody's help; and its generation.
    fn recovered(&self) -> (Secrets, u64) {
        let vault = file::read(&self.vault).unwrap();
        (vault.open(&self.lab.owner().open(&vault.protector).unwrap()).unwrap(), vault.generation)
    }

    fn shown(&self) -> Value {
        let output = Command::new(claviger()).args(["host", "vm", "show", "--json"]).arg(&self.vault).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_vault_is_made_and_moves_to_a_fresh_key_at_every_start() {
    let vm = Vm::start();
    let vault = text(&vm.vault);
    vm.create(&[]);
    assert_eq!(mode(&vm.vault), 0o600);
    let first = vm.shown();
    assert_eq!(first["generation"], 1);
    let state_key = vm.opened("state-key");
    assert_eq!(state_key.len(), 64);
    assert!(state_key.iter().all(u8::is_ascii_hexdigit));
    let old_copy = fs::read(&vm.vault).unwrap();
    assert_eq!(vm.opened("state-key"), state_key, "the state is never encrypted anew");
    let third = vm.shown();
    assert_eq!((&third["generation"], &third["id"]), (&Value::from(3), &first["id"]));
    assert_ne!(third["protector_sha256"], first["protector_sha256"]);
    assert_eq!(vm.recovered().0.get("state-key").unwrap(), state_key);
    // Nothing of the key is in any file.
    let found = tool(
        "grep",
        Command::new("grep").arg("-rlaF").arg(String::from_utf8(state_key.clone()).unwrap()).arg(vm.lab.path()),
    );
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");

    // To a descriptor that the caller gave.
    let mut shell = Command::new("bash");
    let script = format!(
        "set -o pipefail; {} host vm open {vault} --url {} --dir {} --seen {} --give state-key=3 3>&1 >/dev/null | cat",
        text(claviger()),
        vm.daemon.url,
        text(&vm.lab.file("host")),
        text(&vm.lab.file("seen"))
    );
    let piped = tool("bash", shell.args(["-c", &script]));
    assert!(piped.status.success() && piped.stdout == state_key, "{}", said(&piped));

    // An old copy does not pass for the vault, unless that is said.
    let present = fs::read(&vm.vault).unwrap();
    fs::write(&vm.vault, &old_copy).unwrap();
    let refused = vm.refused("open", &[vault], &["--", "true"]);
    assert!(refused.contains("old copy") && refused.contains("--accept-older"), "{refused}");
    vm.done("open", &[vault, "--accept-older"], &["--", "true"]);
    // From then on, what was the present vault is the old one: nothing passes for the successor of the copy.
    fs::write(&vm.vault, &present).unwrap();
    let refused = vm.refused("open", &[vault], &["--", "true"]);
    assert!(refused.contains("old copy"), "{refused}");
    vm.done("open", &[vault, "--accept-older"], &["--", "true"]);
    assert_eq!(vm.recovered().0.get("state-key").unwrap(), state_key);

    // A program that is not there: the machine is none the worse.
    let missing = vm.run("open", &[vault], &["--", "/no/such/program", "{state-key}"]);
    assert!(said(&missing).contains("/no/such/program cannot be started"), "{}", said(&missing));
    // Without anything to do with the secrets.
    assert_eq!(vm.run("open", &[vault], &[]).status.code(), Some(2));
    // One byte: it says that the vault was changed.
    let mut changed = present;
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&vm.vault, changed).unwrap();
    let refused = vm.refused("open", &[vault, "--accept-older"], &["--", "true"]);
    assert!(refused.contains("it was changed; take it from a backup"), "{refused}");
}

#[test]
fn secrets_are_added_and_the_vault_moves_to_another_protector() {
    let vm = Vm::start();
    let vault = text(&vm.vault);
    // With the protector's own key nobody is asked.
    let owner = vm.lab.owner();
    let key = vm.lab.file("vm.key");
    fs::write(&key, &owner.open(&vm.lab.protector()).unwrap()[..]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let before = vm.lab.audit().len();
    let protector = vm.protector();
    let mut offline = Command::new(claviger());
    offline.args(["host", "vm", "create", "--protector", text(&protector), "--vault", vault, "--key", text(&key)]);
    let made = offline.arg("--seen").arg(vm.lab.file("seen")).output().unwrap();
    assert!(made.status.success(), "{}", said(&made));
    assert_eq!(vm.lab.audit().len(), before);
    assert!(file::read(&vm.vault).unwrap().protector == vm.lab.protector());
    // It is not written over.
    assert!(said(&offline.output().unwrap()).contains("is there already"));

    vm.done("add-secret", &[vault, "disk-key", "--random", "64"], &[]);
    assert_eq!(vm.opened("disk-key").len(), 64);
    let refused = vm.refused("add-secret", &[vault, "disk-key", "--random", "64"], &[]);
    assert!(refused.contains("has a secret disk-key already"), "{refused}");
    let refused = vm.refused("add-secret", &[vault, "Disk", "--random", "64"], &[]);
    assert!(refused.contains("no name of a secret"), "{refused}");
    let refused = vm.refused("open", &[vault], &["--", "true", "{no-such}"]);
    assert!(refused.contains("no secret no-such; it has: disk-key, state-key"), "{refused}");
    let from = vm.lab.file("password");
    fs::write(&from, "word\n").unwrap();
    let refused = vm.refused("add-secret", &[vault, "password", "--from", text(&from)], &[]);
    assert!(refused.contains("chmod 600"), "{refused}");
    fs::set_permissions(&from, fs::Permissions::from_mode(0o600)).unwrap();
    vm.done("add-secret", &[vault, "password", "--from", text(&from)], &[]);
    assert_eq!(vm.opened("password"), b"word\n");
    vm.done("add-secret", &[vault, "password", "--random", "16", "--hex", "--replace"], &[]);
    assert_eq!(vm.opened("password").len(), 32);

    let secrets = vm.recovered().0;
    let generation = vm.shown()["generation"].as_u64().unwrap();
    vm.done("rekey", &[vault], &[]);
    assert_eq!(vm.recovered(), (secrets.clone(), generation + 1));
    let guardian = block(metadata(&vm.daemon.client()));
    let (file, other_key) = owner.create(std::slice::from_ref(&guardian)).unwrap();
    let [other, other_key_file, moved] = ["other.xml", "other.key", "moved.vault"].map(|name| vm.lab.file(name));
    fs::write(&other, &file).unwrap();
    vm.done("rekey", &[vault, "--protector", text(&other)], &[]);
    assert_eq!(vm.recovered(), (secrets.clone(), generation + 2));
    assert_eq!(vm.opened("password"), secrets.get("password").unwrap());

    // The owner, with the service gone.
    drop(vm.daemon);
    let recover = |options: &[&str]| {
        let mut command = Command::new(claviger());
        command.args(["host", "vm", "recover", vault, "--json", "--owner"]).arg(vm.lab.file("tenant")).args(options);
        command.output().unwrap()
    };
    let told = recover(&[]);
    let report: Value = serde_json::from_slice(&told.stdout).unwrap_or_else(|_| panic!("{}", said(&told)));
    assert_eq!(report["secrets"], serde_json::json!(["disk-key", "password", "state-key"]));
    fs::write(&other_key_file, &other_key[..]).unwrap();
    fs::set_permissions(&other_key_file, fs::Permissions::from_mode(0o600)).unwrap();
    let target = ["--protector", text(&other), "--key", text(&other_key_file), "--out", text(&moved)];
    let sealed = recover(&target);
    assert!(sealed.status.success(), "{}", said(&sealed));
    assert_eq!(file::read(&moved).unwrap().open(&other_key).unwrap(), secrets);
    assert!(said(&recover(&target)).contains("is there already"));
    let wrong = ["--protector", text(&protector), "--key", text(&other_key_file), "--out", "x"];
    assert!(said(&recover(&wrong)).contains("is not the key of"));
}

#[test]
fn the_vault_of_one_machine_does_not_pass_for_that_of_another() {
    let vm = Vm::start();
    vm.create(&["--machine", "web-1"]);
    assert_eq!(vm.shown()["machine"], "web-1");
    let vault = text(&vm.vault);
    let refused = vm.refused("open", &[vault], &["--", "true"]);
    assert!(refused.contains("it is the vault of the machine web-1, not of vm"), "{refused}");
    for (command, arguments) in [("rekey", &[][..]), ("add-secret", &["disk-key", "--random", "8"])] {
        let refused = vm.refused(command, &[&[vault], arguments].concat(), &[]);
        assert!(refused.contains("use --machine web-1"), "{refused}");
    }
    vm.done("open", &[vault, "--machine", "web-1"], &["--", "true"]);
    // The name is in the header, and part of what is sealed.
    let mut renamed = fs::read(&vm.vault).unwrap();
    assert_eq!(&renamed[112..117], b"web-1");
    renamed[116] = b'2';
    fs::write(&vm.vault, &renamed).unwrap();
    let refused = vm.refused("open", &[vault, "--accept-older", "--machine", "web-2"], &["--", "true"]);
    assert!(refused.contains("it was changed"), "{refused}");
    let wrong =
        vm.run("create", &["--protector", text(&vm.protector()), "--vault", text(&vm.lab.file("a b.vault"))], &[]);
    assert!(
        said(&wrong).contains("\"a b\" is no name of a machine") && said(&wrong).contains("--machine NAME"),
        "{}",
        said(&wrong)
    );
}

#[test]
fn two_copies_that_were_both_opened_are_told_apart_and_their_owner_joins_them() {
    let vm = Vm::start();
    let vault = text(&vm.vault);
    vm.create(&[]);
    let state_key = vm.recovered().0;
    // Another host, which has a copy.
    fs::create_dir(vm.lab.file("elsewhere")).unwrap();
    let [copy, seen] = ["elsewhere/vm.vault", "elsewhere/seen"].map(|name| vm.lab.file(name));
    fs::copy(&vm.vault, &copy).unwrap();
    vm.done("add-secret", &[vault, "disk-key", "--random", "8"], &[]);
    vm.done("add-secret", &[vault, "here", "--random", "8"], &[]);
    for (name, generation) in [("disk-key", 2), ("there", 3)] {
        vm.done("add-secret", &[text(&copy), name, "--random", "8"], &["--seen", text(&seen)]);
        assert_eq!(file::read(&copy).unwrap().generation, generation);
    }
    // It has the generation of the present vault, and is not the present vault.
    let present = fs::read(&vm.vault).unwrap();
    fs::copy(&copy, &vm.vault).unwrap();
    let refused = vm.refused("open", &[vault], &["--", "true"]);
    assert!(refused.contains("two copies of an older vault were both opened"), "{refused}");
    fs::write(&vm.vault, &present).unwrap();
    vm.done("open", &[vault], &["--", "true"]);

    // The owner brings them together, with another protector.
    let owner = vm.lab.owner();
    let [protector, key, joined] = ["new.xml", "new.key", "joined.vault"].map(|name| vm.lab.file(name));
    let (bytes, transport_key) = owner.create(&[block(metadata(&vm.daemon.client()))]).unwrap();
    fs::write(&protector, bytes).unwrap();
    fs::write(&key, &transport_key[..]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let recover = |also: &Path| {
        let mut command = Command::new(claviger());
        command.args(["host", "vm", "recover", vault, "--also", text(also), "--owner"]).arg(vm.lab.file("tenant"));
        command.args(["--protector", text(&protector), "--key", text(&key), "--out", text(&joined)]);
        command.output().unwrap()
    };
    let told = recover(&copy);
    assert!(told.status.success(), "{}", said(&told));
    assert!(said(&told).contains("both have a secret disk-key, and not the same"), "{}", said(&told));
    let ours = vm.recovered().0;
    fs::rename(&joined, &vm.vault).unwrap();
    // Newer than both: it opens at once, on both hosts.
    assert_eq!(vm.opened("disk-key"), ours.get("disk-key").unwrap());
    let (both, generation) = vm.recovered();
    assert_eq!(both.names().collect::<Vec<_>>(), ["disk-key", "here", "state-key", "there"]);
    assert_eq!(both.get("state-key"), state_key.get("state-key"));
    assert_eq!(generation, 6);
    fs::copy(&vm.vault, &copy).unwrap();
    vm.done("open", &[text(&copy)], &["--seen", text(&seen), "--", "true"]);
    // The vault of another machine is no copy.
    let other = vm.lab.file("other.vault");
    vm.done("create", &["--protector", text(&protector), "--vault", text(&other)], &[]);
    assert!(
        said(&recover(&other)).contains("is the vault of the machine other, and no copy of"),
        "{}",
        said(&recover(&other))
    );
}

/// The virtual TPM of a vault, as long as the value is there.
struct Vtpm {
    socket: PathBuf,
    _process: Process,
}

impl Vtpm {
    fn start(vm: &Vm, state: &Path) -> Self {
        let [socket, control] = ["vtpm", "vtpm.ctrl"].map(|name| vm.lab.file(name));
        let _ = fs::remove_file(&socket);
        let program = [
            "--",
            "swtpm",
            "socket",
            "--tpm2",
            "--flags",
            "not-need-init,startup-clear",
            "--tpmstate",
            &format!("dir={}", text(state)),
            "--key",
            "fd={state-key},mode=aes-256-cbc",
            "--server",
            &format!("type=unixio,path={}", text(&socket)),
            "--ctrl",
            &format!("type=unixio,path={}", text(&control)),
        ];
        let process = Process::start(&mut vm.command("open", &[text(&vm.vault)], &program));
        until("a virtual TPM", || socket.exists().then_some(()));
        Self { socket, _process: process }
    }

    fn tool(&self, arguments: &[&str]) -> Output {
        let (name, arguments) = arguments.split_first().unwrap();
        let mut command = Command::new(name);
        command.env("TPM2TOOLS_TCTI", format!("swtpm:path={}", text(&self.socket)));
        let output = tool("tpm2-tools", command.args(arguments));
        assert!(output.status.success(), "{name}: {}", said(&output));
        output
    }
}

#[test]
fn the_state_of_a_virtual_tpm_opens_with_its_vault_alone() {
    let vm = Vm::start();
    let (setup, state) = (maker(vm.lab.path()), vm.lab.file("vtpm.state"));
    vm.create(&["--tpm-state", text(&state), "--tpm-setup", text(&setup)]);
    assert_eq!(mode(&state), 0o700);
    let index = "0x1500016";
    {
        let tpm = Vtpm::start(&vm, &state);
        // The endorsement certificate is its maker's.
        let certificate = tpm.tool(&["tpm2_nvread", "0x1c00002"]).stdout;
        let file = vm.lab.file("ek.der");
        fs::write(&file, certificate).unwrap();
        let mut issuer = Command::new("openssl");
        issuer.args(["x509", "-inform", "DER", "-noout", "-issuer", "-in"]).arg(&file);
        let issuer = tool("openssl", &mut issuer);
        assert!(said(&issuer).contains("swtpm-localca"), "{}", said(&issuer));
        tpm.tool(&["tpm2_nvdefine", index, "-s", "5"]);
        let input = vm.lab.file("input");
        fs::write(&input, "hello").unwrap();
        tpm.tool(&["tpm2_nvwrite", index, "-i", text(&input)]);
    }
    // The second start has another transport key, and the same TPM.
    {
        let tpm = Vtpm::start(&vm, &state);
        assert_eq!(tpm.tool(&["tpm2_nvread", index]).stdout, b"hello");
    }
    // Another machine's vault does not open it.
    let other = vm.lab.file("other.vault");
    let protector = vm.protector();
    vm.done("create", &["--protector", text(&protector), "--vault", text(&other)], &[]);
    let program = ["--", "swtpm", "socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--key"];
    let mut program = program.to_vec();
    let dir = format!("dir={}", text(&state));
    let server = format!("type=unixio,path={}", text(&vm.lab.file("vtpm.other")));
    program.extend(["fd={state-key},mode=aes-256-cbc", "--tpmstate", &dir, "--server", &server]);
    let refused = vm.run("open", &[text(&other)], &program);
    assert!(!refused.status.success(), "{}", said(&refused));

    // A state without a maker: nothing is left behind.
    let [none, broken] = ["none.vault", "none.conf"].map(|name| vm.lab.file(name));
    fs::write(&broken, "create_certs_tool=/bin/false\n").unwrap();
    let folder = vm.lab.file("none.state");
    let failed = vm.run(
        "create",
        &[
            "--protector",
            text(&protector),
            "--vault",
            text(&none),
            "--tpm-state",
            text(&folder),
            "--tpm-setup",
            text(&broken),
        ],
        &[],
    );
    assert!(said(&failed).contains("swtpm_setup made no virtual TPM"), "{}", said(&failed));
    assert!(!none.exists() && !folder.exists());
}

/// Number of starts that are killed, if CLAVIGER_STARTS does not say another one.
const STARTS: usize = 100;

#[test]
fn no_machine_is_lost_when_its_start_is_killed_at_any_moment() {
    let vm = Vm::start();
    vm.create(&[]);
    let secrets = vm.recovered().0;
    let start = || {
        let mut command = vm.command("open", &[text(&vm.vault)], &["--", "true"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let begun = Instant::now();
    for _ in 0..4 {
        assert!(start().wait().unwrap().success());
    }
    let usual = begun.elapsed() / 4;
    let (mut before, mut after, mut finished) = (0, 0, 0);
    let mut generation = vm.recovered().1;
    let starts = std::env::var("CLAVIGER_STARTS").map_or(STARTS, |number| number.parse().unwrap());
    for round in 0..starts {
        let mut child = start();
        let delay = usual.mul_f64(1.3 * fraction(round));
        if round % 2 == 0 {
            std::thread::sleep(delay);
        } else {
            // As soon as the successor's draft is there: in the middle of write, fsync, rename and fsync.
            let until = Instant::now() + 4 * usual;
            while drafts(&vm.lab) == 0 && Instant::now() < until && child.try_wait().unwrap().is_none() {}
            std::thread::sleep(Duration::from_micros((3000.0 * fraction(round)) as u64));
        }
        let _ = child.kill();
        let ended = child.wait().unwrap();
        let (now, new) = vm.recovered();
        assert_eq!(now, secrets, "start {round}");
        assert!(new == generation || new == generation + 1, "start {round}: {generation} became {new}");
        match (ended.success(), new == generation) {
            (true, _) => finished += 1,
            (false, true) => before += 1,
            (false, false) => after += 1,
        }
        generation = new;
        remove_drafts(&vm.lab);
    }
    // Both sides of the rename were hit.
    assert!(
        before > starts / 25 && after > 0,
        "killed {before} before, {after} after the exchange; {finished} finished"
    );
    assert_eq!(vm.opened("state-key"), secrets.get("state-key").unwrap());
}

/// System calls that change or force files, and those around them. Random numbers, memory and the network are none of them.
const CALLS: &str = "openat,write,fsync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,flock,pipe2,execve";

#[test]
fn no_machine_is_lost_when_its_start_is_killed_at_any_system_call() {
    let vm = Vm::start();
    vm.create(&[]);
    let secrets = vm.recovered().0;
    let start = |call: &str, number: usize| {
        let open = vm.command("open", &[text(&vm.vault)], &["--", "cat", "/dev/fd/{state-key}"]);
        let mut traced = Command::new("strace");
        traced.args(["--follow-forks", "--quiet=all", "--output", "/dev/null", "--trace", call]);
        traced.args(["--inject", &format!("{call}:signal=KILL:when={number}")]);
        traced.arg("--").arg(open.get_program()).args(open.get_args());
        tool("strace", &mut traced)
    };
    // A call that is killed has not been made. Each thread counts for itself.
    let (mut killed, mut exchanged) = (0, 0);
    for call in CALLS.split(',') {
        for number in 1.. {
            let before = vm.recovered().1;
            let ended = start(call, number);
            let (now, after) = vm.recovered();
            assert_eq!(now, secrets, "{call} {number}");
            assert!(after == before || after == before + 1, "{call} {number}: {before} became {after}");
            // A secret comes out only after the vault was exchanged.
            assert!(ended.stdout.is_empty() || after == before + 1, "{call} {number}: too early");
            remove_drafts(&vm.lab);
            if ended.status.success() {
                assert_eq!(ended.stdout, secrets.get("state-key").unwrap());
                break;
            }
            killed += 1;
            exchanged += after - before;
        }
    }
    assert!(killed > 60 && (3..killed).contains(&exchanged), "{killed} kills, {exchanged} of them after the exchange");
    assert_eq!(vm.opened("state-key"), secrets.get("state-key").unwrap());
}

/// Numbers from 0 to 1 that fill the range evenly, whatever their count.
fn fraction(round: usize) -> f64 {
    (round as f64 * 0.618_033_988_749_895).fract()
}

fn draft_files(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.path()).unwrap();
    let draft = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(".vm.vault.");
    entries.map(|entry| entry.unwrap().path()).filter(draft).collect()
}

fn drafts(lab: &Lab) -> usize {
    draft_files(lab).len()
}

fn remove_drafts(lab: &Lab) {
    draft_files(lab).iter().for_each(|path| fs::remove_file(path).unwrap());
}
