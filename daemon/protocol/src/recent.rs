//! A bounded table that drops the entries that were not used recently.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// The table has two generations. When the young entries weigh more than the capacity, they become the old generation,
/// and the previous old entries are dropped. Access to an old entry makes it young again. So the table keeps at least
/// the last `capacity` of weight, and at most twice that.
#[derive(Debug)]
pub(crate) struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    capacity: usize,
    /// Total weight of the young entries.
    weight: usize,
    weigh: fn(&V) -> usize,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// `weigh` returns the weight of an entry.
    pub(crate) fn new(capacity: usize, weigh: fn(&V) -> usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), capacity, weight: 0, weigh }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        self.weight += (self.weigh)(&value);
        if let Some(before) = self.young.insert(key, value) {
            self.weight -= (self.weigh)(&before);
        }
        if self.weight > self.capacity {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stays_and_the_rest_is_forgotten() {
        let mut recent = Recent::new(3, |_| 1);
        for number in 0..100 {
            recent.insert(number, ());
            assert!(recent.get(&0).is_some(), "{number}");
            assert!((0..number).filter(|n| recent.get(n).is_some()).count() >= 2.min(number));
            assert!(recent.len() <= 7);
        }
        assert!(recent.get(&50).is_none());
    }

    #[test]
    fn entries_count_by_their_weight() {
        let mut recent = Recent::new(10, |weight: &usize| *weight);
        recent.insert("a", 6);
        recent.insert("a", 4);
        recent.insert("b", 6);
        assert_eq!((recent.weight, recent.len()), (10, 2));
        recent.insert("c", 1);
        assert_eq!((recent.weight, recent.get("a")), (0, Some(4)), "the old ones are still there");
        assert_eq!(recent.weight, 4);
        recent.insert("huge", 11);
        recent.insert("next", 1);
        assert_eq!((recent.get("b"), recent.get("c")), (None, None));
    }
}
