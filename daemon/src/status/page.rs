//! The status page: one document without scripts, which reloads itself.
//!
//! The page must work when everything else is down, so it depends on nothing: no file, no other server, no script. The
//! process itself holds the data of the last hour.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use claviger_hsm::{MemberState, MemberStatus};
use time::OffsetDateTime;
use time::macros::format_description;

use super::verdict::{Level, Verdict};
use crate::observe::history::{INTERVAL, MemberPoint, POINTS, Point};
use crate::observe::metrics::{Readings, SLO_SECONDS};

/// Seconds between reloads of the page.
const REFRESH: u32 = 5;
/// Width of a graph in its own units: one per interval.
const WIDTH: usize = POINTS;
/// Height of a graph, in its own units.
const HEIGHT: f64 = 100.0;

/// Renders the page of the daemon on `node`.
pub(super) fn render(verdict: &Verdict, node: &str, readings: &Readings, points: &[Point], now: SystemTime) -> String {
    let level = match verdict.level {
        Level::Good => "good",
        Level::Degraded => "degraded",
        Level::Bad => "bad",
    };
    let last = points.last();
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"refresh\" content=\"{REFRESH}\">\
         <title>{0}{1} · Claviger</title><style>{STYLE}</style></head>\n<body class=\"{level}\">\n\
         <header><p class=\"who\"><b>{1}</b> · Claviger {2}</p><h1>{3}</h1>",
        if verdict.level == Level::Good { "" } else { "(!) " },
        escaped(node),
        env!("CARGO_PKG_VERSION"),
        escaped(&verdict.headline),
    );
    if !verdict.remarks.is_empty() {
        page.push_str("<ul>");
        for remark in &verdict.remarks {
            add(&mut page, format_args!("<li>{}</li>", escaped(remark)));
        }
        page.push_str("</ul>");
    }
    page.push_str("</header>\n<main>\n");
    page.push_str(&tiles(readings, last));
    page.push_str(&releases(points));
    page.push_str(&latency(points));
    page.push_str(
        "<section class=\"hsms\"><h2>HSMs <small>with the operations per second of their last hour, all on one scale</small></h2>\n",
    );
    let most = readings.members.iter().flat_map(|member| points.iter().filter_map(|point| served(&member.name, point)));
    let top = round_up(most.fold(1.0, f64::max));
    for member in &readings.members {
        page.push_str(&card(member, points, top, now));
    }
    if !readings.members.is_empty() {
        page.push_str(AXIS);
    }
    page.push_str("</section>\n</main>\n");
    add(
        &mut page,
        format_args!(
            "<footer>{} UTC · reloads every {REFRESH} s · \
             <a href=\"/metrics\">metrics</a> · <a href=\"/ready\">ready</a> · <a href=\"/live\">live</a></footer>\n\
             </body></html>\n",
            clock(now),
        ),
    );
    page
}

/// The tiles with the current numbers.
fn tiles(readings: &Readings, last: Option<&Point>) -> String {
    let rate = |count: fn(&Point) -> u64| last.map_or(0.0, |point| per_second(count(point), point));
    let quantile = |of: fn(&(Duration, Duration)) -> Duration| {
        last.and_then(|point| point.latency.as_ref()).map_or("–".to_owned(), |latency| duration(of(latency)))
    };
    let up = readings.members.iter().filter(|member| member.state == MemberState::Up).count();
    let failed = rate(|point| point.failed);
    let late = last.and_then(|point| point.latency).is_some_and(|(_, most)| most.as_secs_f64() > SLO_SECONDS);
    let tiles = [
        ("releases", format!("{}/s", number(rate(|point| point.success))), false),
        ("failed", format!("{}/s", number(failed)), failed > 0.0),
        ("refused", format!("{}/s", number(rate(|point| point.refused))), false),
        ("half within (p50)", quantile(|latency| latency.0), false),
        ("99 % within (p99)", quantile(|latency| latency.1), late),
        ("waiting", readings.load.waiting.to_string(), readings.load.waiting >= readings.limits.waiting.max(1)),
        ("HSMs up", format!("{up} of {}", readings.members.len()), up < readings.members.len()),
    ];
    let mut text = "<section class=\"tiles\">".to_owned();
    for (name, value, alarming) in tiles {
        let class = if alarming { " class=\"alarming\"" } else { "" };
        add(&mut text, format_args!("<div{class}><b>{value}</b><span>{name}</span></div>"));
    }
    text.push_str("</section>\n");
    text
}

/// The graph of releases per second: successful ones, with failed ones on top.
fn releases(points: &[Point]) -> String {
    let success = |point: &Point| per_second(point.success, point);
    let all = |point: &Point| per_second(point.success + point.failed, point);
    let top = round_up(points.iter().map(all).fold(1.0, f64::max));
    let drawing = format!(
        "<path class=\"failed area\" d=\"{}\"/><path class=\"success area\" d=\"{}\"/>",
        area(points, top, all),
        area(points, top, success)
    );
    let legend = "<i class=\"success\"></i>released <i class=\"failed\"></i>failed";
    graph("Releases per second", legend, &number(top), &drawing)
}

/// The graph of release latency.
fn latency(points: &[Point]) -> String {
    let seconds = |of: fn(&(Duration, Duration)) -> Duration| {
        move |point: &Point| point.latency.as_ref().map(|latency| of(latency).as_secs_f64())
    };
    let (half, most_of_all) = (seconds(|latency| latency.0), seconds(|latency| latency.1));
    let top = round_up(points.iter().filter_map(most_of_all).fold(0.001, f64::max));
    let mut drawing = format!(
        "<path class=\"p99 line\" d=\"{}\"/><path class=\"p50 line\" d=\"{}\"/>",
        line(points, top, most_of_all),
        line(points, top, half)
    );
    if top >= SLO_SECONDS {
        let y = height(SLO_SECONDS, top);
        add(&mut drawing, format_args!("<path class=\"slo line\" d=\"M0 {y:.1}H{WIDTH}\"/>"));
    }
    let promise = duration(Duration::from_secs_f64(SLO_SECONDS));
    let legend =
        format!("<i class=\"p50\"></i>half within (p50) <i class=\"p99\"></i>99 % within (p99); promised: {promise}");
    graph("How long a release takes", &legend, &duration(Duration::from_secs_f64(top)), &drawing)
}

fn graph(title: &str, legend: &str, top: &str, drawing: &str) -> String {
    format!(
        "<section class=\"graph\"><h2>{title} <small>{legend}</small></h2><div class=\"plot\"><span class=\"top\">{top}</span>\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{title}, the last hour\">\
         <path class=\"grid line\" d=\"M0 0H{WIDTH}M0 50H{WIDTH}M0 {HEIGHT}H{WIDTH}\"/>{drawing}</svg></div>{AXIS}</section>\n"
    )
}

const AXIS: &str =
    "<div class=\"axis\"><span>60 min ago</span><span>45</span><span>30</span><span>15</span><span>now</span></div>";

/// Position of a point on the time axis. The newest point is at the right edge.
fn place(points: &[Point], at: usize) -> usize {
    WIDTH - points.len().min(WIDTH) + at
}

fn height(value: f64, top: f64) -> f64 {
    HEIGHT - (value / top).min(1.0) * HEIGHT
}

/// A filled step graph.
fn area(points: &[Point], top: f64, value: impl Fn(&Point) -> f64) -> String {
    let mut path = format!("M{} {HEIGHT}", place(points, 0));
    for point in points {
        let y = height(value(point), top);
        add(&mut path, format_args!("V{y:.1}h1"));
    }
    add(&mut path, format_args!("V{HEIGHT}Z"));
    path
}

/// A step graph with gaps where there is no value.
fn line(points: &[Point], top: f64, value: impl Fn(&Point) -> Option<f64>) -> String {
    let mut path = String::new();
    let mut drawing = false;
    for (at, point) in points.iter().enumerate() {
        match value(point) {
            Some(value) => {
                let y = height(value, top);
                if drawing {
                    add(&mut path, format_args!("V{y:.1}h1"));
                } else {
                    add(&mut path, format_args!("M{} {y:.1}h1", place(points, at)));
                }
                drawing = true;
            }
            None => drawing = false,
        }
    }
    path
}

/// The card of a member: state, last hour, numbers. `top` is the operations per second at full height of the strip.
fn card(member: &MemberStatus, points: &[Point], top: f64, now: SystemTime) -> String {
    let up = member.state == MemberState::Up;
    let mut text = format!(
        "<article class=\"{}\"><h3>{} <em>{}</em> <small>for {}</small></h3>{}<p>",
        shade(member.state),
        escaped(&member.name),
        words(member.state),
        span(now.duration_since(member.since).unwrap_or_default()),
        strip(&member.name, points, top),
    );
    let mut facts = Vec::new();
    if let Some((of, point)) = points.last().and_then(|point| Some((of_member(&member.name, point)?, point))) {
        if up {
            facts.push(format!("{} operations/s", number(per_second(of.calls, point))));
        }
        // A call is counted when it returns. After a hanging call, the numbers would belong to an earlier interval.
        let time = point.lasted.as_secs_f64() * member.sessions_limit.max(1) as f64;
        if up
            && of.worked.as_secs_f64() <= time
            && let Some(mean) = of.worked.checked_div(u32::try_from(of.calls).unwrap_or(u32::MAX))
        {
            facts.push(format!("{} for one", duration(mean)));
            facts.push(format!("{:.0} % busy", of.worked.as_secs_f64() / time * 100.0));
        }
        if of.faults > 0 {
            let what = if up { "failed" } else { "tries failed" };
            facts.push(format!("<strong>{} {what} in the last {} s</strong>", of.faults, INTERVAL.as_secs()));
        }
    }
    if up || member.waiting > 0 {
        facts.push(format!("{} waiting", member.waiting));
    }
    if up && member.sessions_limit < member.sessions_wanted {
        facts.push(format!("{} sessions of {} wanted", member.sessions_limit, member.sessions_wanted));
    }
    if member.sessions_stuck > 0 {
        facts.push(format!("<strong>{} calls hang</strong>", member.sessions_stuck));
    }
    match member.closings {
        0 => {}
        1 => facts.push("down once since the start".to_owned()),
        times => facts.push(format!("down {times} times since the start")),
    }
    text.push_str(&facts.join(" · "));
    text.push_str("</p>");
    if let Some(error) = &member.last_error {
        let last = (escaped(&error.text), clock(error.at));
        add(&mut text, format_args!("<p class=\"error\">last fault: {} <small>{} UTC</small></p>", last.0, last.1));
    }
    text.push_str("</article>\n");
    text
}

fn of_member<'p>(name: &str, point: &'p Point) -> Option<&'p MemberPoint> {
    point.members.iter().find(|of| of.name == name)
}

/// Operations per second of a member in an interval; `None` if the member was not up at its end.
fn served(name: &str, point: &Point) -> Option<f64> {
    of_member(name, point).filter(|of| of.state == MemberState::Up).map(|of| per_second(of.calls, point))
}

/// The last hour of a member: its operations while it was up, a filled band while it was not.
fn strip(name: &str, points: &[Point], top: f64) -> String {
    let states = points.iter().enumerate().map(|(at, point)| {
        let shade = of_member(name, point).map(|of| if of.closings > 0 { "bad" } else { shade(of.state) });
        (place(points, at), shade.unwrap_or("none"))
    });
    let mut runs: Vec<(usize, usize, &str)> = Vec::new();
    for (at, shade) in states {
        match runs.last_mut() {
            Some((_, end, last)) if *last == shade => *end = at + 1,
            _ => runs.push((at, at + 1, shade)),
        }
    }
    let mut text = format!(
        "<div class=\"plot\"><span class=\"top\">{}/s</span><svg class=\"strip\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"the last hour of {}, up to {} operations a second\">",
        number(top),
        escaped(name),
        number(top)
    );
    for (from, to, shade) in runs {
        let width = to - from;
        add(
            &mut text,
            format_args!("<rect class=\"{shade}\" x=\"{from}\" y=\"0\" width=\"{width}\" height=\"{HEIGHT}\"/>"),
        );
    }
    let path = area(points, top, |point| served(name, point).unwrap_or(0.0));
    add(&mut text, format_args!("<path class=\"success\" d=\"{path}\"/></svg></div>"));
    text
}

fn shade(state: MemberState) -> &'static str {
    match state {
        MemberState::Up => "good",
        MemberState::Draining | MemberState::Drained | MemberState::Off => "idle",
        MemberState::Down | MemberState::Probing | MemberState::Hung | MemberState::PinRefused => "bad",
    }
}

fn words(state: MemberState) -> &'static str {
    match state {
        MemberState::PinRefused => "PIN refused",
        // This state lasts only for moments and occurs repeatedly.
        MemberState::Probing => MemberState::Down.name(),
        other => other.name(),
    }
}

fn per_second(count: u64, point: &Point) -> f64 {
    count as f64 / point.lasted.as_secs_f64().max(0.001)
}

/// Rounds up to 1, 2, 5, 10, 20 …
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|edge| *edge >= value).unwrap_or(10.0 * power)
}

/// Formats a number; small numbers get two digits.
fn number(value: f64) -> String {
    if value == 0.0 || value >= 10.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// Formats a measured duration.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 1.0 {
        format!("{} s", number(seconds))
    } else if seconds >= 0.001 {
        format!("{} ms", number(seconds * 1e3))
    } else {
        format!("{:.0} µs", seconds * 1e6)
    }
}

/// Formats an elapsed time.
fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn clock(time: SystemTime) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    OffsetDateTime::from(time).format(format).unwrap_or_default()
}

fn add(text: &mut String, more: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(more);
}

/// Escapes text for the document.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = include_str!("page.css");

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::{member, point};
    use super::super::verdict::judge;
    use super::*;
    use claviger_hsm::LastError;
    use std::process::Command;

    fn page(members: Vec<MemberStatus>, points: &[Point]) -> String {
        let readings = Readings { members, ..Readings::default() };
        render(&judge(&readings, points, 0), "hgs-1", &readings, points, SystemTime::UNIX_EPOCH)
    }

    /// Checks that xmllint finds no errors, apart from SVG elements, which it does not know.
    fn assert_well_formed(page: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), page).unwrap();
        let checked = Command::new("xmllint").args(["--html", "--noout"]).arg(file.path()).output().unwrap();
        let errors = String::from_utf8(checked.stderr).unwrap();
        let known = ["header", "main", "section", "article", "footer", "svg", "path", "rect"];
        for line in errors.lines().filter(|line| line.contains("error")) {
            assert!(known.iter().any(|tag| line.ends_with(&format!("Tag {tag} invalid"))), "{line}");
        }
    }

    #[test]
    fn the_page_needs_nothing_and_is_whole() {
        let members = vec![member("hsm-a", MemberState::Up), member("hsm-b", MemberState::Hung)];
        let mut points = vec![point(40, 2), point(0, 0), point(60, 0)];
        points[1].latency = None;
        for page in [page(members, &points), page(Vec::new(), &[])] {
            assert_well_formed(&page);
            for outside in ["http://", "https://", "<script", "src=", "url(", "@import", "<link"] {
                assert!(!page.contains(outside), "{outside}");
            }
            for (open, close) in [("<section", "</section>"), ("<article", "</article>"), ("<svg", "</svg>")] {
                assert_eq!(page.matches(open).count(), page.matches(close).count(), "{open}");
            }
        }
    }

    #[test]
    fn the_page_is_as_accepted() {
        let mut down = member("hsm-b", MemberState::Down);
        let remedy = Some("restart the appliance".to_owned());
        down.last_error = Some(LastError { text: "CKR_DEVICE_ERROR".to_owned(), at: SystemTime::UNIX_EPOCH, remedy });
        let page = page(vec![member("hsm-a", MemberState::Up), down], &[point(40, 2), point(60, 0)]);
        // A new release is no change of the page.
        let page = page.replace(env!("CARGO_PKG_VERSION"), "VERSION").replace(STYLE, "STYLE");
        expect_test::expect_file!["page.accepted.html"].assert_eq(&page);
    }

    #[test]
    fn it_says_whose_page_it_is_and_what_its_scales_are() {
        let mut points = vec![point(40, 2)];
        points[0].latency = Some((Duration::from_millis(20), Duration::from_secs(3)));
        let (name, worked) = ("hsm-a".to_owned(), Duration::ZERO);
        points[0].members =
            vec![MemberPoint { name, state: MemberState::Up, calls: 420, faults: 0, closings: 0, worked }];
        let page = page(vec![member("hsm-a", MemberState::Up)], &points);
        let version = format!("<b>hgs-1</b> · Claviger {}", env!("CARGO_PKG_VERSION"));
        for expected in [
            version.as_str(),
            "<title>(!) hgs-1 · Claviger</title>",
            "half within (p50)",
            "<span class=\"top\">50/s</span>",
            "<div class=\"alarming\"><b>3.0 s</b><span>99 % within (p99)</span></div>",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
    }

    #[test]
    fn what_comes_from_outside_is_text() {
        let mut bad = member("<b>&\"", MemberState::Down);
        bad.last_error =
            Some(LastError { text: "<script>alert(1)</script>".to_owned(), at: SystemTime::UNIX_EPOCH, remedy: None });
        let page = page(vec![bad], &[]);
        assert!(!page.contains("<script") && !page.contains("<b>&\""));
        assert!(page.contains("&lt;b&gt;&amp;&quot;") && page.contains("&lt;script&gt;"));
        assert_well_formed(&page);
    }

    #[test]
    fn graphs_show_what_was() {
        let mut points = vec![point(10, 10), point(40, 0)];
        points[0].latency = None;
        // Two intervals of 10 s at the right edge: 1 and 4 releases per second of 5.
        let success = |point: &Point| per_second(point.success, point);
        assert_eq!(area(&points, 5.0, success), "M358 100V80.0h1V20.0h1V100Z");
        let p99 = |point: &Point| point.latency.map(|(_, most)| most.as_secs_f64());
        assert_eq!(line(&points, 0.2, p99), "M359 50.0h1", "a gap where nothing was released");
        let page = page(vec![member("hsm-a", MemberState::Up)], &points);
        assert!(page.contains("V60.0h1V20.0h1V100Z"), "failures are on top of what was released");
    }

    #[test]
    fn a_strip_has_a_run_for_each_state() {
        let mut points = vec![point(1, 0); 6];
        let states = [
            (MemberState::Up, 0),
            (MemberState::Up, 1),
            (MemberState::Down, 0),
            (MemberState::Up, 0),
            (MemberState::Up, 0),
            (MemberState::Drained, 0),
        ];
        for (point, (state, closings)) in points.iter_mut().zip(states) {
            let (name, worked) = ("a".to_owned(), Duration::ZERO);
            point.members = vec![MemberPoint { name, state, calls: 50, faults: 0, closings, worked }];
        }
        let strip = strip("a", &points, 10.0);
        assert!(strip.contains("M354 100V50.0h1V50.0h1V100.0h1V50.0h1V50.0h1V100.0h1V100Z"), "{strip}");
        let runs: Vec<_> = strip.split("<rect ").skip(1).map(|rect| rect.split("/>").next().unwrap()).collect();
        assert_eq!(
            runs,
            [
                "class=\"good\" x=\"354\" y=\"0\" width=\"1\" height=\"100\"",
                "class=\"bad\" x=\"355\" y=\"0\" width=\"2\" height=\"100\"",
                "class=\"good\" x=\"357\" y=\"0\" width=\"2\" height=\"100\"",
                "class=\"idle\" x=\"359\" y=\"0\" width=\"1\" height=\"100\"",
            ]
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.25, 9.96, 10.4, 1234.5].map(number), ["0", "0.2", "10.0", "10", "1234"]);
        let ms = |ms: f64| duration(Duration::from_secs_f64(ms / 1e3));
        assert_eq!([0.05, 1.5, 42.0, 1500.0].map(ms), ["50 µs", "1.5 ms", "42 ms", "1.5 s"]);
        assert_eq!([0.7, 1.0, 1.1, 3.0, 51.0].map(round_up), [1.0, 1.0, 2.0, 5.0, 100.0]);
        assert_eq!([5, 600, 7300, 200_000].map(|s| span(Duration::from_secs(s))), ["5 s", "10 min", "2 h", "2 days"]);
    }
}
