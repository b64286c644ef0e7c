//! The checks before the start that need no token. `claviger serve` refuses to start if one fails; `claviger doctor`
//! reports the same problems in advance.
//!
//! Each check is a function that returns problems and is listed in `CHECKS`. It changes nothing on the machine and does
//! not block.

use std::fmt;
use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use claviger_client::files::{self, FileError};

use crate::admin;
use crate::config::{Config, PinError};
use crate::http::server::bind_socket;
use crate::sys::process;
use crate::tls::{TlsError, tls_config};

/// Largest file that is named in `[etcd]`, in bytes.
const ETCD_FILE: usize = 64 * 1024;

/// A problem that prevents the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the check in the doctor's output.
    pub check: &'static str,
    /// The problem.
    pub what: String,
    /// The remedy.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// All problems together, so that an administrator can fix them at once.
#[derive(Debug, thiserror::Error)]
pub struct Blocked(pub Vec<Problem>);

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the daemon cannot start: ")?;
        for (at, problem) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "\n  also: " };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

type Check = fn(&Config) -> Vec<Problem>;

/// Checks that are also valid while a daemon runs.
const CHECKS: &[Check] = &[pins, tls, etcd, folder, sockets, groups];
/// Checks that fail while a daemon runs, because the daemon uses the resources.
const CHECKS_WHILE_STOPPED: &[Check] = &[ports];

/// All problems that prevent the start of a daemon with this configuration. `running`: a daemon already runs, so the
/// resources that it uses are not a problem.
#[must_use]
pub fn problems(config: &Config, running: bool) -> Vec<Problem> {
    let stopped = if running { &[] } else { CHECKS_WHILE_STOPPED };
    CHECKS.iter().chain(stopped).flat_map(|check| check(config)).collect()
}

/// The same before an actual start. If a daemon already runs, that is the only problem: its ports are in use.
///
/// # Errors
/// [`Blocked`], with all problems.
pub fn pass(config: &Config) -> Result<(), Blocked> {
    let problems = match another(config) {
        Some(another) => vec![another],
        None => problems(config, false),
    };
    if problems.is_empty() { Ok(()) } else { Err(Blocked(problems)) }
}

/// Whether another daemon has locked the socket. It is not contacted, because the lock alone decides.
pub(crate) fn another(config: &Config) -> Option<Problem> {
    let socket = config.server.admin_socket();
    let lock = File::open(admin::lock_file(&socket)).ok()?;
    let held = matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock));
    held.then(|| {
        let what = admin::AdminError::Taken { path: socket }.to_string();
        Problem { check: "socket", what, remedy: "or give this one a state folder and ports of its own".to_owned() }
    })
}

/// Whether this is a pipe or a device. Such files are not read here, because the content could be read only once.
fn is_pipe(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

/// Every member has a PIN, and other users cannot read the file.
fn pins(config: &Config) -> Vec<Problem> {
    let readable = config.hsm.iter().filter(|hsm| !hsm.pin.file().is_some_and(is_pipe));
    let problem = |error: PinError| {
        let remedy = match &error {
            PinError::File { source: FileError::Exposed { .. }, .. } => {
                "then change the PIN, which others may have read"
            }
            _ => "without its PIN the HSM does not serve",
        };
        Problem { check: "pin", what: error.to_string(), remedy: remedy.to_owned() }
    };
    readable.filter_map(|hsm| hsm.read_pin().err()).map(problem).collect()
}

/// The TLS certificate, key and CA certificates are usable.
fn tls(config: &Config) -> Vec<Problem> {
    let Some(settings) = &config.server.tls else { return Vec::new() };
    let mut files = [&*settings.certificate, &settings.key].into_iter().chain(settings.clients.authorities());
    if files.any(is_pipe) {
        return Vec::new();
    }
    let Err(error) = tls_config(settings) else { return Vec::new() };
    let remedy = match &error {
        TlsError::File(FileError::Exposed { .. }) => "then use a new key, because others may have read this one",
        _ => "a daemon that runs already goes on with the files that it has read",
    };
    vec![Problem { check: "tls", what: error.to_string(), remedy: remedy.to_owned() }]
}

/// The files for etcd can be read, and others cannot read the secrets.
fn etcd(config: &Config) -> Vec<Problem> {
    let Some(etcd) = &config.etcd else { return Vec::new() };
    let secrets = etcd.secret_files().into_iter().filter(|path| !is_pipe(path));
    let secrets = secrets.filter_map(|path| files::read_secret(path, ETCD_FILE).err()).map(|error| error.to_string());
    let public = etcd.public_files().into_iter().filter(|path| !is_pipe(path)).filter_map(|path| {
        let error = files::read(path, ETCD_FILE).err()?;
        Some(error.to_string())
    });
    let problem = |what| Problem { check: "etcd", what, remedy: "see [etcd] in the configuration".to_owned() };
    secrets.chain(public).map(problem).collect()
}

/// If the state folder exists, it is a folder. Otherwise it is created at the start.
fn folder(config: &Config) -> Vec<Problem> {
    let path = &config.server.state;
    if path.metadata().map_or(true, |metadata| metadata.is_dir()) {
        return Vec::new();
    }
    let what = format!("the state folder {} is not a folder", path.display());
    vec![Problem { check: "folder", what, remedy: "move it away, or change server.state".to_owned() }]
}

/// The administrators' sockets can be created.
fn sockets(config: &Config) -> Vec<Problem> {
    let mut found = Vec::new();
    let folder = config.server.sockets();
    for path in [config.server.admin_socket(), config.server.review_socket()] {
        if let Err(error) = admin::check_length(&path) {
            let remedy = "set server.sockets to a folder with a shorter path, such as /run/claviger";
            found.push(Problem { check: "socket", what: error.to_string(), remedy: remedy.to_owned() });
        }
        // A socket of an earlier daemon is replaced; any other file is an error.
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.file_type().is_socket()) {
            let what = format!("{} is in the place of the socket, and is none", path.display());
            found.push(Problem { check: "socket", what, remedy: "move it away".to_owned() });
        }
    }
    // The state folder is created at the start, but this folder is not.
    if config.server.sockets.is_some() && !folder.is_dir() {
        let what = format!("the folder of the sockets {} does not exist", folder.display());
        let remedy = "create it, for the daemon's user alone, or change server.sockets".to_owned();
        found.push(Problem { check: "socket", what, remedy });
    }
    found
}

/// The groups for the sockets exist.
fn groups(config: &Config) -> Vec<Problem> {
    let server = &config.server;
    let named = [("server.admin_group", &server.admin_group), ("server.review_group", &server.review_group)];
    let missing = |(setting, group): (&str, &Option<String>)| {
        let error = process::group_id(group.as_deref()?).err()?;
        let remedy = format!("create the group, or change {setting}");
        Some(Problem { check: "socket", what: format!("{setting}: {error}"), remedy })
    };
    named.into_iter().filter_map(missing).collect()
}

/// The addresses are free.
fn ports(config: &Config) -> Vec<Problem> {
    let server = &config.server;
    let named = [("server.listen", server.listen), ("server.metrics", server.metrics)];
    let mut found: Vec<Problem> =
        named.into_iter().filter_map(|(setting, address)| Some(port(setting, address, &try_bind(address)?))).collect();
    if overlap(server.listen, server.metrics) {
        let what = format!("server.metrics {} takes the same port as server.listen {}", server.metrics, server.listen);
        let remedy = "give one of them another port".to_owned();
        found.push(Problem { check: "port", what, remedy });
    }
    found
}

/// Why this address cannot be bound now, if so. The test socket does not listen, so it does not disturb a daemon that
/// starts at the same moment. The permission for ports below 1024 depends on the user, so it is not checked here.
fn try_bind(address: SocketAddr) -> Option<io::Error> {
    bind_socket(address).err().filter(|error| error.kind() != ErrorKind::PermissionDenied)
}

fn port(setting: &str, address: SocketAddr, error: &io::Error) -> Problem {
    let remedy = match error.kind() {
        ErrorKind::AddrInUse => format!(
            "another program has this port (`ss -ltnp 'sport = :{}'` shows it): stop it, or change {setting}",
            address.port()
        ),
        ErrorKind::AddrNotAvailable => format!("no interface has this address: change {setting}, or wait for it"),
        _ => format!("change {setting}"),
    };
    Problem { check: "port", what: format!("{setting}: cannot listen on {address}: {error}"), remedy }
}

fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let (a, b) = (one.ip(), other.ip());
    // [::] includes IPv4.
    let wide = a.is_unspecified() && (a.is_ipv6() || b.is_ipv4()) || b.is_unspecified() && (b.is_ipv6() || a.is_ipv4());
    one.port() != 0 && one.port() == other.port() && (a == b || wide)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Tls;
    use std::net::TcpListener;
    use std::os::unix::fs::PermissionsExt;

    /// A configuration in which the kernel selects the ports.
    fn config() -> (tempfile::TempDir, Config) {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.state = folder.path().to_owned();
        config.server.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.server.metrics = config.server.listen;
        (folder, config)
    }

    /// Checks that there is exactly one problem, with these words.
    fn only(config: &Config, running: bool, check: &str, words: &[&str]) {
        let found = problems(config, running);
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert!(found.iter().all(|problem| problem.check == check) && !found.is_empty(), "{texts:?}");
        assert!(words.iter().all(|word| texts.iter().any(|text| text.contains(word))), "{words:?} {texts:?}");
    }

    #[test]
    fn each_obstacle_is_named_with_its_remedy() {
        let (folder, good) = config();
        assert_eq!(problems(&good, false), []);
        pass(&good).unwrap();

        let mut config = good.clone();
        config.server.state = folder.path().join("d".repeat(100));
        only(&config, true, "socket", &["107", "admin.sock", "review.sock", "server.sockets"]);
        let text = pass(&config).unwrap_err().to_string();
        assert!(text.contains("admin.sock") && text.contains("also: ") && text.contains("review.sock"), "{text}");
        config.server.sockets = Some(folder.path().to_owned());
        assert_eq!(problems(&config, false), []);
        config.server.sockets = Some(folder.path().join("none"));
        only(&config, true, "socket", &["none does not exist"]);

        let mut config = good.clone();
        config.server.review_group = Some("no such group".to_owned());
        only(&config, true, "socket", &["server.review_group", "no such group"]);
    }

    #[test]
    fn files_that_cannot_be_used_are_named_all_at_once() {
        let (folder, good) = config();
        let write = |name: &str, bytes: &[u8], mode: u32| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let hsm = |name: &str, pin: std::path::PathBuf| {
            let text = format!("[[hsm]]\nname = {name:?}\nmodule = \"m\"\ntoken = \"t\"\npin_file = {pin:?}\n");
            Config::parse(&text, Path::new("/claviger.toml")).unwrap().hsm.remove(0)
        };
        let mut config = good.clone();
        config.hsm = vec![
            hsm("good", write("good.pin", b"1234\n", 0o600)),
            hsm("open", write("open.pin", b"1234\n", 0o644)),
            hsm("wide", write("wide.pin", b"\xff\xfe1\x002\x00", 0o600)),
            hsm("none", folder.path().join("none.pin")),
            hsm("pipe", "/dev/null".into()),
        ];
        only(&config, true, "pin", &["open.pin", "chmod 600", "wide.pin", "UTF-16", "none.pin", "No such file"]);
        assert_eq!(problems(&config, true).len(), 3, "a pipe is not read, it would be empty afterwards");
        let text = pass(&config).unwrap_err().to_string();
        assert!(text.contains("open.pin") && text.contains("also: ") && text.contains("none.pin"), "{text}");

        let mut config = good.clone();
        let [certificate, key] = ["tls.pem", "tls.key"].map(|name| write(name, b"nothing", 0o600));
        config.server.tls = Some(Tls::new(certificate, key));
        only(&config, true, "tls", &["tls.pem", "text without a PEM block"]);

        let mut config = good.clone();
        write("admin.sock", b"precious", 0o600);
        only(&config, true, "socket", &["admin.sock is in the place of the socket"]);
        config.server.state = folder.path().join("admin.sock");
        config.server.sockets = Some(std::env::temp_dir());
        only(&config, true, "folder", &["admin.sock is not a folder"]);
    }

    #[test]
    fn a_port_that_another_program_has_is_named() {
        let (_folder, good) = config();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = other.local_addr().unwrap();
        let mut config = good.clone();
        config.server.metrics = taken;
        only(&config, false, "port", &["server.metrics", &taken.to_string(), "another program has this port"]);
        assert_eq!(problems(&config, true), [], "the daemon that runs has it");
        drop(other);
        assert_eq!(problems(&config, false), []);
        config.server.metrics = SocketAddr::from(([192, 0, 2, 1], 9464));
        only(&config, false, "port", &["server.metrics", "no interface has this address"]);
    }

    #[test]
    fn one_port_for_both_listeners_is_named() {
        let address = |text: &str| text.parse().unwrap();
        for (one, other, expected) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "[::]:80", true),
            ("[::1]:80", "0.0.0.0:80", false),
            ("127.0.0.2:80", "127.0.0.1:80", false),
            ("0.0.0.0:0", "0.0.0.0:0", false),
        ] {
            assert_eq!(overlap(address(one), address(other)), expected, "{one} {other}");
            assert_eq!(overlap(address(other), address(one)), expected, "{other} {one}");
        }
    }
}
