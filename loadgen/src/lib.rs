//! Measures a key-release service with simulated guarded hosts: how many keys the service releases, how fast, and what
//! hardware a rate needs.
//!
//! This crate is only a client of the protocol. It uses the wire protocol, the HTTP client, and for [`plan`] the
//! policies of the HSM cluster, but nothing of the daemon. `docs/load.md` describes how to use it and how it counts.
//!
//! | topic | module |
//! |---|---|
//! | when requests start | [`profile`] |
//! | hosts and virtual machines, made before the clock starts | [`site`], [`prepare`], [`cache`] |
//! | sending requests, and ending a run early | [`http`], [`host`], [`run`], [`interrupt`] |
//! | a storm of attestations | [`attest`] |
//! | counting and checking replies | [`record`], [`tally`], [`cpu`], [`verify`] |
//! | reports | [`about`], [`report`], [`threshold`], [`bound`], [`html`], [`compare`] |
//! | capacity: measured and planned | [`capacity`], [`usl`], [`scrape`], [`plan`], [`simulation`] |
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

/// The error of a command. Its text says what to do next.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
