//! The throughput by number of members, with emulated network distance.

use claviger_tests::stats::median;
use serde::Serialize;

use crate::ceiling::{Settings, Stage, callers};
use crate::machine::Machine;
use crate::service::{Round, Service};

/// The result for a number of members.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Number of members.
    pub hsms: usize,
    /// Releases per second.
    pub releases_per_second: f64,
    /// Releases per second ÷ linear growth from the first step.
    pub of_linear: f64,
    /// Number of processors that the daemon used, including its soft tokens; from 1 on, a core is full.
    pub daemon_processors: f64,
}

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// The machine and the date.
    pub machine: Machine,
    /// Sessions of each member.
    pub sessions: usize,
    /// Delay of every operation, in seconds.
    pub rtt_seconds: f64,
    /// One step for each number of members.
    pub steps: Vec<Step>,
}

/// Runs the measurement with these numbers of members; the lab has the largest number. `tell` is called for every step.
///
/// # Panics
/// On any error, because the figures would be useless.
#[must_use]
pub fn run(stage: &Stage, settings: &Settings, numbers: &[usize], mut tell: impl FnMut(&str)) -> Scaling {
    let all = stage.lab.config().hsm;
    let mut steps: Vec<Step> = Vec::new();
    for hsms in numbers.iter().copied() {
        stage.lab.configure(|config| config.hsm = all.iter().take(hsms).cloned().collect());
        let service = Service::start(&stage.lab);
        let callers = callers(hsms * settings.sessions);
        let _ = service.round(callers, settings.time / 4);
        let rounds: Vec<_> = (0..settings.rounds).map(|_| service.round(callers, settings.time)).collect();
        let rates: Vec<_> = rounds.iter().map(|round| round.per_second).collect();
        let processors = |round: &Round| round.spent().processor_time() / settings.time.as_secs_f64();
        let cpu: Vec<_> = rounds.iter().map(processors).collect();
        let rate = median(&rates);
        let one = steps.first().map_or(rate / hsms as f64, |first| first.releases_per_second / first.hsms as f64);
        let step = Step {
            hsms,
            releases_per_second: rate,
            of_linear: rate / (one * hsms as f64),
            daemon_processors: median(&cpu),
        };
        tell(&format!(
            "{hsms} HSMs: {rate:.0} releases/s, {:.2} of linear, {:.2} processors",
            step.of_linear, step.daemon_processors
        ));
        steps.push(step);
    }
    stage.lab.configure(|config| config.hsm = all);
    Scaling { machine: Machine::here(), sessions: settings.sessions, rtt_seconds: settings.rtt.as_secs_f64(), steps }
}
