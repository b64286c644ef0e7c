//! What a planned cluster will carry: repeated simulations.

use std::fmt::Write;

use serde::Serialize;

use crate::print::table;
use crate::simulation::{Model, Simulated, simulate};
use crate::threshold::Threshold;
use crate::units;

/// Fewest releases of one simulation: fewer say little about a p99.
const RELEASES: f64 = 20_000.0;
/// Shortest and longest simulation, in seconds. Short ones do not show that a queue grows.
const SECONDS: (f64, f64) = (4.0, 60.0);
/// How close to the highest rate the search comes.
const PRECISION: f64 = 0.01;
/// Most HSMs that are thought about.
const MOST: usize = 64;
/// The share of a bound from which on something is called what limits.
const LIMITS: f64 = 0.85;

/// How many hosts a rate is good for: an assumption, stated wherever it is used.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Hosts {
    /// Releases of a host in a day.
    pub releases_a_day: f64,
    /// How much more than the mean the busiest minute asks for.
    pub peak: f64,
}

impl Hosts {
    /// Hosts that a rate is enough for.
    #[must_use]
    pub fn at(&self, rate: f64) -> f64 {
        (rate * 86_400.0 / (self.releases_a_day * self.peak)).floor()
    }

    /// The assumption in words.
    #[must_use]
    pub fn stated(&self) -> String {
        format!(
            "hosts: assuming {} releases of each a day, and a busiest minute of {} times the mean (--releases-per-day, --peak)",
            self.releases_a_day, self.peak
        )
    }
}

/// What some members carry.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Capacity {
    /// Members.
    pub hsms: usize,
    /// Whether one of them fails throughout.
    pub one_fails: bool,
    /// The highest rate that meets the objectives, in releases a second.
    pub sustainable: f64,
    /// Machines that can boot within a minute at that rate.
    pub boots_a_minute: f64,
    /// What limits.
    pub limit: String,
}

/// A plan.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Plan {
    /// All members, and with one of them failing where there are several.
    pub capacities: Vec<Capacity>,
    /// At the target: p50, p99 in seconds, share of failures, whether the objectives hold.
    pub at_target: Option<Target>,
}

/// What happens at the rate that is wanted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Target {
    /// Releases a second.
    pub rate: f64,
    /// Median latency, in seconds.
    pub p50: f64,
    /// 99th percentile, in seconds.
    pub p99: f64,
    /// Share of releases that fail.
    pub errors: f64,
    /// Whether the objectives hold.
    pub holds: bool,
    /// HSMs that it takes; `None` when 64 are not enough.
    pub hsms: Option<usize>,
    /// HSMs that it takes while one of them fails.
    pub hsms_with_spare: Option<usize>,
}

/// Whether a simulation meets the objectives.
fn holds(simulated: &Simulated, objectives: &[Threshold]) -> bool {
    !simulated.latencies.is_empty()
        && objectives
            .iter()
            .all(|objective| objective.holds(|quantile| simulated.latency(quantile), simulated.errors()))
}

fn ask(model: &Model, rate: f64, one_fails: bool) -> Simulated {
    simulate(model, rate, (RELEASES / rate).clamp(SECONDS.0, SECONDS.1), one_fails)
}

/// The highest rate that meets the objectives, and what limits there.
#[must_use]
pub fn capacity(model: &Model, objectives: &[Threshold], one_fails: bool) -> Capacity {
    let serving = Model { hsms: model.hsms - usize::from(one_fails), ..*model };
    let (mut low, mut high) = (0.0, serving.ceiling());
    let mut best = None;
    while high - low > high * PRECISION {
        let rate = f64::midpoint(low, high);
        let simulated = ask(model, rate, one_fails);
        if holds(&simulated, objectives) {
            (low, best) = (rate, Some(simulated));
        } else {
            high = rate;
        }
        // Below a thousandth of the ceiling nothing is worth finding.
        if high < serving.ceiling() / 1000.0 {
            break;
        }
    }
    let limit = match &best {
        None => "the objective: one release alone takes longer".to_owned(),
        Some(at) => limit(&serving, at),
    };
    Capacity { hsms: model.hsms, one_fails, sustainable: low, boots_a_minute: (low * 60.0).floor(), limit }
}

fn limit(model: &Model, at: &Simulated) -> String {
    let busiest = [
        (at.engines_busy, "HSM operations: more or faster HSMs carry more"),
        (at.sessions_busy, "sessions: they wait for the network and the HSM; more sessions carry more"),
        (at.processors_busy, "the daemon's processors"),
    ];
    // A session waits while its operation waits for an engine: busy engines explain busy sessions, not the reverse.
    let bound = busiest.iter().find(|(busy, _)| *busy >= LIMITS);
    match bound {
        Some((busy, what)) => format!("{what} ({} busy)", units::percent(*busy)),
        None => {
            let (busy, _) = busiest[0];
            format!(
                "the objective: queues grow too long while HSMs are {} busy (ceiling {}/s)",
                units::percent(busy),
                units::per_second(model.ceiling())
            )
        }
    }
}

/// The fewest members that carry a rate; `None` when 64 do not.
fn needed(model: &Model, objectives: &[Threshold], rate: f64, one_fails: bool) -> Option<usize> {
    let spare = usize::from(one_fails);
    // The ceiling needs no simulation.
    let least = (1..=MOST).find(|hsms| Model { hsms: *hsms, ..*model }.ceiling() >= rate)? + spare;
    let carries = |hsms: usize| holds(&ask(&Model { hsms, ..*model }, rate, one_fails), objectives);
    (least..=MOST).take(16).find(|hsms| carries(*hsms))
}

/// Answers for a cluster and, if there is one, a rate that is wanted.
#[must_use]
pub fn plan(model: &Model, objectives: &[Threshold], target: Option<f64>) -> Plan {
    let mut capacities = vec![capacity(model, objectives, false)];
    if model.hsms > 1 {
        capacities.push(capacity(model, objectives, true));
    }
    let at_target = target.map(|rate| {
        let simulated = ask(model, rate, false);
        Target {
            rate,
            p50: simulated.latency(0.5),
            p99: simulated.latency(0.99),
            errors: simulated.errors(),
            holds: holds(&simulated, objectives),
            hsms: needed(model, objectives, rate, false),
            hsms_with_spare: needed(model, objectives, rate, true),
        }
    });
    Plan { capacities, at_target }
}

/// The table of capacities.
#[must_use]
pub fn capacity_table(titles: &[String], capacities: &[Capacity], hosts: &Hosts) -> String {
    let row = |name: &str, value: &dyn Fn(&Capacity) -> String| {
        std::iter::once(name.to_owned()).chain(capacities.iter().map(value)).collect::<Vec<_>>()
    };
    table(&[
        std::iter::once(String::new()).chain(titles.iter().cloned()).collect(),
        row("sustainable releases/s", &|c| units::per_second(c.sustainable)),
        row("machines bootable in 60 s", &|c| units::count(c.boots_a_minute)),
        row("hosts", &|c| units::count(hosts.at(c.sustainable))),
    ])
}

/// For a person.
#[must_use]
pub fn for_people(model: &Model, objectives: &[Threshold], plan: &Plan, hosts: &Hosts) -> String {
    let mut out = String::new();
    let objectives: Vec<_> = objectives.iter().map(ToString::to_string).collect();
    let own = if model.own_cost > 0.0 {
        format!("{} of {} processors for a release", units::seconds(model.own_cost), model.processors)
    } else {
        "the daemon's own cost left out (--own-cost)".to_owned()
    };
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{} HSMs, each {} operations/s ({} at a time, {} each), {} sessions, {} away; two operations a release; {own}\n\
         objective {}; hard ceiling {} releases/s\n",
        model.hsms,
        units::count(model.hsm_rate),
        model.engines(),
        units::seconds(model.engine_time()),
        model.sessions,
        units::seconds(model.rtt),
        objectives.join(", "),
        units::per_second(model.ceiling()),
    );
    let title = |c: &Capacity| match c.one_fails {
        false => format!("{} HSMs", c.hsms),
        true => format!("{} of {} serving", c.hsms - 1, c.hsms),
    };
    let titles: Vec<_> = plan.capacities.iter().map(title).collect();
    out.push_str(&capacity_table(&titles, &plan.capacities, hosts));
    let _ = writeln!(out, "\n{}", hosts.stated());
    for (title, capacity) in titles.iter().zip(&plan.capacities) {
        let _ = writeln!(out, "{title}: limited by {}", capacity.limit);
    }
    if let Some(target) = &plan.at_target {
        let rate = units::per_second(target.rate);
        let verdict = if target.holds { "the objective holds" } else { "the objective is MISSED" };
        let _ = writeln!(
            out,
            "\nat {rate}/s: p50 {}, p99 {}, {} fail: {verdict}",
            units::seconds(target.p50),
            units::seconds(target.p99),
            units::percent(target.errors)
        );
        let number = |hsms: Option<usize>| hsms.map_or("more than can be reckoned".to_owned(), |hsms| hsms.to_string());
        let _ = writeln!(
            out,
            "it takes {} HSMs, and {} so that one may fail",
            number(target.hsms),
            number(target.hsms_with_spare)
        );
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::threshold::list;

    const MODEL: Model = Model { sessions: 4, hsm_rate: 500.0, op_time: 0.004, ..crate::simulation::tests::MODEL };

    fn sustainable(model: Model) -> f64 {
        capacity(&model, &list("p99<100ms,errors<0.1%").unwrap(), false).sustainable
    }

    #[test]
    fn more_of_anything_never_carries_less() {
        let base = sustainable(MODEL);
        // The search and the lots leave a few percent.
        let at_least = |model: Model, what: &str| {
            let better = sustainable(model);
            assert!(better >= base * 0.97, "{what}: {better} after {base}");
            better
        };
        let three = at_least(Model { hsms: 3, ..MODEL }, "a third HSM");
        assert!((1.35..1.65).contains(&(three / base)), "{three} after {base}");
        at_least(Model { sessions: 8, ..MODEL }, "more sessions");
        at_least(Model { rtt: 0.0002, ..MODEL }, "a shorter way");
        let faster = at_least(Model { hsm_rate: 1000.0, op_time: 0.002, ..MODEL }, "faster HSMs");
        assert!(faster > base * 1.5, "{faster} after {base}");
        assert!(base <= MODEL.ceiling() && base > 0.6 * MODEL.ceiling(), "{base} of {}", MODEL.ceiling());
        let slow = capacity(&MODEL, &list("p99<3ms").unwrap(), false);
        assert!(slow.sustainable < base && slow.limit.contains("one release alone"), "{slow:?}");
    }

    #[test]
    fn one_less_carries_less_and_a_target_says_how_many_it_takes() {
        let objectives = list("p99<100ms,errors<0.1%").unwrap();
        let plan = plan(&MODEL, &objectives, Some(900.0));
        let [all, fewer] = plan.capacities.as_slice() else { panic!("{plan:?}") };
        assert!((0.4..0.6).contains(&(fewer.sustainable / all.sustainable)), "{plan:?}");
        assert!(all.limit.contains("HSM operations"), "{plan:?}");
        let target = plan.at_target.as_ref().unwrap();
        assert!(!target.holds);
        let (without, with) = (target.hsms.unwrap(), target.hsms_with_spare.unwrap());
        assert!((4..=5).contains(&without) && with == without + 1, "{target:?}");
        let text = for_people(&MODEL, &objectives, &plan, &Hosts { releases_a_day: 100.0, peak: 10.0 });
        assert!(text.contains("it takes") && text.contains("1 of 2 serving"), "{text}");
    }
}
