//! One logged-in session on its own OS thread, with its table of key handles.
//!
//! PKCS#11 calls block, and a session may only do one thing at a time; a thread for each session says both. Jobs come one at
//! a time over a channel and bring along the pool's lease on the session, which is given back when the call has returned,
//! whether or not anybody still waits for the result.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki_sys::CK_ULONG;
use tokio::sync::oneshot;
use tracing::warn;
use zeroize::{Zeroize, Zeroizing};

use crate::Event;
use crate::cluster::member::{Lease, Opening, Scheme, Shared};
use crate::error::HsmError;
use crate::fault::{Fate, PARAMETER_REFUSALS};
use crate::keys::{KeyId, NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme};
use crate::oaep;

/// How long a session that looked for an unknown key in vain waits before it looks again.
const SEARCH_PAUSE: Duration = Duration::from_secs(2);

/// Room for a signature when a token does not tell a modulus: enough for 16384 bits.
const LARGEST_MODULUS: usize = 2048;

/// What a session is asked to do. Not `Debug`, like its answer: neither belongs into a log.
pub(crate) enum Request {
    Decrypt { key: KeyId, oaep: Oaep, ciphertext: Vec<u8> },
    Sign { key: KeyId, scheme: SignScheme, digest: Vec<u8> },
    Random(usize),
    Keys,
    PublicKey(KeyId),
    Generate(NewKey),
    Import(NewKey, RsaPrivateParts),
}

impl Request {
    fn op(&self) -> &'static str {
        match self {
            Request::Decrypt { .. } => "decrypt",
            Request::Sign { .. } => "sign",
            Request::Random(_) => "random",
            Request::Keys => "keys",
            Request::PublicKey(_) => "public_key",
            Request::Generate(_) => "generate",
            Request::Import(..) => "import",
        }
    }
}

/// What comes back.
pub(crate) enum Answer {
    Octets(Zeroizing<Vec<u8>>),
    Keys(Vec<KeyId>),
    Public(Option<RsaPublic>),
    Done,
}

/// A request on its way to a session.
pub(crate) struct Job {
    pub(crate) request: Arc<Request>,
    pub(crate) deadline: Instant,
    pub(crate) reply: oneshot::Sender<Result<Answer, HsmError>>,
    pub(crate) lease: Lease,
}

/// The pooled object: the way to a session's thread. The thread ends when its handle is dropped.
pub(crate) struct Handle {
    jobs: Sender<Job>,
    alive: Arc<AtomicBool>,
    generation: u64,
}

impl Handle {
    /// Whether the session may be used: its thread lives, and no fault has made its generation stale.
    pub(crate) fn is_usable(&self, generation: u64) -> bool {
        self.alive.load(Ordering::Acquire) && self.generation == generation
    }

    /// A sender for one job; the handle itself travels inside the job's lease.
    pub(crate) fn sender(&self) -> Sender<Job> {
        self.jobs.clone()
    }
}

/// Marks the handle when the thread ends, also by a panic.
struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Starts a thread that opens a session, tells whether that went well, and then serves jobs.
pub(crate) fn spawn(shared: Arc<Shared>, opening: Opening) -> std::io::Result<JoinHandle<()>> {
    // Counted before it runs, so that the limit on threads holds under a storm too.
    let counted = shared.count_thread();
    thread::Builder::new().name(format!("hsm {}", shared.name)).spawn(move || {
        let _counted = counted;
        run(&shared, opening);
    })
}

fn run(shared: &Arc<Shared>, opening: Opening) {
    let generation = shared.generation();
    let started = Instant::now();
    let opened = OpenSession::open(shared, generation);
    shared.observe_call("open", opened.as_ref().err(), started.elapsed());
    let mut session = match opened {
        Ok(session) => session,
        Err(error) => {
            shared.open_failed(&error, generation);
            opening.report(Err(error));
            return;
        }
    };
    shared.succeeded();
    let (jobs, inbox) = channel::bounded(1);
    let alive = Arc::new(AtomicBool::new(true));
    let _alive = Alive(Arc::clone(&alive));
    let handle = Handle { jobs, alive, generation };
    opening.report(Ok(handle));
    if let Some(last) = session.serve(&inbox) {
        // Closed before anybody hears of it, so that a token that counts sessions has room for the next.
        drop(session);
        last.lease.discard();
        let _ = last.reply.send(last.result);
    }
}

/// A job after which the session cannot go on.
struct LastJob {
    lease: Lease,
    reply: oneshot::Sender<Result<Answer, HsmError>>,
    result: Result<Answer, HsmError>,
}

/// A private key as one session knows it.
#[derive(Clone, Copy)]
struct Key {
    handle: ObjectHandle,
    /// `None` when the token does not tell.
    modulus_len: Option<usize>,
    /// What CKA_DECRYPT says; `true` when the token does not tell.
    decrypts: bool,
}

/// The session and all that dies with it.
struct OpenSession<'a> {
    shared: &'a Arc<Shared>,
    session: Session,
    /// Of sessions: faults end a whole generation.
    generation: u64,
    keys: HashMap<KeyId, Key>,
    /// How many keys had been made on the member when `keys` was filled.
    keys_made: u64,
    /// When a key was last looked for in vain.
    searched_again: Option<Instant>,
}

impl<'a> OpenSession<'a> {
    fn open(shared: &'a Arc<Shared>, generation: u64) -> Result<Self, HsmError> {
        let slot = shared.ensure_login()?;
        let pkcs11 = shared.module.pkcs11();
        let session = match pkcs11.open_rw_session(slot) {
            // A token that is write-protected can still decrypt and sign.
            Err(Error::Pkcs11(RvError::TokenWriteProtected, _)) => pkcs11.open_ro_session(slot),
            session => session,
        }?;
        shared.session_opened(generation);
        let mut open =
            OpenSession { shared, session, generation, keys: HashMap::new(), keys_made: 0, searched_again: None };
        open.search()?;
        shared.try_out(|| open.find_schemes());
        Ok(open)
    }

    /// Serves until nobody can send jobs any more, or until one spoils the session.
    fn serve(&mut self, inbox: &Receiver<Job>) -> Option<LastJob> {
        while let Ok(job) = inbox.recv() {
            let Job { request, deadline, reply, lease } = job;
            if Instant::now() >= deadline || reply.is_closed() {
                drop(lease);
                let _ = reply.send(Err(HsmError::Deadline));
                continue;
            }
            let started = Instant::now();
            let result = self.perform(&request);
            self.shared.observe_call(request.op(), result.as_ref().err(), started.elapsed());
            let fate = match &result {
                Ok(_) => {
                    self.shared.succeeded();
                    Fate::Keep
                }
                Err(error) => {
                    self.shared.call_failed(error, self.generation);
                    error.fault().fate
                }
            };
            // The lease goes first, so that whoever reacts to the reply finds the session free. A caller that has left does
            // not take its result: it is zeroised right here.
            match fate {
                Fate::Keep => {
                    drop(lease);
                    let _ = reply.send(result);
                }
                Fate::Rebuild => {
                    return Some(LastJob { lease, reply, result });
                }
            }
        }
        None
    }

    fn perform(&mut self, request: &Request) -> Result<Answer, HsmError> {
        match request {
            Request::Decrypt { key, oaep, ciphertext } => {
                let key = self.key(key)?;
                self.decrypt(key, *oaep, ciphertext).map(Answer::Octets)
            }
            Request::Sign { key, scheme, digest } => {
                let key = self.key(key)?;
                let room = key.modulus_len.unwrap_or(LARGEST_MODULUS);
                self.shared
                    .module
                    .sign(&self.session, &scheme.mechanism(), key.handle, &scheme.input(digest), room)
                    .map(|signature| Answer::Octets(Zeroizing::new(signature)))
            }
            Request::Random(len) => {
                let mut octets = Zeroizing::new(vec![0; *len]);
                self.session.generate_random_slice(&mut octets)?;
                Ok(Answer::Octets(octets))
            }
            Request::Keys => {
                self.refresh()?;
                let mut ids: Vec<KeyId> = self.keys.keys().cloned().collect();
                ids.sort();
                Ok(Answer::Keys(ids))
            }
            Request::PublicKey(id) => match self.key(id) {
                Ok(key) => self.public_key(id, key).map(Answer::Public),
                Err(HsmError::NoSuchKey(_)) => Ok(Answer::Public(None)),
                Err(error) => Err(error),
            },
            Request::Generate(spec) => self.generate(spec).map(|key| Answer::Public(Some(key))),
            Request::Import(spec, parts) => self.import(spec, parts).map(|()| Answer::Done),
        }
    }

    /// One search for all RSA private keys of the token.
    fn search(&mut self) -> Result<(), HsmError> {
        // Read before the search: a key made meanwhile leads to one search too many, never to one too few.
        let keys_made = self.shared.keys_made();
        self.shared.observe(Event::KeySearch);
        let handles = self
            .session
            .find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::RSA)])?;
        let mut keys = HashMap::with_capacity(handles.len());
        for handle in handles {
            let attributes = match self
                .session
                .get_attributes(handle, &[AttributeType::Id, AttributeType::Modulus, AttributeType::Decrypt])
            {
                // Destroyed between the search and now.
                Err(Error::Pkcs11(RvError::ObjectHandleInvalid, _)) => continue,
                attributes => attributes?,
            };
            let mut id = None;
            let mut key = Key { handle, modulus_len: None, decrypts: true };
            for attribute in attributes {
                match attribute {
                    Attribute::Id(octets) if !octets.is_empty() => id = Some(KeyId(octets)),
                    Attribute::Modulus(n) => key.modulus_len = modulus_len(&n),
                    Attribute::Decrypt(decrypts) => key.decrypts = decrypts,
                    _ => {}
                }
            }
            // A key without an id cannot be asked for.
            let Some(id) = id else { continue };
            if keys.contains_key(&id) {
                warn!(member = self.shared.name, key = %id, "two keys with one CKA_ID, the second is never used");
                continue;
            }
            keys.insert(id, key);
        }
        self.keys = keys;
        self.keys_made = keys_made;
        Ok(())
    }

    /// Searches again if the table is known to be old.
    fn refresh(&mut self) -> Result<(), HsmError> {
        if self.keys_made == self.shared.keys_made() {
            return Ok(());
        }
        self.search()
    }

    fn key(&mut self, id: &KeyId) -> Result<Key, HsmError> {
        if let Some(key) = self.keys.get(id) {
            return Ok(*key);
        }
        // It may have been made elsewhere in the meantime. Whoever asks for keys that do not exist must not turn every call
        // into a search, though.
        if self.searched_again.is_none_or(|at| at.elapsed() >= SEARCH_PAUSE) {
            self.searched_again = Some(Instant::now());
            self.search()?;
        } else {
            self.refresh()?;
        }
        self.keys.get(id).copied().ok_or_else(|| HsmError::NoSuchKey(id.clone()))
    }

    fn decrypt(&self, key: Key, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        if ciphertext.len() != room {
            // The token would say the same, at the price of an operation.
            return Err(HsmError::new("C_Decrypt", RvError::EncryptedDataLenRange));
        }
        match self.scheme(key, oaep)? {
            Scheme::Native => {
                self.shared.module.decrypt(&self.session, &oaep.mechanism(), key.handle, ciphertext, room)
            }
            Scheme::Raw => {
                let number =
                    self.shared.module.decrypt(&self.session, &Mechanism::RsaX509, key.handle, ciphertext, room)?;
                // Some tokens strip leading zeros, since the result is a number to them.
                let zeros =
                    room.checked_sub(number.len()).ok_or_else(|| HsmError::new("C_Decrypt", RvError::GeneralError))?;
                let mut block = Zeroizing::new(vec![0; room]);
                block.split_at_mut(zeros).1.copy_from_slice(&number);
                oaep::unpad(oaep, &block).ok_or_else(|| HsmError::new("C_Decrypt", RvError::EncryptedDataInvalid))
            }
        }
    }

    /// How this token decrypts with these parameters: what was found out before, or else a trial with this key.
    fn scheme(&self, key: Key, oaep: Oaep) -> Result<Scheme, HsmError> {
        if let Some(scheme) = self.shared.scheme(oaep) {
            return Ok(scheme);
        }
        let scheme = self.find_scheme(key, oaep)?;
        self.shared.remember_scheme(oaep, scheme);
        Ok(scheme)
    }

    /// Tries every combination with some key that may decrypt. Without such a key the trials wait for the first decryption.
    fn find_schemes(&self) -> bool {
        let Some(key) = self.keys.values().find(|key| key.decrypts && key.modulus_len.is_some()).copied() else {
            return false;
        };
        // What a trial leaves open, the first decryption with those parameters tries again.
        Oaep::all().all(|oaep| self.scheme(key, oaep).is_ok())
    }

    /// Decrypts nonsense with the native mechanism. The parameters are refused by `C_DecryptInit` on some tokens and by
    /// `C_Decrypt` on others; any other answer is about the nonsense. Either way no operation is left open.
    fn find_scheme(&self, key: Key, oaep: Oaep) -> Result<Scheme, HsmError> {
        let room = key.modulus_len.unwrap_or(LARGEST_MODULUS);
        // Smaller than any modulus of its length, whose first bit is set.
        let mut nonsense = vec![0x55; room];
        if let Some(first) = nonsense.first_mut() {
            *first = 0;
        }
        let refused = |error: &HsmError| PARAMETER_REFUSALS.iter().any(|code| error.is_code(*code));
        match self.shared.module.decrypt(&self.session, &oaep.mechanism(), key.handle, &nonsense, room) {
            Err(error) if refused(&error) => Ok(Scheme::Raw),
            Err(error) if error.fault().fate == Fate::Rebuild => Err(error),
            // The key may not decrypt: nothing was learnt about the parameters.
            Err(error @ HsmError::Pkcs11 { call, .. }) if call != "C_Decrypt" => Err(error),
            _ => Ok(Scheme::Native),
        }
    }

    fn public_key(&self, id: &KeyId, key: Key) -> Result<Option<RsaPublic>, HsmError> {
        if let Some(public) = self.read_public(key.handle)? {
            return Ok(Some(public));
        }
        // Not every token keeps the public exponent beside the private key.
        let objects = self.session.find_objects(&[
            Attribute::Class(ObjectClass::PUBLIC_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Id(id.0.clone()),
        ])?;
        match objects.first() {
            Some(object) => self.read_public(*object),
            None => Ok(None),
        }
    }

    fn read_public(&self, object: ObjectHandle) -> Result<Option<RsaPublic>, HsmError> {
        let attributes =
            self.session.get_attributes(object, &[AttributeType::Modulus, AttributeType::PublicExponent])?;
        let mut n = Vec::new();
        let mut e = Vec::new();
        for attribute in attributes {
            match attribute {
                Attribute::Modulus(octets) => n = without_leading_zeros(&octets).to_vec(),
                Attribute::PublicExponent(octets) => e = without_leading_zeros(&octets).to_vec(),
                _ => {}
            }
        }
        Ok((!n.is_empty() && !e.is_empty()).then_some(RsaPublic { n, e }))
    }

    fn generate(&mut self, spec: &NewKey) -> Result<RsaPublic, HsmError> {
        self.expect_free(&spec.id)?;
        let mut public = public_template(spec);
        public.push(Attribute::ModulusBits(CK_ULONG::from(spec.bits).into()));
        public.push(Attribute::PublicExponent(vec![1, 0, 1]));
        let (public, private) =
            self.session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private_template(spec))?;
        let key = self.read_public(public)?.ok_or_else(|| HsmError::Token {
            token: self.shared.token.to_string(),
            reason: "does not tell the public key it made".to_owned(),
        })?;
        self.add(spec, private, &key.n);
        Ok(key)
    }

    fn import(&mut self, spec: &NewKey, parts: &RsaPrivateParts) -> Result<(), HsmError> {
        self.expect_free(&spec.id)?;
        let mut public = public_template(spec);
        public.extend([
            Attribute::Class(ObjectClass::PUBLIC_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Modulus(parts.n.clone()),
            Attribute::PublicExponent(parts.e.clone()),
        ]);
        let mut private = SecretTemplate(private_template(spec));
        private.0.extend([
            Attribute::Class(ObjectClass::PRIVATE_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Modulus(parts.n.clone()),
            Attribute::PublicExponent(parts.e.clone()),
            Attribute::PrivateExponent(parts.d.clone()),
            Attribute::Prime1(parts.p.clone()),
            Attribute::Prime2(parts.q.clone()),
            Attribute::Exponent1(parts.dp.clone()),
            Attribute::Exponent2(parts.dq.clone()),
            Attribute::Coefficient(parts.qinv.clone()),
        ]);
        let private = self.session.create_object(&private.0)?;
        if let Err(error) = self.session.create_object(&public) {
            // Half a key would be in the way of the next attempt.
            if let Err(left) = self.session.destroy_object(private) {
                warn!(member = self.shared.name, key = %spec.id, error = %HsmError::from(left), "half an imported key is left");
            }
            return Err(error.into());
        }
        self.add(spec, private, &parts.n);
        Ok(())
    }

    fn expect_free(&mut self, id: &KeyId) -> Result<(), HsmError> {
        if id.0.is_empty() {
            return Err(HsmError::new("C_CreateObject", RvError::AttributeValueInvalid));
        }
        match self.key(id) {
            Ok(_) => Err(HsmError::KeyExists(id.clone())),
            Err(HsmError::NoSuchKey(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// This session knows the new key at once; the others are told that their tables are old.
    fn add(&mut self, spec: &NewKey, handle: ObjectHandle, n: &[u8]) {
        let up_to_date = self.keys_made == self.shared.keys_made();
        let made = self.shared.key_made();
        self.keys.insert(spec.id.clone(), Key { handle, modulus_len: modulus_len(n), decrypts: spec.usage.decrypts() });
        if up_to_date {
            self.keys_made = made;
        }
    }
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        self.shared.session_closed(self.generation);
    }
}

fn public_template(spec: &NewKey) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Id(spec.id.0.clone()),
        Attribute::Label(spec.label.clone().into_bytes()),
        Attribute::Verify(spec.usage.signs()),
        Attribute::Encrypt(spec.usage.decrypts()),
    ]
}

fn private_template(spec: &NewKey) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Id(spec.id.0.clone()),
        Attribute::Label(spec.label.clone().into_bytes()),
        Attribute::Sign(spec.usage.signs()),
        Attribute::Decrypt(spec.usage.decrypts()),
    ]
}

/// Attributes that hold a private key; zeroised on drop.
struct SecretTemplate(Vec<Attribute>);

impl Drop for SecretTemplate {
    fn drop(&mut self) {
        for attribute in &mut self.0 {
            if let Attribute::PrivateExponent(octets)
            | Attribute::Prime1(octets)
            | Attribute::Prime2(octets)
            | Attribute::Exponent1(octets)
            | Attribute::Exponent2(octets)
            | Attribute::Coefficient(octets) = attribute
            {
                octets.zeroize();
            }
        }
    }
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|octet| **octet == 0).count();
    number.split_at(zeros).1
}

/// `None` for an empty modulus, which is how some tokens say that they do not tell.
fn modulus_len(n: &[u8]) -> Option<usize> {
    Some(without_leading_zeros(n).len()).filter(|len| *len > 0)
}
