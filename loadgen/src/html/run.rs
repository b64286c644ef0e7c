//! The HTML page of a run.

use super::page::{NONE, document, escape, facts, latency_bounds, plural, section, tile, tiles, title_or};
use super::picture::{Frame, HEIGHT, MARGIN, count_axis, decades, quantile_axis, seconds_axis, time_axis};
use crate::bound::{Bound, Of};
use crate::report::{OVERLOAD, Report, Row};
use crate::units;

/// Formats the page of a run.
#[must_use]
pub fn page(report: &Report) -> String {
    let settings = &report.settings;
    let title = title_or(report.about.as_ref(), &format!("{} at {}", report.profile, report.url));
    let what = format!(
        "{} at {} · {} · {} · {} · {}{}{}",
        report.profile,
        report.url,
        units::date(report.began),
        plural(settings.hosts, "host"),
        plural(settings.vms, "machine"),
        if settings.batch > 1 { format!("{} releases in a request", settings.batch) } else { settings.api.clone() },
        if settings.roll { ", rolled" } else { "" },
        if settings.arrivals == "random" { ", at random times" } else { "" },
    );
    let mut banners: Vec<String> = report.invalid_because.iter().map(|reason| format!("Invalid: {reason}")).collect();
    if report.overload {
        banners.push(format!("Overload: {OVERLOAD}"));
    }
    let ran = units::seconds(report.duration_seconds);
    banners.extend(report.stopped.iter().map(|reason| format!("Stopped after {ran}: {reason}")));
    if report.interrupted {
        banners.push(format!("Interrupted after {ran}: this is what was measured until then"));
    }
    if let Some(problem) = &report.verify.first_wrong {
        banners.push(format!("{} replies were wrong. The first: {problem}", report.verify.wrong));
    }
    let bounds: Vec<&Bound> = report.thresholds.iter().filter_map(|judgement| judgement.bound.as_ref()).collect();
    let mut body = numbers_at_a_glance(report);
    if let Some(about) = &report.about {
        body.push_str(&section("What was tested", "and how", &facts(&about.facts(true))));
    }
    body.push_str(&section(
        "Throughput",
        "releases a second: due (dashed) and succeeded (filled), in the second in which they succeeded",
        &throughput(&report.timeline, report.duration_seconds, &bounds),
    ));
    body.push_str(&section(
        "Latency over time",
        "from when a release was due to its whole answer, by the second in which it was due; of those that succeeded; logarithmic",
        &latency(&report.timeline, &bounds),
    ));
    let troubled = report.timeline.iter().any(|row| row.errors + row.dropped > 0);
    let picture = if troubled { errors(report, &bounds) } else { "<p class=\"good\">None.</p>".to_owned() };
    body.push_str(&section(
        "Errors and drops",
        "releases a second that failed, or were due and could not be started",
        &picture,
    ));
    body.push_str(&section(
        "Latency distribution",
        "which share of the releases that succeeded took at most how long; each step to the right leaves out ten times fewer",
        &distribution(report, &bounds),
    ));
    body.push_str(&numbers(report));
    document(&title, &what, &banners, &body)
}

/// The quantile of a condition: `p99<50ms` → `p99`.
fn quantile_name(text: &str) -> &str {
    text.split(['<', '>']).next().unwrap_or(text).trim()
}

fn numbers_at_a_glance(report: &Report) -> String {
    let share = |part: u64| if report.offered == 0 { 0.0 } else { part as f64 / report.offered as f64 };
    let trouble = |share: f64| if share > 0.0 { "bad" } else { "" };
    let (failed, dropped) = (share(report.failed()), share(report.dropped));
    let times = report.told(&report.latency_seconds);
    let offered = format!("released, of {}/s due", units::per_second(report.offered_per_second));
    let known = |quantile| if report.knows(quantile) { "" } else { "unknown" };
    let mut all = vec![
        tile(&offered, &format!("{}/s", units::per_second(report.achieved_per_second)), ""),
        tile("latency, median", &times[0].1, known(0.5)),
        tile("latency, p99", &times[2].1, known(0.99)),
        tile("latency, p99.9", &times[3].1, known(0.999)),
        tile("failed", &units::percent(failed), trouble(failed)),
        tile("dropped", &units::percent(dropped), trouble(dropped)),
    ];
    if !report.thresholds.is_empty() {
        let passed = report.thresholds.iter().filter(|judgement| judgement.passed).count();
        let asked = report.thresholds.len();
        let class = if passed == asked { "good" } else { "bad" };
        all.push(tile("thresholds passed", &format!("{passed} of {asked}"), class));
    }
    let mut out = tiles(&all);
    if report.unsuccessful() > 0.0 {
        let (share, known) = (units::percent(report.unsuccessful()), (1.0 - report.unsuccessful()) * 100.0);
        out.push_str(&format!(
            "<p class=\"soft\">{share} failed or were dropped, and what has no answer has no latency: beyond p{known:.2} of all \
             that was due nothing is known.</p>\n"
        ));
    }
    out
}

fn numbers(report: &Report) -> String {
    let mut rows = String::new();
    let names: String = report.latency_seconds.all().iter().map(|(name, _)| format!("<th>{name}</th>")).collect();
    let lag = report.generator.lag_seconds.all().map(|(name, time)| (name, units::seconds(time)));
    let kinds = [
        ("latency, from when it was due", report.told(&report.latency_seconds)),
        ("service, from when it was sent", report.told(&report.service_seconds)),
        ("the generator's own lag", lag),
    ];
    for (what, times) in kinds {
        let cells: String = times.iter().map(|(_, time)| format!("<td>{time}</td>")).collect();
        rows.push_str(&format!("<tr><td>{what}</td>{cells}</tr>"));
    }
    let table = format!("<div class=\"wide\"><table><tr><th></th>{names}</tr>{rows}</table></div>");
    let mut out =
        section("Times", "what failed or was dropped has none, and hides the percentiles that it reaches into", &table);
    let mut counts: Vec<[String; 2]> = vec![
        ["due".into(), units::count(report.offered as f64)],
        ["succeeded".into(), units::count(report.achieved as f64)],
        ["dropped: as many as allowed were in flight".into(), units::count(report.dropped as f64)],
    ];
    counts.extend(
        report.errors.iter().map(|(code, times)| [format!("failed: {}", escape(code)), units::count(*times as f64)]),
    );
    counts.extend(
        report.retries.iter().map(|(code, n)| [format!("asked again after {}", escape(code)), units::count(*n as f64)]),
    );
    counts.push([
        format!("replies checked ({})", escape(&report.verify.mode)),
        format!("{}, {} wrong", units::count((report.verify.right + report.verify.wrong) as f64), report.verify.wrong),
    ]);
    counts.push(["processors that the generator used".into(), format!("{:.2}", report.generator.processors)]);
    for judgement in &report.thresholds {
        let (class, verdict) = if judgement.passed { ("good", "passed") } else { ("bad", "failed") };
        let what = format!("{} ({})", escape(&judgement.threshold), escape(&judgement.measured));
        counts.push([what, format!("<span class=\"{class}\">{verdict}</span>")]);
    }
    let rows: String = counts.iter().map(|[what, value]| format!("<tr><td>{what}</td><td>{value}</td></tr>")).collect();
    out.push_str(&section("Counts", "releases, without the warm-up", &format!("<table>{rows}</table>")));
    out
}

fn title(frame: &Frame, row: &Row, text: &str) -> String {
    let (x, next) = (frame.at_x(row.second as f64), frame.at_x(row.second as f64 + 1.0));
    format!(
        "<rect x=\"{x:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"transparent\"><title>second {}: {text}</title></rect>",
        MARGIN.2,
        next - x,
        HEIGHT - MARGIN.2 - MARGIN.3,
        row.second
    )
}

/// The middle of a second, where its value is drawn.
fn middle(row: &Row) -> f64 {
    row.second as f64 + 0.5
}

fn throughput(rows: &[Row], duration: f64, bounds: &[&Bound]) -> String {
    let most = rows.iter().map(|row| row.offered.max(row.achieved)).max().unwrap_or(1).max(1) as f64;
    let asked = bounds.iter().filter(|bound| bound.of == Of::Achieved);
    let most = asked.clone().map(|bound| bound.value).fold(most, f64::max);
    let mut frame = Frame::new((0.0, rows.len().max(1) as f64), (0.0, most * 1.08), false);
    count_axis(&mut frame, most * 1.08);
    seconds_axis(&mut frame, rows.len());
    let points: Vec<_> = rows.iter().map(|row| Some((middle(row), row.achieved as f64))).collect();
    if let (Some(first), Some(last)) = (rows.first(), rows.last()) {
        let zero = frame.at_y(0.0);
        let mut area = format!("M{:.1} {zero:.1}", frame.at_x(middle(first)));
        for (x, y) in points.iter().flatten() {
            area.push_str(&format!("L{:.1} {:.1}", frame.at_x(*x), frame.at_y(*y)));
        }
        area.push_str(&format!("L{:.1} {zero:.1}Z", frame.at_x(middle(last))));
        frame.svg.push_str(&format!("<path d=\"{area}\" style=\"fill:var(--fill)\"/>"));
    }
    let due = rows.iter().filter(|row| (row.second as f64) < duration);
    let offered: Vec<_> = due.map(|row| Some((middle(row), row.offered as f64))).collect();
    frame.line(&offered, "style=\"stroke:var(--b)\" stroke-dasharray=\"2 5\"");
    frame.line(&points, "style=\"stroke:var(--a)\"");
    asked.for_each(|bound| frame.objective(bound.value, &bound.text));
    let last = |points: &[Option<(f64, f64)>]| points.iter().rev().find_map(|point| *point).map_or(0.0, |(_, y)| y);
    frame.names(&[("due", last(&offered), "--b"), ("released", last(&points), "--a")]);
    for row in rows {
        let hint = title(&frame, row, &format!("{} due, {} released", row.offered, row.achieved));
        frame.svg.push_str(&hint);
    }
    frame.finish("seconds", "releases a second over time")
}

fn latency(rows: &[Row], bounds: &[&Bound]) -> String {
    let times = || rows.iter().filter_map(|row| row.latency_seconds);
    let least = times().map(|times| times.p50).fold(f64::INFINITY, f64::min);
    let most = times().map(|times| times.max).fold(0.0, f64::max);
    if !least.is_finite() {
        return NONE.to_owned();
    }
    let bounds = latency_bounds(bounds.iter().copied());
    let (least, most) = bounds.iter().fold((least, most), |(a, b), bound| (a.min(bound.value), b.max(bound.value)));
    let mut frame = Frame::new((0.0, rows.len().max(1) as f64), decades(least, most), true);
    time_axis(&mut frame);
    seconds_axis(&mut frame, rows.len());
    type Part = fn(&crate::report::Percentiles) -> f64;
    let parts: [(&str, Part, &str); 4] = [
        ("p50", |times| times.p50, "--q1"),
        ("p90", |times| times.p90, "--q2"),
        ("p99", |times| times.p99, "--q3"),
        ("max", |times| times.max, "--q4"),
    ];
    let mut names = Vec::new();
    for (name, part, colour) in parts {
        let points: Vec<_> = rows.iter().map(|row| Some((middle(row), part(row.latency_seconds.as_ref()?)))).collect();
        frame.line(&points, &format!("style=\"stroke:var({colour})\""));
        if let Some((_, y)) = points.iter().rev().find_map(|point| *point) {
            names.push((name, y, colour));
        }
    }
    frame.names(&names);
    bounds.iter().for_each(|bound| frame.objective(bound.value, &bound.text));
    for row in rows {
        let text = row.latency_seconds.map_or("nothing succeeded".to_owned(), |times| {
            parts.map(|(name, part, _)| format!("{name} {}", units::seconds(part(&times)))).join(", ")
        });
        let hint = title(&frame, row, &text);
        frame.svg.push_str(&hint);
    }
    frame.finish("seconds", "latency percentiles over time")
}

fn errors(report: &Report, bounds: &[&Bound]) -> String {
    let rows = &report.timeline;
    // The objective is a share of the due releases, so its height uses the mean rate.
    let asked: Vec<_> = bounds
        .iter()
        .filter(|bound| matches!(bound.of, Of::Errors | Of::Dropped))
        .map(|bound| (bound.value * report.offered_per_second, &bound.text))
        .collect();
    let most = rows.iter().map(|row| row.errors + row.dropped).max().unwrap_or(1).max(1) as f64;
    let most = asked.iter().map(|(value, _)| *value).fold(most, f64::max);
    let mut frame = Frame::new((0.0, rows.len().max(1) as f64), (0.0, most * 1.08), false);
    count_axis(&mut frame, most * 1.08);
    seconds_axis(&mut frame, rows.len());
    for row in rows {
        let (x, next) = (frame.at_x(row.second as f64), frame.at_x(row.second as f64 + 1.0));
        let mut bar = |from: u64, to: u64, colour: &str| {
            let (bottom, top) = (frame.at_y(from as f64), frame.at_y(to as f64));
            // Bars have a gap between them, unless they are too narrow.
            let gap = if next - x > 4.0 { 1.0 } else { 0.0 };
            frame.svg.push_str(&format!(
                "<rect x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" style=\"fill:var({colour})\"/>",
                x + gap,
                (next - x - 2.0 * gap).max(0.5),
                bottom - top
            ));
        };
        bar(0, row.errors, "--bad");
        bar(row.errors, row.errors + row.dropped, "--warn");
        let hint = title(&frame, row, &format!("{} failed, {} dropped", row.errors, row.dropped));
        frame.svg.push_str(&hint);
    }
    asked.iter().for_each(|(value, text)| frame.objective(*value, text));
    frame.names(&[("dropped", most, "--warn"), ("failed", most * 0.9, "--bad")]);
    frame.finish("seconds", "failed and dropped releases over time")
}

fn distribution(report: &Report, bounds: &[&Bound]) -> String {
    let points = &report.distribution;
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return NONE.to_owned() };
    let nines = |quantile: f64| -(1.0 - quantile).max(1e-9).log10();
    let least = first.latency_seconds.min(first.service_seconds);
    let most = report.latency_seconds.max.max(report.service_seconds.max);
    let bounds = latency_bounds(bounds.iter().copied());
    let (least, most) = bounds.iter().fold((least, most), |(a, b), bound| (a.min(bound.value), b.max(bound.value)));
    let mut frame = Frame::new((0.0, nines(last.quantile).max(1.0)), decades(least, most), true);
    time_axis(&mut frame);
    quantile_axis(&mut frame);
    let service: Vec<_> = points.iter().map(|p| Some((nines(p.quantile), p.service_seconds))).collect();
    let latency: Vec<_> = points.iter().map(|p| Some((nines(p.quantile), p.latency_seconds))).collect();
    frame.line(&service, "style=\"stroke:var(--b)\" stroke-dasharray=\"2 5\"");
    frame.line(&latency, "style=\"stroke:var(--a)\"");
    for (row, bound) in (0..).zip(&bounds) {
        let at = nines(bound.quantile.unwrap_or(1.0));
        frame.objective(bound.value, &bound.text);
        if at <= frame.x.1 {
            frame.mark(at, &format!("{} has to be below the line here", quantile_name(&bound.text)), "mark", row);
            frame.dot(at, bound.value, "--obj", &bound.text);
        }
    }
    frame.names(&[("latency", last.latency_seconds, "--a"), ("service", last.service_seconds, "--b")]);
    frame.finish("share of the releases", "distribution of latency and service time")
}
