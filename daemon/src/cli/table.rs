//! Prints replies as tables for people.

use serde_json::Value;

use crate::sys::print::say;

/// A field as text: times as dates, booleans as words.
pub(super) fn text(row: &Value, field: &str) -> String {
    match (field, &row[field]) {
        (
            "added" | "not_after" | "replaced" | "trusted_until" | "revoked" | "since" | "counted_since"
            | "last_attestation" | "last_release",
            Value::Number(seconds),
        ) => date(seconds.as_i64().unwrap_or_default()),
        (_, Value::String(text)) => text.clone(),
        (_, Value::Bool(yes)) => if *yes { "yes" } else { "no" }.to_owned(),
        (_, Value::Array(several)) if several.is_empty() => "-".to_owned(),
        (_, Value::Array(several)) => several.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        (_, Value::Null) => "-".to_owned(),
        (_, other) => other.to_string(),
    }
}

pub(super) fn date(seconds: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]Z");
    let at = time::OffsetDateTime::from_unix_timestamp(seconds).ok();
    at.and_then(|at| at.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// Removes control characters from text of other origin, which a terminal would interpret.
pub(super) fn plain(text: &str) -> String {
    let tame = |c: char| match c {
        '\n' => c.to_string(),
        // Also remove characters that change the direction of text, and line separators other than '\n'.
        c if c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
        {
            c.escape_unicode().to_string()
        }
        c => c.to_string(),
    };
    text.chars().map(tame).collect()
}

/// Prints rows in columns with the width of their longest text.
pub(super) fn table(rows: &Value, columns: &[(&str, &str)]) {
    let rows = rows.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut lines = vec![columns.iter().map(|(title, _)| (*title).to_owned()).collect::<Vec<_>>()];
    // Text from others, for example a certificate's subject, must not move the cursor.
    let cell = |row, field| plain(&text(row, field)).replace('\n', " ");
    lines.extend(rows.iter().map(|row| columns.iter().map(|(_, field)| cell(row, field)).collect()));
    let widths: Vec<usize> =
        (0..columns.len()).map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0)).collect();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        say!("{}", cells.join("  ").trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn terminals_are_not_told_what_to_do() {
        assert_eq!(plain("é: a\nb"), "é: a\nb");
        assert_eq!(plain("\u{1b}[2J\u{9b}\r\u{202e}"), "\\u{1b}[2J\\u{9b}\\u{d}\\u{202e}");
    }
}
