//! Labels of hosts, to which keys can be restricted.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::StateError;

/// Most labels of a host or a certificate.
const MOST: usize = 32;

/// Longest part of a label, before or after its `=`.
const WORD: usize = 64;

/// A set of labels, each a plain word or `key=value`. They are compared as a whole and case-sensitively: `site` and
/// `site=north` are unrelated.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Labels(BTreeSet<String>);

impl Labels {
    /// Whether there are no labels.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this set contains all of `others`.
    #[must_use]
    pub fn have_all(&self, others: &Self) -> bool {
        others.0.is_subset(&self.0)
    }

    /// The union with `others`.
    #[must_use]
    pub fn with(&self, others: &Self) -> Self {
        Self(self.0.union(&others.0).cloned().collect())
    }

    /// The set without `others`.
    #[must_use]
    pub fn without(&self, others: &Self) -> Self {
        Self(self.0.difference(&others.0).cloned().collect())
    }

    /// Checks that the number of labels can be stored.
    ///
    /// # Errors
    /// [`StateError::Invalid`].
    pub(super) fn check(&self) -> Result<(), StateError> {
        if self.0.len() <= MOST {
            return Ok(());
        }
        Err(StateError::Invalid(format!("{} labels are too many; use at most {MOST}", self.0.len())))
    }
}

impl TryFrom<Vec<String>> for Labels {
    type Error = StateError;

    fn try_from(labels: Vec<String>) -> Result<Self, StateError> {
        let plain = |word: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
            (1..=WORD).contains(&word.len()) && word.bytes().all(known)
        };
        for label in &labels {
            let (key, value) = label.split_once('=').unwrap_or((label, "-"));
            if !plain(key) || !plain(value) {
                let shown: String = label.chars().take(WORD).collect();
                return Err(StateError::Invalid(format!(
                    "{shown:?} is no label; use a word of 1 to {WORD} letters, digits, '.', '-' or '_', or two with '=' between"
                )));
            }
        }
        Ok(Self(labels.into_iter().collect()))
    }
}

impl From<Labels> for Vec<String> {
    fn from(labels: Labels) -> Self {
        labels.0.into_iter().collect()
    }
}

/// The format in the state: labels separated by spaces, which no label contains.
impl FromStr for Labels {
    type Err = StateError;

    fn from_str(text: &str) -> Result<Self, StateError> {
        text.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>().try_into()
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, label) in self.0.iter().enumerate() {
            write!(f, "{}{label}", if at == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_words_or_pairs() {
        let labels: Labels = "tenant=acme  site gpu".parse().unwrap();
        assert_eq!(labels.to_string(), "gpu site tenant=acme");
        assert_eq!(labels, labels.to_string().parse().unwrap());
        for wrong in ["=", "a=", "=b", "a=b=c", "ä", "a,b", &"x".repeat(65)] {
            let error = wrong.parse::<Labels>().unwrap_err().to_string();
            assert!(error.contains("is no label"), "{wrong}: {error}");
        }
        let needed: Labels = "site tenant=acme".parse().unwrap();
        assert!(labels.have_all(&needed) && !needed.have_all(&labels));
        assert!(labels.have_all(&Labels::default()));
        assert!(!labels.have_all(&"tenant".parse().unwrap()), "a key alone is another label");
        assert!(!labels.have_all(&"SITE".parse().unwrap()));
        assert_eq!(labels.without(&needed).to_string(), "gpu");
        assert_eq!(labels.without(&needed).with(&needed), labels);
        let many: Vec<String> = (0..=MOST).map(|number| number.to_string()).collect();
        assert!(Labels::try_from(many).unwrap().check().is_err());
        assert_eq!(serde_json::to_string(&needed).unwrap(), r#"["site","tenant=acme"]"#);
        assert!(serde_json::from_str::<Labels>(r#"["a b"]"#).is_err());
    }
}
