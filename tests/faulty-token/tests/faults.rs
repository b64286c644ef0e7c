//! Tests of every kind of fault on real tokens: it has the documented effect, and none on the other token.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod world;

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use cryptoki::context::Function;
use cryptoki::error::Result;
use cryptoki::object::{AttributeType, ObjectClass};
use cryptoki_sys::*;
use world::{Open, TEXT, code, find, worlds};

fn failed<T: Debug>(result: Result<T>) -> CK_RV {
    code(&result.unwrap_err())
}

#[test]
fn calls_are_forwarded() {
    let (_alone, world, _) = worlds();
    for label in ["one", "two"] {
        let open = world.open(label);
        assert!(open.well());
        // The convenience calls, which first ask for lengths.
        let mechanism = cryptoki::mechanism::Mechanism::RsaPkcs;
        assert_eq!(open.session.decrypt(&mechanism, open.private, &open.encrypt()).unwrap(), TEXT);
        assert_eq!(open.session.generate_random_vec(16).unwrap().len(), 16);
        let slot = open.session.get_session_info().unwrap().slot_id();
        assert_eq!(Some(slot), world.slot(label));
        assert!(!world.pkcs11.get_mechanism_list(slot).unwrap().is_empty());
    }
    assert!(world.open("one").decrypt(&[0; 128]).is_err());
    assert!(world.pkcs11.get_library_info().unwrap().manufacturer_id().contains("SoftHSM"));
    assert!(world.pkcs11.is_fn_supported(Function::DecryptDigestUpdate));
    // The list has no null entries, and every request returns the same list.
    // SAFETY: the library is loaded already.
    let direct = unsafe { cryptoki_sys::Pkcs11::new(world.module_file()) }.unwrap();
    let mut lists = [std::ptr::null_mut(); 2];
    for list in &mut lists {
        // SAFETY: the pointer is writable.
        assert_eq!(unsafe { direct.C_GetFunctionList(list) }, CKR_OK);
    }
    assert_eq!(lists[0], lists[1]);
    let places = size_of::<CK_FUNCTION_LIST>() / size_of::<usize>() - 1;
    // SAFETY: after the version, the list is an array of pointers.
    let functions = unsafe { std::slice::from_raw_parts(lists[0].cast::<usize>().add(1), places) };
    assert!(functions.iter().all(|function| *function != 0));
    for exported in [&direct.C_Decrypt, &direct.C_Sign] {
        assert!(exported.is_ok());
    }
    assert!(direct.C_GetTokenInfo.is_ok());
}

#[test]
fn errors_come_as_often_as_wanted() {
    let (_alone, world, _) = worlds();
    let before = world.count("one", "rv");
    let (one, two) = (world.open("one"), world.open("two"));
    let ciphertext = one.encrypt();
    world.set("one", &["call=C_Decrypt rv=0x30 every=3", "call=C_Sign rv=CKR_GENERAL_ERROR times=2"]);
    let codes = |open: &Open<'_>, of: &dyn Fn(&Open<'_>) -> std::result::Result<Vec<u8>, CK_RV>| -> Vec<CK_RV> {
        (0..6).map(|_| of(open).err().unwrap_or(CKR_OK)).collect()
    };
    // The session can be used again at once: the failed operation is no longer active in the real module.
    assert_eq!(codes(&one, &|open| open.decrypt(&ciphertext)), [0, 0, 0x30, 0, 0, 0x30]);
    assert_eq!(codes(&one, &|open| open.sign()), [5, 5, 0, 0, 0, 0]);
    for _ in 0..4 {
        assert!(two.well());
    }
    // A new file restarts the counting.
    world.set("one", &["call=C_Decrypt,C_Sign rv=0x30 times=1"]);
    assert_eq!(codes(&one, &|open| open.decrypt(&ciphertext)), [0x30, 0, 0, 0, 0, 0]);
    world.clear("one");
    assert!(one.well());
    // The statistics are complete once the module was finalised.
    drop((one, two));
    world.pkcs11.clone().finalize().unwrap();
    assert_eq!(world.count("one", "rv"), before + 5);
}

#[test]
fn any_call_can_fail() {
    let (_alone, world, _) = worlds();
    let (one, two) = (world.open("one"), world.open("two"));
    let slot = world.slot("one").unwrap();
    let ciphertext = one.encrypt();
    let fails = |call: &str, run: &dyn Fn() -> CK_RV| {
        for calls in [call, "*"] {
            world.set("one", &[&format!("call={calls} rv=CKR_DEVICE_ERROR")]);
            assert_eq!(run(), CKR_DEVICE_ERROR, "{call}");
            assert!(two.well());
            world.clear("one");
            assert!(one.well(), "after {call}");
        }
    };
    fails("C_DecryptInit", &|| one.decrypt(&ciphertext).unwrap_err());
    fails("C_SignInit", &|| one.sign().unwrap_err());
    fails("C_OpenSession", &|| failed(world.pkcs11.open_ro_session(slot)));
    fails("C_Login", &|| failed(world.login(&one.session)));
    fails("C_GetSessionInfo", &|| failed(one.session.get_session_info()));
    fails("C_GetTokenInfo", &|| failed(world.pkcs11.get_token_info(slot)));
    fails("C_GetMechanismList", &|| failed(world.pkcs11.get_mechanism_list(slot)));
    fails("C_FindObjectsInit", &|| failed(one.session.find_objects(&[])));
    fails("C_GetAttributeValue", &|| failed(one.session.get_attributes(one.private, &[AttributeType::Modulus])));
    world.set("one", &["call=C_FindObjects rv=CKR_DEVICE_ERROR"]);
    assert_eq!(failed(one.session.find_objects(&[])), CKR_DEVICE_ERROR);
    // Calls that belong to no token are controlled by the module's file.
    world.set("module", &["call=C_GetSlotList rv=CKR_DEVICE_ERROR times=1"]);
    assert_eq!(failed(world.pkcs11.get_slots_with_token()), CKR_DEVICE_ERROR);
    world.set("module", &["call=* rv=CKR_DEVICE_ERROR times=3"]);
    assert_eq!(failed(world.pkcs11.get_slots_with_token()), CKR_DEVICE_ERROR);
    for open in [&one, &two] {
        assert_eq!(failed(open.session.get_session_info()), CKR_DEVICE_ERROR);
    }
    assert!(one.well() && two.well());
}

#[test]
fn delays_are_kept() {
    let (_alone, world, _) = worlds();
    let one = world.open("one");
    let ciphertext = one.encrypt();
    let before = world.count("one", "delay");
    world.set("one", &["call=C_Decrypt delay_ms=60 every=2"]);
    let slow = |_| {
        let begun = Instant::now();
        assert_eq!(one.decrypt(&ciphertext).unwrap(), TEXT);
        begun.elapsed() >= Duration::from_millis(60)
    };
    let slow: Vec<bool> = (0..6).map(slow).collect();
    assert!(slow[1] && slow[3] && slow[5], "{slow:?}");
    world.until_counted("one", "delay", before + 3);
}

/// Runs a function with a session on a thread of its own.
fn aside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    open: Open<'scope>,
    run: impl FnOnce(&Open<'_>) -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, (Open<'scope>, T)> {
    scope.spawn(move || {
        let result = run(&open);
        (open, result)
    })
}

#[test]
fn a_call_hangs_until_the_file_goes() {
    let (_alone, world, _) = worlds();
    let (other, two) = (world.open("one"), world.open("two"));
    let ciphertext = other.encrypt();
    for (fault, expected) in [
        ("call=C_Decrypt hang", Ok(TEXT.to_vec())),
        ("call=C_Decrypt hang rv=0x30", Err(0x30)),
        ("call=C_Decrypt hang corrupt", Ok(b"a key in uransport".to_vec())),
    ] {
        world.set("one", &[fault]);
        std::thread::scope(|scope| {
            let hanging = aside(scope, world.open("one"), |one| one.decrypt(&ciphertext));
            world.until_counted("one", "hanging", 1);
            assert!(two.well());
            assert!(other.sign().is_ok() && !hanging.is_finished());
            world.clear("one");
            let (one, result) = hanging.join().unwrap();
            assert_eq!(result, expected);
            assert!(one.well());
        });
    }
}

#[test]
fn a_call_that_hangs_does_not_hold_up_a_new_beginning() {
    let (_alone, world, _) = worlds();
    let one = world.open("one");
    let ciphertext = one.encrypt();
    world.set("one", &["call=C_Decrypt hang"]);
    std::thread::scope(|scope| {
        let hanging = aside(scope, one, |one| one.decrypt(&ciphertext));
        world.until_counted("one", "hanging", 1);
        world.pkcs11.clone().finalize().unwrap();
        world.initialize().unwrap();
        let again = world.open("one");
        assert!(again.sign().is_ok() && !hanging.is_finished());
        world.clear("one");
        assert_eq!(hanging.join().unwrap().1, Err(CKR_SESSION_HANDLE_INVALID));
        assert!(again.well());
    });
}

#[test]
fn results_are_wrong_by_one_bit() {
    let (_alone, world, _) = worlds();
    let (one, two) = (world.open("one"), world.open("two"));
    let ciphertext = one.encrypt();
    world.set("one", &["call=C_Decrypt corrupt every=2"]);
    let texts: Vec<_> = (0..4).map(|_| one.decrypt(&ciphertext).unwrap()).collect();
    let differ = |text: &Vec<u8>| text.iter().zip(TEXT).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
    assert_eq!(texts.iter().map(differ).collect::<Vec<_>>(), [0, 1, 0, 1]);
    assert!(texts.iter().all(|text| text.len() == TEXT.len()));
    assert!(one.verify(&one.sign().unwrap()).is_ok());
    world.set("one", &["call=C_Sign corrupt"]);
    let signature = one.sign().unwrap();
    assert_eq!(signature.len(), 128);
    assert!(one.verify(&signature).is_err());
    // A call that only asks for a length has no result.
    world.set("one", &["call=C_Sign corrupt times=1"]);
    let mechanism = cryptoki::mechanism::Mechanism::Sha256RsaPkcs;
    assert!(one.verify(&one.session.sign(&mechanism, one.private, TEXT).unwrap()).is_err());
    assert!(one.well() && two.well());
}

#[test]
fn sessions_become_invalid_for_ever() {
    let (_alone, world, _) = worlds();
    let (first, second, two) = (world.open("one"), world.open("one"), world.open("two"));
    world.set("one", &["stale=one-session"]);
    assert!(first.well() && two.well());
    assert_eq!(second.sign(), Err(CKR_SESSION_HANDLE_INVALID));
    world.set("one", &["stale=sessions"]);
    assert_eq!(first.sign(), Err(CKR_SESSION_HANDLE_INVALID));
    assert!(two.well());
    // Only those sessions are invalid, not later ones. As the last session was closed, the token requires a new login.
    for _ in 0..3 {
        assert!(world.open("one").well());
    }
    world.clear("one");
    let after = world.open("one");
    for stale in [&first, &second] {
        assert_eq!(stale.sign(), Err(CKR_SESSION_HANDLE_INVALID));
        assert_eq!(failed(stale.session.get_session_info()), CKR_SESSION_HANDLE_INVALID);
    }
    assert!(after.well() && two.well());
    world.until_counted("one", "sessions", 1);
}

#[test]
fn a_login_gets_lost() {
    let (_alone, world, _) = worlds();
    let (one, two) = (world.open("one"), world.open("two"));
    world.set("one", &["stale=login"]);
    let rv = one.sign().unwrap_err();
    assert!([CKR_USER_NOT_LOGGED_IN, CKR_KEY_HANDLE_INVALID, CKR_OBJECT_HANDLE_INVALID].contains(&rv), "{rv:#x}");
    assert!(find(&one.session, ObjectClass::PRIVATE_KEY).is_none());
    assert!(two.well());
    // The file acts once: the session stays valid, and a new login works.
    world.login(&one.session).unwrap();
    assert!(find(&one.session, ObjectClass::PRIVATE_KEY).is_some());
    assert!(world.open("one").well());
}

#[test]
fn object_handles_become_invalid() {
    let (_alone, world, _) = worlds();
    let (mut one, two) = (world.open("one"), world.open("two"));
    let ciphertext = one.encrypt();
    for _ in 0..2 {
        world.set("one", &["stale=objects"]);
        assert_eq!(one.decrypt(&ciphertext), Err(CKR_KEY_HANDLE_INVALID));
        assert_eq!(one.sign(), Err(CKR_KEY_HANDLE_INVALID));
        let attributes = one.session.get_attributes(one.private, &[AttributeType::Modulus]);
        assert_eq!(failed(attributes), CKR_OBJECT_HANDLE_INVALID);
        let found = find(&one.session, ObjectClass::PRIVATE_KEY).unwrap();
        assert_ne!(found, one.private);
        let stale = std::mem::replace(&mut one.private, found);
        assert_eq!(one.decrypt(&ciphertext).unwrap(), TEXT);
        assert!(one.sign().is_ok() && two.well());
        world.clear("one");
        assert!(world.open("one").well());
        let stale = std::mem::replace(&mut one.private, stale);
        assert_eq!(one.sign(), Err(CKR_KEY_HANDLE_INVALID));
        one.private = stale;
    }
}

#[test]
fn sessions_are_limited() {
    let (_alone, world, _) = worlds();
    let (slot, other) = (world.slot("one").unwrap(), world.slot("two").unwrap());
    let most = |slot| format!("{:?}", world.pkcs11.get_token_info(slot).unwrap().max_session_count());
    let before = most(slot);
    world.set("one", &["max_sessions=2"]);
    let mut sessions: Vec<_> = (0..2).map(|_| world.pkcs11.open_ro_session(slot).unwrap()).collect();
    assert_eq!(failed(world.pkcs11.open_ro_session(slot)), CKR_SESSION_COUNT);
    assert_eq!(most(slot), before);
    let elsewhere: Vec<_> = (0..3).map(|_| world.pkcs11.open_ro_session(other).unwrap()).collect();
    drop(sessions.pop());
    sessions.push(world.pkcs11.open_ro_session(slot).unwrap());
    assert_eq!(failed(world.pkcs11.open_ro_session(slot)), CKR_SESSION_COUNT);
    world.set("one", &["advertise_sessions=7"]);
    assert_eq!(most(slot), "Max(7)");
    assert_eq!(most(other), before);
    sessions.push(world.pkcs11.open_ro_session(slot).unwrap());
    assert_eq!((sessions.len(), elsewhere.len()), (3, 3));
}

#[test]
fn a_token_is_away() {
    let (_alone, world, _) = worlds();
    let (one, two) = (world.open("one"), world.open("two"));
    let slot = world.slot("one").unwrap();
    world.set("one", &["absent"]);
    assert_eq!(world.slot("one"), None);
    assert!(world.slot("two").is_some() && two.well());
    assert!(world.pkcs11.get_all_slots().unwrap().contains(&slot));
    assert!(!world.pkcs11.get_slot_info(slot).unwrap().token_present());
    assert_eq!(failed(world.pkcs11.get_token_info(slot)), CKR_TOKEN_NOT_PRESENT);
    assert_eq!(failed(world.pkcs11.open_ro_session(slot)), CKR_TOKEN_NOT_PRESENT);
    assert_eq!(one.sign(), Err(CKR_DEVICE_REMOVED));
    world.set("one", &["absent rv=CKR_TOKEN_NOT_PRESENT"]);
    assert_eq!(one.sign(), Err(CKR_TOKEN_NOT_PRESENT));
    // The token's sessions work again, unless the file also makes them stale.
    world.clear("one");
    assert!(world.pkcs11.get_slot_info(slot).unwrap().token_present());
    assert!(one.well() && world.open("one").well());
    world.set("one", &["absent", "stale=sessions"]);
    assert_eq!(world.slot("one"), None);
    world.clear("one");
    assert_eq!(one.sign(), Err(CKR_SESSION_HANDLE_INVALID));
    assert!(world.open("one").well() && two.well());
}

#[test]
fn a_pin_is_refused_without_being_tried() {
    let (_alone, world, _) = worlds();
    let two = world.open("two");
    let session = world.pkcs11.open_ro_session(world.slot("one").unwrap()).unwrap();
    for (fault, rv) in [("incorrect", CKR_PIN_INCORRECT), ("locked", CKR_PIN_LOCKED), ("expired", CKR_PIN_EXPIRED)] {
        world.set("one", &[&format!("pin={fault}")]);
        assert_eq!(failed(world.login(&session)), rv);
        assert!(two.well());
    }
    world.set("one", &["pin=incorrect times=1"]);
    assert_eq!(failed(world.login(&session)), CKR_PIN_INCORRECT);
    world.login(&session).unwrap();
}

#[test]
fn more_calls_than_that_are_refused() {
    let (_alone, world, _) = worlds();
    let (one, two) = (world.open("one"), world.open("two"));
    let ciphertext = one.encrypt();
    world.set("one", &["throttle=1", "call=C_Decrypt hang times=1"]);
    std::thread::scope(|scope| {
        let hanging = aside(scope, world.open("one"), |busy| busy.decrypt(&ciphertext));
        world.until_counted("one", "hanging", 1);
        assert_eq!(one.sign(), Err(CKR_FUNCTION_FAILED));
        assert_eq!(failed(one.session.get_session_info()), CKR_FUNCTION_FAILED);
        assert!(two.well());
        world.set("one", &["throttle=1 rv=CKR_DEVICE_ERROR"]);
        assert_eq!(hanging.join().unwrap().1.unwrap(), TEXT);
    });
    assert!(one.well());
}

#[test]
fn a_module_dies_and_is_begun_anew() {
    let (_alone, world, other) = worlds();
    let (one, elsewhere) = (world.open("one"), other.open("one"));
    world.set("module", &["dead"]);
    assert_eq!(one.sign(), Err(CKR_DEVICE_REMOVED));
    assert_eq!(failed(world.pkcs11.get_all_slots()), CKR_DEVICE_REMOVED);
    world.clear("module");
    assert_eq!(one.sign(), Err(CKR_DEVICE_REMOVED));
    assert_eq!(failed(world.pkcs11.get_slots_with_token()), CKR_DEVICE_REMOVED);
    // The other instance is not affected.
    assert!(elsewhere.well());
    // While the file exists, the module comes up without slots and stays so.
    world.set("module", &["dead rv=CKR_DEVICE_ERROR"]);
    world.pkcs11.clone().finalize().unwrap();
    world.initialize().unwrap();
    assert!(world.pkcs11.get_all_slots().unwrap().is_empty());
    world.clear("module");
    assert!(world.pkcs11.get_slots_with_token().unwrap().is_empty());
    assert_eq!(failed(world.pkcs11.get_library_info()), CKR_DEVICE_ERROR);
    world.pkcs11.clone().finalize().unwrap();
    assert_eq!(failed(one.session.get_session_info()), CKR_CRYPTOKI_NOT_INITIALIZED);
    world.initialize().unwrap();
    assert_eq!(failed(one.session.get_session_info()), CKR_SESSION_HANDLE_INVALID);
    assert!(world.open("one").well() && elsewhere.well());
}

#[test]
fn a_module_has_no_slots_or_does_not_begin() {
    let (_alone, world, other) = worlds();
    world.set("module", &["no_slots"]);
    assert!(world.pkcs11.get_all_slots().unwrap().is_empty());
    assert!(world.pkcs11.get_slots_with_token().unwrap().is_empty());
    assert!(other.slot("one").is_some());
    world.set("module", &["initialize rv=CKR_DEVICE_ERROR times=2"]);
    assert!(world.slot("one").is_some());
    world.pkcs11.clone().finalize().unwrap();
    for _ in 0..2 {
        assert_eq!(failed(world.initialize()), CKR_DEVICE_ERROR);
        assert_eq!(failed(world.pkcs11.get_all_slots()), CKR_CRYPTOKI_NOT_INITIALIZED);
    }
    world.initialize().unwrap();
    assert!(world.open("one").well());
}

#[test]
fn copies_are_instances_of_their_own() {
    let (_alone, world, other) = worlds();
    let (here, there) = (world.open("one"), other.open("one"));
    world.set("one", &["call=* rv=CKR_DEVICE_ERROR"]);
    assert!(here.sign().is_err() && there.well());
    // The other copy's real module is not affected either: it continues to work.
    world.pkcs11.clone().finalize().unwrap();
    assert!(there.well());
    world.initialize().unwrap();
    assert!(there.well());
}

#[test]
fn many_threads_and_changing_faults() {
    let (_alone, world, _) = worlds();
    let stop = AtomicBool::new(false);
    let two = world.open("two");
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut well = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let Some(slot) = world.slot("one") else { continue };
                        let Ok(session) = world.pkcs11.open_ro_session(slot) else { continue };
                        let login = world.login(&session);
                        let open = Open::with(world, session);
                        well += u32::from(open.is_some_and(|open| open.sign().is_ok()));
                        drop(login);
                    }
                    well
                })
            })
            .collect();
        let other = aside(scope, two, |two| {
            let mut times = 0;
            while !stop.load(Ordering::Relaxed) {
                assert!(two.well());
                times += 1;
            }
            times
        });
        for round in 0..60 {
            let fault = ["stale=sessions", "stale=objects", "absent", "stale=login", "call=* hang", "max_sessions=2"];
            world.set("one", &[fault[round % fault.len()]]);
            std::thread::sleep(Duration::from_millis(8));
            world.clear("one");
            std::thread::sleep(Duration::from_millis(8));
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
        assert!(other.join().unwrap().1 > 0);
    });
    assert!(world.open("one").well());
    // Prints the cost of the faulty module, for information.
    let one = world.open("one");
    let begun = Instant::now();
    for _ in 0..10_000 {
        one.session.get_session_info().unwrap();
    }
    println!("{:?} a call without faults", begun.elapsed() / 10_000);
    world.set("one", &["call=C_Sign rv=1"]);
    let begun = Instant::now();
    for _ in 0..10_000 {
        one.session.get_session_info().unwrap();
    }
    println!("{:?} a call with a control file", begun.elapsed() / 10_000);
}

/// Each process has its own statistics; counts are on disk before the process may be killed.
#[test]
fn statistics_are_a_processs_own() {
    let (_alone, world, _) = worlds();
    let own = |file: &str| world.control().join(format!("{file}.{}.stats", std::process::id()));
    let read = |file: &str| std::fs::read_to_string(own(file)).unwrap();
    let strangers = world.control().join("one.1.stats");
    std::fs::write(&strangers, "{}").unwrap();
    // Both are on disk without delay: a login before it is made, and a fault when it happens.
    let logins = world.count("one", "C_Login");
    let session = world.pkcs11.open_ro_session(world.slot("one").unwrap()).unwrap();
    world.set("one", &["call=C_Login rv=CKR_DEVICE_ERROR"]);
    let faults = world.count("one", "rv");
    assert_eq!(failed(world.login(&session)), CKR_DEVICE_ERROR);
    assert_eq!((world.count("one", "C_Login"), world.count("one", "rv")), (logins + 1, faults + 1));
    assert!(read("module").contains("\"C_Initialize\": "));
    for text in [read("one"), read("module")] {
        for name in ["calls", "faults", "sessions", "hanging", "in_progress", "most_in_progress"] {
            assert!(text.contains(&format!("\"{name}\": ")), "{text}");
        }
    }
    assert_eq!(std::fs::read_to_string(&strangers).unwrap(), "{}");
    std::fs::remove_file(strangers).unwrap();
    assert!(!world.control().join("one.stats").exists());
}
