//! Calls that belong to a slot, or to none.

use std::sync::Arc;

use cryptoki_sys::*;

use crate::faults::Faults;
use crate::module::{Module, Session, Token, guarded, module, ok};

/// Runs a call of no slot.
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

/// The token in a slot, and its faults when the call went through.
pub(crate) struct Occupant {
    token: Arc<Token>,
    faults: Arc<Faults>,
}

/// Runs a call of a slot, unless a fault of the token in it wants it otherwise. `absence` is what it says without a token.
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
        // Before passing: new faults may have to wait for those who have.
        let occupant = token.clone().map(|token| Occupant { faults: module.faults_of(&token), token });
        let _pass = module.pass();
        run(module, occupant.as_ref())
    })
}

/// `C_GetSlotList`, without the tokens that are absent.
///
/// # Safety
/// The pointers are what PKCS#11 demands of them.
pub(crate) unsafe fn get_slot_list(present: CK_BBOOL, list: CK_SLOT_ID_PTR, count: CK_ULONG_PTR) -> CK_RV {
    const NAME: &str = "C_GetSlotList";
    guarded(|| {
        let module = module()?;
        let _entered = module.scope.enter(NAME);
        // SAFETY: the caller's, who may have passed null.
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
            // SAFETY: all is the caller's.
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
        // SAFETY: the list is not null and the caller's, with room for as many as it said, which is enough.
        unsafe { std::ptr::copy_nonoverlapping(slots.as_ptr(), list, slots.len()) };
        Ok(())
    })
}

/// The slots whose tokens are present; `None` when all are.
fn without_absent(module: &Module) -> Result<Option<Vec<CK_SLOT_ID>>, CK_RV> {
    let real = module.real.C_GetSlotList.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
    let mut slots = Vec::new();
    {
        let _pass = module.pass();
        let mut count = 0;
        // SAFETY: no list, and a count that is ours.
        ok(unsafe { real(CK_TRUE, std::ptr::null_mut(), &raw mut count) })?;
        slots.resize(usize::try_from(count).map_err(|_| CKR_HOST_MEMORY)?, 0);
        // SAFETY: a list that is ours and as long as the count says.
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

/// `C_GetSlotInfo`: it answers for an absent token, too, but says so.
pub(crate) fn get_slot_info(slot: CK_SLOT_ID, info: CK_SLOT_INFO_PTR) -> CK_RV {
    on_slot("C_GetSlotInfo", slot, None, |module, occupant| {
        let real = module.real.C_GetSlotInfo.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the pointer is the caller's.
        ok(unsafe { real(slot, info) })?;
        if occupant.is_some_and(|occupant| occupant.faults.absent.is_some()) {
            // SAFETY: the call succeeded, so the structure is there.
            unsafe { (*info).flags &= !CKF_TOKEN_PRESENT };
        }
        Ok(())
    })
}

/// `C_GetTokenInfo`, which may advertise another number of sessions, and fewer tries of the PIN.
pub(crate) fn get_token_info(slot: CK_SLOT_ID, info: CK_TOKEN_INFO_PTR) -> CK_RV {
    on_slot("C_GetTokenInfo", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, occupant| {
        let real = module.real.C_GetTokenInfo.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the pointer is the caller's.
        ok(unsafe { real(slot, info) })?;
        if let Some(sessions) = occupant.and_then(|occupant| occupant.faults.advertise_sessions) {
            // SAFETY: the call succeeded, so the structure is there.
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

/// `C_InitToken`: another token is in the slot then.
pub(crate) fn init_token(
    slot: CK_SLOT_ID,
    (pin, pin_len): (CK_UTF8CHAR_PTR, CK_ULONG),
    label: CK_UTF8CHAR_PTR,
) -> CK_RV {
    on_slot("C_InitToken", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, _| {
        let real = module.real.C_InitToken.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: all is the caller's.
        ok(unsafe { real(slot, pin, pin_len, label) })?;
        module.forget_slot(slot);
        Ok(())
    })
}

/// `C_OpenSession`, which may find too many open.
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
            // SAFETY: as below. There is no token, and the real module will say what it thinks of that.
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
        // SAFETY: the handle is ours to be written, the rest is the caller's.
        if let Err(rv) = ok(unsafe { real(slot, flags, application, notify, &raw mut session) }) {
            token.scope.forget_sessions(1);
            return Err(rv);
        }
        let ours = module.add_session(Session { real: session, slot, token: token.clone() });
        // SAFETY: it is the caller's, and not null.
        unsafe { *handle = ours };
        Ok(())
    })
}

/// `C_CloseAllSessions`.
pub(crate) fn close_all_sessions(slot: CK_SLOT_ID) -> CK_RV {
    on_slot("C_CloseAllSessions", slot, Some(CKR_TOKEN_NOT_PRESENT), |module, _| {
        let real = module.real.C_CloseAllSessions.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: it has no pointers.
        ok(unsafe { real(slot) })?;
        module.remove_sessions(|_, session| session.slot == slot);
        Ok(())
    })
}
