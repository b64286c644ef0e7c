//! Runs a storm of attestations: every host attests once, with a fixed number of attestations at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::Failure;
use crate::about::About;
use crate::host::{Host, HostKeys};
use crate::http::Client;
use crate::progress::Progress;
use crate::scrape::Look;

/// The result of a storm.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Storm {
    /// The test, the daemon and the machine.
    pub about: Option<About>,
    /// `true` if the hosts attested with TPMs, `false` if with host keys.
    pub by_tpm: bool,
    /// Number of hosts.
    pub hosts: usize,
    /// Number of attestations at a time.
    pub at_a_time: usize,
    /// Duration of the storm, in seconds.
    pub seconds: f64,
    /// Number of hosts that got a health certificate.
    pub granted: usize,
    /// Health certificates a second.
    pub per_second: f64,
    /// Number of hosts that were refused, by error code.
    pub refused: BTreeMap<String, usize>,
    /// Median time from the first request of an attestation to its health certificate, in seconds; `None` if no host
    /// got one.
    pub latency_p50: Option<f64>,
    /// 99th percentile of the same time.
    pub latency_p99: Option<f64>,
    /// Longest of these times.
    pub latency_max: Option<f64>,
    /// Number of HSM operations; `None` if the daemon's metrics are unknown.
    pub hsm_calls: Option<f64>,
    /// Processor time of the daemon for one attestation, in seconds and without the calls into HSMs; `None` if unknown.
    pub own_cost: Option<f64>,
}

/// Attests all hosts, `at_a_time` of them at the same time. Calls `told` with the result and the duration of each
/// attestation. An error of `told` ends the storm.
///
/// # Errors
/// The error of `told`.
pub async fn each(
    client: &Arc<Client>,
    hosts: Vec<HostKeys>,
    at_a_time: usize,
    mut told: impl FnMut(Result<Host, Failure>, Duration) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let progress = Progress::new("attesting", hosts.len() as u64);
    let mut hosts = hosts.into_iter();
    let mut attesting = JoinSet::new();
    loop {
        while attesting.len() < at_a_time
            && let Some((proof, identity)) = hosts.next()
        {
            let client = client.clone();
            attesting.spawn(async move {
                let begun = Instant::now();
                (Host::attest(&client, &proof, identity).await, begun.elapsed())
            });
        }
        let Some(done) = attesting.join_next().await else { return Ok(()) };
        let (attested, took) = done?;
        progress.advance(1);
        told(attested, took)?;
    }
}

/// Attests every host once, and reads the daemon's metrics before and after.
///
/// # Errors
/// The metrics address does not answer.
pub async fn storm(
    client: &Arc<Client>,
    hosts: Vec<HostKeys>,
    by_tpm: bool,
    at_a_time: usize,
    metrics: Option<&Client>,
) -> Result<Storm, Failure> {
    let look = async || match metrics {
        Some(metrics) => Look::take(metrics).await,
        None => Ok(Look::default()),
    };
    let count = hosts.len();
    let before = look().await?;
    let mut refused = BTreeMap::new();
    // Microseconds with three significant digits, up to one hour.
    let mut latency = Histogram::<u64>::new_with_bounds(1, 3_600_000_000, 3)?;
    let begun = Instant::now();
    each(client, hosts, at_a_time, |attested, took| {
        match attested {
            Ok(_) => latency.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            Err(error) => *refused.entry(error.to_string()).or_insert(0) += 1,
        }
        Ok(())
    })
    .await?;
    let took = begun.elapsed();
    let after = look().await?;
    let granted = usize::try_from(latency.len()).unwrap_or(usize::MAX);
    let difference = |of: fn(&Look) -> Option<f64>| Some(of(&after)? - of(&before)?);
    let own = difference(|look| Some(look.cpu_seconds? - look.hsm_cpu_seconds?));
    let seconds = |quantile: f64| (granted > 0).then(|| latency.value_at_quantile(quantile) as f64 / 1e6);
    Ok(Storm {
        about: None,
        by_tpm,
        hosts: count,
        at_a_time,
        seconds: took.as_secs_f64(),
        granted,
        per_second: granted as f64 / took.max(Duration::from_millis(1)).as_secs_f64(),
        refused,
        latency_p50: seconds(0.5),
        latency_p99: seconds(0.99),
        latency_max: seconds(1.0),
        hsm_calls: difference(|look| look.hsm_calls),
        own_cost: own.map(|seconds| seconds / count as f64),
    })
}

impl Storm {
    /// The result as text.
    #[must_use]
    pub fn for_people(&self) -> String {
        let what = if self.by_tpm { "their TPMs" } else { "their host keys" };
        let mut text = format!(
            "{} of {} hosts attested by {what} in {:.1} s, {} at a time: {:.0} health certificates a second",
            self.granted, self.hosts, self.seconds, self.at_a_time, self.per_second
        );
        if let (Some(p50), Some(p99), Some(max)) = (self.latency_p50, self.latency_p99, self.latency_max) {
            let [p50, p99, max] = [p50, p99, max].map(|seconds| seconds * 1e3);
            text.push_str(&format!("\nlatency    p50 {p50:.1} ms, p99 {p99:.1} ms, longest {max:.1} ms"));
        }
        if let Some(calls) = self.hsm_calls {
            let each = calls / self.hosts as f64;
            text.push_str(&format!(
                "\nHSMs       {calls:.0} operations, {each:.2} for an attestation, probes included"
            ));
        }
        if let Some(cost) = self.own_cost {
            let cost = cost * 1e3;
            text.push_str(&format!(
                "\ndaemon     {cost:.2} ms of processor time for an attestation, outside of the HSMs"
            ));
        }
        for (error, count) in &self.refused {
            text.push_str(&format!("\nrefused    {count}: {error}"));
        }
        text
    }
}
