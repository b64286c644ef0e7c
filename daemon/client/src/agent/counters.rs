//! The counters of an agent, as a page for Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// The counters since the agent's start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Releases that were passed to a machine.
    pub released: AtomicU64,
    /// Releases that were refused.
    pub refused: AtomicU64,
    /// Releases that no server could serve in time.
    pub late: AtomicU64,
    /// Release requests to the service, each with one or more protectors.
    pub batches: AtomicU64,
    /// Attestations that gave a certificate.
    pub attested: AtomicU64,
    /// Attestations that failed.
    pub not_attested: AtomicU64,
    /// Connections of users without permission.
    pub strangers: AtomicU64,
    /// Releases that wait for their batch or for its reply.
    pub waiting: AtomicU64,
    /// Expiry of the health certificate in seconds since 1970; 0: none.
    pub certificate_ends: AtomicI64,
}

impl Counters {
    /// The page in Prometheus' text format.
    #[must_use]
    pub fn page(&self) -> String {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed).to_string();
        let mut page = String::new();
        let mut family = |name: &str, kind: &str, help: &str, series: &[(&str, String)]| {
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
            series.iter().for_each(|(labels, value)| _ = writeln!(page, "{name}{labels} {value}"));
        };
        family(
            "claviger_agent_releases_total",
            "counter",
            "Releases that machines of this host asked for, by outcome.",
            &[
                ("{outcome=\"released\"}", read(&self.released)),
                ("{outcome=\"refused\"}", read(&self.refused)),
                ("{outcome=\"late\"}", read(&self.late)),
            ],
        );
        let help = "Requests for releases that were sent to the service.";
        family("claviger_agent_batches_total", "counter", help, &[("", read(&self.batches))]);
        family(
            "claviger_agent_attestations_total",
            "counter",
            "Attestations, by outcome.",
            &[("{outcome=\"certified\"}", read(&self.attested)), ("{outcome=\"failed\"}", read(&self.not_attested))],
        );
        let help = "Connections of users that may not ask this agent.";
        family("claviger_agent_strangers_total", "counter", help, &[("", read(&self.strangers))]);
        let help = "Releases that wait for an answer.";
        family("claviger_agent_waiting", "gauge", help, &[("", read(&self.waiting))]);
        let help = "When the health certificate ends, in seconds since 1970; 0 without one.";
        let ends = self.certificate_ends.load(Ordering::Relaxed).to_string();
        family("claviger_agent_certificate_ends_timestamp_seconds", "gauge", help, &[("", ends)]);
        page
    }
}
