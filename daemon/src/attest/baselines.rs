//! The enabled baselines, as requests see them.

use std::collections::HashMap;

use claviger_protocol::tpm::pcr::PcrSet;
use claviger_protocol::tpm::policy::{self, Baseline};

use crate::state;

/// The baselines that are enabled.
#[derive(Debug, Default)]
pub struct Baselines {
    enabled: Vec<Baseline>,
    /// When each was added, by its name.
    added: HashMap<String, i64>,
}

impl Baselines {
    /// Those of a state that are enabled.
    #[must_use]
    pub fn new(all: Vec<state::Baseline>) -> Self {
        let mut baselines = Self::default();
        for baseline in all.into_iter().filter(|baseline| baseline.enabled) {
            baselines.added.insert(baseline.name.clone(), baseline.added);
            baselines.enabled.push(Baseline { name: baseline.name, values: baseline.values });
        }
        baselines
    }

    /// Those that are enabled.
    #[must_use]
    pub fn enabled(&self) -> &[Baseline] {
        &self.enabled
    }

    /// The PCRs that hosts are to quote.
    #[must_use]
    pub fn selection(&self) -> PcrSet {
        policy::selection(&self.enabled)
    }

    /// Whether a health certificate that names this baseline and was issued then, in seconds since 1970, still stands. One
    /// from before the baseline was added means another one, which had that name and was removed.
    #[must_use]
    pub fn allow(&self, name: &str, issued: i64) -> bool {
        self.added.get(name).is_some_and(|added| issued >= *added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use claviger_protocol::tpm::pcr::PcrValues;

    #[test]
    fn only_what_is_enabled_and_was_added_before_allows() {
        let baseline = |name: &str, pcr: usize, enabled: bool| {
            let mut values = PcrValues::default();
            values.set(pcr, [0; 32]);
            state::Baseline { name: name.to_owned(), values, log: None, enabled, added: 100 }
        };
        let baselines = Baselines::new(vec![baseline("on", 9, true), baseline("off", 11, false)]);
        assert_eq!(baselines.selection().iter().collect::<Vec<_>>(), [0, 2, 4, 7, 9]);
        assert!(baselines.allow("on", 100) && baselines.allow("on", 101));
        assert!(!baselines.allow("on", 99), "of another baseline of that name");
        assert!(!baselines.allow("off", 101) && !baselines.allow("ON", 101) && !baselines.allow("", 101));
    }
}
