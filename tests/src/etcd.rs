//! A real etcd cluster (Debian: etcd-server), and a proxy that cuts a daemon off from it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use claviger_client::http::Client;
use tempfile::TempDir;

use crate::process::Process;
use crate::wait::{block, until};

/// The members of one cluster in their own folder, on loopback. They end when this is dropped.
pub struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
}

struct Member {
    process: Option<Process>,
    client: u16,
    peer: u16,
}

/// Unused ports. If another program takes one before the server does, the server says so.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

impl Etcd {
    /// Starts a cluster with this number of members.
    ///
    /// # Panics
    /// If etcd cannot be started.
    #[must_use]
    pub fn start(members: usize) -> Self {
        let member = |_| {
            let [client, peer] = free_ports();
            Member { process: None, client, peer }
        };
        let folder = tempfile::Builder::new().prefix("claviger-etcd-").tempdir().unwrap();
        let mut etcd = Self { folder, members: (0..members).map(member).collect() };
        (0..members).for_each(|member| etcd.begin(member));
        until("etcd has a leader", || etcd.leader());
        etcd
    }

    /// Starts a member, or restarts it with its data.
    ///
    /// # Panics
    /// If etcd is not installed.
    pub fn begin(&mut self, member: usize) {
        let peers = self.members.iter().enumerate();
        let peers: Vec<_> = peers.map(|(at, of)| format!("m{at}=http://127.0.0.1:{}", of.peer)).collect();
        let client = self.endpoint(member);
        let peer = format!("http://127.0.0.1:{}", self.members[member].peer);
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{member}"), "--log-level", "error"]);
        command.arg("--data-dir").arg(self.folder.path().join(format!("m{member}")));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &peers.join(",")]);
        command.args(["--heartbeat-interval", "100", "--election-timeout", "1000"]);
        self.members[member].process = Some(Process::start(&mut command));
    }

    /// The URL of a member.
    #[must_use]
    pub fn endpoint(&self, member: usize) -> String {
        format!("http://127.0.0.1:{}", self.members[member].client)
    }

    /// The URLs of all members.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|member| self.endpoint(member)).collect()
    }

    /// The address of a member.
    #[must_use]
    pub fn address(&self, member: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.members[member].client))
    }

    /// The member that leads now, if one does: etcd's own metrics say so.
    #[must_use]
    pub fn leader(&self) -> Option<usize> {
        (0..self.members.len()).find(|member| {
            let client = Client::new(&self.endpoint(*member)).unwrap().with_timeout(Duration::from_secs(2));
            let page = block(client.get("/metrics"));
            page.is_ok_and(|page| page.body.split(|byte| *byte == b'\n').any(|line| line == b"etcd_server_is_leader 1"))
        })
    }

    /// Kills a member (SIGKILL).
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self, member: usize) {
        self.members[member].process.take().unwrap().kill();
    }

    /// Stops a member (SIGSTOP): it keeps its connections and does not answer.
    ///
    /// # Panics
    /// If it does not run.
    pub fn freeze(&self, member: usize) {
        self.members[member].process.as_ref().unwrap().freeze();
    }

    /// Continues a member after [`freeze`](Self::freeze).
    ///
    /// # Panics
    /// If it does not run.
    pub fn thaw(&self, member: usize) {
        self.members[member].process.as_ref().unwrap().thaw();
    }
}

/// A TCP proxy on loopback that can be cut: then connections stay, and nothing passes.
pub struct Proxy {
    address: SocketAddr,
    /// Odd while it is cut. A connection of an earlier number ends when it is mended.
    cuts: Arc<AtomicU64>,
}

impl Proxy {
    /// Starts a proxy in front of a server. It listens until the test's process ends.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    pub fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, cuts) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
        let of = Arc::clone(&cuts);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let cuts = Arc::clone(&of);
                std::thread::spawn(move || pass(client, server, &cuts));
            }
        });
        Self { address, cuts }
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets nothing pass any more.
    pub fn cut(&self) {
        self.cuts.fetch_or(1, Ordering::SeqCst);
    }

    /// Lets new connections pass again; those that were cut end.
    pub fn mend(&self) {
        self.cuts.fetch_add(1, Ordering::SeqCst);
    }
}

/// Passes bytes in both directions until one side ends, or until a cut is over.
fn pass(client: TcpStream, server: SocketAddr, cuts: &Arc<AtomicU64>) {
    let number = cuts.load(Ordering::SeqCst);
    if number % 2 == 1 {
        // As behind a broken cable: the connection is never answered.
        while cuts.load(Ordering::SeqCst) == number {
            std::thread::sleep(Duration::from_millis(20));
        }
        return;
    }
    let Ok(server) = TcpStream::connect(server) else { return };
    let (Ok(from_client), Ok(to_server)) = (client.try_clone(), server.try_clone()) else { return };
    let other = Arc::clone(cuts);
    let up = std::thread::spawn(move || copy(from_client, to_server, &other, number));
    copy(server, client, cuts, number);
    let _ = up.join();
}

fn copy(mut from: TcpStream, mut to: TcpStream, cuts: &AtomicU64, number: u64) {
    let _ = from.set_read_timeout(Some(Duration::from_millis(20)));
    let mut buffer = [0; 16 * 1024];
    loop {
        match cuts.load(Ordering::SeqCst) {
            now if now == number => {}
            // What arrives meanwhile stays where it is.
            now if now == number + 1 => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            _ => break,
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    for side in [from, to] {
        let _ = side.shutdown(std::net::Shutdown::Both);
    }
}
