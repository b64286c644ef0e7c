//! The functions of PKCS#11 2.40, exported by name and in the function list.

#![allow(non_snake_case)]

use cryptoki_sys::*;

use crate::module::{bind, guarded, ok};
use crate::session::{self, Kind, final_call, on_session, one_call};
use crate::slots::{self, on_module, on_slot};

/// Builds the function list and the list of names.
macro_rules! functions {
    ($($name:ident)*) => {
        /// Names of all functions.
        pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),*];

        static LIST: CK_FUNCTION_LIST =
            CK_FUNCTION_LIST { version: CK_VERSION { major: 2, minor: 40 }, $($name: Some($name)),* };
    };
}

/// Functions whose first argument is a session. Handles among the other arguments are declared at the end: handles of keys,
/// of other objects, and of created objects.
macro_rules! of_sessions {
    ($(
        $name:ident($($arg:ident: $type:ty),*)
        $(keys $($key:ident)+)? $(, objects $($object:ident)+)? $(, makes $($made:ident)+)?;
    )*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(session: CK_SESSION_HANDLE $(, $arg: $type)*) -> CK_RV {
            on_session(stringify!($name), session, Kind::default(), |live| {
                $($(let $key = live.object($key, CKR_KEY_HANDLE_INVALID)?;)+)?
                $($(let $object = live.object($object, CKR_OBJECT_HANDLE_INVALID)?;)+)?
                let real = live.real.$name.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
                // SAFETY: the session is open; the other arguments come from the caller, except for translated object
                // handles.
                ok(unsafe { real(live.session $(, $arg)*) })?;
                // SAFETY: the call succeeded, so it has written the created handles.
                $($(unsafe { live.made($made) };)+)?
                Ok(())
            })
        }
    )* };
}

/// Functions that end an operation and return only a return code.
macro_rules! ends {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(session: CK_SESSION_HANDLE $(, $arg: $type)*) -> CK_RV {
            on_session(stringify!($name), session, Kind { ends: true, has_result: false }, |live| {
                let real = live.real.$name.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
                // SAFETY: the session is open; the other arguments come from the caller.
                ok(unsafe { real(live.session $(, $arg)*) })
            })
        }
    )* };
}

/// Functions that turn a whole input into a result and end the operation.
macro_rules! one_calls {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            input: CK_BYTE_PTR,
            input_len: CK_ULONG,
            output: CK_BYTE_PTR,
            output_len: CK_ULONG_PTR,
        ) -> CK_RV {
            // SAFETY: the caller follows PKCS#11.
            unsafe { one_call(stringify!($name), session, |real| real.$name, (input, input_len), (output, output_len)) }
        }
    )* };
}

/// Functions that return the rest of a result and end the operation.
macro_rules! finals {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(session: CK_SESSION_HANDLE, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR) -> CK_RV {
            // SAFETY: the caller follows PKCS#11.
            unsafe { final_call(stringify!($name), session, |real| real.$name, (output, output_len)) }
        }
    )* };
}

/// Functions whose first argument is a slot with a token.
macro_rules! of_slots {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(slot: CK_SLOT_ID $(, $arg: $type)*) -> CK_RV {
            on_slot(stringify!($name), slot, Some(CKR_TOKEN_NOT_PRESENT), |module, _| {
                let real = module.real.$name.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
                // SAFETY: all arguments come from the caller.
                ok(unsafe { real(slot $(, $arg)*) })
            })
        }
    )* };
}

functions! {
    C_Initialize C_Finalize C_GetInfo C_GetFunctionList
    C_GetSlotList C_GetSlotInfo C_GetTokenInfo C_GetMechanismList C_GetMechanismInfo C_InitToken C_InitPIN C_SetPIN
    C_OpenSession C_CloseSession C_CloseAllSessions C_GetSessionInfo C_GetOperationState C_SetOperationState
    C_Login C_Logout
    C_CreateObject C_CopyObject C_DestroyObject C_GetObjectSize C_GetAttributeValue C_SetAttributeValue
    C_FindObjectsInit C_FindObjects C_FindObjectsFinal
    C_EncryptInit C_Encrypt C_EncryptUpdate C_EncryptFinal C_DecryptInit C_Decrypt C_DecryptUpdate C_DecryptFinal
    C_DigestInit C_Digest C_DigestUpdate C_DigestKey C_DigestFinal
    C_SignInit C_Sign C_SignUpdate C_SignFinal C_SignRecoverInit C_SignRecover
    C_VerifyInit C_Verify C_VerifyUpdate C_VerifyFinal C_VerifyRecoverInit C_VerifyRecover
    C_DigestEncryptUpdate C_DecryptDigestUpdate C_SignEncryptUpdate C_DecryptVerifyUpdate
    C_GenerateKey C_GenerateKeyPair C_WrapKey C_UnwrapKey C_DeriveKey C_SeedRandom C_GenerateRandom
    C_GetFunctionStatus C_CancelFunction C_WaitForSlotEvent
}

of_sessions! {
    C_InitPIN(pin: CK_UTF8CHAR_PTR, len: CK_ULONG);
    C_SetPIN(old: CK_UTF8CHAR_PTR, old_len: CK_ULONG, new: CK_UTF8CHAR_PTR, new_len: CK_ULONG);
    C_GetSessionInfo(info: CK_SESSION_INFO_PTR);
    C_GetOperationState(state: CK_BYTE_PTR, len: CK_ULONG_PTR);
    C_SetOperationState(
        state: CK_BYTE_PTR, len: CK_ULONG, encryption: CK_OBJECT_HANDLE, authentication: CK_OBJECT_HANDLE
    ) keys encryption authentication;
    C_Login(user: CK_USER_TYPE, pin: CK_UTF8CHAR_PTR, len: CK_ULONG);
    C_Logout();
    C_CreateObject(template: CK_ATTRIBUTE_PTR, count: CK_ULONG, object: CK_OBJECT_HANDLE_PTR), makes object;
    C_CopyObject(
        from: CK_OBJECT_HANDLE, template: CK_ATTRIBUTE_PTR, count: CK_ULONG, to: CK_OBJECT_HANDLE_PTR
    ), objects from, makes to;
    C_DestroyObject(object: CK_OBJECT_HANDLE), objects object;
    C_GetObjectSize(object: CK_OBJECT_HANDLE, size: CK_ULONG_PTR), objects object;
    C_GetAttributeValue(object: CK_OBJECT_HANDLE, template: CK_ATTRIBUTE_PTR, count: CK_ULONG), objects object;
    C_SetAttributeValue(object: CK_OBJECT_HANDLE, template: CK_ATTRIBUTE_PTR, count: CK_ULONG), objects object;
    C_FindObjectsInit(template: CK_ATTRIBUTE_PTR, count: CK_ULONG);
    C_EncryptInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_EncryptUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_DecryptInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_DecryptUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_DigestInit(mechanism: CK_MECHANISM_PTR);
    C_DigestUpdate(input: CK_BYTE_PTR, len: CK_ULONG);
    C_DigestKey(key: CK_OBJECT_HANDLE) keys key;
    C_SignInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_SignUpdate(input: CK_BYTE_PTR, len: CK_ULONG);
    C_SignRecoverInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_VerifyInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_VerifyUpdate(input: CK_BYTE_PTR, len: CK_ULONG);
    C_VerifyRecoverInit(mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE) keys key;
    C_DigestEncryptUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_DecryptDigestUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_SignEncryptUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_DecryptVerifyUpdate(input: CK_BYTE_PTR, input_len: CK_ULONG, output: CK_BYTE_PTR, output_len: CK_ULONG_PTR);
    C_GenerateKey(
        mechanism: CK_MECHANISM_PTR, template: CK_ATTRIBUTE_PTR, count: CK_ULONG, key: CK_OBJECT_HANDLE_PTR
    ), makes key;
    C_GenerateKeyPair(
        mechanism: CK_MECHANISM_PTR,
        public_template: CK_ATTRIBUTE_PTR,
        public_count: CK_ULONG,
        private_template: CK_ATTRIBUTE_PTR,
        private_count: CK_ULONG,
        public: CK_OBJECT_HANDLE_PTR,
        private: CK_OBJECT_HANDLE_PTR
    ), makes public private;
    C_WrapKey(
        mechanism: CK_MECHANISM_PTR,
        wrapping: CK_OBJECT_HANDLE,
        key: CK_OBJECT_HANDLE,
        wrapped: CK_BYTE_PTR,
        len: CK_ULONG_PTR
    ) keys wrapping key;
    C_UnwrapKey(
        mechanism: CK_MECHANISM_PTR,
        unwrapping: CK_OBJECT_HANDLE,
        wrapped: CK_BYTE_PTR,
        len: CK_ULONG,
        template: CK_ATTRIBUTE_PTR,
        count: CK_ULONG,
        key: CK_OBJECT_HANDLE_PTR
    ) keys unwrapping, makes key;
    C_DeriveKey(
        mechanism: CK_MECHANISM_PTR,
        base: CK_OBJECT_HANDLE,
        template: CK_ATTRIBUTE_PTR,
        count: CK_ULONG,
        key: CK_OBJECT_HANDLE_PTR
    ) keys base, makes key;
    C_SeedRandom(seed: CK_BYTE_PTR, len: CK_ULONG);
    C_GenerateRandom(random: CK_BYTE_PTR, len: CK_ULONG);
    C_GetFunctionStatus();
    C_CancelFunction();
}

ends! {
    C_FindObjectsFinal();
    C_Verify(data: CK_BYTE_PTR, data_len: CK_ULONG, signature: CK_BYTE_PTR, signature_len: CK_ULONG);
    C_VerifyFinal(signature: CK_BYTE_PTR, len: CK_ULONG);
}

one_calls! { C_Encrypt C_Decrypt C_Digest C_Sign C_SignRecover C_VerifyRecover }

finals! { C_EncryptFinal C_DecryptFinal C_DigestFinal C_SignFinal }

of_slots! {
    C_GetMechanismList(list: CK_MECHANISM_TYPE_PTR, count: CK_ULONG_PTR);
    C_GetMechanismInfo(mechanism: CK_MECHANISM_TYPE, info: CK_MECHANISM_INFO_PTR);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_GetFunctionList(list: *mut CK_FUNCTION_LIST_PTR) -> CK_RV {
    guarded(|| {
        if list.is_null() {
            return Err(CKR_ARGUMENTS_BAD);
        }
        bind()?;
        // SAFETY: the pointer is not null and comes from the caller.
        unsafe { *list = (&raw const LIST).cast_mut() };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_Initialize(args: CK_VOID_PTR) -> CK_RV {
    guarded(|| bind()?.initialise(args))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_Finalize(reserved: CK_VOID_PTR) -> CK_RV {
    guarded(|| crate::module::module()?.finalise(reserved))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_GetInfo(info: CK_INFO_PTR) -> CK_RV {
    on_module("C_GetInfo", |module| {
        let real = module.real.C_GetInfo.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: the pointer comes from the caller.
        ok(unsafe { real(info) })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_GetSlotList(present: CK_BBOOL, list: CK_SLOT_ID_PTR, count: CK_ULONG_PTR) -> CK_RV {
    // SAFETY: the caller follows PKCS#11.
    unsafe { slots::get_slot_list(present, list, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_GetSlotInfo(slot: CK_SLOT_ID, info: CK_SLOT_INFO_PTR) -> CK_RV {
    slots::get_slot_info(slot, info)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_GetTokenInfo(slot: CK_SLOT_ID, info: CK_TOKEN_INFO_PTR) -> CK_RV {
    slots::get_token_info(slot, info)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_InitToken(
    slot: CK_SLOT_ID,
    pin: CK_UTF8CHAR_PTR,
    pin_len: CK_ULONG,
    label: CK_UTF8CHAR_PTR,
) -> CK_RV {
    slots::init_token(slot, (pin, pin_len), label)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_OpenSession(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    application: CK_VOID_PTR,
    notify: CK_NOTIFY,
    session: CK_SESSION_HANDLE_PTR,
) -> CK_RV {
    slots::open_session(slot, flags, (application, notify), session)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_CloseSession(session: CK_SESSION_HANDLE) -> CK_RV {
    session::close_session(session)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_CloseAllSessions(slot: CK_SLOT_ID) -> CK_RV {
    slots::close_all_sessions(slot)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn C_FindObjects(
    session: CK_SESSION_HANDLE,
    objects: CK_OBJECT_HANDLE_PTR,
    most: CK_ULONG,
    found: CK_ULONG_PTR,
) -> CK_RV {
    session::find_objects(session, objects, most, found)
}

/// Does not hold the gate, because it may wait for any time.
#[unsafe(no_mangle)]
unsafe extern "C" fn C_WaitForSlotEvent(flags: CK_FLAGS, slot: CK_SLOT_ID_PTR, reserved: CK_VOID_PTR) -> CK_RV {
    const NAME: &str = "C_WaitForSlotEvent";
    guarded(|| {
        let module = crate::module::module()?;
        let _entered = module.scope.enter(NAME);
        module.alive()?;
        module.refused(NAME, None, None)?;
        let real = module.real.C_WaitForSlotEvent.ok_or(CKR_FUNCTION_NOT_SUPPORTED)?;
        // SAFETY: all arguments come from the caller.
        ok(unsafe { real(flags, slot, reserved) })
    })
}
