//! Tokens behind sockets, as network HSMs are: a `p11-kit server` for each member, and p11-kit's client in the daemon's workers.
//!
//! A server answers all calls of one connection one after the other, in a process of that connection's own. Its client
//! connects when it is initialised and never again by itself: with the server gone every call fails, until a fresh worker
//! initialises it anew. Without a server it initialises all the same, and has no slots.
//!
//! With several calls in flight the client has a fault of its own: when the connection ends between an answer's header and
//! its data, threads that wait for other answers wait for ever, and the module can never be finalised again. Their worker has to
//! be killed. Members have two sessions here, so that this happens; more would gain nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Signal, kill_process_group};

use crate::lab::Lab;
use crate::process::Process;
use crate::tool::tool;
use crate::wait::until;

const PACKAGES: &str = "p11-kit p11-kit-modules";
const CLIENT: &str = "pkcs11/p11-kit-client.so";
const ADDRESS: &str = "P11_KIT_SERVER_ADDRESS";
/// A server that nobody connects to any more ends after so many seconds: should a test be killed, nothing stays behind.
const UNUSED: &str = "120";

/// The servers of a lab's members, by the members' names (`hsm-a` …). They are killed when this is dropped.
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
    /// Puts a server of its own between the daemon and every token, in the configuration; to be called once, before the
    /// lab is served. All members name the same client, which has one connection in each of their workers.
    ///
    /// # Panics
    /// When a server does not come up, or p11-kit is not installed.
    #[must_use]
    pub fn behind_servers(&self) -> Remote {
        tool(PACKAGES, Command::new("p11-kit").arg("--help"));
        let client = client();
        let folder = self.file("remote");
        fs::create_dir_all(&folder).unwrap();
        let mut servers = BTreeMap::new();
        self.configure(|config| {
            // What is for the tokens is the servers' business now.
            let env = std::mem::take(&mut config.env);
            for hsm in &mut config.hsm {
                let socket = folder.join(format!("{}.sock", hsm.name));
                hsm.sessions = 2;
                hsm.env.insert(ADDRESS.to_owned(), format!("unix:path={}", socket.display()));
                let provider = std::mem::replace(&mut hsm.module, client.clone());
                let token = hsm.token.clone().unwrap();
                let mut server = Server { token, provider, env: env.clone(), socket, process: None, mute: None };
                server.start();
                servers.insert(hsm.name.clone(), server);
            }
        });
        Remote(servers)
    }
}

impl Remote {
    /// The machine of a member dies: every connection ends, and nobody takes new ones.
    pub fn kill(&mut self, member: &str) {
        self.of(member).kill();
    }

    /// A member's server starts, anew if it runs.
    pub fn restart(&mut self, member: &str) {
        let server = self.of(member);
        server.kill();
        server.start();
    }

    /// A member's server answers nothing any more, while its connections stay. New ones can be made.
    pub fn stop(&mut self, member: &str) {
        self.of(member).signal(Signal::STOP);
    }

    /// A member's server goes on where it was.
    pub fn cont(&mut self, member: &str) {
        self.of(member).signal(Signal::CONT);
    }

    /// In the place of a member's server there is one that lets everybody connect and never says a word. Until it is
    /// restarted.
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
        // A group of its own, for the processes of its connections.
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
            // Not waited for yet, so the id is still its own.
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
    // Debian and its like have a folder for each architecture.
    let folders = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let places = folders.chain(["/usr/lib64", "/usr/lib", "/usr/local/lib"].map(PathBuf::from));
    let found = places.map(|place| place.join(CLIENT)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{CLIENT} is missing: apt-get install {PACKAGES}"))
}
