//! Soak test with all faults of tokens and workers: open-loop load on a daemon with three members, and a new fault every
//! few seconds. At least one member is always healthy, so no answer may be wrong and none may be lost. The daemon must not
//! grow.
//!
//! Run it with `cargo run -p claviger-tests --bin soak -- --minutes 30`. It ends with status 1 if a condition was violated.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use claviger_tests::openloop::{Report, Traffic};
use claviger_tests::{Administrator, Daemon, FaultyMembers, Lab, Metrics, Options};
use rustix::process::{Signal, kill_process};

const MEMBERS: [&str; 3] = ["hsm-a", "hsm-b", "hsm-c"];
const DEADLINE: Duration = Duration::from_secs(20);
/// Load as a share of the capacity measured at the start.
const SHARE: f64 = 0.35;
/// A member counts as healthy when it has served for this time after its fault ended.
const CALM: Duration = Duration::from_secs(2);
/// Range of seconds between two faults, and of the duration of a fault.
const PAUSE: (f64, f64) = (2.0, 6.0);
const LASTS: (f64, f64) = (0.5, 8.0);
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Maximum ratio of the last quarter's mean to the first's. Pages kept by the allocator and restarts of workers cause some
/// variation.
const SLACK: f64 = 1.25;
/// Maximum growth in threads and in open files.
const FEW: f64 = 4.0;

const TOKEN_FAULTS: [&[&str]; 34] = [
    &["call=* rv=CKR_DEVICE_ERROR"],
    &["call=* rv=CKR_DEVICE_REMOVED"],
    &["call=* rv=CKR_GENERAL_ERROR"],
    &["call=* rv=CKR_FUNCTION_FAILED"],
    &["call=C_Decrypt,C_Sign rv=CKR_DEVICE_ERROR every=5"],
    &["call=C_Decrypt rv=CKR_GENERAL_ERROR"],
    &["call=C_Decrypt rv=CKR_GENERAL_ERROR every=3"],
    &["call=C_Sign rv=CKR_OPERATION_ACTIVE"],
    &["call=C_OpenSession rv=CKR_SESSION_COUNT", "stale=sessions"],
    &["call=C_Login rv=CKR_DEVICE_ERROR", "stale=login"],
    &["absent"],
    &["absent rv=CKR_DEVICE_REMOVED"],
    &["call=* hang"],
    &["call=C_Decrypt,C_Sign hang"],
    &["call=C_OpenSession,C_Login hang", "stale=sessions"],
    &["call=* delay_ms=20"],
    &["call=C_Decrypt,C_Sign delay_ms=300 every=20"],
    &["call=C_Decrypt corrupt"],
    &["call=C_Decrypt corrupt every=7"],
    &["call=C_Sign corrupt"],
    &["stale=sessions"],
    &["stale=login", "stale=objects"],
    &["max_sessions=2", "stale=sessions"],
    &["throttle=2 rv=CKR_FUNCTION_FAILED", "call=C_Decrypt,C_Sign delay_ms=40"],
    // The effects of a leak stay until its worker ends, and leaks add up: they have a separate test.
    &["call=C_Decrypt deed=abort"],
    &["call=C_Sign deed=exit"],
    &["call=C_Decrypt deed=segv"],
    &["call=C_Sign deed=heap"],
    &["call=C_Decrypt deed=handlers"],
    &["call=C_Sign deed=close"],
    &["call=C_Decrypt deed=print"],
    &["call=C_Decrypt deed=deadlock"],
    &["call=C_Login deed=deadlock", "stale=login"],
    &["call=C_OpenSession deed=abort", "stale=sessions"],
];

const MODULE_FAULTS: [&[&str]; 2] = [&["dead"], &["call=* rv=CKR_CRYPTOKI_NOT_INITIALIZED"]];

/// A fault of a member.
#[derive(Clone, Copy)]
enum Fault {
    Token(&'static [&'static str]),
    Module(&'static [&'static str]),
    /// The worker is killed from outside.
    Killed,
}

impl Fault {
    const NUMBER: usize = TOKEN_FAULTS.len() + MODULE_FAULTS.len() + 1;

    /// Returns fault `number`, below [`NUMBER`](Self::NUMBER).
    fn of(number: usize) -> Self {
        let of_module = || MODULE_FAULTS.get(number - TOKEN_FAULTS.len()).map(|lines| Fault::Module(lines));
        TOKEN_FAULTS.get(number).map(|lines| Fault::Token(lines)).or_else(of_module).unwrap_or(Fault::Killed)
    }

    fn text(self) -> String {
        match self {
            Fault::Token(lines) | Fault::Module(lines) => lines.join("; "),
            Fault::Killed => "its worker is killed".to_owned(),
        }
    }
}

/// State of a member in this test.
#[derive(Clone, Copy)]
enum Is {
    /// The member has no fault and has served for a while.
    Well,
    /// The member has a fault until this time.
    Ill(Instant),
    /// The fault has ended. `served`: operations until then. `since`: time from which the member serves again, if it does.
    Recovering { served: u64, since: Option<Instant> },
}

/// One sample of the daemon's state.
struct Look {
    resident_mib: f64,
    threads: f64,
    files: f64,
}

struct Soak {
    lab: Lab,
    daemon: Daemon,
    faulty: FaultyMembers,
    rng: u64,
    members: [Is; 3],
    faults: u64,
}

impl Soak {
    /// Returns the next number of SplitMix64.
    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.rng ^ (self.rng >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.random() % n as u64) as usize
    }

    fn between(&mut self, (from, to): (f64, f64)) -> Duration {
        let unit = (self.random() >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(from + (to - from) * unit)
    }

    fn well(&self) -> usize {
        self.members.iter().filter(|is| matches!(is, Is::Well)).count()
    }

    /// Starts a fault of a member, if another one stays healthy.
    fn break_one(&mut self, begun: Instant) {
        let at = self.below(MEMBERS.len());
        if self.well() < 2 || !matches!(self.members[at], Is::Well) {
            return;
        }
        let fault = Fault::of(self.below(Fault::NUMBER));
        match fault {
            Fault::Token(lines) => self.faulty.set(MEMBERS[at], lines),
            Fault::Module(lines) => self.faulty.set_module(MEMBERS[at], lines),
            Fault::Killed => {
                if let Some(worker) = Administrator(&self.lab).worker(MEMBERS[at]) {
                    let _ = kill_process(worker, Signal::KILL);
                }
            }
        }
        let lasts = self.between(LASTS);
        println!("{:7.1} s  {}: {} for {lasts:.1?}", begun.elapsed().as_secs_f64(), MEMBERS[at], fault.text());
        self.members[at] = Is::Ill(Instant::now() + lasts);
        self.faults += 1;
    }

    /// Ends faults whose time is over, and marks members that have recovered.
    async fn look_after(&mut self) {
        let now = Instant::now();
        let metrics = self.daemon.metrics().await;
        for (at, member) in MEMBERS.iter().enumerate() {
            self.members[at] = match self.members[at] {
                Is::Ill(until) if now >= until => {
                    self.faulty.clear(member);
                    self.faulty.clear_module(member);
                    Is::Recovering { served: served(&metrics, member), since: None }
                }
                Is::Recovering { served: before, since: None } if served(&metrics, member) >= before + 5 => {
                    Is::Recovering { served: before, since: Some(now) }
                }
                Is::Recovering { since: Some(since), .. } if now >= since + CALM => Is::Well,
                as_it_was => as_it_was,
            };
        }
    }

    async fn look(&self) -> Look {
        let process = &self.daemon.process;
        Look {
            resident_mib: process.status("VmRSS") as f64 / 1024.0,
            threads: process.status("Threads") as f64,
            files: self.daemon.metrics().await.sum("process_open_fds", &[]).unwrap_or_default(),
        }
    }
}

fn served(metrics: &Metrics, member: &str) -> u64 {
    let of = |op| metrics.count("claviger_hsm_calls_total", &[("hsm", member), ("op", op), ("rv", "ok")]);
    of("decrypt") + of("sign")
}

/// Returns the means of the first and the last quarter.
fn quarters(looks: &[Look], value: impl Fn(&Look) -> f64) -> (f64, f64) {
    let quarter = (looks.len() / 4).max(1).min(looks.len());
    let mean = |looks: &[Look]| looks.iter().map(&value).sum::<f64>() / looks.len() as f64;
    (mean(&looks[..quarter]), mean(&looks[looks.len() - quarter..]))
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (minutes, seed) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => (30.0, None),
        ["--minutes", minutes] => (minutes.parse().unwrap(), None),
        ["--minutes", minutes, "--seed", seed] => (minutes.parse().unwrap(), Some(seed.parse().unwrap())),
        _ => {
            println!("soak [--minutes N [--seed N]]");
            return ExitCode::FAILURE;
        }
    };
    let time = Duration::from_secs_f64(60.0 * minutes);
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));

    let lab = Lab::make(Options { hsms: MEMBERS.len(), vms: 8, ..Options::default() });
    let faulty = lab.behind_faulty();
    lab.configure(|config| {
        config.release.deadline_ms = DEADLINE.as_millis() as u64;
        config.hsm.iter_mut().for_each(|hsm| hsm.sessions = 4);
    });
    let daemon = lab.serve();
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let traffic = Traffic::of_vms(&lab, &health);
    let trial = traffic.burst(&daemon, Duration::from_secs(3), 4, DEADLINE).await;
    trial.assert_all_right();
    let rate = (trial.right() as f64 / 3.0 * SHARE).max(5.0);
    println!("{:.0} releases a second carried, {rate:.0} a second asked for, seed {seed}", trial.right() as f64 / 3.0);

    let begun = Instant::now();
    let load = traffic.start(&daemon, rate, DEADLINE);
    let mut soak = Soak { lab, daemon, faulty, rng: seed, members: [Is::Well; 3], faults: 0 };
    let (mut looks, mut totals) = (Vec::new(), Totals::default());
    let mut next_line = begun + LINE_EVERY;
    let mut next_fault = begun + soak.between(PAUSE);
    let mut quiet = Instant::now();
    while begun.elapsed() < time {
        tokio::time::sleep(Duration::from_millis(200)).await;
        soak.look_after().await;
        if Instant::now() >= next_fault {
            soak.break_one(begun);
            next_fault = Instant::now() + soak.between(PAUSE);
        }
        if soak.well() == MEMBERS.len() {
            quiet = Instant::now();
        }
        if quiet.elapsed() > Duration::from_secs(300) && soak.well() == 1 {
            println!("two members have not been well for five minutes");
            totals.stuck = true;
            break;
        }
        if Instant::now() >= next_line {
            next_line += LINE_EVERY;
            let (report, look) = (load.take(), soak.look().await);
            totals.add(&report);
            println!(
                "{:7.1} s  {}; {:.1} MiB, {} threads, {} files, {} of {} well",
                begun.elapsed().as_secs_f64(),
                report.line(),
                look.resident_mib,
                look.threads,
                look.files,
                soak.well(),
                MEMBERS.len()
            );
            looks.push(look);
        }
    }
    soak.faulty.clear_all();
    totals.add(&load.stop().await);
    looks.push(soak.look().await);
    let faults = soak.faults;
    let (memory, threads) = (quarters(&looks, |look| look.resident_mib), quarters(&looks, |look| look.threads));
    let files = quarters(&looks, |look| look.files);
    let said = soak.daemon.process.output();
    let stopped = soak.daemon.stop().success();
    println!("{faults} faults in {:.1} minutes, seed {seed}", begun.elapsed().as_secs_f64() / 60.0);
    println!("{} right, {} lost, {} wrong, longest gap {:.0?}", totals.right, totals.lost, totals.wrong, totals.gap);
    println!(
        "first quarter: {:.1} MiB, {:.1} threads, {:.1} files; last: {:.1} MiB, {:.1} threads, {:.1} files",
        memory.0, threads.0, files.0, memory.1, threads.1, files.1
    );
    let grows = |(first, last): (f64, f64), few: f64| last > first * SLACK + few;
    let flat = !grows(memory, 0.0) && !grows(threads, FEW) && !grows(files, FEW);
    let good = totals.wrong == 0 && totals.lost == 0 && totals.right > 0 && flat && stopped && !totals.stuck;
    println!("{}", if good { "all is well" } else { "NOT WELL" });
    if !good {
        println!("flat: {flat}, stopped in good order: {stopped}; the daemon said last:");
        let lines: Vec<_> = said.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(40)).for_each(|line| println!("  {line}"));
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(Default)]
struct Totals {
    right: usize,
    lost: usize,
    wrong: usize,
    gap: Duration,
    /// True if members do not recover.
    stuck: bool,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.right += report.right();
        self.lost += report.lost().len();
        self.wrong += report.wrong().len();
        self.gap = self.gap.max(report.gap());
        for sample in &report.samples {
            if !matches!(sample.answer, claviger_tests::openloop::Answer::Right) {
                println!("           after {:.0?}: {:?}", sample.took(), sample.answer);
            }
        }
    }
}
