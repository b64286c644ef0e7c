//! The HTML page of a plan.

use super::page::{NONE, document, escape, facts, latency_bounds, legend, section, table, tile, tiles, title_or};
use super::picture::{Frame, count_axis_x, decades, time_axis};
use crate::bound::stated;
use crate::plan::{Hosts, Plan, Point};
use crate::units;

/// Formats the page of a plan.
#[must_use]
pub fn page(plan: &Plan, hosts: &Hosts) -> String {
    let objectives = stated(&plan.objectives);
    let otherwise =
        format!("Plan: {} within {objectives}", plan.capacities.first().map_or(String::new(), |c| c.title()));
    let title = title_or(plan.about.as_ref(), &otherwise);
    let what = "estimated by a simulation of the daemon's own policies; nothing was measured";
    let mut all = Vec::new();
    for capacity in &plan.capacities {
        let rate = format!("{}/s", units::per_second(capacity.sustainable));
        all.push(tile(&format!("sustainable, {}", capacity.title()), &rate, ""));
    }
    if let Some(all_serve) = plan.capacities.first() {
        let most = all_serve.ceiling.map_or("not known".to_owned(), |most| format!("{}/s", units::per_second(most)));
        all.push(tile("at most, whatever the latency", &most, ""));
        all.push(tile("hosts", &units::count(hosts.at(all_serve.sustainable)), ""));
    }
    if let Some(target) = &plan.at_target {
        let (verdict, class) = match (target.holds, target.steady) {
            (true, _) => ("holds", "good"),
            (false, true) => ("missed", "bad"),
            (false, false) => ("overload", "bad"),
        };
        all.push(tile(&format!("at {}/s", units::per_second(target.rate)), verdict, class));
    }
    let mut body = tiles(&all);
    if let Some(target) = &plan.at_target {
        let ceiling = plan.capacities.first().and_then(|capacity| capacity.ceiling).unwrap_or(0.0);
        let number =
            |hsms: Option<usize>| hsms.map_or("more than can be estimated".to_owned(), |hsms| hsms.to_string());
        body.push_str(&format!(
            "<p class=\"note\">{}. It takes {} HSMs, and {} so that one may fail.</p>\n",
            escape(&target.stated(ceiling)),
            number(target.hsms),
            number(target.hsms_with_spare)
        ));
    }
    body.push_str(&section(
        "Latency over load",
        "median and 99th percentile, by releases a second; the lines end where queues have no length that they keep to; logarithmic",
        &picture(plan),
    ));
    let mut rows = vec![std::iter::once(String::new()).chain(plan.capacities.iter().map(|c| c.title())).collect()];
    let mut row = |name: &str, value: &dyn Fn(&crate::plan::Capacity) -> String| {
        rows.push(std::iter::once(name.to_owned()).chain(plan.capacities.iter().map(value)).collect());
    };
    row("sustainable releases a second", &|c| units::per_second(c.sustainable));
    row("at most, whatever the latency", &|c| c.ceiling.map_or("not known".to_owned(), units::per_second));
    row("machines bootable in 60 s", &|c| units::count(c.boots_a_minute));
    row("hosts", &|c| units::count(hosts.at(c.sustainable)));
    row("limited by", &|c| escape(&c.limit));
    let assumption = format!("<p class=\"soft note\">{}</p>", escape(&hosts.stated()));
    body.push_str(&section("Capacity", &escape(&format!("within {objectives}")), &(table(&rows) + &assumption)));
    let model = &plan.model;
    let mut told = vec![
        ["objective".to_owned(), objectives],
        [
            "HSMs".to_owned(),
            format!("{}, {} sessions each, {} away", model.hsms, model.sessions, units::seconds(model.rtt)),
        ],
        [
            "each does".to_owned(),
            format!(
                "{} operations a second: {} at a time, {} each; a release is two",
                units::count(model.hsm_rate),
                model.engines(),
                units::seconds(model.engine_time())
            ),
        ],
        [
            "daemon".to_owned(),
            if model.own_cost > 0.0 {
                format!("{} of {} processors for a release", units::seconds(model.own_cost), model.processors)
            } else {
                "its own processor time is left out (--own-cost)".to_owned()
            },
        ],
        [
            "admission".to_owned(),
            format!(
                "{} releases run at a time, {} wait at most, deadline {}",
                model.concurrency(),
                units::count(model.queue as f64),
                units::seconds(model.deadline)
            ),
        ],
    ];
    told.extend(plan.about.iter().flat_map(|about| about.facts(false)));
    body.push_str(&section("What was asked", "and how", &facts(&told)));
    document(&title, what, &[], &body)
}

fn picture(plan: &Plan) -> String {
    let bounds = latency_bounds(plan.objectives.iter());
    let points = || plan.curves.iter().flatten();
    let times =
        || points().flat_map(|point| [point.p50, point.p99]).flatten().chain(bounds.iter().map(|bound| bound.value));
    let (least, most) = (times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
    if points().all(|point| point.p50.is_none()) {
        return NONE.to_owned();
    }
    let ceiling = plan.capacities.first().and_then(|capacity| capacity.ceiling);
    let target = plan.at_target.as_ref().map(|target| target.rate);
    let right = points().map(|point| point.rate).chain(ceiling).chain(target).fold(1.0, f64::max) * 1.04;
    let mut frame = Frame::new((0.0, right), decades(least, most), true);
    time_axis(&mut frame);
    count_axis_x(&mut frame);
    type Part = fn(&Point) -> Option<f64>;
    let parts: [(&str, Part, &str); 2] = [("p50", |point| point.p50, "--q1"), ("p99", |point| point.p99, "--q3")];
    for (curve, fewer) in plan.curves.iter().zip([false, true]) {
        for (name, part, colour) in parts {
            let line: Vec<_> = curve.iter().map(|point| Some((point.rate, part(point)?))).collect();
            let dashes = if fewer { " stroke-dasharray=\"5 4\"" } else { "" };
            frame.line(&line, &format!("style=\"stroke:var({colour})\"{dashes}"));
            for point in curve {
                if let Some(time) = part(point) {
                    let hint = format!("{name} {} at {}/s", units::seconds(time), units::per_second(point.rate));
                    frame.point(point.rate, time, colour, &hint);
                }
            }
        }
    }
    bounds.iter().for_each(|bound| frame.objective(bound.value, &bound.text));
    if let Some(ceiling) = ceiling {
        frame.mark(ceiling, &format!("at most {}/s", units::per_second(ceiling)), "mark", 0);
    }
    if let Some(target) = target {
        frame.mark(target, &format!("wanted {}/s", units::per_second(target)), "objective", 1);
    }
    let mut lines = vec![("p50", "--q1", false), ("p99", "--q3", false)];
    if plan.curves.len() > 1 {
        lines.extend([("p50, one HSM fails", "--q1", true), ("p99, one HSM fails", "--q3", true)]);
    }
    legend(&lines) + &frame.finish("releases a second", "latency over load")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::about::About;
    use crate::simulation::tests::MODEL;
    use crate::threshold::list;

    #[test]
    fn a_plan_is_drawn_with_its_objective_and_its_ceiling() {
        let mut plan = crate::plan::planned(&MODEL, &list("p99<100ms,errors<0.1%").unwrap(), Some(1_400.0), 500.0);
        plan.about = Some(About::this_call(Some("two HSMs")));
        let page = page(&plan, &Hosts { releases_a_day: 200.0, peak: 10.0 });
        for expected in [
            "<title>two HSMs</title>",
            ">p99&lt;100ms</text>",
            ">at most ",
            ">wanted 1\u{202f}400/s<",
            ">overload<",
            "OVERLOAD",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
        assert!(!page.contains("NaN") && !page.contains(">inf"), "a number that is none");
    }
}
