//! The enabled baselines, as an immutable snapshot for requests.

use std::collections::HashMap;
use std::time::Duration;

use claviger_protocol::tpm::pcr::PcrSet;
use claviger_protocol::tpm::policy::{self, Baseline};

use crate::store;
use crate::sys::clock::since_1970;

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
    /// Both times are whole seconds. That is enough because removing a baseline takes until the next second
    /// ([`until_next_second`]): every certificate that names the removed baseline has an earlier time than the next baseline of
    /// that name.
    #[must_use]
    pub fn allow(&self, name: &str, issued: i64) -> bool {
        self.added.get(name).is_some_and(|added| issued >= *added)
    }
}

/// Waits until the system clock shows a later second than when this was called.
pub(crate) async fn until_next_second() {
    let seconds = || since_1970().as_secs();
    let called = seconds();
    // A clock that is set back does not prolong the wait.
    while seconds() == called {
        let part = Duration::from_nanos(since_1970().subsec_nanos().into());
        tokio::time::sleep(Duration::from_secs(1).saturating_sub(part)).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::admin::handlers;
    use crate::observe::audit::Peer;
    use crate::sys::clock::unix_now;
    use claviger_protocol::tpm::pcr::PcrValues;
    use serde_json::json;

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

    #[tokio::test]
    async fn a_certificate_does_not_outlive_the_removal_of_its_baseline() {
        let (_folder, service) = crate::service::testing::service();
        let peer = Peer { uid: 0, pid: None };
        let zero = "0".repeat(64);
        let add = json!({"command": "baselines.add", "name": "a", "pcrs": {"0": zero, "4": zero, "7": zero}});
        handlers::handle(service.clone(), add.clone(), peer).await.unwrap();
        let issued = unix_now();
        assert!(service.registry.baselines().allow("a", issued));
        // Both commands would fit into the second of the certificate.
        let remove = json!({"command": "baselines.remove", "name": "a"});
        handlers::handle(service.clone(), remove, peer).await.unwrap();
        assert!(!service.registry.baselines().allow("a", issued));
        handlers::handle(service.clone(), add, peer).await.unwrap();
        assert!(service.registry.baselines().allow("a", unix_now()));
        assert!(!service.registry.baselines().allow("a", issued));
    }

    #[tokio::test]
    async fn the_next_second_is_a_later_one() {
        let before = unix_now();
        until_next_second().await;
        assert!(unix_now() > before);
    }
}
