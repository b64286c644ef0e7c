//! Imports the contents of another state. Local records are never removed.

use std::collections::HashMap;

use super::baselines::{check_baseline_name, check_values, why_reserved};
use super::certificates::Role;
use super::contents::Contents;
use super::error::StateError;
use super::hosts::check_host_name;
use super::limits::{check_der, check_key_id};
use super::records::{Baseline, Certificate, Host, Signer};

/// The contents to import.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// Hosts, matched by name and key.
    pub hosts: Vec<Host>,
    /// Baselines, matched by name.
    pub baselines: Vec<Baseline>,
    /// Key-protection certificates, matched by kind and thumbprint.
    pub certificates: Vec<Certificate>,
    /// Attestation signers whose health certificates will be trusted.
    pub signers: Vec<Signer>,
    /// Whether to use the other service's current signer for issuing. Its key must be in the local HSMs.
    pub adopt_signer: bool,
    /// Whether registered hosts also get the labels in the import, which may give them access to more keys.
    pub loosen: bool,
}

/// The changes of an import, one sentence each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// The changes.
    pub changes: Vec<String>,
    /// Differences that were not imported: an import never gives a registered host more access than it has.
    pub skipped: Vec<String>,
}

impl Contents {
    /// Imports another state's contents. `reservation` is the store's (seconds). It may fail halfway: the caller then drops the changed copy.
    ///
    /// # Errors
    /// [`StateError::Conflict`] if the two states contradict each other; [`StateError::Invalid`].
    pub fn import(&mut self, import: &Import, now: i64, reservation: i64) -> Result<Merged, StateError> {
        let mut merged = Merged::default();
        let mut names: HashMap<Vec<u8>, String> =
            self.hosts()?.map(|host| (host.spki.clone(), host.name.clone())).collect();
        for host in &import.hosts {
            self.merge_host(host, &mut names, import.loosen, now, &mut merged)?;
        }
        for baseline in &import.baselines {
            self.merge_baseline(baseline, now, reservation, &mut merged)?;
        }
        self.merge_certificates(&import.certificates, now, &mut merged)?;
        self.merge_signers(import, now, &mut merged)?;
        Ok(merged)
    }

    /// `names` are the names of the registered hosts, by their keys.
    fn merge_host(
        &mut self,
        new: &Host,
        names: &mut HashMap<Vec<u8>, String>,
        loosen: bool,
        now: i64,
        merged: &mut Merged,
    ) -> Result<(), StateError> {
        check_host_name(&new.name)?;
        check_der("a host's public key", &new.spki)?;
        new.labels.check()?;
        let name = &new.name;
        let Some(old) = self.host_by_name(name)? else {
            if let Some(other) = names.get(&new.spki) {
                return Err(conflict(format!("the key of host {name:?} is registered here as host {other:?}")));
            }
            names.insert(new.spki.clone(), name.clone());
            self.put_host(Host { added: now, ..new.clone() })?;
            let disabled = if new.enabled { "" } else { ", disabled" };
            let labels = if new.labels.is_empty() { String::new() } else { format!(", labels {}", new.labels) };
            merged.changes.push(format!("host {name} is added{disabled}{labels}"));
            return Ok(());
        };
        if old.spki != new.spki {
            return Err(conflict(format!("host {name:?} is registered here with another key; remove it first")));
        }
        if old.kind != new.kind {
            let (here, there) = (old.kind, new.kind);
            return Err(conflict(format!(
                "the key of host {name:?} is a {here} here and a {there} there; remove it first"
            )));
        }
        match (old.enabled, new.enabled) {
            (true, false) => merged.changes.push(format!("host {name} is disabled")),
            (false, true) => merged.skipped.push(format!("host {name} stays disabled; there it is enabled")),
            _ => {}
        }
        if old.labels != new.labels {
            let (ours, theirs) = (old.labels.to_string(), new.labels.to_string());
            if loosen {
                merged.changes.push(format!("host {name} has labels {theirs:?} instead of {ours:?}"));
            } else {
                merged
                    .skipped
                    .push(format!("host {name} keeps its labels {ours:?}; there they are {theirs:?} (--loosen)"));
            }
        }
        let labels = if loosen { &new.labels } else { &old.labels }.clone();
        let changed = Host { enabled: old.enabled && new.enabled, labels, ..Host::clone(old) };
        if changed != **old { self.put_host(changed) } else { Ok(()) }
    }

    /// A new baseline is added, because like a new host it only adds.
    fn merge_baseline(
        &mut self,
        new: &Baseline,
        now: i64,
        reservation: i64,
        merged: &mut Merged,
    ) -> Result<(), StateError> {
        check_baseline_name(&new.name)?;
        check_values(&new.values)?;
        let name = &new.name;
        let Some(old) = self.kept_baseline(name)? else {
            if let Some(until) = self.reserved_until(name, &new.values, now, reservation)? {
                merged.skipped.push(format!("baseline {name} is not added: {}", why_reserved(until)));
                return Ok(());
            }
            self.put_new_baseline(Baseline { added: now, ..new.clone() }, reservation)?;
            merged.changes.push(format!("baseline {name} is added{}", if new.enabled { "" } else { ", disabled" }));
            return Ok(());
        };
        if old.baseline.values != new.values {
            return Err(conflict(format!("baseline {name:?} has other values here; remove it first")));
        }
        match (old.baseline.enabled, new.enabled) {
            (true, false) => {
                self.enable_baseline(name, false)?;
                merged.changes.push(format!("baseline {name} is disabled"));
            }
            (false, true) => merged.skipped.push(format!("baseline {name} stays disabled; there it is enabled")),
            _ => {}
        }
        Ok(())
    }

    fn merge_certificates(&mut self, all: &[Certificate], now: i64, merged: &mut Merged) -> Result<(), StateError> {
        let Merged { changes, skipped } = merged;
        for new in all {
            check_der("a certificate", &new.der)?;
            check_der("a certificate's public key", &new.spki)?;
            check_key_id(&new.key_id)?;
            new.labels.check()?;
            let (kind, thumbprint) = (new.kind, &new.thumbprint);
            match self.certificate(kind, thumbprint)? {
                Some(old) if old.key_id != new.key_id => {
                    let text = format!("the {kind} certificate {thumbprint} has another key of the HSMs here");
                    return Err(conflict(text));
                }
                Some(old) => {
                    if new.enabled && !old.enabled {
                        skipped
                            .push(format!("the {kind} certificate {thumbprint} stays disabled; there it is enabled"));
                    }
                }
                None => {
                    self.put_certificate(Certificate {
                        is_primary: false,
                        is_communications: false,
                        enabled: true,
                        // The key was used before, and not counted here.
                        added: new.added.min(now),
                        ..new.clone()
                    })?;
                    changes.push(format!("the {kind} certificate {thumbprint} is added"));
                }
            }
            // A host needs the labels of both. Search by key: a new certificate may belong to a key that is restricted
            // here.
            let ours = self.limit_of(&new.spki)?;
            let limit = ours.with(&new.labels);
            limit.check()?;
            if limit != ours {
                self.set_limit(&new.spki, &limit)?;
                changes.push(format!("what the key of {thumbprint} opens is released to hosts with {limit}"));
            }
            if limit != new.labels {
                let to =
                    if new.labels.is_empty() { "every host".to_owned() } else { format!("hosts with {}", new.labels) };
                skipped
                    .push(format!("the key of {thumbprint} stays limited to hosts with {limit}; there it is for {to}"));
            }
        }
        for (role, name) in [(Role::Primary, "primary"), (Role::Communications, "communications")] {
            for new in all.iter().filter(|new| role.is_of(new)) {
                let (kind, thumbprint) = (new.kind, &new.thumbprint);
                let Some(here) = self.certificate(kind, thumbprint)?.filter(|here| !role.is_of(here)) else { continue };
                if !here.enabled {
                    skipped.push(format!(
                        "the {kind} certificate {thumbprint} does not become the {name} one: it is disabled"
                    ));
                    continue;
                }
                self.give_role(role, kind, Some(thumbprint))?;
                changes.push(format!("the {kind} certificate {thumbprint} becomes the {name} one"));
            }
        }
        for new in all.iter().filter(|new| !new.enabled) {
            let (kind, thumbprint) = (new.kind, &new.thumbprint);
            let Some(here) = self.certificate(kind, thumbprint)? else { continue };
            if here.is_primary || here.is_communications {
                return Err(conflict(format!(
                    "the {kind} certificate {thumbprint} is disabled there, but is primary or signs the metadata here"
                )));
            }
            if here.enabled {
                self.enable_certificate(kind, thumbprint, false)?;
                changes.push(format!("the {kind} certificate {thumbprint} is disabled"));
            }
        }
        Ok(())
    }

    fn merge_signers(&mut self, import: &Import, now: i64, merged: &mut Merged) -> Result<(), StateError> {
        let Merged { changes, skipped } = merged;
        // Only for one of them it was checked that its key is here.
        if import.signers.iter().filter(|signer| signer.current).count() > 1 {
            return Err(StateError::Invalid("two attestation signers issue there, and only one can".to_owned()));
        }
        for new in &import.signers {
            check_der("an attestation signer's certificate", &new.der)?;
            check_key_id(&new.key_id)?;
            let thumbprint = &new.thumbprint;
            if self.is_revoked(&new.der)? {
                skipped.push(format!("the attestation signer {thumbprint} is revoked here, and stays so"));
                continue;
            }
            let here = self.signers.get(thumbprint)?.map(|here| Signer::clone(here));
            if here.is_none() {
                // At most `now`: the signer is then deleted no later than one that is replaced now.
                self.trust_signer(new, new.replaced.unwrap_or(now).min(now))?;
                changes.push(format!("health certificates of the attestation signer {thumbprint} are trusted"));
            }
            let issues_here = here.as_ref().is_some_and(|here| here.current);
            if new.current && import.adopt_signer && !issues_here {
                self.make_current(here.unwrap_or_else(|| new.clone()), now)?;
                changes.push(format!("the attestation signer {thumbprint} issues health certificates"));
            }
        }
        Ok(())
    }
}

pub(super) fn conflict(text: String) -> StateError {
    StateError::Conflict(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::{Place, message, on_every_store, plan_and_import};
    use crate::store::{Kind, Labels, MAX_BASELINES, NewCertificate, NewSigner, State};

    on_every_store!(
        an_import_lets_nobody_have_more_than_before,
        an_import_enables_no_baseline_and_changes_none,
        an_import_adds_no_more_baselines_than_there_may_be,
        a_signer_is_trusted_for_no_longer_than_one_that_is_replaced_now,
        what_was_exported_is_taken_in_once,
        only_what_was_planned_is_imported
    );

    fn exported(state: &State) -> Import {
        Import {
            hosts: state.hosts().unwrap(),
            baselines: state.baselines().unwrap(),
            certificates: state.certificates().unwrap(),
            signers: state.signers().unwrap(),
            adopt_signer: true,
            loosen: false,
        }
    }

    fn certificate(der: &'static [u8]) -> NewCertificate<'static> {
        NewCertificate { kind: Kind::Encryption, der, key_id: b"id", spki: der, primary: false }
    }

    fn an_import_lets_nobody_have_more_than_before(place: &Place) {
        let elsewhere = place.another();
        let mut there = elsewhere.open();
        let mut here = place.open();
        let [acme, north]: [Labels; 2] = ["tenant=acme", "north"].map(|labels| labels.parse().unwrap());
        there.add_host("a", b"a", &acme, 1).unwrap();
        here.add_host("a", b"a", &Labels::default(), 1).unwrap();
        here.enable_host("a", false).unwrap();
        for state in [&mut there, &mut here] {
            for der in [&b"one"[..], b"two", b"three"] {
                state.add_certificate(&certificate(der), 1).unwrap();
            }
        }
        let ids = [&b"one"[..], b"two", b"three"].map(crate::store::records::sha256_hex);
        let encryption = Kind::Encryption;
        there.limit_certificate(encryption, &ids[0], &acme).unwrap();
        here.limit_certificate(encryption, &ids[0], &north).unwrap();
        here.limit_certificate(encryption, &ids[1], &north).unwrap();
        here.enable_certificate(encryption, &ids[2], false).unwrap();
        there.set_primary(encryption, &ids[2]).unwrap();

        let merged = plan_and_import(&mut here, &exported(&there), 2).unwrap();
        assert_eq!((merged.changes.len(), merged.skipped.len()), (1, 6), "{merged:#?}");
        let host = here.host_by_name("a").unwrap().unwrap();
        assert!(!host.enabled && host.labels.is_empty());
        let found = here.certificates().unwrap();
        let of = |thumbprint: &str| found.iter().find(|c| c.thumbprint == thumbprint).unwrap();
        assert_eq!((&of(&ids[0]).labels, &of(&ids[1]).labels), (&acme.with(&north), &north));
        assert!(!of(&ids[2]).enabled && !of(&ids[2]).is_primary);

        // The restriction is kept although the key has no certificate now.
        here.remove_certificate(encryption, &ids[1]).unwrap();
        plan_and_import(&mut here, &exported(&there), 3).unwrap();
        assert!(here.certificates().unwrap().iter().any(|c| c.thumbprint == ids[1] && c.labels == north));

        let loosened = plan_and_import(&mut here, &Import { loosen: true, ..exported(&there) }, 4).unwrap();
        assert_eq!((loosened.changes.len(), loosened.skipped.len()), (1, 5), "{loosened:#?}");
        let host = here.host_by_name("a").unwrap().unwrap();
        assert!(!host.enabled && host.labels == acme);
    }

    fn an_import_enables_no_baseline_and_changes_none(place: &Place) {
        let elsewhere = place.another();
        let mut there = elsewhere.open();
        let mut here = place.open();
        let mut values = claviger_protocol::tpm::pcr::PcrValues::default();
        [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
        for name in ["new", "off-there", "off-here"] {
            there.add_baseline(name, &values, Some(b"log"), 1).unwrap();
        }
        there.enable_baseline("off-there", false).unwrap();
        here.add_baseline("off-there", &values, None, 1).unwrap();
        here.add_baseline("off-here", &values, None, 1).unwrap();
        here.enable_baseline("off-here", false).unwrap();
        there.add_host_with(crate::store::HostKind::EndorsementKey, "tpm", b"ek", &Labels::default(), 1).unwrap();
        let merged = plan_and_import(&mut here, &exported(&there), 5).unwrap();
        let changes = ["host tpm is added", "baseline new is added", "baseline off-there is disabled"];
        assert_eq!(merged.changes, changes);
        assert_eq!(merged.skipped, ["baseline off-here stays disabled; there it is enabled"]);
        let all = here.baselines().unwrap();
        let enabled: Vec<_> = all.iter().map(|baseline| (&*baseline.name, baseline.enabled, baseline.added)).collect();
        assert_eq!(enabled, [("new", true, 5), ("off-here", false, 1), ("off-there", false, 1)]);
        assert_eq!(here.hosts().unwrap()[0].kind, crate::store::HostKind::EndorsementKey);

        there.remove_baseline("new", 2).unwrap();
        values.set(9, [9; 32]);
        there.add_baseline("new", &values, None, 1_000_000).unwrap();
        assert!(message(plan_and_import(&mut here, &exported(&there), 6)).contains("other values here"));
        here.remove_baseline("new", 6).unwrap();
        // Its name is reserved: the import leaves the baseline out.
        let merged = plan_and_import(&mut here, &exported(&there), 6).unwrap();
        assert_eq!((merged.changes.len(), merged.skipped.len()), (0, 2), "{merged:?}");
        assert!(merged.skipped[0].starts_with("baseline new is not added: a baseline of that name"), "{merged:?}");
        let merged = plan_and_import(&mut here, &exported(&there), 1_000_000).unwrap();
        assert_eq!(merged.changes, ["baseline new is added"]);
        here.remove_host("tpm").unwrap();
        here.add_host("tpm", b"ek", &Labels::default(), 1).unwrap();
        assert!(message(plan_and_import(&mut here, &exported(&there), 6)).contains("is a host-key here"));
    }

    fn an_import_adds_no_more_baselines_than_there_may_be(place: &Place) {
        let mut here = place.open();
        let mut values = claviger_protocol::tpm::pcr::PcrValues::default();
        [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
        let named = |number: usize| Baseline {
            name: number.to_string(),
            values: values.clone(),
            log: None,
            enabled: true,
            added: 1,
        };
        let all: Vec<_> = (0..=MAX_BASELINES).map(named).collect();
        let import = Import { baselines: all.clone(), ..Import::default() };
        assert!(message(plan_and_import(&mut here, &import, 2)).contains("1000 baselines already"));
        assert_eq!(here.baselines().unwrap(), []);
        let import = Import { baselines: all[1..].to_vec(), ..Import::default() };
        plan_and_import(&mut here, &import, 2).unwrap();
        // Records that already exist need no room.
        assert_eq!(plan_and_import(&mut here, &import, 3).unwrap(), Merged::default());
    }

    fn a_signer_is_trusted_for_no_longer_than_one_that_is_replaced_now(place: &Place) {
        let mut here = place.open();
        let signer = |der: &[u8], current, replaced| Signer {
            thumbprint: crate::store::records::sha256_hex(der),
            der: der.to_owned(),
            key_id: b"id".to_vec(),
            not_before: 1,
            not_after: 9,
            current,
            replaced,
        };
        let import = |signers| Import { signers, adopt_signer: true, ..Import::default() };
        let two = import(vec![signer(b"a", true, None), signer(b"b", true, None)]);
        assert!(message(plan_and_import(&mut here, &two, 5)).contains("two attestation signers"));
        let old = [signer(b"c", false, Some(9_000_000_000_000_000_000)), signer(b"d", false, Some(3))];
        plan_and_import(&mut here, &import(old.to_vec()), 5).unwrap();
        let replaced: Vec<_> = here.signers().unwrap().into_iter().map(|signer| signer.replaced).collect();
        assert_eq!(replaced, [Some(5), Some(3)]);
    }

    fn what_was_exported_is_taken_in_once(place: &Place) {
        let elsewhere = place.another();
        let mut there = elsewhere.open();
        let mut here = place.open();
        let acme: Labels = "tenant=acme".parse().unwrap();
        there.add_host("a", b"a", &acme, 1).unwrap();
        there.add_host("b", b"b", &Labels::default(), 1).unwrap();
        there.enable_host("b", false).unwrap();
        let new = |kind, der, primary| NewCertificate { kind, der, key_id: b"id", spki: der, primary };
        let one = there.add_certificate(&new(Kind::Signing, b"one", false), 1).unwrap();
        there.add_certificate(&new(Kind::Signing, b"two", true), 1).unwrap();
        let three = there.add_certificate(&new(Kind::Encryption, b"three", true), 1).unwrap();
        let four = there.add_certificate(&new(Kind::Encryption, b"four", false), 1).unwrap();
        there.set_communications(Some(&one.thumbprint)).unwrap();
        there.limit_certificate(Kind::Encryption, &three.thumbprint, &acme).unwrap();
        there.enable_certificate(Kind::Encryption, &four.thumbprint, false).unwrap();
        let signer = |der| NewSigner { der, key_id: b"id", not_before: 1, not_after: 9 };
        there.add_signer(&signer(b"s"), None, 1).unwrap();
        here.add_signer(&signer(b"t"), None, 2).unwrap();
        here.add_host("c", b"c", &Labels::default(), 2).unwrap();
        here.add_certificate(&new(Kind::Signing, b"five", true), 2).unwrap();

        let import = exported(&there);
        let planned = here.plan_import(&import, 3).unwrap();
        assert_eq!((here.hosts().unwrap().len(), here.certificates().unwrap().len()), (1, 1), "only said");
        assert_eq!(plan_and_import(&mut here, &import, 3).unwrap(), planned);
        // They were used before this import, without being counted here.
        let added =
            here.certificates().unwrap().into_iter().filter(|of| of.kind == Kind::Encryption).map(|of| of.added);
        assert_eq!(added.collect::<Vec<_>>(), [1, 1]);
        assert_eq!((planned.changes.len(), planned.skipped.len()), (13, 0), "{planned:#?}");
        assert_eq!(plan_and_import(&mut here, &import, 4).unwrap(), Merged::default());
        let mut hosts = here.hosts().unwrap();
        assert_eq!(hosts.pop().unwrap().name, "c");
        let plain = |hosts: Vec<Host>| hosts.into_iter().map(|h| (h.name, h.enabled, h.labels)).collect::<Vec<_>>();
        assert_eq!(plain(hosts), plain(there.hosts().unwrap()));
        let plain = |state: &State| {
            let all = state.certificates().unwrap().into_iter().filter(|c| c.der != b"five");
            let mut all: Vec<_> =
                all.map(|c| (c.kind, c.thumbprint, c.is_primary, c.enabled, c.is_communications, c.labels)).collect();
            all.sort();
            all
        };
        assert_eq!(plain(&here), plain(&there));
        let signers = here.signers().unwrap();
        assert_eq!((signers[0].der.as_slice(), signers[1].replaced), (&b"s"[..], Some(3)));

        // If its key is not here, a signer is only trusted.
        let current = signers[0].thumbprint.clone();
        here.add_signer(&signer(b"u"), Some(&current), 5).unwrap();
        assert!(
            plan_and_import(&mut here, &Import { adopt_signer: false, ..import.clone() }, 6)
                .unwrap()
                .changes
                .is_empty()
        );
        assert_eq!(here.signers().unwrap()[0].der, b"u");

        // A contradiction refuses the whole import.
        there.add_host("d", b"d", &Labels::default(), 1).unwrap();
        there.add_host("C", b"other", &Labels::default(), 1).unwrap();
        assert!(message(plan_and_import(&mut here, &exported(&there), 7)).contains("with another key"));
        assert!(here.host_by_name("d").unwrap().is_none());
    }

    fn only_what_was_planned_is_imported(place: &Place) {
        let elsewhere = place.another();
        let (mut there, mut here) = (elsewhere.open(), place.open());
        for state in [&mut there, &mut here] {
            state.add_host("a", b"a", &Labels::default(), 1).unwrap();
        }
        there.add_host("b", b"b", &Labels::default(), 1).unwrap();
        let wanted = exported(&there);
        let planned = here.plan_import(&wanted, 2).unwrap();
        // Removed after the plan: the import would add it again, and nothing on record says so.
        here.remove_host("a").unwrap();
        let refused = here.import(&wanted, 2, &planned.changes);
        assert!(message(refused).contains("has changed since the import began"));
        assert_eq!(here.hosts().unwrap(), []);
        let planned = here.plan_import(&wanted, 2).unwrap();
        assert_eq!(here.import(&wanted, 2, &planned.changes).unwrap(), planned);
        assert_eq!(here.hosts().unwrap().len(), 2);
    }
}
