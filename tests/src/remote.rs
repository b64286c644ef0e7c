//! Tokens behind sockets, like network HSMs: a `p11-kit server` for each member, and p11-kit's client in the daemon's
//! workers.
//!
//! A server answers all calls of one connection one after the other, in a process for that connection. The client connects
//! when it is initialised and never reconnects: once the server is gone, every call fails until a fresh worker initialises
//! the client again. Without a server, initialisation succeeds and there are no slots.
//!
//! With several calls in flight the client has a defect: if the connection ends between an answer's header and its data,
//! threads that wait for other answers wait for ever, and the module can never be finalised. The worker must then be
//! killed. Members have two sessions here, so that this case occurs; more sessions would add nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use claviger::config::TokenName;
use rustix::process::{Signal, kill_process_group};

use crate::lab::Lab;
use crate::process::Process;
use crate::tool::tool;
use crate::wait::until;

const PACKAGES: &str = "p11-kit p11-kit-modules";
const CLIENT: &str = "pkcs11/p11-kit-client.so";
const ADDRESS: &str = "P11_KIT_SERVER_ADDRESS";
/// A server without connections ends after this number of seconds, so that no server remains if a test is killed.
const UNUSED: &str = "120";

/// The servers of a lab's members, by member name (`hsm-a` …). They are killed when this is dropped.
pub struct Remote(BTreeMap<String, Server>);

struct Server {
    token: String,
    provider: PathBuf,
    env: BTreeMap<String, String>,
    socket: PathBuf,
    process: Option<Process>,
    mute: Option<UnixListener>,
}

impl Lab {
    /// Puts a server in front of every token, in the configuration. Must be called once, before the lab is served. All
    /// members use the same client library, which has one connection in each worker.
    ///
    /// # Panics
    /// If a server does not start or p11-kit is not installed.
    #[must_use]
    pub fn behind_servers(&self) -> Remote {
        tool(PACKAGES, Command::new("p11-kit").arg("--help"));
        let client = client();
        let folder = self.file("remote");
        fs::create_dir_all(&folder).unwrap();
        let mut servers = BTreeMap::new();
        self.configure(|config| {
            // The servers need the environment of the tokens; the daemon does not.
            let env = std::mem::take(&mut config.env);
            for hsm in &mut config.hsm {
                let socket = folder.join(format!("{}.sock", hsm.name));
                hsm.sessions = 2;
                hsm.env.insert(ADDRESS.to_owned(), format!("unix:path={}", socket.display()));
                let provider = std::mem::replace(&mut hsm.module, client.clone());
                let TokenName::Label(token) = hsm.token.clone() else { panic!("{:?} has no label", hsm.token) };
                let mut server = Server { token, provider, env: env.clone(), socket, process: None, mute: None };
                server.start();
                servers.insert(hsm.name.clone(), server);
            }
        });
        Remote(servers)
    }
}

impl Remote {
    /// Kills a member's server and its connections: nothing accepts new connections.
    pub fn kill(&mut self, member: &str) {
        self.of(member).kill();
    }

    /// Starts a member's server, or restarts it if it runs.
    pub fn restart(&mut self, member: &str) {
        let server = self.of(member);
        server.kill();
        server.start();
    }

    /// Stops a member's server: it no longer answers, but its connections stay open, and new ones can be made.
    pub fn stop(&mut self, member: &str) {
        self.of(member).signal(Signal::STOP);
    }

    /// Continues a member's stopped server.
    pub fn cont(&mut self, member: &str) {
        self.of(member).signal(Signal::CONT);
    }

    /// Replaces a member's server by a program that accepts connections and never answers, until the server is restarted.
    pub fn mute(&mut self, member: &str) {
        let server = self.of(member);
        server.kill();
        let _ = fs::remove_file(&server.socket);
        server.mute = Some(UnixListener::bind(&server.socket).unwrap());
    }

    fn of(&mut self, member: &str) -> &mut Server {
        self.0.get_mut(member).unwrap_or_else(|| panic!("no member {member}"))
    }
}

impl Server {
    fn start(&mut self) {
        let mut command = Command::new("p11-kit");
        command.args(["server", "--foreground", "--timeout", UNUSED, "--provider"]).arg(&self.provider);
        command.arg("--name").arg(&self.socket).arg(format!("pkcs11:token={}", self.token));
        // The server gets its own process group, which includes the processes of its connections.
        self.process = Some(Process::start(command.envs(&self.env).process_group(0)));
        until("a connection to a server", || UnixStream::connect(&self.socket).ok());
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().unwrap_or_else(|| panic!("the server of {} does not run", self.token));
        kill_process_group(process.pid(), signal).unwrap();
    }

    fn kill(&mut self) {
        self.mute = None;
        if let Some(mut process) = self.process.take() {
            // The process was not waited for yet, so its id is not reused.
            let _ = kill_process_group(process.pid(), Signal::KILL);
            process.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn client() -> PathBuf {
    // Debian and its derivatives have a directory for each architecture.
    let folders = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let places = folders.chain(["/usr/lib64", "/usr/lib", "/usr/local/lib"].map(PathBuf::from));
    let found = places.map(|place| place.join(CLIENT)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{CLIENT} is missing: apt-get install {PACKAGES}"))
}
