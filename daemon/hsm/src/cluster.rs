//! Many tokens as one: pick a member, submit, judge, and maybe elsewhere.

mod health;
pub(crate) mod member;
pub(crate) mod shared;
mod supervisor;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, JoinSet};
use zeroize::Zeroizing;

use crate::config::{MemberConfig, Patience as Times, Pin};
use crate::error::HsmError;
use crate::fault::Whose;
use crate::identity::KeyRef;
use crate::key_table::TokenKey;
use crate::keys::{NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme};
use crate::module::{self, Module};
use crate::policy::budget::{self, Budget};
use crate::policy::failover::{Failover, GaveUp, Rejection, Reply, Standing, Step};
use crate::policy::pick::Tiers;
use crate::request::{Answer, Check, KnownGood, Outcome, Request};
use crate::standstill;
use crate::{Event, Observer};
use cryptoki::error::RvError;
pub use health::{LastError, MemberState};
pub use member::MemberStatus;
use member::{Member, Patience};

/// How long key management may take: HSMs search for large primes for a minute and more.
const MANAGEMENT_PATIENCE: Duration = Duration::from_secs(120);
/// How long a member may take for one operation that it has to prove itself by, or to finish what it has.
const OWN_PATIENCE: Duration = Duration::from_secs(10);
/// How long the members together may take to come up before the daemon goes on with those that have.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// The same once one of them serves: the others are not to miss the first requests, nor to hold them up.
const OTHERS_PATIENCE: Duration = Duration::from_secs(3);

/// A result, and how it came about. Printing it leaves out the result, which may be a secret.
#[derive(Clone)]
pub struct Done<T> {
    /// The result.
    pub value: T,
    /// The member that made it.
    pub member: Arc<str>,
    /// How often other members had failed at the operation before.
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

/// Tokens that hold the same keys. A handle: clones share everything.
#[derive(Clone)]
pub struct Cluster {
    members: Arc<RwLock<Members>>,
    budget: Arc<Mutex<Budget>>,
    known: Arc<RwLock<Arc<[KnownGood]>>>,
    watchdog: Duration,
    observer: Observer,
    supervisor: Arc<Mutex<Option<AbortHandle>>>,
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
}

impl Deref for Snapshot {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        &self.entries
    }
}

#[derive(Clone)]
struct Entry {
    name: Arc<str>,
    member: Arc<Member>,
}

impl Cluster {
    /// Loads every module, once for the same path and environment, and initialises it with OS locking. The members' `env`
    /// tables are applied to the process here, so this has to be called before other threads exist.
    ///
    /// # Errors
    /// When there are no members, two of one name, or a library that cannot be loaded. A module that loads but cannot be
    /// initialised yet is tried again later, like a token that is away.
    pub fn load(members: Vec<MemberConfig>, times: Times, observer: Observer) -> Result<Cluster, HsmError> {
        if members.is_empty() {
            return Err(HsmError::NoMember("none is configured".to_owned()));
        }
        // Threads are named after their member, and a name with a zero in it cannot be given to a thread.
        if let Some(unfit) = members.iter().find(|m| m.name.is_empty() || m.name.contains('\0')) {
            return Err(HsmError::NoMember(format!("one cannot be called {:?}", unfit.name)));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = members.iter().find(|m| !names.insert(m.name.as_str())) {
            return Err(HsmError::NoMember(format!("two are called {:?}", twice.name)));
        }
        let mut modules = Vec::new();
        for config in &members {
            match Module::acquire(&config.module, &config.env) {
                Ok(module) => modules.push(module),
                Err(error) => {
                    modules.iter().for_each(Module::release);
                    return Err(error);
                }
            }
        }
        module::settle_env();
        let known: Arc<RwLock<Arc<[KnownGood]>>> = Arc::new(RwLock::new(Arc::new([])));
        let entries: Result<Vec<Entry>, HsmError> = members
            .into_iter()
            .zip(modules)
            .map(|(config, module)| {
                Ok(Entry {
                    name: config.name.as_str().into(),
                    member: Arc::new(Member::new(config, module, Arc::clone(&known), Arc::clone(&observer))?),
                })
            })
            .collect();
        Ok(Cluster {
            members: Arc::new(RwLock::new(Snapshot::new(entries?))),
            budget: Arc::new(Mutex::new(Budget::new(budget::Settings::default()))),
            known,
            watchdog: times.watchdog,
            observer,
            supervisor: Arc::default(),
        })
    }

    /// Finds the tokens, logs in once for each, finds out by trial what each can do, and has each prove that it works. Then
    /// watches over them until [`close`](Self::close).
    ///
    /// # Errors
    /// Only when no member came up; the error of one of them. Members that failed are logged, and tried again and again.
    pub async fn start(&self) -> Result<(), HsmError> {
        let mut starting = JoinSet::new();
        let members = self.snapshot();
        for entry in members.iter() {
            let member = &entry.member;
            member.shared.health().probe_now(standstill::now());
            if member.shared.health().may_probe(standstill::now()) {
                starting.spawn(supervisor::probe(Arc::clone(member), self.probe_patience()));
            }
        }
        self.supervise();
        let mut result = Err(HsmError::NoMember("none came up".to_owned()));
        let mut until = standstill::now() + START_PATIENCE;
        while let Ok(Some(started)) = standstill::timeout_at(until, starting.join_next()).await {
            match started {
                Ok(Ok(())) => {
                    until = until.min(standstill::now() + OTHERS_PATIENCE);
                    result = Ok(());
                }
                Ok(Err(error)) if result.is_err() => result = Err(error),
                _ => {}
            }
        }
        // A probe that still runs goes on.
        starting.detach_all();
        if members.iter().any(|entry| entry.member.shared.health().is_up()) { Ok(()) } else { result }
    }

    /// Operations whose right result is known, by which members are judged. The first decryption and the first signature
    /// have to go right for a member to be up.
    pub fn know(&self, known: Vec<KnownGood>) {
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = known.into();
    }

    /// Decrypts, on the member that suits best; elsewhere if that failed for the member's own reasons. A result that
    /// `check` does not accept is asked of other members, too, before it is the caller's fault.
    ///
    /// # Errors
    /// [`HsmError::is_data`] tells a bad ciphertext from a cluster that cannot serve.
    pub async fn decrypt(
        &self,
        key: &KeyRef,
        oaep: Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        check: Option<Check>,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, HsmError> {
        let request = Request::Decrypt { key: key.clone(), oaep, ciphertext: ciphertext.to_vec(), check };
        self.with_failover(request, deadline).await?.map(octets)
    }

    /// Signs a digest, on any member. A signature that `check` does not accept is the member's fault.
    ///
    /// # Errors
    /// [`HsmError::is_data`] when the digest does not have its hash's length.
    pub async fn sign(
        &self,
        key: &KeyRef,
        scheme: SignScheme,
        digest: &[u8],
        deadline: Instant,
        check: Option<Check>,
    ) -> Result<Done<Vec<u8>>, HsmError> {
        if digest.len() != scheme.hash().output_len() {
            return Err(HsmError::new("C_Sign", RvError::DataLenRange));
        }
        let request = Request::Sign { key: key.clone(), scheme, digest: digest.to_vec(), check };
        self.with_failover(request, deadline).await?.map(public_octets)
    }

    /// Random octets from any member.
    ///
    /// # Errors
    /// When no member serves.
    pub async fn random(&self, len: usize, deadline: Instant) -> Result<Vec<u8>, HsmError> {
        let done = self.with_failover(Request::Random(len), deadline).await?;
        public_octets(done.value)
    }

    /// How the members are, in the order of the configuration.
    #[must_use]
    pub fn members(&self) -> Vec<MemberStatus> {
        self.snapshot().iter().map(|entry| entry.member.status()).collect()
    }

    /// Retries that the budget has left.
    #[must_use]
    pub fn retries_left(&self) -> f64 {
        self.budget().left(standstill::now())
    }

    /// Has a member do known-good operations now, whatever its state; how long they took. Does not open a closed one. On an
    /// administrator's word: a PIN that was refused is tried again, once, since the token may have been unlocked.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn probe(&self, member: &str) -> Result<Duration, HsmError> {
        let member = self.entry(member)?.member;
        member.allow_pin();
        member.shared.allow_final_try(true);
        let probed = member.probe(self.probe_patience()).await;
        member.shared.allow_final_try(false);
        probed
    }

    /// Like [`probe`](Self::probe), on nobody's word: a PIN that was refused stays refused.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn check(&self, member: &str) -> Result<Duration, HsmError> {
        self.entry(member)?.member.probe(self.probe_patience()).await
    }

    /// Lets a member finish what it has and gives it nothing new, or takes it back into service.
    ///
    /// # Errors
    /// When there is no such member.
    pub fn drain(&self, member: &str, drain: bool) -> Result<MemberStatus, HsmError> {
        let entry = self.entry(member)?;
        if entry.member.shared.health().drain(drain, standstill::now()) {
            let state = entry.member.status().state;
            let what = if drain { "member is drained on request" } else { "member is resumed on request" };
            tracing::info!(member, %state, "{what}");
        }
        Ok(entry.member.status())
    }

    /// Takes a PIN for a member. When the last one was refused and this is another, it may be tried, once.
    ///
    /// # Errors
    /// When there is no such member.
    pub fn set_pin(&self, member: &str, pin: Pin) -> Result<(), HsmError> {
        self.entry(member)?.member.set_pin(pin);
        Ok(())
    }

    /// Has a member do an operation whose right result is known, now and whatever its state. Does not open a closed one.
    ///
    /// # Errors
    /// What is wrong with it; [`HsmError::NoSuchKey`] when it lacks the key.
    pub async fn prove(&self, member: &str, known: &KnownGood) -> Result<(), HsmError> {
        let member = self.entry(member)?.member;
        member.direct(&known.0, standstill::now() + OWN_PATIENCE, self.probe_patience()).await.map(drop)
    }

    /// Changes a member's place among the others, from the next operation on.
    ///
    /// # Errors
    /// When there is no such member.
    pub fn rank(&self, member: &str, priority: u32, weight: u32) -> Result<(), HsmError> {
        self.entry(member)?.member.rank(priority, weight);
        self.change(|_| {});
        Ok(())
    }

    /// Takes a member in while the others serve. It is tried at once, and serves when it has proved that it works. Blocks
    /// while the module is initialised, for seconds where its device does not answer.
    ///
    /// Environment variables cannot be made while there are threads: what the module wants of them has to be there already.
    ///
    /// # Errors
    /// A name that is taken or unfit; a module that cannot be loaded, also for the environment that it wants.
    pub fn add(&self, config: MemberConfig) -> Result<(), HsmError> {
        if config.name.is_empty() || config.name.contains('\0') || self.entry(&config.name).is_ok() {
            return Err(HsmError::NoMember(format!("one more cannot be called {:?}", config.name)));
        }
        let module = Module::acquire_late(&config.module, &config.env)?;
        let name: Arc<str> = config.name.as_str().into();
        let member = Member::new(config, Arc::clone(&module), Arc::clone(&self.known), Arc::clone(&self.observer));
        let member = Arc::new(member.inspect_err(|_| module.release())?);
        member.shared.health().probe_now(standstill::now());
        self.change(|members| members.push(Entry { name, member }));
        Ok(())
    }

    /// Takes a member out: it gets nothing new from now on, finishes what it has, and is closed.
    ///
    /// # Errors
    /// When there is no such member, or it is the only one.
    pub async fn remove(&self, member: &str) -> Result<(), HsmError> {
        let entry = self.entry(member)?;
        if self.snapshot().len() == 1 {
            return Err(HsmError::NoMember(format!("{member} is the only one, and stays")));
        }
        entry.member.shared.health().drain(true, standstill::now());
        self.change(|members| members.retain(|other| other.name != entry.name));
        let until = standstill::now() + OWN_PATIENCE;
        while entry.member.shared.in_flight.load(Ordering::Acquire) > 0 && standstill::now() < until {
            // The supervisor does not know it any more: calls that hang are to be found all the same.
            entry.member.watch(standstill::now(), self.watchdog);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        entry.member.close().await;
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Entry>)) {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        let mut all = members.to_vec();
        change(&mut all);
        *members = Snapshot::new(all);
    }

    /// The RSA private keys of a member, those without a `CKA_ID` last. With `search` the token is asked, so that keys that
    /// other programs made are found; without, a session's own table is read.
    ///
    /// # Errors
    /// When the member does not serve.
    pub async fn keys_on(&self, member: &str, search: bool) -> Result<Vec<TokenKey>, HsmError> {
        match self.manage(member, Request::Keys { search }).await? {
            Answer::Keys(keys) => Ok(keys),
            other => Err(mixed_up(&other)),
        }
    }

    /// Makes a key pair with the public exponent 65537. The private key stays on the token: sensitive, not extractable.
    ///
    /// # Errors
    /// When the id is taken or the token refuses. Nothing is tried twice: a key too many is worse than an error.
    pub async fn generate_rsa(&self, member: &str, spec: NewKey) -> Result<RsaPublic, HsmError> {
        match self.manage(member, Request::Generate(spec)).await? {
            Answer::Public(key) => Ok(key),
            other => Err(mixed_up(&other)),
        }
    }

    /// Brings a private key and its public key onto a member's token; from then on it is sensitive and not extractable.
    ///
    /// # Errors
    /// When the id is taken or the token refuses.
    pub async fn import_rsa(&self, member: &str, spec: NewKey, key: RsaPrivateParts) -> Result<(), HsmError> {
        match self.manage(member, Request::Import(spec, key)).await? {
            Answer::Done => Ok(()),
            other => Err(mixed_up(&other)),
        }
    }

    /// Closes all sessions, ends their threads and finalises modules that nobody else uses. Calls that are at a token run to
    /// their end first; a module with calls that hang is left as it is.
    pub async fn close(&self) {
        if let Some(supervisor) = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take() {
            supervisor.abort();
        }
        let mut closing = JoinSet::new();
        for entry in self.snapshot().iter() {
            let member = Arc::clone(&entry.member);
            closing.spawn(async move { member.close().await });
        }
        while closing.join_next().await.is_some() {}
    }

    /// Asks members until one of them has done it, or [`Failover`] gives up.
    async fn with_failover(&self, request: Request, deadline: Instant) -> Result<Done<Answer>, HsmError> {
        let request = Arc::new(request);
        let members = self.snapshot();
        let mut failover = Failover::new(deadline, self.watchdog, &mut self.budget(), standstill::now());
        loop {
            let now = standstill::now();
            let standing = |index: usize| {
                members[index].member.candidate(request.key(), now).map_or(Standing::Unable, Standing::Able)
            };
            let step = failover.next(now, &members.tiers, standing, |below| fastrand::usize(..below));
            let (index, share) = match step {
                Ok(Step::Ask { member, share }) => (member, share),
                // Does not happen yet: no member of this cluster is ever said to be returning.
                Ok(Step::Wait { until }) => {
                    standstill::sleep_until(until).await;
                    continue;
                }
                Err(GaveUp::Deadline) => return Err(HsmError::Deadline),
                Err(GaveUp::NoCandidate) => return Err(no_candidate_error(&members, &request)),
                Err(GaveUp::Error(error)) => {
                    // Members that are down are to be probed soon in this case, too.
                    let _ = no_candidate_error(&members, &request);
                    return Err(error);
                }
            };
            let Entry { name, member } = &members[index];
            let generation = member.shared.generation();
            let patience = Patience { share, watchdog: self.watchdog };
            let reply = match member.call(&request, deadline, patience).await {
                Outcome::Ran(Ok(value)) => {
                    let success = failover.succeeded();
                    for (rejecting, rejection) in success.contradicted {
                        members[rejecting].member.shared.contradicted(rejection.wrong, rejection.generation);
                    }
                    if let Some(failing) = success.failed_over_from {
                        members[failing].member.shared.observe(Event::FailedOver { to: name });
                    }
                    return Ok(Done { value, member: Arc::clone(name), retries: success.retries });
                }
                Outcome::Ran(Err(error)) => reply(error, generation, member.shared.is_doubtful(standstill::now())),
                Outcome::NotRun(error) => Reply::NotRun(error),
            };
            let failed = matches!(reply, Reply::Failed(_));
            failover.replied(reply, &mut self.budget(), standstill::now())?;
            if failed {
                member.shared.observe(Event::Retry);
            }
        }
    }

    /// One call, with time, on a given member.
    async fn manage(&self, name: &str, request: Request) -> Result<Answer, HsmError> {
        let member = self.entry(name)?.member;
        let patience = Patience { share: MANAGEMENT_PATIENCE, watchdog: MANAGEMENT_PATIENCE };
        member.direct(&Arc::new(request), standstill::now() + MANAGEMENT_PATIENCE, patience).await
    }

    fn probe_patience(&self) -> Patience {
        Patience { share: self.watchdog, watchdog: self.watchdog }
    }

    fn budget(&self) -> std::sync::MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Members {
        Arc::clone(&self.members.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn entry(&self, name: &str) -> Result<Entry, HsmError> {
        let members = self.snapshot();
        let found = members.iter().find(|entry| &*entry.name == name).cloned();
        found.ok_or_else(|| HsmError::NoMember(format!("none is called {name:?}")))
    }
}

/// What an error means for the operation: the fault table decides.
fn reply(error: HsmError, generation: u64, doubtful: bool) -> Reply<HsmError> {
    let fault = error.fault();
    if !fault.elsewhere {
        return Reply::Final(error);
    }
    if !matches!(fault.whose, Whose::Caller | Whose::Unclear) {
        return Reply::Failed(error);
    }
    let rejection = Rejection { wrong: matches!(error, HsmError::Refused { wrong: true }), generation };
    // The opinion of a member that was proved wrong not long ago does not count, whatever it was wrong about: an honest
    // caller may try again, and an attacker learns nothing.
    let error = if doubtful {
        HsmError::NoMember("the members that were asked have been wrong not long ago".to_owned())
    } else {
        error
    };
    Reply::Rejected { credible: error.is_data(), error, rejection }
}

/// Why no member can be asked. Members that are down are probed soon.
fn no_candidate_error(members: &[Entry], request: &Request) -> HsmError {
    let now = standstill::now();
    if let Some(key) = request.key()
        && members.iter().any(|entry| entry.member.only_lacks(key, now))
    {
        return HsmError::NoSuchKey(key.clone());
    }
    if members.iter().any(|entry| entry.member.is_full()) {
        return HsmError::QueueFull;
    }
    members.iter().for_each(|entry| entry.member.shared.health().probe_now(now));
    HsmError::NoMember("all are closed, drained or shut out".to_owned())
}

fn octets(answer: Answer) -> Result<Zeroizing<Vec<u8>>, HsmError> {
    match answer {
        Answer::Octets(octets) => Ok(octets),
        other => Err(mixed_up(&other)),
    }
}

fn public_octets(answer: Answer) -> Result<Vec<u8>, HsmError> {
    octets(answer).map(|mut octets| std::mem::take(&mut *octets))
}

/// Every request has one kind of answer, so this does not happen; but a wrong answer is an error, not a panic.
fn mixed_up(answer: &Answer) -> HsmError {
    let kind = match answer {
        Answer::Octets(_) => "octets",
        Answer::Keys(_) => "keys",
        Answer::Public(_) => "a public key",
        Answer::Done => "nothing",
    };
    HsmError::NoMember(format!("answered with {kind}"))
}
