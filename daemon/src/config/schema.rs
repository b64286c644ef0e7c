//! The sections of the file: every setting with its unit, bounds and default.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::etcd::Etcd;
use super::hsm::Hsm;
use super::tls::Tls;

/// The whole configuration file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Environment variables that are set before any PKCS#11 module is loaded, because vendors' libraries read them
    /// when they are loaded. Values are used unchanged: paths in them are not resolved. Default: none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Addresses, the state folder, and limits of connections.
    pub server: Server,
    /// The members: one token of one module each. At least one; all have the same keys.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hsm: Vec<Hsm>,
    /// Queueing and time limits of releases.
    pub release: Release,
    /// The mode of attestation and its limits.
    pub attest: Attest,
    /// The state that several nodes share. Default: none, the state is in `server.state`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd: Option<Etcd>,
    /// The audit trail.
    pub audit: Audit,
    /// The log.
    pub log: Log,
}

/// `[server]`: addresses, the state folder, and limits of connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address and port of `/KeyProtection` and `/Attestation`. Default: `127.0.0.1:8080`.
    pub listen: SocketAddr,
    /// Address and port of `/metrics`, `/live` and `/ready`. It needs no password, so hosts and tenants must not
    /// reach it. Default: `127.0.0.1:9464`.
    pub metrics: SocketAddr,
    /// Whether `/live` and `/ready` are also answered on `listen`, for load balancers that cannot reach `metrics`.
    /// Default: false.
    pub probes: bool,
    /// Folder of `state.db`, `audit.jsonl` and the administrators' sockets; created with mode 0700 if it is missing.
    /// Default: `/var/lib/claviger`.
    pub state: PathBuf,
    /// Folder of `admin.sock` and `review.sock`; it must exist. Default: the state folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sockets: Option<PathBuf>,
    /// Group (name in `/etc/group`, or number) that may use `admin.sock` in addition to root and the daemon's own
    /// user. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,
    /// The same for `review.sock`, which allows no changes. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub review_group: Option<String>,
    /// Name of this machine in the audit trail, and of this node in etcd: 1 to 64 printable ASCII characters. Default:
    /// the host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Most open connections, 1 to 1,000,000. For another one, a connection of the address with the most connections
    /// is closed: the one that has waited longest for its client. Default: 10,000.
    pub max_connections: usize,
    /// Most connections of one address (IPv6: of one /64 network), 0 to 1,000,000; 0 is no limit. For another one,
    /// the connection of that address that has waited longest for its client is closed; if all have work in progress,
    /// the new one is closed. Default: 4,096, the number of releases that may wait for their turn: hosts that share
    /// an address behind a load balancer or NAT stay below it, and no address can take all places.
    pub max_connections_per_address: usize,
    /// Time limit in milliseconds for a TLS handshake, for the first byte of a new connection, and from a request's
    /// first byte to the end of its header; 1 to 600,000. Default: 10,000.
    pub header_timeout_ms: u64,
    /// Time limit in milliseconds for a request's whole body, 1 to 600,000. Default: 15,000.
    pub body_timeout_ms: u64,
    /// Minimum speed of a request's body in bytes per second, from its sixth second on, and of its reply, beyond
    /// `idle_timeout_ms`; 0 to 1,000,000,000; 0 is no minimum. Default: 4,096.
    pub body_rate: u64,
    /// Memory in MiB for request bodies and their processing (three bytes for each byte of a body), 64 to 1,048,576.
    /// A quarter is reserved for bodies up to 64 KiB; one connection gets at most an eighth. Default: 512.
    pub body_memory_mib: u64,
    /// The same for all connections of one address (IPv6: of one /64 network), 0 to 1,048,576; 0 is no limit. Default: 384, three
    /// quarters: enough for all waiting releases if all hosts share the address of a load balancer or NAT, and one
    /// address cannot use the last quarter.
    pub body_memory_per_address_mib: u64,
    /// Milliseconds that a connection may stay open without a request in progress, or while its client reads nothing of
    /// its reply; 1 to 3,600,000. Default: 75,000.
    pub idle_timeout_ms: u64,
    /// Milliseconds that a stopping daemon waits for requests in progress, 1 to 600,000. Default: 30,000.
    pub drain_timeout_ms: u64,
    /// Requests per second of one address (IPv6: of one /64 network) that may be refused before their sender is
    /// identified as a host, 0 to 1,000,000: with an invalid body, without a valid health certificate, with an
    /// unknown host key or a wrong signature. Large requests count several times. Beyond this rate, the address is
    /// served only if a valid health certificate or the signature of an attestation identifies a host. Successful
    /// requests are not charged, so any number of hosts may share the address of a load balancer or NAT. 0 is no
    /// limit. Default: 500.
    pub stranger_rate: u32,
    /// Burst above that rate, 1 to 1,000,000. Default: 10,000.
    pub stranger_burst: u32,
    /// Documents per second for one address (IPv6: for one /64 network), 0 to 1,000,000: the metadata, the signing
    /// certificates, and all other replies that do not depend on the sender. Beyond this rate, requests get 429, and
    /// the reply of `GetInfo` is delayed. 0 is no limit. Default: 200.
    pub document_rate: u32,
    /// Burst above that rate, 1 to 1,000,000. Default: 4,096.
    pub document_burst: u32,
    /// Limit of processor time, in percent of all processors, for connections of one address (IPv6: of one /64
    /// network) on which no host has proved itself, 0 to 100; all addresses together may use twice as much. Beyond
    /// this limit, these connections wait and take turns, and at most four requests of HTTP/2 begin in a turn. There is
    /// a burst of one second of all processors, and when a host proves itself on a connection, the connection's time
    /// is given back. 0 is no limit. Default: 5.
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
            probes: false,
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

    /// Path of the database of hosts, certificates and attestation signers.
    pub fn state_db(&self) -> PathBuf {
        self.state.join("state.db")
    }

    /// Path of the audit trail.
    pub fn audit_file(&self) -> PathBuf {
        self.state.join("audit.jsonl")
    }

    /// Path of the administrators' socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.sockets().join("admin.sock")
    }

    /// Path of the read-only socket.
    pub fn review_socket(&self) -> PathBuf {
        self.sockets().join("review.sock")
    }

    /// The folder of the sockets.
    pub fn sockets(&self) -> &Path {
        self.sockets.as_ref().unwrap_or(&self.state)
    }
}

/// `[release]`: queueing and time limits of releases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Release {
    /// Time limit in milliseconds for answering a release, with keys or an error; 1 to 600,000. Default: 5,000.
    pub deadline_ms: u64,
    /// Milliseconds after which an HSM call counts as hanging: its member goes down, and the calls that wait there go
    /// to other members; 10 to 60,000. It should be well above the time of the slowest HSM under load. Default:
    /// 1,000.
    pub watchdog_ms: u64,
    /// Most operations that a free session takes from its member's queue at once, 1 to 1,024; never more than its fair
    /// share of what waits. Default: 16.
    pub batch: usize,
    /// Most releases that wait for their turn, of all hosts together, 1 to 1,000,000. If the queue is full, the host
    /// with the most waiting releases loses one. Attestations, and senders that are not known yet, have queues of the
    /// same length. Default: 4,096.
    pub queue: usize,
    /// Most releases that run at the same time, 0 to 100,000; the others wait. Default: 0, which means twice the
    /// sessions of all members, and at least 16.
    pub concurrency: usize,
    /// Average releases per second of one host at one address (IPv6: at one /64 network), 0 to 1,000,000; further
    /// ones are refused at once. A protector that needs much more work than usual, or was decrypted repeatedly before
    /// it was refused, counts as several; a host may go into debt for them. 0 is no limit. Default: 100.
    pub host_rate: u32,
    /// Burst of releases of one host above its rate, 1 to 1,000,000. Default: 2,048. Hyper-V runs at most 1,024
    /// virtual machines on a host: after a power failure each may start, and start once more.
    pub host_burst: u32,
    /// Releases per second of one host at one address that may fail before any decryption without counting against
    /// `host_rate`, 0 to 1,000,000: they cost no HSM time. 0 is no limit. Default: 500.
    pub refused_rate: u32,
    /// Burst above that rate, 1 to 1,000,000. Default: 2,048.
    pub refused_burst: u32,
    /// Number of starts of a machine for which a host may keep the keys of a release without a new release, 0 to
    /// 1,000. Until then, disabling the host has no effect on that machine. Default: 0, a release for every start.
    pub max_offline_unwraps: u32,
    /// Memory in MiB for egress protectors that are made in advance while HSM sessions are idle, so that a release in
    /// a storm needs one HSM operation instead of two; 0 to 65,536. An item has about 2.5 KiB and is replaced every 8
    /// to 10 minutes. 0 is off. Default: 64.
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

/// The mode of attestation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttestMode {
    /// Hosts prove possession of a registered host key.
    #[default]
    HostKey,
    /// Hosts prove their boot with their TPM.
    Tpm,
}

/// `[attest]`: the mode of attestation and its limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Attest {
    /// How hosts attest: `"host-key"`, or `"tpm"`, in which hosts prove with their TPM that their boot matches an
    /// accepted baseline. In TPM mode, health certificates of host-key mode are rejected. Default: `"host-key"`.
    pub mode: AttestMode,
    /// Folder with the root certificates of TPM vendors, PEM or DER. A host can be registered by its endorsement key
    /// certificate only if a chain leads to one of them. Every certificate in the folder is trusted. Default: none,
    /// so no host can be registered by such a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_roots: Option<PathBuf>,
    /// Average attestations per second of one host at one address (IPv6: at one /64 network), 0 to 1,000,000; further
    /// ones are refused at once. A host attests when it starts, and every eight hours. 0 is no limit. Default: 5.
    pub host_rate: u32,
    /// Burst of attestations of one host above its rate, 1 to 1,000,000. Default: 1,000.
    pub host_burst: u32,
    /// Most concurrent signatures of health certificates, 0 to 100,000. Further attestations wait, and hosts take
    /// turns, so that attestations never take the HSMs away from releases. Default: 0, which means one for each eight
    /// sessions of all members, and at least 1.
    pub concurrency: usize,
}

impl Default for Attest {
    fn default() -> Self {
        Self { mode: AttestMode::HostKey, vendor_roots: None, host_rate: 5, host_burst: 1_000, concurrency: 0 }
    }
}

/// `[audit]`: the audit trail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Whether every group of lines is synced to the disk (`fdatasync`) before its releases are answered. Without it,
    /// a line survives the end of the process, but not a power failure. Default: false.
    pub sync: bool,
    /// MiB of disk space that are preallocated in `audit.reserve` next to the trail, 0 to 65,536. When the disk is
    /// full, this space is used for the lines of grants and of administrators' changes; refusals then have no lines.
    /// 0: no reserve. Default: 16.
    pub reserve_mib: u64,
    /// Socket of a syslog daemon or of the journal that gets a copy of each line, such as `/dev/log`. Lines that it does
    /// not take at once are dropped; the file has them. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub syslog: Option<PathBuf>,
    /// Lines after which an HSM signs the trail, with the primary signing key, 1 to 10,000,000. Default: 10,000.
    pub checkpoint_lines: u64,
    /// Seconds after the first unsigned line until an HSM signs the trail, 1 to 86,400. 0: the trail is never signed.
    /// Default: 60.
    pub checkpoint_seconds: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { sync: false, reserve_mib: 16, syslog: None, checkpoint_lines: 10_000, checkpoint_seconds: 60 }
    }
}

impl Audit {
    /// [`Audit::reserve_mib`] in bytes.
    pub fn reserve(&self) -> u64 {
        self.reserve_mib * 1024 * 1024
    }

    /// The number of lines and the time after which the trail is signed; `None`: never.
    pub fn checkpoints(&self) -> Option<(u64, Duration)> {
        (self.checkpoint_seconds > 0).then(|| (self.checkpoint_lines, Duration::from_secs(self.checkpoint_seconds)))
    }
}

/// `[log]`: the log, which goes to standard error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `text`, or `json`: one object per line. Default: `text`.
    pub format: LogFormat,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people.
    #[default]
    Text,
    /// JSON for programs: one object per line.
    Json,
}
