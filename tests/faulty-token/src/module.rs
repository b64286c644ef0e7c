//! The instance: the real module, the owners of its sessions, and the order of calls.
//!
//! Every call of the real module holds the gate for reading. Actions that must not happen during a call (closing sessions
//! behind the caller's back, logging out, finalising) hold it for writing. Delays and hangs happen outside the gate, so
//! that a call that hangs blocks no other call, not even `C_Finalize`. Control files are also checked outside the gate,
//! since a new file may need it for writing.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use claviger_process::lock::{lock, unpoisoned};
use cryptoki_sys::*;

use crate::faults::{Faults, Stale};
use crate::scope::{Plan, Scope};
use crate::{CONTROL_VARIABLE, MODULE_FILE, MODULE_VARIABLE};

/// Period in which counts are written and, without calls, control files are checked.
const TICK: Duration = Duration::from_millis(50);
/// An object handle has the real handle in its lower bits, and above it the number of times that handles became stale.
const EPOCH_SHIFT: u32 = CK_ULONG::BITS / 4 * 3;
/// Padding of `CK_TOKEN_INFO::label`.
const PADDING: [char; 2] = [' ', '\0'];

static MODULE: OnceLock<Module> = OnceLock::new();

/// The instance of this copy of the library.
pub(crate) struct Module {
    pub(crate) real: CK_FUNCTION_LIST,
    control: PathBuf,
    pub(crate) scope: Scope,
    gate: RwLock<()>,
    initialised: AtomicBool,
    dead: Mutex<Option<Death>>,
    /// By label. Entries are never removed.
    tokens: Mutex<BTreeMap<String, Arc<Token>>>,
    slots: Mutex<HashMap<CK_SLOT_ID, Arc<Token>>>,
    sessions: Mutex<BTreeMap<CK_SESSION_HANDLE, Session>>,
    /// Session handles are never reused, whatever the real module does, so that stale handles stay stale.
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

/// Behaviour of a dead module.
#[derive(Clone, Copy)]
struct Death {
    rv: CK_RV,
    /// True if the module was initialised while dead: it then has no slots, which is no error.
    empty: bool,
}

/// The thread that writes the counts.
struct Clerk {
    thread: JoinHandle<()>,
    dismissed: Sender<()>,
}

/// Returns the bound instance.
pub(crate) fn module() -> Result<&'static Module, CK_RV> {
    MODULE.get().ok_or(CKR_CRYPTOKI_NOT_INITIALIZED)
}

/// Returns the instance, and binds it to the real module first if necessary.
pub(crate) fn bind() -> Result<&'static Module, CK_RV> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = lock(&ONE_AT_A_TIME);
    if let Some(module) = MODULE.get() {
        return Ok(module);
    }
    let module = Module::load().map_err(|reason| {
        // PKCS#11 has no way to report it.
        #[allow(clippy::print_stderr)]
        {
            eprintln!("claviger-faulty-token: {reason}");
        }
        CKR_GENERAL_ERROR
    })?;
    Ok(MODULE.get_or_init(|| module))
}

/// Runs an exported function. A panic must not cross the boundary to the caller.
pub(crate) fn guarded(run: impl FnOnce() -> Result<(), CK_RV>) -> CK_RV {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => CKR_OK,
        Ok(Err(rv)) => rv,
        Err(_) => CKR_GENERAL_ERROR,
    }
}

/// Converts a return code to a result.
pub(crate) fn ok(rv: CK_RV) -> Result<(), CK_RV> {
    if rv == CKR_OK { Ok(()) } else { Err(rv) }
}

impl Module {
    fn load() -> Result<Self, String> {
        let variable = |name| std::env::var_os(name).ok_or_else(|| format!("{name} is not set"));
        let path = variable(MODULE_VARIABLE)?;
        let control = PathBuf::from(variable(CONTROL_VARIABLE)?);
        // SAFETY: the user who names the module trusts it, like every program that loads a PKCS#11 module.
        let library = unsafe { Pkcs11::new(&path) }.map_err(|error| error.to_string())?;
        // The library's functions are used until the process ends.
        let library = Box::leak(Box::new(library));
        let get = library.C_GetFunctionList.as_ref().map_err(ToString::to_string)?;
        let mut list = ptr::null_mut();
        // SAFETY: `list` is writable, and C_GetFunctionList may be called at any time.
        let rv = unsafe { get(&raw mut list) };
        if rv != CKR_OK || list.is_null() {
            return Err(format!("{}: C_GetFunctionList: {rv:#x}", path.display()));
        }
        // SAFETY: the call succeeded, so `list` points to a list, which the module owns while it is loaded.
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

    /// Prevents actions that must not happen during a call of the real module, until the guard is dropped.
    pub(crate) fn pass(&self) -> RwLockReadGuard<'_, ()> {
        unpoisoned(self.gate.read())
    }

    fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        unpoisoned(self.gate.write())
    }

    /// Returns the module's current faults.
    pub(crate) fn faults(&self) -> Arc<Faults> {
        self.scope.faults(|new| {
            if let Some(rv) = new.dead {
                lock(&self.dead).get_or_insert(Death { rv, empty: false });
            }
        })
    }

    /// Returns a token's current faults.
    pub(crate) fn faults_of(&self, token: &Arc<Token>) -> Arc<Faults> {
        token.scope.faults(|new| {
            for stale in &new.stale {
                self.stale(token, *stale);
            }
        })
    }

    /// Returns an error if the module is dead or not initialised.
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

    /// Returns true if the module was initialised while dead, and so without slots.
    pub(crate) fn came_up_empty(&self) -> bool {
        lock(&self.dead).is_some_and(|death| death.empty)
    }

    /// Decides about a call by the module's own control file.
    pub(crate) fn plan(&self, name: &'static str, has_result: bool) -> Plan {
        self.scope.plan(name, has_result, None, || self.faults())
    }

    /// Decides about a call by a token's control file.
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
        // SAFETY: the caller's argument is passed on unchanged.
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
        // The thread is stopped before the gate is closed, since it may want to pass the gate.
        let clerk = lock(&self.clerk).take();
        if let Some(Clerk { thread, dismissed }) = clerk {
            drop(dismissed);
            let _ = thread.join();
        }
        let _alone = self.close_gate();
        let real = self.real.C_Finalize.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the caller's argument is passed on unchanged; no other call of the real module is running.
        ok(unsafe { real(reserved) })?;
        self.initialised.store(false, Ordering::Release);
        self.forget();
        self.report();
        Ok(())
    }

    /// Forgets sessions and slots, which belong to one initialisation.
    fn forget(&self) {
        for session in std::mem::take(&mut *lock(&self.sessions)).into_values() {
            session.token.scope.forget_sessions(1);
        }
        lock(&self.slots).clear();
    }

    /// Returns the token in a slot; `None` if the real module does not tell.
    pub(crate) fn token_in(&self, slot: CK_SLOT_ID) -> Option<Arc<Token>> {
        if let Some(token) = lock(&self.slots).get(&slot) {
            return Some(token.clone());
        }
        let mut info = CK_TOKEN_INFO::default();
        {
            let _pass = self.pass();
            // SAFETY: `info` is writable and used only here.
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

    /// Forgets the token of a slot, because another token may be in the slot now.
    pub(crate) fn forget_slot(&self, slot: CK_SLOT_ID) {
        lock(&self.slots).remove(&slot);
    }

    /// Assigns a handle of this module to a session of the real module.
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

    /// Removes sessions from the table. The caller closes them in the real module.
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

    /// Makes items of a token invalid, once and permanently.
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

    /// Closes sessions that no caller has a handle of any more. Each counts as a fault.
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

    /// Finds new control files without a call.
    fn look(&self) {
        self.faults();
        let tokens: Vec<_> = lock(&self.tokens).values().cloned().collect();
        for token in tokens {
            self.faults_of(&token);
        }
    }
}

impl Clerk {
    /// Starts the thread; `None` if the system has no thread left. Counts are then written only at the end.
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
    /// Returns the real handle of an object; `None` if the caller's handle is stale.
    pub(crate) fn object(&self, handle: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
        let (epoch, real) = (handle >> EPOCH_SHIFT, handle & !(CK_ULONG::MAX << EPOCH_SHIFT));
        (handle == CK_INVALID_HANDLE || epoch == self.epoch.load(Ordering::Relaxed)).then_some(real)
    }

    /// Returns the caller's handle of an object.
    pub(crate) fn handle_of(&self, object: CK_OBJECT_HANDLE) -> CK_OBJECT_HANDLE {
        if object == CK_INVALID_HANDLE {
            return object;
        }
        object | self.epoch.load(Ordering::Relaxed) << EPOCH_SHIFT
    }
}
