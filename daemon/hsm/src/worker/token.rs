//! What the sessions of a worker share: the module, the login, the PIN, and what is known about the token and its keys.
//!
//! Locks, in the order in which they may be taken: `tried_out`, `login`, `pin`; the others are taken alone.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;

use crate::config::{Pin, TokenRef};
use crate::error::{Failure, HsmError};
use crate::keys::Oaep;
use crate::link::{Level, Report, Start, WorkerEnd};
use crate::lock::lock;
use crate::pin_tries::{PinTries, Word};
use crate::worker::module::{self, Module};

/// How many oddities of a token's keys the daemon is told.
const MOST_ODDITIES: usize = 32;
/// Characters of a note at most: texts of vendors and labels of keys are in there.
const LONGEST_NOTE: usize = 2048;

/// How OAEP is done with some parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// By the token.
    Native,
    /// The token does the bare RSA operation, and the padding is removed in software.
    Raw,
}

/// The token that this process serves.
pub(crate) struct Token {
    pub(crate) module: Module,
    wanted: TokenRef,
    daemon: Arc<WorkerEnd>,
    pin: Mutex<PinState>,
    /// The session that holds the login. Its lock is held while a PIN is tried, so that a refusal is known before the next try.
    login: Mutex<Option<Login>>,
    /// An administrator's word for the next login.
    may_use_final_try: AtomicBool,
    /// It was logged in to once.
    has_served: AtomicBool,
    /// What was last said about the tries of the PIN, and about a token that cannot be found.
    said: Mutex<Said>,
    /// How many keys were made through this process: key tables older than the last one are searched again.
    keys_made: AtomicU64,
    /// By [`Oaep::index`]: 0 not known, 1 native, 2 raw.
    schemes: [AtomicU8; Oaep::COUNT],
    tried_out: Mutex<bool>,
    said_oddities: Mutex<Vec<String>>,
}

struct PinState {
    pin: Pin,
    /// The daemon's number of it.
    number: u64,
    /// The token refused it: it is not tried again.
    refused: bool,
}

/// All sessions of a process share their login, for as long as one is open: this one stays open.
struct Login {
    session: Session,
    slot: Slot,
}

struct Said {
    tries: PinTries,
    failure: Option<Failure>,
}

impl Token {
    /// Loads and initialises the module. May block as long as the vendor likes.
    pub(crate) fn load(start: Start, daemon: Arc<WorkerEnd>) -> Result<Token, Failure> {
        let module = Module::load(&start.module)?;
        let token = Token {
            module,
            wanted: start.token,
            daemon,
            pin: Mutex::new(PinState { pin: start.pin, number: start.pin_number, refused: false }),
            login: Mutex::default(),
            may_use_final_try: AtomicBool::new(start.may_use_final_try),
            has_served: AtomicBool::new(false),
            said: Mutex::new(Said { tries: PinTries::Full, failure: None }),
            keys_made: AtomicU64::new(0),
            schemes: Default::default(),
            tried_out: Mutex::default(),
            said_oddities: Mutex::default(),
        };
        if !token.module.is_direct() {
            token.note(
                Level::Warn,
                "module does not let C_Decrypt and C_Sign be called directly: every operation takes two calls",
            );
        }
        Ok(token)
    }

    /// Tells the daemon. One that has gone needs no reports, and the end of the socket is seen by all who receive.
    pub(crate) fn report(&self, report: &Report<'_>) {
        let _ = self.daemon.send(report);
    }

    /// Something that an administrator should know.
    pub(crate) fn note(&self, level: Level, text: &str) {
        let end = text.char_indices().nth(LONGEST_NOTE).map_or(text.len(), |(at, _)| at);
        self.report(&Report::Note { level, text: text.get(..end).unwrap_or_default() });
    }

    /// Makes sure that the token is logged in; says in which slot it is.
    pub(crate) fn ensure_login(&self) -> Result<Slot, Failure> {
        let mut login = lock(&self.login);
        let pin = self.pin_to_try()?;
        if let Some(login) = &*login {
            let state = login.session.get_session_info().map(|info| info.session_state());
            if matches!(state, Ok(SessionState::RoUser | SessionState::RwUser)) {
                return Ok(login.slot);
            }
        }
        // Logged out, or gone: closed first, since some tokens count sessions.
        *login = None;
        let slot = self.find()?;
        let session = self.module.pkcs11().open_ro_session(slot)?;
        self.report(&Report::Login);
        match session.login(UserType::User, Some(&pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                *login = Some(Login { session, slot });
                self.has_served.store(true, Ordering::Release);
                Ok(slot)
            }
            Err(error) => {
                let error = HsmError::from(error);
                self.heed_refused_pin(error, &pin);
                Err(error.into())
            }
        }
    }

    /// The slot of the token, if its PIN may be tried now.
    fn find(&self) -> Result<Slot, Failure> {
        let found = self.module.find_token(&self.wanted);
        self.say_missing(found.as_ref().err());
        let (slot, facts) = found?;
        let word = if self.may_use_final_try.swap(false, Ordering::AcqRel) { Word::Administrator } else { Word::Serve };
        let tries = facts.pin_tries;
        let allowed = tries.allow(word);
        if std::mem::replace(&mut lock(&self.said).tries, tries) != tries && tries != PinTries::Full && allowed {
            self.note(Level::Warn, &format!("token {}: {}; the PIN is tried once", self.wanted, tries.meaning()));
        }
        if allowed {
            Ok(slot)
        } else {
            Err(Failure::new(HsmError::PinNotTried(tries), format!("token {}", self.wanted)))
        }
    }

    /// Says why the token is not to be found, once. At the start the failure itself is reported.
    fn say_missing(&self, failure: Option<&Failure>) {
        let mut said = lock(&self.said);
        if said.failure.as_ref() == failure {
            return;
        }
        said.failure = failure.cloned();
        drop(said);
        if let Some(failure) = failure.filter(|_| self.has_served.load(Ordering::Acquire)) {
            self.note(Level::Warn, &failure.to_string());
        }
    }

    /// From now on this PIN is tried, also when the token refused another one.
    pub(crate) fn set_pin(&self, number: u64, pin: Pin) {
        let mut state = lock(&self.pin);
        let refused = state.refused && state.pin.is(&pin);
        *state = PinState { pin, number, refused };
    }

    /// Whether the PIN may be tried.
    pub(crate) fn pin_may_be_tried(&self) -> Result<(), HsmError> {
        self.pin_to_try().map(drop)
    }

    fn pin_to_try(&self) -> Result<Pin, HsmError> {
        let state = lock(&self.pin);
        if state.refused { Err(HsmError::PinRefused) } else { Ok(state.pin.clone()) }
    }

    /// Logs in for one operation, one session at a time: where the token refuses the PIN, the next session has to know that
    /// before it tries, since tokens count wrong PINs.
    pub(crate) fn login_for_operation(&self, session: &Session) -> Result<(), HsmError> {
        let _one_at_a_time = lock(&self.login);
        let pin = self.pin_to_try()?;
        module::login_for_operation(session, &pin).inspect_err(|error| self.heed_refused_pin(*error, &pin))
    }

    /// Sees to it that a PIN that the token refused is not tried again: neither here nor, should this process end now, by the
    /// next one. One that was replaced meanwhile says nothing of the new one.
    fn heed_refused_pin(&self, error: HsmError, tried: &Pin) {
        if !error.refuses_pin() {
            return;
        }
        let mut state = lock(&self.pin);
        if state.pin.is(tried) {
            state.refused = true;
            let number = state.number;
            drop(state);
            self.report(&Report::PinRefused { number, error });
        }
    }

    /// Closes the session that holds the login, and finalises the module. When no other thread is in a call.
    pub(crate) fn close(&self) -> Result<(), HsmError> {
        *lock(&self.login) = None;
        self.module.finalize()
    }

    /// Says what is odd about the token's keys, each thing once.
    pub(crate) fn say_oddities(&self, oddities: Vec<String>) {
        let mut said = lock(&self.said_oddities);
        for oddity in oddities {
            if !said.contains(&oddity) && said.len() < MOST_ODDITIES {
                self.note(Level::Warn, &oddity);
                said.push(oddity);
            }
        }
    }

    pub(crate) fn keys_made(&self) -> u64 {
        self.keys_made.load(Ordering::Acquire)
    }

    /// Says that all key tables but the caller's are old; returns the new count.
    pub(crate) fn key_made(&self) -> u64 {
        self.keys_made.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Lets one session try the token out; the others wait for what it finds. Until `trials` succeed once.
    pub(crate) fn try_out(&self, trials: impl FnOnce() -> bool) {
        let mut tried_out = lock(&self.tried_out);
        if !*tried_out {
            *tried_out = trials();
            if *tried_out {
                let native: Vec<_> = Oaep::all()
                    .filter(|oaep| self.scheme(*oaep) == Some(Scheme::Native))
                    .map(|oaep| format!("{:?}/{:?}", oaep.hash, oaep.mgf))
                    .collect();
                let native = native.join(", ");
                self.note(
                    Level::Info,
                    &format!("token tried out for OAEP: native for [{native}], the rest is unpadded in software"),
                );
            }
        }
    }

    pub(crate) fn scheme(&self, oaep: Oaep) -> Option<Scheme> {
        match self.schemes.get(oaep.index())?.load(Ordering::Relaxed) {
            1 => Some(Scheme::Native),
            2 => Some(Scheme::Raw),
            _ => None,
        }
    }

    pub(crate) fn remember_scheme(&self, oaep: Oaep, scheme: Scheme) {
        if let Some(entry) = self.schemes.get(oaep.index()) {
            entry.store(if scheme == Scheme::Native { 1 } else { 2 }, Ordering::Relaxed);
        }
    }
}
