//! Tests of the whole system: real daemons, real tokens, real clients. They are one program, because linking a program for
//! each of these files would take longer than running most of them. `cargo test --workspace --test system NAME::` runs one file.

#![allow(clippy::unwrap_used)]

mod admin;
mod agent;
mod attackers;
mod audit;
mod client_names;
mod clients;
mod commands;
mod demo;
mod demo_vm;
mod doctor;
mod faults;
mod faulty;
mod host;
mod http;
mod imports;
mod init;
mod interop;
mod keys;
mod libvirt;
mod life;
mod linux_page;
mod loadgen;
mod manners;
mod nodes;
mod oracle;
mod overload;
mod packaging;
mod pages;
mod rations;
mod ready;
mod reload;
mod remote;
mod service;
mod signer;
mod signers;
mod snapshots;
mod spy;
mod standstill;
mod stock;
mod stop;
mod storm;
mod surroundings;
mod tenant;
mod tools;
mod tpm;
mod trail;
mod vm;
mod watched;
mod withdrawn;
