//! Baselines: PCR values that an administrator accepted.

use claviger_protocol::tpm::pcr::PcrValues;
use claviger_protocol::tpm::policy;
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{State, StateError, WriteError, one};

/// The columns of [`baseline`].
pub(super) const COLUMNS: &str = "name, pcrs, log, enabled, added";

/// Most baselines of a service. Each attestation is compared with all that are enabled.
pub const MAX_BASELINES: i64 = 1_000;

/// Longest name, which is that of an organizational unit in a certificate.
const MAX_NAME: usize = 64;

/// PCR values that hosts may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Its name, unique without regard to case, as it was given.
    pub name: String,
    /// The values: at least those of PCRs 0, 4 and 7.
    pub values: PcrValues,
    /// The event log of the host that they were taken from.
    pub log: Option<Vec<u8>>,
    /// Whether hosts with these values are healthy.
    pub enabled: bool,
    /// When it was added, seconds since 1970. Health certificates from before do not mean this one.
    pub added: i64,
}

impl State {
    /// All baselines, by name.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn baselines(&self) -> Result<Vec<Baseline>, StateError> {
        self.read(&format!("SELECT {COLUMNS} FROM baselines ORDER BY name"), [], baseline)
    }

    /// The same without their logs, which may be large.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn baselines_without_logs(&self) -> Result<Vec<Baseline>, StateError> {
        self.read("SELECT name, pcrs, NULL, enabled, added FROM baselines ORDER BY name", [], baseline)
    }

    /// The log of the baseline that was added under this name at this time, if it has one. One at a time: all together may be
    /// large.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError> {
        let sql = "SELECT log FROM baselines WHERE name = ?1 AND added = ?2";
        let mut found = self.read(sql, params![name, added], |row| row.get::<_, Option<Vec<u8>>>(0))?;
        Ok(found.pop().flatten())
    }

    /// The baseline of a name, without regard to case.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NotFound`].
    pub fn baseline_by_name(&self, name: &str) -> Result<Baseline, StateError> {
        let mut found = self.read(&format!("SELECT {COLUMNS} FROM baselines WHERE name = ?1"), [name], baseline)?;
        found.pop().ok_or_else(|| no_baseline(name))
    }

    /// Adds a baseline, enabled.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for a name that is none, or values that lack a PCR; [`StateError::Conflict`] for a name that is
    /// there, or one more than [`MAX_BASELINES`].
    pub fn add_baseline(
        &mut self,
        name: &str,
        values: &PcrValues,
        log: Option<&[u8]>,
        now: i64,
    ) -> Result<Baseline, StateError> {
        check_baseline_name(name)?;
        check_values(values)?;
        let (name, values, log) = (name.to_owned(), values.clone(), log.map(<[u8]>::to_vec));
        let added = Baseline { name, values, log, enabled: true, added: now };
        self.write(|transaction| {
            if let Some(other) =
                one::<String>(transaction, "SELECT name FROM baselines WHERE name = ?1", [&added.name])?
            {
                return Err(StateError::Conflict(format!(
                    "a baseline {other:?} is there already; remove it first, or choose another name"
                ))
                .into());
            }
            check_room(transaction)?;
            transaction.execute(
                "INSERT INTO baselines (name, pcrs, log, enabled, added) VALUES (?1, ?2, ?3, 1, ?4)",
                params![added.name, values_to_text(&added.values), added.log, added.added],
            )?;
            Ok(())
        })?;
        Ok(added)
    }

    /// Enables or disables a baseline.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn enable_baseline(&mut self, name: &str, enabled: bool) -> Result<Baseline, StateError> {
        self.write(|transaction| {
            let sql = format!("UPDATE baselines SET enabled = ?2 WHERE name = ?1 RETURNING {COLUMNS}");
            let changed = transaction.query_row(&sql, params![name, enabled], baseline).optional()?;
            changed.ok_or_else(|| no_baseline(name).into())
        })
    }

    /// Removes a baseline and returns what it was.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_baseline(&mut self, name: &str) -> Result<Baseline, StateError> {
        self.write(|transaction| {
            let sql = format!("DELETE FROM baselines WHERE name = ?1 RETURNING {COLUMNS}");
            let removed = transaction.query_row(&sql, [name], baseline).optional()?;
            removed.ok_or_else(|| no_baseline(name).into())
        })
    }
}

fn no_baseline(name: &str) -> StateError {
    StateError::NotFound(format!("there is no baseline {name:?}"))
}

pub(super) fn baseline(row: &Row<'_>) -> rusqlite::Result<Baseline> {
    let pcrs: String = row.get(1)?;
    // A baseline without values would match every host.
    let values = values_from_text(&pcrs)
        .and_then(|values| check_values(&values).map(|()| values))
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(error)))?;
    Ok(Baseline { name: row.get(0)?, values, log: row.get(2)?, enabled: row.get(3)?, added: row.get(4)? })
}

/// Whether this can name a baseline.
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

/// Whether these can be a baseline's values.
///
/// # Errors
/// [`StateError::Invalid`].
pub(super) fn check_values(values: &PcrValues) -> Result<(), StateError> {
    match policy::Baseline::REQUIRED.into_iter().find(|pcr| values.get(*pcr).is_none()) {
        Some(pcr) => Err(StateError::Invalid(format!("a baseline needs PCRs 0, 4 and 7, and PCR {pcr} is missing"))),
        None => Ok(()),
    }
}

/// Whether one more baseline may be added.
///
/// # Errors
/// [`StateError::Conflict`].
pub(super) fn check_room(transaction: &Transaction<'_>) -> Result<(), WriteError> {
    let all = one::<i64>(transaction, "SELECT count(*) FROM baselines", [])?;
    if all.unwrap_or_default() >= MAX_BASELINES {
        let text = format!("there are {MAX_BASELINES} baselines already; remove some");
        return Err(StateError::Conflict(text).into());
    }
    Ok(())
}

/// PCR values as `0=<hex> 4=<hex> …`.
pub(super) fn values_to_text(values: &PcrValues) -> String {
    values.iter().map(|(pcr, value)| format!("{pcr}={}", HEXLOWER.encode(value))).collect::<Vec<_>>().join(" ")
}

/// Reads what [`values_to_text`] writes.
///
/// # Errors
/// [`StateError::Invalid`].
fn values_from_text(text: &str) -> Result<PcrValues, StateError> {
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
    use crate::store::tests::{message, open};

    fn values(pcrs: &[usize]) -> PcrValues {
        let mut values = PcrValues::default();
        pcrs.iter().for_each(|pcr| assert!(values.set(*pcr, [*pcr as u8; 32])));
        values
    }

    #[test]
    fn baselines_are_kept_by_name() {
        let (_folder, mut state) = open();
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

    #[test]
    fn a_log_is_read_by_name_and_time() {
        let (_folder, mut state) = open();
        state.add_baseline("a", &values(&[0, 4, 7]), Some(b"log"), 7).unwrap();
        state.add_baseline("b", &values(&[0, 4, 7]), None, 7).unwrap();
        assert_eq!(state.baseline_log("a", 7).unwrap().as_deref(), Some(&b"log"[..]));
        for (name, added) in [("a", 8), ("b", 7), ("c", 7)] {
            assert_eq!(state.baseline_log(name, added).unwrap(), None);
        }
    }

    #[test]
    fn a_stored_baseline_that_lacks_values_is_refused() {
        let (_folder, mut state) = open();
        state.add_baseline("a", &values(&[0, 4, 7]), None, 7).unwrap();
        for pcrs in [String::new(), values_to_text(&values(&[0, 7]))] {
            state.write(|transaction| Ok(transaction.execute("UPDATE baselines SET pcrs = ?1", [&pcrs])?)).unwrap();
            assert!(message(state.baselines()).contains("is missing"), "{pcrs:?}");
            assert!(state.baselines_without_logs().is_err() && state.baseline_by_name("a").is_err());
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
