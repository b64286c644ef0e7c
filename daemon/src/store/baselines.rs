//! Baselines: PCR values that an administrator accepted.

use claviger_protocol::tpm::pcr::PcrValues;
use claviger_protocol::tpm::policy;
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};

use super::contents::{Contents, Delta};
use super::error::StateError;
use super::records::{Baseline, KeptBaseline, KeptLog};

/// Most baselines. Each attestation is compared with all enabled ones.
pub const MAX_BASELINES: usize = 1_000;

/// Longest name: the limit of an organizational unit in a certificate.
const MAX_NAME: usize = 64;

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

    /// Adds a baseline, enabled.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an invalid name, or if a required PCR is missing; [`StateError::Conflict`] if the
    /// name exists or there are already [`MAX_BASELINES`].
    pub fn add_baseline(
        &mut self,
        name: &str,
        values: &PcrValues,
        log: Option<&[u8]>,
        now: i64,
    ) -> Result<Baseline, StateError> {
        if let Some(other) = self.kept_baseline(name)? {
            return Err(StateError::Conflict(format!(
                "a baseline {:?} is there already; remove it first, or choose another name",
                other.baseline.name
            )));
        }
        let (name, values, log) = (name.to_owned(), values.clone(), log.map(<[u8]>::to_vec));
        let added = Baseline { name, values, log, enabled: true, added: now };
        self.put_new_baseline(added.clone())?;
        Ok(added)
    }

    /// Stores a baseline under an unused name.
    ///
    /// # Errors
    /// As [`Contents::add_baseline`].
    pub(super) fn put_new_baseline(&mut self, baseline: Baseline) -> Result<(), StateError> {
        check_baseline_name(&baseline.name)?;
        check_values(&baseline.values)?;
        if self.baselines.rows()?.len() >= MAX_BASELINES {
            return Err(StateError::Conflict(format!("there are {MAX_BASELINES} baselines already; remove some")));
        }
        self.baselines.put(baseline.name.to_ascii_lowercase(), baseline.into())
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

    /// Removes a baseline and returns it.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_baseline(&mut self, name: &str) -> Result<Baseline, StateError> {
        let removed = self.baselines.remove(&name.to_ascii_lowercase())?;
        removed.map(|kept| kept.baseline.clone()).ok_or_else(|| no_baseline(name))
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
    use crate::store::tests::{Place, message, on_every_store};

    on_every_store!(baselines_are_kept_by_name, a_log_is_read_by_name_and_time);

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
        assert_eq!(state.remove_baseline("fleet-1").unwrap().name, "Fleet-1");
        assert!(message(state.remove_baseline("fleet-1")).contains("no baseline"));
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

    #[test]
    fn only_whole_values_are_read() {
        let text = values_to_text(&values(&[0, 4]));
        assert_eq!(values_from_text(&text).unwrap(), values(&[0, 4]));
        for bad in ["x", "0=00", &format!("24={}", "0".repeat(64)), &format!("{text} {text}")] {
            assert!(values_from_text(bad).is_err(), "{bad}");
        }
    }
}
