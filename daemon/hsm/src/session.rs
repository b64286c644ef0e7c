//! One logged-in session with its table of key handles, and what it can do.
//!
//! The handles belong to the session and die with it.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki_sys::CK_ULONG;
use ring::rand::{SecureRandom, SystemRandom};
use tracing::warn;
use zeroize::{Zeroize, Zeroizing};

use crate::Event;
use crate::clock::thread_time;
use crate::cluster::shared::{Scheme, Shared};
use crate::error::{HsmError, class};
use crate::fault::{Fate, PARAMETER_REFUSALS, Whose};
use crate::identity::{KeyRef, without_leading_zeros};
use crate::key_table::{self, FoundKey, FoundPublic, KeyTable, Purpose};
use crate::keys::{KeyId, NewKey, Oaep, RsaPrivateParts, RsaPublic};
use crate::module::{Module, OwnLogin};
use crate::oaep;
use crate::request::{Answer, Check, Request, first_known, known_for};
use crate::standstill;
use crate::usual_cost::Cost;

/// How long a session that looked for an unknown key in vain waits before it looks again.
const SEARCH_PAUSE: Duration = Duration::from_secs(2);

/// Room for a signature when a token does not tell a modulus: enough for 16384 bits.
const LARGEST_MODULUS: usize = 2048;

/// A private key as one session knows it.
pub(crate) type Key = key_table::Key<ObjectHandle>;

impl Key {
    /// Room for a signature.
    pub(crate) fn room(&self) -> usize {
        self.modulus_len.unwrap_or(LARGEST_MODULUS)
    }
}

/// The session and all that dies with it.
pub(crate) struct OpenSession<'a> {
    shared: &'a Arc<Shared>,
    session: Session,
    /// Of sessions: a member that is closed ends a whole generation.
    generation: u64,
    keys: KeyTable<ObjectHandle>,
    /// How many keys had been made on the member when `keys` was filled.
    keys_made: u64,
    /// When a key was last looked for in vain.
    searched_again: Option<Instant>,
    /// Processor time of operations that is not added to the member's sum yet.
    unbooked: Cell<Duration>,
}

/// What an operation came to, before it is known who is to blame.
enum Finding {
    Right(Zeroizing<Vec<u8>>),
    /// The input or the member is at fault: by a `wrong` result, or by an error.
    Doubtful {
        wrong: bool,
    },
    /// The member's failure, or its lack.
    Failed(HsmError),
}

impl Finding {
    fn of(result: Result<Zeroizing<Vec<u8>>, HsmError>, check: Option<&Check>) -> Self {
        match result {
            Ok(octets) if check.is_none_or(|check| check(&octets)) => Finding::Right(octets),
            Ok(_) => Finding::Doubtful { wrong: true },
            Err(error) if matches!(error.fault().whose, Whose::Caller | Whose::Unclear) => {
                // A random key is checked for nothing, so that this takes as long as a wrong one.
                let mut random = Zeroizing::new([0; 32]);
                let _ = SystemRandom::new().fill(&mut *random);
                let _ = check.is_none_or(|check| check(&*random));
                Finding::Doubtful { wrong: false }
            }
            Err(error) => Finding::Failed(error),
        }
    }
}

impl<'a> OpenSession<'a> {
    pub(crate) fn open(shared: &'a Arc<Shared>, generation: u64) -> Result<Self, HsmError> {
        let slot = shared.ensure_login()?;
        let pkcs11 = shared.module.pkcs11();
        let session = match pkcs11.open_rw_session(slot) {
            // A token that is write-protected can still decrypt and sign.
            Err(Error::Pkcs11(RvError::TokenWriteProtected, _)) => pkcs11.open_ro_session(slot),
            session => session,
        }?;
        shared.session_opened(generation);
        let mut open = OpenSession {
            shared,
            session,
            generation,
            keys: KeyTable::default(),
            keys_made: 0,
            searched_again: None,
            unbooked: Cell::default(),
        };
        open.search()?;
        shared.try_out(|| open.find_schemes());
        Ok(open)
    }

    /// Does what is asked for. What the token did of it is observed once, by its return code: what is thought of it comes
    /// after.
    pub(crate) fn perform(&mut self, request: &Request) -> Result<Answer, HsmError> {
        let (shared, op) = (self.shared, request.op());
        match request {
            Request::Decrypt { check, .. } | Request::Sign { check, .. } => {
                let started = standstill::now();
                let result = self.calculate(request);
                let finding = Finding::of(result, check.as_ref());
                self.book(request, &finding, standstill::since(started));
                self.judge(request, finding).map(Answer::Octets)
            }
            Request::Probe => self.probe().map(|()| Answer::Done),
            Request::Random(len) => shared.observed(op, || {
                let mut octets = Zeroizing::new(vec![0; *len]);
                self.session.generate_random_slice(&mut octets)?;
                Ok(Answer::Octets(octets))
            }),
            Request::Keys { search } => shared.observed(op, || {
                if *search { self.search() } else { self.refresh() }?;
                Ok(Answer::Keys(self.keys.list()))
            }),
            Request::Generate(spec) => shared.observed(op, || self.generate(spec).map(Answer::Public)),
            Request::Import(spec, parts) => shared.observed(op, || self.import(spec, parts).map(|()| Answer::Done)),
        }
    }

    /// The private key's work, unjudged. Other requests have none.
    fn calculate(&mut self, request: &Request) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        match request {
            Request::Decrypt { key, oaep, ciphertext, .. } => {
                let key = self.key(key, Purpose::Decrypt)?;
                self.decrypt(key, *oaep, ciphertext)
            }
            Request::Sign { key, scheme, digest, .. } => {
                let key = self.key(key, Purpose::Sign)?;
                let login = |session: &Session| self.shared.login_for_operation(session);
                let (room, own_login) = (key.room(), self.own_login(key, &login)?);
                let input = scheme.input(digest);
                let (session, mechanism) = (&self.session, scheme.mechanism());
                let sign = |module: &Module| module.sign(session, &mechanism, key.handle, own_login, &input, room);
                self.on_token(sign).map(Zeroizing::new)
            }
            _ => Ok(Zeroizing::default()),
        }
    }

    /// An operation of the token. What it takes of a processor is noted: soft tokens work in this very thread.
    fn on_token<T>(&self, work: impl FnOnce(&Module) -> Result<T, HsmError>) -> Result<T, HsmError> {
        let before = thread_time();
        let result = work(&self.shared.module);
        self.unbooked.set(self.unbooked.get() + thread_time().saturating_sub(before));
        result
    }

    /// Observes an operation, once. A decryption that may be the caller's fault is one class, and one time, whatever the token
    /// said: metrics are no oracle. The check of its result took place before.
    fn book(&self, request: &Request, finding: &Finding, took: Duration) {
        let (shared, op) = (self.shared, request.op());
        let own = Cost { took, processor: self.unbooked.take() };
        let (rv, cost) = match (request, finding) {
            (Request::Decrypt { .. }, Finding::Right(_)) => ("ok", shared.usual_decryption.booked(own, true)),
            (Request::Decrypt { .. }, Finding::Doubtful { .. }) => {
                ("refused", shared.usual_decryption.booked(own, false))
            }
            (_, Finding::Right(_) | Finding::Doubtful { wrong: true }) => ("ok", own),
            (_, Finding::Doubtful { wrong: false }) => ("refused", own),
            (_, Finding::Failed(error)) => (error.class(), own),
        };
        shared.spent(cost.processor);
        shared.observe_call(op, rv, cost.took);
    }

    /// `login`, for a key that wants a login for every operation. Judged before anything is begun in the session.
    fn own_login<'l>(&self, key: Key, login: OwnLogin<'l>) -> Result<Option<OwnLogin<'l>>, HsmError> {
        if !key.always_authenticate {
            return Ok(None);
        }
        self.shared.pin_may_be_tried()?;
        Ok(Some(login))
    }

    /// A result that its own check accepts is right, whoever made it. Any other way that an operation can have gone wrong
    /// with its input, an error or a wrong result, is the same from here on, in what is done and in what is said, so that
    /// nobody learns which it was.
    fn judge(&mut self, request: &Request, finding: Finding) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let wrong = match finding {
            Finding::Right(octets) => return Ok(octets),
            Finding::Doubtful { wrong } => wrong,
            Finding::Failed(error) => return Err(error),
        };
        let blamed = if wrong && matches!(request, Request::Sign { .. }) {
            // No input of a caller's makes a signature wrong.
            true
        } else if self.shared.may_probe_for_blame(standstill::now()) {
            let result = self.known_good(request);
            let blamed = matches!(result, Err(HsmError::WrongAnswer));
            self.shared.remember_blame(!blamed);
            if !blamed {
                result?;
            }
            blamed
        } else {
            !self.shared.was_innocent()
        };
        if !blamed {
            return Err(HsmError::Refused { wrong });
        }
        if wrong {
            self.shared.observe_wrong_answer();
        }
        Err(HsmError::WrongAnswer)
    }

    /// Does an operation like `request` whose right result is known. Without one nobody can be blamed.
    fn known_good(&mut self, request: &Request) -> Result<(), HsmError> {
        let known = self.shared.known();
        match known_for(&known, request) {
            Some(known) => self.prove(known),
            None => Ok(()),
        }
    }

    /// A decryption and a signature whose right results are known; or, as long as there are none, that the session lives.
    fn probe(&mut self) -> Result<(), HsmError> {
        let known = self.shared.known();
        if known.is_empty() {
            self.session.get_session_info()?;
        }
        for op in ["decrypt", "sign"] {
            if let Some(known) = first_known(&known, op) {
                self.prove(known)?;
            }
        }
        Ok(())
    }

    /// Whatever goes wrong here is the member's fault.
    fn prove(&mut self, known: &Request) -> Result<(), HsmError> {
        let started = standstill::now();
        let result = self.calculate(known);
        // The input is right: a member that refuses it is ill.
        let rv = Some(class(&result)).filter(|rv| *rv != "refused").unwrap_or("broken");
        self.shared.observe_call("probe", rv, standstill::since(started));
        self.shared.spent(self.unbooked.take());
        match result {
            Ok(octets) if known.accepts(&octets) => Ok(()),
            Ok(_) => {
                self.shared.observe_wrong_answer();
                Err(HsmError::WrongAnswer)
            }
            Err(error) if matches!(error.fault().whose, Whose::Caller | Whose::Unclear) => Err(HsmError::WrongAnswer),
            Err(error) => Err(error),
        }
    }

    /// One search for all RSA private keys of the token.
    fn search(&mut self) -> Result<(), HsmError> {
        // Read before the search: a key made meanwhile leads to one search too many, never to one too few.
        let keys_made = self.shared.keys_made();
        self.shared.observe(Event::KeySearch);
        self.keys = private_keys(&self.session)?;
        self.shared.say_oddities(self.keys.oddities());
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

    fn key(&mut self, wanted: &KeyRef, purpose: Purpose) -> Result<Key, HsmError> {
        if let Some(key) = self.keys.find(wanted, purpose) {
            return Ok(*key);
        }
        self.search_again()?;
        self.keys.find(wanted, purpose).copied().ok_or_else(|| HsmError::NoSuchKey(wanted.clone()))
    }

    /// A key that is not in the table may have been made elsewhere in the meantime. Calls for keys that do not exist must not
    /// each lead to a search, though.
    fn search_again(&mut self) -> Result<(), HsmError> {
        if self.searched_again.is_none_or(|at| standstill::since(at) >= SEARCH_PAUSE) {
            self.searched_again = Some(standstill::now());
            self.search()
        } else {
            self.refresh()
        }
    }

    fn decrypt(&self, key: Key, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let room = key.modulus_len.unwrap_or(ciphertext.len());
        if ciphertext.len() != room {
            // The token would say the same, at the price of an operation.
            return Err(HsmError::new("C_Decrypt", RvError::EncryptedDataLenRange));
        }
        let scheme = self.scheme(key, oaep)?;
        let mechanism = match scheme {
            Scheme::Native => oaep.mechanism(),
            Scheme::Raw => Mechanism::RsaX509,
        };
        let login = |session: &Session| self.shared.login_for_operation(session);
        let own_login = self.own_login(key, &login)?;
        let decrypt =
            |module: &Module| module.decrypt(&self.session, &mechanism, key.handle, own_login, ciphertext, room);
        let number = self.on_token(decrypt)?;
        match scheme {
            Scheme::Native => Ok(number),
            Scheme::Raw => {
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
        let Some(key) = self.keys.any_that_decrypts().copied() else { return false };
        // What a trial leaves open, the first decryption with those parameters tries again.
        Oaep::all().all(|oaep| self.scheme(key, oaep).is_ok())
    }

    /// Decrypts nonsense with the native mechanism. The parameters are refused by `C_DecryptInit` on some tokens and by
    /// `C_Decrypt` on others; any other answer is about the nonsense. Either way no operation is left open.
    fn find_scheme(&self, key: Key, oaep: Oaep) -> Result<Scheme, HsmError> {
        let room = key.room();
        // Smaller than any modulus of its length, whose first bit is set.
        let mut nonsense = vec![0x55; room];
        if let Some(first) = nonsense.first_mut() {
            *first = 0;
        }
        let refused = |error: &HsmError| PARAMETER_REFUSALS.iter().any(|code| error.is_code(*code));
        let login = |session: &Session| self.shared.login_for_operation(session);
        let own_login = self.own_login(key, &login)?;
        let decrypt =
            |module: &Module| module.decrypt(&self.session, &oaep.mechanism(), key.handle, own_login, &nonsense, room);
        let tried = self.on_token(decrypt);
        self.shared.spent(self.unbooked.take());
        match tried {
            Err(error) if refused(&error) => Ok(Scheme::Raw),
            Err(error) if error.fault().fate != Fate::Keep => Err(error),
            // The key may not decrypt: nothing was learnt about the parameters.
            Err(error @ HsmError::Pkcs11 { call, .. }) if call != "C_Decrypt" => Err(error),
            // The module has no call for a login in between: nothing was learnt either.
            Err(error @ HsmError::OwnLogin) => Err(error),
            _ => Ok(Scheme::Native),
        }
    }

    fn generate(&mut self, spec: &NewKey) -> Result<RsaPublic, HsmError> {
        self.expect_free(&spec.id)?;
        let mut public = public_template(spec);
        public.push(Attribute::ModulusBits(CK_ULONG::from(spec.bits).into()));
        public.push(Attribute::PublicExponent(vec![1, 0, 1]));
        let (public, private) =
            self.session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private_template(spec))?;
        let key = read_public(&self.session, public)?.ok_or_else(|| HsmError::Token {
            token: self.shared.token.to_string(),
            reason: "does not tell the public key it made".to_owned(),
        })?;
        self.add(spec, private, &key);
        Ok(key)
    }

    fn import(&mut self, spec: &NewKey, parts: &RsaPrivateParts) -> Result<(), HsmError> {
        self.expect_absent(&spec.id, &parts.n)?;
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
        self.add(spec, private, &RsaPublic { n: parts.n.clone(), e: parts.e.clone() });
        Ok(())
    }

    /// A key that is made gets an id that no other key has.
    fn expect_free(&mut self, id: &KeyId) -> Result<(), HsmError> {
        expect_id(id)?;
        if !self.keys.has_id(id) {
            self.search_again()?;
        }
        if self.keys.has_id(id) { Err(HsmError::KeyExists(id.clone())) } else { Ok(()) }
    }

    /// A key that is imported may share its id with other keys, but is not to be there twice.
    fn expect_absent(&mut self, id: &KeyId, modulus: &[u8]) -> Result<(), HsmError> {
        expect_id(id)?;
        if !self.keys.holds(id, modulus) {
            self.search_again()?;
        }
        if self.keys.holds(id, modulus) { Err(HsmError::KeyExists(id.clone())) } else { Ok(()) }
    }

    /// This session knows the new key at once; the others are told that their tables are old.
    fn add(&mut self, spec: &NewKey, handle: ObjectHandle, key: &RsaPublic) {
        let up_to_date = self.keys_made == self.shared.keys_made();
        let made = self.shared.key_made();
        self.keys.insert(FoundKey {
            handle,
            id: spec.id.0.clone(),
            label: spec.label.clone(),
            n: key.n.clone(),
            e: key.e.clone(),
            decrypts: spec.usage.decrypts(),
            signs: spec.usage.signs(),
            always_authenticate: false,
        });
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

/// All RSA private keys of a token, in one search. The public keys are searched, too, where a private key does not tell its
/// own.
pub(crate) fn private_keys(session: &Session) -> Result<KeyTable<ObjectHandle>, HsmError> {
    let handles =
        session.find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::RSA)])?;
    let mut found = Vec::with_capacity(handles.len());
    for handle in handles {
        let wanted = [
            AttributeType::Id,
            AttributeType::Label,
            AttributeType::Modulus,
            AttributeType::PublicExponent,
            AttributeType::Decrypt,
            AttributeType::Sign,
            AttributeType::AlwaysAuthenticate,
        ];
        let Some(attributes) = attributes_of(session, handle, &wanted)? else { continue };
        let mut key = FoundKey {
            handle,
            id: Vec::new(),
            label: String::new(),
            n: Vec::new(),
            e: Vec::new(),
            decrypts: true,
            signs: true,
            always_authenticate: false,
        };
        for attribute in attributes {
            match attribute {
                Attribute::Id(id) => key.id = id,
                Attribute::Label(label) => key.label = String::from_utf8_lossy(&label).into_owned(),
                Attribute::Modulus(n) => key.n = n,
                Attribute::PublicExponent(e) => key.e = e,
                Attribute::Decrypt(decrypts) => key.decrypts = decrypts,
                Attribute::Sign(signs) => key.signs = signs,
                Attribute::AlwaysAuthenticate(always) => key.always_authenticate = always,
                _ => {}
            }
        }
        found.push(key);
    }
    let publics =
        if found.iter().any(|key| key.n.is_empty() || key.e.is_empty()) { public_keys(session)? } else { Vec::new() };
    Ok(KeyTable::new(found, &publics))
}

fn public_keys(session: &Session) -> Result<Vec<FoundPublic>, HsmError> {
    let handles =
        session.find_objects(&[Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(KeyType::RSA)])?;
    let mut found = Vec::with_capacity(handles.len());
    for handle in handles {
        let Some(attributes) = attributes_of(session, handle, &[AttributeType::Id, AttributeType::Label])? else {
            continue;
        };
        let Some(key) = read_public(session, handle)? else { continue };
        let mut public = FoundPublic { id: Vec::new(), label: String::new(), key };
        for attribute in attributes {
            match attribute {
                Attribute::Id(id) => public.id = id,
                Attribute::Label(label) => public.label = String::from_utf8_lossy(&label).into_owned(),
                _ => {}
            }
        }
        found.push(public);
    }
    Ok(found)
}

/// `None` for an object that was destroyed between the search and now.
fn attributes_of(
    session: &Session,
    object: ObjectHandle,
    wanted: &[AttributeType],
) -> Result<Option<Vec<Attribute>>, HsmError> {
    match session.get_attributes(object, wanted) {
        Err(Error::Pkcs11(RvError::ObjectHandleInvalid, _)) => Ok(None),
        attributes => Ok(Some(attributes?)),
    }
}

/// `None` when the token does not tell, or the object is gone.
fn read_public(session: &Session, object: ObjectHandle) -> Result<Option<RsaPublic>, HsmError> {
    let wanted = [AttributeType::Modulus, AttributeType::PublicExponent];
    let (mut n, mut e) = (Vec::new(), Vec::new());
    for attribute in attributes_of(session, object, &wanted)?.into_iter().flatten() {
        match attribute {
            Attribute::Modulus(bytes) => n = without_leading_zeros(&bytes).to_vec(),
            Attribute::PublicExponent(bytes) => e = without_leading_zeros(&bytes).to_vec(),
            _ => {}
        }
    }
    Ok((!n.is_empty() && !e.is_empty()).then_some(RsaPublic { n, e }))
}

fn expect_id(id: &KeyId) -> Result<(), HsmError> {
    if id.0.is_empty() {
        return Err(HsmError::new("C_CreateObject", RvError::AttributeValueInvalid));
    }
    Ok(())
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
