//! Simulates a cluster that a plan describes by a few numbers. The simulator runs the daemon's own policies
//! ([`claviger_hsm::policy::simulation`]).
//!
//! A release waits for admission as in the daemon (`release.concurrency`, `release.queue`) and then starts two
//! operations at once: decrypt and sign. The time of an operation at a member that serves varies by up to a fifth.

use std::time::Duration;

use claviger_hsm::policy::simulation::{Behaviour, Load, Settings, Simulation, Spec};
use serde::Serialize;

/// Smallest number of concurrent releases, as in the daemon.
const LEAST_CONCURRENCY: usize = 16;
/// A deadline that no release misses, in seconds.
const PATIENCE: f64 = 1e6;
/// Number of operations that may wait or run at a member. It is unlimited, because concurrent releases cannot reach a
/// limit.
const MEMBER_QUEUE: usize = usize::MAX;

/// The model of a cluster. Times are in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Model {
    /// Number of members.
    pub hsms: usize,
    /// Number of sessions of each member.
    pub sessions: usize,
    /// Largest number of private-key operations a second of each member.
    pub hsm_rate: f64,
    /// Time of one operation inside an idle HSM. If the rate is higher than one operation after the other allows, the
    /// HSM has several engines.
    pub op_time: f64,
    /// Network round trip to an HSM.
    pub rtt: f64,
    /// Processor time of the daemon for a release; 0 ignores the daemon.
    pub own_cost: f64,
    /// Number of processors of the daemon.
    pub processors: usize,
    /// Largest number of releases in the admission queue.
    pub queue: usize,
    /// Time after which an unfinished release has failed.
    pub deadline: f64,
}

impl Model {
    /// Number of operations that one HSM computes at the same time.
    #[must_use]
    pub(crate) fn engines(&self) -> usize {
        ((self.hsm_rate * self.op_time).round() as usize).max(1)
    }

    /// Time of an operation at an engine. It is adjusted so that a whole number of engines gives exactly the rate.
    #[must_use]
    pub(crate) fn engine_time(&self) -> f64 {
        self.engines() as f64 / self.hsm_rate
    }

    /// Number of concurrent releases.
    #[must_use]
    pub fn concurrency(&self) -> usize {
        (2 * self.sessions * self.hsms).max(LEAST_CONCURRENCY)
    }

    /// Upper bound of the releases a second at any latency. Each release needs two operations.
    #[must_use]
    pub fn ceiling(&self) -> f64 {
        let by_sessions = self.sessions as f64 / (self.rtt + self.engine_time());
        let hsms = self.hsms as f64 * self.hsm_rate.min(by_sessions) / 2.0;
        if self.own_cost > 0.0 { hsms.min(self.processors as f64 / self.own_cost) } else { hsms }
    }

    /// Longest wait for admission when more releases arrive than are served. The wait ends when the queue is full or
    /// the deadline is near.
    #[must_use]
    pub(crate) fn longest_wait(&self, served: f64) -> f64 {
        (self.queue as f64 / served).min(self.deadline)
    }
}

/// The result of a simulation.
#[derive(Clone, PartialEq, Debug)]
pub struct Simulated {
    /// Latencies of the releases that succeeded, ascending, in seconds.
    pub latencies: Vec<f64>,
    /// Number of releases that failed: deadline, full queue, or no member.
    pub failed: usize,
    /// `true` if later releases waited no longer than the first ones.
    pub steady: bool,
    /// Share of the time in which the engines of the serving HSMs were busy.
    pub engines_busy: f64,
    /// Share of the time in which the sessions of the serving HSMs were busy.
    pub sessions_busy: f64,
    /// Share of the time in which the daemon's processors were busy.
    pub processors_busy: f64,
}

impl Simulated {
    /// Latency at a quantile, in seconds; 0 if no release succeeded.
    #[must_use]
    pub fn latency(&self, quantile: f64) -> f64 {
        let at = (self.latencies.len() as f64 * quantile).ceil() as usize;
        self.latencies.get(at.clamp(1, self.latencies.len().max(1)) - 1).copied().unwrap_or(0.0)
    }

    /// Share of the releases that failed.
    #[must_use]
    pub fn errors(&self) -> f64 {
        let all = self.latencies.len() + self.failed;
        if all == 0 { 0.0 } else { self.failed as f64 / all as f64 }
    }
}

fn start(model: &Model, load: Load, one_fails: bool) -> Simulation {
    let time = Duration::from_secs_f64;
    let serves = Behaviour { service: time(model.engine_time()), ..Behaviour::default() };
    let fails = Behaviour { fails_one_in: 1, ..serves };
    let spec = |behaviour| Spec {
        priority: 0,
        weight: 1,
        sessions: model.sessions,
        queue: MEMBER_QUEUE,
        engines: model.engines(),
        rtt: time(model.rtt),
        behaviour,
    };
    let specs: Vec<_> =
        (0..model.hsms).map(|member| spec(if one_fails && member == 0 { fails } else { serves })).collect();
    let settings = Settings {
        concurrency: model.concurrency(),
        queue: model.queue,
        operations: 2,
        own_cost: time(model.own_cost),
        processors: model.processors,
        deadline: time(model.deadline),
        ..Settings::new(load)
    };
    Simulation::new(7, settings, &specs)
}

/// Simulates at least `releases` releases at `rate` a second. One fifth as many run before and are not counted. With
/// `one_fails`, the first member fails every operation from the start, and the policies have to detect it.
#[must_use]
pub fn simulate(model: &Model, rate: f64, releases: f64, one_fails: bool) -> Simulated {
    let seconds = (releases / rate).max(1.0);
    let mut simulation = start(model, Load::Open(rate), one_fails);
    simulation.run(Duration::from_secs_f64(seconds / 5.0));
    simulation.forget();
    simulation.run(Duration::from_secs_f64(seconds));

    let serving = &simulation.members[usize::from(one_fails)..];
    let share = |busy: Duration, places: usize| busy.div_duration_f64(simulation.counted()) / places.max(1) as f64;
    let engines_busy = share(serving.iter().map(|member| member.engines_busy).sum(), serving.len() * model.engines());
    let sessions_busy = share(serving.iter().map(|member| member.sessions_busy).sum(), serving.len() * model.sessions);
    let processors_busy = share(simulation.processors_busy, model.processors);
    simulation.finish();
    let mut latencies: Vec<_> = simulation.latencies.iter().map(Duration::as_secs_f64).collect();
    let alone = model.rtt + model.engine_time() + model.own_cost;
    let steady = steady(&latencies, alone);
    latencies.sort_by(f64::total_cmp);
    let failed = simulation.lost as usize;
    Simulated { latencies, failed, steady, engines_busy, sessions_busy, processors_busy }
}

/// `true` if the latencies, in the order of completion, do not grow. `alone` is the time of a single release; it is the
/// scale for the comparison, because a growing queue adds many times as much.
fn steady(latencies: &[f64], alone: f64) -> bool {
    let (first, last) = latencies.split_at(latencies.len() / 2);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let (first, last) = (mean(first), mean(last));
    last <= 2.0 * first + 10.0 * alone
}

/// Releases a second that succeed when releases always wait and have no deadline. This is the most that the model and
/// the policies carry; it may be less than [`Model::ceiling`]. Simulates about `releases` releases.
#[must_use]
pub fn saturated(model: &Model, releases: f64, one_fails: bool) -> f64 {
    let serving = Model { hsms: model.hsms - usize::from(one_fails), ..*model };
    let seconds = (releases / serving.ceiling()).max(1.0);
    let patient = Model { deadline: PATIENCE, queue: usize::MAX, ..*model };
    let mut simulation = start(&patient, Load::Closed(2 * model.concurrency()), one_fails);
    // The first part runs until the failing member is down and all places are in use.
    simulation.run(Duration::from_secs_f64(seconds / 5.0 + 2.0 * (model.rtt + model.engine_time())));
    simulation.forget();
    simulation.run(Duration::from_secs_f64(seconds));
    (simulation.succeeded as f64 / seconds).min(serving.ceiling())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const MODEL: Model = Model {
        hsms: 2,
        sessions: 8,
        hsm_rate: 1000.0,
        op_time: 0.001,
        rtt: 0.001,
        own_cost: 0.0,
        processors: 1,
        queue: 4096,
        deadline: 5.0,
    };

    #[test]
    fn an_idle_cluster_takes_what_its_parts_take() {
        let simulated = simulate(&MODEL, 10.0, 200.0, false);
        assert_eq!(simulated.failed, 0);
        // Round trip and operation. Both operations rarely use the same engine.
        assert!((0.0018..0.0024).contains(&simulated.latency(0.5)), "{}", simulated.latency(0.5));
        assert!((simulated.engines_busy - 0.01).abs() < 0.004, "{}", simulated.engines_busy);
    }

    #[test]
    fn it_carries_what_it_can_and_no_more() {
        assert!((MODEL.ceiling() - 1000.0).abs() < 1e-6);
        let below = simulate(&MODEL, 800.0, 4000.0, false);
        assert_eq!((below.failed, below.steady), (0, true));
        assert!(below.latency(0.99) < 0.05, "{}", below.latency(0.99));
        assert!((below.engines_busy - 0.8).abs() < 0.05, "{}", below.engines_busy);
        let above = simulate(&MODEL, 1200.0, 6000.0, false);
        assert!(above.latency(0.99) > 0.3, "{}", above.latency(0.99));
        assert!(above.engines_busy > 0.97 && !above.steady);
    }

    #[test]
    fn a_member_that_fails_costs_its_capacity_and_hardly_a_release() {
        let simulated = simulate(&MODEL, 400.0, 2000.0, true);
        assert!(simulated.errors() < 0.001, "{}", simulated.errors());
        assert!((simulated.engines_busy - 0.8).abs() < 0.06, "{}", simulated.engines_busy);
    }

    #[test]
    fn sessions_and_processors_may_be_what_limits() {
        let few = Model { sessions: 1, ..MODEL };
        assert!((few.ceiling() - 500.0).abs() < 1e-6);
        assert!(simulate(&few, 450.0, 2000.0, false).sessions_busy > 0.8);
        let slow = Model { own_cost: 0.005, processors: 2, ..MODEL };
        assert!((slow.ceiling() - 400.0).abs() < 1e-6);
        assert!(simulate(&slow, 380.0, 2000.0, false).processors_busy > 0.9);
    }

    #[test]
    fn a_saturated_cluster_shows_what_it_does_at_most() {
        let rate = saturated(&MODEL, 4000.0, false);
        assert!((0.97..=1.0).contains(&(rate / MODEL.ceiling())), "{rate}");
        let rate = saturated(&MODEL, 4000.0, true);
        assert!((0.95..=1.0).contains(&(rate / 500.0)), "{rate}");
        // With only as many sessions as operations in transit and in the only engine, varying times sometimes leave the
        // engine idle.
        let tight = Model { hsms: 1, sessions: 2, ..MODEL };
        let rate = saturated(&tight, 4000.0, false);
        assert!((0.8..0.99).contains(&(rate / tight.ceiling())), "{rate} of {}", tight.ceiling());
    }
}
