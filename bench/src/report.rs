//! The figures for people, ratios first.

use std::fmt::Write;

use crate::ceiling::Ceiling;
use crate::idle::Idle;
use crate::machine::Machine;
use crate::scaling::Scaling;
use crate::storm::{Phase, Storm};

/// The machine and the date in one line.
#[must_use]
pub fn machine(machine: &Machine) -> String {
    let Machine { processor, processors, memory_bytes, date, optimised } = machine;
    let warning = if *optimised { "" } else { "; NOT OPTIMISED: these figures say nothing" };
    format!("{processor}, {processors} processors, {} GiB, {date}{warning}", memory_bytes >> 30)
}

/// The comparison of the daemon with the raw token.
#[must_use]
pub fn ceiling(found: &Ceiling) -> String {
    let mut text = String::new();
    let mut line = |what: &str, value: String, meaning: &str| {
        let _ = writeln!(text, "{what:<22} {value:>14}   {meaning}");
    };
    let ms = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
    let spread = |figure: &crate::ceiling::Figure| format!("{:.2} to {:.2} in the rounds", figure.least, figure.most);
    line(
        "efficiency",
        format!("{:.3}", found.efficiency),
        "processor time in PKCS#11 calls ÷ that of daemon and workers",
    );
    line(
        "own cost",
        format!("{:.1}", found.own_cost_in_public_ops),
        &format!(
            "RSA-2048 public operations, of {:.1} µs each, for the rest; {}",
            found.public_op_us,
            spread(&found.own_cost_in_public_ops_spread)
        ),
    );
    line(
        "HSM operations",
        format!("{:.3}", found.hsm_operations_per_release),
        "decryptions and signatures for a release",
    );
    line("ratio", format!("{:.3}", found.ratio), &format!("releases ÷ raw pairs; {}", spread(&found.ratio_spread)));
    let light = &found.light;
    line(
        "light load",
        format!("{:.2}", light.ratio.median),
        &format!(
            "median release {} ÷ raw decrypt {} + sign {}",
            ms(light.release_seconds),
            ms(light.decrypt_seconds),
            ms(light.sign_seconds)
        ),
    );
    line("raw pairs", format!("{:.0} /s", found.raw_pairs_per_second), "of a decryption and a signature");
    line("releases", format!("{:.0} /s", found.releases_per_second), "with the callers on the same processors");
    line("raw pair", ms(found.raw_pair_seconds.p50), &format!("p99 {}, saturated", ms(found.raw_pair_seconds.p99)));
    line("release", ms(found.release_seconds.p50), &format!("p99 {}, saturated", ms(found.release_seconds.p99)));
    line("own cost", format!("{:.0} µs", found.own_cost_us), "processor time outside PKCS#11 calls, for a release");
    line("  of the daemon", format!("{:.0} µs", found.daemon_cost_us), "");
    line("  of the workers", format!("{:.0} µs", found.worker_cost_us), "");
    line("in PKCS#11 calls", format!("{:.0} µs", found.pkcs11_cost_us), "processor time of the workers, for a release");
    line("memory", format!("{:.0} MiB", found.resident_bytes / 1048576.0), "resident, of daemon and workers");
    let _ = writeln!(
        text,
        "{} HSMs of {} sessions, RSA-{}, {} callers, stock of {} MiB, {} rounds of {} s; {} replies opened and right\n{}",
        found.hsms,
        found.sessions,
        found.rsa,
        found.callers,
        found.stock_mib,
        found.rounds,
        found.seconds,
        found.checked,
        machine(&found.machine)
    );
    text
}

/// The throughput by number of members.
#[must_use]
pub fn scaling(found: &Scaling) -> String {
    let mut text = format!("{:>5} {:>12} {:>12} {:>18}\n", "HSMs", "of linear", "releases/s", "daemon processors");
    for step in &found.steps {
        let full = if step.daemon_processors >= 1.0 { "  a core is full" } else { "" };
        let (hsms, linear) = (step.hsms, step.of_linear);
        let (rate, cpu) = (step.releases_per_second, step.daemon_processors);
        let _ = writeln!(text, "{hsms:>5} {linear:>12.2} {rate:>12.0} {cpu:>18.2}{full}");
    }
    let _ = writeln!(
        text,
        "{} sessions each, every operation {:.0} ms longer than the soft token takes\n{}",
        found.sessions,
        found.rtt_seconds * 1e3,
        machine(&found.machine)
    );
    text
}

/// The cost of idle connections.
#[must_use]
pub fn idle(found: &Idle) -> String {
    let mib = |octets: f64| octets / 1048576.0;
    let each = found.resident_bytes_of.iter().map(|(speaks, bytes)| format!("{speaks}: {:.0} MiB", mib(*bytes)));
    format!(
        "p99 beside {} idle connections ÷ without: {:.2} ({:.2} to {:.2} in the rounds; {:.2} ms, {:.2} ms)\n\
         memory of the daemon: {:.0} MiB, {:.0} MiB without; of a fresh one with as many of {}\n{}\n",
        found.connections,
        found.p99_ratio.median,
        found.p99_ratio.least,
        found.p99_ratio.most,
        found.p99_seconds * 1e3,
        found.p99_seconds_without * 1e3,
        mib(found.resident_bytes),
        mib(found.resident_bytes_without),
        each.collect::<Vec<_>>().join(", "),
        machine(&found.machine)
    )
}

/// A storm.
#[must_use]
pub fn storm(found: &Storm) -> String {
    let mut text = String::new();
    if let Some(full) = &found.full {
        phase(&mut text, "stock full", full);
    }
    phase(&mut text, "no stock", &found.empty);
    let _ = writeln!(
        text,
        "bound {:.2} s: a decryption and a signature for each machine by the raw tokens, {:.0} pairs/s\n\
         {} machines of {} owners, by {} hosts, within {} s; {} rounds; {} HSMs of {} sessions{}\n{}",
        found.bound_seconds.median,
        found.raw_pairs_per_second.median,
        found.machines,
        found.owners,
        found.hosts,
        found.within_seconds,
        found.rounds,
        found.hsms,
        found.sessions,
        if found.has_stock { "" } else { "; this daemon keeps no stock" },
        machine(&found.machine)
    );
    text
}

fn phase(text: &mut String, name: &str, found: &Phase) {
    let of_bound = &found.of_bound;
    let _ = writeln!(
        text,
        "{name:<10}  time to the last machine ÷ bound {:.2} ({:.2} to {:.2} in the rounds; {:.2} s)\n\
         {:<10}  {:.3} HSM operations a release; p50 {:.2} s, p99 {:.2} s; {} times told to come later, {} lost; {} replies \
         opened and right",
        of_bound.median,
        of_bound.least,
        of_bound.most,
        found.to_last_seconds.median,
        "",
        found.hsm_operations_per_release.median,
        found.wait_seconds.p50,
        found.wait_seconds.p99,
        found.refused,
        found.lost,
        found.checked
    );
    for (code, count) in &found.errors {
        let _ = writeln!(text, "{:<10}  lost: {count} {code}", "");
    }
    for (series, values) in &found.stock {
        let _ = writeln!(text, "{:<10}  {series}: {} before, {} after", "", values.before, values.after);
    }
    for why in &found.invalid {
        let _ = writeln!(text, "{:<10}  SAYS NOTHING: {why}", "");
    }
}
