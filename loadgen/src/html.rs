//! Results as pages: one file each, pictures inside, nothing loaded from elsewhere, light and dark.

mod capacity;
mod compare;
mod plan;
mod run;

pub use capacity::page as capacity;
pub use compare::page as compare;
pub use plan::page as plan;
pub use run::page as run;

use crate::about::About;
use crate::report::{Bound, Of};
use crate::units;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 260.0;
/// Room for the labels: left, right, top, bottom.
const MARGIN: (f64, f64, f64, f64) = (64.0, 84.0, 14.0, 40.0);

const STYLE: &str = "
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5d6878;--line:#e3e7ec;--axis:#c3cad3;
--a:#1f6feb;--fill:#1f6feb22;--b:#8a94a3;--bad:#cf222e;--warn:#b86e00;--good:#1a7f37;
--q1:#79acf0;--q2:#3f86ea;--q3:#1450a8;--q4:#6b4fbb;--obj:#0f8a6d}
@media (prefers-color-scheme:dark){:root{--page:#0f1318;--card:#171c23;--ink:#e6eaf0;--soft:#97a3b4;--line:#262d37;
--axis:#3d4754;--a:#5b9dff;--fill:#5b9dff26;--b:#8490a1;--bad:#ff6b6b;--warn:#f0a840;--good:#4cc26c;
--q1:#4a7bc0;--q2:#5b9dff;--q3:#a9cdff;--q4:#b9a3ff;--obj:#3fd0aa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:16px;margin:0 0 2px}
p{margin:0}.soft{color:var(--soft)}header{margin-bottom:20px}
.banner{padding:10px 14px;border-radius:8px;margin:14px 0;border:1px solid var(--bad);color:var(--bad);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:12px;margin:18px 0}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}.tile b{display:block;font-size:21px;line-height:1.35;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile b.unknown{font-size:16px;line-height:1.77;color:var(--soft)}.tile span{color:var(--soft);font-size:13px}.bad{color:var(--bad)}.good{color:var(--good)}
section{padding:16px 18px;margin:14px 0}section p.soft{font-size:13px;margin-bottom:8px}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .name{font-weight:600}.grid{stroke:var(--line)}.axis{stroke:var(--axis)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:600}tr:last-child td{border-bottom:0}.wide{overflow-x:auto}
table.facts td:first-child{color:var(--soft);white-space:nowrap;vertical-align:top;width:1%}
table.facts td{text-align:left;overflow-wrap:anywhere}table.facts.two td{width:44%}table.facts.two td:first-child{width:1%}
.facts .command{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12.5px}
.objective{stroke:var(--obj);stroke-width:1.5;stroke-dasharray:7 4}svg .objective-name{fill:var(--obj);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin:0 0 6px}
.legend i{display:inline-block;width:22px;height:0;border-top:3px solid;vertical-align:middle;margin-right:6px}
.legend i.dashed{border-top-style:dashed}td:first-child{white-space:nowrap}
.mark{stroke:var(--axis);stroke-width:1.5}.note{margin:10px 0 0}
@media (max-width:640px){main{padding:20px 12px 32px}section{padding:12px 12px}svg{min-width:560px}.picture{overflow-x:auto}th,td{padding:5px 6px}
table.facts td:first-child{white-space:normal;width:28%}}
";

/// A whole page.
fn document(title: &str, what: &str, banners: &[String], body: &str) -> String {
    let banners: String =
        banners.iter().map(|banner| format!("<p class=\"banner\">{}</p>\n", escape(banner))).collect();
    let (title, what) = (escape(title), escape(what));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><main>\n<header><h1>{title}</h1><p class=\"soft\">{what}</p></header>\n{banners}{body}</main></body></html>\n"
    )
}

/// The title that was given, or this one.
fn title_or(about: Option<&About>, otherwise: &str) -> String {
    about.and_then(|about| about.title.clone()).unwrap_or_else(|| otherwise.to_owned())
}

fn section(title: &str, what: &str, content: &str) -> String {
    format!("<section><h2>{title}</h2><p class=\"soft\">{what}</p>{content}</section>\n")
}

fn tile(name: &str, value: &str, class: &str) -> String {
    format!("<div class=\"tile\"><b class=\"{class}\">{value}</b><span>{name}</span></div>")
}

fn tiles(tiles: &[String]) -> String {
    format!("<div class=\"tiles\">{}</div>\n", tiles.concat())
}

/// What the lines of a picture are: name, colour, whether it is dashed.
fn legend(lines: &[(&str, &str, bool)]) -> String {
    let line = |(name, colour, dashed): &(&str, &str, bool)| {
        let class = if *dashed { " class=\"dashed\"" } else { "" };
        format!("<span><i{class} style=\"border-color:var({colour})\"></i>{}</span>", escape(name))
    };
    format!("<div class=\"legend\">{}</div>", lines.iter().map(line).collect::<String>())
}

/// Names and values.
fn facts(rows: &[[String; 2]]) -> String {
    let row = |[name, value]: &[String; 2]| {
        let class = if name == "command" { " class=\"command\"" } else { "" };
        format!("<tr><td>{}</td><td{class}>{}</td></tr>", escape(name), escape(value))
    };
    format!("<table class=\"facts\">{}</table>", rows.iter().map(row).collect::<String>())
}

/// The first row is the head. Cells are markup.
fn table(rows: &[Vec<String>]) -> String {
    let row = |kind: &str, cells: &Vec<String>| {
        format!("<tr>{}</tr>", cells.iter().map(|cell| format!("<{kind}>{cell}</{kind}>")).collect::<String>())
    };
    let (head, rest) = rows.split_first().map_or((String::new(), rows), |(head, rest)| (row("th", head), rest));
    let rest: String = rest.iter().map(|cells| row("td", cells)).collect();
    format!("<div class=\"wide\"><table>{head}{rest}</table></div>")
}

const NONE: &str = "<p class=\"bad\">No release succeeded.</p>";

/// Those conditions that are about latency, for pictures of it.
fn latency_bounds<'a>(bounds: impl Iterator<Item = &'a Bound>) -> Vec<&'a Bound> {
    bounds.filter(|bound| bound.of == Of::Latency).collect()
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

    /// What has to hold, across the picture.
    fn objective(&mut self, y: f64, name: &str) {
        let (at, left, right) = (self.at_y(y), MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"objective\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"objective-name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            left + 6.0,
            at - 5.0,
            escape(name)
        ));
    }

    /// A place on the horizontal scale; `row` keeps names apart.
    fn mark(&mut self, x: f64, name: &str, class: &str, row: u8) {
        let (at, top, bottom) = (self.at_x(x), MARGIN.2, HEIGHT - MARGIN.3);
        let y = top + 10.0 + 15.0 * f64::from(row);
        // On the side on which there is room.
        let (x, anchor) = if at > WIDTH * 0.6 { (at - 5.0, "end") } else { (at + 5.0, "start") };
        self.svg.push_str(&format!(
            "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"{class}-name name\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escape(name)
        ));
    }

    fn dot(&mut self, x: f64, y: f64, colour: &str, hint: &str) {
        let (x, y) = (self.at_x(x), self.at_y(y));
        self.svg.push_str(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" style=\"fill:var({colour})\"><title>{}</title></circle>",
            escape(hint)
        ));
    }

    /// The same, small.
    fn point(&mut self, x: f64, y: f64, colour: &str, hint: &str) {
        let (x, y) = (self.at_x(x), self.at_y(y));
        self.svg.push_str(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" style=\"fill:var({colour})\"><title>{}</title></circle>",
            escape(hint)
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
        format!(
            "<div class=\"picture\"><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{description}\">{}</svg></div>",
            self.svg
        )
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

/// Shares of the releases, each step of which leaves out ten times fewer.
fn quantile_axis(frame: &mut Frame) {
    for (at, label) in (0_u8..).zip(["0 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"]) {
        if f64::from(at) <= frame.x.1 {
            frame.vertical(f64::from(at), label);
        }
    }
}

/// Numbers on the horizontal scale.
fn count_axis_x(frame: &mut Frame) {
    let (left, right) = frame.x;
    let step = step(right - left).max(1.0);
    let mut at = (left / step).ceil() * step;
    while at <= right {
        frame.vertical(at, &units::count(at));
        at += step;
    }
}

fn plural(count: usize, what: &str) -> String {
    format!("{} {what}{}", units::count(count as f64), if count == 1 { "" } else { "s" })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_right() {
        assert_eq!((step(100.0), step(430.0), step(1.0)), (25.0, 200.0, 0.25));
        let (low, high) = decades(0.002, 0.03);
        assert!((low - 0.001).abs() < 1e-9 && (high - 0.1).abs() < 1e-9);
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
