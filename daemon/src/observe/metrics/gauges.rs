//! The readings: values that are taken when Prometheus requests the metrics.

use std::fmt::{Display, Write};
use std::time::Duration;

use claviger_hsm::{MemberState, MemberStatus};

use super::table::{
    AUDIT_LINE, AUDIT_RESERVE_MISSING, AUDIT_UNSIGNED, AUDIT_UNSIGNED_FOR, AUDIT_WAITING, AUDIT_WRITING, BODY_MEMORY,
    BODY_MEMORY_LIMIT, BUILD_INFO, CERTIFICATE_EXPIRY, CLOCK, CONNECTIONS_LIMIT, CONNECTIONS_OPEN, ETCD_CONNECTED,
    HOSTS_REGISTERED, HSM_CPU, HSM_IN_FLIGHT, HSM_PRIORITY, HSM_RETRY_BUDGET, HSM_SESSIONS_BUSY, HSM_SESSIONS_LIMIT,
    HSM_SESSIONS_OPEN, HSM_SESSIONS_STUCK, HSM_SESSIONS_WANTED, HSM_STATE, HSM_WAITING, HSM_WORKER_CPU,
    HSM_WORKER_MEMORY, Kind, Metric, PROCESS_CPU, PROCESS_FILES, PROCESS_MAX_FILES, PROCESS_MEMORY, PROCESS_START,
    PROCESS_THREADS, QUEUE_LIMIT, QUEUE_WAITING, RELEASES_RUNNING, RELEASES_RUNNING_LIMIT, STATE_AGE, STATE_AGE_LIMIT,
    STATE_REVISION, STATE_STALE, STOCK_DEPTH,
};
use crate::sys::clock::since_1970;
use crate::sys::process::Usage;

/// The content type of the page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The number of releases, or its limit.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Load {
    /// Running releases.
    pub running: usize,
    /// Releases that wait for their turn.
    pub waiting: usize,
}

/// How current a state in etcd is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedState {
    /// Whether etcd confirms it now.
    pub confirmed: bool,
    /// Time since the last confirmation.
    pub age: Duration,
    /// The age beyond which nothing is released.
    pub limit: Duration,
    /// etcd's revision of it.
    pub revision: i64,
    /// Why it is not confirmed, if known.
    pub why: Option<String>,
}

/// The current values.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// The members.
    pub members: Vec<MemberStatus>,
    /// Remaining retries in the budget.
    pub retry_budget: f64,
    /// Current number of releases.
    pub load: Load,
    /// Limits of this number.
    pub limits: Load,
    /// Number of egress protectors in stock.
    pub stock_depth: usize,
    /// Kind, short thumbprint and expiry (seconds since 1970) of every certificate.
    pub certificates: Vec<(&'static str, String, i64)>,
    /// Number of registered and enabled hosts.
    pub hosts: usize,
    /// Whether the state file cannot be read.
    pub state_stale: bool,
    /// The state in etcd; `None`: the state is on this machine.
    pub shared: Option<SharedState>,
    /// Number of audit records that wait for the disk.
    pub audit_waiting: usize,
    /// Duration of the current audit write.
    pub audit_writing: Duration,
    /// Position of the audit trail.
    pub audit: crate::observe::audit::head::Head,
    /// Number of open connections to the service.
    pub connections_open: usize,
    /// Limit of connections to the service.
    pub connections_limit: usize,
    /// Used and total memory for request bodies, in bytes.
    pub body_memory: (u64, u64),
    /// Whether both primary certificates exist: encryption and signing.
    pub primaries: bool,
    /// Resource usage of the process.
    pub usage: Usage,
}

impl Readings {
    /// Appends the readings to a page.
    pub(super) fn write(&self, page: &mut String) {
        let members =
            |value: fn(&MemberStatus) -> f64| self.members.iter().map(move |m| ([("hsm", &*m.name)], value(m)));
        write(
            page,
            &HSM_STATE,
            self.members.iter().flat_map(|member| {
                let labels = |state: MemberState| [("hsm", &*member.name), ("state", state.name())];
                MemberState::ALL.into_iter().map(move |state| (labels(state), f64::from(member.state == state)))
            }),
        );
        write(page, &HSM_PRIORITY, members(|m| f64::from(m.priority)));
        write(page, &HSM_IN_FLIGHT, members(|m| m.in_flight as f64));
        write(page, &HSM_WAITING, members(|m| m.waiting as f64));
        write(page, &HSM_SESSIONS_OPEN, members(|m| m.sessions_open as f64));
        write(page, &HSM_SESSIONS_WANTED, members(|m| m.sessions_wanted as f64));
        write(page, &HSM_SESSIONS_LIMIT, members(|m| m.sessions_limit as f64));
        write(page, &HSM_SESSIONS_BUSY, members(|m| m.sessions_busy as f64));
        write(page, &HSM_SESSIONS_STUCK, members(|m| m.sessions_stuck as f64));
        write(page, &HSM_CPU, members(|m| m.spent.as_secs_f64()));
        write(page, &HSM_WORKER_CPU, members(|m| m.worker_processor.as_secs_f64()));
        write(page, &HSM_WORKER_MEMORY, members(|m| m.worker_resident as f64));
        one(page, &HSM_RETRY_BUDGET, self.retry_budget);
        one(page, &RELEASES_RUNNING, self.load.running as f64);
        one(page, &RELEASES_RUNNING_LIMIT, self.limits.running as f64);
        one(page, &STOCK_DEPTH, self.stock_depth as f64);
        one(page, &QUEUE_WAITING, self.load.waiting as f64);
        one(page, &CONNECTIONS_OPEN, self.connections_open as f64);
        one(page, &CONNECTIONS_LIMIT, self.connections_limit as f64);
        one(page, &BODY_MEMORY, self.body_memory.0 as f64);
        one(page, &BODY_MEMORY_LIMIT, self.body_memory.1 as f64);
        one(page, &QUEUE_LIMIT, self.limits.waiting as f64);
        let expiry = self.certificates.iter();
        let expiry = expiry.map(|(kind, name, end)| ([("kind", *kind), ("certificate", name.as_str())], *end as f64));
        write(page, &CERTIFICATE_EXPIRY, expiry);
        one(page, &HOSTS_REGISTERED, self.hosts as f64);
        one(page, &STATE_STALE, f64::from(self.state_stale));
        let shared =
            |value: fn(&SharedState) -> f64| self.shared.iter().map(move |shared| ([("", ""); 0], value(shared)));
        write(page, &ETCD_CONNECTED, shared(|of| f64::from(of.confirmed)));
        write(page, &STATE_AGE, shared(|of| of.age.as_secs_f64()));
        write(page, &STATE_AGE_LIMIT, shared(|of| of.limit.as_secs_f64()));
        write(page, &STATE_REVISION, shared(|of| of.revision as f64));
        one(page, &AUDIT_WAITING, self.audit_waiting as f64);
        one(page, &AUDIT_WRITING, self.audit_writing.as_secs_f64());
        one(page, &AUDIT_LINE, self.audit.link.n as f64);
        one(page, &AUDIT_UNSIGNED, self.audit.unsigned() as f64);
        let unsigned_for = self.audit.unsigned_since.map_or(Duration::ZERO, |since| since.elapsed());
        one(page, &AUDIT_UNSIGNED_FOR, unsigned_for.as_secs_f64());
        one(page, &AUDIT_RESERVE_MISSING, self.audit.reserve_missing as f64);
        one(page, &CLOCK, since_1970().as_secs_f64());
        one(page, &PROCESS_CPU, self.usage.cpu.as_secs_f64());
        one(page, &PROCESS_MEMORY, self.usage.resident as f64);
        one(page, &PROCESS_THREADS, self.usage.threads as f64);
        one(page, &PROCESS_FILES, self.usage.open_files as f64);
        one(page, &PROCESS_MAX_FILES, self.usage.max_files);
        one(page, &PROCESS_START, self.usage.started);
        let build = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("CLAVIGER_COMMIT"))];
        write(page, &BUILD_INFO, [(build, 1.0)]);
    }
}

fn one(page: &mut String, metric: &Metric, value: f64) {
    write(page, metric, [([], value)]);
}

/// Writes a metric and its series in the Prometheus text format.
fn write<'a, const N: usize>(
    page: &mut String,
    metric: &Metric,
    series: impl IntoIterator<Item = ([(&'a str, &'a str); N], f64)>,
) {
    let Metric { name, help, kind, .. } = metric;
    let kind = if *kind == Kind::CounterReading { "counter" } else { "gauge" };
    line(page, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    for (labels, value) in series {
        page.push_str(name);
        let mut before = '{';
        for (label, value) in labels {
            page.push(before);
            before = ',';
            page.push_str(label);
            page.push_str("=\"");
            page.push_str(&escaped(value));
            page.push('"');
        }
        if N > 0 {
            page.push('}');
        }
        line(page, format_args!(" {value}"));
    }
    page.push('\n');
}

fn line(page: &mut String, text: impl Display) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "{text}");
}

/// Escapes a label value for the text format.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
