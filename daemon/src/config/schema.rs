//! The sections of the file: every setting with its unit, bounds and default.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::hsm::Hsm;
use super::tls::Tls;

/// The whole configuration file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Environment variables that are set before any PKCS#11 module is loaded (vendors' libraries read theirs when
    /// they are loaded). Values are taken as they stand: paths in them are not resolved. Default: none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Addresses, the state folder, and what connections may cost.
    pub server: Server,
    /// The members: one token of one module each. At least one; all hold the same keys.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hsm: Vec<Hsm>,
    /// How releases are queued and timed.
    pub release: Release,
    /// How hosts prove themselves, and what that may cost.
    pub attest: Attest,
    /// How the audit trail is written.
    pub audit: Audit,
    /// How the log is written.
    pub log: Log,
}

/// `[server]`: addresses, the state folder, and what connections may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address and port of `/KeyProtection` and `/Attestation`. Default: `127.0.0.1:8080`.
    pub listen: SocketAddr,
    /// Address and port of `/metrics`, `/live` and `/ready`. To be closed to hosts and tenants: it asks for no password.
    /// Default: `127.0.0.1:9464`.
    pub metrics: SocketAddr,
    /// Folder of `state.db`, `audit.jsonl` and the administrators' socket; made when missing, with mode 0700.
    /// Default: `/var/lib/claviger`.
    pub state: PathBuf,
    /// Folder of `admin.sock` and `review.sock`; it has to be there. Default: none, the state folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sockets: Option<PathBuf>,
    /// Group, by its name in `/etc/group` or its number, that may use `admin.sock` beside root and the daemon's own user.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,
    /// The same for `review.sock`, where nothing can be changed. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub review_group: Option<String>,
    /// Name of this machine in the audit trail: 1 to 64 printable characters of ASCII. Default: none, the host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Most connections that are open at once, 1 to 1,000,000. For one more, the connection that has waited longest for its
    /// client is closed, of the address that has the most. Default: 10,000.
    pub max_connections: usize,
    /// Most connections of one address, or of one /64 network of IPv6, 0 to 1,000,000; 0 is no limit. Beyond, that address's
    /// longest-waiting connection is closed for the new one; only where the service works for all of them the new one is.
    /// Default: 4,096, as many as releases may wait for their turn: hosts behind a load balancer or a NAT, which share an
    /// address, do not come near it, and no address can take all places.
    pub max_connections_per_address: usize,
    /// Milliseconds for a TLS handshake, to the first byte of a new connection, and from a request's first byte to the end of
    /// its header; 1 to 600,000. Default: 10,000.
    pub header_timeout_ms: u64,
    /// Milliseconds in which a request's whole body has to arrive, 1 to 600,000. Default: 15,000.
    pub body_timeout_ms: u64,
    /// Bytes a second that a request's body has to arrive with, from its sixth second on, 0 to 1,000,000,000; 0 asks for
    /// nothing. Default: 4,096.
    pub body_rate: u64,
    /// MiB of memory for the bodies of requests and the work on them, three bytes for each byte of a body, 64 to 1,048,576.
    /// A quarter is kept for bodies up to 64 KiB, an eighth is all that one connection gets. Default: 512.
    pub body_memory_mib: u64,
    /// The same for all connections of one address, or of one /64 network of IPv6; 0 is no limit. Default: 384, three
    /// quarters: enough for as many releases as may wait where all hosts share the address of a load balancer or a NAT, and
    /// a quarter that no address can take from the others.
    pub body_memory_per_address_mib: u64,
    /// Milliseconds that a connection may stay open with no request in progress, 1 to 3,600,000. Default: 75,000.
    pub idle_timeout_ms: u64,
    /// Milliseconds that a stopping daemon waits for the requests in progress, 1 to 600,000. Default: 30,000.
    pub drain_timeout_ms: u64,
    /// Requests a second of one address (IPv6: of one /64 network) that may be refused before their sender is known as a
    /// host, 0 to 1,000,000: with a broken body, without a valid health certificate, with an unknown host key or a wrong
    /// signature. Large ones count several times. Beyond, the address is served only as far as a valid health certificate
    /// or the signature of an attestation proves a host. What hosts do right is not charged, so any number of them may share the
    /// address of a load balancer or a NAT. 0 is no limit. Default: 500.
    pub stranger_rate: u32,
    /// As many at once, above that rate, 1 to 1,000,000. Default: 10,000.
    pub stranger_burst: u32,
    /// Documents a second that one address (IPv6: one /64 network) may ask for, 0 to 1,000,000: the metadata, the signing
    /// certificates, and whatever else is answered without a look at who asks. Beyond, they get 429, and `GetInfo` is answered
    /// a moment later. 0 is no limit. Default: 200.
    pub document_rate: u32,
    /// As many at once, above that rate, 1 to 1,000,000. Default: 4,096.
    pub document_burst: u32,
    /// Percent of the processors' time that connections of one address (IPv6: one /64 network) may take on which no host has
    /// proved itself, 0 to 100; all addresses together may take twice as much. Beyond, these connections wait, and take turns.
    /// A second of all processors is free, and what a connection took is given back when a host proves itself on it. 0 is no
    /// limit. Default: 5.
    pub unproven_time_percent: u32,
    /// Certificate and key for TLS on `listen`. Default: none, plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            metrics: SocketAddr::from(([127, 0, 0, 1], 9464)),
            state: PathBuf::from("/var/lib/claviger"),
            sockets: None,
            admin_group: None,
            review_group: None,
            node: None,
            max_connections: 10_000,
            max_connections_per_address: 4_096,
            header_timeout_ms: 10_000,
            body_timeout_ms: 15_000,
            body_rate: 4_096,
            body_memory_mib: 512,
            body_memory_per_address_mib: 384,
            idle_timeout_ms: 75_000,
            drain_timeout_ms: 30_000,
            stranger_rate: 500,
            stranger_burst: 10_000,
            document_rate: 200,
            document_burst: 4_096,
            unproven_time_percent: 5,
            tls: None,
        }
    }
}

impl Server {
    /// [`Server::header_timeout_ms`] as a duration.
    pub fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }

    /// [`Server::body_timeout_ms`] as a duration.
    pub fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }

    /// [`Server::idle_timeout_ms`] as a duration.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }

    /// [`Server::drain_timeout_ms`] as a duration.
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.drain_timeout_ms)
    }

    /// The name of this machine in the audit trail.
    pub fn node(&self) -> String {
        let host_name = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.node.clone().unwrap_or_else(host_name)
    }

    /// Where the database of hosts, certificates and attestation signers is.
    pub fn state_db(&self) -> PathBuf {
        self.state.join("state.db")
    }

    /// Where the audit trail is.
    pub fn audit_file(&self) -> PathBuf {
        self.state.join("audit.jsonl")
    }

    /// Where the administrators' socket is.
    pub fn admin_socket(&self) -> PathBuf {
        self.sockets().join("admin.sock")
    }

    /// Where the socket is that only reads.
    pub fn review_socket(&self) -> PathBuf {
        self.sockets().join("review.sock")
    }

    /// The folder of the sockets.
    pub fn sockets(&self) -> &Path {
        self.sockets.as_ref().unwrap_or(&self.state)
    }
}

/// `[release]`: how releases are queued and timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Release {
    /// Milliseconds within which a release is answered, one way or the other; 1 to 600,000. Default: 5,000.
    pub deadline_ms: u64,
    /// Milliseconds after which a call into an HSM counts as hung: its member is closed, and what waited there goes
    /// elsewhere; 10 to 60,000. Well above what the slowest HSM takes under load. Default: 1,000.
    pub watchdog_ms: u64,
    /// Most operations that a free session takes from its member's queue at once, 1 to 1,024; never more than its fair
    /// share of what waits. Default: 16.
    pub batch: usize,
    /// Most releases that wait for their turn, of all hosts together, 1 to 1,000,000. When they are that many, the host
    /// with the most of them is refused. Default: 4,096.
    pub queue: usize,
    /// Most releases that run at the same time, 0 to 100,000; the others wait. Default: 0, which is twice the sessions of
    /// all members, and at least 16.
    pub concurrency: usize,
    /// Releases a second that one host may ask for from one address (IPv6: from one /64 network) in the long run, 0 to
    /// 1,000,000; more are refused at once. A protector that takes much more work than usual, or was decrypted again and
    /// again before it was refused, counts as several; a host may come to owe them. 0 is no limit. Default: 100.
    pub host_rate: u32,
    /// Releases that one host may ask for at once, above its rate, 1 to 1,000,000. Default: 2,048. Hyper-V runs at most
    /// 1,024 virtual machines on a host: after a power cut each may start, and start once more.
    pub host_burst: u32,
    /// Releases a second, of one host from one address, that may fail before anything is decrypted without being counted
    /// against `host_rate`, 0 to 1,000,000: they cost no HSM. 0 is no limit. Default: 500.
    pub refused_rate: u32,
    /// As many at once, above that rate, 1 to 1,000,000. Default: 2,048.
    pub refused_burst: u32,
    /// Starts of a machine for which a host may keep what a release gave it, without asking again, 0 to 1,000. As long as
    /// they last, disabling the host has no effect on that machine. Default: 0, a host asks every time.
    pub max_offline_unwraps: u32,
    /// Mebibytes of memory for egress protectors that are made ahead while sessions of the HSMs are idle, so that a release in a
    /// storm takes one operation of an HSM instead of two; 0 to 65,536. An item takes some 2.5 KiB and is made anew every 8 to 10
    /// minutes. 0 makes none ahead. Default: 64.
    pub stock_mib: u64,
}

impl Default for Release {
    fn default() -> Self {
        Self {
            deadline_ms: 5_000,
            watchdog_ms: 1_000,
            batch: 16,
            queue: 4_096,
            concurrency: 0,
            host_rate: 100,
            host_burst: 2_048,
            refused_rate: 500,
            refused_burst: 2_048,
            max_offline_unwraps: 0,
            stock_mib: 64,
        }
    }
}

impl Release {
    /// [`Release::deadline_ms`] as a duration.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }

    /// [`Release::stock_mib`] in bytes.
    pub fn stock_bytes(&self) -> usize {
        usize::try_from(self.stock_mib).unwrap_or(usize::MAX).saturating_mul(1024 * 1024)
    }

    /// [`Release::watchdog_ms`] as a duration.
    pub fn watchdog(&self) -> Duration {
        Duration::from_millis(self.watchdog_ms)
    }
}

/// How hosts prove themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttestMode {
    /// By a registered host key.
    #[default]
    HostKey,
    /// By their TPM: what they booted.
    Tpm,
}

/// `[attest]`: how hosts prove themselves, and what that may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Attest {
    /// What hosts attest with: `"host-key"`, or `"tpm"`, where they prove by their TPM that they booted what an administrator
    /// accepted as a baseline. In TPM mode the health certificates of host-key mode open nothing. Default: `"host-key"`.
    pub mode: AttestMode,
    /// Folder with the root certificates of TPM makers, PEM or DER, which the certificates of endorsement keys have to lead
    /// to when hosts are registered by them. Every certificate in it is trusted. Default: none, and no host can be registered
    /// by such a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_roots: Option<PathBuf>,
    /// Attestations a second that one host may ask for from one address (IPv6: from one /64 network) in the long run, 0 to
    /// 1,000,000; more are refused at once. A host attests when it starts, and once in eight hours. 0 is no limit.
    /// Default: 5.
    pub host_rate: u32,
    /// Attestations that one host may ask for at once, above its rate, 1 to 1,000,000. Default: 1,000.
    pub host_burst: u32,
    /// Most health certificates that are signed at the same time, 0 to 100,000; the others wait, hosts taking turns, so
    /// that attestations never take the HSMs from releases. Default: 0, which is one for each eight sessions of all members,
    /// and at least 1.
    pub concurrency: usize,
}

impl Default for Attest {
    fn default() -> Self {
        Self { mode: AttestMode::HostKey, vendor_roots: None, host_rate: 5, host_burst: 1_000, concurrency: 0 }
    }
}

/// `[audit]`: how the audit trail is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Whether every group of lines is forced to the disk (`fdatasync`) before its releases are answered. Without
    /// it a line survives the end of the process but not the loss of power. Default: false.
    pub sync: bool,
    /// MiB of the disk that are allocated ahead, in `audit.reserve` beside the trail, 0 to 65,536: when the disk is full,
    /// they are given to the lines of grants and of administrators' changes, and refusals have none. 0: no reserve.
    /// Default: 16.
    pub reserve_mib: u64,
    /// Lines after which an HSM signs the trail, with the primary signing key, 1 to 10,000,000. Default: 10,000.
    pub checkpoint_lines: u64,
    /// Seconds after the first line that is not signed until an HSM signs it, 1 to 86,400. 0: the trail is never signed.
    /// Default: 60.
    pub checkpoint_seconds: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { sync: false, reserve_mib: 16, checkpoint_lines: 10_000, checkpoint_seconds: 60 }
    }
}

impl Audit {
    /// [`Audit::reserve_mib`] in bytes.
    pub fn reserve(&self) -> u64 {
        self.reserve_mib * 1024 * 1024
    }

    /// After how many lines, and after how long, the trail is signed; `None`: never.
    pub fn checkpoints(&self) -> Option<(u64, Duration)> {
        (self.checkpoint_seconds > 0).then(|| (self.checkpoint_lines, Duration::from_secs(self.checkpoint_seconds)))
    }
}

/// `[log]`: how the log is written, which goes to the standard error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `text`, or `json`: an object on a line. Default: `text`.
    pub format: LogFormat,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines: a JSON object on a line.
    Json,
}
