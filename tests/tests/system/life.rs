//! The life of a service as in docs/operations.md, docs/tenant.md and docs/host.md, with the commands of those pages only:
//! from empty tokens to a second site on the same tokens.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use claviger::lab::MODULE_VARIABLE;
use claviger_tests::{Daemon, block, claviger, said, tool};
use serde_json::Value;
use tempfile::TempDir;

/// Number of virtual machines that the tenant starts with.
const MACHINES: usize = 5;

/// Origin of a service's private keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keys {
    /// Generated with `claviger keys generate`. This is possible with one soft token only, since soft tokens do not
    /// replicate.
    Generated,
    /// Generated at the CA and imported into all tokens from PFX files.
    Brought,
}

/// A directory in which operators, a CA, a tenant and hosts work with shell commands.
struct Life {
    folder: TempDir,
    keys: Keys,
    /// Configuration of the service that administrators use now.
    config: String,
}

impl Life {
    /// Creates tokens without keys, and the service's configuration.
    fn begin(members: &[&str], keys: Keys) -> Self {
        let life = Self { folder: tempfile::tempdir().unwrap(), keys, config: "claviger.toml".to_owned() };
        for folder in ["tokens", "pins", "ca"] {
            fs::create_dir(life.file(folder)).unwrap();
        }
        life.write("softhsm2.conf", &format!("directories.tokendir = {}\n", life.file("tokens").display()));
        life.write("passphrase", "correct horse battery staple\n");
        for member in members {
            life.write(&format!("pins/hsm-{member}.pin"), "4711-0815\n");
            life.shell(
                "softhsm2",
                &format!(
                    "softhsm2-util --init-token --free --label claviger-{member} --so-pin 0815-4711 --pin 4711-0815"
                ),
            );
        }
        life.configure("claviger.toml", "state", members);
        // A CA that certifies requests as they are.
        life.write(
            "ca.cnf",
            "[ca]\ndefault_ca = throwaway\n[throwaway]\ndatabase = ca/index.txt\nnew_certs_dir = ca\nrand_serial = yes\n\
             certificate = ca/ca.pem\nprivate_key = ca/ca.key\ndefault_md = sha256\ndefault_days = 365\n\
             policy = any\ncopy_extensions = copy\n[any]\ncommonName = supplied\n",
        );
        life.write("ca/index.txt", "");
        let subject = "-subj /CN=throw-away-CA -days 3650 -keyout ca/ca.key -out ca/ca.pem";
        life.shell("openssl", &format!("openssl req -x509 -newkey rsa:2048 -nodes {subject}"));
        life
    }

    fn configure(&self, file: &str, state: &str, members: &[&str]) {
        let module = module();
        let mut text = format!(
            "[env]\nSOFTHSM2_CONF = {:?}\n[server]\nlisten = \"127.0.0.1:0\"\nmetrics = \"127.0.0.1:0\"\nstate = {state:?}\n\
             [release]\ndeadline_ms = 60000\n",
            self.file("softhsm2.conf")
        );
        for member in members {
            text += &format!(
                "[[hsm]]\nname = \"hsm-{member}\"\nmodule = {module:?}\ntoken = \"claviger-{member}\"\n\
                 pin_file = \"pins/hsm-{member}.pin\"\nsessions = 4\n"
            );
        }
        self.write(file, &text);
    }

    fn serve(&self) -> Daemon {
        Daemon::serve(&self.file(&self.config))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Writes a file that only its owner may read.
    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), text).unwrap();
        fs::set_permissions(self.file(name), Permissions::from_mode(0o600)).unwrap();
    }

    /// Runs a command line of another program.
    fn shell(&self, package: &str, line: &str) -> String {
        let (name, arguments) = line.split_once(' ').unwrap();
        let mut command = Command::new(name);
        command.args(arguments.split_whitespace()).current_dir(self.folder.path());
        let output = tool(package, command.env("SOFTHSM2_CONF", self.file("softhsm2.conf")));
        assert!(output.status.success(), "{line}: {}", said(&output));
        said(&output)
    }

    /// Runs a command line of claviger.
    fn run(&self, line: &str) -> Output {
        Command::new(claviger()).args(line.split_whitespace()).current_dir(self.folder.path()).output().unwrap()
    }

    fn done(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", said(&output));
        said(&output)
    }

    fn json(&self, line: &str) -> Value {
        let output = self.run(&format!("{line} --json"));
        assert!(output.status.success(), "{line}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", said(&output)))
    }

    /// Checks that a command ends with status 1 and prints this message.
    fn refused(&self, line: &str, expected: &str) {
        let output = self.run(line);
        assert!(output.status.code() == Some(1) && said(&output).contains(expected), "{line}: {}", said(&output));
    }

    /// Runs an administrator's command and returns its JSON output.
    fn ask(&self, line: &str) -> Value {
        self.json(&format!("{line} --config {}", self.config))
    }

    fn ask_in_vain(&self, line: &str, expected: &str) {
        self.refused(&format!("{line} --config {}", self.config), expected);
    }

    /// Creates a key, certified by the CA and added; returns the thumbprint. The CA's file has text before its PEM.
    fn certified(&self, kind: &str, name: &str) -> String {
        let request = |more: &str| format!("openssl req -new -subj /CN={name} -out {name}.csr {more}");
        let certify = format!("openssl ca -batch -config ca.cnf -in {name}.csr -out {name}.pem");
        let added = match self.keys {
            Keys::Generated => {
                let key = self.ask(&format!("keys generate --kind {kind} --bits 2048"));
                let id = text(&key, "hsm_key");
                self.ask(&format!("keys csr --hsm-key {id} --subject {name} --out {name}.csr"));
                assert!(self.shell("openssl", &format!("openssl req -verify -in {name}.csr -noout")).contains("OK"));
                self.shell("openssl", &certify);
                assert!(self.text(&format!("{name}.pem")).starts_with("Certificate:"));
                self.ask(&format!("keys add --kind {kind} --certificate {name}.pem"))
            }
            Keys::Brought => {
                let usage = "-addext keyUsage=digitalSignature,dataEncipherment -addext extendedKeyUsage=serverAuth";
                self.shell("openssl", &request(&format!("-newkey rsa:2048 -nodes -keyout {name}.key {usage}")));
                self.shell("openssl", &certify);
                let pfx = format!("-inkey {name}.key -in {name}.pem -out {name}.pfx -passout file:passphrase");
                self.shell("openssl", &format!("openssl pkcs12 -export {pfx}"));
                self.ask(&format!("keys add --kind {kind} --pfx {name}.pfx --password-file passphrase"))
            }
        };
        assert_eq!((&added["primary"], &added["warnings"]), (&false.into(), &serde_json::json!([])), "{added}");
        text(&added, "thumbprint").to_owned()
    }

    /// Creates a new pair of certificates and makes it primary: signing, encryption.
    fn primary(&self, name: &str) -> [String; 2] {
        let thumbprints = ["signing", "encryption"].map(|kind| self.certified(kind, &format!("{name}-{kind}")));
        for thumbprint in &thumbprints {
            assert_eq!(self.ask(&format!("keys set-primary {}", &thumbprint[..8]))["primary"], true);
        }
        thumbprints
    }

    /// The tenant imports the service's current guardian, with the thumbprint that the operator reads out.
    fn import(&self, name: &str, daemon: &Daemon, pin: &str) {
        let line = format!("guardian import {name} --url {}", daemon.url);
        self.refused(&line, &format!("--pin {pin}"));
        self.done(&format!("{line} --pin {pin}"));
    }

    /// The tenant creates a protector `vm.xml` and its key `vm.key`.
    fn protect(&self, vm: &str, guardian: &str) {
        self.done(&format!("protector new --owner acme --guardian {guardian} --out {vm}.xml --key {vm}.key"));
        self.done(&format!("protector verify {vm}.xml --owner acme"));
    }

    /// Checks that a host gets both keys and that they are the tenant's.
    fn released(&self, host: &str, daemon: &Daemon, vm: &str) {
        self.done(&self.unwrap(host, daemon, vm));
        let keys = self.read("keys");
        let egress = self.run("protector open next.xml --owner acme --stdout");
        assert!(keys.len() == 64 && keys[..32] == self.read(&format!("{vm}.key")), "{vm}: the ingress key");
        assert!(egress.status.success() && keys[32..] == egress.stdout, "{vm}: the egress key: {}", said(&egress));
    }

    fn kept_from(&self, host: &str, daemon: &Daemon, vm: &str, code: &str) {
        self.refused(&self.unwrap(host, daemon, vm), code);
    }

    fn unwrap(&self, host: &str, daemon: &Daemon, vm: &str) -> String {
        format!("host unwrap --dir {host} --url {} --protector {vm}.xml --egress next.xml --key-file keys", daemon.url)
    }

    /// Returns the doctor's exit status and findings.
    fn doctor(&self) -> (i32, Vec<Value>) {
        let output = self.run(&format!("doctor --json --config {}", self.config));
        let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&output)));
        (output.status.code().unwrap(), findings)
    }

    fn well(&self) {
        let (status, findings) = self.doctor();
        assert!(status == 0 && findings.iter().all(|finding| finding["level"] == "ok"), "{findings:#?}");
    }

    /// Checks that the doctor ends with this status, and that a finding of `check` contains these words.
    fn ill(&self, status: i32, check: &str, words: &[&str]) {
        let (found, findings) = self.doctor();
        let named = |finding: &&Value| {
            let what = text(finding, "what");
            finding["check"] == check && finding["todo"].is_string() && words.iter().all(|word| what.contains(word))
        };
        assert!(found == status && findings.iter().any(|finding| named(&finding)), "{check}: {found}, {findings:#?}");
    }

    /// Runs `look` while a file has other content, and restores the file.
    fn with(&self, name: &str, content: &str, look: impl FnOnce()) {
        let before = self.text(name);
        self.write(name, content);
        look();
        self.write(name, &before);
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

#[test]
fn of_one_token_that_makes_its_keys() {
    live(&["a"], Keys::Generated);
}

#[test]
fn of_two_tokens_that_are_brought_their_keys() {
    live(&["a", "b"], Keys::Brought);
}

fn live(members: &[&str], keys: Keys) {
    let mut life = Life::begin(members, keys);

    // Nothing was started yet, and the doctor has no other finding.
    life.ill(1, "folder", &["no state folder"]);
    let daemon = life.serve();
    let not_ready = block(daemon.until_ready_is(503));
    assert!(String::from_utf8_lossy(&not_ready.body).contains("no primary"), "{:?}", not_ready.body);
    life.ill(2, "certificate", &["no primary signing certificate"]);
    life.refused(&format!("guardian import hgs --url {}", daemon.url), "Certificate not found");

    // The service gets its keys, and two hosts serve a tenant.
    let first = life.primary("first");
    block(daemon.until_ready_is(200));
    life.well();
    life.done("guardian new acme --bits 2048");
    life.import("hgs", &daemon, &first[0]);
    let machines: Vec<String> = (1..=MACHINES).map(|number| format!("vm-{number}")).collect();
    machines.iter().for_each(|vm| life.protect(vm, "hgs"));
    for (host, label) in [("node-1", ""), ("node-2", "--label tenant=acme")] {
        life.done(&format!("host new-key --dir {host} --bits 2048"));
        let attest = format!("host attest --dir {host} --url {}", daemon.url);
        life.refused(&attest, "hosts add");
        life.ask(&format!("hosts add {host} --public-key {host}/hostkey.pub.pem {label}"));
        life.done(&attest);
    }
    machines.iter().for_each(|vm| life.released("node-1", &daemon, vm));

    // New keys become primary: old protectors still work, and new ones use the new keys.
    let second = life.primary("second");
    machines.iter().for_each(|vm| life.released("node-1", &daemon, vm));
    life.import("hgs-2", &daemon, &second[0]);
    life.protect("vm-6", "hgs-2");
    life.released("node-2", &daemon, "vm-6");
    let made_for =
        |vm: &str, thumbprint: &str| life.json(&format!("protector show {vm}.xml")).to_string().contains(thumbprint);
    assert!(made_for("vm-6", &second[1]) && !made_for("vm-6", &first[1]) && made_for("vm-1", &first[1]));

    // The tenant's own keys, for the hosts that it trusts.
    life.done("guardian new acme-hgs --bits 2048");
    let mut own = Vec::new();
    for kind in ["signing", "encryption"] {
        let pair = format!("-inkey acme-hgs/owner-{kind}.key.pem -in acme-hgs/owner-{kind}.crt.pem");
        life.shell("openssl", &format!("openssl pkcs12 -export {pair} -out acme-{kind}.pfx -passout file:passphrase"));
        let added = life.ask(&format!("keys add --kind {kind} --pfx acme-{kind}.pfx --password-file passphrase"));
        life.ask(&format!("keys limit {} --label tenant=acme", text(&added, "thumbprint")));
        own.push(text(&added, "thumbprint").to_owned());
    }
    life.done("guardian export acme-hgs --out acme-hgs.xml");
    life.done(&format!("guardian import acme-hgs acme-hgs.xml --pin {}", own[0]));
    life.protect("vm-7", "acme-hgs");
    life.kept_from("node-1", &daemon, "vm-7", "InvalidWrappingException");
    life.released("node-2", &daemon, "vm-7");

    // The old keys are removed once the tenant has moved the protectors that are still needed.
    life.ask(&format!("keys disable {}", first[1]));
    life.kept_from("node-1", &daemon, "vm-1", "InvalidWrappingException");
    life.released("node-1", &daemon, "vm-6");
    life.ask(&format!("keys enable {}", first[1]));
    life.released("node-1", &daemon, "vm-1");
    life.done("protector grant vm-1.xml --owner acme --guardian hgs-2 --out both.xml");
    // A grant keeps the key.
    fs::copy(life.file("vm-1.key"), life.file("both.key")).unwrap();
    life.done("protector revoke both.xml --owner acme --guardian hgs --out moved.xml --key moved.key");
    life.released("node-1", &daemon, "moved");
    for thumbprint in &first {
        life.ask_in_vain(&format!("keys remove {thumbprint}"), "--force");
        life.ask(&format!("keys disable {thumbprint}"));
        life.ask(&format!("keys remove {thumbprint} --force"));
    }
    life.ask_in_vain(&format!("keys remove {} --force", second[0]), "primary");
    life.kept_from("node-1", &daemon, "vm-1", "InvalidWrappingException");
    for vm in ["both", "moved"] {
        life.released("node-1", &daemon, vm);
    }
    life.well();

    // Everything outside the tokens is transferred to a second site.
    life.ask("export hgs.age --passphrase-file passphrase");
    assert!(daemon.stop().success());
    fs::remove_dir_all(life.file("state")).unwrap();
    life.configure("second.toml", "second", members);
    "second.toml".clone_into(&mut life.config);
    let daemon = life.serve();
    life.kept_from("node-1", &daemon, "moved", "not registered");
    let import = "import hgs.age --passphrase-file passphrase";
    assert_eq!(life.ask(&format!("{import} --dry-run"))["applied"], false);
    assert_eq!(life.ask(&format!("{import} --yes"))["applied"], true);
    block(daemon.until_ready_is(200));
    for vm in ["vm-6", "moved"] {
        life.released("node-1", &daemon, vm);
    }
    life.kept_from("node-1", &daemon, "vm-7", "InvalidWrappingException");
    life.released("node-2", &daemon, "vm-7");
    life.done(&format!("host attest --fresh --dir node-1 --url {}", daemon.url));
    life.released("node-1", &daemon, "vm-6");
    life.kept_from("node-1", &daemon, "vm-2", "InvalidWrappingException");
    life.well();
    assert!(daemon.stop().success());
    life.well();

    // A few faults on a service that has been in use; doctor.rs tests more than ten, one by one.
    let last = *members.last().unwrap();
    let (name, pin) = (format!("hsm-{last}"), format!("pins/hsm-{last}.pin"));
    life.with("second.toml", &life.text("second.toml").replace("deadline_ms", "dead_line_ms"), || {
        life.ill(2, "configuration", &["dead_line_ms"]);
    });
    life.with(&pin, "wrong\n", || life.ill(2, "login", &[&name, "PIN"]));
    // The token reports the wrong PIN: the doctor tries no PIN there until someone logs in with the right one.
    life.ill(1, "login", &[&name, "CKF_USER_PIN_COUNT_LOW"]);
    let daemon = life.serve();
    block(daemon.until_ready_is(200));
    assert!(daemon.stop().success());
    let trail = life.text("second/audit.jsonl");
    life.with("second/audit.jsonl", &trail[..trail.len() - 5], || life.ill(1, "audit", &["not whole"]));
    life.well();
    life.ask_in_vain("keys list", "is the daemon running");
    lose(&life, last, &second[1]);
}

/// Deletes a certificate's key from a token: the doctor names both.
fn lose(life: &Life, member: &str, thumbprint: &str) {
    let daemon = life.serve();
    let keys = life.ask("keys list");
    let key = keys.as_array().unwrap().iter().find(|key| key["thumbprint"] == thumbprint).unwrap();
    assert!(daemon.stop().success());
    let id = text(key, "hsm_key");
    let token = format!("--module {} --token-label claviger-{member} --login --pin 4711-0815", module());
    life.shell("opensc", &format!("pkcs11-tool {token} --delete-object --type privkey --id {id}"));
    life.ill(2, "key", &[&format!("hsm-{member}"), "does not have", id, &thumbprint[..16]]);
}

/// Path of SoftHSM2, as in the README.
fn module() -> String {
    std::env::var(MODULE_VARIABLE).unwrap_or_else(|_| "/usr/lib/softhsm/libsofthsm2.so".to_owned())
}
