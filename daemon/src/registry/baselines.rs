//! The enabled baselines, as an immutable snapshot for requests.

use std::collections::HashMap;

use claviger_protocol::tpm::pcr::PcrSet;
use claviger_protocol::tpm::policy::{self, Baseline};

use crate::store;

/// Identifies a baseline. A baseline that is removed and added again under its name is another baseline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaselineId {
    pub name: String,
    /// When it was added, seconds since 1970.
    added: i64,
}

/// The baselines that are enabled.
#[derive(Debug, Default)]
pub struct Baselines {
    enabled: Vec<Baseline>,
    /// When each was added, by name.
    added: HashMap<String, i64>,
}

impl Baselines {
    /// Takes the enabled ones out of all baselines of the state.
    #[must_use]
    pub fn new<'a>(all: impl IntoIterator<Item = &'a store::Baseline>) -> Self {
        let mut baselines = Self::default();
        for baseline in all.into_iter().filter(|baseline| baseline.enabled) {
            baselines.added.insert(baseline.name.clone(), baseline.added);
            baselines.enabled.push(Baseline { name: baseline.name.clone(), values: baseline.values.clone() });
        }
        baselines
    }

    /// The enabled baselines, in the order of the state.
    #[must_use]
    pub fn enabled(&self) -> &[Baseline] {
        &self.enabled
    }

    /// The PCRs that hosts have to quote.
    #[must_use]
    pub fn selection(&self) -> PcrSet {
        policy::selection(&self.enabled)
    }

    /// The identity of the enabled baseline that has this name now.
    #[must_use]
    pub fn identify(&self, name: &str) -> Option<BaselineId> {
        self.added.get(name).map(|added| BaselineId { name: name.to_owned(), added: *added })
    }

    /// Whether this very baseline is enabled, and not only another one of its name.
    #[must_use]
    pub fn is_enabled(&self, id: &BaselineId) -> bool {
        self.added.get(&id.name) == Some(&id.added)
    }

    /// Whether a health certificate that names this baseline and was issued at `issued`, in seconds since 1970, is still
    /// accepted. A certificate that was issued before the baseline was added belongs to an earlier baseline of that name.
    ///
    /// That is enough because the name of a removed baseline is reserved ([`store::Contents::reserved_until`]): when a baseline
    /// with other values gets it, every certificate that names the removed one has an earlier time or has ended, also one that
    /// was issued by a node which did not know of the removal yet, or whose clock is ahead.
    #[must_use]
    pub fn allow(&self, name: &str, issued: i64) -> bool {
        self.added.get(name).is_some_and(|added| issued >= *added)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use claviger_protocol::tpm::pcr::PcrValues;

    fn baseline(name: &str, pcr: usize, enabled: bool, added: i64) -> store::Baseline {
        let mut values = PcrValues::default();
        values.set(pcr, [0; 32]);
        store::Baseline { name: name.to_owned(), values, log: None, enabled, added }
    }

    #[test]
    fn certificates_are_accepted_for_enabled_baselines_that_were_added_before() {
        let baselines = Baselines::new(&[baseline("on", 9, true, 100), baseline("off", 11, false, 100)]);
        assert_eq!(baselines.selection().iter().collect::<Vec<_>>(), [0, 2, 4, 7, 9]);
        assert!(baselines.allow("on", 100) && baselines.allow("on", 101));
        assert!(!baselines.allow("on", 99), "of an earlier baseline of that name");
        assert!(!baselines.allow("off", 101) && !baselines.allow("ON", 101) && !baselines.allow("", 101));
    }

    #[test]
    fn a_baseline_is_not_another_one_of_its_name() {
        let of = |added, enabled| Baselines::new(&[baseline("a", 9, enabled, added)]);
        let id = of(100, true).identify("a").unwrap();
        assert!(of(100, true).is_enabled(&id));
        assert!(!of(101, true).is_enabled(&id), "removed and added again");
        assert!(!of(100, false).is_enabled(&id) && !Baselines::default().is_enabled(&id));
        assert_eq!(of(100, false).identify("a"), None);
        assert_eq!(of(100, true).identify("b"), None);
    }
}
