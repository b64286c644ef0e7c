//! Many tokens as one: pick a member, submit, judge, and maybe try elsewhere.

pub(crate) mod member;
mod pick;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::warn;
use zeroize::Zeroizing;

use crate::Observer;
use crate::config::MemberConfig;
use crate::error::HsmError;
use crate::fault::{Fate, Fault, Whose};
use crate::keys::{KeyId, NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme};
use crate::module::Module;
use crate::session::{Answer, Request};
use cryptoki::error::RvError;
use member::Member;

/// How long key management may take: HSMs search for large primes for a minute and more.
const MANAGEMENT_PATIENCE: Duration = Duration::from_secs(120);
/// How long a member may take to come up before the others are not kept waiting any longer.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A result, and how it came about. Printing it leaves out the result, which may be a secret.
#[derive(Clone)]
pub struct Done<T> {
    /// The result.
    pub value: T,
    /// The member that made it.
    pub member: Arc<str>,
    /// How often the operation had failed before.
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

/// How a member is.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// Whether the last thing that depended on the member alone went well.
    pub up: bool,
    /// Sessions for operations; the one that holds the login is not counted.
    pub sessions_open: usize,
    /// Calls that wait or run.
    pub in_flight: usize,
    /// Why it was last down, also when it has come up since.
    pub last_error: Option<String>,
}

/// Tokens that hold the same keys. A handle: clones share everything.
#[derive(Clone)]
pub struct Cluster {
    members: Arc<[Entry]>,
    /// Lets equal members take turns.
    turn: Arc<AtomicUsize>,
}

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
    pub fn load(members: Vec<MemberConfig>, observer: Observer) -> Result<Cluster, HsmError> {
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
        let entries: Result<Vec<Entry>, HsmError> = members
            .into_iter()
            .zip(modules)
            .map(|(config, module)| {
                Ok(Entry {
                    name: config.name.as_str().into(),
                    member: Arc::new(Member::new(config, module, Arc::clone(&observer))?),
                })
            })
            .collect();
        Ok(Cluster { members: entries?.into(), turn: Arc::new(AtomicUsize::new(0)) })
    }

    /// Finds the tokens, logs in once for each, finds out by trial what each can do, and opens one session of each member.
    ///
    /// # Errors
    /// Only when no member came up; the error of one of them. Members that failed are logged, and tried again at most once
    /// a second when there are calls.
    pub async fn start(&self) -> Result<(), HsmError> {
        let mut starting = JoinSet::new();
        for entry in self.members.iter() {
            let member = Arc::clone(&entry.member);
            starting.spawn(async move {
                match tokio::time::timeout(START_PATIENCE, member.bring_up()).await {
                    Ok(result) => result,
                    Err(_) => {
                        warn!(member = member.shared.name, "member does not come up, going on without it");
                        Err(HsmError::Deadline)
                    }
                }
            });
        }
        let mut result = Err(HsmError::NoMember("none came up".to_owned()));
        while let Some(started) = starting.join_next().await {
            match started {
                Ok(Ok(())) => result = Ok(()),
                Ok(Err(error)) if result.is_err() => result = Err(error),
                _ => {}
            }
        }
        result
    }

    /// Decrypts on the member that suits best, and once more elsewhere if that failed for the member's own reasons. `avoid`
    /// names a member that is not to be asked unless there is no other.
    ///
    /// # Errors
    /// [`HsmError::is_data`] tells a bad ciphertext from a cluster that cannot serve.
    pub async fn decrypt(
        &self,
        key: &KeyId,
        oaep: Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        avoid: Option<&str>,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, HsmError> {
        let avoid = avoid.and_then(|name| self.position(name));
        self.anywhere(decrypt_request(key, oaep, ciphertext), deadline, avoid).await?.map(octets)
    }

    /// Signs a digest, on any member.
    ///
    /// # Errors
    /// [`HsmError::is_data`] when the digest does not have its hash's length.
    pub async fn sign(
        &self,
        key: &KeyId,
        scheme: SignScheme,
        digest: &[u8],
        deadline: Instant,
    ) -> Result<Done<Vec<u8>>, HsmError> {
        self.anywhere(sign_request(key, scheme, digest)?, deadline, None).await?.map(public_octets)
    }

    /// Random octets from any member.
    ///
    /// # Errors
    /// When no member serves.
    pub async fn random(&self, len: usize, deadline: Instant) -> Result<Vec<u8>, HsmError> {
        let done = self.anywhere(Request::Random(len), deadline, None).await?;
        public_octets(done.value)
    }

    /// How the members are, in the order of the configuration.
    #[must_use]
    pub fn members(&self) -> Vec<MemberStatus> {
        self.members.iter().map(|entry| entry.member.shared.status()).collect()
    }

    /// [`decrypt`](Self::decrypt) on one member.
    ///
    /// # Errors
    /// As for `decrypt`, and when there is no such member.
    pub async fn decrypt_on(
        &self,
        member: &str,
        key: &KeyId,
        oaep: Oaep,
        ciphertext: &[u8],
        deadline: Instant,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, HsmError> {
        self.here(member, decrypt_request(key, oaep, ciphertext), deadline).await?.map(octets)
    }

    /// [`sign`](Self::sign) on one member.
    ///
    /// # Errors
    /// As for `sign`, and when there is no such member.
    pub async fn sign_on(
        &self,
        member: &str,
        key: &KeyId,
        scheme: SignScheme,
        digest: &[u8],
        deadline: Instant,
    ) -> Result<Done<Vec<u8>>, HsmError> {
        self.here(member, sign_request(key, scheme, digest)?, deadline).await?.map(public_octets)
    }

    /// The RSA private keys of a member, from a session's own table.
    ///
    /// # Errors
    /// When the member does not serve.
    pub async fn keys_on(&self, member: &str) -> Result<Vec<KeyId>, HsmError> {
        match self.manage(member, Request::Keys).await? {
            Answer::Keys(ids) => Ok(ids),
            other => Err(mixed_up(&other)),
        }
    }

    /// Makes a key pair with the public exponent 65537. The private key stays on the token: sensitive, not extractable.
    ///
    /// # Errors
    /// When the id is taken or the token refuses. Nothing is tried twice: a key too many is worse than an error.
    pub async fn generate_rsa(&self, member: &str, spec: NewKey) -> Result<RsaPublic, HsmError> {
        match self.manage(member, Request::Generate(spec)).await? {
            Answer::Public(Some(key)) => Ok(key),
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

    /// The public half of a key; `None` when the token has no such key or does not tell.
    ///
    /// # Errors
    /// When the member does not serve.
    pub async fn public_key_on(&self, member: &str, id: &KeyId) -> Result<Option<RsaPublic>, HsmError> {
        match self.manage(member, Request::PublicKey(id.clone())).await? {
            Answer::Public(key) => Ok(key),
            other => Err(mixed_up(&other)),
        }
    }

    /// Closes all sessions, ends their threads and finalises modules that nobody else uses. Calls that are at a token run to
    /// their end first; a module with calls that hang is left as it is.
    pub async fn close(&self) {
        let mut closing = JoinSet::new();
        for entry in self.members.iter() {
            let member = Arc::clone(&entry.member);
            closing.spawn(async move { member.close().await });
        }
        while closing.join_next().await.is_some() {}
    }

    /// One call with one retry, elsewhere if there is an elsewhere.
    async fn anywhere(
        &self,
        request: Request,
        deadline: Instant,
        avoid: Option<usize>,
    ) -> Result<Done<Answer>, HsmError> {
        let request = Arc::new(request);
        let first = self.choose(avoid)?;
        let error = match first.member.call(&request, deadline).await {
            Ok(value) => return Ok(first.done(value, 0)),
            Err(error) => error,
        };
        if !error.fault().retry || Instant::now() >= deadline {
            return Err(error);
        }
        let second = self.choose(self.position(&first.name)).unwrap_or(first);
        if Arc::ptr_eq(&first.name, &second.name) && !may_repeat(&error) {
            return Err(error);
        }
        match second.member.call(&request, deadline).await {
            Ok(value) => Ok(second.done(value, 1)),
            Err(again) => Err(judge_both(&error, again)),
        }
    }

    /// One call with one retry, on a given member.
    async fn here(&self, name: &str, request: Request, deadline: Instant) -> Result<Done<Answer>, HsmError> {
        let request = Arc::new(request);
        let entry = self.entry(name)?;
        let error = match entry.member.call(&request, deadline).await {
            Ok(value) => return Ok(entry.done(value, 0)),
            Err(error) => error,
        };
        if !error.fault().retry || !may_repeat(&error) || Instant::now() >= deadline {
            return Err(error);
        }
        match entry.member.call(&request, deadline).await {
            Ok(value) => Ok(entry.done(value, 1)),
            Err(again) => Err(judge_both(&error, again)),
        }
    }

    /// One call, with time, on a given member.
    async fn manage(&self, name: &str, request: Request) -> Result<Answer, HsmError> {
        let deadline = Instant::now() + MANAGEMENT_PATIENCE;
        self.entry(name)?.member.call(&Arc::new(request), deadline).await
    }

    fn choose(&self, avoid: Option<usize>) -> Result<&Entry, HsmError> {
        let now = Instant::now();
        for entry in self.members.iter().filter(|entry| entry.member.is_due(now)) {
            // In the background, so that no call pays for a member that is still down.
            let member = Arc::clone(&entry.member);
            tokio::spawn(async move {
                // The member itself logs what changed.
                let _ = tokio::time::timeout(START_PATIENCE, member.bring_up()).await;
            });
        }
        let candidates: Vec<_> = self.members.iter().map(|entry| entry.member.candidate()).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        pick::pick(&candidates, avoid, now, turn).and_then(|index| self.members.get(index)).ok_or_else(|| {
            if self.members.iter().any(|entry| entry.member.is_full()) {
                HsmError::QueueFull
            } else {
                HsmError::NoMember("all are closed or shut out".to_owned())
            }
        })
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|entry| &*entry.name == name)
    }

    fn entry(&self, name: &str) -> Result<&Entry, HsmError> {
        self.members
            .iter()
            .find(|entry| &*entry.name == name)
            .ok_or_else(|| HsmError::NoMember(format!("none is called {name:?}")))
    }
}

impl Entry {
    fn done(&self, value: Answer, retries: u32) -> Done<Answer> {
        Done { value, member: Arc::clone(&self.name), retries }
    }
}

/// Whether the same member may answer differently the second time.
fn may_repeat(error: &HsmError) -> bool {
    let Fault { whose, fate, .. } = error.fault();
    // A new session may help; and a token that blamed nobody may blame the input when asked again.
    fate == Fate::Rebuild || (whose == Whose::Unclear && matches!(error, HsmError::Pkcs11 { .. }))
}

/// Both tries failed: what the caller is told.
fn judge_both(first: &HsmError, second: HsmError) -> HsmError {
    let earlier = first.fault();
    match second {
        HsmError::Pkcs11 { call, rv, fault, tries } => {
            HsmError::Pkcs11 { fault: Fault::repeated(call, earlier, fault), call, rv, tries: first.tries() + tries }
        }
        other => other,
    }
}

fn decrypt_request(key: &KeyId, oaep: Oaep, ciphertext: &[u8]) -> Request {
    Request::Decrypt { key: key.clone(), oaep, ciphertext: ciphertext.to_vec() }
}

fn sign_request(key: &KeyId, scheme: SignScheme, digest: &[u8]) -> Result<Request, HsmError> {
    if digest.len() != scheme.hash().output_len() {
        return Err(HsmError::new("C_Sign", RvError::DataLenRange));
    }
    Ok(Request::Sign { key: key.clone(), scheme, digest: digest.to_vec() })
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
