//! The instance: the real module, who has which session, and the order of things.
//!
//! Every call of the real module is made with the gate held for reading. What must not happen under a running call (closing
//! sessions behind the caller's back, logging out, finalising) holds it for writing. Sleeping and hanging is done outside,
//! so a call that hangs here is no obstacle, not even to `C_Finalize`. Control files are looked at outside, too: a new one may
//! want the gate for writing.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use cryptoki_sys::*;

use crate::faults::{Faults, Stale};
use crate::scope::{Plan, Scope, lock};
use crate::{CONTROL_VARIABLE, MODULE_FILE, MODULE_VARIABLE};

/// How often counts are written down, and control files looked at when nobody calls.
const TICK: Duration = Duration::from_millis(50);
/// Object handles are the real ones in the lower bits, and above them the number of times that handles became stale.
const EPOCH_SHIFT: u32 = CK_ULONG::BITS / 4 * 3;
/// `CK_TOKEN_INFO::label` is padded with these.
const PADDING: [char; 2] = [' ', '\0'];

static MODULE: OnceLock<Module> = OnceLock::new();

/// This copy of the library.
pub(crate) struct Module {
    pub(crate) real: CK_FUNCTION_LIST,
    control: PathBuf,
    pub(crate) scope: Scope,
    gate: RwLock<()>,
    initialised: AtomicBool,
    dead: Mutex<Option<Death>>,
    /// By label; they stay for as long as the library does.
    tokens: Mutex<BTreeMap<String, Arc<Token>>>,
    slots: Mutex<HashMap<CK_SLOT_ID, Arc<Token>>>,
    sessions: Mutex<BTreeMap<CK_SESSION_HANDLE, Session>>,
    /// Handles of sessions are never given out twice, whatever the real module does: stale ones stay stale.
    last_session: AtomicU64,
    clerk: Mutex<Option<Clerk>>,
}

/// A token of the real module.
pub(crate) struct Token {
    pub(crate) scope: Scope,
    epoch: AtomicU64,
}

#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) real: CK_SESSION_HANDLE,
    pub(crate) slot: CK_SLOT_ID,
    pub(crate) token: Arc<Token>,
}

/// What a dead module answers.
#[derive(Clone, Copy)]
struct Death {
    rv: CK_RV,
    /// Initialised while the server was away: there are no slots, which is no error.
    empty: bool,
}

/// The thread that writes the counts down.
struct Clerk {
    thread: JoinHandle<()>,
    dismissed: Sender<()>,
}

/// The bound instance.
pub(crate) fn module() -> Result<&'static Module, CK_RV> {
    MODULE.get().ok_or(CKR_CRYPTOKI_NOT_INITIALIZED)
}

/// The instance, bound to the real module now if it was not before.
pub(crate) fn bind() -> Result<&'static Module, CK_RV> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = lock(&ONE_AT_A_TIME);
    if let Some(module) = MODULE.get() {
        return Ok(module);
    }
    let module = Module::load().map_err(|reason| {
        // PKCS#11 has no way to say it.
        #[allow(clippy::print_stderr)]
        {
            eprintln!("claviger-faulty-token: {reason}");
        }
        CKR_GENERAL_ERROR
    })?;
    Ok(MODULE.get_or_init(|| module))
}

/// Runs an exported function: a panic must not cross the border.
pub(crate) fn guarded(run: impl FnOnce() -> Result<(), CK_RV>) -> CK_RV {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => CKR_OK,
        Ok(Err(rv)) => rv,
        Err(_) => CKR_GENERAL_ERROR,
    }
}

/// A return code as a result.
pub(crate) fn ok(rv: CK_RV) -> Result<(), CK_RV> {
    if rv == CKR_OK { Ok(()) } else { Err(rv) }
}

impl Module {
    fn load() -> Result<Self, String> {
        let variable = |name| std::env::var_os(name).ok_or_else(|| format!("{name} is not set"));
        let path = variable(MODULE_VARIABLE)?;
        let control = PathBuf::from(variable(CONTROL_VARIABLE)?);
        // SAFETY: whoever names the module trusts it, as any program does that loads a PKCS#11 module.
        let library = unsafe { Pkcs11::new(&path) }.map_err(|error| error.to_string())?;
        // Its functions are used for as long as the process lives.
        let library = Box::leak(Box::new(library));
        let get = library.C_GetFunctionList.as_ref().map_err(ToString::to_string)?;
        let mut list = ptr::null_mut();
        // SAFETY: `list` is writable, and C_GetFunctionList may be called at any time.
        let rv = unsafe { get(&raw mut list) };
        if rv != CKR_OK || list.is_null() {
            return Err(format!("{}: C_GetFunctionList: {rv:#x}", path.display()));
        }
        // SAFETY: the call succeeded, so this is a list, and the module owns it for as long as it is loaded.
        let real = unsafe { ptr::read(list) };
        Ok(Self {
            real,
            scope: Scope::new(&control, MODULE_FILE),
            control,
            gate: RwLock::default(),
            initialised: AtomicBool::new(false),
            dead: Mutex::default(),
            tokens: Mutex::default(),
            slots: Mutex::default(),
            sessions: Mutex::default(),
            last_session: AtomicU64::new(0),
            clerk: Mutex::default(),
        })
    }

    /// Holds off whatever must not happen under a call of the real module.
    pub(crate) fn pass(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The module's own faults as they are now.
    pub(crate) fn faults(&self) -> Arc<Faults> {
        self.scope.faults(|new| {
            if let Some(rv) = new.dead {
                lock(&self.dead).get_or_insert(Death { rv, empty: false });
            }
        })
    }

    /// A token's faults as they are now.
    pub(crate) fn faults_of(&self, token: &Arc<Token>) -> Arc<Faults> {
        token.scope.faults(|new| {
            for stale in &new.stale {
                self.stale(token, *stale);
            }
        })
    }

    /// Fails where the module is dead or was not initialised.
    pub(crate) fn alive(&self) -> Result<(), CK_RV> {
        self.faults();
        if !self.initialised.load(Ordering::Acquire) {
            return Err(CKR_CRYPTOKI_NOT_INITIALIZED);
        }
        match *lock(&self.dead) {
            Some(death) => {
                self.scope.fault("dead");
                Err(death.rv)
            }
            None => Ok(()),
        }
    }

    /// Whether it came up without a server, and so without slots.
    pub(crate) fn came_up_empty(&self) -> bool {
        lock(&self.dead).is_some_and(|death| death.empty)
    }

    /// Judges a call by the module's own control file.
    pub(crate) fn plan(&self, name: &'static str, has_result: bool) -> Plan {
        self.scope.plan(name, has_result, None, || self.faults())
    }

    /// Judges a call by a token's control file.
    pub(crate) fn plan_of(
        &self,
        token: &Arc<Token>,
        name: &'static str,
        has_result: bool,
        absence: Option<CK_RV>,
    ) -> Plan {
        token.scope.plan(name, has_result, absence, || self.faults_of(token))
    }

    pub(crate) fn initialise(&'static self, args: CK_VOID_PTR) -> Result<(), CK_RV> {
        let _entered = self.scope.enter("C_Initialize");
        if let Some(rv) = self.plan("C_Initialize", false).refused {
            return Err(rv);
        }
        let faults = self.faults();
        let _alone = self.close_gate();
        let real = self.real.C_Initialize.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the caller's argument goes on as it came.
        ok(unsafe { real(args) })?;
        self.forget();
        *lock(&self.dead) = faults.dead.map(|rv| Death { rv, empty: true });
        *lock(&self.clerk) = Clerk::start(self);
        self.initialised.store(true, Ordering::Release);
        Ok(())
    }

    pub(crate) fn finalise(&self, reserved: CK_VOID_PTR) -> Result<(), CK_RV> {
        let _entered = self.scope.enter("C_Finalize");
        if let Some(rv) = self.plan("C_Finalize", false).refused {
            return Err(rv);
        }
        // Before the gate is closed, since it may want to pass.
        let clerk = lock(&self.clerk).take();
        if let Some(Clerk { thread, dismissed }) = clerk {
            drop(dismissed);
            let _ = thread.join();
        }
        let _alone = self.close_gate();
        let real = self.real.C_Finalize.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the caller's argument goes on as it came; no other call of the real module is running.
        ok(unsafe { real(reserved) })?;
        self.initialised.store(false, Ordering::Release);
        self.forget();
        self.report();
        Ok(())
    }

    /// Sessions and slots belong to one initialisation.
    fn forget(&self) {
        for session in std::mem::take(&mut *lock(&self.sessions)).into_values() {
            session.token.scope.forget_sessions(1);
        }
        lock(&self.slots).clear();
    }

    /// Which token is in a slot; `None` when the real module does not say.
    pub(crate) fn token_in(&self, slot: CK_SLOT_ID) -> Option<Arc<Token>> {
        if let Some(token) = lock(&self.slots).get(&slot) {
            return Some(token.clone());
        }
        let mut info = CK_TOKEN_INFO::default();
        {
            let _pass = self.pass();
            // SAFETY: `info` is writable, and nobody else's.
            ok(unsafe { self.real.C_GetTokenInfo?(slot, &raw mut info) }).ok()?;
        }
        let label = String::from_utf8_lossy(&info.label);
        let label = label.trim_end_matches(PADDING);
        let mut tokens = lock(&self.tokens);
        let token = tokens
            .entry(label.to_owned())
            .or_insert_with(|| Arc::new(Token { scope: Scope::new(&self.control, label), epoch: AtomicU64::new(0) }));
        lock(&self.slots).insert(slot, token.clone());
        Some(token.clone())
    }

    /// Another token may be in the slot from now on.
    pub(crate) fn forget_slot(&self, slot: CK_SLOT_ID) {
        lock(&self.slots).remove(&slot);
    }

    /// Gives a session of the real module a handle here.
    pub(crate) fn add_session(&self, session: Session) -> CK_SESSION_HANDLE {
        let handle = self.last_session.fetch_add(1, Ordering::Relaxed) + 1;
        lock(&self.sessions).insert(handle, session);
        handle
    }

    pub(crate) fn session(&self, handle: CK_SESSION_HANDLE) -> Result<Session, CK_RV> {
        match lock(&self.sessions).get(&handle) {
            Some(session) => Ok(session.clone()),
            None if self.initialised.load(Ordering::Acquire) => Err(CKR_SESSION_HANDLE_INVALID),
            None => Err(CKR_CRYPTOKI_NOT_INITIALIZED),
        }
    }

    /// Takes sessions out; they are the real module's to close.
    pub(crate) fn remove_sessions(&self, which: impl Fn(CK_SESSION_HANDLE, &Session) -> bool) -> Vec<Session> {
        let mut sessions = lock(&self.sessions);
        let handles: Vec<_> =
            sessions.iter().filter(|(handle, session)| which(**handle, session)).map(|(h, _)| *h).collect();
        let removed: Vec<_> = handles.iter().filter_map(|handle| sessions.remove(handle)).collect();
        for session in &removed {
            session.token.scope.forget_sessions(1);
        }
        removed
    }

    /// Makes something of a token invalid, once and for ever.
    fn stale(&self, token: &Arc<Token>, what: Stale) {
        let _alone = self.close_gate();
        let newest = || {
            let sessions = lock(&self.sessions);
            sessions.iter().rev().find(|(_, s)| Arc::ptr_eq(&s.token, token)).map(|(handle, s)| (*handle, s.clone()))
        };
        match what {
            Stale::Sessions => self.close(self.remove_sessions(|_, session| Arc::ptr_eq(&session.token, token))),
            Stale::OneSession => {
                let newest = newest().map(|(handle, _)| handle);
                self.close(self.remove_sessions(|handle, _| Some(handle) == newest));
            }
            Stale::Login => {
                if let (Some((_, session)), Some(logout)) = (newest(), self.real.C_Logout) {
                    // SAFETY: the session is open, and no other call of the real module is running.
                    unsafe { logout(session.real) };
                }
                token.scope.fault("stale");
            }
            Stale::Objects => {
                token.epoch.fetch_add(1, Ordering::Relaxed);
                token.scope.fault("stale");
            }
        }
    }

    /// Closes sessions that nobody has a handle of any more. Each is a fault.
    fn close(&self, sessions: Vec<Session>) {
        for session in sessions {
            if let Some(close) = self.real.C_CloseSession {
                // SAFETY: the session was open until now, and no other call of the real module is running.
                unsafe { close(session.real) };
            }
            session.token.scope.fault("stale");
        }
    }

    fn report(&self) {
        self.scope.report();
        let tokens: Vec<_> = lock(&self.tokens).values().cloned().collect();
        for token in tokens {
            token.scope.report();
        }
    }

    /// Notices new control files without a call.
    fn look(&self) {
        self.faults();
        let tokens: Vec<_> = lock(&self.tokens).values().cloned().collect();
        for token in tokens {
            self.faults_of(&token);
        }
    }
}

impl Clerk {
    /// `None` when the system has no thread left: then nothing is written down until the end.
    fn start(module: &'static Module) -> Option<Self> {
        let (dismissed, until) = mpsc::channel();
        let work = move || {
            while until.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let tick = || {
                    module.look();
                    module.report();
                };
                if catch_unwind(AssertUnwindSafe(tick)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("faulty-token".to_owned()).spawn(work).ok()?;
        Some(Self { thread, dismissed })
    }
}

impl Token {
    /// The real handle of an object, where the caller's is not stale.
    pub(crate) fn object(&self, handle: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
        let (epoch, real) = (handle >> EPOCH_SHIFT, handle & !(CK_ULONG::MAX << EPOCH_SHIFT));
        (handle == CK_INVALID_HANDLE || epoch == self.epoch.load(Ordering::Relaxed)).then_some(real)
    }

    /// The caller's handle of an object.
    pub(crate) fn handle_of(&self, object: CK_OBJECT_HANDLE) -> CK_OBJECT_HANDLE {
        if object == CK_INVALID_HANDLE {
            return object;
        }
        object | self.epoch.load(Ordering::Relaxed) << EPOCH_SHIFT
    }
}
