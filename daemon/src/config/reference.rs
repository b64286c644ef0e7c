//! The reference of all settings, generated from the types of the configuration: names, types and defaults come from the
//! schema that is derived of them, meanings and bounds from their comments. A test proves the bounds on the parser.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::schema::Config;

/// A section of the file, such as `[server]`.
#[derive(Debug)]
pub(crate) struct Section {
    /// The section's header, such as `[server.tls]` or `[[hsm]]`.
    pub header: String,
    /// The first part of its settings' names, such as `server.tls`.
    pub path: String,
    /// The documentation of the section's type.
    pub about: String,
    /// Its settings in alphabetical order.
    pub settings: Vec<Setting>,
}

/// A setting of a section.
#[derive(Debug)]
pub(crate) struct Setting {
    /// The name within its section.
    pub name: String,
    /// Type and unit of its value.
    pub kind: String,
    /// The smallest and the largest number.
    pub bounds: Option<(u64, u64)>,
    /// The default as it is written in the file. `None`: the setting has none.
    pub default: Option<String>,
    /// Whether a section without it is refused.
    pub required: bool,
    /// The documentation of the setting.
    pub meaning: String,
}

/// All sections: first those whose settings a file has most often.
#[must_use]
pub(crate) fn sections() -> Vec<Section> {
    let mut found = Vec::new();
    collect(&schema(), "", false, &mut found);
    found.retain(|section| !section.settings.is_empty());
    let rank = |section: &Section| match section.path.as_str() {
        "" => 0,
        path if path.starts_with("server") => 1,
        "hsm" => 2,
        _ => 3,
    };
    found.sort_by(|one, other| (rank(one), &one.path).cmp(&(rank(other), &other.path)));
    found
}

/// The JSON Schema of the file, for editors.
#[must_use]
pub(crate) fn schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<Config>().to_value()
}

fn collect(schema: &Value, path: &str, is_list: bool, found: &mut Vec<Section>) {
    let header = match (path, is_list) {
        ("", _) => String::new(),
        (path, true) => format!("[[{path}]]"),
        (path, false) => format!("[{path}]"),
    };
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut settings = Vec::new();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let property = present(property);
        if property["properties"].is_object() {
            collect(&property, &inner, false, found);
        } else if property["items"]["properties"].is_object() {
            collect(&property["items"], &inner, true, found);
        } else {
            settings.push(setting(name, &property, required.contains(&name.as_str())));
        }
    }
    settings.sort_by(|one, other| one.name.cmp(&other.name));
    let about = sentence(schema["description"].as_str().unwrap_or_default());
    found.push(Section { header, path: path.to_owned(), about, settings });
}

/// The schema of a value that is there, if it may be absent.
fn present(property: &Value) -> Value {
    let Some(choices) = property["anyOf"].as_array() else { return property.clone() };
    let mut chosen = choices.iter().find(|choice| choice["type"] != "null").cloned().unwrap_or_default();
    for key in ["description", "default"] {
        if let Some(value) = property.get(key) {
            chosen[key] = value.clone();
        }
    }
    chosen
}

fn setting(name: &str, property: &Value, required: bool) -> Setting {
    let meaning = property["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let kind = kind(property);
    let is_number = kind == "integer";
    let unit = unit(name).filter(|_| is_number);
    Setting {
        name: name.to_owned(),
        kind: unit.map_or(kind, str::to_owned),
        bounds: bounds(&meaning).filter(|_| is_number),
        default: property.get("default").and_then(default).or_else(|| said_default(&meaning)),
        required,
        meaning,
    }
}

fn kind(property: &Value) -> String {
    let values: Vec<String> = match (&property["enum"], &property["oneOf"]) {
        (Value::Array(values), _) => values.iter().map(Value::to_string).collect(),
        (_, Value::Array(choices)) => {
            let each = choices.iter().flat_map(|choice| match &choice["enum"] {
                Value::Array(values) => values.clone(),
                _ => vec![choice["const"].clone()],
            });
            each.map(|value| value.to_string()).collect()
        }
        _ => Vec::new(),
    };
    if !values.is_empty() {
        return values.join(" or ");
    }
    let name = match &property["type"] {
        Value::Array(types) => types.iter().find_map(|name| name.as_str().filter(|name| *name != "null")),
        name => name.as_str(),
    };
    match name {
        Some("boolean") => "true or false".to_owned(),
        Some("object") => "table of strings".to_owned(),
        Some("array") => "list of strings".to_owned(),
        Some(name) => name.to_owned(),
        None => "value".to_owned(),
    }
}

/// The unit that the last word of a setting's name says.
fn unit(name: &str) -> Option<&'static str> {
    Some(match name.rsplit('_').next()? {
        "ms" => "milliseconds",
        "seconds" => "seconds",
        "mib" => "MiB",
        "percent" => "percent",
        "rate" if name == "body_rate" => "bytes per second",
        "rate" => "per second",
        _ => return None,
    })
}

/// The numbers in `N to M` of a comment.
fn bounds(meaning: &str) -> Option<(u64, u64)> {
    let number = |word: &str| {
        let digits = word.trim_end_matches(['.', ';', ':', ',', ')']);
        let plain = digits.replace(',', "");
        plain.parse::<u64>().ok().filter(|_| digits.starts_with(|c: char| c.is_ascii_digit()))
    };
    let words: Vec<&str> = meaning.split(' ').collect();
    words.windows(3).find_map(|three| match three {
        [least, "to", most] => Some((number(least)?, number(most)?)),
        _ => None,
    })
}

/// A default as it is written in the file; `None` for the absence of a value.
fn default(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Object(table) if table.is_empty() => None,
        Value::Array(list) if list.is_empty() => None,
        value => Some(value.to_string()),
    }
}

/// The default of a setting whose type has none of its own, from `Default: …` of its comment.
fn said_default(meaning: &str) -> Option<String> {
    let (_, said) = meaning.rsplit_once("Default: ")?;
    let value = said.split(['.', ',']).next()?.trim().trim_matches('`');
    (value != "none").then(|| value.to_owned())
}

/// The first paragraph of a comment without the name of the section, as one sentence.
fn sentence(about: &str) -> String {
    let first = about.split("\n\n").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let text = match first.strip_prefix('`').and_then(|rest| rest.split_once("`: ")) {
        Some((_, text)) => text.to_owned(),
        None => first,
    };
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

impl Setting {
    /// Type, unit and bounds in words.
    #[must_use]
    pub(crate) fn value(&self) -> String {
        match self.bounds {
            Some((least, most)) => format!("{}, {} to {}", self.kind, grouped(least), grouped(most)),
            None => self.kind.clone(),
        }
    }

    /// The default in words.
    #[must_use]
    pub(crate) fn default_in_words(&self) -> String {
        match &self.default {
            Some(default) => default.clone(),
            None if self.required => "required".to_owned(),
            None => "not set".to_owned(),
        }
    }
}

const INTRODUCTION: &str = "The configuration is one TOML file, by default `/etc/claviger/claviger.toml`. An unknown setting is an \
error. Relative paths are relative to the folder of the file. `claviger config check` checks the file, `claviger config show` prints it \
with all defaults, `claviger config schema` prints a JSON Schema for editors, and `claviger init` writes a first file.";

/// What the file is.
#[must_use]
pub(crate) fn introduction() -> &'static str {
    INTRODUCTION
}

/// The reference as a page in Markdown.
#[must_use]
pub(crate) fn markdown() -> String {
    let mut page = format!(
        "# Configuration\n\n<!-- Generated from the types in daemon/src/config: claviger config reference >docs/configuration.md -->\n\n\
         {INTRODUCTION}\n\n[service.md](service.md#reload) says which settings a reload changes, and the manual page \
         `claviger.toml(5)` has the same text as this page.\n"
    );
    for section in sections() {
        let title = if section.header.is_empty() { "Top level".to_owned() } else { format!("`{}`", section.header) };
        page.push_str(&format!("\n## {title}\n\n"));
        if !section.header.is_empty() {
            page.push_str(&format!("{}\n\n", section.about));
        }
        page.push_str("| setting | value | default | meaning |\n|---|---|---|---|\n");
        for setting in &section.settings {
            let cells = [
                format!("`{}`", setting.name),
                setting.value(),
                setting.default.as_ref().map_or_else(|| setting.default_in_words(), |default| format!("`{default}`")),
                setting.meaning.clone(),
            ];
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            page.push_str(&format!("| {} |\n", cells.join(" | ")));
        }
    }
    page
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    const FIRST: &str = "[[hsm]]\nname = \"a\"\nmodule = \"m\"\ntoken = \"t\"\npin_file = \"p\"\n";

    /// Sets one number in a file that is valid otherwise.
    fn parse(section: &Section, setting: &Setting, value: u64) -> Result<Config, String> {
        let line = format!("{} = {value}\n", setting.name);
        let text = match section.header.as_str() {
            "" => line + FIRST,
            "[[hsm]]" => FIRST.to_owned() + &line,
            header => {
                // Whatever else the section needs, such as the endpoints of a store.
                let needed = section.settings.iter().filter(|other| other.required && other.name != setting.name);
                let needed: String = needed
                    .map(|other| match other.kind.as_str() {
                        "list of strings" => format!("{} = [\"http://127.0.0.1:1\"]\n", other.name),
                        _ => format!("{} = \"x\"\n", other.name),
                    })
                    .collect();
                format!("{header}\n{needed}{line}{FIRST}")
            }
        };
        Config::parse(&text, Path::new("/lab/claviger.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_bounds_in_the_comments_are_those_of_the_parser() {
        let mut proved = 0;
        for section in &sections() {
            for setting in section.settings.iter().filter(|setting| setting.bounds.is_some()) {
                let (least, most) = setting.bounds.unwrap();
                let name = format!("{} {}", section.header, setting.name);
                assert!(
                    parse(section, setting, least).is_ok(),
                    "{name} = {least}: {:?}",
                    parse(section, setting, least)
                );
                assert!(parse(section, setting, most).is_ok(), "{name} = {most}: {:?}", parse(section, setting, most));
                // 0 has a meaning of its own for some settings, which their comments tell.
                if least > 0 && !setting.meaning.contains(" 0: ") {
                    assert!(parse(section, setting, least - 1).is_err(), "{name} = {}", least - 1);
                }
                assert!(parse(section, setting, most + 1).is_err(), "{name} = {}", most + 1);
                proved += 1;
            }
        }
        assert!(proved > 25, "{proved}");
    }

    #[test]
    fn every_number_has_bounds_and_every_setting_says_its_default() {
        for section in &sections() {
            for setting in &section.settings {
                let name = format!("{} {}", section.header, setting.name);
                assert!(!setting.meaning.is_empty(), "{name}");
                let is_number = setting.default.as_deref().is_some_and(|text| text.parse::<u64>().is_ok());
                assert!(!is_number || setting.bounds.is_some(), "{name} says no bounds like 1 to 10");
                if let Some((_, said)) = setting.meaning.rsplit_once("Default: ")
                    && let Some(default) = &setting.default
                {
                    let said = said.replace(',', "");
                    let (said, default) = (said.replace(['`', '"'], ""), default.replace('"', ""));
                    assert!(said.starts_with(&default), "{name}: default {default}, and its comment says {said}");
                }
            }
        }
    }

    #[test]
    fn the_page_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page == markdown(), "run: claviger config reference >docs/configuration.md");
    }

    #[test]
    fn a_comment_tells_bounds() {
        assert_eq!(bounds("Limit, 1 to 1,000,000. Default: 5."), Some((1, 1_000_000)));
        assert_eq!(bounds("from a to b, 64 to 1,048,576;"), Some((64, 1_048_576)));
        assert_eq!(bounds("as many as there are"), None);
        assert_eq!(grouped(1_048_576), "1,048,576");
    }
}
