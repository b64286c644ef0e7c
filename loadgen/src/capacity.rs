//! How much a running service carries: steps up to the knee, a law fitted to them, and the highest rate that meets the
//! objectives, tried in an open loop.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::Failure;
use crate::cpu;
use crate::http::Client;
use crate::interrupt::Interrupt;
use crate::lab::{Admin, Lab};
use crate::plan::{Capacity, Hosts, capacity_table};
use crate::prepare::World;
use crate::print::{aside, table};
use crate::profile::Profile;
use crate::report::Percentiles;
use crate::run::{self, Load, Mode, Outcome};
use crate::scrape::Look;
use crate::threshold::Threshold;
use crate::units;
use crate::usl::Usl;

/// Most callers at a time.
pub const MOST_CALLERS: usize = 512;
/// A step that brings less than this is none.
const GAIN: f64 = 0.04;
/// Open-loop trials: each halves what is left of the search.
const TRIALS: usize = 6;
/// The share of what is due that has to be achieved for a rate to be carried.
const CARRIED: f64 = 0.98;
/// Between two looks at the HSMs.
const LOOK: Duration = Duration::from_millis(100);
/// The share of something's capacity from which on it is what limits.
const LIMITS: f64 = 0.85;

/// What to find out.
pub struct Question<'a> {
    /// The service.
    pub client: Arc<Client>,
    /// Hosts and machines.
    pub world: World,
    /// How load is made; its mode is replaced.
    pub load: Load,
    /// How long each step is.
    pub step: Duration,
    /// What has to hold.
    pub objectives: &'a [Threshold],
    /// The lab, whose daemon tells how its HSMs are, if it runs here.
    pub lab: &'a Lab,
    /// The daemon's metrics address.
    pub metrics: Option<Client>,
    /// HSMs, where the daemon does not tell.
    pub hsms: Option<usize>,
    /// Ends the search.
    pub interrupt: Interrupt,
}

/// What was seen while load ran.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Seen {
    /// Share of all sessions of the HSMs that worked.
    pub sessions_busy: Option<f64>,
    /// Operations that waited for a session.
    pub hsm_waiting: Option<f64>,
    /// Processors that the daemon used.
    pub daemon_processors: Option<f64>,
    /// Releases that waited for their turn, at the end.
    pub queue: Option<f64>,
}

/// A step up.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Step {
    /// Callers at a time in a closed loop; 0 in an open one.
    pub callers: usize,
    /// Releases a second that were due; of a closed loop, that were asked for.
    pub offered: f64,
    /// Releases a second that succeeded.
    pub achieved: f64,
    /// Latency.
    pub latency_seconds: Percentiles,
    /// Share of failures and drops.
    pub errors: f64,
    /// Whether the objectives hold, in a valid run.
    pub holds: bool,
    /// Whether the load generator kept up.
    pub valid: bool,
    /// What was seen meanwhile.
    pub seen: Seen,
}

/// The answer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Answer {
    /// Closed loops with more and more callers.
    pub steps: Vec<Step>,
    /// Open loops at rates around the knee.
    pub trials: Vec<Step>,
    /// The law that fits the steps.
    pub law: Option<Usl>,
    /// Whether the search was interrupted: steps and trials are those that were done, and no capacity follows from them.
    pub interrupted: bool,
    /// With all HSMs, and reckoned with one less.
    pub capacities: Vec<Capacity>,
}

/// Finds out.
///
/// # Errors
/// A service or a metrics address that does not answer.
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
    let points: Vec<_> = steps.iter().map(|step| (step.callers as f64, step.achieved)).collect();
    let law = Usl::fit(&points);
    let most = steps.iter().map(|step| step.achieved).fold(0.0, f64::max);
    if most <= 0.0 && question.interrupt.since().is_none() {
        return Err("no release succeeded; try `claviger-loadgen run` to see why".into());
    }
    // The first trial is where the knee probably is; then by halves.
    let (mut low, mut high, mut rate) = (0.0, most * 1.05, most * 0.85);
    let mut trials: Vec<Step> = Vec::new();
    for _ in 0..TRIALS {
        if question.interrupt.since().is_some() {
            break;
        }
        let Some(trial) = question.step(Mode::Open(Profile::constant(question.step, rate))).await? else { break };
        let holds = trial.holds;
        aside(&format!(
            "{:>7}/s due: {:>7}/s, p99 {}: {}",
            units::per_second(rate),
            units::per_second(trial.achieved),
            units::seconds(trial.latency_seconds.p99),
            if !trial.valid {
                "the generator fell behind"
            } else if holds {
                "the objective holds"
            } else {
                "the objective is missed"
            }
        ));
        trials.push(trial);
        if holds {
            low = rate
        } else {
            high = rate
        }
        rate = f64::midpoint(low, high);
        if high - low < most * 0.02 {
            break;
        }
    }
    if question.interrupt.since().is_some() {
        return Ok(Answer { steps, trials, law, interrupted: true, capacities: Vec::new() });
    }
    let knee = trials.iter().filter(|trial| trial.holds).max_by(|a, b| a.offered.total_cmp(&b.offered));
    let seen = knee.or(trials.first()).map(|trial| trial.seen).unwrap_or_default();
    let busiest =
        steps.iter().max_by(|a, b| a.achieved.total_cmp(&b.achieved)).map(|step| step.seen).unwrap_or_default();
    let all_valid = trials.iter().all(|trial| trial.valid);
    let limit = match limit(&busiest, law.as_ref()) {
        limit if all_valid => limit,
        limit => format!("perhaps the generator itself, which fell behind in some trials; otherwise {limit}"),
    };
    let capacity = |hsms, one_fails, sustainable: f64, limit| Capacity {
        hsms,
        one_fails,
        sustainable,
        ceiling: None,
        boots_a_minute: (sustainable * 60.0).floor(),
        limit,
    };
    let mut capacities = vec![capacity(hsms, false, low, limit)];
    if hsms > 1 {
        // What all HSMs together could do is known from how busy they were; without that, they are what limits.
        let busy = seen.sessions_busy.unwrap_or(1.0).clamp(0.05, 1.0);
        let fewer = (low / busy * (hsms - 1) as f64 / hsms as f64).min(low);
        let limit = format!("the HSMs, which were {} busy at {}/s", units::percent(busy), units::per_second(low));
        capacities.push(capacity(hsms, true, fewer, limit));
    }
    Ok(Answer { steps, trials, law, interrupted: false, capacities })
}

impl Question<'_> {
    async fn hsms(&self) -> Result<usize, Failure> {
        if let Some(metrics) = &self.metrics
            && let Some(hsms) = Look::take(metrics).await?.hsms
        {
            return Ok(hsms);
        }
        let told = self.lab.admin().and_then(|mut admin| admin.hsms());
        Ok(told.map_err(|error| format!("how many HSMs there are is not known ({error}); say it with --hsms N"))?.len())
    }

    /// One step; `None` when it was interrupted, since half a step says little.
    async fn step(&self, mode: Mode) -> Result<Option<Step>, Failure> {
        let callers = if let Mode::Closed { callers, .. } = mode { callers } else { 0 };
        let load = Load { mode, show: false, ..self.load.clone() };
        let looking = Arc::new(AtomicBool::new(true));
        let watch = self.lab.admin().ok().map(|admin| {
            let looking = looking.clone();
            tokio::task::spawn_blocking(move || watch(admin, &looking))
        });
        let daemon = self.lab.daemon().await;
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
        let (offered, achieved) = (tally.offered as f64 / seconds, tally.achieved as f64 / seconds.max(tally.last));
        let errors = tally.unsuccessful();
        let at = |quantile: f64| tally.latency.value_at_quantile(quantile) as f64 / 1e6;
        let valid = outcome.invalid.is_empty();
        let met = self.objectives.iter().all(|objective| objective.holds(at, errors));
        let carried = callers > 0 || achieved >= offered * CARRIED;
        let holds = valid && met && carried && tally.achieved > 0;
        Step {
            callers,
            offered,
            achieved,
            latency_seconds: Percentiles::of(&tally.latency),
            errors,
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

/// How busy the sessions of the members that serve are, and how many operations wait, on average. Blocks.
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
        None => format!("not known: too few steps for a fit{then}"),
    }
}

/// For a person.
#[must_use]
pub fn for_people(answer: &Answer, objectives: &[Threshold], hosts: &Hosts) -> String {
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
        // Writing to a string does not fail.
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
    }
    if answer.interrupted {
        for trial in &answer.trials {
            let verdict = if trial.holds { "holds" } else { "is missed, or the run was invalid" };
            let (due, achieved) = (units::per_second(trial.offered), units::per_second(trial.achieved));
            let _ = writeln!(out, "{due}/s due: {achieved}/s; the objective {verdict}");
        }
        out.push_str("\nINTERRUPTED: these are the steps that were done; no capacity follows from them");
        return out;
    }
    let objectives: Vec<_> = objectives.iter().map(ToString::to_string).collect();
    let _ = writeln!(out, "\nwithin {}:\n", objectives.join(", "));
    let title = |c: &Capacity| match c.one_fails {
        false => format!("{} HSM{}", c.hsms, if c.hsms == 1 { "" } else { "s" }),
        true => format!("{} of {}", c.hsms - 1, c.hsms),
    };
    let titles: Vec<_> = answer.capacities.iter().map(title).collect();
    out.push_str(&capacity_table(&titles, &answer.capacities, hosts));
    let _ = writeln!(out, "\n{}", hosts.stated());
    for (title, capacity) in titles.iter().zip(&answer.capacities) {
        let how = if capacity.one_fails { "reckoned from" } else { "limited by" };
        let _ = writeln!(out, "{title}: {how} {}", capacity.limit);
    }
    out.truncate(out.trim_end().len());
    out
}
