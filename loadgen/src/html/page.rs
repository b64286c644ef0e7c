//! Building blocks of all pages.

use crate::about::About;
use crate::bound::{Bound, Of};
use crate::units;

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

/// Formats a complete page.
pub(super) fn document(title: &str, what: &str, banners: &[String], body: &str) -> String {
    let banners: String =
        banners.iter().map(|banner| format!("<p class=\"banner\">{}</p>\n", escape(banner))).collect();
    let (title, what) = (escape(title), escape(what));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><main>\n<header><h1>{title}</h1><p class=\"soft\">{what}</p></header>\n{banners}{body}</main></body></html>\n"
    )
}

/// The given title, or else a default.
pub(super) fn title_or(about: Option<&About>, otherwise: &str) -> String {
    about.and_then(|about| about.title.clone()).unwrap_or_else(|| otherwise.to_owned())
}

pub(super) fn section(title: &str, what: &str, content: &str) -> String {
    format!("<section><h2>{title}</h2><p class=\"soft\">{what}</p>{content}</section>\n")
}

pub(super) fn tile(name: &str, value: &str, class: &str) -> String {
    format!("<div class=\"tile\"><b class=\"{class}\">{value}</b><span>{name}</span></div>")
}

pub(super) fn tiles(tiles: &[String]) -> String {
    format!("<div class=\"tiles\">{}</div>\n", tiles.concat())
}

/// The legend of a picture: name, colour, and `true` for a dashed line.
pub(super) fn legend(lines: &[(&str, &str, bool)]) -> String {
    let line = |(name, colour, dashed): &(&str, &str, bool)| {
        let class = if *dashed { " class=\"dashed\"" } else { "" };
        format!("<span><i{class} style=\"border-color:var({colour})\"></i>{}</span>", escape(name))
    };
    format!("<div class=\"legend\">{}</div>", lines.iter().map(line).collect::<String>())
}

/// Formats names and values.
pub(super) fn facts(rows: &[[String; 2]]) -> String {
    let row = |[name, value]: &[String; 2]| {
        let class = if name == "command" { " class=\"command\"" } else { "" };
        format!("<tr><td>{}</td><td{class}>{}</td></tr>", escape(name), escape(value))
    };
    format!("<table class=\"facts\">{}</table>", rows.iter().map(row).collect::<String>())
}

/// Formats a table. The first row is the head, and cells are markup.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let row = |kind: &str, cells: &Vec<String>| {
        format!("<tr>{}</tr>", cells.iter().map(|cell| format!("<{kind}>{cell}</{kind}>")).collect::<String>())
    };
    let (head, rest) = rows.split_first().map_or((String::new(), rows), |(head, rest)| (row("th", head), rest));
    let rest: String = rest.iter().map(|cells| row("td", cells)).collect();
    format!("<div class=\"wide\"><table>{head}{rest}</table></div>")
}

pub(super) const NONE: &str = "<p class=\"bad\">No release succeeded.</p>";

/// Selects the bounds on latency, for pictures of latency.
pub(super) fn latency_bounds<'a>(bounds: impl Iterator<Item = &'a Bound>) -> Vec<&'a Bound> {
    bounds.filter(|bound| bound.of == Of::Latency).collect()
}

pub(super) fn plural(count: usize, what: &str) -> String {
    format!("{} {what}{}", units::count(count as f64), if count == 1 { "" } else { "s" })
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_not_taken_for_markup() {
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
