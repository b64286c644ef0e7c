//! A machine on which nothing of the project is installed: a copy of this one in memory, in namespaces of its own. What a
//! script installs, changes and starts there ends with it.

use std::path::Path;
use std::process::{Command, Output};

use crate::binary::{claviger, loadgen};

/// Mounts a copy-on-write view of this machine's files, and runs the script that is the second argument there.
const ENTER: &str = r#"
set -euo pipefail
mount --make-rprivate /
top=$(mktemp -d)
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
root=$top/root
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/root"
ip link set lo up
mkdir -p "$root/tmp/claviger-bin" "$root/usr/local/bin"
cp "$1" "$root/tmp/claviger-bin/claviger"
cp "$2" "$root/tmp/claviger-bin/claviger-loadgen"
printf '%s' "$4" >"$root/usr/local/bin/systemctl"
chmod 755 "$root/usr/local/bin/systemctl" "$root/tmp/claviger-bin"/*
printf '%s' "$3" >"$root/tmp/script"
exec chroot "$root" /bin/bash -euo pipefail /tmp/script
"#;

/// A stand-in for systemd's systemctl: it reads the unit, starts its program as its user with a notify socket, and waits
/// for READY=1. It knows enable --now, start, stop and reload.
const SYSTEMCTL: &str = r##"#!/usr/bin/python3
import os, pwd, shlex, socket, subprocess, sys
verb = [word for word in sys.argv[1:] if not word.startswith("-")][0]
unit = "/usr/lib/systemd/system/claviger.service"
settings = {}
for line in open(unit):
    if "=" in line and not line.startswith("#"):
        key, value = line.strip().split("=", 1)
        settings.setdefault(key, value)
pid_file, notify = "/run/claviger.pid", "/run/claviger.notify"
def pid():
    return int(open(pid_file).read())
def expect(wanted, listener):
    listener.settimeout(180)
    while wanted not in listener.recv(4096):
        pass
if verb in ("enable", "start"):
    if os.path.exists(notify):
        os.unlink(notify)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(notify)
    os.chmod(notify, 0o777)
    user = settings["User"]
    os.makedirs("/run/" + settings["RuntimeDirectory"], exist_ok=True)
    owner = pwd.getpwnam(user)
    os.chown("/run/" + settings["RuntimeDirectory"], owner.pw_uid, owner.pw_gid)
    log = open("/tmp/journal", "ab")
    command = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"] + shlex.split(settings["ExecStart"])
    child = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": notify}, stdin=subprocess.DEVNULL,
                             stdout=log, stderr=log, start_new_session=True)
    open(pid_file, "w").write(str(child.pid))
    expect(b"READY=1", listener)
elif verb == "reload":
    subprocess.run(["setpriv", "--reuid", settings["User"], "--regid", settings["User"], "--init-groups"]
                   + shlex.split(settings["ExecReload"].replace("$MAINPID", str(pid()))), check=True)
elif verb == "stop":
    os.kill(pid(), 15)
    os.system("while kill -0 %d 2>/dev/null; do sleep 0.1; done" % pid())
elif verb != "daemon-reload":
    sys.exit("the stand-in does not know systemctl " + verb)
"##;

/// Whether this user may make a sandbox: mounting and changing users needs root.
#[must_use]
pub fn is_possible() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a bash script in a sandbox, as root, in the root folder of the sources. Programs are in `/tmp/claviger-bin` and not in
/// the `PATH`. Everything that the script started ends with it.
///
/// # Panics
/// If the sandbox cannot be started.
#[must_use]
pub fn run(script: &str) -> Output {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let script = format!("cd {}\n{script}", sources.display());
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--pid",
        "--net",
        "--ipc",
        "--uts",
        "--fork",
        "--kill-child",
        "bash",
        "-c",
        ENTER,
        "enter",
    ]);
    command.arg(claviger()).arg(loadgen()).arg(script).arg(SYSTEMCTL);
    for variable in ["CLAVIGER_CONFIG", "CLAVIGER_SOCKET", "CLAVIGER_URL", "CLAVIGER_CA", "SOFTHSM2_CONF"] {
        command.env_remove(variable);
    }
    command.env("HOME", "/root").env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.output().unwrap()
}
