//! What is known of a request: where it came from, and what the audit trail will say of it, filled in while it is worked on.

mod client_certificate;
mod network;

use std::net::IpAddr;
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
    /// The administrator, where it is a command.
    pub by: Option<Peer>,
    /// The address that a release or an attestation came from, as the connection says.
    pub address: Option<IpAddr>,
    /// The certificate that the client showed in its TLS handshake.
    pub client: Option<Arc<ClientCertificate>>,
    /// The registered name of the host, once it is known.
    pub host: Option<String>,
    /// Whether that host is registered and has proved that it is the one.
    pub known: bool,
    /// SHA-256 of the key of the host that a command is about, hexadecimal.
    pub key: Option<String>,
    /// SHA-256 of the host's identity key, hexadecimal.
    pub identity_key: Option<String>,
    /// Serial number of the health certificate that was shown or issued, hexadecimal.
    pub health_serial: Option<String>,
    /// SHA-256 of the ingress protector, hexadecimal.
    pub protector: Option<String>,
    /// SHA-256 of the egress protector, hexadecimal.
    pub egress: Option<String>,
    /// Thumbprint of the encryption certificate of this service's wrapping, hexadecimal.
    pub guardian_key: Option<String>,
    /// Thumbprint of the owner's signing certificate, hexadecimal.
    pub owner: Option<String>,
    /// Thumbprint of the certificate that a command is about, hexadecimal.
    pub certificate: Option<String>,
    /// What a command changes, for people.
    pub change: Option<String>,
    /// The baseline that the host's measurements matched.
    pub baseline: Option<String>,
    /// The policies that the host fails.
    pub failed_policies: Vec<&'static str>,
    /// The private keys that a release used.
    pub keys: Vec<KeyRef>,
    /// The encryption certificate whose key served: the first digits of its thumbprint.
    pub certificate_used: Option<SharedString>,
    /// How long it waited for its turn.
    queued: Option<Duration>,
    /// How long it waited for the HSMs.
    at_hsms: Option<Duration>,
    hsm: Option<String>,
    started: Instant,
    deadline: Instant,
    caller: Caller,
}

/// Whether somebody waits for the answer. By default, nobody goes away.
#[derive(Clone, Debug, Default)]
pub struct Caller(Option<watch::Receiver<bool>>);

/// The caller is there for as long as this is.
#[derive(Debug)]
pub struct Present {
    sender: watch::Sender<bool>,
}

impl Present {
    /// Notes that the caller has closed its side of the connection, which most do that do not want the answer any more.
    pub fn has_closed(&self) {
        self.sender.send_replace(true);
    }
}

impl Caller {
    /// One that is there until the second value is dropped.
    #[must_use]
    pub fn new() -> (Self, Present) {
        let (sender, receiver) = watch::channel(false);
        (Self(Some(receiver)), Present { sender })
    }

    /// Whether the caller has gone away.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|present| present.has_changed().is_err())
    }

    /// Whether the caller has gone away, or has closed its side of the connection.
    #[must_use]
    pub fn may_be_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|present| *present.borrow() || present.has_changed().is_err())
    }

    /// Ends when the caller has gone away, or has closed its side of the connection: then it may still read the answer, but
    /// what others wait for comes first.
    pub async fn left(&mut self) {
        match &mut self.0 {
            // An error is said when the caller has gone away.
            Some(present) => drop(present.wait_for(|closed| *closed).await),
            None => std::future::pending().await,
        }
    }
}

impl Attempt {
    /// A request that arrives now, to be answered within the default time of a release.
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
            caller: Caller::default(),
        }
    }

    /// The same, for a caller that may go away.
    #[must_use]
    pub fn asked_by(self, caller: Caller) -> Self {
        Self { caller, ..self }
    }

    /// The same, sent from `address`.
    #[must_use]
    pub fn sent_from(self, address: Option<IpAddr>) -> Self {
        Self { address, ..self }
    }

    /// The same, from a client with this certificate.
    #[must_use]
    pub fn with_client(self, client: Option<Arc<ClientCertificate>>) -> Self {
        Self { client, ..self }
    }

    /// Sets how long after its arrival the request is answered at the latest.
    pub fn answer_within(&mut self, time: Duration) {
        self.deadline = self.started + time;
    }

    /// An item of this request, numbered from 1, that is decided by itself.
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

    /// The network that it came from.
    #[must_use]
    pub fn network(&self) -> Option<Network> {
        self.address.map(Network::of)
    }

    /// When the request arrived.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Until when the request is answered.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Notes that it waited for its turn since `asked`.
    pub fn waited_for_turn(&mut self, asked: Instant) {
        self.queued = Some(standstill::since(asked));
    }

    /// Notes that it waited for the HSMs since `asked`.
    pub fn waited_for_hsms(&mut self, asked: Instant) {
        self.at_hsms = Some(standstill::since(asked));
    }

    /// How long it has taken until now, and what for.
    #[must_use]
    pub fn spent(&self) -> Spent {
        Spent { total: standstill::since(self.started), queue: self.queued, hsm: self.at_hsms }
    }

    /// Who waits for the answer.
    #[must_use]
    pub fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Notes the protector that came in. Returns its SHA-256.
    pub fn protector(&mut self, file: &[u8]) -> [u8; 32] {
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest::digest(&digest::SHA256, file).as_ref());
        self.protector = Some(HEXLOWER.encode(&sha256));
        sha256
    }

    /// Notes the protector that goes out, by its SHA-256.
    pub fn egress(&mut self, sha256: [u8; 32]) {
        self.egress = Some(HEXLOWER.encode(&sha256));
    }

    /// Notes what a health certificate says; whether its host is still registered, it does not.
    pub fn health(&mut self, claims: &HealthClaims) {
        self.host = Some(claims.host_name.clone());
        self.identity_key = Some(claims.key_sha256.clone());
        self.health_serial = Some(claims.serial.clone());
        self.baseline.clone_from(&claims.baseline);
    }

    /// Notes a member that worked on the request.
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

    /// The audit line, when the request is decided.
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
