//! A guarded host, or ten thousand of them: how many keys a service releases, how fast, and what it would take.
//!
//! A client of the protocol and nothing more: it links the wire protocol and, for [`plan`], the pure policies of the HSM
//! cluster, but nothing of the daemon. `docs/load.md` says how to use it and how it counts.
//!
//! | what | module |
//! |---|---|
//! | when requests start | [`profile`] |
//! | hosts and virtual machines, made before the clock starts | [`site`], [`prepare`], [`cache`] |
//! | sending, and stopping before the time | [`http`], [`host`], [`run`], [`interrupt`] |
//! | a storm of attestations | [`attest`] |
//! | counting, and checking what came | [`record`], [`tally`], [`cpu`], [`verify`] |
//! | telling | [`about`], [`report`], [`threshold`], [`bound`], [`html`], [`compare`] |
//! | what it would take | [`capacity`], [`usl`], [`scrape`], [`plan`], [`simulation`] |
#![forbid(unsafe_code)]

pub mod about;
pub mod attest;
pub mod bound;
pub mod cache;
pub mod capacity;
pub mod compare;
pub mod cpu;
pub mod host;
pub mod html;
pub mod http;
pub mod interrupt;
pub mod plan;
pub mod prepare;
pub mod print;
pub mod profile;
pub mod progress;
pub mod record;
pub mod report;
pub mod run;
pub mod scrape;
pub mod simulation;
pub mod site;
pub mod tally;
pub mod threshold;
pub mod units;
pub mod usl;
pub mod verify;

/// Why a command could not do what it was told; the text says what to do next.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
