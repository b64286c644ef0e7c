//! Many tokens as one: pick a member, submit the operation, judge the reply and, if needed, try another member.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};
use std::time::{Duration, Instant};

use claviger_process::lock::{lock, unpoisoned};
use cryptoki::error::RvError;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use zeroize::Zeroizing;

use crate::code::Function;
use crate::config::{CallTimeouts, MemberConfig, Pin};
use crate::error::{Failure, HsmError};
use crate::event::Observer;
use crate::fault::FaultOwner;
use crate::identity::KeyRef;
use crate::job::{Check, Job, KnownAnswerTest};
use crate::keys::{NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme, TokenKey};
use crate::link::{Request, Value};
use crate::member::{Limits, Member, MemberStatus, Outcome, Surroundings, WorkerProgram, launch};
use crate::policy::breaker;
use crate::policy::budget::{self, Budget};
use crate::policy::failover::{Failover, GaveUp, Rejection, Reply, Standing, Step};
use crate::policy::pick::Tiers;
use crate::standstill;

/// Time limit for key management. HSMs may search for large primes for more than a minute.
const MANAGEMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Time that a member gets to finish its calls before it is removed.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the start of all members. The daemon then goes on with the members that are up.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for the other members once one member is up: they should be ready for the first requests, but must not delay
/// them.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(3);
/// Period of the regular check of all members. A hung call is found at most this much later than the watchdog's time.
const TICK: Duration = Duration::from_millis(20);

/// A check that is later than this after the last one shows that the daemon stood still, or that something kept its threads
/// from running: nobody read the answers of tokens.
const LATE_TICK: Duration = TICK.saturating_mul(5);

/// A result, with the member and the retries that led to it. `Debug` leaves out the result, which may be a secret.
#[derive(Clone)]
pub struct Done<T> {
    /// The plaintext, the signature or the random bytes.
    pub value: T,
    /// Name of the member that gave the result.
    pub member: Arc<str>,
    /// Number of attempts at other members that failed before.
    pub retries: u32,
}

impl<T> fmt::Debug for Done<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Done").field("member", &self.member).field("retries", &self.retries).finish_non_exhaustive()
    }
}

impl<T> Done<T> {
    fn map<U>(self, change: impl FnOnce(T) -> Result<U, HsmError>) -> Result<Done<U>, HsmError> {
        Ok(Done { value: change(self.value)?, member: self.member, retries: self.retries })
    }
}

/// A set of tokens that hold the same keys. This is a handle: clones share everything.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

struct Inner {
    members: RwLock<Members>,
    budget: Mutex<Budget>,
    surroundings: Surroundings,
    /// The task that checks all members. While it runs, a member that is added starts at once.
    supervisor: Mutex<Option<AbortHandle>>,
}

/// A snapshot: in-flight operations finish on the members they started with.
type Members = Arc<Snapshot>;

struct Snapshot {
    entries: Vec<Entry>,
    tiers: Tiers,
}

impl Snapshot {
    fn new(entries: Vec<Entry>) -> Members {
        let priorities: Vec<_> = entries.iter().map(|entry| entry.member.priority()).collect();
        Arc::new(Snapshot { entries, tiers: Tiers::new(&priorities) })
    }

    /// Brings forward the next attempt of every member that is down.
    fn probe_now(&self) {
        self.iter().for_each(|entry| entry.member.probe_now());
    }
}

impl Deref for Snapshot {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        &self.entries
    }
}

#[derive(Clone)]
struct Entry {
    member: Arc<Member>,
    /// The task of [`Member::live`]; `None` until it is started.
    life: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Entry {
    fn new(config: MemberConfig, surroundings: &Surroundings) -> Self {
        Entry { member: Arc::new(Member::new(config, surroundings)), life: Arc::default() }
    }

    fn start(&self) {
        lock(&self.life).get_or_insert_with(|| tokio::spawn(Arc::clone(&self.member).live()));
    }

    /// Removes the member and waits until its worker has ended.
    async fn end(&self) {
        self.member.remove();
        let life = lock(&self.life).take();
        if let Some(life) = life {
            let _ = life.await;
        }
    }
}

impl Cluster {
    /// Creates a cluster whose members are not started yet. `worker` is the program that serves each member.
    ///
    /// # Errors
    /// Returns an error if there are no members, or if a member's name is not allowed or not unique.
    pub fn new(
        members: Vec<MemberConfig>,
        timeouts: CallTimeouts,
        worker: WorkerProgram,
        observer: Observer,
    ) -> Result<Cluster, HsmError> {
        if members.is_empty() {
            return Err(HsmError::NoMembers);
        }
        let mut names = BTreeSet::new();
        if !members.iter().all(|member| is_fit(&member.name) && names.insert(member.name.as_str())) {
            return Err(HsmError::UnfitName);
        }
        let surroundings = Surroundings {
            hidden: Arc::new(RwLock::new(worker.hidden.iter().cloned().collect())),
            launch: launch(worker),
            breaker: breaker::Settings::default(),
            watchdog: timeouts.watchdog,
            known: Arc::new(RwLock::new(Arc::new([]))),
            observer,
            somebody_up: Arc::new(Notify::new()),
        };
        Ok(Cluster::of(members, surroundings))
    }

    pub(crate) fn of(members: Vec<MemberConfig>, surroundings: Surroundings) -> Cluster {
        let entries = members.into_iter().map(|config| Entry::new(config, &surroundings)).collect();
        Cluster(Arc::new(Inner {
            members: RwLock::new(Snapshot::new(entries)),
            budget: Mutex::new(Budget::new(budget::Settings::default())),
            surroundings,
            supervisor: Mutex::default(),
        }))
    }

    /// Starts a worker for each member. The worker loads the module, finds the token, logs in once and passes the
    /// known-answer tests. A background task then checks the members until [`close`](Self::close).
    ///
    /// # Errors
    /// Returns an error only if no member came up: the error of one of them. Members that failed are logged and tried
    /// again.
    pub async fn start(&self) -> Result<(), Failure> {
        let members = self.snapshot();
        let mut starting = JoinSet::new();
        for entry in members.iter() {
            let member = Arc::clone(&entry.member);
            starting.spawn(async move { member.first_attempt().await });
        }
        members.iter().for_each(Entry::start);
        self.supervise();
        let mut failure = None;
        let mut until = standstill::now() + START_TIMEOUT;
        while let Ok(Some(attempt)) = standstill::timeout_at(until, starting.join_next()).await {
            match attempt {
                Ok(Ok(())) => until = until.min(standstill::now() + OTHERS_TIMEOUT),
                Ok(Err(failed)) => failure = failure.or(Some(failed)),
                Err(_) => {}
            }
        }
        if members.iter().any(|entry| entry.member.is_serving()) {
            return Ok(());
        }
        Err(failure.unwrap_or(HsmError::NoneServing.into()))
    }

    fn supervise(&self) {
        // A weak reference, so that this task does not keep an unused cluster alive.
        let inner = Arc::downgrade(&self.0);
        let task = tokio::spawn(async move {
            // Each check runs in a task of its own, so that a panic in one check does not end the later ones.
            while tokio::spawn(look_at_members(Weak::clone(&inner))).await.is_err_and(|error| error.is_panic()) {
                tracing::error!("the task that watches the members panicked; it is restarted");
                tokio::time::sleep(TICK).await;
            }
        });
        if let Some(before) = lock(&self.0.supervisor).replace(task.abort_handle()) {
            before.abort();
        }
    }

    /// Sets the operations with known results that members are tested with. A member must pass the first decryption and the
    /// first signature to come up.
    pub fn set_known_answers(&self, known: Vec<KnownAnswerTest>) {
        *unpoisoned(self.0.surroundings.known.write()) = known.into();
    }

    /// Decrypts on the best member, and on another one if that member fails for its own reasons. If `check` rejects the
    /// result, other members are asked too before the input is called invalid.
    ///
    /// # Errors
    /// [`HsmError::is_data`] distinguishes a bad ciphertext from a cluster that cannot serve.
    pub async fn decrypt(
        &self,
        key: &KeyRef,
        oaep: Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        check: Option<Check>,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, HsmError> {
        self.with_failover(&Job::decrypt(key, oaep, ciphertext, check)?, deadline).await?.map(bytes)
    }

    /// Signs a digest on any member. If `check` rejects the signature, the member is at fault.
    ///
    /// # Errors
    /// [`HsmError::is_data`] is true if the length of the digest does not fit its hash.
    pub async fn sign(
        &self,
        key: &KeyRef,
        scheme: SignScheme,
        digest: &[u8],
        deadline: Instant,
        check: Option<Check>,
    ) -> Result<Done<Vec<u8>>, HsmError> {
        if digest.len() != scheme.hash().output_len() {
            return Err(HsmError::new(Function::Sign, RvError::DataLenRange));
        }
        self.with_failover(&Job::sign(key, scheme, digest, check)?, deadline).await?.map(public_bytes)
    }

    /// Returns `len` random bytes from any member.
    ///
    /// # Errors
    /// Returns an error if no member serves.
    pub async fn random(&self, len: u16, deadline: Instant) -> Result<Vec<u8>, HsmError> {
        public_bytes(self.with_failover(&Job::new(&Request::Random(len))?, deadline).await?.value)
    }

    /// Returns the status of all members, in the order of the configuration.
    #[must_use]
    pub fn members(&self) -> Vec<MemberStatus> {
        self.snapshot().iter().map(|entry| entry.member.status()).collect()
    }

    /// How many more operations could begin now without waiting for a session, at the members that would get them: those that
    /// serve with the smallest priority number.
    #[must_use]
    pub fn idle_sessions(&self) -> usize {
        let members = self.snapshot();
        let serving = || members.iter().map(|entry| &entry.member).filter(|member| member.is_serving());
        let first = serving().map(|member| member.priority()).min();
        serving().filter(|member| Some(member.priority()) == first).map(|member| member.idle_sessions()).sum()
    }

    /// Remaining retries in the budget.
    #[must_use]
    pub fn retries_left(&self) -> f64 {
        self.budget().left(standstill::now())
    }

    /// Runs the known-answer tests on a member now, whatever its state, and returns the time they took. A member that is
    /// down gets a fresh worker and comes up if the tests pass. For requests of an administrator: a PIN that was refused is
    /// tried once more, since the token may have been unlocked.
    ///
    /// # Errors
    /// Returns the member's failure.
    pub async fn probe(&self, member: &str) -> Result<Duration, Failure> {
        self.member(member)?.probe_on_request().await
    }

    /// Like [`probe`](Self::probe), but does not try a refused PIN again.
    ///
    /// # Errors
    /// Returns the member's failure.
    pub async fn check(&self, member: &str) -> Result<Duration, Failure> {
        self.member(member)?.probe().await
    }

    /// Drains a member, which then finishes its calls and takes no new ones; or puts it back into service.
    ///
    /// # Errors
    /// Returns an error if no member has this name.
    pub fn drain(&self, member: &str, drain: bool) -> Result<MemberStatus, HsmError> {
        let found = self.member(member)?;
        if found.drain(drain) {
            let state = found.status().state;
            let what = if drain { "member is drained on request" } else { "member is resumed on request" };
            tracing::info!(member, %state, "{what}");
        }
        Ok(found.status())
    }

    /// Sets a member's PIN. If the token refused the previous PIN and this PIN is different, it is tried once.
    ///
    /// # Errors
    /// Returns an error if no member has this name.
    pub async fn set_pin(&self, member: &str, pin: Pin) -> Result<(), HsmError> {
        self.member(member)?.set_pin(pin).await;
        Ok(())
    }

    /// Hides these environment variables of the daemon, such as those that hold PINs, from workers. New workers do not
    /// inherit them; running workers that have inherited one are replaced, one member after another.
    pub async fn hide(&self, variables: Vec<String>) {
        let inherited: Vec<String> = {
            let mut hidden = unpoisoned(self.0.surroundings.hidden.write());
            variables
                .into_iter()
                .filter(|name| hidden.insert(name.clone()) && std::env::var_os(name).is_some())
                .collect()
        };
        if inherited.is_empty() {
            return;
        }
        for entry in self.snapshot().iter() {
            entry.member.replace_worker().await;
        }
    }

    /// Runs one known-answer test on a member now, whatever its state.
    ///
    /// # Errors
    /// Returns the member's failure; [`HsmError::NoSuchKey`] if the member lacks the key.
    pub async fn self_test(&self, member: &str, known: &KnownAnswerTest) -> Result<(), Failure> {
        let timeout = self.0.surroundings.watchdog;
        self.member(member)?.direct(&known.0, timeout).await.map(drop)
    }

    /// Changes a member's priority and weight, from the next operation on.
    ///
    /// # Errors
    /// Returns an error if no member has this name.
    pub fn rank(&self, member: &str, priority: u32, weight: u32) -> Result<(), HsmError> {
        self.member(member)?.rank(priority, weight);
        self.change(|_| {});
        Ok(())
    }

    /// Adds a member while the others serve. The new member serves once it has passed the known-answer tests.
    ///
    /// # Errors
    /// Returns an error if the name is taken or not allowed.
    pub fn add(&self, config: MemberConfig) -> Result<(), HsmError> {
        if !is_fit(&config.name) || self.member(&config.name).is_ok() {
            return Err(HsmError::UnfitName);
        }
        let entry = Entry::new(config, &self.0.surroundings);
        if lock(&self.0.supervisor).is_some() {
            entry.start();
        }
        self.change(|members| members.push(entry));
        Ok(())
    }

    /// Removes a member: it takes no new calls, finishes those it has, and its worker ends.
    ///
    /// # Errors
    /// Returns an error if no member has this name or if it is the only member.
    pub async fn remove(&self, member: &str) -> Result<(), HsmError> {
        let entry = self.entry(member)?;
        if self.snapshot().len() == 1 {
            return Err(HsmError::LastMember);
        }
        entry.member.drain(true);
        let until = standstill::now() + REMOVAL_TIMEOUT;
        // The member stays in the list until then, so that hung calls are found.
        while entry.member.in_flight() > 0 && standstill::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.change(|members| members.retain(|other| other.member.name != entry.member.name));
        entry.end().await;
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Entry>)) {
        let mut members = unpoisoned(self.0.members.write());
        let mut all = members.to_vec();
        change(&mut all);
        *members = Snapshot::new(all);
    }

    /// Lists the RSA private keys of a member, those without a `CKA_ID` last. With `search`, the token is searched, which
    /// finds keys that other programs made. Without `search`, the table of one session is returned.
    ///
    /// # Errors
    /// Returns an error if the member does not serve.
    pub async fn keys_on(&self, member: &str, search: bool) -> Result<Vec<TokenKey>, Failure> {
        match self.manage(member, &Job::new(&Request::Keys { search })?).await? {
            Value::Keys(mut keys) => {
                keys.sort_by(|one, other| (one.id.is_none(), &one.id).cmp(&(other.id.is_none(), &other.id)));
                Ok(keys)
            }
            _ => Err(HsmError::UnexpectedReply.into()),
        }
    }

    /// Generates a key pair with the public exponent 65537. The private key stays on the token: sensitive, not extractable.
    ///
    /// # Errors
    /// Returns an error if the id is taken or the token refuses. A failed call is not repeated: a surplus key is worse than
    /// an error.
    pub async fn generate_rsa(&self, member: &str, spec: NewKey) -> Result<RsaPublic, Failure> {
        match self.manage(member, &Job::new(&Request::Generate(spec))?).await? {
            Value::Public(key) => Ok(key),
            _ => Err(HsmError::UnexpectedReply.into()),
        }
    }

    /// Imports a private key and its public key into a member's token. The private key is then sensitive and not
    /// extractable.
    ///
    /// # Errors
    /// Returns an error if the id is taken or the token refuses.
    pub async fn import_rsa(&self, member: &str, spec: NewKey, key: RsaPrivateParts) -> Result<(), Failure> {
        match self.manage(member, &Job::new(&Request::Import(spec, key))?).await? {
            Value::Done => Ok(()),
            _ => Err(HsmError::UnexpectedReply.into()),
        }
    }

    /// Destroys a key pair on a member's token. Keys whose public key the token does not reveal are left alone, because
    /// their id alone does not say which key they are.
    ///
    /// # Errors
    /// [`HsmError::NoSuchKey`] if the token has no such key; otherwise the token's refusal. A failed call is not repeated.
    pub async fn destroy(&self, member: &str, key: &KeyRef) -> Result<(), Failure> {
        let request = Request::Destroy { id: &key.id.0, public: key.public };
        match self.manage(member, &Job::new(&request)?).await? {
            Value::Done => Ok(()),
            _ => Err(HsmError::UnexpectedReply.into()),
        }
    }

    /// Ends all workers. Calls that run at a token may finish first, for at most two seconds.
    pub async fn close(&self) {
        if let Some(supervisor) = lock(&self.0.supervisor).take() {
            supervisor.abort();
        }
        let mut closing = JoinSet::new();
        for entry in self.snapshot().to_vec() {
            closing.spawn(async move { entry.end().await });
        }
        while closing.join_next().await.is_some() {}
    }

    /// Tries members until one succeeds or [`Failover`] gives up.
    async fn with_failover(&self, job: &Job, deadline: Instant) -> Result<Done<Value>, HsmError> {
        let members = self.snapshot();
        let watchdog = self.0.surroundings.watchdog;
        let mut failover = Failover::new(deadline, watchdog, &mut self.budget(), standstill::now());
        loop {
            // Registered before the members are examined, so that a member that comes up in between is not missed.
            let somebody_up = self.0.surroundings.somebody_up.notified();
            let now = standstill::now();
            let standing = |index: usize| standing(&members[index].member, job, now);
            let step = failover.next(now, &members.tiers, standing, |below| fastrand::usize(..below));
            let (index, share) = match step {
                // If the share covers all the time that is left, the deadline ends the call first, which is no evidence
                // against the member.
                Ok(Step::Ask { member, share }) => (member, if now + share < deadline { share } else { watchdog }),
                Ok(Step::Wait { until }) => {
                    members.probe_now();
                    let _ = standstill::timeout_at(until, somebody_up).await;
                    continue;
                }
                Err(GaveUp::Deadline) => return Err(HsmError::Deadline),
                Err(gave_up) => {
                    let why = no_candidate_error(&members, job);
                    if why == HsmError::NoneServing {
                        members.probe_now();
                    }
                    let GaveUp::Error(error) = gave_up else { return Err(why) };
                    return Err(believed(error, &members, failover.rejections()));
                }
            };
            let member = &members[index].member;
            let generation = member.generation();
            let reply = match member.call(job, deadline, Limits { share, watchdog }).await {
                Outcome::Ran(Ok(value)) => {
                    let success = failover.succeeded();
                    for (rejecting, rejection) in success.contradicted {
                        members[rejecting].member.contradicted(rejection.wrong, rejection.generation);
                    }
                    if let Some(failing) = success.failed_over_from {
                        members[failing].member.observe_failed_over(&member.name);
                    }
                    return Ok(Done { value, member: Arc::clone(&member.name), retries: success.retries });
                }
                Outcome::Ran(Err(error)) => reply(error, generation, member),
                Outcome::NotRun(error) => Reply::NotRun(error),
            };
            let failed = matches!(reply, Reply::Failed(_));
            let replied = failover.replied(reply, &mut self.budget(), standstill::now());
            replied.map_err(|error| believed(error, &members, failover.rejections()))?;
            if failed {
                member.observe_retry();
            }
        }
    }

    /// Makes one key-management call on the named member.
    async fn manage(&self, name: &str, job: &Job) -> Result<Value, Failure> {
        self.member(name)?.direct(job, MANAGEMENT_TIMEOUT).await
    }

    fn budget(&self) -> MutexGuard<'_, Budget> {
        lock(&self.0.budget)
    }

    fn snapshot(&self) -> Members {
        Arc::clone(&*unpoisoned(self.0.members.read()))
    }

    fn entry(&self, name: &str) -> Result<Entry, HsmError> {
        self.snapshot().iter().find(|entry| &*entry.member.name == name).cloned().ok_or(HsmError::UnknownMember)
    }

    fn member(&self, name: &str) -> Result<Arc<Member>, HsmError> {
        self.entry(name).map(|entry| entry.member)
    }
}

/// Ends the workers of a cluster that is dropped without [`Cluster::close`].
impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(supervisor) = lock(&self.supervisor).take() {
            supervisor.abort();
        }
        let members = unpoisoned(self.members.get_mut());
        members.iter().for_each(|entry| entry.member.remove());
    }
}

/// Checks all members periodically until the cluster is dropped.
async fn look_at_members(cluster: Weak<Inner>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = standstill::now();
    loop {
        ticks.tick().await;
        let now = standstill::now();
        let unread = unread_time(now.saturating_duration_since(std::mem::replace(&mut last, now)));
        let Some(cluster) = cluster.upgrade().map(Cluster) else { return };
        for Entry { member, .. } in cluster.snapshot().iter() {
            if member.tick(now, unread) {
                let member = Arc::clone(member);
                tokio::spawn(async move { member.test().await });
            }
        }
    }
}

/// Returns the time in which the daemon could not read answers, given the time between two checks.
fn unread_time(between: Duration) -> Duration {
    if between >= LATE_TICK { between - TICK } else { Duration::ZERO }
}

fn is_fit(name: &str) -> bool {
    !name.is_empty() && !name.contains('\0')
}

fn standing(member: &Member, job: &Job, now: Instant) -> Standing {
    match member.candidate(job.need.as_ref(), now) {
        Some(candidate) => Standing::Able(candidate),
        None => member.returning_since().map_or(Standing::Unable, |since| Standing::Returning { since }),
    }
}

/// Maps an error to a reply for [`Failover`], as the fault table says.
fn reply(error: HsmError, generation: u64, member: &Member) -> Reply<HsmError> {
    let fault = error.fault();
    if !fault.elsewhere {
        return Reply::Final(error);
    }
    if !matches!(fault.owner, FaultOwner::Caller | FaultOwner::Unclear) {
        return Reply::Failed(error);
    }
    let rejection = Rejection { wrong: matches!(error, HsmError::Refused { wrong: true }), generation };
    // The opinion of a member that was proved wrong a short time ago does not count, whatever it was wrong about. An honest
    // caller may try again; an attacker learns nothing.
    let credible = member.is_believed(generation, standstill::now());
    let error = if credible { error } else { HsmError::NotCredible };
    Reply::Rejected { credible: error.is_data(), error, rejection }
}

/// Returns the error for the caller. The input is called invalid only while every member that rejected it is still
/// believed: a member that has failed since may have been wrong before it was found out.
fn believed(error: HsmError, members: &[Entry], rejections: &[(usize, Rejection)]) -> HsmError {
    let now = standstill::now();
    let mut rejections = rejections.iter();
    let all = rejections.all(|(member, rejection)| members[*member].member.is_believed(rejection.generation, now));
    if error.is_data() && !all { HsmError::NotCredible } else { error }
}

/// Returns the reason why no member can be asked.
fn no_candidate_error(members: &[Entry], job: &Job) -> HsmError {
    let now = standstill::now();
    if let Some(need) = &job.need
        && members.iter().any(|entry| entry.member.only_lacks(need, now))
    {
        return HsmError::NoSuchKey;
    }
    if members.iter().any(|entry| entry.member.is_full()) {
        return HsmError::QueueFull;
    }
    HsmError::NoneServing
}

fn bytes(value: Value) -> Result<Zeroizing<Vec<u8>>, HsmError> {
    match value {
        Value::Bytes(bytes) => Ok(bytes),
        _ => Err(HsmError::UnexpectedReply),
    }
}

fn public_bytes(value: Value) -> Result<Vec<u8>, HsmError> {
    bytes(value).map(|mut bytes| std::mem::take(&mut *bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
