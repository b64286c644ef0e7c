//! A PKCS#11 module that stands in front of a real one and misbehaves on command.
//!
//! [`MODULE_VARIABLE`] names the real module and [`CONTROL_VARIABLE`] a folder of control files. Both are read when the
//! functions are first asked for, or at the first `C_Initialize`, and hold from then on. Every process that loads this library
//! has an instance of its own; in one process, copies of it under other file names are, each with its own real module.
//!
//! # Control files
//!
//! `LABEL` in the folder is about the token of that label; `module` is about every call, and the calls that belong to no
//! token. A file is looked at in every call (and 20 times a second), so it is to be written elsewhere and renamed. No
//! file, no faults. Counting begins anew with every new file, even with the same text, and in every process.
//!
//! A line is a fault, of words `key=value` or `key`; `#` begins a comment:
//!
//! ```text
//! call=C_Decrypt rv=0x30                  the call fails with this code (number, or one of the usual names)
//! call=C_Decrypt,C_Sign rv=0x30 every=20  the 20th, 40th … of these calls
//! call=* rv=CKR_DEVICE_ERROR times=3      the next 3 calls
//! call=* delay_ms=200                     sleeps first
//! call=C_Decrypt hang                     waits till the file is changed or removed; then does what it was to do
//! call=C_Decrypt deed=abort               the process comes to harm, see below
//! call=C_Sign corrupt                     one bit of the result is wrong: C_Decrypt, C_Sign and the others of their shape
//! throttle=8 rv=CKR_FUNCTION_FAILED       when more calls than 8 are in progress at once; the code is this one by itself
//! ```
//!
//! `*` is every call but `C_Initialize` and `C_Finalize`. In a line, `delay_ms`, `hang`, `deed`, `corrupt` and `rv` go
//! together, in this order; `every` and `times` choose the calls. A call that would end an operation of its session does so,
//! too, when it is made to fail. Deeds are:
//!
//! ```text
//! abort, exit, segv                       abort(); exit(0); raise(SIGSEGV)
//! heap                                    writes over the allocator's data, and frees: the allocator aborts
//! deadlock                                waits for a mutex that it holds, for ever
//! close                                   closes descriptor 3, and goes on
//! reconnect                               descriptor 3 is another socket, whose other end is open; goes on
//! handlers                                SIGTERM, SIGINT, SIGCHLD are ignored, SIGSEGV is handled by doing nothing; goes on
//! print                                   a gigabyte to both outputs, and goes on
//! leak                                    a gigabyte of memory, written to; goes on
//! ```
//!
//! A deed is done once, whatever process comes after: the control file, with all that it says, is renamed to `LABEL.done`
//! before. For a token only:
//!
//! ```text
//! pin=incorrect                           C_Login fails, the real token does not hear of it; also locked, expired
//! absent rv=CKR_DEVICE_REMOVED            not among the tokens that are present; its calls fail
//! max_sessions=2                          C_OpenSession beyond that: CKR_SESSION_COUNT
//! advertise_sessions=2                    what C_GetTokenInfo says, whatever holds
//! pin_tries=final                         C_GetTokenInfo says that one wrong PIN more locks the token; also low, locked
//! stale=sessions                          the sessions open now are invalid, for ever
//! stale=one-session                       the one opened last is
//! stale=login                             the user is logged out, now
//! stale=objects                           object handles given out until now are invalid; new searches give good ones
//! ```
//!
//! `stale` happens once, when the file appears. In `module` only:
//!
//! ```text
//! no_slots                                C_GetSlotList gives nothing
//! initialize rv=0x30                      C_Initialize fails; or hangs, or does a deed
//! dead rv=CKR_DEVICE_REMOVED              every call fails from now on, also without the file, until C_Finalize and
//!                                         C_Initialize; while the file is there, that comes up with no slots
//! ```
//!
//! # What it counted
//!
//! Every process writes its own `LABEL.PID.stats` and `module.PID.stats` in the same folder, and they stay when it has ended.
//! They are rewritten within 50 ms of a change, and at once where the process may be killed before that: with every fault but
//! a delay, before calls that begin something (`C_Initialize`, `C_GetSlotList`, `C_GetTokenInfo`, `C_OpenSession`, `C_Login`),
//! and when a call ends to hang. JSON with the `calls` and the `faults` by name, the `sessions` open, the calls
//! `in_progress`, the `most_in_progress` so far, and those `hanging`.

mod deeds;
mod exports;
mod faults;
mod module;
mod scope;
mod session;
mod slots;

pub use faults::check;

/// Names the real module.
pub const MODULE_VARIABLE: &str = "CLAVIGER_FAULTY_MODULE";
/// Names the folder of the control files.
pub const CONTROL_VARIABLE: &str = "CLAVIGER_FAULTY_CONTROL";
/// The control file that is about no single token.
pub const MODULE_FILE: &str = "module";
