//! The HTML page of a comparison of two runs.

use super::page::{NONE, document, escape, latency_bounds, section, table, tile, tiles, title_or};
use super::picture::{Frame, HEIGHT, MARGIN, WIDTH, decades, quantile_axis, step, time_axis};
use crate::about::About;
use crate::compare::{Difference, Verdict, cautions};
use crate::report::Report;
use crate::units;

/// Formats the page of a comparison. `about` describes this call of the program.
#[must_use]
pub fn page(about: &About, names: [&str; 2], reports: [&Report; 2], differences: &[Difference]) -> String {
    let title = title_or(Some(about), &format!("{} and {}", names[0], names[1]));
    let what = format!("compared by {}, {}", about.generator, units::date(about.at));
    let count = |verdict: Verdict| differences.iter().filter(|difference| difference.verdict == verdict).count();
    let (worse, better) = (count(Verdict::Worse), count(Verdict::Better));
    let mut body = tiles(&[
        tile("worse, beyond noise", &worse.to_string(), if worse > 0 { "bad" } else { "" }),
        tile("better, beyond noise", &better.to_string(), if better > 0 { "good" } else { "" }),
        tile("no more than noise", &count(Verdict::Same).to_string(), ""),
        tile("cannot be told", &count(Verdict::Unknown).to_string(), ""),
    ]);
    body.push_str(&section(
        "Differences",
        "of the whole runs; the bounds are those of 95 % of the differences when the runs' seconds are drawn anew. \
         The longest time is that of a single release, which has no bounds",
        &differences_table(names, differences),
    ));
    body.push_str(&section(
        "Changes",
        "in percent of the first run, with their 95 % bounds; what crosses the middle may be noise",
        &changes(differences),
    ));
    body.push_str(&section(
        "Latency distribution",
        "of the releases that succeeded: which share took at most how long; each step to the right leaves out ten times fewer",
        &distributions(names, reports),
    ));
    body.push_str(&section("What was compared", "", &compared(names, reports)));
    document(&title, &what, &cautions(names, reports), &body)
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "good",
        Verdict::Worse => "bad",
        Verdict::Same | Verdict::Unknown => "soft",
    }
}

fn differences_table(names: [&str; 2], differences: &[Difference]) -> String {
    let head = ["", names[0], names[1], "change", "95 % bounds of the difference", ""].map(escape);
    let mut rows = vec![head.to_vec()];
    for difference in differences {
        let show = |value: f64| difference.kind.show(value);
        let change = difference.change().map_or("-".to_owned(), |change| format!("{change:+.1} %"));
        let bounds = difference.bounds.map_or("-".to_owned(), |[low, high]| format!("{} … {}", show(low), show(high)));
        let Difference { measure, before, after, verdict, .. } = difference;
        let (before, after) = (difference.show(*before), difference.show(*after));
        let verdict = format!("<span class=\"{}\">{verdict}</span>", class(*verdict));
        rows.push(vec![(*measure).to_owned(), before, after, change, bounds, verdict]);
    }
    table(&rows)
}

/// Draws each change with its bounds on a separate line.
fn changes(differences: &[Difference]) -> String {
    let mut all = Vec::new();
    for difference in differences {
        let before = difference.before.filter(|before| *before > 0.0);
        if let (Some(before), Some(bounds), Some(change)) = (before, difference.bounds, difference.change()) {
            let [low, high] = bounds.map(|bound| bound / before * 100.0);
            if low.is_finite() && high.is_finite() {
                all.push((difference, change, low, high));
            }
        }
    }
    if all.is_empty() {
        return "<p class=\"soft\">There is nothing whose bounds could be told.</p>".to_owned();
    }
    let most = all.iter().flat_map(|(_, change, low, high)| [change.abs(), low.abs(), high.abs()]).fold(1.0, f64::max);
    let mut frame = Frame::new((-most * 1.05, most * 1.05), (0.0, all.len() as f64), false);
    let step = step(most * 2.0);
    let mut at = 0.0;
    while at <= most {
        frame.vertical(at, &if at > 0.0 { format!("+{at}") } else { "0".to_owned() });
        if at > 0.0 {
            frame.vertical(-at, &format!("{:+}", -at));
        }
        at += step;
    }
    let middle = frame.at_x(0.0);
    frame.svg.push_str(&format!(
        "<line class=\"axis\" x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{}\" y2=\"{}\"/>",
        MARGIN.2,
        HEIGHT - MARGIN.3
    ));
    for (row, (difference, change, low, high)) in all.iter().enumerate() {
        let y = all.len() as f64 - row as f64 - 0.5;
        let colour = match difference.verdict {
            Verdict::Better => "--good",
            Verdict::Worse => "--bad",
            Verdict::Same | Verdict::Unknown => "--b",
        };
        frame.line(&[Some((*low, y)), Some((*high, y))], &format!("style=\"stroke:var({colour})\""));
        let hint = format!("{}: {change:+.1} %, from {low:+.1} % to {high:+.1} %", difference.measure);
        frame.dot(*change, y, colour, &hint);
        let (x, y) = (WIDTH - MARGIN.1 + 8.0, frame.at_y(y) + 4.0);
        frame.svg.push_str(&format!(
            "<text class=\"name\" x=\"{x:.1}\" y=\"{y:.1}\" style=\"fill:var({colour})\">{}</text>",
            difference.measure.trim_start_matches("latency ")
        ));
    }
    frame.finish("change in percent", "changes with their bounds")
}

fn distributions(names: [&str; 2], reports: [&Report; 2]) -> String {
    let nines = |quantile: f64| -(1.0 - quantile).max(1e-9).log10();
    let points = || reports.iter().flat_map(|report| &report.distribution);
    let asked = reports.iter().flat_map(|report| &report.thresholds).filter_map(|judgement| judgement.bound.as_ref());
    let mut bounds = latency_bounds(asked);
    bounds.dedup_by(|a, b| a.text == b.text);
    let times = || points().map(|point| point.latency_seconds).chain(bounds.iter().map(|bound| bound.value));
    let least = points().map(|point| point.latency_seconds).fold(f64::INFINITY, f64::min);
    let (lowest, most) = (times().fold(least, f64::min), times().fold(0.0, f64::max));
    if !least.is_finite() {
        return NONE.to_owned();
    }
    let right = points().map(|point| nines(point.quantile)).fold(1.0, f64::max);
    let mut frame = Frame::new((0.0, right), decades(lowest, most), true);
    time_axis(&mut frame);
    quantile_axis(&mut frame);
    bounds.iter().for_each(|bound| frame.objective(bound.value, &bound.text));
    let mut ends = Vec::new();
    for ((report, name), (colour, dashes)) in reports.iter().zip(names).zip([("--b", "6 4"), ("--a", "")]) {
        let line: Vec<_> =
            report.distribution.iter().map(|point| Some((nines(point.quantile), point.latency_seconds))).collect();
        frame.line(&line, &format!("style=\"stroke:var({colour})\" stroke-dasharray=\"{dashes}\""));
        if let Some(last) = report.distribution.last() {
            ends.push((shortened(name), last.latency_seconds, colour));
        }
    }
    let ends: Vec<_> = ends.iter().map(|(name, y, colour)| (name.as_str(), *y, *colour)).collect();
    frame.names(&ends);
    frame.finish("share of the releases", "distributions of latency of both runs")
}

/// The end of a name as markup. The end tells more than the beginning.
fn shortened(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or(name);
    let name = name.strip_suffix(".json").unwrap_or(name);
    let length = name.chars().count();
    if length <= 9 {
        escape(name)
    } else {
        format!("…{}", escape(&name.chars().skip(length - 8).collect::<String>()))
    }
}

/// The settings of both runs, side by side.
fn compared(names: [&str; 2], reports: [&Report; 2]) -> String {
    let facts = reports.map(|report| {
        let mut facts = vec![
            ["profile".to_owned(), report.profile.clone()],
            ["service".to_owned(), report.url.clone()],
            ["began".to_owned(), units::date(report.began)],
        ];
        facts.extend(report.about.iter().flat_map(|about| about.facts(true)));
        facts
    });
    let longer = if facts[0].len() >= facts[1].len() { &facts[0] } else { &facts[1] };
    let mut rows =
        format!("<tr><td></td><td><b>{}</b></td><td><b>{}</b></td></tr>", escape(names[0]), escape(names[1]));
    for [name, _] in longer {
        let cell = |facts: &[[String; 2]]| {
            let value = facts.iter().find(|[known, _]| known == name).map_or("not known", |[_, value]| value);
            let class = if name == "command" { " class=\"command\"" } else { "" };
            format!("<td{class}>{}</td>", escape(value))
        };
        rows.push_str(&format!("<tr><td>{}</td>{}{}</tr>", escape(name), cell(&facts[0]), cell(&facts[1])));
    }
    format!("<table class=\"facts two\">{rows}</table>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bound::Judgement;
    use crate::compare::compare;
    use crate::compare::tests::run;

    #[test]
    fn a_comparison_is_drawn_and_says_what_was_compared() {
        let before = run(1, |_, random| 0.010 + 0.004 * random, 0);
        let mut after = run(2, |_, random| 0.014 + 0.004 * random, 0);
        let bound = "p99<50ms".parse::<crate::threshold::Threshold>().map(|threshold| threshold.bound()).ok();
        let judgement = Judgement { threshold: "p99<50ms".to_owned(), measured: String::new(), passed: true, bound };
        after.thresholds.push(judgement);
        after.about = Some(About { daemon: Some("claviger 9.9.9".to_owned()), ..About::this_call(None) });
        let differences = compare(&before, &after).unwrap_or_else(|error| panic!("{error}"));
        let about = About::this_call(Some("before <and> after"));
        let page = page(&about, ["x/before.json", "after.json"], [&before, &after], &differences);
        assert!(page.contains("<title>before &lt;and&gt; after</title>"));
        assert!(page.contains("claviger 9.9.9") && page.contains(">WORSE<") && page.contains(">after</text>"));
        assert!(page.contains(">p99&lt;50ms</text>"), "the objective is drawn");
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(!page.contains("NaN") && !page.contains(">inf"), "a number that is none");
    }
}
