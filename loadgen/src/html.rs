//! A run as a page: one file, pictures inside, nothing loaded from elsewhere, light and dark.

use crate::report::{Report, Row};
use crate::units;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 260.0;
/// Room for the labels: left, right, top, bottom.
const MARGIN: (f64, f64, f64, f64) = (64.0, 84.0, 14.0, 40.0);

const STYLE: &str = "
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5d6878;--line:#e3e7ec;--axis:#c3cad3;
--a:#1f6feb;--fill:#1f6feb22;--b:#8a94a3;--bad:#cf222e;--warn:#b86e00;--good:#1a7f37;
--q1:#79acf0;--q2:#3f86ea;--q3:#1450a8;--q4:#6b4fbb}
@media (prefers-color-scheme:dark){:root{--page:#0f1318;--card:#171c23;--ink:#e6eaf0;--soft:#97a3b4;--line:#262d37;
--axis:#3d4754;--a:#5b9dff;--fill:#5b9dff26;--b:#8490a1;--bad:#ff6b6b;--warn:#f0a840;--good:#4cc26c;
--q1:#4a7bc0;--q2:#5b9dff;--q3:#a9cdff;--q4:#b9a3ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:16px;margin:0 0 2px}
p{margin:0}.soft{color:var(--soft)}header{margin-bottom:20px}
.banner{padding:10px 14px;border-radius:8px;margin:14px 0;border:1px solid var(--bad);color:var(--bad);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:12px;margin:18px 0}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}.tile b{display:block;font-size:21px;line-height:1.35;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}.bad{color:var(--bad)}.good{color:var(--good)}
section{padding:16px 18px;margin:14px 0}section p.soft{font-size:13px;margin-bottom:8px}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .name{font-weight:600}.grid{stroke:var(--line)}.axis{stroke:var(--axis)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:600}tr:last-child td{border-bottom:0}.wide{overflow-x:auto}
";

/// The page.
#[must_use]
pub fn page(report: &Report) -> String {
    let title = format!("{} at {}", escape(&report.profile), escape(&report.url));
    let mut body = format!(
        "<header><h1>{title}</h1><p class=\"soft\">{} · {} · {} · {}{} · {}</p></header>\n",
        date(report.began),
        plural(report.settings.hosts, "host"),
        plural(report.settings.vms, "machine"),
        if report.settings.batch > 1 {
            format!("{} releases in a request", report.settings.batch)
        } else {
            escape(&report.settings.api)
        },
        if report.settings.roll { ", rolled" } else { "" },
        escape(&report.generator_version),
    );
    for reason in &report.invalid_because {
        body.push_str(&format!("<p class=\"banner\">Invalid: {}</p>\n", escape(reason)));
    }
    if let Some(problem) = &report.verify.first_wrong {
        let wrong = report.verify.wrong;
        body.push_str(&format!("<p class=\"banner\">{wrong} replies were wrong. The first: {}</p>\n", escape(problem)));
    }
    body.push_str(&tiles(report));
    body.push_str(&section(
        "Throughput",
        "releases a second: due (dashed) and succeeded (filled), in the second in which they succeeded",
        &throughput(&report.timeline, report.duration_seconds),
    ));
    body.push_str(&section(
        "Latency over time",
        "from when a release was due to its whole answer, by the second in which it was due; logarithmic",
        &latency(&report.timeline),
    ));
    let troubled = report.timeline.iter().any(|row| row.errors + row.dropped > 0);
    let picture = if troubled { errors(&report.timeline) } else { "<p class=\"good\">None.</p>".to_owned() };
    body.push_str(&section(
        "Errors and drops",
        "releases a second that failed, or were due and could not be started",
        &picture,
    ));
    body.push_str(&section(
        "Latency distribution",
        "which share of the releases took at most how long; each step to the right leaves out ten times fewer",
        &distribution(report),
    ));
    body.push_str(&numbers(report));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><main>\n{body}</main></body></html>\n"
    )
}

fn section(title: &str, what: &str, content: &str) -> String {
    format!("<section><h2>{title}</h2><p class=\"soft\">{what}</p>{content}</section>\n")
}

fn tiles(report: &Report) -> String {
    let share = |part: u64| if report.offered == 0 { 0.0 } else { part as f64 / report.offered as f64 };
    let tile = |name: &str, value: String, class: &str| {
        format!("<div class=\"tile\"><b class=\"{class}\">{value}</b><span>{name}</span></div>")
    };
    let trouble = |share: f64| if share > 0.0 { "bad" } else { "" };
    let (failed, dropped) = (share(report.failed()), share(report.dropped));
    let times = &report.latency_seconds;
    let offered = format!("released, of {}/s due", units::per_second(report.offered_per_second));
    let mut tiles = vec![
        tile(&offered, format!("{}/s", units::per_second(report.achieved_per_second)), ""),
        tile("latency, median", units::seconds(times.p50), ""),
        tile("latency, p99", units::seconds(times.p99), ""),
        tile("latency, p99.9", units::seconds(times.p99_9), ""),
        tile("failed", units::percent(failed), trouble(failed)),
        tile("dropped", units::percent(dropped), trouble(dropped)),
    ];
    if !report.thresholds.is_empty() {
        let passed = report.thresholds.iter().filter(|judgement| judgement.passed).count();
        let all = report.thresholds.len();
        let class = if passed == all { "good" } else { "bad" };
        tiles.push(tile("thresholds passed", format!("{passed} of {all}"), class));
    }
    let mut out = format!("<div class=\"tiles\">{}</div>\n", tiles.concat());
    if report.unsuccessful() > 0.0 {
        let (share, known) = (units::percent(report.unsuccessful()), (1.0 - report.unsuccessful()) * 100.0);
        out.push_str(&format!(
            "<p class=\"soft\">{share} failed or were dropped. Latency is of those that succeeded; beyond p{known:.2} of all \
             that was due nothing is known.</p>\n"
        ));
    }
    out
}

fn numbers(report: &Report) -> String {
    let mut rows = String::new();
    let names: String = report.latency_seconds.all().iter().map(|(name, _)| format!("<th>{name}</th>")).collect();
    let kinds = [
        ("latency, from when it was due", &report.latency_seconds),
        ("service, from when it was sent", &report.service_seconds),
        ("the generator's own lag", &report.generator.lag_seconds),
    ];
    for (what, times) in kinds {
        let cells: String = times.all().iter().map(|(_, time)| format!("<td>{}</td>", units::seconds(*time))).collect();
        rows.push_str(&format!("<tr><td>{what}</td>{cells}</tr>"));
    }
    let table = format!("<div class=\"wide\"><table><tr><th></th>{names}</tr>{rows}</table></div>");
    let mut out = section("Times", "of the releases that succeeded", &table);
    let mut facts: Vec<[String; 2]> = vec![
        ["due".into(), units::count(report.offered as f64)],
        ["succeeded".into(), units::count(report.achieved as f64)],
        ["dropped: as many as allowed were in flight".into(), units::count(report.dropped as f64)],
    ];
    facts.extend(
        report.errors.iter().map(|(code, times)| [format!("failed: {}", escape(code)), units::count(*times as f64)]),
    );
    facts.extend(
        report.retries.iter().map(|(code, n)| [format!("asked again after {}", escape(code)), units::count(*n as f64)]),
    );
    facts.push([
        format!("replies checked ({})", escape(&report.verify.mode)),
        format!("{}, {} wrong", units::count((report.verify.right + report.verify.wrong) as f64), report.verify.wrong),
    ]);
    facts.push(["processors that the generator used".into(), format!("{:.2}", report.generator.processors)]);
    for judgement in &report.thresholds {
        let (class, verdict) = if judgement.passed { ("good", "passed") } else { ("bad", "failed") };
        let what = format!("{} ({})", escape(&judgement.threshold), escape(&judgement.measured));
        facts.push([what, format!("<span class=\"{class}\">{verdict}</span>")]);
    }
    let rows: String = facts.iter().map(|[what, value]| format!("<tr><td>{what}</td><td>{value}</td></tr>")).collect();
    out.push_str(&section("Counts", "releases, without the warm-up", &format!("<table>{rows}</table>")));
    out
}

/// Where values are in a picture.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    log: bool,
    svg: String,
}

impl Frame {
    fn new(x: (f64, f64), y: (f64, f64), log: bool) -> Self {
        Self { x, y, log, svg: String::new() }
    }

    fn at_x(&self, x: f64) -> f64 {
        let (left, right, ..) = MARGIN;
        left + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - left - right)
    }

    fn at_y(&self, y: f64) -> f64 {
        let (.., top, bottom) = MARGIN;
        let scale = |y: f64| if self.log { y.max(self.y.0).ln() } else { y };
        let part = (scale(y) - scale(self.y.0)) / (scale(self.y.1) - scale(self.y.0));
        HEIGHT - bottom - part * (HEIGHT - top - bottom)
    }

    fn horizontal(&mut self, y: f64, label: &str) {
        let (at, left, right) = (self.at_y(y), MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 8.0,
            at + 4.0
        ));
    }

    fn vertical(&mut self, x: f64, label: &str) {
        let (at, bottom) = (self.at_x(x), HEIGHT - MARGIN.3);
        self.svg.push_str(&format!(
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 5.0,
            bottom + 20.0
        ));
    }

    /// A line with gaps where there is nothing.
    fn line(&mut self, points: &[Option<(f64, f64)>], style: &str) {
        let mut path = String::new();
        let mut pen_up = true;
        for point in points {
            match point {
                Some((x, y)) => {
                    let command = if pen_up { 'M' } else { 'L' };
                    path.push_str(&format!("{command}{:.1} {:.1}", self.at_x(*x), self.at_y(*y)));
                    pen_up = false;
                }
                None => pen_up = true,
            }
        }
        self.svg.push_str(&format!("<path d=\"{path}\" fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" stroke-linecap=\"round\" {style}/>"));
    }

    fn finish(mut self, x_label: &str, description: &str) -> String {
        let (bottom, left, right) = (HEIGHT - MARGIN.3, MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{x_label}</text>",
            HEIGHT - 4.0
        ));
        format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{description}\">{}</svg>", self.svg)
    }

    /// Names at the right end of lines, moved apart where they would overlap.
    fn names(&mut self, names: &[(&str, f64, &str)]) {
        // Where two are equal the last drawn is on top.
        let mut at: Vec<(f64, &str, &str)> =
            names.iter().rev().map(|(name, y, colour)| (self.at_y(*y), *name, *colour)).collect();
        at.sort_by(|a, b| a.0.total_cmp(&b.0));
        for index in 1..at.len() {
            at[index].0 = at[index].0.max(at[index - 1].0 + 14.0);
        }
        let lowest = HEIGHT - MARGIN.3;
        let over = at.last().map_or(0.0, |last| (last.0 - lowest).max(0.0));
        for (y, name, colour) in at {
            let (x, y) = (WIDTH - MARGIN.1 + 8.0, y - over + 4.0);
            self.svg.push_str(&format!(
                "<text class=\"name\" x=\"{x:.1}\" y=\"{y:.1}\" style=\"fill:var({colour})\">{name}</text>"
            ));
        }
    }
}

/// A round number that is at least `most` ÷ 4, for the steps of a scale.
fn step(most: f64) -> f64 {
    let raw = (most / 4.0).max(1e-9);
    let power = 10_f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|factor| factor * power >= raw * 0.999);
    factor.unwrap_or(10.0) * power
}

fn seconds_axis(frame: &mut Frame, seconds: usize) {
    let step = step(seconds as f64 * 0.4).max(1.0).round();
    let mut at = 0.0;
    while at <= seconds as f64 {
        frame.vertical(at, &format!("{at:.0}"));
        at += step;
    }
}

fn count_axis(frame: &mut Frame, most: f64) {
    let step = step(most).max(1.0);
    let mut at = 0.0;
    while at <= most {
        frame.horizontal(at, &units::count(at));
        at += step;
    }
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

/// The middle of a second, which is where its value stands.
fn middle(row: &Row) -> f64 {
    row.second as f64 + 0.5
}

fn throughput(rows: &[Row], duration: f64) -> String {
    let most = rows.iter().map(|row| row.offered.max(row.achieved)).max().unwrap_or(1).max(1) as f64;
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
    let last = |points: &[Option<(f64, f64)>]| points.iter().rev().find_map(|point| *point).map_or(0.0, |(_, y)| y);
    frame.names(&[("due", last(&offered), "--b"), ("released", last(&points), "--a")]);
    for row in rows {
        let hint = title(&frame, row, &format!("{} due, {} released", row.offered, row.achieved));
        frame.svg.push_str(&hint);
    }
    frame.finish("seconds", "releases a second over time")
}

/// From the power of ten below to the one above.
fn decades(least: f64, most: f64) -> (f64, f64) {
    let low = 10_f64.powf(least.max(1e-6).log10().floor());
    let high = 10_f64.powf((most.max(1e-6) * 1.0001).log10().ceil());
    (low, if high > low { high } else { low * 10.0 })
}

fn time_axis(frame: &mut Frame) {
    let mut at = frame.y.0;
    let label = |time: f64| match time {
        t if t >= 0.9995 => format!("{t:.0} s"),
        t if t >= 0.000_999 => format!("{:.0} ms", t * 1e3),
        t => format!("{:.0} µs", t * 1e6),
    };
    while at <= frame.y.1 * 1.001 {
        frame.horizontal(at, &label(at));
        at *= 10.0;
    }
}

const NONE: &str = "<p class=\"bad\">No release succeeded.</p>";

fn latency(rows: &[Row]) -> String {
    let times = || rows.iter().filter_map(|row| row.latency_seconds);
    let least = times().map(|times| times.p50).fold(f64::INFINITY, f64::min);
    let most = times().map(|times| times.max).fold(0.0, f64::max);
    if !least.is_finite() {
        return NONE.to_owned();
    }
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
    for row in rows {
        let text = row.latency_seconds.map_or("nothing succeeded".to_owned(), |times| {
            parts.map(|(name, part, _)| format!("{name} {}", units::seconds(part(&times)))).join(", ")
        });
        let hint = title(&frame, row, &text);
        frame.svg.push_str(&hint);
    }
    frame.finish("seconds", "latency percentiles over time")
}

fn errors(rows: &[Row]) -> String {
    let most = rows.iter().map(|row| row.errors + row.dropped).max().unwrap_or(1).max(1) as f64;
    let mut frame = Frame::new((0.0, rows.len().max(1) as f64), (0.0, most * 1.08), false);
    count_axis(&mut frame, most * 1.08);
    seconds_axis(&mut frame, rows.len());
    for row in rows {
        let (x, next) = (frame.at_x(row.second as f64), frame.at_x(row.second as f64 + 1.0));
        let mut bar = |from: u64, to: u64, colour: &str| {
            let (bottom, top) = (frame.at_y(from as f64), frame.at_y(to as f64));
            // A gap between bars, unless they are too thin for one.
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
    frame.names(&[("dropped", most, "--warn"), ("failed", most * 0.9, "--bad")]);
    frame.finish("seconds", "failed and dropped releases over time")
}

fn distribution(report: &Report) -> String {
    let points = &report.distribution;
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return NONE.to_owned() };
    let nines = |quantile: f64| -(1.0 - quantile).max(1e-9).log10();
    let least = first.latency_seconds.min(first.service_seconds);
    let most = report.latency_seconds.max.max(report.service_seconds.max);
    let mut frame = Frame::new((0.0, nines(last.quantile).max(1.0)), decades(least, most), true);
    time_axis(&mut frame);
    for (at, label) in (0_u8..).zip(["0 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"]) {
        if f64::from(at) <= frame.x.1 {
            frame.vertical(f64::from(at), label);
        }
    }
    let service: Vec<_> = points.iter().map(|p| Some((nines(p.quantile), p.service_seconds))).collect();
    let latency: Vec<_> = points.iter().map(|p| Some((nines(p.quantile), p.latency_seconds))).collect();
    frame.line(&service, "style=\"stroke:var(--b)\" stroke-dasharray=\"2 5\"");
    frame.line(&latency, "style=\"stroke:var(--a)\"");
    frame.names(&[("latency", last.latency_seconds, "--a"), ("service", last.service_seconds, "--b")]);
    frame.finish("share of the releases", "distribution of latency and service time")
}

fn plural(count: usize, what: &str) -> String {
    format!("{} {what}{}", units::count(count as f64), if count == 1 { "" } else { "s" })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Seconds since 1970 as date and time of day, UTC. (Civil from days, by Howard Hinnant.)
fn date(unix: u64) -> String {
    let (days, rest) = (unix / 86_400 + 719_468, unix % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_scales_are_right() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!((step(100.0), step(430.0), step(1.0)), (25.0, 200.0, 0.25));
        let (low, high) = decades(0.002, 0.03);
        assert!((low - 0.001).abs() < 1e-9 && (high - 0.1).abs() < 1e-9);
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
