//! State that the sessions of a worker share: the module, the login, the PIN, and facts about the token and its keys.
//!
//! Lock order: `tried_out`, `login`, then one of `pin`, `said` and `said_oddities`. While one of these three is held, no
//! other lock of a [`Token`] is taken.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use claviger_process::lock::lock;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;

use crate::config::{Pin, TokenRef};
use crate::error::{Failure, HsmError};
use crate::keys::Oaep;
use crate::link::{Level, Report, Start, WorkerEnd};
use crate::pin_tries::{PinTries, Word};
use crate::worker::module::{self, Module};

/// Maximum number of oddities of a token's keys that the daemon is told.
const MOST_ODDITIES: usize = 32;
/// Maximum number of characters of a note, which may contain texts of vendors and labels of keys.
const LONGEST_NOTE: usize = 2048;

/// How a token decrypts with certain OAEP parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// The token removes the padding.
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
    /// The session that holds the login. The lock is held while a PIN is tried, so that a refusal is known before the next
    /// try.
    login: Mutex<Option<Login>>,
    /// True if an administrator allows use of the last PIN try for the next login.
    may_use_final_try: AtomicBool,
    /// True once a login has succeeded.
    has_served: AtomicBool,
    /// The last reports about the tries of the PIN and about a missing token, to avoid repetition.
    said: Mutex<Said>,
    /// Number of keys created through this process. Key tables that are older than the last one are searched again.
    keys_made: AtomicU64,
    /// Indexed by [`Oaep::index`]: 0 unknown, 1 native, 2 raw.
    schemes: [AtomicU8; Oaep::COUNT],
    tried_out: Mutex<bool>,
    said_oddities: Mutex<Vec<String>>,
}

struct PinState {
    pin: Pin,
    /// Number of the PIN, assigned by the daemon.
    number: u64,
    /// True if the token refused the PIN, which is then not tried again.
    refused: bool,
}

/// All sessions of a process share one login while any session is open. This session stays open to keep it.
struct Login {
    session: Session,
    slot: Slot,
}

struct Said {
    tries: PinTries,
    failure: Option<Failure>,
}

impl Token {
    /// Loads and initialises the module. May block for any time in the library.
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

    /// Sends a report. A failure is ignored: if the daemon is gone, all receiving threads see the end of the socket.
    pub(crate) fn report(&self, report: &Report<'_>) {
        let _ = self.daemon.send(report);
    }

    /// Reports a fact that an administrator should know.
    pub(crate) fn note(&self, level: Level, text: &str) {
        let end = text.char_indices().nth(LONGEST_NOTE).map_or(text.len(), |(at, _)| at);
        self.report(&Report::Note { level, text: text.get(..end).unwrap_or_default() });
    }

    /// Logs in if necessary; returns the token's slot.
    pub(crate) fn ensure_login(&self) -> Result<Slot, Failure> {
        let mut login = lock(&self.login);
        let pin = self.pin_to_try()?;
        if let Some(login) = &*login {
            let state = login.session.get_session_info().map(|info| info.session_state());
            if matches!(state, Ok(SessionState::RoUser | SessionState::RwUser)) {
                return Ok(login.slot);
            }
        }
        // The login is lost. Its session is closed first, since some tokens count sessions.
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

    /// Returns the token's slot, if the PIN may be tried now.
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

    /// Reports once why the token cannot be found. At the start, the failure itself is reported.
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

    /// Sets the PIN for further logins. It is tried even if the token refused an earlier PIN.
    pub(crate) fn set_pin(&self, number: u64, pin: Pin) {
        let mut state = lock(&self.pin);
        let refused = state.refused && state.pin.is(&pin);
        *state = PinState { pin, number, refused };
    }

    /// Returns an error if the PIN must not be tried.
    pub(crate) fn pin_may_be_tried(&self) -> Result<(), HsmError> {
        self.pin_to_try().map(drop)
    }

    fn pin_to_try(&self) -> Result<Pin, HsmError> {
        let state = lock(&self.pin);
        if state.refused { Err(HsmError::PinRefused) } else { Ok(state.pin.clone()) }
    }

    /// Logs in for one operation. Only one session does so at a time: if the token refuses the PIN, the next session must
    /// know before its own try, since tokens count wrong PINs.
    pub(crate) fn login_for_operation(&self, session: &Session) -> Result<(), HsmError> {
        let _one_at_a_time = lock(&self.login);
        let pin = self.pin_to_try()?;
        module::login_for_operation(session, &pin).inspect_err(|error| self.heed_refused_pin(*error, &pin))
    }

    /// Prevents further tries of a refused PIN, by this process and, if this process ends now, by the next one. If the PIN
    /// was replaced meanwhile, the refusal says nothing about the new PIN.
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

    /// Closes the session that holds the login and finalises the module. No other thread may be in a call.
    pub(crate) fn close(&self) -> Result<(), HsmError> {
        *lock(&self.login) = None;
        self.module.finalize()
    }

    /// Reports oddities of the token's keys, each one once.
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

    /// Marks all key tables except the caller's as outdated; returns the new count.
    pub(crate) fn key_made(&self) -> u64 {
        self.keys_made.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Lets one session run the trials while the others wait for their results. Repeated until `trials` succeed once.
    pub(crate) fn try_out(&self, trials: impl FnOnce() -> bool) {
        let mut tried_out = lock(&self.tried_out);
        if !*tried_out {
            *tried_out = trials();
            if *tried_out {
                let native: Vec<_> = Oaep::all()
                    .filter(|oaep| self.scheme(*oaep) != Some(Scheme::Raw))
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

    /// Sets the scheme for these parameters; `None` if it is unknown.
    pub(crate) fn remember_scheme(&self, oaep: Oaep, scheme: Option<Scheme>) {
        if let Some(entry) = self.schemes.get(oaep.index()) {
            let number = match scheme {
                None => 0,
                Some(Scheme::Native) => 1,
                Some(Scheme::Raw) => 2,
            };
            entry.store(number, Ordering::Relaxed);
        }
    }
}
