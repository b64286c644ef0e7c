//! One vendor library: loaded once, initialised once.
//!
//! The registry is global because the libraries are: whoever names the same path with the same environment gets the same
//! instance, and `C_Finalize` is called when the last user has left. Libraries are never unloaded; vendors leave threads and
//! exit handlers behind that would run into unmapped memory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use crossbeam::channel;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::ObjectHandle;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use crate::config::{Pin, TokenRef};
use crate::discovery;
use crate::error::HsmError;
use crate::ffi::{self, Direct, TokenFacts};
use crate::pin_tries::PinTries;

type Env = BTreeMap<String, String>;

/// How long a module may take to initialise at the start before the others are looked after. It goes on meanwhile.
const GREETING: Duration = Duration::from_secs(5);
/// How long who initialises or finalises a module has the environment for itself. Behind a call that takes longer, since its
/// device does not answer, others go on: what it wanted of the environment it has read by then.
const TURN: Duration = Duration::from_secs(2);

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { instances: Vec::new(), original: BTreeMap::new(), threaded: false });
/// Since when somebody has the environment for itself.
static TAKEN: Mutex<Option<Instant>> = Mutex::new(None);
static FREE: Condvar = Condvar::new();

struct Registry {
    instances: Vec<Instance>,
    /// A module hangs in a thread of its own: variables can only be changed from now on.
    threaded: bool,
    /// What the variables that any table names were before the first table was applied.
    original: BTreeMap<String, Option<OsString>>,
}

struct Instance {
    module: Arc<Module>,
    users: usize,
}

/// One instance of a vendor library.
pub(crate) struct Module {
    path: PathBuf,
    env: Env,
    pkcs11: Pkcs11,
    /// `None` when only cryptoki's probing calls reach the instance.
    direct: Option<Direct>,
    /// Whether `C_Initialize` was ours, and so `C_Finalize` is.
    ours: AtomicBool,
    /// Somebody finalised it behind our back.
    lost: AtomicBool,
    /// Whether it was said that it cannot be finalised.
    complained: AtomicBool,
    /// Held by every thread that may be in a call; for writing by who finalises.
    gate: RwLock<()>,
}

impl Module {
    /// Hands out the instance for a path and an environment; loads and initialises it for its first user.
    pub(crate) fn acquire(path: &Path, env: &Env) -> Result<Arc<Module>, HsmError> {
        let _turn = Turn::take();
        let mut registry = registry();
        registry.apply(path, env)?;
        let known = registry
            .instances
            .iter()
            .position(|instance| instance.module.path == path && registry.same_env(&instance.module.env, env));
        let index = match known {
            Some(index) => index,
            None => {
                let module = Arc::new(Module::load(path, env)?);
                registry.instances.push(Instance { module, users: 0 });
                registry.instances.len() - 1
            }
        };
        if registry.instances[index].users == 0 {
            // A module whose device is away may refuse; that is for the session that needs it to find out, and to retry.
            let fresh = registry.instances[index].module.greet().unwrap_or_else(|error| {
                registry.threaded |= matches!(error, HsmError::Hung { .. });
                warn!(module = %path.display(), %error, "module not initialised, will be tried again");
                true
            });
            let shared = !fresh && registry.instances.iter().any(|other| other.users > 0 && other.module.path == path);
            if shared {
                return Err(HsmError::Module {
                    path: path.to_owned(),
                    reason: "already initialised with another environment, and one file is one \
                             instance: give this member a copy of the file"
                        .to_owned(),
                });
            }
        }
        let instance = &mut registry.instances[index];
        instance.users += 1;
        Ok(Arc::clone(&instance.module))
    }

    /// The same while there are other threads: what it wants of the environment may be changed, but has to be there.
    pub(crate) fn acquire_late(path: &Path, env: &Env) -> Result<Arc<Module>, HsmError> {
        registry().threaded = true;
        Self::acquire(path, env)
    }

    /// Gives the instance back; the last user finalises it. May block as long as the vendor likes.
    pub(crate) fn release(self: &Arc<Self>) {
        let _turn = Turn::take();
        {
            let mut registry = registry();
            let Some(instance) = registry.instances.iter_mut().find(|other| Arc::ptr_eq(&other.module, self)) else {
                return;
            };
            instance.users = instance.users.saturating_sub(1);
            if instance.users > 0 {
                return;
            }
        }
        let Ok(_alone) = self.gate.try_write() else {
            warn!(module = %self.path.display(), "module not finalised: a call hangs in it");
            return;
        };
        if self.ours.swap(false, Ordering::Relaxed)
            && let Err(error) = self.pkcs11.clone().finalize()
        {
            warn!(module = %self.path.display(), error = %HsmError::from(error), "module not finalised");
        }
    }

    /// To be held around calls: nobody finalises the module meanwhile.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        // Nothing is in there that a panic could have spoilt.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether who enters now would wait for somebody who initialises or finalises.
    pub(crate) fn is_shut(&self) -> bool {
        self.gate.try_read().is_err()
    }

    /// A call said that the module is not initialised. The sessions that its members still believe in have no meaning any
    /// more, and once it is initialised again their handles may be those of other tokens' sessions.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// `C_Finalize` and `C_Initialize`: what a module needs whose connection or device went away for good. Only while nobody
    /// is in a call, and no session is open; `false` when somebody is. May block as long as the vendor likes.
    pub(crate) fn renew(&self) -> Result<bool, HsmError> {
        let Ok(_alone) = self.gate.try_write() else { return Ok(false) };
        let _turn = Turn::take();
        registry().reapply(&self.path, &self.env)?;
        match self.pkcs11.clone().finalize() {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiNotInitialized, _)) => {
                self.complained.store(false, Ordering::Relaxed);
            }
            // Some modules that lost their device cannot even say goodbye. Initialising tells whether that matters.
            Err(error) => {
                if !self.complained.swap(true, Ordering::Relaxed) {
                    warn!(module = %self.path.display(), error = %HsmError::from(error), "module not finalised");
                }
            }
        }
        self.initialize()?;
        debug!(module = %self.path.display(), "module initialised anew");
        Ok(true)
    }

    fn load(path: &Path, env: &Env) -> Result<Module, HsmError> {
        let pkcs11 =
            Pkcs11::new(path).map_err(|error| HsmError::Module { path: path.to_owned(), reason: error.to_string() })?;
        let direct = Direct::load(path);
        if direct.is_none() {
            warn!(
                module = %path.display(),
                "module does not let C_Decrypt and C_Sign be called directly: every operation takes two calls"
            );
        }
        Ok(Module {
            path: path.to_owned(),
            env: env.clone(),
            pkcs11,
            direct,
            ours: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            complained: AtomicBool::new(false),
            gate: RwLock::new(()),
        })
    }

    /// Initialises it in a thread of its own: a device that does not answer keeps neither the others nor the daemon.
    fn greet(self: &Arc<Self>) -> Result<bool, HsmError> {
        let module = Arc::clone(self);
        let (tell, told) = channel::bounded(1);
        let unable = |error: std::io::Error| HsmError::Module { path: self.path.clone(), reason: error.to_string() };
        let greeting = std::thread::Builder::new().name("hsm greeting".to_owned()).spawn(move || {
            // Whoever wants to call the module meanwhile hangs with it.
            let alone = module.gate.write();
            let result = module.initialize();
            if let Ok(true) = result {
                info!(module = %module.path.display(), "module initialised");
            }
            drop(alone);
            let _ = tell.send(result);
        });
        let greeting = greeting.map_err(unable)?;
        let result = told.recv_timeout(GREETING).map_err(|_| HsmError::Hung { op: "C_Initialize" })?;
        // Variables may be made and removed again only when the thread is gone.
        let _ = greeting.join();
        result
    }

    /// Whether the call did anything: `false` when the library was initialised already.
    fn initialize(&self) -> Result<bool, HsmError> {
        let args = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
        match self.pkcs11.initialize(args) {
            Ok(()) => {
                self.ours.store(true, Ordering::Relaxed);
                self.lost.store(false, Ordering::Release);
                Ok(true)
            }
            Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(false),
            Err(error) => Err(HsmError::Module { path: self.path.clone(), reason: HsmError::from(error).to_string() }),
        }
    }

    pub(crate) fn pkcs11(&self) -> &Pkcs11 {
        &self.pkcs11
    }

    /// Looks a token up among the slots there are now. Costs no try of its PIN.
    pub(crate) fn find_token(&self, token: &TokenRef) -> Result<(Slot, TokenFacts), HsmError> {
        let slots = self.pkcs11.get_slots_with_token()?;
        // One broken token must not hide the others.
        let seen: Vec<_> = slots.into_iter().filter_map(|slot| Some((slot, self.token_facts(slot).ok()?))).collect();
        discovery::choose(token, &seen, &self.path)
    }

    fn token_facts(&self, slot: Slot) -> Result<TokenFacts, HsmError> {
        if let Some(direct) = &self.direct {
            return direct.token_facts(slot).map_err(|code| HsmError::new("C_GetTokenInfo", code));
        }
        let info = self.pkcs11.get_token_info(slot)?;
        Ok(TokenFacts {
            label: info.label().to_owned(),
            serial: info.serial_number().to_owned(),
            initialized: info.token_initialized(),
            user_pin_set: info.user_pin_initialized(),
            pin_tries: PinTries::of_token(&info),
        })
    }

    /// `C_DecryptInit` and one `C_Decrypt`; `room` is the length of the modulus. A key that wants a login for every
    /// operation gets it in between, by `own_login`.
    pub(crate) fn decrypt(
        &self,
        session: &Session,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        own_login: Option<OwnLogin<'_>>,
        ciphertext: &[u8],
        room: usize,
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let Some(direct) = &self.direct else {
            refuse_own_login(own_login)?;
            return Ok(Zeroizing::new(session.decrypt(mechanism, key, ciphertext)?));
        };
        session.decrypt_init(mechanism, key)?;
        own_login.map_or(Ok(()), |login| login(session))?;
        let mut plaintext = Zeroizing::new(vec![0; room]);
        let len =
            direct.decrypt(session, ciphertext, &mut plaintext).map_err(|code| HsmError::new("C_Decrypt", code))?;
        plaintext.truncate(len);
        Ok(plaintext)
    }

    /// `C_SignInit` and one `C_Sign`; the rest is as in [`decrypt`](Self::decrypt).
    pub(crate) fn sign(
        &self,
        session: &Session,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        own_login: Option<OwnLogin<'_>>,
        input: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, HsmError> {
        let Some(direct) = &self.direct else {
            refuse_own_login(own_login)?;
            return Ok(session.sign(mechanism, key, input)?);
        };
        session.sign_init(mechanism, key)?;
        own_login.map_or(Ok(()), |login| login(session))?;
        let mut signature = vec![0; room];
        let len = direct.sign(session, input, &mut signature).map_err(|code| HsmError::new("C_Sign", code))?;
        signature.truncate(len);
        Ok(signature)
    }
}

/// The login that a key with `CKA_ALWAYS_AUTHENTICATE` wants between the start of an operation and its data.
pub(crate) type OwnLogin<'a> = &'a dyn Fn(&Session) -> Result<(), HsmError>;

/// Logs in for the operation that was started in `session`.
pub(crate) fn login_for_operation(session: &Session, pin: &Pin) -> Result<(), HsmError> {
    Ok(session.login(UserType::ContextSpecific, Some(&pin.to_auth()))?)
}

/// cryptoki starts and finishes an operation in one function, with no room for a login in between.
fn refuse_own_login(login: Option<OwnLogin<'_>>) -> Result<(), HsmError> {
    if login.is_some() {
        return Err(HsmError::OwnLogin);
    }
    Ok(())
}

impl Registry {
    /// Makes the process environment what a module with this table has to see: its own variables set, those that only other
    /// tables name as they were.
    fn apply(&mut self, path: &Path, env: &Env) -> Result<(), HsmError> {
        for name in env.keys() {
            self.original.entry(name.clone()).or_insert_with(|| std::env::var_os(name));
        }
        if self.threaded {
            return self.reapply(path, env);
        }
        for (name, original) in &self.original {
            match env.get(name) {
                Some(value) => ffi::set_var(name, Some(value.as_ref())),
                None => ffi::set_var(name, original.as_deref()),
            }
        }
        Ok(())
    }

    /// The same for an instance that is initialised again while other threads live. Variables can then be changed but
    /// neither made nor removed; see [`ffi::change_var`].
    fn reapply(&mut self, path: &Path, env: &Env) -> Result<(), HsmError> {
        for (name, original) in &self.original {
            let wanted = env.get(name).map(OsString::from).or_else(|| original.clone());
            if !ffi::change_var(name, wanted.as_deref()) {
                return Err(HsmError::Module {
                    path: path.to_owned(),
                    reason: format!(
                        "cannot be initialised while the process runs: it and the other members do not all set {name}, \
                         and variables are made only at the start: set it in the env of each, or restart"
                    ),
                });
            }
        }
        Ok(())
    }

    /// Two tables are the same when a module cannot tell them apart: `{}` and `{A = "x"}` are if A is "x" anyway.
    fn same_env(&self, one: &Env, other: &Env) -> bool {
        self.original.iter().all(|(name, original)| {
            let seen_with = |env: &Env| match env.get(name) {
                Some(value) => Some(OsString::from(value)),
                None => original.clone(),
            };
            seen_with(one) == seen_with(other)
        })
    }
}

fn registry() -> MutexGuard<'static, Registry> {
    // Nothing in there is left half-done by a panic.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The environment for oneself, for a while.
struct Turn(Instant);

impl Turn {
    fn take() -> Turn {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(left) = taken.and_then(|since| TURN.checked_sub(since.elapsed())).filter(|left| !left.is_zero())
        {
            taken = FREE.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let now = Instant::now();
        *taken = Some(now);
        Turn(now)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else's by now, if it took too long.
        if *taken == Some(self.0) {
            *taken = None;
            FREE.notify_one();
        }
    }
}

/// Lets every variable that any member's table names exist, so that it can be changed later. The last step before other
/// threads exist.
pub(crate) fn settle_env() {
    let registry = registry();
    if registry.threaded {
        return;
    }
    for instance in &registry.instances {
        for (name, value) in &instance.module.env {
            if std::env::var_os(name).is_none() {
                ffi::set_var(name, Some(value.as_ref()));
            }
        }
    }
}

/// Initialises the first uninitialised token of a module and sets its user PIN: for labs and tests.
pub fn init_token(module: &Path, label: &str, so_pin: &Pin, user_pin: &Pin) -> Result<(), HsmError> {
    let module = Module::acquire(module, &Env::new())?;
    let result = module.init_token(label, so_pin, user_pin);
    module.release();
    result
}

impl Module {
    fn init_token(&self, label: &str, so_pin: &Pin, user_pin: &Pin) -> Result<(), HsmError> {
        // Says why, if it was not initialised.
        self.initialize()?;
        let find = |wanted: &dyn Fn(&TokenFacts) -> bool| -> Result<Option<Slot>, HsmError> {
            let slots = self.pkcs11.get_slots_with_token()?;
            Ok(slots.into_iter().find(|slot| self.token_facts(*slot).is_ok_and(|facts| wanted(&facts))))
        };
        let blank = find(&|facts| !facts.initialized)?;
        let Some(blank) = blank else {
            return Err(HsmError::Token {
                token: format!("label {label:?}"),
                reason: "no slot with an uninitialised token".to_owned(),
            });
        };
        self.pkcs11.init_token(blank, &so_pin.to_auth(), label)?;
        // The token may have moved to another slot. Tokens of the same label that are in use have a user PIN.
        let fresh = find(&|facts| facts.initialized && !facts.user_pin_set && facts.label == label)?;
        let Some(fresh) = fresh else {
            return Err(HsmError::Token {
                token: format!("label {label:?}"),
                reason: "gone after it was initialised".to_owned(),
            });
        };
        let session = self.pkcs11.open_rw_session(fresh)?;
        session.login(UserType::So, Some(&so_pin.to_auth()))?;
        let set = session.init_pin(&user_pin.to_auth());
        session.logout()?;
        set?;
        Ok(())
    }
}
