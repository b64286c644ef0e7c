//! The HTML page of a measured capacity.

use super::page::{NONE, document, escape, facts, latency_bounds, section, table, tile, tiles, title_or};
use super::picture::{Frame, count_axis, count_axis_x, decades, time_axis};
use crate::bound::stated;
use crate::capacity::{Answer, Step};
use crate::plan::Hosts;
use crate::units;

/// Formats the page of a measured capacity.
#[must_use]
pub fn page(answer: &Answer, hosts: &Hosts) -> String {
    let objectives = stated(&answer.objectives);
    let title = title_or(answer.about.as_ref(), &format!("Capacity of {} within {objectives}", answer.url));
    let what = format!("measured at {}", answer.url);
    let mut banners = Vec::new();
    if answer.interrupted {
        banners.push("Interrupted: these are the steps that were done; no capacity follows from them".to_owned());
    }
    let mut all = Vec::new();
    for capacity in &answer.capacities {
        let rate = format!("{}/s", units::per_second(capacity.sustainable));
        let how = if capacity.one_fails { "estimated" } else { "sustainable" };
        all.push(tile(&format!("{how}, {}", capacity.title()), &rate, ""));
    }
    if let (Some(all_serve), Some(sure)) = (answer.capacities.first(), &answer.sure) {
        let most = all_serve.ceiling.map_or("not known".to_owned(), |most| format!("{}/s", units::per_second(most)));
        all.push(tile("at most, whatever the latency", &most, ""));
        all.push(tile("hosts", &units::count(hosts.at(all_serve.sustainable)), ""));
        let class = if sure.held == sure.tried && sure.held >= 3 && sure.invalid == 0 { "good" } else { "bad" };
        all.push(tile("trials at that rate that held", &format!("{} of {}", sure.held, sure.tried), class));
    }
    let mut body = tiles(&all);
    if let (Some(sure), Some(all_serve)) = (&answer.sure, answer.capacities.first()) {
        body.push_str(&format!("<p class=\"note\">{}.</p>\n", escape(&sure.stated(all_serve.sustainable))));
    }
    let law = match (&answer.law, answer.law_ceilings) {
        (Some(law), Some([low, high])) => format!(
            "closed loops; the line is the Universal Scalability Law: {}/s for one caller, contention {:.4}, coherency {:.6}, \
             R² {:.3}; with any one step left out it says from {}/s to {}/s at most",
            units::per_second(law.lambda),
            law.sigma,
            law.kappa,
            law.r_squared,
            units::per_second(low),
            units::per_second(high)
        ),
        _ => "closed loops; too few valid steps to fit a law to: it takes six".to_owned(),
    };
    body.push_str(&section("Throughput over callers", &law, &throughput(answer)));
    if !answer.trials.is_empty() {
        body.push_str(&section(
            "Trials",
            "99th percentile of latency in open loops, by the rate that was due; green held, red was missed; logarithmic",
            &trials(answer),
        ));
    }
    if !answer.capacities.is_empty() {
        let head = std::iter::once(String::new()).chain(answer.capacities.iter().map(|c| c.title())).collect();
        let mut rows: Vec<Vec<String>> = vec![head];
        let mut row = |name: &str, value: &dyn Fn(&crate::plan::Capacity) -> String| {
            rows.push(std::iter::once(name.to_owned()).chain(answer.capacities.iter().map(value)).collect());
        };
        row("sustainable releases a second", &|c| units::per_second(c.sustainable));
        row("machines bootable in 60 s", &|c| units::count(c.boots_a_minute));
        row("hosts", &|c| units::count(hosts.at(c.sustainable)));
        row("limited by, or estimated from", &|c| escape(&c.limit));
        let assumption = format!("<p class=\"soft note\">{}</p>", escape(&hosts.stated()));
        body.push_str(&section("Capacity", &escape(&format!("within {objectives}")), &(table(&rows) + &assumption)));
    }
    body.push_str(&section("Steps and trials", "in the order in which they were made", &steps(answer)));
    if let Some(about) = &answer.about {
        body.push_str(&section("What was tested", "and how", &facts(&about.facts(true))));
    }
    document(&title, &what, &banners, &body)
}

fn throughput(answer: &Answer) -> String {
    let Some(last) = answer.steps.last() else { return NONE.to_owned() };
    // The scale is logarithmic: each doubling of the callers has the same width.
    let x = |callers: f64| callers.log2();
    let most = answer.steps.iter().map(|step| step.achieved).fold(1.0, f64::max) * 1.12;
    let right = x(last.callers as f64).max(1.0);
    let mut frame = Frame::new((0.0, right), (0.0, most), false);
    count_axis(&mut frame, most);
    for step in &answer.steps {
        frame.vertical(x(step.callers as f64), &step.callers.to_string());
    }
    if let Some(law) = &answer.law {
        let line: Vec<_> = (0..=100)
            .map(|at| f64::from(at) / 100.0 * right)
            .map(|at| Some((at, law.throughput(at.exp2()).min(most))))
            .collect();
        frame.line(&line, "style=\"stroke:var(--b)\" stroke-dasharray=\"2 5\"");
        frame.names(&[("law", law.throughput(last.callers as f64).min(most), "--b")]);
    }
    let points: Vec<_> = answer.steps.iter().map(|step| Some((x(step.callers as f64), step.achieved))).collect();
    frame.line(&points, "style=\"stroke:var(--a)\"");
    for step in &answer.steps {
        let hint = format!("{} callers: {}/s", step.callers, units::per_second(step.achieved));
        frame.dot(x(step.callers as f64), step.achieved, if step.valid { "--a" } else { "--bad" }, &hint);
    }
    if let Some(all) = answer.capacities.first() {
        frame.objective(all.sustainable, &format!("sustainable {}/s", units::per_second(all.sustainable)));
    }
    frame.finish("callers", "releases a second over callers")
}

fn trials(answer: &Answer) -> String {
    let bounds = latency_bounds(answer.objectives.iter());
    let times =
        || answer.trials.iter().map(|step| step.latency_seconds.p99).chain(bounds.iter().map(|bound| bound.value));
    let (least, most) = (times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
    let ceiling = answer.capacities.first().and_then(|capacity| capacity.ceiling);
    let right = answer.trials.iter().map(|step| step.offered).chain(ceiling).fold(1.0, f64::max) * 1.02;
    let left = answer.trials.iter().map(|step| step.offered).fold(right, f64::min) * 0.9;
    let mut frame = Frame::new((left, right), decades(least, most), true);
    time_axis(&mut frame);
    count_axis_x(&mut frame);
    bounds.iter().for_each(|bound| frame.objective(bound.value, &bound.text));
    if let Some(ceiling) = ceiling {
        frame.mark(ceiling, &format!("at most {}/s", units::per_second(ceiling)), "mark", 0);
    }
    for trial in &answer.trials {
        let colour = if trial.holds { "--good" } else { "--bad" };
        let hint = format!("{}/s: p99 {}, {}", units::per_second(trial.offered), p99(trial), verdict(trial));
        frame.dot(trial.offered, trial.latency_seconds.p99, colour, &hint);
    }
    frame.finish("releases a second that were due", "trials in an open loop")
}

fn p99(step: &Step) -> String {
    units::seconds(step.latency_seconds.p99)
}

fn verdict(step: &Step) -> &'static str {
    match step {
        Step { valid: false, .. } => "the generator fell behind",
        Step { callers: 1.., .. } => "",
        Step { steady: false, .. } => "overload",
        Step { holds: true, .. } => "holds",
        _ => "missed",
    }
}

fn steps(answer: &Answer) -> String {
    let head =
        ["", "releases/s", "p50", "p99", "failed", "sessions busy", "waiting", "daemon CPU", ""].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for step in answer.steps.iter().chain(&answer.trials) {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let what = match step.callers {
            0 => format!("{}/s due", units::per_second(step.offered)),
            1 => "1 caller".to_owned(),
            callers => format!("{callers} callers"),
        };
        let class = if step.valid && (step.callers > 0 || step.holds) { "good" } else { "bad" };
        rows.push(vec![
            what,
            units::per_second(step.achieved),
            units::seconds(step.latency_seconds.p50),
            p99(step),
            units::percent(step.errors),
            or_dash(step.seen.sessions_busy.map(units::percent)),
            or_dash(step.seen.hsm_waiting.map(|waiting| format!("{waiting:.1}"))),
            or_dash(step.seen.daemon_processors.map(|cpu| format!("{cpu:.2}"))),
            format!("<span class=\"{class}\">{}</span>", verdict(step)),
        ]);
    }
    table(&rows)
}
