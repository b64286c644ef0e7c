//! A real etcd server for tests (Debian: etcd-server).
#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::settings::EtcdSettings;

/// The members of one cluster in their own folder, on loopback. They end when this value is dropped.
pub(crate) struct Server {
    folder: tempfile::TempDir,
    members: Vec<Member>,
    /// Additional arguments of all members.
    arguments: Vec<String>,
    scheme: &'static str,
}

struct Member {
    child: Option<Child>,
    client: u16,
    peer: u16,
}

/// Unused ports. If another program takes one before the server does, the server reports it.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::of(1, Vec::new(), "http")
    }

    /// Starts a cluster with this number of members.
    pub(super) fn cluster(members: usize) -> Self {
        Self::of(members, Vec::new(), "http")
    }

    /// Starts one member with TLS and additional arguments.
    pub(super) fn with_tls(arguments: Vec<String>) -> Self {
        Self::of(1, arguments, "https")
    }

    fn of(members: usize, arguments: Vec<String>, scheme: &'static str) -> Self {
        let members = (0..members)
            .map(|_| {
                let [client, peer] = free_ports();
                Member { child: None, client, peer }
            })
            .collect();
        let mut server = Self { folder: tempfile::tempdir().unwrap(), members, arguments, scheme };
        (0..server.members.len()).for_each(|member| server.begin(member));
        (0..server.members.len()).for_each(|member| server.wait(member));
        server
    }

    /// Starts a member, or restarts it with its data.
    pub(super) fn begin(&mut self, member: usize) {
        let peers = self.members.iter().enumerate();
        let peers: Vec<_> = peers.map(|(at, of)| format!("m{at}=http://127.0.0.1:{}", of.peer)).collect();
        let of = &self.members[member];
        let client = format!("{}://127.0.0.1:{}", self.scheme, of.client);
        let peer = format!("http://127.0.0.1:{}", of.peer);
        let child = Command::new("etcd")
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{member}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            // The least work for a password; the default takes a tenth of a second for each login.
            .args(["--bcrypt-cost", "4"])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd cannot be started; install etcd-server");
        self.members[member].child = Some(child);
    }

    fn wait(&mut self, member: usize) {
        let start = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.members[member].client)).is_err() {
            let child = self.members[member].child.as_mut().unwrap();
            assert!(child.try_wait().unwrap().is_none(), "etcd has ended");
            assert!(start.elapsed() < Duration::from_secs(60), "etcd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The settings for connecting to it.
    pub(crate) fn settings(&self, prefix: &str) -> EtcdSettings {
        let endpoint = |member: &Member| format!("{}://127.0.0.1:{}", self.scheme, member.client);
        EtcdSettings {
            endpoints: self.members.iter().map(endpoint).collect(),
            prefix: prefix.to_owned(),
            ca: None,
            identity: None,
            user: None,
            node: "test".to_owned(),
            max_staleness: Duration::from_secs(300),
        }
    }

    pub(super) fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.members[member].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops a member, so that it keeps its connections but does not answer, or continues it.
    pub(super) fn stop(&self, member: usize, stop: bool) {
        let signal = if stop { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT };
        let id = self.members[member].child.as_ref().unwrap().id();
        let id = rustix::process::Pid::from_raw(id.try_into().unwrap()).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }
}
