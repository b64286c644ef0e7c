//! Estimates the load that a planned cluster will carry, from repeated simulations.

use std::fmt::Write;

use serde::Serialize;

use crate::about::About;
use crate::bound::{Bound, stated};
use crate::print::table;
use crate::simulation::{Model, Simulated, saturated, simulate};
use crate::threshold::{Threshold, is_known};
use crate::units;

/// Loads to simulate, as shares of the cluster's maximum. Above the last one the plan makes no promise, because a queue
/// takes very long to reach a stable length there.
const LOADS: [f64; 14] = [0.01, 0.05, 0.25, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.965, 0.98, 0.99];
/// Number of releases that are simulated at each load. Fewer releases say little about a p99.9.
const RELEASES: f64 = 20_000.0;
/// Share of these releases that is enough at low loads, where times vary little.
const FEWER: f64 = 0.25;
/// Near the maximum, a queue needs `1 ÷ (1 − load)²` releases to reach a stable length. The simulation runs this many
/// times as many, in place of [`RELEASES`].
const RELAXATIONS: f64 = 5.0;
/// Precision of the search for the highest rate, as a share of the cluster's maximum.
const PRECISION: f64 = 0.001;
/// Largest number of HSMs that a plan considers.
const MOST: usize = 64;
/// A resource that is used beyond this share of its bound counts as the limit.
const LIMITS: f64 = 0.85;

/// The assumption that turns a rate into a number of hosts. Every report that uses it states it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Hosts {
    /// Releases of one host in a day.
    pub releases_a_day: f64,
    /// Ratio of the busiest minute to the mean.
    pub peak: f64,
}

impl Hosts {
    /// The number of hosts for which a rate is sufficient.
    #[must_use]
    pub fn at(&self, rate: f64) -> f64 {
        (rate * 86_400.0 / (self.releases_a_day * self.peak)).floor()
    }

    /// The assumption as text.
    #[must_use]
    pub(crate) fn stated(&self) -> String {
        format!(
            "hosts: assuming {} releases of each a day, and a busiest minute of {} times the mean (--releases-per-day, --peak)",
            self.releases_a_day, self.peak
        )
    }
}

/// The capacity of a number of members.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Capacity {
    /// Number of members.
    pub hsms: usize,
    /// `true` if one of the members fails all the time.
    pub one_fails: bool,
    /// The highest rate that meets the objectives, in releases a second.
    pub sustainable: f64,
    /// The largest number of releases a second that succeed when releases always wait, at any latency; `None` if
    /// unknown.
    pub ceiling: Option<f64>,
    /// Number of virtual machines that can boot within a minute at the sustainable rate.
    pub boots_a_minute: f64,
    /// The resource that limits the rate.
    pub limit: String,
}

impl Capacity {
    /// A title that names the members.
    #[must_use]
    pub fn title(&self) -> String {
        match self.one_fails {
            false => format!("{} HSM{}", self.hsms, if self.hsms == 1 { "" } else { "s" }),
            true => format!("{} of {} serving", self.hsms - 1, self.hsms),
        }
    }
}

/// The result of a plan.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Plan {
    /// The plan's command line and machine.
    pub about: Option<About>,
    /// The model of the cluster.
    pub model: Model,
    /// The objectives that a rate must meet.
    pub objectives: Vec<Bound>,
    /// The capacity of all members. If there are several, also the capacity while one of them fails.
    pub capacities: Vec<Capacity>,
    /// The simulated loads of each entry in `capacities`.
    pub curves: Vec<Vec<Point>>,
    /// The prediction for the wanted rate, if one was given.
    pub at_target: Option<Target>,
}

/// The result of one simulated load.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Point {
    /// Releases a second.
    pub rate: f64,
    /// `true` if the queues have a stable length.
    pub steady: bool,
    /// Median latency, in seconds; `None` if failures hide it.
    pub p50: Option<f64>,
    /// 99th percentile of the latency, in seconds; `None` if failures hide it.
    pub p99: Option<f64>,
    /// Share of the releases that fail.
    pub errors: f64,
}

/// The prediction for the wanted rate.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Target {
    /// Releases a second.
    pub rate: f64,
    /// `true` if the cluster carries the rate. Otherwise there is no steady state: the queue grows until it is full.
    pub steady: bool,
    /// Median latency, in seconds; `None` without a steady state, or if failures hide it.
    pub p50: Option<f64>,
    /// 99th percentile of the latency, in seconds; `None` in the same cases.
    pub p99: Option<f64>,
    /// Share of the releases that fail. Without a steady state, the smallest share in the long run.
    pub errors: f64,
    /// Without a steady state: the wait of the releases that are served once the queue is full, in seconds.
    pub waits: Option<f64>,
    /// `true` if the objectives hold.
    pub holds: bool,
    /// Number of HSMs that the rate needs; `None` if 64 are not enough.
    pub hsms: Option<usize>,
    /// Number of HSMs that the rate needs while one of them fails; `None` if 64 are not enough.
    pub hsms_with_spare: Option<usize>,
}

impl Target {
    /// The prediction as text.
    #[must_use]
    pub(crate) fn stated(&self, ceiling: f64) -> String {
        let (rate, most) = (units::per_second(self.rate), units::per_second(ceiling));
        let known = |time: Option<f64>| time.map_or("not known".to_owned(), units::seconds);
        let fails = units::percent(self.errors);
        match self.waits {
            None => {
                let verdict = if self.holds { "the objective holds" } else { "the objective is MISSED" };
                format!("at {rate}/s: p50 {}, p99 {}, {fails} fail: {verdict}", known(self.p50), known(self.p99))
            }
            Some(waits) if self.rate > ceiling => format!(
                "at {rate}/s: OVERLOAD: at most {most}/s are served, so in the long run {fails} fail or more, and those that \
                 are served wait {} once the queue is full: the objective is MISSED",
                units::seconds(waits)
            ),
            Some(_) => format!(
                "at {rate}/s: so near to the most that can be done ({most}/s) that queues have no length they keep to: the \
                 objective is MISSED"
            ),
        }
    }
}

/// Simulated loads of one cluster, from idle to nearly saturated. Values between two loads are interpolated. A value
/// that is worse at a lower load also applies to the higher loads. So all results about one cluster are consistent, and
/// a higher rate never looks better.
#[derive(Clone, Debug)]
pub struct Curve {
    serving: Model,
    ceiling: f64,
    points: Vec<(f64, Simulated)>,
}

impl Curve {
    /// Simulates loads up to the first one that is at least `up_to`, with `releases` releases at each.
    fn new(model: &Model, one_fails: bool, up_to: f64, releases: f64) -> Self {
        let serving = Model { hsms: model.hsms - usize::from(one_fails), ..*model };
        let ceiling = saturated(model, releases, one_fails);
        let mut points = Vec::new();
        for load in LOADS {
            let rate = ceiling * load;
            let share = if load < 0.6 { FEWER } else { 1.0 };
            let relaxations = RELAXATIONS * releases / RELEASES;
            let enough = (releases * share).max(relaxations / (1.0 - load).powi(2));
            let simulated = simulate(model, rate, enough, one_fails);
            let done = !simulated.steady || rate >= up_to;
            if simulated.steady {
                points.push((rate, simulated));
            }
            if done {
                break;
            }
        }
        Self { serving, ceiling, points }
    }

    /// The highest rate with a steady state.
    fn edge(&self) -> f64 {
        self.points.last().map_or(0.0, |(rate, _)| *rate)
    }

    /// Computes a value at a rate up to the edge. Values between two loads are interpolated. Below the first load, the
    /// value of the first load applies.
    fn at(&self, rate: f64, value: impl Fn(&Simulated) -> f64) -> f64 {
        let mut before: Option<(f64, f64)> = None;
        for (at, simulated) in &self.points {
            let worst = value(simulated).max(before.map_or(0.0, |(_, value)| value));
            match before {
                _ if *at < rate => {}
                None => return worst,
                Some((from, low)) => return low + (worst - low) * (rate - from) / (at - from),
            }
            before = Some((*at, worst));
        }
        before.map_or(f64::INFINITY, |(_, worst)| worst)
    }

    fn errors(&self, rate: f64) -> f64 {
        self.at(rate, Simulated::errors)
    }

    /// Latency at a quantile; `None` if failures hide it, or without a steady state.
    fn latency(&self, rate: f64, quantile: f64) -> Option<f64> {
        let known = rate <= self.edge() && is_known(quantile, self.errors(rate));
        known.then(|| self.at(rate, |simulated| simulated.latency(quantile)))
    }

    /// `true` if the objectives hold at a rate. Without a steady state they never hold.
    fn holds(&self, rate: f64, objectives: &[Threshold]) -> bool {
        let at = |quantile| self.at(rate, |simulated: &Simulated| simulated.latency(quantile));
        rate <= self.edge() && objectives.iter().all(|objective| objective.holds(at, self.errors(rate)))
    }

    /// The highest rate at which the objectives hold; 0 if there is none.
    fn sustainable(&self, objectives: &[Threshold]) -> f64 {
        let (mut low, mut high) = (0.0, self.edge());
        if self.holds(high, objectives) {
            return high;
        }
        while high - low > self.ceiling * PRECISION {
            let rate = f64::midpoint(low, high);
            if self.holds(rate, objectives) { low = rate } else { high = rate }
        }
        // Nothing is known below the lowest simulated load.
        if self.points.first().is_some_and(|(lowest, _)| low >= *lowest) { low } else { 0.0 }
    }

    fn capacity(&self, hsms: usize, one_fails: bool, objectives: &[Threshold]) -> Capacity {
        let sustainable = self.sustainable(objectives);
        let limit = match self.points.iter().rev().find(|(rate, _)| *rate <= sustainable) {
            None => "the objective: one release alone takes longer".to_owned(),
            Some((_, at)) => limit(at, self.ceiling),
        };
        let boots_a_minute = (sustainable * 60.0).floor();
        Capacity { hsms, one_fails, sustainable, ceiling: Some(self.ceiling), boots_a_minute, limit }
    }

    fn target(&self, rate: f64, objectives: &[Threshold]) -> Target {
        let steady = rate <= self.edge();
        // In the long run, the successes cannot exceed the ceiling.
        let errors = self.errors(rate.min(self.edge())).max(1.0 - self.ceiling / rate).min(1.0);
        Target {
            rate,
            steady,
            p50: self.latency(rate, 0.5),
            p99: self.latency(rate, 0.99),
            errors,
            waits: (!steady).then(|| self.serving.longest_wait(self.ceiling)),
            holds: self.holds(rate, objectives),
            hsms: None,
            hsms_with_spare: None,
        }
    }

    fn points(&self) -> Vec<Point> {
        let point = |rate| {
            let (p50, p99) = (self.latency(rate, 0.5), self.latency(rate, 0.99));
            Point { rate, steady: true, p50, p99, errors: self.errors(rate) }
        };
        self.points.iter().map(|(rate, _)| point(*rate)).collect()
    }
}

fn limit(at: &Simulated, ceiling: f64) -> String {
    let busiest = [
        (at.engines_busy, "HSM operations: more or faster HSMs carry more"),
        (at.sessions_busy, "sessions: they wait for the network and the HSM; more sessions carry more"),
        (at.processors_busy, "the daemon's processors"),
    ];
    // A session is also busy while its operation waits for an engine. So busy engines explain busy sessions, but not
    // the reverse.
    let bound = busiest.iter().find(|(busy, _)| *busy >= LIMITS);
    match bound {
        Some((busy, what)) => format!("{what} ({} busy)", units::percent(*busy)),
        None => {
            let (busy, _) = busiest[0];
            format!(
                "the objective: queues grow too long while HSMs are {} busy (ceiling {}/s)",
                units::percent(busy),
                units::per_second(ceiling)
            )
        }
    }
}

/// The smallest number of members that carries a rate; `None` if 64 do not.
fn needed(model: &Model, objectives: &[Threshold], rate: f64, one_fails: bool, releases: f64) -> Option<usize> {
    let spare = usize::from(one_fails);
    // A number of members that the ceiling excludes needs no simulation.
    let least = (1..=MOST).find(|hsms| Model { hsms: *hsms, ..*model }.ceiling() >= rate)? + spare;
    for hsms in least..=MOST {
        let curve = Curve::new(&Model { hsms, ..*model }, one_fails, rate, releases);
        if curve.holds(rate, objectives) {
            return Some(hsms);
        }
        if curve.points.first().is_none_or(|(idle, _)| !curve.holds(*idle, objectives)) {
            // If a single release misses an objective, more members do not help.
            return None;
        }
    }
    None
}

/// Plans a cluster and, if `target` is given, predicts the wanted rate.
#[must_use]
pub fn plan(model: &Model, objectives: &[Threshold], target: Option<f64>) -> Plan {
    planned(model, objectives, target, RELEASES)
}

pub(crate) fn planned(model: &Model, objectives: &[Threshold], target: Option<f64>, releases: f64) -> Plan {
    let kinds = if model.hsms > 1 { &[false, true][..] } else { &[false] };
    let curves: Vec<_> =
        kinds.iter().map(|fails| (*fails, Curve::new(model, *fails, f64::INFINITY, releases))).collect();
    let at_target = target.map(|rate| Target {
        hsms: needed(model, objectives, rate, false, releases),
        hsms_with_spare: needed(model, objectives, rate, true, releases),
        ..curves[0].1.target(rate, objectives)
    });
    Plan {
        about: None,
        model: *model,
        objectives: objectives.iter().map(Threshold::bound).collect(),
        capacities: curves.iter().map(|(fails, curve)| curve.capacity(model.hsms, *fails, objectives)).collect(),
        curves: curves.iter().map(|(_, curve)| curve.points()).collect(),
        at_target,
    }
}

/// Formats capacities as a table.
#[must_use]
pub(crate) fn capacity_table(titles: &[String], capacities: &[Capacity], hosts: &Hosts) -> String {
    let row = |name: &str, value: &dyn Fn(&Capacity) -> String| {
        std::iter::once(name.to_owned()).chain(capacities.iter().map(value)).collect::<Vec<_>>()
    };
    table(&[
        std::iter::once(String::new()).chain(titles.iter().cloned()).collect(),
        row("sustainable releases/s", &|c| units::per_second(c.sustainable)),
        row("at most, whatever the latency", &|c| c.ceiling.map_or("not known".to_owned(), units::per_second)),
        row("machines bootable in 60 s", &|c| units::count(c.boots_a_minute)),
        row("hosts", &|c| units::count(hosts.at(c.sustainable))),
    ])
}

/// The plan as text.
#[must_use]
pub fn for_people(plan: &Plan, hosts: &Hosts) -> String {
    let mut out = String::new();
    let model = &plan.model;
    let own = if model.own_cost > 0.0 {
        format!("{} of {} processors for a release", units::seconds(model.own_cost), model.processors)
    } else {
        "the daemon's own cost left out (--own-cost)".to_owned()
    };
    // A write to a string cannot fail.
    let _ = writeln!(
        out,
        "{} HSMs, each {} operations/s ({} at a time, {} each), {} sessions, {} away; two operations a release; {own}\n\
         objective {}; by these numbers at most {} releases/s\n",
        model.hsms,
        units::count(model.hsm_rate),
        model.engines(),
        units::seconds(model.engine_time()),
        model.sessions,
        units::seconds(model.rtt),
        stated(&plan.objectives),
        units::per_second(model.ceiling()),
    );
    let titles: Vec<_> = plan.capacities.iter().map(Capacity::title).collect();
    out.push_str(&capacity_table(&titles, &plan.capacities, hosts));
    let _ = writeln!(out, "\n{}", hosts.stated());
    for (title, capacity) in titles.iter().zip(&plan.capacities) {
        let _ = writeln!(out, "{title}: limited by {}", capacity.limit);
    }
    if let Some(target) = &plan.at_target {
        let _ = writeln!(out, "\n{}", target.stated(plan.capacities[0].ceiling.unwrap_or(0.0)));
        let number =
            |hsms: Option<usize>| hsms.map_or("more than can be estimated".to_owned(), |hsms| hsms.to_string());
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
    use proptest::prelude::*;

    const MODEL: Model = Model { sessions: 4, hsm_rate: 500.0, op_time: 0.004, ..crate::simulation::tests::MODEL };
    /// Number of releases at each load: enough for these tests, in less time.
    const FEW: f64 = 2_000.0;

    fn objectives() -> Vec<Threshold> {
        list("p99<100ms,errors<0.1%").unwrap()
    }

    fn sustainable(model: Model) -> f64 {
        planned(&model, &objectives(), None, FEW).capacities[0].sustainable
    }

    #[test]
    fn more_of_anything_never_carries_less() {
        let base = sustainable(MODEL);
        // The random numbers leave an error of a few percent.
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
        let slow = &planned(&MODEL, &list("p99<3ms").unwrap(), Some(10.0), FEW);
        assert!(slow.capacities[0].limit.contains("one release alone"), "{slow:?}");
        assert_eq!((slow.capacities[0].sustainable, slow.at_target.as_ref().unwrap().hsms), (0.0, None));
    }

    #[test]
    fn one_less_carries_less_and_a_target_says_how_many_it_takes() {
        let plan = planned(&MODEL, &objectives(), Some(900.0), FEW);
        let [all, fewer] = plan.capacities.as_slice() else { panic!("{plan:?}") };
        assert!((0.4..0.6).contains(&(fewer.sustainable / all.sustainable)), "{plan:?}");
        assert!(all.limit.contains("HSM operations"), "{plan:?}");
        let target = plan.at_target.as_ref().unwrap();
        assert!(!target.holds);
        let (without, with) = (target.hsms.unwrap(), target.hsms_with_spare.unwrap());
        assert!((4..=5).contains(&without) && with == without + 1, "{target:?}");
        let text = for_people(&plan, &Hosts { releases_a_day: 100.0, peak: 10.0 });
        assert!(text.contains("it takes") && text.contains("1 of 2 serving"), "{text}");
    }

    #[test]
    fn overload_is_called_overload() {
        // Four HSMs with 1,100 operations a second each carry 2,200 releases a second, however long an operation takes.
        let model = Model { hsms: 4, sessions: 8, hsm_rate: 1100.0, op_time: 1.0 / 1100.0, ..MODEL };
        let curve = Curve::new(&model, false, f64::INFINITY, FEW);
        for slo in ["p99<2s,errors<30%", "p50<1h", "errors<50%"] {
            let objectives = list(slo).unwrap();
            assert!(curve.sustainable(&objectives) <= 2_200.0, "{slo}");
            for rate in [2_201.0, 2_500.0, 3_000.0] {
                let target = curve.target(rate, &objectives);
                assert!(!target.holds && !target.steady, "{slo} at {rate}: {target:?}");
                assert_eq!((target.p50, target.p99), (None, None), "{slo} at {rate}");
                assert!(target.errors >= 1.0 - 2_200.0 / rate, "{target:?}");
            }
        }
        let plan = planned(&model, &objectives(), Some(3_000.0), FEW);
        let text = for_people(&plan, &Hosts { releases_a_day: 100.0, peak: 10.0 });
        assert!(text.contains("OVERLOAD: at most 2") && !text.contains("holds"), "{text}");
        assert!(text.contains("it takes 6 HSMs, and 7 so that one may fail"), "{text}");
    }

    #[test]
    fn what_is_said_to_hold_holds_in_a_longer_simulation() {
        for model in [MODEL, Model { hsms: 1, own_cost: 0.001, ..MODEL }, Model { sessions: 1, rtt: 0.02, ..MODEL }] {
            let rate = planned(&model, &objectives(), None, RELEASES / 2.0).capacities[0].sustainable * 0.99;
            let longer = simulate(&model, rate, RELEASES * 3.0, false);
            assert!(longer.steady && longer.errors() < 0.001, "{model:?} at {rate}");
            // Near the edge, the percentiles of two simulations differ by a few percent.
            assert!(longer.latency(0.99) < 0.115, "{model:?} at {rate}: {}", longer.latency(0.99));
        }
    }

    fn models() -> impl Strategy<Value = Model> {
        let numbers = (1..9_usize, 1..13_usize, 20.0..3_000.0_f64, 1.0..9.0_f64);
        let rest = (0.0..0.05_f64, 0.0..0.01_f64, 1..9_usize, 1..5_000_usize, 0.1..6.0_f64);
        (numbers, rest).prop_map(
            |((hsms, sessions, hsm_rate, engines), (rtt, own_cost, processors, queue, deadline))| {
                let own_cost = if own_cost < 0.005 { 0.0 } else { own_cost - 0.005 };
                Model {
                    hsms,
                    sessions,
                    hsm_rate,
                    op_time: engines / hsm_rate,
                    rtt,
                    own_cost,
                    processors,
                    queue,
                    deadline,
                }
            },
        )
    }

    fn wanted() -> impl Strategy<Value = Vec<Threshold>> {
        let quantile = proptest::sample::select(vec!["p50", "p90", "p99", "p99.9", "max", "service.p99"]);
        let latency = (quantile, 1..10_000_u32).prop_map(|(quantile, ms)| format!("{quantile}<{ms}ms"));
        let errors = (1..1_000_u32).prop_map(|share| format!("errors<{}%", f64::from(share) / 10.0));
        (latency, errors, 0..3_u8).prop_map(|(latency, errors, which)| {
            let text = [format!("{latency},{errors}"), latency, errors][usize::from(which)].clone();
            list(&text).unwrap()
        })
    }

    proptest! {
        // PROPTEST_CASES sets the number of plans; see docs/load.md.
        #![proptest_config(ProptestConfig {
            cases: std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64),
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn no_plan_holds_beyond_the_ceiling_and_a_higher_rate_never_looks_better(
            model in models(),
            objectives in wanted(),
            loads in proptest::collection::vec(0.02..2.5_f64, 6),
            one_fails: bool,
        ) {
            let one_fails = one_fails && model.hsms > 1;
            let serving = (model.hsms - usize::from(one_fails)) as f64;
            // These bounds are computed independently of the tested code: operations a second of engines and sessions,
            // two operations for each release.
            let engines = (model.hsm_rate * model.op_time).round().max(1.0);
            let by_sessions = model.sessions as f64 / (model.rtt + engines / model.hsm_rate);
            let by_processors =
                if model.own_cost > 0.0 { model.processors as f64 / model.own_cost } else { f64::INFINITY };
            let most = (serving * model.hsm_rate.min(by_sessions) / 2.0).min(by_processors);

            let curve = Curve::new(&model, one_fails, f64::INFINITY, 300.0);
            let capacity = curve.capacity(model.hsms, one_fails, &objectives);
            prop_assert!(capacity.sustainable <= most, "{capacity:?} of {most}");
            let mut loads = loads;
            loads.sort_by(f64::total_cmp);
            let targets: Vec<_> = loads.iter().map(|load| curve.target(load * most, &objectives)).collect();
            for target in &targets {
                prop_assert!(!(target.holds && target.rate > most), "{target:?} holds beyond {most}");
                prop_assert!(!(target.steady && target.rate > most), "{target:?} is steady beyond {most}");
                prop_assert!(!target.holds || target.steady);
                // The search ends one thousandth below the highest rate that holds.
                let over = target.rate > capacity.sustainable + most * PRECISION;
                prop_assert!(!(target.holds && over), "{target:?} holds beyond {capacity:?}");
                if target.rate > most {
                    prop_assert!(target.errors >= 1.0 - most / target.rate - 1e-9, "{target:?} of {most}");
                    prop_assert!((target.p50, target.p99) == (None, None) && target.waits.is_some());
                }
            }
            for pair in targets.windows(2) {
                let [lower, higher] = pair else { unreachable!() };
                prop_assert!(!higher.holds || lower.holds, "{lower:?} and {higher:?}");
                prop_assert!(!higher.steady || lower.steady, "{lower:?} and {higher:?}");
                prop_assert!(higher.errors >= lower.errors, "{lower:?} and {higher:?}");
                for (low, high) in [(lower.p50, higher.p50), (lower.p99, higher.p99)] {
                    // A percentile that is unknown at a lower rate is also unknown at a higher rate.
                    let worse = high.is_none_or(|high| low.is_some_and(|low| high >= low));
                    prop_assert!(worse, "{lower:?} and {higher:?}");
                }
            }
        }
    }
}
