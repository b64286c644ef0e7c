//! The records of one kind in memory. Copies share the records.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::error::StateError;

/// Records by their keys, or the reason why they cannot be read.
#[derive(Clone, Debug)]
pub(super) struct Table<K, T> {
    rows: BTreeMap<K, Row<T>>,
    /// The order of the next record.
    next: i64,
    problem: Option<Arc<Problem>>,
}

#[derive(Debug)]
struct Problem {
    table: &'static str,
    place: String,
    problem: String,
}

/// One record.
#[derive(Debug)]
pub(super) struct Row<T> {
    /// Each new record gets a larger number.
    pub(super) order: i64,
    pub(super) value: Arc<T>,
}

/// The changes to the records of one kind.
#[derive(Debug)]
pub(super) struct Changes<K, T> {
    pub(super) removed: Vec<K>,
    /// New records, and records with a new value.
    pub(super) put: Vec<(K, Row<T>)>,
}

impl<T> Clone for Row<T> {
    fn clone(&self) -> Self {
        Self { order: self.order, value: Arc::clone(&self.value) }
    }
}

impl<K, T> Default for Table<K, T> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), next: 1, problem: None }
    }
}

impl<K: Ord + Clone, T> Table<K, T> {
    /// A table that cannot be read.
    pub(super) fn unreadable(table: &'static str, place: String, problem: String) -> Self {
        Self { rows: BTreeMap::new(), next: 1, problem: Some(Arc::new(Problem { table, place, problem })) }
    }

    pub(super) fn is_readable(&self) -> bool {
        self.problem.is_none()
    }

    fn check(&self) -> Result<(), StateError> {
        self.problem.as_deref().map_or(Ok(()), |of| {
            let (place, problem) = (of.place.clone(), of.problem.clone());
            Err(StateError::Unreadable { table: of.table, place, problem })
        })
    }

    /// All records by key.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub(super) fn rows(&self) -> Result<&BTreeMap<K, Row<T>>, StateError> {
        self.check().map(|()| &self.rows)
    }

    /// # Errors
    /// [`StateError::Unreadable`].
    pub(super) fn values(&self) -> Result<impl Iterator<Item = &Arc<T>>, StateError> {
        Ok(self.rows()?.values().map(|row| &row.value))
    }

    /// # Errors
    /// [`StateError::Unreadable`].
    pub(super) fn get(&self, key: &K) -> Result<Option<&Arc<T>>, StateError> {
        Ok(self.rows()?.get(key).map(|row| &row.value))
    }

    /// Adds a record, or replaces the one with this key, which keeps its order.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub(super) fn put(&mut self, key: K, value: T) -> Result<(), StateError> {
        self.check()?;
        match self.rows.entry(key) {
            Entry::Occupied(mut row) => row.get_mut().value = Arc::new(value),
            Entry::Vacant(row) => {
                row.insert(Row { order: self.next, value: Arc::new(value) });
                self.next = self.next.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Removes the record with this key and returns it.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub(super) fn remove(&mut self, key: &K) -> Result<Option<Arc<T>>, StateError> {
        self.check()?;
        Ok(self.rows.remove(key).map(|row| row.value))
    }

    /// Loads a record from a store.
    pub(super) fn load(&mut self, key: K, order: i64, value: T) {
        self.next = self.next.max(order.saturating_add(1));
        self.rows.insert(key, Row { order, value: Arc::new(value) });
    }

    /// Removes the records whose key is `gone`, which a store has removed.
    pub(super) fn unload(&mut self, gone: impl Fn(&K) -> bool) {
        self.rows.retain(|key, _| !gone(key));
    }

    /// The changes that lead from `older` to this table. Records are compared by identity.
    pub(super) fn changes_since(&self, older: &Self) -> Changes<K, T> {
        let removed = older.rows.keys().filter(|key| !self.rows.contains_key(key)).cloned().collect();
        let is_new = |(key, row): &(&K, &Row<T>)| {
            older.rows.get(key).is_none_or(|old| old.order != row.order || !Arc::ptr_eq(&old.value, &row.value))
        };
        let put = self.rows.iter().filter(is_new).map(|(key, row)| (key.clone(), row.clone())).collect();
        Changes { removed, put }
    }
}

impl<K, T> Changes<K, T> {
    pub(super) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.put.is_empty()
    }
}
