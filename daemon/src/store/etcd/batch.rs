//! Changes as etcd transactions. One transaction allows 128 operations and 1.5 MiB.
//!
//! A larger change is first written to a journal in parts. The transaction that names the journal in the head makes the
//! change, all at once: every reader adds the contents of the journal. Then any node copies the parts to their places
//! and clears the journal.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::layout::Write;

/// Most writes in one transaction. The head and the conditions need the remaining operations.
const MOST_WRITES: usize = 100;
/// Most bytes of one transaction.
const MOST_BYTES: usize = 900 * 1024;
/// Number of earlier changes that a head lists.
const RECENT: usize = 64;

/// The last change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    pub(super) v: u32,
    /// Id of the change.
    pub(super) change: String,
    /// The node that made it.
    pub(super) node: String,
    /// Ids of earlier changes, the latest first. After a lost connection, a node looks here to see whether its change
    /// was made.
    pub(super) before: Vec<String>,
    /// Number of its parts in the journal, until all are in their places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) journal: Option<usize>,
}

impl Head {
    /// The head of the next change.
    pub(super) fn next(before: Option<&Self>, change: &str, node: &str, journal: Option<usize>) -> Self {
        let known = before.map(|head| std::iter::once(&head.change).chain(&head.before).take(RECENT).cloned());
        let before = known.map(Iterator::collect).unwrap_or_default();
        Self { v: 1, change: change.to_owned(), node: node.to_owned(), before, journal }
    }

    /// Whether `change` is this one or an earlier one in the list.
    pub(super) fn has(&self, change: &str) -> bool {
        self.change == change || self.before.iter().any(|id| id == change)
    }
}

/// A part of a change in the journal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    pub(super) v: u32,
    pub(super) writes: Vec<Write>,
}

/// Splits writes into groups that each fit into one transaction. A single larger value is a group of its own.
pub(super) fn groups(writes: Vec<Write>) -> Vec<Vec<Write>> {
    let (mut groups, mut bytes) = (Vec::<Vec<Write>>::new(), 0);
    for write in writes {
        let size = size(&write);
        match groups.last_mut() {
            Some(group) if group.len() < MOST_WRITES && bytes + size <= MOST_BYTES => {
                group.push(write);
                bytes += size;
            }
            _ => {
                groups.push(vec![write]);
                bytes = size;
            }
        }
    }
    groups
}

/// Approximate size of a write in bytes.
fn size(write: &Write) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(text) => text.len() + 3,
            Value::Array(all) => all.iter().map(of).sum::<usize>() + 2,
            Value::Object(all) => all.iter().map(|(key, value)| key.len() + 4 + of(value)).sum::<usize>() + 2,
            Value::Null | Value::Bool(_) | Value::Number(_) => 20,
        }
    }
    match write {
        Write::Put(key, value) => key.len() + of(value) + 20,
        Write::Delete(key) => key.len() + 20,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_in_number_and_bytes_and_keep_the_order() {
        let small = |number: usize| Write::Delete(format!("k{number}"));
        let writes: Vec<_> = (0..250).map(small).collect();
        let grouped = groups(writes.clone());
        assert_eq!(grouped.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 50]);
        assert_eq!(grouped.concat(), writes);
        let large = |number: usize| Write::Put(format!("k{number}"), Value::String("x".repeat(400 * 1024)));
        let grouped = groups((0..5).map(large).collect());
        assert_eq!(grouped.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!(groups(Vec::new()), Vec::<Vec<Write>>::new());
    }

    #[test]
    fn a_head_names_the_changes_before_it() {
        let mut head = Head::next(None, "0", "a", None);
        for change in 1..=RECENT + 5 {
            head = Head::next(Some(&head), &change.to_string(), "a", None);
        }
        assert!(head.has("69") && head.has("68") && head.has("5") && !head.has("4"));
        assert_eq!(head.before.len(), RECENT);
    }
}
