//! Finds the line and the setting that the TOML parser refuses.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::ConfigError;

pub(super) fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The setting at an offset, for example `hsm[2].token`.
fn setting_at(table: &DeTable<'_>, offset: usize, prefix: &str) -> Option<String> {
    let mut best: Option<(usize, String)> = None;
    for (name, value) in table {
        let path = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        let deeper = match value.get_ref() {
            DeValue::Table(inner) => setting_at(inner, offset, &path),
            DeValue::Array(items) => items.iter().enumerate().find_map(|(index, item)| {
                let path = format!("{path}[{}]", index + 1);
                let inner = item.get_ref().as_table().and_then(|inner| setting_at(inner, offset, &path));
                inner.or_else(|| item.span().contains(&offset).then_some(path))
            }),
            _ => None,
        };
        if let Some(deeper) = deeper {
            return Some(deeper);
        }
        let (key, value) = (name.span(), value.span());
        for span in [key, value] {
            // Use the shortest span that contains the offset: the span of a section may contain everything after its
            // header.
            if span.contains(&offset) && best.as_ref().is_none_or(|(length, _)| span.len() < *length) {
                best = Some((span.len(), path.clone()));
            }
        }
    }
    best.map(|(_, path)| path)
}

/// The parser's error, with file, line, setting and advice.
pub(super) fn from_toml(error: &toml::de::Error, text: &str, path: &Path) -> ConfigError {
    let problem = error.message().trim().to_owned();
    let offset = error.span().map(|span| span.start);
    let setting = offset.and_then(|offset| setting_at(DeTable::parse(text).ok()?.get_ref(), offset, ""));
    let advice = if problem.starts_with("unknown field") {
        "correct its spelling or remove it"
    } else if problem.starts_with("missing field") {
        "add it to this section"
    } else if problem.starts_with("duplicate") {
        "remove one of the two"
    } else if setting.is_some() {
        "write a value of the kind that is expected"
    } else {
        "correct the TOML at this line"
    };
    ConfigError {
        file: path.to_owned(),
        line: offset.map(|offset| line_at(text, offset)),
        setting,
        problem,
        advice: advice.to_owned(),
    }
}
