//! Compares two boots by the events in their logs.

use std::collections::HashMap;

use super::log::{Bank, Event, Log};

/// Most differences that are listed for one PCR.
const MOST: usize = 64;

/// An event that occurred in only one of two boots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Whether the event is from the later boot.
    pub is_new: bool,
    /// The event's SHA-256 digest.
    pub digest: Vec<u8>,
    /// Description in printable characters.
    pub description: String,
}

/// The events of one PCR that occurred in only one of two boots.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Differences {
    /// At most 64 events. Events of the later boot come first.
    pub events: Vec<Difference>,
    /// Number of differing events that are not listed.
    pub omitted: usize,
}

/// Compares the events of a PCR in two boots. Without an earlier boot, all events of the PCR are new.
#[must_use]
pub fn differences(pcr: u32, before: Option<&Log<'_>>, after: &Log<'_>) -> Differences {
    let before: Vec<_> = before.iter().flat_map(|log| measured(log, pcr)).collect();
    let after: Vec<_> = measured(after, pcr).collect();
    let only = |these: &[Event<'_>], others: &[Event<'_>], is_new: bool| {
        // Match each event with at most one event of the other boot.
        let mut counted: HashMap<_, usize> = HashMap::new();
        let others = others.iter().filter_map(|event| event.digest(Bank::Sha256));
        others.for_each(|digest| *counted.entry(digest).or_default() += 1);
        let mut only = Vec::new();
        for event in these {
            let Some(digest) = event.digest(Bank::Sha256) else { continue };
            match counted.get_mut(digest) {
                Some(left) if *left > 0 => *left -= 1,
                _ => only.push(Difference { is_new, digest: digest.to_vec(), description: event.describe() }),
            }
        }
        only
    };
    // New events first: a long list of events that are gone must not hide them.
    let mut events = only(&after, &before, true);
    events.extend(only(&before, &after, false));
    let omitted = events.len().saturating_sub(MOST);
    events.truncate(MOST);
    Differences { events, omitted }
}

fn measured<'a>(log: &Log<'a>, pcr: u32) -> impl Iterator<Item = Event<'a>> {
    log.events().filter(move |event| event.pcr == pcr && event.extends())
}
