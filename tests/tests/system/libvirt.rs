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
use claviger_tests::{Lab, Options, Process, block, claviger, metadata, said, tool};
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
    verify.arg("verify");
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
        for name in ["home", "run", "vaults", "seen"] {
            fs::create_dir(session.file(name)).unwrap();
            fs::set_permissions(session.file(name), fs::Permissions::from_mode(0o700)).unwrap();
            session.give(&session.file(name));
        }
        fs::set_permissions(session.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
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

#[test]
fn a_machine_of_libvirt_starts_with_the_secrets_of_its_vault_alone() {
    let (daemon, lab) = Lab::start(Options::default());
    let session = Session::new();
    let vault = session.file("vaults/web-1.vault");
    let (protector, key) = lab.owner().create(&[block(metadata(&daemon.client()))]).unwrap();
    let mut secrets = Secrets::default();
    for (name, digits) in [("state-key", "5a"), ("disk-key", "c3")] {
        secrets.add(name, digits.repeat(32).into_bytes().into(), false).unwrap();
    }
    file::create(&vault, &Vault::create(&protector, &key, &secrets).unwrap()).unwrap();
    session.give(&vault);
    let list = session.file("vaults/web-1.secrets");
    fs::copy(shipped("web-1.secrets"), &list).unwrap();
    session.give(&list);
    let script = session.file("claviger-vm");
    fs::copy(shipped("claviger-vm"), &script).unwrap();
    let script = script.to_str().unwrap();

    let mut agent = Command::new(claviger());
    agent.args(["host", "agent", "--url", &daemon.url, "--dir"]).arg(lab.file("host"));
    agent.arg("--socket").arg(session.file("agent.sock")).args(["--allow-uid", &NOBODY.to_string()]);
    let agent = Process::start(&mut agent);
    agent.line(|line| line.starts_with("listening on ").then_some(()));

    // A disk that the vault's secret encrypts.
    let disk = session.file("home/web-1.qcow2");
    let object = "secret,id=k,file=/dev/fd/{disk-key}";
    let options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    let (vault_text, socket, seen) = (vault.to_str().unwrap(), session.file("agent.sock"), session.file("seen"));
    let opened =
        ["host", "vm", "open", vault_text, "--agent", socket.to_str().unwrap(), "--seen", seen.to_str().unwrap()];
    let image = ["--", "qemu-img", "create", "-q", "-f", "qcow2", "--object", object, "-o", options];
    let claviger = claviger_for_all(&session);
    let claviger = claviger.to_str().unwrap();
    session.done(claviger, &[&opened[..], &image, &[disk.to_str().unwrap(), "64M"]].concat());
    session.done("swtpm_setup", &["--create-config-files"]);
    // The example, without KVM.
    let domain = fs::read_to_string(shipped("domain.example.xml")).unwrap();
    let domain = domain.replace("type='kvm'", "type='qemu'").replace("'MiB'>2048<", "'MiB'>256<");
    let domain = domain.replace("/var/lib/libvirt/images", session.file("home").to_str().unwrap());
    fs::write(session.file("web-1.xml"), domain).unwrap();
    let defined = session.virsh(&["define", "web-1.xml"]);
    assert!(defined.status.success(), "{}", said(&defined));

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
    let removed = claviger_tests::run(["hosts", "remove", claviger_tests::HOST, "--config", config.to_str().unwrap()]);
    assert!(removed.status.success(), "{}", said(&removed));
    let refused = session.run(script, ["start", "web-1"]);
    assert!(!refused.status.success() && said(&refused).contains("UnauthorizedErrorReply"), "{}", said(&refused));
    for (arguments, words) in [(&["start", "../x"][..], "is no name of a domain"), (&["start"], "usage:")] {
        let wrong = session.run(script, arguments);
        assert!(wrong.status.code() == Some(2) && said(&wrong).contains(words), "{}", said(&wrong));
    }
}
