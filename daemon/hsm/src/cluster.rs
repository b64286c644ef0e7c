//! Many tokens as one: pick a member, submit, judge, and maybe elsewhere.

mod health;
pub(crate) mod member;
pub(crate) mod shared;
mod supervisor;

use std::collections::BTreeSet;
use std::fmt;
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
use crate::policy::pick;
use crate::request::{Answer, Check, KnownGood, Outcome, Request};
use crate::standstill;
use crate::{Event, Observer};
use cryptoki::error::RvError;
pub use health::{LastError, MemberState};
pub use member::MemberStatus;
use member::{Member, Patience};

/// How often input has to be found wrong before its caller hears of it; by different members where there are as many. One that
/// is throttled, or wrong now and then, looks the same for a moment, and the known-good operation after it may go right.
/// Who sends bad input pays for it by its rate.
pub const OPINIONS: usize = 5;
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

/// A snapshot: an operation that has begun goes on with the members it began with.
type Members = Arc<[Entry]>;

#[derive(Clone)]
struct Entry {
    name: Arc<str>,
    member: Arc<Member>,
}

/// A member found the input wrong, and was not to blame itself.
struct Refusal {
    index: usize,
    generation: u64,
    /// It gave a result, which was wrong, rather than an error.
    wrong: bool,
    /// What the caller would be told.
    error: HsmError,
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
            members: Arc::new(RwLock::new(entries?.into())),
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
            member.shared.health().hurry(standstill::now());
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
        self.anywhere(request, deadline).await?.map(octets)
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
        self.anywhere(request, deadline).await?.map(public_octets)
    }

    /// Random octets from any member.
    ///
    /// # Errors
    /// When no member serves.
    pub async fn random(&self, len: usize, deadline: Instant) -> Result<Vec<u8>, HsmError> {
        let done = self.anywhere(Request::Random(len), deadline).await?;
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
        member.shared.health().hurry(standstill::now());
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
        *members = all.into();
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

    /// Until some member has done it, or nobody is left who could.
    async fn anywhere(&self, request: Request, deadline: Instant) -> Result<Done<Answer>, HsmError> {
        let request = Arc::new(request);
        let members = self.snapshot();
        let mut tried = vec![false; members.len()];
        let mut rounds = 1;
        // The members that found the input wrong and were not to blame themselves.
        let mut refusals: Vec<Refusal> = Vec::new();
        let mut failed: Option<HsmError> = None;
        // The member that failed last.
        let mut failing: Option<usize> = None;
        let mut retries = 0;
        self.budget().deposit(standstill::now());
        loop {
            let now = standstill::now();
            if now >= deadline {
                return Err(failed.unwrap_or(HsmError::Deadline));
            }
            let mut chosen = choose(&members, &request, &tried, now);
            let most_rounds = if refusals.is_empty() { 2 } else { OPINIONS };
            if chosen.is_none() && rounds < most_rounds && (failed.is_some() || !refusals.is_empty()) {
                // Everybody has been asked. What failed a moment ago may work again: who is still up is asked once more.
                rounds += 1;
                tried.fill(false);
                chosen = choose(&members, &request, &tried, now);
            }
            let Some((index, alone)) = chosen else {
                let nobody = nobody(&members, &request);
                let doubtful = refusals.iter().position(|refusal| !refusal.error.is_data());
                let refusal = (!refusals.is_empty()).then(|| refusals.swap_remove(doubtful.unwrap_or(0)));
                return Err(refusal.map(|refusal| refusal.error).or(failed).unwrap_or(nobody));
            };
            let entry = &members[index];
            tried[index] = true;
            let generation = entry.member.shared.generation();
            let error = match entry.member.call(&request, deadline, self.patience(now, deadline, alone)).await {
                Outcome::Ran(Ok(value)) => {
                    for refusal in refusals {
                        members[refusal.index].member.shared.contradicted(refusal.wrong, refusal.generation);
                    }
                    if let Some(failing) = failing.filter(|failing| *failing != index) {
                        members[failing].member.shared.observe(Event::FailedOver { to: &entry.name });
                    }
                    return Ok(Done { value, member: Arc::clone(&entry.name), retries });
                }
                Outcome::Ran(Err(error)) => error,
                Outcome::NotRun(error) => {
                    failed = failed.or(Some(error));
                    failing = Some(index);
                    continue;
                }
            };
            let fault = error.fault();
            if !fault.elsewhere {
                return Err(error);
            }
            if matches!(fault.whose, Whose::Caller | Whose::Unclear) {
                // The opinion of a member that was proved wrong not long ago does not count, whatever it was wrong about: an
                // honest caller may try again, and a bad one learns nothing.
                let wrong = matches!(error, HsmError::Refused { wrong: true });
                let error = if entry.member.shared.is_doubtful(standstill::now()) {
                    HsmError::NoMember("the members that were asked have been wrong not long ago".to_owned())
                } else {
                    error
                };
                if refusals.len() + 1 == OPINIONS {
                    let doubtful = refusals.into_iter().map(|refusal| refusal.error).find(|error| !error.is_data());
                    return Err(doubtful.unwrap_or(error));
                }
                refusals.push(Refusal { index, generation, wrong, error });
                continue;
            }
            if !self.budget().withdraw(standstill::now()) {
                return Err(error);
            }
            retries += 1;
            entry.member.shared.observe(Event::Retry);
            failing = Some(index);
            failed = Some(error);
        }
    }

    /// One call, with time, on a given member.
    async fn manage(&self, name: &str, request: Request) -> Result<Answer, HsmError> {
        let member = self.entry(name)?.member;
        let patience = Patience { share: MANAGEMENT_PATIENCE, watchdog: MANAGEMENT_PATIENCE };
        member.direct(&Arc::new(request), standstill::now() + MANAGEMENT_PATIENCE, patience).await
    }

    /// How long a try may take: half of what is left, as long as there is somebody to go to with the other half.
    fn patience(&self, now: Instant, deadline: Instant, alone: bool) -> Patience {
        let left = deadline.saturating_duration_since(now);
        let share = if alone { left } else { left / 2 };
        Patience { share: share.min(self.watchdog), watchdog: self.watchdog }
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

/// The member for the next try, and whether there is no other after it.
fn choose(members: &[Entry], request: &Request, tried: &[bool], now: Instant) -> Option<(usize, bool)> {
    let candidates: Vec<_> = members.iter().map(|e| e.member.candidate(request.key(), now)).collect();
    let fresh = candidates.iter().zip(tried).filter(|(c, tried)| c.able && !**tried).count();
    let index = pick::pick(&candidates, |index| tried[index], |below| fastrand::usize(..below))?;
    Some((index, fresh == 1))
}

/// Why nobody can be asked. Closed members are given the chance to show that they serve again.
fn nobody(members: &[Entry], request: &Request) -> HsmError {
    let now = standstill::now();
    if let Some(key) = request.key()
        && members.iter().any(|entry| entry.member.only_lacks(key, now))
    {
        return HsmError::NoSuchKey(key.clone());
    }
    if members.iter().any(|entry| entry.member.is_full()) {
        return HsmError::QueueFull;
    }
    members.iter().for_each(|entry| entry.member.shared.health().hurry(now));
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
