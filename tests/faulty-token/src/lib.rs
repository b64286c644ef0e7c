//! A PKCS#11 module that wraps a real module and misbehaves on command.
//!
//! [`MODULE_VARIABLE`] names the real module and [`CONTROL_VARIABLE`] a directory of control files. Both are read when the
//! functions are first requested, or at the first `C_Initialize`, and stay in force. Every process that loads this library
//! has its own instance. Within one process, copies of the library under other file names are separate instances, each with
//! its own real module.
//!
//! # Control files
//!
//! The file `LABEL` controls the token with that label. The file `module` controls every call, including calls that belong
//! to no token. The files are checked in every call (and 20 times per second), so write a new file elsewhere and rename it.
//! Without a file there are no faults. Every new file restarts the counting, even with the same text; each process counts
//! for itself.
//!
//! Each line is a fault, made of words `key=value` or `key`; `#` starts a comment:
//!
//! ```text
//! call=C_Decrypt rv=0x30                  the call fails with this code (number, or one of the usual names)
//! call=C_Decrypt,C_Sign rv=0x30 every=20  the 20th, 40th … of these calls
//! call=* rv=CKR_DEVICE_ERROR times=3      the next 3 calls
//! call=* delay_ms=200                     sleeps first
//! call=C_Decrypt hang                     waits until the file is changed or removed; then continues
//! call=C_Decrypt deed=abort               harms the process, see below
//! call=C_Sign corrupt                     one bit of the result is wrong: C_Decrypt, C_Sign and similar calls
//! throttle=8 rv=CKR_FUNCTION_FAILED       when more than 8 calls are in progress at once; this is the default code
//! ```
//!
//! `*` means every call except `C_Initialize` and `C_Finalize`. In one line, `delay_ms`, `hang`, `deed`, `corrupt` and `rv`
//! can be combined and act in this order; `every` and `times` select the calls. A call that ends an operation of its
//! session also ends it when it is made to fail. The deeds are:
//!
//! ```text
//! abort, exit, segv                       abort(); exit(0); raise(SIGSEGV)
//! heap                                    writes over the allocator's data, and frees: the allocator aborts
//! deadlock                                waits for a mutex that it holds, for ever
//! close                                   closes descriptor 3, and goes on
//! reconnect                               descriptor 3 is another socket, whose other end is open; goes on
//! handlers                                SIGTERM, SIGINT, SIGCHLD are ignored, the handler of SIGSEGV does nothing; goes on
//! print                                   a gigabyte to both outputs, and goes on
//! leak                                    a gigabyte of memory, written to; goes on
//! ```
//!
//! A deed is done only once, even across processes: first the whole control file is renamed to `LABEL.done`. For tokens
//! only:
//!
//! ```text
//! pin=incorrect                           C_Login fails without a call of the real token; also locked, expired
//! absent rv=CKR_DEVICE_REMOVED            not among the tokens that are present; its calls fail
//! max_sessions=2                          C_OpenSession beyond that: CKR_SESSION_COUNT
//! advertise_sessions=2                    the number in C_GetTokenInfo, whatever the real limit is
//! pin_tries=final                         C_GetTokenInfo reports that the next wrong PIN locks the token; also low, locked
//! stale=sessions                          the sessions that are open now become invalid for ever
//! stale=one-session                       the session that was opened last becomes invalid
//! stale=login                             the user is logged out now
//! stale=objects                           object handles given out until now are invalid; new searches give good ones
//! ```
//!
//! `stale` acts once, when the file appears. In `module` only:
//!
//! ```text
//! no_slots                                C_GetSlotList returns no slots
//! initialize rv=0x30                      C_Initialize fails; or hangs, or does a deed
//! dead rv=CKR_DEVICE_REMOVED              every call fails from now on, even without the file, until C_Finalize and
//!                                         C_Initialize; while the file exists, the module then has no slots
//! ```
//!
//! # Statistics
//!
//! Every process writes its own `LABEL.PID.stats` and `module.PID.stats` in the same directory; they remain after it ends.
//! The files are rewritten within 50 ms of a change. They are written at once where the process may be killed soon: with
//! every fault except a delay, before calls that begin something (`C_Initialize`, `C_GetSlotList`, `C_GetTokenInfo`,
//! `C_OpenSession`, `C_Login`), and when a call stops hanging. They are JSON with the `calls` and the `faults` by name, the
//! open `sessions`, the calls `in_progress`, the `most_in_progress` so far, and the calls that are `hanging`.

mod deeds;
mod exports;
mod faults;
mod module;
mod scope;
mod session;
mod slots;

pub use faults::check;

/// Environment variable with the path of the real module.
pub const MODULE_VARIABLE: &str = "CLAVIGER_FAULTY_MODULE";
/// Environment variable with the directory of the control files.
pub const CONTROL_VARIABLE: &str = "CLAVIGER_FAULTY_CONTROL";
/// Name of the control file for the module as a whole.
pub const MODULE_FILE: &str = "module";
