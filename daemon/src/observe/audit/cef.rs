//! Lines of the trail in the Common Event Format, which SIEM products read.

use std::fmt::Write;

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The fields of a line that have a key of their own in CEF.
const KEYS: [(&str, &str); 4] =
    [("request", "externalId"), ("address", "src"), ("host", "shost"), ("outcome", "outcome")];
/// Those that have none, as `cs1` to `cs6` with their labels.
const CUSTOM: [(&str, &str); 6] = [
    ("key", "key"),
    ("certificate", "certificate"),
    ("change", "change"),
    ("hsm", "hsm"),
    ("protector", "protector"),
    ("baseline", "baseline"),
];

#[must_use]
pub(crate) fn event(line: &Value) -> String {
    let text = |field: &str| line[field].as_str().unwrap_or_default();
    let (event, outcome) = (text("event"), text("outcome"));
    let mut out = format!(
        "CEF:0|Claviger|claviger|{}|{}|{} {}|{}|",
        env!("CARGO_PKG_VERSION"),
        header(event),
        header(event),
        header(outcome),
        severity(event, outcome)
    );
    let mut extension = Vec::new();
    if let Ok(time) = OffsetDateTime::parse(text("time"), &Rfc3339) {
        extension.push(format!("rt={}", time.unix_timestamp_nanos() / 1_000_000));
    }
    extension.push(format!("dvchost={}", value(text("node"))));
    for (field, key) in KEYS {
        if let Some(text) = line[field].as_str() {
            extension.push(format!("{key}={}", value(text)));
        }
    }
    if let Some(uid) = line["by"]["uid"].as_u64() {
        extension.push(format!("suid={uid}"));
    }
    if let Some(pid) = line["by"]["pid"].as_i64() {
        extension.push(format!("spid={pid}"));
    }
    if let Some(count) = line["count"].as_u64() {
        extension.push(format!("cnt={count}"));
    }
    if let Some(n) = line["n"].as_u64() {
        extension.push(format!("cn1={n} cn1Label=line"));
    }
    for (at, (field, label)) in CUSTOM.iter().enumerate() {
        if let Some(text) = line[*field].as_str() {
            let number = at + 1;
            extension.push(format!("cs{number}={} cs{number}Label={label}", value(text)));
        }
    }
    let _ = write!(out, "{}", extension.join(" "));
    out
}

/// From 0 to 10: what succeeded is usual, changes by administrators are to be seen, and refusals of known hosts more so.
fn severity(event: &str, outcome: &str) -> u8 {
    match (event, outcome) {
        ("trail" | "checkpoint", _) => 2,
        ("release" | "attest" | "repeats", "success" | "repeated") => 1,
        ("release" | "attest", _) => 6,
        ("refusals", _) => 5,
        (_, "failed" | "refused" | "incomplete" | "unknown") => 7,
        _ => 4,
    }
}

fn header(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace(['\r', '\n'], " ")
}

fn value(text: &str) -> String {
    text.replace('\\', "\\\\").replace('=', "\\=").replace('\n', "\\n").replace('\r', "\\r")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_becomes_an_event() {
        let line = json!({
            "n": 7, "prev": "00", "node": "hgs-1", "time": "2026-11-28T20:00:00.017Z", "request": "9f", "event": "hosts.add",
            "by": {"uid": 0, "pid": 12}, "host": "node-17", "outcome": "success", "change": "labels a=b|c",
        });
        let expected = "|hosts.add|hosts.add success|4|rt=1795896000017 dvchost=hgs-1 externalId=9f shost=node-17 \
                        outcome=success suid=0 spid=12 cn1=7 cn1Label=line cs3=labels a\\=b|c cs3Label=change";
        let event = event(&line);
        assert!(event.starts_with("CEF:0|Claviger|claviger|") && event.ends_with(expected), "{event}");
        assert_eq!(severity("release", "InvalidProtectorException"), 6);
        assert_eq!(header("a|b\\c\n"), "a\\|b\\\\c ");
    }
}
