//! Baselines: PCR values that an administrator accepted.

use std::time::Duration;

use claviger_protocol::health;
use claviger_protocol::tpm::pcr::PcrValues;
use claviger_protocol::tpm::policy;
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::contents::{Contents, Delta};
use super::error::StateError;
use super::records::{Baseline, KeptBaseline, KeptLog, RemovedBaseline};

/// Most baselines. Each attestation is compared with all enabled ones.
pub const MAX_BASELINES: usize = 1_000;

/// Longest name: the limit of an organizational unit in a certificate.
const MAX_NAME: usize = 64;

/// How long the name of a removed baseline is reserved on one machine, in seconds.
///
/// There is one clock, but several daemons may share the file. A removal takes up to 5 seconds after its time was read,
/// because it waits for other writers. Another daemon takes the new contents a second later, and issues health certificates
/// that name the removed baseline until then. The rest is for a daemon that is busy.
pub(super) const RESERVATION_ON_ONE_MACHINE: i64 = 10;

/// Most seconds by which the clocks of two nodes may differ: health certificates are backdated so much.
const CLOCKS_DIFFER: i64 = health::BACKDATED_SECONDS;

/// Time until a health certificate has ended at all nodes, in seconds after its issue.
const CERTIFICATE_ENDS: i64 = health::LIFETIME_SECONDS + CLOCKS_DIFFER;

/// How long the name of a removed baseline is reserved if several nodes share the state, in seconds.
///
/// A node that is cut off issues health certificates that name the removed baseline until its state is too old. When the
/// name is free, all of them have ended.
pub(super) fn reservation_of_nodes(max_staleness: Duration) -> i64 {
    let staleness = i64::try_from(max_staleness.as_secs()).unwrap_or(i64::MAX);
    CERTIFICATE_ENDS.saturating_add(staleness).saturating_add(1)
}

impl Contents {
    /// All baselines by name, without their logs.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn baselines(&self) -> Result<impl Iterator<Item = &Baseline>, StateError> {
        Ok(self.baselines.values()?.map(|kept| &kept.baseline))
    }

    /// The baseline with this name, ignoring case, without its log.
    ///
    /// # Errors
    /// [`StateError::NotFound`], [`StateError::Unreadable`].
    pub fn baseline_by_name(&self, name: &str) -> Result<&Baseline, StateError> {
        Ok(&self.kept_baseline(name)?.ok_or_else(|| no_baseline(name))?.baseline)
    }

    pub(super) fn kept_baseline(&self, name: &str) -> Result<Option<&KeptBaseline>, StateError> {
        Ok(self.baselines.get(&name.to_ascii_lowercase())?.map(|kept| &**kept))
    }

    /// Time until which the name is reserved for other values than these, because a baseline of this name was removed;
    /// `None` if it is free for them. `reservation` is the store's (seconds).
    ///
    /// Health certificates hold the name of a baseline, not its values. So a certificate that names the removed baseline
    /// must not fit the next baseline of that name. With the same values it means the same.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn reserved_until(
        &self,
        name: &str,
        values: &PcrValues,
        now: i64,
        reservation: i64,
    ) -> Result<Option<i64>, StateError> {
        let removed = self.removed_baselines.get(&name.to_ascii_lowercase())?;
        let until = removed.filter(|removed| removed.values != *values).map(|removed| removed.free_from(reservation));
        Ok(until.filter(|until| now < *until))
    }

    /// Adds a baseline, enabled. `reservation` is the store's (seconds).
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an invalid name, or if a required PCR is missing; [`StateError::Conflict`] if the
    /// name exists or is reserved, or there are already [`MAX_BASELINES`].
    pub fn add_baseline(
        &mut self,
        name: &str,
        values: &PcrValues,
        log: Option<&[u8]>,
        now: i64,
        reservation: i64,
    ) -> Result<Baseline, StateError> {
        if let Some(other) = self.kept_baseline(name)? {
            return Err(StateError::Conflict(format!(
                "a baseline {:?} is there already; remove it first, or choose another name",
                other.baseline.name
            )));
        }
        let (name, values, log) = (name.to_owned(), values.clone(), log.map(<[u8]>::to_vec));
        self.put_new_baseline(Baseline { name, values, log, enabled: true, added: now }, reservation)
    }

    /// Stores a baseline under an unused name, and returns it.
    ///
    /// # Errors
    /// As [`Contents::add_baseline`].
    pub(super) fn put_new_baseline(
        &mut self,
        mut baseline: Baseline,
        reservation: i64,
    ) -> Result<Baseline, StateError> {
        check_baseline_name(&baseline.name)?;
        check_values(&baseline.values)?;
        if self.baselines.rows()?.len() >= MAX_BASELINES {
            return Err(StateError::Conflict(format!("there are {MAX_BASELINES} baselines already; remove some")));
        }
        let (key, now) = (baseline.name.to_ascii_lowercase(), baseline.added);
        if let Some(until) = self.reserved_until(&baseline.name, &baseline.values, now, reservation)? {
            return Err(StateError::Conflict(why_reserved(until)));
        }
        if let Some(removed) = self.removed_baselines.remove(&key)?
            && removed.values == baseline.values
        {
            // Also where this node's clock is behind: earlier certificates belong to a baseline before the removed one.
            baseline.added = now.max(removed.added);
        }
        self.forget_removed_baselines(now, reservation)?;
        self.baselines.put(key, baseline.clone().into())?;
        Ok(baseline)
    }

    /// Drops the removed baselines whose names are free.
    fn forget_removed_baselines(&mut self, now: i64, reservation: i64) -> Result<(), StateError> {
        // On one machine the names are free earlier, but the state may be moved to a store of several nodes.
        let reservation = reservation.max(CERTIFICATE_ENDS);
        let removed = self.removed_baselines.rows()?.iter();
        let over = removed.filter(|(_, row)| row.value.free_from(reservation) <= now);
        for name in over.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.removed_baselines.remove(&name)?;
        }
        Ok(())
    }

    /// Enables or disables a baseline.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn enable_baseline(&mut self, name: &str, enabled: bool) -> Result<Baseline, StateError> {
        let mut kept = self.kept_baseline(name)?.ok_or_else(|| no_baseline(name))?.clone();
        kept.baseline.enabled = enabled;
        let changed = kept.baseline.clone();
        self.baselines.put(name.to_ascii_lowercase(), kept)?;
        Ok(changed)
    }

    /// Removes a baseline and returns it. Its name stays reserved for `reservation` seconds.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_baseline(&mut self, name: &str, now: i64, reservation: i64) -> Result<Baseline, StateError> {
        let key = name.to_ascii_lowercase();
        let removed = self.baselines.remove(&key)?.ok_or_else(|| no_baseline(name))?.baseline.clone();
        self.forget_removed_baselines(now, reservation)?;
        let Baseline { name, values, added, .. } = removed.clone();
        let reserved_until = now.saturating_add(reservation);
        self.removed_baselines.put(key, RemovedBaseline { name, values, added, removed: now, reserved_until })?;
        Ok(removed)
    }

    /// After a change was stored, drops its logs from memory: they are in the store.
    pub(super) fn settle(&mut self, made: &Delta) {
        for (name, row) in &made.baselines.put {
            if matches!(row.value.log, KeptLog::New(_)) {
                let baseline = row.value.baseline.clone();
                self.baselines.load(name.clone(), row.order, KeptBaseline { baseline, log: KeptLog::Stored });
            }
        }
    }
}

impl RemovedBaseline {
    /// Time from which the name is free for other values, by the store in which the baseline was removed and by one with
    /// this reservation (seconds).
    fn free_from(&self, reservation: i64) -> i64 {
        self.removed.saturating_add(reservation).max(self.reserved_until)
    }
}

/// Why a baseline cannot be added until this time, for people.
pub(super) fn why_reserved(until: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(until).ok().and_then(|at| at.format(&Rfc3339).ok());
    format!(
        "a baseline of that name with other values was removed, and hosts may still hold health certificates that name it; \
         choose another name, or wait until {}",
        at.unwrap_or_else(|| until.to_string())
    )
}

fn no_baseline(name: &str) -> StateError {
    StateError::NotFound(format!("there is no baseline {name:?}"))
}

/// Checks that this can be the name of a baseline.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn check_baseline_name(name: &str) -> Result<(), StateError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    Err(StateError::Invalid(format!("{shown:?} cannot name a baseline; use 1 to 64 letters, digits, '.', '-' or '_'")))
}

/// Checks that these can be a baseline's values.
///
/// # Errors
/// [`StateError::Invalid`].
pub(super) fn check_values(values: &PcrValues) -> Result<(), StateError> {
    match policy::Baseline::REQUIRED.into_iter().find(|pcr| values.get(*pcr).is_none()) {
        Some(pcr) => Err(StateError::Invalid(format!("a baseline needs PCRs 0, 4 and 7, and PCR {pcr} is missing"))),
        None => Ok(()),
    }
}

/// PCR values as `0=<hex> 4=<hex> …`.
pub(super) fn values_to_text(values: &PcrValues) -> String {
    values.iter().map(|(pcr, value)| format!("{pcr}={}", HEXLOWER.encode(value))).collect::<Vec<_>>().join(" ")
}

/// Parses the format of [`values_to_text`].
///
/// # Errors
/// [`StateError::Invalid`].
pub(super) fn values_from_text(text: &str) -> Result<PcrValues, StateError> {
    let mut values = PcrValues::default();
    for entry in text.split_ascii_whitespace() {
        let parsed = entry.split_once('=').and_then(|(pcr, value)| {
            let value = HEXLOWER_PERMISSIVE.decode(value.as_bytes()).ok()?;
            Some((pcr.parse().ok()?, value.try_into().ok()?))
        });
        if !parsed.is_some_and(|(pcr, value)| values.get(pcr).is_none() && values.set(pcr, value)) {
            return Err(StateError::Invalid(format!("{entry:?} is not a PCR and its SHA-256 value")));
        }
    }
    Ok(values)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::State;
    use crate::store::tests::{Place, message, on_every_store, soon};

    on_every_store!(
        baselines_are_kept_by_name,
        a_log_is_read_by_name_and_time,
        the_name_of_a_removed_baseline_is_reserved_for_its_values,
        a_reservation_outlives_the_daemon_and_ends,
    );

    fn values(pcrs: &[usize]) -> PcrValues {
        let mut values = PcrValues::default();
        pcrs.iter().for_each(|pcr| assert!(values.set(*pcr, [*pcr as u8; 32])));
        values
    }

    fn baselines_are_kept_by_name(place: &Place) {
        let mut state = place.open();
        let good = values(&[0, 2, 4, 7, 23]);
        let added = state.add_baseline("Fleet-1", &good, Some(b"log"), 7).unwrap();
        assert_eq!(state.baselines().unwrap(), std::slice::from_ref(&added));
        assert_eq!(state.baseline_by_name("FLEET-1").unwrap(), added);
        assert!(added.enabled && added.values == good && added.log.as_deref() == Some(b"log"));
        assert!(message(state.add_baseline("fleet-1", &good, None, 8)).contains("\"Fleet-1\" is there already"));
        for name in ["", "a b", "ä", &"x".repeat(65)] {
            assert!(message(state.add_baseline(name, &good, None, 8)).contains("cannot name a baseline"));
        }
        for missing in [&[4, 7][..], &[0, 7], &[0, 4], &[]] {
            assert!(message(state.add_baseline("b", &values(missing), None, 8)).contains("is missing"));
        }
        assert!(!state.enable_baseline("fleet-1", false).unwrap().enabled);
        assert!(message(state.enable_baseline("b", true)).contains("no baseline \"b\""));
        assert_eq!(state.remove_baseline("fleet-1", 9).unwrap().name, "Fleet-1");
        assert!(message(state.remove_baseline("fleet-1", 9)).contains("no baseline"));
        assert!(message(state.baseline_by_name("fleet-1")).contains("no baseline"));
    }

    fn a_log_is_read_by_name_and_time(place: &Place) {
        let mut state = place.open();
        state.add_baseline("a", &values(&[0, 4, 7]), Some(b"log"), 7).unwrap();
        state.add_baseline("b", &values(&[0, 4, 7]), None, 7).unwrap();
        assert_eq!(state.baseline_log("a", 7).unwrap().as_deref(), Some(&b"log"[..]));
        for (name, added) in [("a", 8), ("b", 7), ("c", 7)] {
            assert_eq!(state.baseline_log(name, added).unwrap(), None);
        }
    }

    fn the_name_of_a_removed_baseline_is_reserved_for_its_values(place: &Place) {
        let (mut state, other) = (place.open(), place.open());
        let (one, two) = (values(&[0, 4, 7]), values(&[0, 4, 7, 9]));
        state.add_baseline("Fleet", &one, None, 1_000).unwrap();
        assert_eq!(state.reserved_until("fleet", &two, 1_000).unwrap(), None, "it is in use");
        state.remove_baseline("fleet", 2_000).unwrap();
        let until = state.reserved_until("FLEET", &two, 2_000).unwrap().unwrap();
        soon(|| other.reserved_until("fleet", &two, until - 1).unwrap() == Some(until));
        let refused = message(state.add_baseline("fleet", &two, None, until - 1));
        assert!(refused.contains("choose another name, or wait until 1970-01-01T"), "{refused}");
        assert_eq!(state.baselines().unwrap(), []);
        state.add_baseline("another", &two, None, 2_000).unwrap();

        // The same values may have the name. Certificates from before the removed baseline was added are not theirs, also
        // if the clock of this node is behind.
        assert_eq!(state.reserved_until("fleet", &one, 2_000).unwrap(), None);
        assert_eq!(state.add_baseline("fleet", &one, None, 900).unwrap().added, 1_000);
        // Removed again: reserved from then on.
        state.remove_baseline("fleet", 3_000).unwrap();
        assert_eq!(state.reserved_until("fleet", &two, until).unwrap(), Some(until + 1_000));
        assert_eq!(state.add_baseline("fleet", &two, None, until + 1_000).unwrap().added, until + 1_000);
        assert_eq!(state.contents().unwrap().records().unwrap().removed_baselines, 0);
    }

    fn a_reservation_outlives_the_daemon_and_ends(place: &Place) {
        let mut state = place.open();
        let (one, two) = (values(&[0, 4, 7]), values(&[0, 4, 7, 9]));
        for name in ["a", "b"] {
            state.add_baseline(name, &one, None, 1).unwrap();
        }
        state.remove_baseline("a", 1_000).unwrap();
        drop(state);
        let mut state = place.open();
        assert!(state.reserved_until("a", &two, 1_000).unwrap().is_some());
        // It is kept for as long as another store may need it, and dropped by the next removal.
        let kept = |state: &State| state.contents().unwrap().records().unwrap().removed_baselines;
        state.remove_baseline("b", 1_000 + CERTIFICATE_ENDS - 1).unwrap();
        assert_eq!(kept(&state), 2);
        state.add_baseline("c", &one, None, 2 * CERTIFICATE_ENDS).unwrap();
        assert_eq!(kept(&state), 1);
    }

    #[test]
    fn every_certificate_of_a_removed_baseline_has_ended_when_nodes_free_its_name() {
        let staleness = 300;
        let free = reservation_of_nodes(Duration::from_secs(300));
        // Issued at the last moment by a node whose clock is ahead, and checked by one whose clock is behind.
        let ends = staleness + CLOCKS_DIFFER - health::BACKDATED_SECONDS + health::LIFETIME_SECONDS;
        assert!(free > ends + CLOCKS_DIFFER);
        assert_eq!(free, 8 * 3_600 + 601);
        assert_eq!(reservation_of_nodes(Duration::MAX), i64::MAX);
    }

    #[test]
    fn only_whole_values_are_read() {
        let text = values_to_text(&values(&[0, 4]));
        assert_eq!(values_from_text(&text).unwrap(), values(&[0, 4]));
        for bad in ["x", "0=00", &format!("24={}", "0".repeat(64)), &format!("{text} {text}")] {
            assert!(values_from_text(bad).is_err(), "{bad}");
        }
    }
}
