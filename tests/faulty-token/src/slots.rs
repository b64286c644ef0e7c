//! Calls that belong to a slot, or to no slot and no session.

use std::sync::Arc;

use cryptoki_sys::*;

use crate::faults::Faults;
use crate::module::{Module, Session, Token, guarded, module, ok};

/// Runs a call that belongs to no slot.
pub(crate) fn on_module(name: &'static str, run: impl FnOnce(&Module) -> Result<(), CK_RV>) -> CK_RV {
    guarded(|| {
        let module = module()?;
        let _entered = module.scope.enter(name);
        module.alive()?;
        module.refused(name, None, None)?;
        module.alive()?;
        let _pass = module.pass();
        run(module)
    })
}

/// The token in a slot, and its faults when the call was made.
pub(crate) struct Occupant {
    token: Arc<Token>,
    faults: Arc<Faults>,
}

/// Runs a call of a slot, unless a fault of its token prevents it. `absence` is the return code for an absent token.
pub(crate) fn on_slot(
    name: &'static str,
    slot: CK_SLOT_ID,
    absence: Option<CK_RV>,
    run: impl FnOnce(&Module, Option<&Occupant>) -> Result<(), CK_RV>,
) -> CK_RV {
    guarded(|| {
        let module = module()?;
        let _of_module = module.scope.enter(name);
        module.alive()?;
        let token = module.token_in(slot);
        let _of_token = token.as_ref().map(|token| token.scope.enter(name));
        module.refused(name, token.as_ref(), absence)?;
        module.alive()?;
        // Read before the gate is passed: new faults may have to wait for the calls that passed it.
        let occupant = token.clone().map(|token| Occupant { faults: module.faults_of(&token), token });
        let _pass = module.pass();
        run(module, occupant.as_ref())
    })
}

/// `C_GetSlotList`, without absent tokens.
///
/// # Safety
/// The pointers must meet the requirements of PKCS#11.
pub(crate) unsafe fn get_slot_list(present: CK_BBOOL, list: CK_SLOT_ID_PTR, count: CK_ULONG_PTR) -> CK_RV {
    const NAME: &str = "C_GetSlotList";
    guarded(|| {
        let module = module()?;
        let _entered = module.scope.enter(NAME);
        // SAFETY: the pointer comes from the caller and may be null.
        let count = unsafe { count.as_mut() }.ok_or(CKR_ARGUMENTS_BAD)?;
        if let Err(rv) = module.alive() {
            if !module.came_up_empty() {
                return Err(rv);
            }
            *count = 0;
            return Ok(());
        }
        module.refused(NAME, None, None)?;
        module.alive()?;
        if module.faults().no_slots {
            module.scope.fault("no_slots");
            *count = 0;
            return Ok(());
        }
        let real = module.real.C_GetSlotList.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        let slots = if present == CK_FALSE { None } else { without_absent(module)? };
        let Some(slots) = slots else {
            let _pass = module.pass();
            // SAFETY: all arguments come from the caller.
            return ok(unsafe { real(present, list, count) });
        };
        let (room, number) = (*count, slots.len() as CK_ULONG);
        *count = number;
        if list.is_null() {
            return Ok(());
        }
        if room < number {
            return Err(CKR_BUFFER_TOO_SMALL);
        }
        // SAFETY: the list comes from the caller, is not null, and has room for `count` entries, which is enough.
        unsafe { std::ptr::copy_nonoverlapping(slots.as_ptr(), list, slots.len()) };
        Ok(())
    })
}

/// Returns the slots whose tokens are present; `None` if all are.
fn without_absent(module: &Module) -> Result<Option<Vec<CK_SLOT_ID>>, CK_RV> {
    let real = module.real.C_GetSlotList.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
    let mut slots = Vec::new();
    {
        let _pass = module.pass();
        let mut count = 0;
        // SAFETY: there is no list, and the count is local.
        ok(unsafe { real(CK_TRUE, std::ptr::null_mut(), &raw mut count) })?;
        slots.resize(usize::try_from(count).map_err(|_| CKR_HOST_MEMORY)?, 0);
        // SAFETY: the list is local and has the length in the count.
        ok(unsafe { real(CK_TRUE, slots.as_mut_ptr(), &raw mut count) })?;
        slots.truncate(usize::try_from(count).map_err(|_| CKR_HOST_MEMORY)?);
    }
    let all = slots.len();
    slots.retain(|slot| {
        let Some(token) = module.token_in(*slot) else { return true };
        let absent = module.faults_of(&token).absent.is_some();
        if absent {
            token.scope.fault("absent");
        }
        !absent
    });
    Ok((slots.len() < all).then_some(slots))
}

/// `C_GetSlotInfo`. It also answers for an absent token, and reports the absence.
pub(crate) fn get_slot_info(slot: CK_SLOT_ID, info: CK_SLOT_INFO_PTR) -> CK_RV {
    on_slot("C_GetSlotInfo", slot, None, |module, occupant| {
        let real = module.real.C_GetSlotInfo.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the pointer comes from the caller.
        ok(unsafe { real(slot, info) })?;
        if occupant.is_some_and(|occupant| occupant.faults.absent.is_some()) {
            // SAFETY: the call succeeded, so the structure was written.
            unsafe { (*info).flags &= !CKF_TOKEN_PRESENT };
        }
        Ok(())
    })
}

/// `C_GetTokenInfo`. It may report another number of sessions and fewer PIN tries.
pub(crate) fn get_token_info(slot: CK_SLOT_ID, info: CK_TOKEN_INFO_PTR) -> CK_RV {
    on_slot("C_GetTokenInfo", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, occupant| {
        let real = module.real.C_GetTokenInfo.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the pointer comes from the caller.
        ok(unsafe { real(slot, info) })?;
        if let Some(sessions) = occupant.and_then(|occupant| occupant.faults.advertise_sessions) {
            // SAFETY: the call succeeded, so the structure was written.
            unsafe {
                (*info).ulMaxSessionCount = sessions;
                (*info).ulMaxRwSessionCount = sessions;
            }
        }
        if let Some(occupant) = occupant {
            // SAFETY: as above.
            unsafe { (*info).flags |= occupant.faults.pin_flags };
        }
        Ok(())
    })
}

/// `C_InitToken`. The slot may contain another token afterwards.
pub(crate) fn init_token(
    slot: CK_SLOT_ID,
    (pin, pin_len): (CK_UTF8CHAR_PTR, CK_ULONG),
    label: CK_UTF8CHAR_PTR,
) -> CK_RV {
    on_slot("C_InitToken", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, _| {
        let real = module.real.C_InitToken.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: all arguments come from the caller.
        ok(unsafe { real(slot, pin, pin_len, label) })?;
        module.forget_slot(slot);
        Ok(())
    })
}

/// `C_OpenSession`, with a limit on open sessions.
pub(crate) fn open_session(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    (application, notify): (CK_VOID_PTR, CK_NOTIFY),
    handle: CK_SESSION_HANDLE_PTR,
) -> CK_RV {
    on_slot("C_OpenSession", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, occupant| {
        let real = module.real.C_OpenSession.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        let mut session = CK_INVALID_HANDLE;
        let Some(Occupant { token, faults }) = occupant else {
            // SAFETY: as below. There is no token; the real module returns its own error.
            ok(unsafe { real(slot, flags, application, notify, &raw mut session) })?;
            return Err(CKR_GENERAL_ERROR);
        };
        if handle.is_null() {
            return Err(CKR_ARGUMENTS_BAD);
        }
        if !token.scope.reserve_session(faults.max_sessions) {
            token.scope.fault("session_limit");
            return Err(CKR_SESSION_COUNT);
        }
        // SAFETY: the handle is local; the other arguments come from the caller.
        if let Err(rv) = ok(unsafe { real(slot, flags, application, notify, &raw mut session) }) {
            token.scope.forget_sessions(1);
            return Err(rv);
        }
        let ours = module.add_session(Session { real: session, slot, token: token.clone() });
        // SAFETY: the pointer comes from the caller and is not null.
        unsafe { *handle = ours };
        Ok(())
    })
}

/// `C_CloseAllSessions`.
pub(crate) fn close_all_sessions(slot: CK_SLOT_ID) -> CK_RV {
    on_slot("C_CloseAllSessions", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, _| {
        let real = module.real.C_CloseAllSessions.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the call has no pointers.
        ok(unsafe { real(slot) })?;
        module.remove_sessions(|_, session| session.slot == slot);
        Ok(())
    })
}
