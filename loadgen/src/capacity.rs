//! Measures how much load a running service carries. Closed-loop steps find the knee of the throughput, and a
//! scalability law is fitted to them. Open-loop trials then find the highest rate that meets the objectives.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::Failure;
use crate::about::About;
use crate::bound::{Bound, stated};
use crate::cpu;
use crate::http::Client;
use crate::interrupt::Interrupt;
use crate::plan::{Capacity, Hosts, capacity_table};
use crate::prepare::World;
use crate::print::{aside, table};
use crate::profile::Profile;
use crate::report::Percentiles;
use crate::run::{self, Load, Mode, Outcome};
use crate::scrape::Look;
use crate::site::{Admin, Site};
use crate::tally::grows;
use crate::threshold::Threshold;
use crate::units;
use crate::usl::Usl;

/// Largest number of concurrent callers.
pub const MOST_CALLERS: usize = 512;
/// A step counts as a gain only if it exceeds the best throughput so far by this share.
const GAIN: f64 = 0.04;
/// Number of open-loop trials. Each one halves the range of the search.
const TRIALS: usize = 6;
/// Number of trials in which a rate must hold before it counts as sustainable, and the largest number of trials to
/// confirm it.
const HOLDS: usize = 3;
const CONFIRMING: usize = 6;
/// Number of invalid trials after which a rate counts as missed.
const ATTEMPTS: usize = 3;
/// A trial that confirms a rate is this many times as long as a step, so that slow growth of a queue shows.
const LONGER: u32 = 3;
/// Smallest number of steps for fitting a law. The law has three parameters, so it would fit almost any smaller set.
const FEWEST_STEPS: usize = 6;
/// Interval between two samples of the HSMs.
const LOOK: Duration = Duration::from_millis(100);
/// A resource that is used beyond this share of its capacity counts as the limit.
const LIMITS: f64 = 0.85;

/// The inputs of a measurement.
pub struct Question<'a> {
    /// The client of the service.
    pub client: Arc<Client>,
    /// The URL of the service.
    pub url: String,
    /// Hosts and virtual machines.
    pub world: World,
    /// The settings of the load. The mode is replaced in every step.
    pub load: Load,
    /// Duration of a step.
    pub step: Duration,
    /// The objectives that a rate must meet.
    pub objectives: &'a [Threshold],
    /// The keys and sockets in use. If the daemon runs on this machine, its admin socket reports the state of the HSMs.
    pub site: &'a Site,
    /// The client of the daemon's metrics address.
    pub metrics: Option<Client>,
    /// Number of HSMs, if the daemon does not report it.
    pub hsms: Option<usize>,
    /// Ends the search early.
    pub interrupt: Interrupt,
}

/// Use of resources during a step.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Seen {
    /// Share of all HSM sessions that were busy.
    pub sessions_busy: Option<f64>,
    /// Number of operations that waited for a session.
    pub hsm_waiting: Option<f64>,
    /// Number of processors that the daemon used.
    pub daemon_processors: Option<f64>,
    /// Number of releases in the admission queue at the end of the step.
    pub queue: Option<f64>,
}

/// The result of a step or trial.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Step {
    /// Number of concurrent callers in a closed loop; 0 in an open loop.
    pub callers: usize,
    /// Releases a second that were due. In a closed loop: that were requested.
    pub offered: f64,
    /// Releases a second that succeeded.
    pub achieved: f64,
    /// Latency of the releases that succeeded.
    pub latency_seconds: Percentiles,
    /// Share of the releases that failed or were dropped.
    pub errors: f64,
    /// `true` if the number of open releases did not grow: the service carried the rate.
    pub steady: bool,
    /// `true` if the run is valid, the service carried the rate, and the objectives hold.
    pub holds: bool,
    /// `true` if the load generator kept up.
    pub valid: bool,
    /// Use of resources during the step.
    pub seen: Seen,
}

/// The result of a measurement.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Answer {
    /// The test, the daemon and the machine.
    pub about: Option<About>,
    /// The URL of the service.
    pub url: String,
    /// The objectives that a rate must meet.
    pub objectives: Vec<Bound>,
    /// Closed-loop steps with an increasing number of callers.
    pub steps: Vec<Step>,
    /// Open-loop trials at rates around the knee.
    pub trials: Vec<Step>,
    /// The law that fits the steps; `None` if fewer than six steps are valid.
    pub law: Option<Usl>,
    /// Lowest and highest ceiling of the laws that are fitted with one step left out.
    pub law_ceilings: Option<[f64; 2]>,
    /// The confidence in the sustainable rate; `None` if the search was interrupted.
    pub sure: Option<Sure>,
    /// `true` if the search was interrupted. Then only the completed steps and trials are here, and no capacity follows
    /// from them.
    pub interrupted: bool,
    /// The capacity with all HSMs, and an estimate with one HSM less.
    pub capacities: Vec<Capacity>,
}

/// The confidence in a sustainable rate.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Sure {
    /// Number of trials at this rate in which the objectives held.
    pub held: usize,
    /// Number of trials at this rate.
    pub tried: usize,
    /// Duration of the longest of these trials, in seconds.
    pub longest_seconds: f64,
    /// The lowest higher rate at which the objectives did not hold; `None` if no higher rate was tried, or none failed.
    pub missed_at: Option<f64>,
    /// Number of trials in which the load generator fell behind. These trials count as missed.
    pub invalid: usize,
}

impl Sure {
    /// The confidence as text.
    #[must_use]
    pub(crate) fn stated(&self, sustainable: f64) -> String {
        if self.held == 0 {
            return "no rate that was tried held".to_owned();
        }
        let longest = units::seconds(self.longest_seconds);
        let mut text = format!(
            "{}/s held in {} of {} trials, the longest of {longest}",
            units::per_second(sustainable),
            self.held,
            self.tried
        );
        match self.missed_at {
            Some(missed) => text.push_str(&format!(
                "; {}/s was missed, so the edge is between them, {} apart",
                units::per_second(missed),
                units::percent(missed / sustainable - 1.0)
            )),
            None => text
                .push_str("; no higher rate was missed, up to nearly the most that callers who always wait were given"),
        }
        if self.held < HOLDS {
            text.push_str(&format!("; fewer than {HOLDS} times: UNSURE, try a longer --step"));
        }
        if self.invalid > 0 {
            text.push_str(&format!("; in {} trials the generator itself fell behind: UNSURE", self.invalid));
        }
        text
    }
}

/// The trials of the search: rates that held and rates that did not.
#[derive(Debug, Default)]
struct Search {
    /// Rate, seconds, `true` if the objectives held, `true` if the trial was valid.
    trials: Vec<(f64, f64, bool, bool)>,
}

impl Search {
    fn tell(&mut self, rate: f64, seconds: f64, holds: bool, valid: bool) {
        self.trials.push((rate, seconds, holds, valid));
    }

    /// The lowest rate that was missed. No rate at or above it counts as held.
    fn missed(&self) -> Option<f64> {
        self.trials.iter().filter(|(_, _, holds, _)| !holds).map(|(rate, ..)| *rate).min_by(f64::total_cmp)
    }

    /// The highest rate that held and is below all missed rates; 0 if there is none.
    fn held(&self) -> f64 {
        let missed = self.missed().unwrap_or(f64::INFINITY);
        self.trials
            .iter()
            .filter(|(rate, _, holds, _)| *holds && *rate < missed)
            .map(|(rate, ..)| *rate)
            .fold(0.0, f64::max)
    }

    fn sure(&self) -> Sure {
        let held = self.held();
        let at: Vec<_> = self.trials.iter().filter(|(rate, ..)| *rate == held).collect();
        Sure {
            held: at.iter().filter(|(_, _, holds, _)| *holds).count(),
            tried: at.len(),
            longest_seconds: at.iter().map(|(_, seconds, ..)| *seconds).fold(0.0, f64::max),
            missed_at: self.missed(),
            invalid: self.trials.iter().filter(|(.., valid)| !valid).count(),
        }
    }
}

/// Fits the law to the valid steps. Also returns the range of its ceiling when one step is left out.
fn fitted(steps: &[Step]) -> (Option<Usl>, Option<[f64; 2]>) {
    let points: Vec<_> =
        steps.iter().filter(|step| step.valid).map(|step| (step.callers as f64, step.achieved)).collect();
    if points.len() < FEWEST_STEPS {
        return (None, None);
    }
    let law = Usl::fit(&points);
    let without = |left_out: usize| {
        let others: Vec<_> = points.iter().enumerate().filter(|(at, _)| *at != left_out).map(|(_, p)| *p).collect();
        Usl::fit(&others).map(|law| law.ceiling())
    };
    let ceilings: Vec<f64> = (0..points.len()).filter_map(without).collect();
    let bounds = [ceilings.iter().copied().fold(f64::INFINITY, f64::min), ceilings.iter().copied().fold(0.0, f64::max)];
    (law, law.map(|_| bounds))
}

/// Runs the measurement.
///
/// # Errors
/// The service or the metrics address does not answer.
pub async fn measure(question: &Question<'_>) -> Result<Answer, Failure> {
    let hsms = match question.hsms {
        Some(hsms) => hsms,
        None => question.hsms().await?,
    };
    let mut steps: Vec<Step> = Vec::new();
    let (mut callers, mut flat) = (1, 0);
    while callers <= MOST_CALLERS && flat < 2 {
        let Some(step) = question.step(Mode::Closed { callers, duration: question.step }).await? else { break };
        aside(&format!(
            "{callers:4} callers: {:>7}/s, p99 {}{}",
            units::per_second(step.achieved),
            units::seconds(step.latency_seconds.p99),
            if step.valid { "" } else { ", but the generator fell behind" }
        ));
        let best = steps.iter().map(|step| step.achieved).fold(0.0, f64::max);
        flat = if step.achieved > best * (1.0 + GAIN) { 0 } else { flat + 1 };
        let failing = step.errors > 0.5;
        steps.push(step);
        if failing {
            break;
        }
        callers *= 2;
    }
    let (law, law_ceilings) = fitted(&steps);
    let most = steps.iter().map(|step| step.achieved).fold(0.0, f64::max);
    if most <= 0.0 && question.interrupt.since().is_none() {
        return Err("no release succeeded; try `claviger-loadgen run` to see why".into());
    }
    let mut trials: Vec<Step> = Vec::new();
    let mut search = Search::default();
    // The first trial is at the probable knee; the search then halves its range. No rate above the closed-loop maximum
    // can last.
    let mut rate = most * 0.85;
    for _ in 0..TRIALS {
        if !question.trial(rate, question.step, &mut trials, &mut search).await? {
            break;
        }
        let (low, high) = (search.held(), search.missed().unwrap_or(most));
        if high - low < most * 0.02 {
            break;
        }
        rate = f64::midpoint(low, high);
    }
    // A rate that held once may have held by luck.
    for _ in 0..CONFIRMING {
        let (rate, sure) = (search.held(), search.sure());
        if rate <= 0.0 || sure.held >= HOLDS {
            break;
        }
        if !question.trial(rate, question.step * LONGER, &mut trials, &mut search).await? {
            break;
        }
        if search.held() <= 0.0 {
            let lower = rate * 0.9;
            if !question.trial(lower, question.step * LONGER, &mut trials, &mut search).await? {
                break;
            }
        }
    }
    let about = None;
    let objectives = question.objectives.iter().map(Threshold::bound).collect();
    let url = question.url.clone();
    if question.interrupt.since().is_some() {
        let (sure, capacities) = (None, Vec::new());
        let interrupted = true;
        return Ok(Answer { about, url, objectives, steps, trials, law, law_ceilings, sure, interrupted, capacities });
    }
    let sustainable = search.held();
    let knee = trials.iter().filter(|trial| trial.holds).max_by(|a, b| a.offered.total_cmp(&b.offered));
    let seen = knee.or(trials.first()).map(|trial| trial.seen).unwrap_or_default();
    let busiest =
        steps.iter().max_by(|a, b| a.achieved.total_cmp(&b.achieved)).map(|step| step.seen).unwrap_or_default();
    let all_valid = trials.iter().all(|trial| trial.valid);
    let limit = match limit(&busiest, law.as_ref()) {
        limit if all_valid => limit,
        limit => format!("perhaps the generator itself, which fell behind in some trials; otherwise {limit}"),
    };
    let capacity = |hsms, one_fails, sustainable: f64, ceiling, limit| Capacity {
        hsms,
        one_fails,
        sustainable,
        ceiling,
        boots_a_minute: (sustainable * 60.0).floor(),
        limit,
    };
    let mut capacities = vec![capacity(hsms, false, sustainable, Some(most), limit)];
    if hsms > 1 {
        // The most that all HSMs do is the measured maximum if the HSMs were the limit. Otherwise it follows from how
        // busy they were.
        let busy = seen.sessions_busy.unwrap_or(1.0).clamp(0.05, 1.0);
        let limited = busiest.sessions_busy.is_none_or(|busy| busy >= LIMITS);
        let of_all = if limited { most } else { (sustainable / busy).max(most) };
        // The estimate leaves the same share of spare capacity as the measurement with all HSMs.
        let fewer = (of_all * (hsms - 1) as f64 / hsms as f64 * sustainable / most).min(sustainable);
        let limit = format!(
            "{} of {hsms} HSMs, of which all do {}/s at most, with as much room as all need",
            hsms - 1,
            units::per_second(of_all)
        );
        capacities.push(capacity(hsms, true, fewer, None, limit));
    }
    let (sure, interrupted) = (Some(search.sure()), false);
    Ok(Answer { about, url, objectives, steps, trials, law, law_ceilings, sure, interrupted, capacities })
}

impl Question<'_> {
    async fn hsms(&self) -> Result<usize, Failure> {
        if let Some(metrics) = &self.metrics
            && let Some(hsms) = Look::take(metrics).await?.hsms
        {
            return Ok(hsms);
        }
        let told = self.site.admin().and_then(|mut admin| admin.hsms());
        Ok(told.map_err(|error| format!("how many HSMs there are is not known ({error}); say it with --hsms N"))?.len())
    }

    /// Runs an open-loop trial at a rate. Repeats it if the load generator fell behind. Returns `false` if it was
    /// interrupted.
    async fn trial(
        &self,
        rate: f64,
        time: Duration,
        trials: &mut Vec<Step>,
        search: &mut Search,
    ) -> Result<bool, Failure> {
        for attempt in 1..=ATTEMPTS {
            if self.interrupt.since().is_some() {
                return Ok(false);
            }
            let Some(trial) = self.step(Mode::Open(Profile::constant(time, rate))).await? else { return Ok(false) };
            aside(&format!(
                "{:>7}/s due for {}: {:>7}/s, p99 {}: {}",
                units::per_second(rate),
                units::seconds(time.as_secs_f64()),
                units::per_second(trial.achieved),
                units::seconds(trial.latency_seconds.p99),
                if !trial.valid {
                    "the generator fell behind"
                } else if !trial.steady {
                    "overload: what waits grows"
                } else if trial.holds {
                    "the objective holds"
                } else {
                    "the objective is missed"
                }
            ));
            let (holds, valid) = (trial.holds, trial.valid);
            trials.push(trial);
            if valid || attempt == ATTEMPTS {
                search.tell(rate, time.as_secs_f64(), holds, valid);
                break;
            }
        }
        Ok(true)
    }

    /// Runs one step. Returns `None` if it was interrupted, because a partial step means little.
    async fn step(&self, mode: Mode) -> Result<Option<Step>, Failure> {
        let callers = if let Mode::Closed { callers, .. } = mode { callers } else { 0 };
        let load = Load { mode, show: false, ..self.load.clone() };
        let looking = Arc::new(AtomicBool::new(true));
        let watch = self.site.admin().ok().map(|admin| {
            let looking = looking.clone();
            tokio::task::spawn_blocking(move || watch(admin, &looking))
        });
        let daemon = self.site.daemon().await;
        let used = |look: &Look| look.cpu_seconds.or_else(|| cpu::seconds(Some(daemon?)));
        let before = self.look().await?;
        let cpu_before = used(&before);
        let begun = std::time::Instant::now();
        let ran = run::run(self.client.clone(), &self.world, load, &self.interrupt).await;
        if self.interrupt.since().is_some() {
            looking.store(false, Ordering::Relaxed);
            return Ok(None);
        }
        let outcome = ran?;
        let seconds = begun.elapsed().as_secs_f64();
        let after = self.look().await?;
        let cpu = used(&after).zip(cpu_before).map(|(after, before)| (after - before) / seconds);
        looking.store(false, Ordering::Relaxed);
        let (sessions_busy, hsm_waiting) = match watch {
            Some(watch) => watch.await?,
            None => (None, None),
        };
        let seen = Seen { sessions_busy, hsm_waiting, daemon_processors: cpu, queue: after.waiting };
        Ok(Some(self.told(callers, &outcome, seen)))
    }

    fn told(&self, callers: usize, outcome: &Outcome, seen: Seen) -> Step {
        let tally = &outcome.tally;
        let seconds = outcome.duration.as_secs_f64();
        let offered = tally.offered as f64 / seconds;
        let achieved = tally.achieved_per_second(seconds, callers > 0);
        let errors = tally.unsuccessful();
        let at = |quantile: f64| tally.latency.value_at_quantile(quantile) as f64 / 1e6;
        let valid = outcome.invalid.is_empty();
        let met = self.objectives.iter().all(|objective| objective.holds(at, errors));
        let steady = callers > 0 || !grows(&tally.seconds, outcome.duration.as_secs() as usize, self.load.arrivals);
        let holds = valid && met && steady && tally.achieved > 0;
        Step {
            callers,
            offered,
            achieved,
            latency_seconds: Percentiles::of(&tally.latency),
            errors,
            steady,
            holds,
            valid,
            seen,
        }
    }

    async fn look(&self) -> Result<Look, Failure> {
        match &self.metrics {
            Some(metrics) => Look::take(metrics).await,
            None => Ok(Look::default()),
        }
    }
}

/// Samples the HSMs. Returns the mean share of busy sessions of the members that serve, and the mean number of waiting
/// operations. Blocks.
fn watch(mut admin: Admin, looking: &AtomicBool) -> (Option<f64>, Option<f64>) {
    let (mut busy, mut waiting, mut looks) = (0.0, 0.0, 0.0);
    while looking.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK);
        let Ok(hsms) = admin.hsms() else { break };
        let up = || hsms.iter().filter(|hsm| hsm.state == "up");
        let sessions: usize = up().map(|hsm| hsm.sessions.wanted).sum();
        if sessions > 0 {
            busy += up().map(|hsm| hsm.sessions.busy).sum::<usize>() as f64 / sessions as f64;
            waiting += up().map(|hsm| hsm.waiting).sum::<usize>() as f64;
            looks += 1.0;
        }
    }
    if looks > 0.0 { (Some(busy / looks), Some(waiting / looks)) } else { (None, None) }
}

fn limit(seen: &Seen, law: Option<&Usl>) -> String {
    let processors = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    if let Some(busy) = seen.sessions_busy.filter(|busy| *busy >= LIMITS) {
        let waiting = seen.hsm_waiting.unwrap_or(0.0);
        return format!(
            "HSM: its sessions were {} busy and {waiting:.0} operations waited (soft tokens: that is this machine's processors)",
            units::percent(busy)
        );
    }
    if let Some(cpu) = seen.daemon_processors.filter(|cpu| *cpu >= LIMITS * processors) {
        return format!(
            "daemon CPU: it used {cpu:.1} processors of {processors:.0}, if it runs on a machine like this one"
        );
    }
    if let Some(queue) = seen.queue.filter(|queue| *queue > 0.0) {
        return format!("queue: {queue:.0} releases waited for their turn while HSMs had room");
    }
    let mut then = String::new();
    if let Some(busy) = seen.sessions_busy {
        then.push_str(&format!("; the HSMs' sessions were {} busy", units::percent(busy)));
    }
    if let Some(cpu) = seen.daemon_processors {
        then.push_str(&format!("; the daemon used {cpu:.1} processors of {processors:.0}"));
    }
    match law {
        Some(law) if law.kappa > 0.0 => {
            let peak = law.peak().unwrap_or(1.0);
            format!(
                "by the fit, coherency: throughput falls beyond {peak:.0} callers (processors or locks are shared){then}"
            )
        }
        Some(law) if law.sigma > 0.0 => format!(
            "by the fit, contention: {} is done one after the other, which bounds it at {}/s{then}",
            units::percent(law.sigma),
            units::per_second(law.ceiling())
        ),
        Some(_) => format!("nothing up to the most callers that were tried{then}"),
        None => format!("not known: fewer than {FEWEST_STEPS} steps, too few to fit a law to{then}"),
    }
}

/// The result as text.
#[must_use]
pub fn for_people(answer: &Answer, hosts: &Hosts) -> String {
    let mut out = String::new();
    let head = ["callers", "releases/s", "by the fit", "p50", "p99", "sessions busy", "waiting", "daemon CPU"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for step in &answer.steps {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            step.callers.to_string(),
            units::per_second(step.achieved),
            or_dash(answer.law.map(|law| units::per_second(law.throughput(step.callers as f64)))),
            units::seconds(step.latency_seconds.p50),
            units::seconds(step.latency_seconds.p99),
            or_dash(step.seen.sessions_busy.map(units::percent)),
            or_dash(step.seen.hsm_waiting.map(|waiting| format!("{waiting:.1}"))),
            or_dash(step.seen.daemon_processors.map(|cpu| format!("{cpu:.2}"))),
        ]);
    }
    out.push_str(&table(&rows));
    if let Some(law) = &answer.law {
        // A write to a string cannot fail.
        let _ = writeln!(
            out,
            "\nUniversal Scalability Law: {}/s for one caller, contention {:.4}, coherency {:.6}, R² {:.3}; most {}/s{}",
            units::per_second(law.lambda),
            law.sigma,
            law.kappa,
            law.r_squared,
            units::per_second(law.ceiling()),
            law.peak().map_or(String::new(), |peak| format!(" at {peak:.0} callers")),
        );
    } else {
        let _ =
            writeln!(out, "\nno law: {} steps, and it takes {FEWEST_STEPS} valid ones to fit one", answer.steps.len());
    }
    if let Some([low, high]) = answer.law_ceilings {
        let (low, high) = (units::per_second(low), units::per_second(high));
        let _ = writeln!(out, "how sure: with any one step left out, it says from {low}/s to {high}/s at most");
    }
    if answer.interrupted {
        for trial in &answer.trials {
            let verdict = if trial.holds { "holds" } else { "is missed, or the run was invalid or overload" };
            let (due, achieved) = (units::per_second(trial.offered), units::per_second(trial.achieved));
            let _ = writeln!(out, "{due}/s due: {achieved}/s; the objective {verdict}");
        }
        out.push_str("\nINTERRUPTED: these are the steps that were done; no capacity follows from them");
        return out;
    }
    let _ = writeln!(out, "\nwithin {}:\n", stated(&answer.objectives));
    let titles: Vec<_> = answer.capacities.iter().map(Capacity::title).collect();
    out.push_str(&capacity_table(&titles, &answer.capacities, hosts));
    let _ = writeln!(out, "\n{}", hosts.stated());
    if let (Some(sure), Some(all)) = (answer.sure, answer.capacities.first()) {
        let _ = writeln!(out, "how sure: {}", sure.stated(all.sustainable));
    }
    for (title, capacity) in titles.iter().zip(&answer.capacities) {
        let how = if capacity.one_fails { "estimated from" } else { "limited by" };
        let _ = writeln!(out, "{title}: {how} {}", capacity.limit);
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(callers: usize, achieved: f64, valid: bool) -> Step {
        Step {
            callers,
            offered: achieved,
            achieved,
            latency_seconds: Percentiles::default(),
            errors: 0.0,
            steady: true,
            holds: true,
            valid,
            seen: Seen::default(),
        }
    }

    #[test]
    fn fewer_than_six_valid_steps_fit_no_law() {
        let law = Usl { lambda: 100.0, sigma: 0.05, kappa: 0.0005, r_squared: 1.0 };
        let mut steps: Vec<_> = [1, 2, 4, 8, 16, 32].map(|n| step(n, law.throughput(n as f64), true)).to_vec();
        let (found, ceilings) = fitted(&steps);
        let [low, high] = ceilings.unwrap_or_default();
        assert!(
            found.is_some() && low <= law.ceiling() * 1.001 && high >= law.ceiling() * 0.999,
            "{found:?} {ceilings:?}"
        );
        steps[2].valid = false;
        assert_eq!(fitted(&steps), (None, None));
        assert_eq!(fitted(&steps[..5]), (None, None));
        // One step that does not fit widens the range of the ceiling.
        let mut odd: Vec<_> = [1, 2, 4, 8, 16, 32].map(|n| step(n, law.throughput(n as f64), true)).to_vec();
        odd[5].achieved *= 0.6;
        let [low, high] = fitted(&odd).1.unwrap_or_default();
        assert!(high > low * 1.2, "{low} {high}");
    }

    #[test]
    fn a_rate_that_was_missed_once_is_not_sustainable() {
        let mut search = Search::default();
        search.tell(85.0, 4.0, true, true);
        search.tell(92.0, 4.0, true, true);
        search.tell(96.0, 4.0, false, true);
        assert_eq!((search.held(), search.missed()), (92.0, Some(96.0)));
        search.tell(92.0, 12.0, false, true);
        assert_eq!((search.held(), search.missed()), (85.0, Some(92.0)));
        let sure = search.sure();
        assert_eq!((sure.held, sure.tried, sure.invalid), (1, 1, 0));
        assert!(
            sure.stated(85.0).contains("UNSURE") && sure.stated(85.0).contains("8.2 % apart"),
            "{}",
            sure.stated(85.0)
        );
        search.tell(85.0, 12.0, true, true);
        search.tell(85.0, 12.0, true, true);
        let text = search.sure().stated(85.0);
        assert!(text.contains("held in 3 of 3 trials, the longest of 12.0 s") && !text.contains("UNSURE"), "{text}");
        search.tell(99.0, 4.0, false, false);
        assert!(search.sure().stated(85.0).contains("the generator itself fell behind"));
        assert_eq!(Search::default().held(), 0.0);
    }
}
