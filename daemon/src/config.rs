//! Every setting of the daemon: its name, unit, bounds and safe default.
//!
//! The configuration is one TOML file. An unknown setting is an error, because a misspelt one would silently leave a
//! default in force. Relative paths are relative to the folder of the file that names them, so a lab can be moved.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger_protocol::pem::{self, TextError};
use serde::{Deserialize, Serialize};
use toml::de::{DeArray, DeTable, DeValue};
use zeroize::Zeroizing;

use claviger_client::files::{self, FileError};

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

/// `[server.tls]`: both files are PEM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server's certificate, then the certificates that lead to a root, in one PEM file.
    pub certificate: PathBuf,
    /// The certificate's private key, PEM (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// The authorities of clients' certificates, PEM. A certificate that a client shows has to lead to one of them.
    /// Default: none, clients are not asked for certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
    /// Whether a client without a certificate is turned away; needs `client_ca`. Default: false.
    #[serde(default)]
    pub client_required: bool,
    /// Whether a client acts only for the host that its certificate names: a DNS name of its subjectAltName, or where it
    /// has none its CN, has to be the host's registered name, without regard to case. With any other health certificate or
    /// host key the client is refused. Needs `client_required`. Default: false.
    #[serde(default)]
    pub client_is_host: bool,
}

impl Tls {
    /// With this certificate and key, and clients that are not asked for certificates.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        let (certificate, key) = (certificate.into(), key.into());
        Self { certificate, key, client_ca: None, client_required: false, client_is_host: false }
    }
}

/// `[[hsm]]`: one member, which is one token of one PKCS#11 module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hsm {
    /// The member's name in logs, metrics and commands: 1 to 64 letters, digits, `.`, `-` or `_`; unique.
    pub name: String,
    /// The vendor's PKCS#11 library. A bare file name, too, is relative to this file's folder.
    pub module: PathBuf,
    /// The token's label. Exactly one of `token` and `serial` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The token's serial number. Exactly one of `token` and `serial` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// File that holds the user PIN; one trailing newline is not part of it. Exactly one of `pin_file` and `pin_env`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin_file: Option<PathBuf>,
    /// Environment variable that holds the user PIN. Exactly one of `pin_file` and `pin_env`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin_env: Option<String>,
    /// Tier: members of the smallest number that can serve are used. Default: 0.
    #[serde(default)]
    pub priority: u32,
    /// Share of the load within its tier, 1 to 1,000. Default: 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// Sessions that are opened on the token, and with them its threads, 1 to 1,024. Default: 8.
    #[serde(default = "eight")]
    pub sessions: usize,
    /// Like the file's `[env]`, for this member's module instance. Default: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

fn eight() -> usize {
    8
}

/// How a member's token is found among the slots of its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenName<'a> {
    /// By its label.
    Label(&'a str),
    /// By its serial number.
    Serial(&'a str),
}

/// Why a member's PIN could not be read. No variant carries any part of the PIN.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The PIN file cannot be read, or others may read it.
    #[error("the PIN of HSM {hsm:?} cannot be read from {source}")]
    File {
        /// The member's name.
        hsm: String,
        /// What is wrong with its `pin_file`.
        source: FileError,
    },
    /// The environment variable is not set.
    #[error("the PIN of HSM {hsm:?} is to come from the environment variable {variable}, which is not set; set it")]
    Unset {
        /// The member's name.
        hsm: String,
        /// Its `pin_env`.
        variable: String,
    },
    /// The place holds no PIN.
    #[error("the PIN of HSM {hsm:?} in {place} is empty; put the user PIN there")]
    Empty {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
    },
    /// What is there is no text.
    #[error("the PIN of HSM {hsm:?} in {place} is {}, and is not tried; {}", source.problem(), source.advice())]
    NotText {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
        /// What it is instead.
        source: TextError,
    },
    /// What is there is more than a PIN.
    #[error("the PIN of HSM {hsm:?} in {place} has several lines, and is not tried; put only the user PIN there")]
    Lines {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
    },
    /// Neither `pin_file` nor `pin_env` is set (a loaded configuration always has one).
    #[error("HSM {hsm:?} has neither `pin_file` nor `pin_env`; set one of them")]
    Unconfigured {
        /// The member's name.
        hsm: String,
    },
}

/// Longest PIN file that is read, in bytes; a longer file is certainly not a PIN.
const PIN_LIMIT: usize = 4096;
/// Longest configuration file that is read, in bytes.
const CONFIG_LIMIT: usize = 1024 * 1024;

impl Hsm {
    /// How the token is found: by label or by serial number. `None` only in a value that was never validated.
    pub fn token_name(&self) -> Option<TokenName<'_>> {
        match (&self.token, &self.serial) {
            (Some(label), None) => Some(TokenName::Label(label)),
            (None, Some(serial)) => Some(TokenName::Serial(serial)),
            _ => None,
        }
    }

    /// Reads the user PIN from where the configuration says it is, without a byte-order mark and its line break. Whatever else
    /// cannot belong to a PIN is an error, because a token counts every wrong one. Blocks on the file.
    ///
    /// # Errors
    /// [`PinError`] when it cannot be read, may be read by others, or is not one line of text.
    pub fn read_pin(&self) -> Result<Zeroizing<String>, PinError> {
        let hsm = || self.name.clone();
        let (bytes, place) = if let Some(path) = &self.pin_file {
            let error = |source| PinError::File { hsm: hsm(), source };
            (files::read_secret(path, PIN_LIMIT).map_err(error)?, path.display().to_string())
        } else if let Some(variable) = &self.pin_env {
            let value =
                std::env::var_os(variable).ok_or_else(|| PinError::Unset { hsm: hsm(), variable: variable.clone() })?;
            (Zeroizing::new(value.into_encoded_bytes()), format!("the environment variable {variable}"))
        } else {
            return Err(PinError::Unconfigured { hsm: hsm() });
        };
        pin_from(&bytes, &self.name, &place)
    }
}

fn pin_from(bytes: &[u8], hsm: &str, place: &str) -> Result<Zeroizing<String>, PinError> {
    let (hsm, place) = (|| hsm.to_owned(), || place.to_owned());
    let text = pem::text(bytes).map_err(|source| PinError::NotText { hsm: hsm(), place: place(), source })?;
    let pin = files::one_line(text).ok_or_else(|| PinError::Lines { hsm: hsm(), place: place() })?;
    if pin.is_empty() {
        return Err(PinError::Empty { hsm: hsm(), place: place() });
    }
    if pin.starts_with(char::is_whitespace) || pin.ends_with(char::is_whitespace) {
        tracing::warn!(
            hsm = hsm(),
            place = place(),
            "the PIN begins or ends with white space, which is taken as a part of it"
        );
    }
    Ok(Zeroizing::new(pin.to_owned()))
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

/// Why a configuration cannot be used: where, which setting, what is wrong with it, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The configuration file.
    pub file: PathBuf,
    /// The line in it, counted from 1, where one is to blame.
    pub line: Option<usize>,
    /// The setting, like `server.listen` or `hsm[1].pin_file` (members are counted from 1).
    pub setting: Option<String>,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(setting) = &self.setting {
            write!(f, ": {setting}")?;
        }
        write!(f, ": {}; {}", self.problem, self.advice)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads, resolves and validates a configuration file. Blocks on the file.
    ///
    /// # Errors
    /// [`ConfigError`] names file, line and setting, and says what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read_text(path, CONFIG_LIMIT).map_err(|error| {
            let (problem, advice) = match error {
                FileError::Io { source, .. } => {
                    (format!("the configuration cannot be read: {source}"), "check the path and who may read it")
                }
                FileError::Text { source, .. } => {
                    (format!("the configuration is {}", source.problem()), source.advice())
                }
                _ => (format!("the configuration is larger than {CONFIG_LIMIT} bytes"), "is it the right file?"),
            };
            ConfigError { file: path.to_owned(), line: None, setting: None, problem, advice: advice.to_owned() }
        })?;
        Self::parse(&text, path)
    }

    /// Like [`Config::load`], of text that is already here; `path` gives the folder and the name for errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| from_toml(&error, text, path))?;
        // An absolute base: a daemon that changes its folder later must not change what the paths mean.
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        config.resolve(absolute.parent().unwrap_or(Path::new("/")));
        config.validate().map_err(|fault| ConfigError {
            file: path.to_owned(),
            line: line_of(text, &fault.steps),
            setting: Some(name_of(&fault.steps)),
            problem: fault.problem,
            advice: fault.advice,
        })?;
        Ok(config)
    }

    /// The configuration as a TOML document; what [`Config::load`] makes of it equals `self` when paths are absolute.
    ///
    /// # Errors
    /// When a value cannot be written as TOML, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    fn resolve(&mut self, folder: &Path) {
        let absolute = |path: &mut PathBuf| *path = folder.join(&*path);
        absolute(&mut self.server.state);
        if let Some(tls) = &mut self.server.tls {
            absolute(&mut tls.certificate);
            absolute(&mut tls.key);
            tls.client_ca.as_mut().map(absolute);
        }
        self.server.sockets.as_mut().map(absolute);
        self.attest.vendor_roots.as_mut().map(absolute);
        for hsm in &mut self.hsm {
            absolute(&mut hsm.module);
            if let Some(pin_file) = &mut hsm.pin_file {
                absolute(pin_file);
            }
        }
    }

    fn validate(&self) -> Result<(), Fault> {
        let server = &self.server;
        let in_server = |key| setting("server", key);
        within(in_server("max_connections"), server.max_connections as u64, 1, 1_000_000)?;
        let per_address = server.max_connections_per_address as u64;
        within(in_server("max_connections_per_address"), per_address, 0, 1_000_000)?;
        within(in_server("body_rate"), server.body_rate, 0, 1_000_000_000)?;
        within(in_server("body_memory_mib"), server.body_memory_mib, 64, 1_048_576)?;
        within(in_server("body_memory_per_address_mib"), server.body_memory_per_address_mib, 0, 1_048_576)?;
        within(in_server("header_timeout_ms"), server.header_timeout_ms, 1, 600_000)?;
        within(in_server("body_timeout_ms"), server.body_timeout_ms, 1, 600_000)?;
        within(in_server("idle_timeout_ms"), server.idle_timeout_ms, 1, 3_600_000)?;
        within(in_server("drain_timeout_ms"), server.drain_timeout_ms, 1, 600_000)?;
        if server.listen == server.metrics && server.listen.port() != 0 {
            return Err(Fault::new(
                in_server("metrics"),
                format!("{} is the address of server.listen, too", server.metrics),
                "give one of them another port",
            ));
        }
        if let Some(tls) = &server.tls
            && tls.client_required
            && tls.client_ca.is_none()
        {
            return Err(Fault::new(
                vec![Step::Key("server".into()), Step::Key("tls".into()), Step::Key("client_required".into())],
                "clients are to show certificates, and nothing says whose".to_owned(),
                "name their authorities in server.tls.client_ca",
            ));
        }
        if let Some(tls) = &server.tls
            && tls.client_is_host
            && !tls.client_required
        {
            return Err(Fault::new(
                vec![Step::Key("server".into()), Step::Key("tls".into()), Step::Key("client_is_host".into())],
                "clients are bound to hosts by their certificates, and need not show one".to_owned(),
                "set server.tls.client_required = true",
            ));
        }
        within(in_server("stranger_rate"), u64::from(server.stranger_rate), 0, 1_000_000)?;
        within(in_server("stranger_burst"), u64::from(server.stranger_burst), 1, 1_000_000)?;
        within(in_server("document_rate"), u64::from(server.document_rate), 0, 1_000_000)?;
        within(in_server("document_burst"), u64::from(server.document_burst), 1, 1_000_000)?;
        within(in_server("unproven_time_percent"), u64::from(server.unproven_time_percent), 0, 100)?;
        let in_attest = |key| setting("attest", key);
        within(in_attest("host_rate"), u64::from(self.attest.host_rate), 0, 1_000_000)?;
        within(in_attest("host_burst"), u64::from(self.attest.host_burst), 1, 1_000_000)?;
        within(in_attest("concurrency"), self.attest.concurrency as u64, 0, 100_000)?;
        let in_release = |key| setting("release", key);
        within(in_release("refused_rate"), u64::from(self.release.refused_rate), 0, 1_000_000)?;
        within(in_release("refused_burst"), u64::from(self.release.refused_burst), 1, 1_000_000)?;
        within(in_release("deadline_ms"), self.release.deadline_ms, 1, 600_000)?;
        within(in_release("watchdog_ms"), self.release.watchdog_ms, 10, 60_000)?;
        within(in_release("batch"), self.release.batch as u64, 1, 1_024)?;
        within(in_release("queue"), self.release.queue as u64, 1, 1_000_000)?;
        within(in_release("concurrency"), self.release.concurrency as u64, 0, 100_000)?;
        within(in_release("host_rate"), u64::from(self.release.host_rate), 0, 1_000_000)?;
        within(in_release("host_burst"), u64::from(self.release.host_burst), 1, 1_000_000)?;
        within(in_release("max_offline_unwraps"), u64::from(self.release.max_offline_unwraps), 0, 1_000)?;
        within(in_release("stock_mib"), self.release.stock_mib, 0, 65_536)?;
        within(setting("audit", "reserve_mib"), self.audit.reserve_mib, 0, 65_536)?;
        within(setting("audit", "checkpoint_lines"), self.audit.checkpoint_lines, 1, 10_000_000)?;
        within(setting("audit", "checkpoint_seconds"), self.audit.checkpoint_seconds, 0, 86_400)?;
        if let Some(node) = &server.node
            && (!(1..=64).contains(&node.len()) || !node.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(Fault::new(
                in_server("node"),
                format!("{node:?} is not a name for a machine"),
                "use 1 to 64 printable characters of ASCII without spaces",
            ));
        }
        environment(&self.env, &[Step::Key("env".into())])?;
        if self.hsm.is_empty() {
            return Err(Fault::new(
                vec![Step::Key("hsm".into())],
                "there is no HSM".to_owned(),
                "add an [[hsm]] section with name, module, token and pin_file",
            ));
        }
        let mut names = BTreeSet::new();
        for (index, hsm) in self.hsm.iter().enumerate() {
            hsm.validate(index)?;
            if !names.insert(hsm.name.to_ascii_lowercase()) {
                return Err(Fault::new(
                    in_hsm(index, "name"),
                    format!("{:?} is the name of another HSM, too", hsm.name),
                    "give every HSM a name of its own",
                ));
            }
        }
        Ok(())
    }
}

impl Hsm {
    fn validate(&self, index: usize) -> Result<(), Fault> {
        let at = |key| in_hsm(index, key);
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if !(1..=64).contains(&self.name.len()) || !self.name.chars().all(plain) {
            return Err(Fault::new(
                at("name"),
                format!("{:?} is not a name for an HSM", self.name),
                "use 1 to 64 letters, digits, '.', '-' or '_'",
            ));
        }
        one_of(&at, ("token", self.token.as_deref()), ("serial", self.serial.as_deref()))?;
        // Only whether a path is there, and not empty, matters here: it need not be UTF-8.
        let pin_file = self.pin_file.as_ref().map(|path| if path.as_os_str().is_empty() { "" } else { "set" });
        one_of(&at, ("pin_file", pin_file), ("pin_env", self.pin_env.as_deref()))?;
        if let Some(name) = &self.pin_env
            && name.contains(['=', '\0'])
        {
            return Err(bad_variable(at("pin_env"), name));
        }
        within(at("weight"), u64::from(self.weight), 1, 1_000)?;
        within(at("sessions"), self.sessions as u64, 1, 1_024)?;
        environment(&self.env, &at("env"))
    }
}

/// A step into the document, to find the line of a setting again.
#[derive(Clone, Debug)]
enum Step {
    /// A setting, or a name that the file chose, like that of an environment variable.
    Key(Cow<'static, str>),
    Index(usize),
}

/// A setting of a section.
fn setting(section: &'static str, key: &'static str) -> Vec<Step> {
    vec![Step::Key(section.into()), Step::Key(key.into())]
}

/// A setting of the `index`-th member.
fn in_hsm(index: usize, key: &'static str) -> Vec<Step> {
    vec![Step::Key("hsm".into()), Step::Index(index), Step::Key(key.into())]
}

/// What validation found, before file and line are known.
struct Fault {
    steps: Vec<Step>,
    problem: String,
    advice: String,
}

impl Fault {
    fn new(steps: Vec<Step>, problem: String, advice: &str) -> Self {
        Self { steps, problem, advice: advice.to_owned() }
    }
}

fn within(steps: Vec<Step>, value: u64, least: u64, most: u64) -> Result<(), Fault> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Fault {
        steps,
        problem: format!("{value} is out of bounds"),
        advice: format!("use a number from {least} to {most}"),
    })
}

fn one_of(
    at: &dyn Fn(&'static str) -> Vec<Step>,
    (first, one): (&'static str, Option<&str>),
    (second, other): (&'static str, Option<&str>),
) -> Result<(), Fault> {
    let advice = format!("set exactly one of `{first}` and `{second}`");
    match (one, other) {
        (Some(""), _) => Err(Fault::new(at(first), "is empty".to_owned(), &advice)),
        (_, Some("")) => Err(Fault::new(at(second), "is empty".to_owned(), &advice)),
        (Some(_), None) | (None, Some(_)) => Ok(()),
        (Some(_), Some(_)) => Err(Fault::new(at(second), format!("`{first}` is set, too"), &advice)),
        (None, None) => Err(Fault::new(at(first), format!("neither `{first}` nor `{second}` is set"), &advice)),
    }
}

fn environment(env: &BTreeMap<String, String>, steps: &[Step]) -> Result<(), Fault> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let mut steps = steps.to_vec();
            steps.push(Step::Key(name.clone().into()));
            return Err(bad_variable(steps, name));
        }
    }
    Ok(())
}

fn bad_variable(steps: Vec<Step>, name: &str) -> Fault {
    Fault::new(
        steps,
        format!("{name:?} cannot be an environment variable"),
        "a name is not empty and has no '='; neither name nor value has a NUL",
    )
}

fn name_of(steps: &[Step]) -> String {
    let mut name = String::new();
    for step in steps {
        match step {
            Step::Index(index) => name.push_str(&format!("[{}]", index + 1)),
            Step::Key(key) if name.is_empty() => name.push_str(key),
            Step::Key(key) => name.push_str(&format!(".{key}")),
        }
    }
    name
}

/// The line of a setting; where it is not written, that of the section it belongs to.
fn line_of(text: &str, steps: &[Step]) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let (mut table, mut array) = (Some(document.get_ref()), None::<&DeArray<'_>>);
    let mut offset = None;
    for step in steps {
        let value = match step {
            Step::Index(index) => {
                let Some(value) = array.and_then(|items| items.get(*index)) else { break };
                offset = Some(value.span().start);
                value
            }
            Step::Key(key) => {
                let entry = table.and_then(|table| table.iter().find(|(name, _)| name.get_ref() == key));
                let Some((name, value)) = entry else { break };
                offset = Some(name.span().start);
                value
            }
        };
        (table, array) = (value.get_ref().as_table(), value.get_ref().as_array());
    }
    Some(line_at(text, offset?))
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The setting that stands at an offset, such as `hsm[2].token`.
fn setting_at(table: &DeTable<'_>, offset: usize, prefix: &str) -> Option<String> {
    let mut best: Option<(usize, String)> = None;
    for (name, value) in table {
        let path = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        let deeper = match value.get_ref() {
            DeValue::Table(inner) => setting_at(inner, offset, &path),
            DeValue::Array(items) => items.iter().enumerate().find_map(|(index, item)| {
                let path = format!("{path}[{}]", index + 1);
                let inner = item.get_ref().as_table().and_then(|inner| setting_at(inner, offset, &path));
                inner.or_else(|| item.span().contains(&offset).then_some(path))
            }),
            _ => None,
        };
        if let Some(deeper) = deeper {
            return Some(deeper);
        }
        let (key, value) = (name.span(), value.span());
        for span in [key, value] {
            // The narrowest span that holds the offset: the span of a section may hold all that follows its header.
            if span.contains(&offset) && best.as_ref().is_none_or(|(length, _)| span.len() < *length) {
                best = Some((span.len(), path.clone()));
            }
        }
    }
    best.map(|(_, path)| path)
}

fn from_toml(error: &toml::de::Error, text: &str, path: &Path) -> ConfigError {
    let problem = error.message().trim().to_owned();
    let offset = error.span().map(|span| span.start);
    let setting = offset.and_then(|offset| setting_at(DeTable::parse(text).ok()?.get_ref(), offset, ""));
    let advice = if problem.starts_with("unknown field") {
        "correct its spelling or remove it"
    } else if problem.starts_with("missing field") {
        "add it to this section"
    } else if problem.starts_with("duplicate") {
        "remove one of the two"
    } else if setting.is_some() {
        "write a value of the kind that is expected"
    } else {
        "correct the TOML at this line"
    };
    ConfigError {
        file: path.to_owned(),
        line: offset.map(|offset| line_at(text, offset)),
        setting,
        problem,
        advice: advice.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LAB: &str = r#"
[env]
SOFTHSM2_CONF = "/lab/softhsm2.conf"

[server]
listen = "127.0.0.1:0"
state = "state"

[server.tls]
certificate = "tls.pem"
key = "/keys/tls.key"

[[hsm]]
name = "hsm-a"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "claviger-a"
pin_file = "a.pin"

[[hsm]]
name = "hsm-b"
module = "libhsm.so"
serial = "0815"
pin_env = "PIN_B"
priority = 1
weight = 3
sessions = 2
env = { HSM_CONF = "b.conf" }

[audit]
sync = true
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/lab/claviger.toml"))
    }

    fn refusal(from: &str, to: &str) -> String {
        assert!(LAB.contains(from), "{from}");
        parse(&LAB.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn reads_settings_defaults_and_relative_paths() {
        let config = parse(LAB).unwrap();
        assert_eq!(config.env["SOFTHSM2_CONF"], "/lab/softhsm2.conf");
        assert_eq!(config.server.state, Path::new("/lab/state"));
        assert_eq!(config.server.metrics, SocketAddr::from(([127, 0, 0, 1], 9464)));
        assert_eq!(config.server.idle_timeout(), Duration::from_secs(75));
        assert_eq!(config.server.tls.as_ref().unwrap().certificate, Path::new("/lab/tls.pem"));
        assert_eq!(config.server.tls.as_ref().unwrap().key, Path::new("/keys/tls.key"));
        let [a, b] = config.hsm.as_slice() else { panic!("two members") };
        assert_eq!((a.priority, a.weight, a.sessions), (0, 1, 8));
        assert_eq!(a.token_name(), Some(TokenName::Label("claviger-a")));
        assert_eq!(a.pin_file.as_deref(), Some(Path::new("/lab/a.pin")));
        assert_eq!(b.token_name(), Some(TokenName::Serial("0815")));
        assert_eq!(b.module, Path::new("/lab/libhsm.so"));
        assert_eq!((b.priority, b.weight, b.sessions), (1, 3, 2));
        assert_eq!(b.env["HSM_CONF"], "b.conf");
        let release = Release { deadline_ms: 5000, batch: 16, queue: 4096, ..Release::default() };
        assert_eq!(config.release, release);
        assert!(config.audit.sync);
    }

    #[test]
    fn what_it_writes_it_reads_again() {
        let config = parse(LAB).unwrap();
        assert_eq!(parse(&config.to_toml().unwrap()).unwrap(), config);
    }

    #[test]
    fn refusals_name_file_line_setting_and_remedy() {
        for (from, to, expected) in [
            ("sync = true", "synk = true", "/lab/claviger.toml:30: audit.synk: unknown field `synk`"),
            ("priority = 1", "priority = -1", "/lab/claviger.toml:24: hsm[2].priority: invalid value"),
            ("weight = 3", "weight = 0", "/lab/claviger.toml:25: hsm[2].weight: 0 is out of bounds; use a number"),
            ("sessions = 2", "sessions = 5000", "/lab/claviger.toml:26: hsm[2].sessions: 5000"),
            ("\"hsm-b\"", "\"HSM-A\"", "/lab/claviger.toml:20: hsm[2].name: \"HSM-A\" is the name of another HSM"),
            ("\"hsm-b\"", "\"hsm b\"", "/lab/claviger.toml:20: hsm[2].name: \"hsm b\" is not a name"),
            ("pin_env = \"PIN_B\"", "", "hsm[2].pin_file: neither `pin_file` nor `pin_env` is set; set exactly one"),
            ("pin_env", "token = \"x\"\npin_env", "/lab/claviger.toml:22: hsm[2].serial: `token` is set, too"),
            ("\"0815\"", "\"\"", "/lab/claviger.toml:22: hsm[2].serial: is empty"),
            ("127.0.0.1:0", "localhost:80", "/lab/claviger.toml:6: server.listen: "),
            ("127.0.0.1:0", "127.0.0.1:9464", "server.metrics: 127.0.0.1:9464 is the address of server.listen, too"),
            ("state =", "header_timeout_ms = 0\nstate =", "/lab/claviger.toml:7: server.header_timeout_ms: 0 is out"),
            ("state =", "body_memory_mib = 63\nstate =", "/lab/claviger.toml:7: server.body_memory_mib: 63 is out"),
            ("state =", "body_rate = -1\nstate =", "/lab/claviger.toml:7: server.body_rate: invalid"),
            ("SOFTHSM2_CONF", "\"A=B\"", "/lab/claviger.toml:3: env.A=B: \"A=B\" cannot be an environment variable"),
            ("[audit]", "[release]\nhost_burst = 0\n[audit]", "/lab/claviger.toml:30: release.host_burst: 0 is out"),
            ("[audit]", "[release]\nhost_rate = -1\n[audit]", "/lab/claviger.toml:30: release.host_rate: invalid"),
            (
                "key = \"/keys/tls.key\"",
                "key = \"/keys/tls.key\"\nclient_required = true",
                "server.tls.client_required: clients are to show certificates, and nothing says whose",
            ),
            ("[audit]", "[log]\nformat = \"xml\"\n[audit]", "log.format"),
            ("[audit]", "[release]\nconcurrency = 100001\n[audit]", "release.concurrency: 100001 is out of bounds"),
            ("[audit]", "[release]\nqueue = 0\n[audit]", "release.queue: 0 is out of bounds"),
            ("[audit]", "[audit", "/lab/claviger.toml:29: "),
            ("module = \"libhsm.so\"\n", "", "missing field `module`; add it"),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(expected), "{message}\nlacks\n{expected}");
        }
        let message = parse("[server]\n").unwrap_err().to_string();
        assert!(message.contains("there is no HSM; add an [[hsm]] section"), "{message}");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("claviger.toml");
        let dos = format!("\u{feff}{}", LAB.replace('\n', "\r\n"));
        std::fs::write(&file, &dos).unwrap();
        assert_eq!(Config::load(&file).unwrap().hsm.len(), 2);
        std::fs::write(&file, dos.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
        let message = Config::load(&file).unwrap_err().to_string();
        assert!(message.contains("the configuration is text in UTF-16") && message.contains("iconv"), "{message}");
        let message = Config::load(Path::new("/nowhere/claviger.toml")).unwrap_err().to_string();
        assert!(message.starts_with("/nowhere/claviger.toml: the configuration cannot be read"), "{message}");
    }

    #[test]
    fn the_pin_is_one_line_of_text_that_only_its_owner_reads() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let mut hsm = parse(LAB).unwrap().hsm.swap_remove(0);
        hsm.pin_file = Some(path.clone());
        let write = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        for (content, expected) in [
            (&b"1234\n"[..], "1234"),
            (b"1234\r\n", "1234"),
            (b" 12 34 ", " 12 34 "),
            (b"\xef\xbb\xbf1234\r\n", "1234"),
        ] {
            write(content);
            assert_eq!(*hsm.read_pin().unwrap(), expected);
        }
        write(b"\xef\xbb\xbf\n");
        assert!(matches!(hsm.read_pin(), Err(PinError::Empty { .. })));
        write(&[0xff]);
        assert!(matches!(hsm.read_pin(), Err(PinError::NotText { source: TextError::NotUtf8, .. })));
        // Tried, each would be counted as a wrong PIN.
        write(b"\xff\xfe1\x002\x00");
        let said = hsm.read_pin().unwrap_err().to_string();
        assert!(said.contains("UTF-16") && said.contains("is not tried"), "{said}");
        write(b"1234\n\n");
        assert!(matches!(hsm.read_pin(), Err(PinError::Lines { .. })));
        write("9".repeat(5000).as_bytes());
        assert!(matches!(hsm.read_pin(), Err(PinError::File { source: FileError::TooLong { .. }, .. })));
        write(b"1234");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let said = hsm.read_pin().unwrap_err().to_string();
        assert!(said.contains("others may read") && said.contains("run: chmod 600"), "{said}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(hsm.read_pin(), Err(PinError::File { .. })));
        (hsm.pin_file, hsm.pin_env) = (None, Some("CLAVIGER_TEST_NO_SUCH_PIN".to_owned()));
        assert!(matches!(hsm.read_pin(), Err(PinError::Unset { .. })));
        // Cargo sets this one for every test.
        hsm.pin_env = Some("CARGO_PKG_NAME".to_owned());
        assert_eq!(*hsm.read_pin().unwrap(), env!("CARGO_PKG_NAME"));
    }
}
