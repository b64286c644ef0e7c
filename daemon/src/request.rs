//! The facts about a request: its origin, its deadline, and the fields of its audit record, which are filled in during
//! processing.

mod client_certificate;
mod network;

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use claviger_hsm::{KeyRef, standstill};
use claviger_protocol::health::HealthClaims;
use data_encoding::HEXLOWER;
use metrics::SharedString;
use ring::digest;
use tokio::sync::watch;

use crate::config::Release;
use crate::observe::audit::Entry;
use crate::observe::audit::Peer;
use crate::observe::metrics::Spent;

pub use self::client_certificate::ClientCertificate;
pub use self::network::Network;

/// A request in progress.
#[derive(Debug)]
pub struct Attempt {
    /// The request's id.
    pub request: String,
    /// The administrator, if it is a command.
    pub by: Option<Peer>,
    /// The client's address, from the connection.
    pub address: Option<IpAddr>,
    /// The client's certificate in the TLS handshake.
    pub client: Option<Arc<ClientCertificate>>,
    /// The registered name of the host, once it is known.
    pub host: Option<String>,
    /// Whether the host is registered and has proved its identity.
    pub known: bool,
    /// SHA-256 of the key of the host in a command, hexadecimal.
    pub key: Option<String>,
    /// SHA-256 of the host's identity key, hexadecimal.
    pub identity_key: Option<String>,
    /// Serial number of the presented or issued health certificate, hexadecimal.
    pub health_serial: Option<String>,
    /// SHA-256 of the ingress protector, hexadecimal.
    pub protector: Option<String>,
    /// SHA-256 of the egress protector, hexadecimal.
    pub egress: Option<String>,
    /// Thumbprint of the encryption certificate of this service's wrapping, hexadecimal.
    pub guardian_key: Option<String>,
    /// Thumbprint of the owner's signing certificate, hexadecimal.
    pub owner: Option<String>,
    /// Thumbprint of the certificate in a command, hexadecimal.
    pub certificate: Option<String>,
    /// The change that a command makes, for people.
    pub change: Option<String>,
    /// The baseline that the host matches.
    pub baseline: Option<String>,
    /// The policies that the host does not meet.
    pub failed_policies: Vec<&'static str>,
    /// The private keys that a release used.
    pub keys: Vec<KeyRef>,
    /// The first digits of the thumbprint of the encryption certificate that was used.
    pub certificate_used: Option<SharedString>,
    /// Time spent waiting for its turn.
    queued: Option<Duration>,
    /// Time spent waiting for the HSMs.
    at_hsms: Option<Duration>,
    hsm: Option<String>,
    started: Instant,
    deadline: Instant,
    /// How long its connection had to wait for its turn while the body arrived.
    kept_waiting: Duration,
    caller: Caller,
    /// The memory of its body, if that can be taken away.
    body: Option<Arc<dyn BodyMemory>>,
}

/// The memory of a request's body, which is taken away where memory is short, until it is kept.
pub trait BodyMemory: fmt::Debug + Send + Sync {
    /// Has the memory stay until the request is answered. Returns `false` if it was taken away before.
    fn keep(&self) -> bool;

    /// Completes when the memory is taken away.
    fn taken_away(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// Tells whether the client still waits for the reply. By default it always does.
#[derive(Clone, Debug, Default)]
pub struct Caller(Option<watch::Receiver<bool>>);

/// The client is connected while this value lives.
#[derive(Debug)]
pub struct Present {
    sender: watch::Sender<bool>,
}

impl Present {
    /// Records that the client has closed its side of the connection. Most such clients do not want the reply any more.
    pub fn has_closed(&self) {
        self.sender.send_replace(true);
    }
}

impl Caller {
    /// Creates a caller that is connected until the second value is dropped.
    #[must_use]
    pub fn new() -> (Self, Present) {
        let (sender, receiver) = watch::channel(false);
        (Self(Some(receiver)), Present { sender })
    }

    /// Whether the client has disconnected.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|present| present.has_changed().is_err())
    }

    /// Whether the client has disconnected or closed its side of the connection.
    #[must_use]
    pub fn may_be_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|present| *present.borrow() || present.has_changed().is_err())
    }

    /// Completes when the client has disconnected or closed its side of the connection. In the second case it may still
    /// read the reply, but other requests have priority.
    pub async fn left(&mut self) {
        match &mut self.0 {
            // An error means that the client has disconnected.
            Some(present) => drop(present.wait_for(|closed| *closed).await),
            None => std::future::pending().await,
        }
    }
}

impl Attempt {
    /// A request that arrives now, with the default deadline of a release.
    #[must_use]
    pub fn new(request: String) -> Self {
        let started = standstill::now();
        Self {
            request,
            by: None,
            address: None,
            client: None,
            host: None,
            known: false,
            key: None,
            identity_key: None,
            health_serial: None,
            protector: None,
            egress: None,
            guardian_key: None,
            owner: None,
            certificate: None,
            change: None,
            baseline: None,
            failed_policies: Vec::new(),
            keys: Vec::new(),
            certificate_used: None,
            queued: None,
            at_hsms: None,
            hsm: None,
            started,
            deadline: started + Release::default().deadline(),
            kept_waiting: Duration::ZERO,
            caller: Caller::default(),
            body: None,
        }
    }

    /// Sets the client.
    #[must_use]
    pub fn asked_by(self, caller: Caller) -> Self {
        Self { caller, ..self }
    }

    /// Sets the memory of its body.
    pub fn hold_body_in(&mut self, memory: Arc<dyn BodyMemory>) {
        self.body = Some(memory);
    }

    /// Has the body stay in memory from now on. Returns `false` if its memory was taken away before.
    #[must_use]
    pub fn keep_body(&self) -> bool {
        self.body.as_ref().is_none_or(|memory| memory.keep())
    }

    /// Completes when the memory of the body is taken away.
    pub async fn body_is_gone(&self) {
        match &self.body {
            Some(memory) => memory.taken_away().await,
            None => std::future::pending().await,
        }
    }

    /// Sets the client's address.
    #[must_use]
    pub fn sent_from(self, address: Option<IpAddr>) -> Self {
        Self { address, ..self }
    }

    /// Sets the client's certificate.
    #[must_use]
    pub fn with_client(self, client: Option<Arc<ClientCertificate>>) -> Self {
        Self { client, ..self }
    }

    /// Sets the time from arrival to deadline, without the time for which it was kept waiting.
    pub fn answer_within(&mut self, time: Duration) {
        self.deadline = self.started + time + self.kept_waiting;
    }

    /// Its connection had to wait for its turn for this long while the body arrived. That is no part of the time to the deadline.
    pub fn was_kept_waiting(&mut self, time: Duration) {
        self.kept_waiting += time;
        self.deadline += time;
    }

    /// An item of this request, numbered from 1, which is decided separately.
    #[must_use]
    pub fn item(&self, number: usize) -> Self {
        let caller = self.caller.clone();
        let request = format!("{}.{number}", self.request);
        let (host, known, address) = (self.host.clone(), self.known, self.address);
        let (started, deadline) = (self.started, self.deadline);
        let (identity_key, health_serial) = (self.identity_key.clone(), self.health_serial.clone());
        let baseline = self.baseline.clone();
        Self {
            host,
            known,
            address,
            identity_key,
            health_serial,
            baseline,
            started,
            deadline,
            caller,
            ..Self::new(request)
        }
    }

    /// The client's network.
    #[must_use]
    pub fn network(&self) -> Option<Network> {
        self.address.map(Network::of)
    }

    /// When the request arrived.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The deadline of the request.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Adds the time since `asked` to the wait for its turn.
    pub fn waited_for_turn(&mut self, asked: Instant) {
        self.queued = Some(standstill::since(asked));
    }

    /// Adds the time since `asked` to the wait for the HSMs.
    pub fn waited_for_hsms(&mut self, asked: Instant) {
        self.at_hsms = Some(standstill::since(asked));
    }

    /// The time spent so far, by its parts.
    #[must_use]
    pub fn spent(&self) -> Spent {
        Spent { total: standstill::since(self.started), queue: self.queued, hsm: self.at_hsms }
    }

    /// The client of the request.
    #[must_use]
    pub fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Records the ingress protector. Returns its SHA-256.
    pub fn protector(&mut self, file: &[u8]) -> [u8; 32] {
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest::digest(&digest::SHA256, file).as_ref());
        self.protector = Some(HEXLOWER.encode(&sha256));
        sha256
    }

    /// Records the SHA-256 of the egress protector.
    pub fn egress(&mut self, sha256: [u8; 32]) {
        self.egress = Some(HEXLOWER.encode(&sha256));
    }

    /// Records the claims of a health certificate. Does not check that the host is still registered.
    pub fn health(&mut self, claims: &HealthClaims) {
        self.host = Some(claims.host_name.clone());
        self.identity_key = Some(claims.key_sha256.clone());
        self.health_serial = Some(claims.serial.clone());
        self.baseline.clone_from(&claims.baseline);
    }

    /// Records a member that was used.
    pub fn used(&mut self, member: &str) {
        match &mut self.hsm {
            Some(used) if used.split(',').any(|m| m == member) => {}
            Some(used) => {
                used.push(',');
                used.push_str(member);
            }
            None => self.hsm = Some(member.to_owned()),
        }
    }

    /// The audit record of the decided request.
    #[must_use]
    pub fn entry(&self, event: &str, outcome: &str) -> Entry {
        Entry {
            time: SystemTime::now(),
            request: self.request.clone(),
            event: event.to_owned(),
            api: None,
            by: self.by,
            address: self.address.map(|address| address.to_canonical()),
            host: self.host.clone(),
            proved: self.known,
            key: self.key.clone(),
            identity_key: self.identity_key.clone(),
            health_serial: self.health_serial.clone(),
            outcome: outcome.to_owned(),
            protector: self.protector.clone(),
            egress: self.egress.clone(),
            owner: self.owner.clone(),
            guardian_key: self.guardian_key.clone(),
            certificate: self.certificate.clone(),
            change: self.change.clone(),
            baseline: self.baseline.clone(),
            failed_policies: self.failed_policies.clone(),
            hsm: self.hsm.clone(),
            ms: standstill::since(self.started).as_micros() as f64 / 1e3,
        }
    }
}
