//! Tests of `claviger init`: from nothing to a first release, step by step, and again without harm.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger_tests::{Daemon, block, claviger, said, tool};
use serde_json::Value;
use tempfile::TempDir;

/// A machine on which nothing is set up, as far as a folder can be one.
struct Machine {
    folder: TempDir,
}

impl Machine {
    fn new() -> Self {
        Self { folder: tempfile::Builder::new().prefix("claviger-").tempdir().unwrap() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a command line of claviger in the folder.
    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(claviger());
        command.args(line.split_whitespace()).current_dir(self.folder.path());
        command.env("CLAVIGER_CONFIG", self.file("etc/claviger.toml")).env_remove("CLAVIGER_SOCKET");
        command.env("SOFTHSM2_CONF", self.file("softhsm2.conf")).output().unwrap()
    }

    fn done(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", said(&output));
        said(&output)
    }

    fn refused(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(!output.status.success(), "{line}: {}", said(&output));
        said(&output)
    }

    fn serve(&self) -> Daemon {
        Daemon::serve(&self.file("etc/claviger.toml"))
    }
}

const PORTS: &str = "--state state --listen 127.0.0.1:0 --metrics 127.0.0.1:0";

#[test]
fn from_the_binary_to_the_first_release_it_takes_eleven_commands() {
    let machine = Machine::new();
    let mut commands = 0;
    let mut done = |line: &str| {
        commands += 1;
        machine.done(line)
    };
    let said = done(&format!("init --soft-tokens 2 --certificates lab --bits 2048 {PORTS}"));
    assert!(
        said.contains("made      2 soft tokens") && said.contains("next      start the service: claviger serve"),
        "{said}"
    );
    // The answer that was given is in the command that continues.
    assert!(said.lines().any(|line| line.contains("init") && line.ends_with("--certificates lab")), "{said}");
    let daemon = machine.serve();
    let said = done("init --certificates lab --bits 2048");
    assert!(said.contains("added     signing certificate") && said.contains("ready     keys are released"), "{said}");
    let url = daemon.url.clone();
    block(daemon.until_ready_is(200));

    done("host new-key --dir host --bits 2048");
    done("hosts add node --public-key host/hostkey.pub.pem");
    done("guardian new acme --name Acme");
    let keys: Value = serde_json::from_slice(&machine.run("keys list --json").stdout).unwrap();
    let signing = keys.as_array().unwrap().iter().find(|key| key["kind"] == "signing").unwrap();
    commands += 1;
    let mut done = |line: &str| {
        commands += 1;
        machine.done(line)
    };
    done(&format!("guardian import hgs --url {url} --pin {}", signing["thumbprint"].as_str().unwrap()));
    done("protector new --owner acme --guardian hgs --out vm.xml --key vm.key");
    done(&format!("host unwrap --dir host --protector vm.xml --egress next.xml --key-file keys --url {url}"));
    // The start of the daemon is one more.
    commands += 1;
    assert_eq!(commands, 10);
    let (keys, key) = (std::fs::read(machine.file("keys")).unwrap(), std::fs::read(machine.file("vm.key")).unwrap());
    assert_eq!((keys.len(), &keys[..32]), (64, &key[..]));

    // Again: nothing is changed.
    let before = std::fs::read(machine.file("etc/claviger.toml")).unwrap();
    let said = machine.done("init --certificates lab");
    assert!(
        said.contains("kept      signing certificate") && said.contains("kept      encryption certificate"),
        "{said}"
    );
    assert!(machine.refused("init --soft-tokens 3").contains("exists already and is not changed"));
    assert_eq!(std::fs::read(machine.file("etc/claviger.toml")).unwrap(), before);
}

/// Makes a token as a vendor's tool would.
fn token(machine: &Machine, label: &str) -> PathBuf {
    std::fs::create_dir_all(machine.file("tokens")).unwrap();
    let conf = format!("directories.tokendir = {}\n", machine.file("tokens").display());
    std::fs::write(machine.file("softhsm2.conf"), conf).unwrap();
    let mut softhsm = Command::new("softhsm2-util");
    softhsm.args(["--init-token", "--free", "--label", label, "--pin", "12345678", "--so-pin", "87654321"]);
    let made = tool("softhsm2", softhsm.env("SOFTHSM2_CONF", machine.file("softhsm2.conf")));
    assert!(made.status.success(), "{}", said(&made));
    let pin = machine.file("pin");
    std::fs::write(&pin, "12345678\n").unwrap();
    std::fs::set_permissions(&pin, std::fs::Permissions::from_mode(0o600)).unwrap();
    pin
}

fn module() -> &'static str {
    let usual = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"];
    usual.into_iter().find(|path| Path::new(path).exists()).unwrap()
}

/// What a certification authority does with a request.
fn certify(machine: &Machine, kind: &str) {
    let file = |name: &str| machine.file(name).to_str().unwrap().to_owned();
    if !machine.file("ca.pem").exists() {
        let mut authority = Command::new("openssl");
        authority.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=CA"]);
        assert!(
            tool("openssl", authority.args(["-keyout", &file("ca.key"), "-out", &file("ca.pem")])).status.success()
        );
    }
    let mut sign = Command::new("openssl");
    sign.args(["x509", "-req", "-days", "30", "-copy_extensions", "copyall", "-CAcreateserial"]);
    sign.args(["-CA", &file("ca.pem"), "-CAkey", &file("ca.key")]);
    sign.args(["-in", &file(&format!("etc/{kind}.csr")), "-out", &file(&format!("etc/{kind}.pem"))]);
    let signed = tool("openssl", &mut sign);
    assert!(signed.status.success(), "{}", said(&signed));
}

#[test]
fn an_authority_certifies_keys_that_the_hsm_made() {
    let machine = Machine::new();
    let pin = token(&machine, "vendor");
    // Without a terminal it says which option is missing.
    assert!(machine.refused("init").contains("--module FILE --token LABEL"));
    let conf = machine.file("softhsm2.conf");
    let tokens = format!("--module {} --env SOFTHSM2_CONF={} --pin-file {}", module(), conf.display(), pin.display());
    // A wrong label is found by the doctor; nothing has to be undone but the file.
    let wrong = machine.refused(&format!("init {tokens} --token other {PORTS}"));
    assert!(wrong.contains("ERROR") && wrong.contains("remedy the errors"), "{wrong}");
    std::fs::remove_file(machine.file("etc/claviger.toml")).unwrap();
    machine.done(&format!("init {tokens} --token vendor {PORTS}"));
    let pin = machine.file("etc/pins/hsm-a.pin").metadata().unwrap();
    assert_eq!(pin.mode() & 0o007, 0, "others cannot read the PIN");

    let daemon = machine.serve();
    assert!(machine.refused("init").contains("--certificates request"));
    let said = machine.done("init --certificates request --bits 2048 --subject CN=Acme,O=Acme,C=DE");
    assert!(said.contains("have your authority certify") && said.contains("signing.csr"), "{said}");
    // Nothing is made twice, and the way of the first run is remembered.
    let said = machine.done("init");
    assert!(!said.contains("made ") && said.contains("encryption.csr"), "{said}");
    certify(&machine, "signing");
    let said = machine.done("init");
    assert!(said.contains("added     signing certificate") && !said.contains("ready"), "{said}");
    certify(&machine, "encryption");
    let said = machine.done("init");
    assert!(said.contains("added     encryption certificate") && said.contains("ready"), "{said}");
    block(daemon.until_ready_is(200));
    let keys = machine.done("keys list");
    assert!(keys.contains("Acme signing") && keys.contains("Acme encryption"), "{keys}");
}

#[test]
fn root_has_the_doctor_look_with_the_eyes_of_the_daemons_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let machine = Machine::new();
    // A program that every user may run.
    std::fs::set_permissions(machine.folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = machine.file("claviger");
    std::fs::copy(claviger(), &program).unwrap();
    machine.done(&format!("init --soft-tokens 1 {PORTS}"));
    let nobody = 65534;
    for name in ["state", "state/soft-tokens"] {
        std::os::unix::fs::chown(machine.file(name), Some(nobody), Some(nobody)).unwrap();
    }
    let config = machine.file("etc/claviger.toml");
    let doctor = || {
        let output = Command::new(&program).args(["doctor", "--json", "--config"]).arg(&config).output().unwrap();
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        findings.to_string()
    };
    let findings = doctor();
    assert!(findings.contains("the configuration cannot be read: Permission denied"), "{findings}");
    std::fs::set_permissions(machine.file("etc"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o644)).unwrap();
    let findings = doctor();
    assert!(findings.contains("every setting is known") && findings.contains("hsm-a.pin"), "{findings}");
}
