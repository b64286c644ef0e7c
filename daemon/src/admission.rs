//! Back-pressure: which releases and attestations are let in, in which order, and which are told at once to come again.
//!
//! Work that cannot be done in time is not begun, so that under any load the HSMs do only what still helps a host:
//!
//! 1. What was found wrong before its sender was known as a host is charged to the address it came from
//!    (`server.stranger_rate`). Beyond that, an address is served only as far as a health certificate proves a host: 429.
//! 2. A host asks at most as fast as `release.host_rate` and `release.host_burst` say, from each address: 429. So a
//!    stranger who has copied a host's health certificate uses up the rate of its own address only. What fails before
//!    anything is decrypted costs no HSM, and is charged to a bucket of its own first (`release.refused_rate`).
//! 3. At most `release.concurrency` releases run. At most `release.queue` others wait, in one line for each host. Hosts take
//!    turns, and so do the addresses of one host: a host's storm is its own to wait out. In a full queue the longest line
//!    pays: 503.
//! 4. A release that cannot expect to be done within `release.deadline_ms` is not let wait, and one that waited for too long
//!    is not started: 503.
//!
//! Attestations have rates of their own (`[attest]`), and a queue with a small share of the HSMs' sessions. Before a sender is known
//! as a host, expensive work for it waits in a third queue, in which addresses take turns; until then its body gives way where
//! memory is short.
//!
//! A release may be refused early, before it is read, when it is clear already that it would not be let in: refusing
//! is most of what a storm costs.
//!
//! Every refusal says when to try again. The callers are spread over the time that the backlog takes (`returns`).
//! `fair_queue` and the rates decide, as plain values; `turns` does the waiting and the waking.

pub(crate) mod bodies;
mod declined;
mod fair_queue;
mod host_at;
mod lengths;
mod returns;
pub(crate) mod strangers;
mod turns;
mod wait_estimate;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use claviger_protocol::error::Refusal;
use claviger_protocol::work::Work;
use tokio::sync::Semaphore;

use self::declined::whole_seconds;
pub(crate) use self::declined::{Declined, Dropped};
pub(crate) use self::host_at::HostAt;
pub(crate) use self::turns::Permit;
use self::turns::Turns;
use crate::config::Config;
use crate::observe::metrics::{self, Load};
use crate::request::Attempt;
use crate::request::Network;
use crate::sys::rate::Rate;

/// Fewest releases that run at the same time when the number is computed: whatever the tokens, what a release does
/// outside of them is worth overlapping.
const LEAST_CONCURRENCY: usize = 16;

/// Of how many sessions one signs health certificates, where `attest.concurrency` leaves it open.
const SESSIONS_FOR_ONE_ATTESTATION: usize = 8;

/// How long releases are looked at early after one was refused for its rate.
const ALERT: Duration = Duration::from_secs(1);

/// How long an answer is held back that tells a caller it asks too fast. It may come again after a second at the soonest; a
/// caller that asks again as soon as it is answered takes little with so few answers.
const HELD_BACK: Duration = Duration::from_millis(250);

/// Most answers that are held back at the same time; more are given at once.
const MOST_HELD_BACK: usize = 4_096;

/// RSA operations that one token of a bucket covers, those of a usual protector: an owner and three guardians with keys of
/// 4096 bits.
const OPERATIONS_FOR_A_TOKEN: u32 = 32;

/// Bytes that one token covers.
const BYTES_FOR_A_TOKEN: usize = 64 * 1024;

/// The same of strangers: XML that is made to cost takes as long for so many bytes as a signature takes to verify.
const BYTES_FOR_A_STRANGERS_TOKEN: usize = 16 * 1024;

/// Bytes at the beginning of a stranger's body by which it is recognised when it comes again.
const TELLING: usize = 4 * 1024;

/// Lets releases and attestations in.
pub struct Admission {
    limits: ArcSwap<Limits>,
    releases: Turns,
    attestations: Turns,
    strangers: Turns,
    /// When a release was last refused for its rate, in milliseconds since `began`; 0 is never.
    refused: AtomicU64,
    began: Instant,
    held_back: Semaphore,
}

/// What can be changed at any time.
struct Limits {
    hosts: Rate<HostAt>,
    /// What fails before anything is decrypted.
    early: Rate<HostAt>,
    attesting: Rate<HostAt>,
    /// First steps of attestations by TPM, which name a host and prove nothing.
    beginning: Rate<HostAt>,
    strangers: Rate<Network>,
    /// Documents, and answers that need no look at who asks.
    documents: Rate<Network>,
}

impl Limits {
    fn new(config: &Config) -> Self {
        let (release, attest) = (&config.release, &config.attest);
        Self {
            hosts: Rate::new(release.host_rate, release.host_burst),
            early: Rate::new(release.refused_rate, release.refused_burst),
            attesting: Rate::new(attest.host_rate, attest.host_burst),
            beginning: Rate::new(attest.host_rate, attest.host_burst),
            strangers: Rate::new(config.server.stranger_rate, config.server.stranger_burst),
            documents: Rate::new(config.server.document_rate, config.server.document_burst),
        }
    }
}

/// How many releases run at the same time, given the sessions of all members.
#[must_use]
pub(crate) fn concurrency(config: &Config, sessions: usize) -> usize {
    match config.release.concurrency {
        // A release has two operations at the tokens at the same time, so this keeps every session's next one ready.
        0 => sessions.saturating_mul(2).max(LEAST_CONCURRENCY),
        set => set,
    }
}

/// How many attestations may be at the HSMs at the same time.
fn attestation_share(config: &Config, sessions: usize) -> usize {
    match config.attest.concurrency {
        0 => sessions / SESSIONS_FOR_ONE_ATTESTATION,
        set => set,
    }
    .max(1)
}

/// What a request of so many bytes costs of a host's bucket, at least 1.
fn tokens(bytes: usize, work: Work) -> u32 {
    tokens_of(bytes / BYTES_FOR_A_TOKEN, work)
}

fn tokens_of(large: usize, work: Work) -> u32 {
    let bytes = u32::try_from(large).unwrap_or(u32::MAX);
    work.operations().div_ceil(OPERATIONS_FOR_A_TOKEN).max(1).saturating_add(bytes)
}

impl Admission {
    /// For these settings, and members with `sessions` sessions in all.
    #[must_use]
    pub fn new(config: &Config, sessions: usize) -> Self {
        let (queue, patience) = (config.release.queue, config.release.deadline());
        Self {
            limits: ArcSwap::from_pointee(Limits::new(config)),
            releases: Turns::new(concurrency(config, sessions), queue, patience, metrics::queue_dropped),
            attestations: Turns::new(
                attestation_share(config, sessions),
                queue,
                patience,
                metrics::attestation_dropped,
            ),
            // Counted as what they ask for, where they are refused.
            strangers: Turns::new(strangers::concurrency(), queue, patience, |_| {}),
            refused: AtomicU64::new(0),
            began: Instant::now(),
            held_back: Semaphore::new(MOST_HELD_BACK),
        }
    }

    /// Takes new limits: rates, and how many may wait. Those who wait now stay. Where a rate changes, every
    /// caller starts with a full burst.
    pub fn change(&self, config: &Config) {
        let before = self.limits.load();
        let mut limits = Limits::new(config);
        limits.hosts.inherit(&before.hosts);
        limits.early.inherit(&before.early);
        limits.attesting.inherit(&before.attesting);
        limits.beginning.inherit(&before.beginning);
        limits.strangers.inherit(&before.strangers);
        limits.documents.inherit(&before.documents);
        self.limits.store(Arc::new(limits));
        for turns in [&self.releases, &self.attestations, &self.strangers] {
            turns.set_limit(config.release.queue, config.release.deadline());
        }
    }

    /// Takes note of members with `sessions` sessions in all. Those who run go on; who has a turn by this runs at once.
    pub fn resize(&self, config: &Config, sessions: usize) {
        self.releases.set_concurrency(concurrency(config, sessions));
        self.attestations.set_concurrency(attestation_share(config, sessions));
    }

    /// Lets a release in: within its host's rate, and when it is its turn. `asked` is what its caller sends, and sends again
    /// when it comes again.
    ///
    /// # Errors
    /// `TooManyRequestsException`, `ServiceUnavailableException`.
    pub async fn admit(&self, from: &HostAt, attempt: &Attempt, asked: &[u8]) -> Result<Permit, Refusal> {
        self.within_rate(from)?;
        self.turn(from, attempt, asked).await
    }

    /// Whether a host may ask for one more release now; it counts against its rate.
    ///
    /// # Errors
    /// `TooManyRequestsException`.
    pub fn within_rate(&self, from: &HostAt) -> Result<(), Refusal> {
        self.limits.load().hosts.take(from).map_err(|wait| self.too_fast(wait))
    }

    fn too_fast(&self, wait: Duration) -> Refusal {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.refused.store(now.max(1), Ordering::Relaxed);
        Declined::rate(Dropped::Rate, wait).release()
    }

    /// Charges what a release costs beyond the one token that it was let in with: the bytes and the keys of its protector.
    pub fn charge(&self, from: &HostAt, bytes: usize, work: Work) {
        self.limits.load().hosts.debit(from, tokens(bytes, work) - 1);
    }

    /// Charges for a protector that was found wrong only after it was decrypted again and again.
    pub fn charge_decryptions(&self, from: &HostAt, decryptions: usize) {
        self.limits.load().hosts.debit(from, u32::try_from(decryptions).unwrap_or(u32::MAX));
    }

    /// A release that was let in failed before anything was decrypted: it is charged to the bucket for that, and the token
    /// that it was let in with is given back; only where that bucket is empty it is charged like a release.
    pub fn failed_early(&self, from: &HostAt, bytes: usize, work: Work) {
        let (limits, tokens) = (self.limits.load(), tokens(bytes, work));
        if limits.early.take(from).is_ok() {
            limits.early.debit(from, tokens - 1);
            limits.hosts.give_back(from, 1);
        } else {
            limits.hosts.debit(from, tokens - 1);
        }
    }

    /// The same for a request with a host's health certificate that was refused before it was let in.
    pub fn failed_unread(&self, from: &HostAt, bytes: usize) {
        let (limits, tokens) = (self.limits.load(), tokens(bytes, Work::default()));
        match limits.early.take(from) {
            Ok(()) => limits.early.debit(from, tokens - 1),
            Err(_) => limits.hosts.debit(from, tokens),
        }
    }

    /// Whether anybody at the sender's address may still ask without being known as a host.
    ///
    /// # Errors
    /// The bucket of the address (`server.stranger_rate`) is empty.
    pub fn stranger_may_ask(&self, attempt: &Attempt) -> Result<(), Declined> {
        let look = |network| self.limits.load().strangers.look(&network);
        attempt.network().map_or(Ok(()), look).map_err(|wait| Declined::rate(Dropped::Address, wait))
    }

    /// Charges the sender's address for a request that was refused before its sender was known as a host.
    pub fn charge_stranger(&self, attempt: &Attempt, bytes: usize, work: Work) {
        if let Some(network) = attempt.network() {
            let tokens = tokens_of(bytes / BYTES_FOR_A_STRANGERS_TOKEN, work);
            self.limits.load().strangers.debit(&network, tokens);
        }
    }

    /// Waits for the turn of a sender that is not known as a host, for work that is expensive before it is. Its body gives way
    /// while it waits.
    ///
    /// # Errors
    /// There is no turn in time, or the memory of the body is taken away.
    pub(crate) async fn strangers_turn(&self, attempt: &Attempt, body: &[u8]) -> Result<Permit, Declined> {
        let asked = &body[..body.len().min(TELLING)];
        let from = HostAt::stranger(attempt);
        tokio::select! {
            turn = self.strangers.turn(&from, attempt.deadline(), attempt.caller(), asked) => turn,
            () = attempt.body_is_gone() => Err(Declined::no_memory()),
        }
    }

    /// Has the body of a request stay in memory from now on, because its sender is known or the work for it is cheap.
    ///
    /// # Errors
    /// The memory was taken away.
    pub(crate) fn keep_body(attempt: &Attempt) -> Result<(), Declined> {
        if attempt.keep_body() { Ok(()) } else { Err(Declined::no_memory()) }
    }

    /// Waits until it is a release's turn. A future that is dropped leaves the queue. `asked`: see [`Admission::admit`].
    ///
    /// # Errors
    /// `ServiceUnavailableException`.
    pub async fn turn(&self, from: &HostAt, attempt: &Attempt, asked: &[u8]) -> Result<Permit, Refusal> {
        self.releases.turn(from, attempt.deadline(), attempt.caller(), asked).await.map_err(Declined::release)
    }

    /// Lets an attestation in: within the rate of its host's key, without a turn at the HSMs.
    ///
    /// # Errors
    /// The host asks too fast, or too much was refused at its address; counted.
    pub fn attestation_within_rate(&self, from: &HostAt) -> Result<(), Declined> {
        let taken = self.limits.load().attesting.take(from);
        taken.map_err(|wait| Declined::rate(Dropped::Rate, wait).attestation())
    }

    /// Takes a token for the first step of an attestation by TPM that names this host, and tells whether there was one. The
    /// bucket is not that of [`Admission::attestation_within_rate`]: a caller that only knows the host's endorsement key
    /// cannot use up the host's attestations.
    pub fn may_begin(&self, from: &HostAt) -> bool {
        self.limits.load().beginning.take(from).is_ok()
    }

    /// As [`Admission::stranger_may_ask`], for an attestation; counted.
    ///
    /// # Errors
    /// The bucket of the address (`server.stranger_rate`) is empty.
    pub fn stranger_may_attest(&self, attempt: &Attempt) -> Result<(), Declined> {
        self.stranger_may_ask(attempt).map_err(Declined::attestation)
    }

    /// Waits until it is an attestation's turn at its share of the HSMs. `asked`: see [`Admission::admit`].
    ///
    /// # Errors
    /// There is none in time; counted.
    pub async fn attestation_turn(&self, from: &HostAt, attempt: &Attempt, asked: &[u8]) -> Result<Permit, Declined> {
        self.attestations.turn(from, attempt.deadline(), attempt.caller(), asked).await.map_err(Declined::attestation)
    }

    /// Takes a token for one more document at an address.
    ///
    /// # Errors
    /// The address asks too fast: the number of seconds after which it may come again.
    pub fn document(&self, network: Network) -> Result<(), u16> {
        self.limits.load().documents.take(&network).map_err(whole_seconds)
    }

    /// What the buckets of a host at its network lack: for its releases, for what failed early, and the network's own for
    /// strangers.
    #[cfg(test)]
    pub(crate) fn charged(&self, from: &HostAt) -> [u32; 3] {
        let limits = self.limits.load();
        let strangers = from.network.as_ref().map_or(0, |network| limits.strangers.missing(network));
        [limits.hosts.missing(from), limits.early.missing(from), strangers]
    }

    /// Holds back the answer to a caller that asks too fast.
    pub async fn hold_back(&self) {
        if let Ok(_held) = self.held_back.try_acquire() {
            tokio::time::sleep(HELD_BACK).await;
        }
    }

    /// Whether releases are refused or wait, so that a newcomer is worth a look before it is read.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        let refused = self.refused.load(Ordering::Relaxed);
        (refused > 0 && self.began.elapsed() < Duration::from_millis(refused) + ALERT) || self.load().waiting > 0
    }

    /// Whether a release would be let in, as far as can be said now. It does not count against its host's rate. `asked`: see
    /// [`Admission::admit`].
    ///
    /// # Errors
    /// As [`Admission::admit`].
    pub fn outlook(&self, from: &HostAt, attempt: &Attempt, asked: &[u8]) -> Result<(), Refusal> {
        self.limits.load().hosts.look(from).map_err(|wait| self.too_fast(wait))?;
        self.releases.outlook(from, attempt.deadline(), asked).map_err(Declined::release)
    }

    /// How much is going on now.
    #[must_use]
    pub fn load(&self) -> Load {
        self.releases.load()
    }

    /// How much may go on.
    #[must_use]
    pub fn limits(&self) -> Load {
        self.releases.limits()
    }
}

#[cfg(test)]
mod storms;
#[cfg(test)]
mod tests;
