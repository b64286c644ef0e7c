//! Calls that belong to a session.

use std::sync::Arc;

use cryptoki_sys::*;

use crate::module::{Module, Token, guarded, module, ok};

/// `C_Decrypt`, `C_Sign` and others: input, and a buffer for the result. They end the operation.
pub(crate) type OneCall =
    unsafe extern "C" fn(CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) -> CK_RV;
/// `C_DecryptFinal` and others: a buffer for the rest of a result. They end the operation.
pub(crate) type Final = unsafe extern "C" fn(CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) -> CK_RV;

/// Buffer for the result of a call that is run only to end its operation. It is larger than the result of any RSA key.
const SCRATCH: usize = 16 * 1024;

/// Properties of a call that decide about its possible faults.
#[derive(Clone, Copy, Default)]
pub(crate) struct Kind {
    /// True if the call ends an operation of the session even when it fails: a call that is made to fail is run as well.
    pub(crate) ends: bool,
    /// True if the call has a result that can be corrupted.
    pub(crate) has_result: bool,
}

/// A call that may go to the real module now.
pub(crate) struct Live<'a> {
    pub(crate) real: &'a CK_FUNCTION_LIST,
    /// The real module's session handle.
    pub(crate) session: CK_SESSION_HANDLE,
    token: &'a Arc<Token>,
    /// Code that the caller gets instead of the result.
    refused: Option<CK_RV>,
    corrupt: bool,
}

/// Runs a call of a session, unless a fault prevents it.
pub(crate) fn on_session(
    name: &'static str,
    handle: CK_SESSION_HANDLE,
    kind: Kind,
    run: impl FnOnce(&Live<'_>) -> Result<(), CK_RV>,
) -> CK_RV {
    guarded(|| {
        let module = module()?;
        let _of_module = module.scope.enter(name);
        module.alive()?;
        let token = module.session(handle)?.token;
        let _of_token = token.scope.enter(name);
        let plan = module.plan(name, kind.has_result);
        let own = module.plan_of(&token, name, kind.has_result, Some(CKR_DEVICE_REMOVED));
        let refused = plan.refused.or(own.refused);
        if let (Some(rv), false) = (refused, kind.ends) {
            return Err(rv);
        }
        // The call may have hung, so the state may have changed meanwhile.
        module.alive()?;
        let _pass = module.pass();
        let session = module.session(handle)?;
        let corrupt = plan.corrupt || own.corrupt;
        let done = run(&Live { real: &module.real, session: session.real, token: &session.token, refused, corrupt });
        refused.map_or(done, Err)
    })
}

impl Live<'_> {
    /// Translates the caller's handle to the real handle.
    pub(crate) fn object(&self, handle: CK_OBJECT_HANDLE, refusal: CK_RV) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        self.token.object(handle).ok_or_else(|| {
            self.token.scope.fault("stale_handle");
            refusal
        })
    }

    /// Translates the handle of a new object to the caller's handle.
    ///
    /// # Safety
    /// `handle` must be null, or the real module must have written to it.
    pub(crate) unsafe fn made(&self, handle: CK_OBJECT_HANDLE_PTR) {
        // SAFETY: guaranteed by the caller.
        if let Some(handle) = unsafe { handle.as_mut() } {
            *handle = self.token.handle_of(*handle);
        }
    }
}

/// Runs a call of the shape [`OneCall`].
///
/// # Safety
/// The pointers must meet the requirements of PKCS#11.
pub(crate) unsafe fn one_call(
    name: &'static str,
    session: CK_SESSION_HANDLE,
    function: impl FnOnce(&CK_FUNCTION_LIST) -> Option<OneCall>,
    (input, input_len): (CK_BYTE_PTR, CK_ULONG),
    (output, output_len): (CK_BYTE_PTR, CK_ULONG_PTR),
) -> CK_RV {
    on_session(name, session, Kind { ends: true, has_result: !output.is_null() }, |live| {
        let real = function(live.real).ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        if live.refused.is_some() {
            let (mut scratch, mut len) = scratch();
            // SAFETY: the input comes from the caller; the output is local and has the given length.
            return ok(unsafe { real(live.session, input, input_len, scratch.as_mut_ptr(), &raw mut len) });
        }
        // SAFETY: all arguments come from the caller.
        ok(unsafe { real(live.session, input, input_len, output, output_len) })?;
        if live.corrupt {
            // SAFETY: the call succeeded and `output` is not null, so it contains that many bytes.
            let result = unsafe { std::slice::from_raw_parts_mut(output, usize_of(*output_len)) };
            if let Some(octet) = result.get_mut(result.len() / 2) {
                *octet ^= 1;
            }
        }
        Ok(())
    })
}

/// Runs a call of the shape [`Final`].
///
/// # Safety
/// The pointers must meet the requirements of PKCS#11.
pub(crate) unsafe fn final_call(
    name: &'static str,
    session: CK_SESSION_HANDLE,
    function: impl FnOnce(&CK_FUNCTION_LIST) -> Option<Final>,
    (output, output_len): (CK_BYTE_PTR, CK_ULONG_PTR),
) -> CK_RV {
    on_session(name, session, Kind { ends: true, has_result: false }, |live| {
        let real = function(live.real).ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        let (mut scratch, mut len) = scratch();
        let (output, output_len) = match live.refused {
            Some(_) => (scratch.as_mut_ptr(), &raw mut len),
            None => (output, output_len),
        };
        // SAFETY: the output comes from the caller, or is local and has the given length.
        ok(unsafe { real(live.session, output, output_len) })
    })
}

fn scratch() -> (Vec<CK_BYTE>, CK_ULONG) {
    (vec![0; SCRATCH], SCRATCH as CK_ULONG)
}

fn usize_of(len: CK_ULONG) -> usize {
    usize::try_from(len).unwrap_or(0)
}

/// `C_FindObjects`: translates all handles found to the caller's handles.
pub(crate) fn find_objects(
    session: CK_SESSION_HANDLE,
    objects: CK_OBJECT_HANDLE_PTR,
    most: CK_ULONG,
    found: CK_ULONG_PTR,
) -> CK_RV {
    on_session("C_FindObjects", session, Kind::default(), |live| {
        let real = live.real.C_FindObjects.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: all arguments come from the caller.
        ok(unsafe { real(live.session, objects, most, found) })?;
        if objects.is_null() {
            return Ok(());
        }
        // SAFETY: the call succeeded, so the number and that many handles were written.
        let objects = unsafe { std::slice::from_raw_parts_mut(objects, usize_of(*found)) };
        for object in objects {
            *object = live.token.handle_of(*object);
        }
        Ok(())
    })
}

/// `C_CloseSession`. A call that is made to fail leaves the session open.
pub(crate) fn close_session(handle: CK_SESSION_HANDLE) -> CK_RV {
    on_session("C_CloseSession", handle, Kind::default(), |live| {
        let real = live.real.C_CloseSession.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the session is open.
        ok(unsafe { real(live.session) })?;
        module()?.remove_sessions(|other, _| other == handle);
        Ok(())
    })
}

impl Module {
    /// Returns an error if a fault of the module or of the token makes the call fail.
    pub(crate) fn refused(
        &self,
        name: &'static str,
        token: Option<&Arc<Token>>,
        absence: Option<CK_RV>,
    ) -> Result<(), CK_RV> {
        let general = self.plan(name, false).refused;
        let own = token.and_then(|token| self.plan_of(token, name, false, absence).refused);
        general.or(own).map_or(Ok(()), Err)
    }
}
