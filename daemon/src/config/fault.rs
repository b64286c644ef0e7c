//! A wrong setting, with the path to it in the document.

use std::borrow::Cow;
use std::path::Path;

use toml::de::{DeArray, DeTable};

use super::disagreement::Disagreement;
use super::error::ConfigError;
use super::line::line_at;

/// A step from the document's root to a setting, used to find its line.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A setting, or a name from the file, for example of an environment variable.
    Key(Cow<'static, str>),
    Index(usize),
}

/// A setting of a section.
pub(super) fn setting(section: &'static str, key: &'static str) -> Vec<Step> {
    vec![Step::Key(section.into()), Step::Key(key.into())]
}

/// A setting of `[server.tls]`.
pub(super) fn in_tls(key: &'static str) -> Vec<Step> {
    vec![Step::Key("server".into()), Step::Key("tls".into()), Step::Key(key.into())]
}

/// A setting of `[etcd]`.
pub(super) fn in_etcd(key: &'static str) -> Vec<Step> {
    setting("etcd", key)
}

/// A setting of the `index`-th member.
pub(super) fn in_hsm(index: usize, key: &'static str) -> Vec<Step> {
    vec![Step::Key("hsm".into()), Step::Index(index), Step::Key(key.into())]
}

/// A validation error before its file and line are known.
pub(super) struct Fault {
    pub(super) steps: Vec<Step>,
    pub(super) problem: String,
    pub(super) advice: String,
}

impl Fault {
    pub(super) fn new(steps: Vec<Step>, problem: String, advice: &str) -> Self {
        Self { steps, problem, advice: advice.to_owned() }
    }

    /// A contradiction in a section. `at` returns the path of one of its settings.
    pub(super) fn of(disagreement: Disagreement, at: impl Fn(&'static str) -> Vec<Step>) -> Self {
        let Disagreement { key, problem, advice } = disagreement;
        Self { steps: at(key), problem, advice }
    }

    /// Turns this into an error for the file `path` with the content `text`.
    pub(super) fn locate(self, text: &str, path: &Path) -> ConfigError {
        ConfigError {
            file: path.to_owned(),
            line: line_of(text, &self.steps),
            setting: Some(name_of(&self.steps)),
            problem: self.problem,
            advice: self.advice,
        }
    }
}

fn name_of(steps: &[Step]) -> String {
    let mut name = String::new();
    for step in steps {
        match step {
            Step::Index(index) => name.push_str(&format!("[{}]", index + 1)),
            Step::Key(key) if name.is_empty() => name.push_str(key),
            Step::Key(key) => name.push_str(&format!(".{key}")),
        }
    }
    name
}

/// The line of a setting; if the setting is not in the file, the line of its section.
fn line_of(text: &str, steps: &[Step]) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let (mut table, mut array) = (Some(document.get_ref()), None::<&DeArray<'_>>);
    let mut offset = None;
    for step in steps {
        let value = match step {
            Step::Index(index) => {
                let Some(value) = array.and_then(|items| items.get(*index)) else { break };
                offset = Some(value.span().start);
                value
            }
            Step::Key(key) => {
                let entry = table.and_then(|table| table.iter().find(|(name, _)| name.get_ref() == key));
                let Some((name, value)) = entry else { break };
                offset = Some(name.span().start);
                value
            }
        };
        (table, array) = (value.get_ref().as_table(), value.get_ref().as_array());
    }
    Some(line_at(text, offset?))
}
