//! The agent of a host.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use claviger_process::clock::unix_now;
use claviger_process::throttle::Throttle;
use claviger_protocol::protector::Protector;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::counters::Counters;
use super::gather::{Gathering, Pace};
use super::wire::{self, Refused, Reply};
use crate::failover::{Services, ServicesError};
use crate::host::{HostError, Unwrapped};
use crate::host_files::Folder;
use crate::http::TlsSettings;
use crate::retry::Fault;
use crate::tpm::TpmPlace;

/// Time limit for reading a request, and for writing a reply.
const EXCHANGE: Duration = Duration::from_secs(10);
/// Longest time that a client can wait. It is that of a command, see its `--timeout`.
const LONGEST: Duration = Duration::from_secs(86_400);
/// Most connections. Each holds a protector of up to 512 KiB.
const CONNECTIONS: usize = 1024;
/// Interval of checking whether the health certificate must be renewed.
const CHECK: Duration = Duration::from_secs(60);
/// Pause before a release is requested again after the service had no time for it.
const REST: Duration = Duration::from_secs(1);

/// Settings of the agent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The host's keys.
    pub folder: Folder,
    /// The TPM, if the host attests with it instead of a host key.
    pub tpm: Option<TpmPlace>,
    /// The servers.
    pub urls: Vec<String>,
    /// TLS settings for servers and for this host.
    pub tls: TlsSettings,
    /// Time limit of a request to the service, including all waits and all servers. How long a release may take, its
    /// client says.
    pub timeout: Duration,
    /// The certificate is renewed this long before it expires.
    pub renew_before: Duration,
    /// How long releases are collected.
    pub pace: Pace,
    /// Users with permission, in addition to root and the agent's own user.
    pub users: Vec<u32>,
}

impl Settings {
    /// The host and its servers, with this time limit from now on.
    async fn services(&self, limit: Duration) -> Result<Services, ServicesError> {
        let this = self.clone();
        let made =
            tokio::task::spawn_blocking(move || Services::new(this.folder, this.tpm, &this.urls, &this.tls, limit));
        made.await.unwrap_or_else(|error| Err(HostError::Answer(error.to_string()).into()))
    }

    fn may_ask(&self, user: u32) -> bool {
        user == 0 || user == rustix::process::geteuid().as_raw() || self.users.contains(&user)
    }
}

/// A release that a client waits for.
struct Job {
    protector: Vec<u8>,
    until: Instant,
    reply: oneshot::Sender<Reply>,
}

impl Job {
    /// Time that the client still waits; 0 if it has gone.
    fn left(&self) -> Duration {
        if self.reply.is_closed() { Duration::ZERO } else { self.until.saturating_duration_since(Instant::now()) }
    }
}

/// Serves the socket. Never returns.
pub async fn serve(listener: UnixListener, settings: Settings, counters: Arc<Counters>) {
    let settings = Arc::new(settings);
    let (jobs, queue) = mpsc::channel(CONNECTIONS);
    let accepting = accept(listener, settings.clone(), counters.clone(), jobs.clone());
    tokio::join!(accepting, release(queue, jobs, settings.clone(), counters.clone()), renew(&settings, &counters));
}

/// Attests unless a stored certificate is valid for long enough.
///
/// # Errors
/// [`ServicesError`].
pub async fn attest(settings: &Settings, counters: &Counters) -> Result<(), ServicesError> {
    let attested = try_to_attest(settings, counters).await;
    if attested.is_err() {
        counters.not_attested.fetch_add(1, Relaxed);
    }
    attested
}

async fn try_to_attest(settings: &Settings, counters: &Counters) -> Result<(), ServicesError> {
    let mut services = settings.services(settings.timeout).await?;
    let mut health = services.health().await?;
    let renew_at = health.certificate.not_after() - i64::try_from(settings.renew_before.as_secs()).unwrap_or(i64::MAX);
    if health.issued_by.is_none() && unix_now() >= renew_at {
        health = services.attest().await?;
    }
    counters.certificate_ends.store(health.certificate.not_after(), Relaxed);
    counters.attested.fetch_add(u64::from(health.issued_by.is_some()), Relaxed);
    Ok(())
}

async fn renew(settings: &Settings, counters: &Counters) {
    loop {
        tokio::time::sleep(CHECK).await;
        if let Err(error) = attest(settings, counters).await {
            tracing::warn!(%error, "the health certificate cannot be renewed; trying again");
        }
    }
}

async fn accept(listener: UnixListener, settings: Arc<Settings>, counters: Arc<Counters>, jobs: mpsc::Sender<Job>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (settings, counters, jobs) = (settings.clone(), counters.clone(), jobs.clone());
        tokio::spawn(async move {
            if let Err(error) = answer(stream, &settings, &counters, &jobs).await {
                tracing::info!(%error, "a connection was closed before its reply was sent");
            }
            drop(permit);
        });
    }
}

async fn answer(
    mut stream: UnixStream,
    settings: &Settings,
    counters: &Counters,
    jobs: &mpsc::Sender<Job>,
) -> std::io::Result<()> {
    let user = stream.peer_cred()?.uid();
    if !settings.may_ask(user) {
        counters.strangers.fetch_add(1, Relaxed);
        static SAID: Throttle = Throttle::new();
        if let Some(unsaid) = SAID.due(Instant::now()) {
            tracing::warn!(user, unsaid, "a user without permission asked this agent");
        }
        let text = format!("user {user} may not ask this agent; if it is to, start the agent with --allow-uid {user}");
        return wire::write_reply(&mut stream, &Err(Refused { text, temporary: false })).await;
    }
    // The client may go, or not read. Neither keeps its place for long.
    let request = tokio::time::timeout(EXCHANGE, wire::read_request(&mut stream)).await??;
    let reply = tokio::select! {
        reply = reply_to(request, counters, jobs) => reply,
        // The client sends nothing after its request, so this is its end.
        _ = stream.read_u8() => return Err(std::io::ErrorKind::UnexpectedEof.into()),
    };
    let counter = match &reply {
        Ok(_) => &counters.released,
        Err(refused) if refused.temporary => &counters.late,
        Err(_) => &counters.refused,
    };
    counter.fetch_add(1, Relaxed);
    tokio::time::timeout(EXCHANGE, wire::write_reply(&mut stream, &reply)).await?
}

/// Counts a release that waits, until it is dropped.
struct Waiting<'a>(&'a Counters);

impl<'a> Waiting<'a> {
    fn count(counters: &'a Counters) -> Self {
        counters.waiting.fetch_add(1, Relaxed);
        Self(counters)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

async fn reply_to(request: wire::Request, counters: &Counters, jobs: &mpsc::Sender<Job>) -> Reply {
    let wire::Request { patience, protector } = request;
    // The service cannot read such a protector. It is refused here, so that the other protectors of the batch are served.
    if let Err(refusal) = Protector::parse(&protector) {
        return Err(Refused { text: format!("the vault's protector: {}", refusal.message), temporary: false });
    }
    let _waiting = Waiting::count(counters);
    let until = Instant::now() + patience.min(LONGEST);
    let (reply, answer) = oneshot::channel();
    let waited = tokio::time::timeout_at(until.into(), async {
        jobs.send(Job { protector, until, reply }).await.ok()?;
        answer.await.ok()
    });
    match waited.await {
        Ok(Some(reply)) => reply,
        Ok(None) => Err(Refused { text: "the agent stops; try again".to_owned(), temporary: true }),
        Err(_) => {
            let text = format!("the service did not answer the agent within {patience:?}");
            Err(Refused { text, temporary: true })
        }
    }
}

/// Collects releases and requests them, one batch at a time. Releases that arrive meanwhile form the next batch.
async fn release(
    mut queue: mpsc::Receiver<Job>,
    jobs: mpsc::Sender<Job>,
    settings: Arc<Settings>,
    counters: Arc<Counters>,
) {
    let mut next = None;
    loop {
        let Some(first) = (match next.take() {
            Some(job) => Some(job),
            None => queue.recv().await,
        }) else {
            return;
        };
        let bytes = first.protector.len();
        let mut batch = Gathering::begin(settings.pace, first, bytes, Instant::now());
        while let Ok(Some(job)) = tokio::time::timeout_at(batch.due().into(), queue.recv()).await {
            let bytes = job.protector.len();
            if let Err(job) = batch.add(job, bytes, Instant::now()) {
                next = Some(job);
                break;
            }
        }
        ask(batch.into_items(), &jobs, &settings, &counters).await;
    }
}

/// Sends a batch and returns each result to its client. A release that the service refuses for the host's rate, or because
/// it cannot serve now, is moved to a later batch if the client waits long enough.
async fn ask(mut batch: Vec<Job>, jobs: &mpsc::Sender<Job>, settings: &Settings, counters: &Counters) {
    batch.retain(|job| !job.left().is_zero());
    // The next batch waits for this one, so a client with much patience gets no more time than the others.
    let Some(longest) = batch.iter().map(Job::left).max() else { return };
    let limit = wire::shorter(longest).min(settings.timeout);
    counters.batches.fetch_add(1, Relaxed);
    let protectors: Vec<_> = batch.iter().map(|job| job.protector.clone()).collect();
    let results = match settings.services(limit).await {
        Ok(mut services) => {
            let results = services.unwrap_batch(&protectors).await;
            if let Some(health) = services.kept() {
                counters.certificate_ends.store(health.certificate.not_after(), Relaxed);
            }
            results.map_err(ServicesError::from)
        }
        Err(error) => Err(error),
    };
    match results {
        Ok(results) => batch.into_iter().zip(results).for_each(|(job, result)| give(job, result, jobs)),
        Err(error) => {
            tracing::warn!(%error, machines = batch.len(), "no release");
            let refused = Refused { text: error.to_string(), temporary: error.is_temporary() };
            let rest = refused.temporary.then_some(REST);
            batch.into_iter().for_each(|job| refuse(job, refused.clone(), rest, jobs));
        }
    }
}

fn give(job: Job, result: Result<Unwrapped, HostError>, jobs: &mpsc::Sender<Job>) {
    let error = match result {
        Ok(unwrapped) => {
            let _ = job.reply.send(Ok(unwrapped));
            return;
        }
        Err(error) => error,
    };
    let rest = match error.fault() {
        Fault::Lasting | Fault::Unusable => None,
        Fault::Server(rest) | Fault::Host(rest) => Some(rest.unwrap_or_default().max(REST)),
    };
    refuse(job, Refused { text: error.to_string(), temporary: rest.is_some() }, rest, jobs);
}

/// Refuses a release, or moves it to a batch after `rest` if its client waits longer than that.
fn refuse(job: Job, refused: Refused, rest: Option<Duration>, jobs: &mpsc::Sender<Job>) {
    match rest {
        Some(rest) if rest < job.left() => {
            let jobs = jobs.clone();
            tokio::spawn(async move {
                tokio::time::sleep(rest).await;
                let _ = jobs.send(job).await;
            });
        }
        _ => _ = job.reply.send(Err(refused)),
    }
}
