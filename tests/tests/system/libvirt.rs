//! What is shipped for libvirt: the domain that is an example, the units, and `claviger-vm`, which starts a machine of libvirt's session
//! (QEMU without KVM) with the secrets of its vault.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger_client::vault::file;
use claviger_client::vault::format::Vault;
use claviger_client::vault::secrets::Secrets;
use claviger_tests::qemu::qemu_img;
use claviger_tests::{Daemon, Lab, Options, Process, block, claviger, metadata, run, said, tool};
use tempfile::TempDir;

const PACKAGES: &str =
    "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils ovmf swtpm-tools";

/// The user of libvirt's session where this one is root: root has none.
const NOBODY: u32 = 65_534;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/packaging/libvirt").join(name)
}

#[test]
fn the_example_and_the_units_are_valid() {
    let mut command = Command::new("virt-xml-validate");
    let checked = tool(PACKAGES, command.arg(shipped("domain.example.xml")).arg("domain"));
    assert!(checked.status.success(), "{}", said(&checked));
    // The secrets of the domain are those that claviger-vm is told of.
    let domain = fs::read_to_string(shipped("domain.example.xml")).unwrap();
    let secrets = fs::read_to_string(shipped("web-1.secrets")).unwrap();
    for line in secrets.lines().filter(|line| !line.starts_with('#')) {
        let uuid = line.split_whitespace().nth(2).unwrap();
        assert!(domain.contains(&format!("='{uuid}'")), "{uuid}");
    }

    let folder = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for (unit, name) in
        [("claviger-agent.service", "claviger-agent.service"), ("claviger-vm@.service", "claviger-vm@web-1.service")]
    {
        let text = fs::read_to_string(shipped(unit)).unwrap();
        let text = text.replace("/usr/bin/claviger", claviger().to_str().unwrap());
        let text = text.replace("/usr/libexec/claviger/claviger-vm", shipped("claviger-vm").to_str().unwrap());
        fs::write(folder.path().join(name), text).unwrap();
        verify.arg(folder.path().join(name));
    }
    let verified = tool("systemd", &mut verify);
    assert!(verified.status.success() && said(&verified).is_empty(), "{}", said(&verified));
}

/// A user with a session of libvirt, its folder, and the vault of its machine.
struct Session {
    folder: TempDir,
    user: Option<u32>,
}

impl Session {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("claviger-libvirt-").tempdir().unwrap();
        let user = rustix::process::geteuid().is_root().then_some(NOBODY);
        let session = Self { folder, user };
        for name in ["home", "home/.config", "home/.config/libvirt", "run", "vaults", "seen"] {
            fs::create_dir(session.file(name)).unwrap();
            fs::set_permissions(session.file(name), fs::Permissions::from_mode(0o700)).unwrap();
            session.give(&session.file(name));
        }
        fs::set_permissions(session.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // Each session is a host of its own for libvirt.
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        let config = format!("host_uuid = \"{}\"\n", uuid.trim());
        fs::write(session.file("home/.config/libvirt/libvirtd.conf"), config).unwrap();
        session.done("swtpm_setup", &["--create-config-files"]);
        session
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes it the user's.
    fn give(&self, path: &Path) {
        if let Some(user) = self.user {
            chown(path, Some(user), Some(user)).unwrap();
        }
    }

    fn run<S: AsRef<OsStr>>(&self, program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = S>) -> Output {
        let mut command = match self.user {
            None => Command::new(program),
            Some(user) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &user.to_string(), "--regid", &user.to_string(), "--clear-groups"]);
                command.arg(program.as_ref());
                command
            }
        };
        command.args(arguments).current_dir(self.folder.path());
        command.env("HOME", self.file("home")).env("XDG_RUNTIME_DIR", self.file("run"));
        command.env_remove("XDG_CONFIG_HOME").env_remove("XDG_CACHE_HOME");
        command.env("CLAVIGER", claviger_for_all(self)).env("CLAVIGER_VAULTS", self.file("vaults"));
        command.env("CLAVIGER_AGENT", self.file("agent.sock")).env("CLAVIGER_SEEN", self.file("seen"));
        command.env("CLAVIGER_STOP_SECONDS", "1").env("LIBVIRT_URI", "qemu:///session");
        tool(PACKAGES, &mut command)
    }

    fn done(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        assert!(output.status.success(), "{program} {arguments:?}: {}", said(&output));
        said(&output)
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        self.run("virsh", ["--quiet", "--connect", "qemu:///session"].iter().chain(arguments))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.virsh(&["destroy", "web-1"]);
        // libvirt's daemon of the session ends by itself when nobody speaks to it; its folder goes now.
        if let Ok(pid) = fs::read_to_string(self.file("run/libvirt/libvirtd.pid")) {
            let _ = self.run("kill", [pid.trim()]);
        }
    }
}

/// The program, where every user may run it.
fn claviger_for_all(session: &Session) -> PathBuf {
    let copy = session.file("claviger");
    if !copy.exists() {
        fs::copy(claviger(), &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    }
    copy
}

/// The example, without KVM, with its disk in this folder.
fn domain(disks: &Path) -> String {
    let domain = fs::read_to_string(shipped("domain.example.xml")).unwrap();
    let domain = domain.replace("type='kvm'", "type='qemu'").replace("'MiB'>2048<", "'MiB'>256<");
    domain.replace("/var/lib/libvirt/images", text(disks))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Session {
    /// The agent of a host with these keys.
    fn agent(&self, daemon: &Daemon, keys: &Path) -> Process {
        let mut agent = Command::new(claviger());
        agent.args(["host", "agent", "--url", &daemon.url, "--dir"]).arg(keys);
        agent.arg("--socket").arg(self.file("agent.sock")).args(["--allow-uid", &NOBODY.to_string()]);
        let agent = Process::start(&mut agent);
        agent.line(|line| line.starts_with("listening on ").then_some(()));
        agent
    }

    /// The vault of the machine, and the list of its secrets for libvirt.
    fn make_vault(&self, lab: &Lab, daemon: &Daemon) {
        let (protector, key) = lab.owner().create(&[block(metadata(&daemon.client()))]).unwrap();
        let mut secrets = Secrets::default();
        for (name, digits) in [("state-key", "5a"), ("disk-key", "c3")] {
            secrets.add(name, digits.repeat(32).into_bytes().into(), false).unwrap();
        }
        file::create(&self.vault(), &Vault::create("web-1", &protector, &key, &secrets).unwrap()).unwrap();
        self.give(&self.vault());
        let list = self.file("vaults/web-1.secrets");
        fs::copy(shipped("web-1.secrets"), &list).unwrap();
        self.give(&list);
    }

    fn vault(&self) -> PathBuf {
        self.file("vaults/web-1.vault")
    }

    /// `claviger-vm`, where the user may run it.
    fn script(&self) -> PathBuf {
        let script = self.file("claviger-vm");
        if !script.exists() {
            fs::copy(shipped("claviger-vm"), &script).unwrap();
        }
        script
    }

    /// Defines the machine, with a disk that the vault's secret encrypts.
    fn define(&self) {
        let disk = self.file("home/web-1.qcow2");
        let object = "secret,id=k,file=/dev/fd/{disk-key}";
        let options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
        let (vault, socket, seen) = (self.vault(), self.file("agent.sock"), self.file("seen"));
        let opened = ["host", "vm", "open", text(&vault), "--agent", text(&socket), "--seen", text(&seen)];
        let qemu_img = qemu_img(&self.file("."));
        let image = ["--", text(&qemu_img), "create", "-q", "-f", "qcow2", "--object", object, "-o", options];
        let claviger = claviger_for_all(self);
        self.done(text(&claviger), &[&opened[..], &image, &[text(&disk), "64M"]].concat());
        fs::write(self.file("web-1.xml"), domain(&self.file("home"))).unwrap();
        let defined = self.virsh(&["define", "web-1.xml"]);
        assert!(defined.status.success(), "{}", said(&defined));
    }

    /// The session, for the libvirt of another one.
    fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}", self.file("run/libvirt/libvirt-sock").display())
    }
}

#[test]
fn a_machine_of_libvirt_starts_with_the_secrets_of_its_vault_alone() {
    let (daemon, lab) = Lab::start(Options::default());
    let session = Session::new();
    session.make_vault(&lab, &daemon);
    let vault = session.vault();
    let script = session.script();
    let script = text(&script);
    let _agent = session.agent(&daemon, &lab.file("host"));
    session.define();

    // Without the secrets it does not start.
    let refused = session.virsh(&["start", "web-1"]);
    assert!(said(&refused).contains("Secret not found"), "{}", said(&refused));
    for _ in 0..2 {
        session.done(script, &["start", "web-1"]);
        assert!(said(&session.virsh(&["list", "--name"])).contains("web-1"));
        // They are gone as soon as it has started.
        assert_eq!(said(&session.virsh(&["secret-list"])).trim(), "");
        // Nothing runs in it that would shut it down.
        let stopped = session.run(script, ["stop", "web-1"]);
        assert!(said(&stopped).contains("does not shut down within 1 s"), "{}", said(&stopped));
        assert!(session.virsh(&["destroy", "web-1"]).status.success());
    }
    assert_eq!(file::read(&vault).unwrap().generation, 4);
    session.done(script, &["stop", "web-1"]);

    // Where it is to arrive, the secrets wait for it; libvirt tells them nobody.
    session.done(script, &["prepare", "web-1"]);
    let waiting = said(&session.virsh(&["secret-list"]));
    assert!(waiting.contains("claviger-web-1-state-key") && waiting.contains("claviger-web-1-disk-key"), "{waiting}");
    let private = session.virsh(&["secret-get-value", "6f3c1d0e-6f5b-4b7e-9d3c-0c5f6f3f0a02"]);
    assert!(said(&private).contains("secret is private"), "{}", said(&private));
    session.done(script, &["clear", "web-1"]);
    assert_eq!(said(&session.virsh(&["secret-list"])).trim(), "");

    // The keys are in no file of the session.
    for key in ["5a", "c3"] {
        let found = tool("grep", Command::new("grep").arg("-rlaF").arg(key.repeat(32)).arg(session.folder.path()));
        assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    }
    // On a host that the service does not trust any more it does not start, and the reason is readable.
    let config = lab.config_file();
    let removed = run(["hosts", "remove", claviger_tests::HOST, "--config", text(&config)]);
    assert!(removed.status.success(), "{}", said(&removed));
    let refused = session.run(script, ["start", "web-1"]);
    assert!(!refused.status.success() && said(&refused).contains("UnauthorizedErrorReply"), "{}", said(&refused));
    for (arguments, words) in [(&["start", "../x"][..], "is no name of a domain"), (&["start"], "usage:")] {
        let wrong = session.run(script, arguments);
        assert!(wrong.status.code() == Some(2) && said(&wrong).contains(words), "{}", said(&wrong));
    }
}

#[test]
fn a_machine_moves_while_it_runs_to_a_host_that_has_its_own_release() {
    let (daemon, lab) = Lab::start(Options::default());
    let (source, target) = (Session::new(), Session::new());
    // The other host has keys of its own.
    let (keys, config) = (lab.file("node-18"), lab.config_file());
    let public = keys.join("hostkey.pub.pem");
    for command in [
        &["host", "new-key", "--dir", text(&keys)][..],
        &["hosts", "add", "node-18", "--public-key", text(&public), "--config", text(&config)],
    ] {
        let done = run(command);
        assert!(done.status.success(), "{command:?}: {}", said(&done));
    }
    let _agents = [source.agent(&daemon, &lab.file("host")), target.agent(&daemon, &keys)];
    source.make_vault(&lab, &daemon);
    source.define();
    source.done(text(&source.script()), &["start", "web-1"]);
    let script = target.script();
    let runs = |session: &Session| said(&session.virsh(&["list", "--name"])).contains("web-1");
    assert!(runs(&source) && !runs(&target));
    let migrate = || {
        let (from, to) = (source.uri(), target.uri());
        let options = ["migrate", "--live", "--persistent", "--undefinesource", "--unsafe", "web-1"];
        source.run("virsh", ["--quiet", "--connect", &from].iter().chain(&options).chain(&[&to[..], "tcp://127.0.0.1"]))
    };

    // Without its own release the other host does not get it, and the machine keeps running where it is.
    let refused = migrate();
    assert!(said(&refused).contains("Secret not found"), "{}", said(&refused));
    assert!(runs(&source) && !runs(&target));

    for name in ["web-1.vault", "web-1.secrets"] {
        let moved = target.file("vaults").join(name);
        fs::rename(source.file("vaults").join(name), &moved).unwrap();
        target.give(&moved);
    }
    let before = file::read(&target.vault()).unwrap();
    target.done(text(&script), &["prepare", "web-1"]);
    assert_eq!(file::read(&target.vault()).unwrap().generation, before.generation + 1);
    let moved = migrate();
    assert!(moved.status.success(), "{}", said(&moved));
    target.done(text(&script), &["clear", "web-1"]);
    assert_eq!(said(&target.virsh(&["secret-list"])).trim(), "");
    assert!(!runs(&source) && runs(&target));
    assert_eq!(said(&source.virsh(&["list", "--all", "--name"])).trim(), "");
    // The state of its virtual TPM came with it, and opens with the vault's secret at the next start.
    assert!(target.virsh(&["destroy", "web-1"]).status.success());
    target.done(text(&script), &["start", "web-1"]);
    assert!(runs(&target));
}
