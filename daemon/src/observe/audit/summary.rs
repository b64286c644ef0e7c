//! Refusals and repeats without a line of their own: anyone can cause them without limit, and a line for each would
//! fill the disk, so that nothing could be released. They are counted, and a line each second summarises them.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::entry::{Entry, timestamp};

/// The event of a line about refusals.
pub(crate) const EVENT: &str = "refusals";
/// The event of a line about repeated health certificates.
const REPEATS: &str = "repeats";

/// Most addresses in a line; further ones are counted together.
const ADDRESSES: usize = 16;
/// Most request ids in a line.
const REQUESTS: usize = 8;
/// Most lines that are written at a time; the rest stays counted.
const LINES: usize = 256;
/// Most hosts with their own counts; requests of further hosts count as from unknown senders.
const HOSTS: usize = 20_000;

/// Most hosts with their own counts that senders only claim to be: one sender may claim to be any host whose public key it has
/// seen, and is not to have a line a second for each.
const CLAIMED: usize = 8;

/// The kind of a counted request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum What {
    /// Requests that were refused.
    Refused,
    /// Requests that got a repeated reply, which already has its line.
    Repeated,
}

/// The subject of a line: the kind, and the host; `None`: unknown sender.
pub(super) type Of = (What, Option<String>);

/// The counts since the last lines.
#[derive(Debug, Default)]
pub(super) struct Summary {
    counts: HashMap<Of, Counts>,
    /// How many of these are of hosts that senders only claim to be.
    claimed: usize,
}

/// The counts of one host, or of unknown senders.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    since: SystemTime,
    outcomes: BTreeMap<String, u64>,
    addresses: BTreeMap<String, u64>,
    other_addresses: u64,
    requests: Vec<String>,
}

impl Counts {
    fn new(since: SystemTime) -> Self {
        Self { since, outcomes: BTreeMap::new(), addresses: BTreeMap::new(), other_addresses: 0, requests: Vec::new() }
    }

    fn count(&mut self, address: Option<String>, times: u64) {
        let Some(address) = address else { return };
        if let Some(known) = self.addresses.get_mut(&address) {
            *known += times;
        } else if self.addresses.len() < ADDRESSES {
            self.addresses.insert(address, times);
        } else {
            self.other_addresses += times;
        }
    }

    /// Adds earlier counts.
    fn merge(&mut self, older: Self) {
        self.since = self.since.min(older.since);
        for (outcome, count) in older.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        for (address, count) in older.addresses {
            self.count(Some(address), count);
        }
        self.other_addresses += older.other_addresses;
        self.requests.splice(0..0, older.requests);
        self.requests.truncate(REQUESTS);
    }
}

impl Summary {
    /// Counts a request.
    pub(super) fn add(&mut self, what: What, entry: &Entry) {
        let mut of = (what, entry.host.clone());
        if of.1.is_some() && !self.counts.contains_key(&of) {
            let is_claimed = !entry.proved;
            if self.counts.len() >= HOSTS || is_claimed && self.claimed >= CLAIMED {
                of.1 = None;
            } else {
                self.claimed += usize::from(is_claimed);
            }
        }
        let counts = self.counts.entry(of).or_insert_with(|| Counts::new(entry.time));
        *counts.outcomes.entry(entry.outcome.clone()).or_default() += 1;
        counts.count(entry.address.map(network), 1);
        if counts.requests.len() < REQUESTS {
            counts.requests.push(entry.request.clone());
        }
    }

    /// Removes and returns the counts to write now.
    pub(super) fn take(&mut self) -> Vec<(Of, Counts)> {
        self.claimed = 0;
        if self.counts.len() <= LINES {
            return self.counts.drain().collect();
        }
        // Unknown senders come first, because they may have the most.
        let mut all: Vec<_> = self.counts.keys().cloned().collect();
        all.sort_by_key(|(_, host)| host.is_some());
        all.truncate(LINES);
        all.into_iter().filter_map(|of| self.counts.remove_entry(&of)).collect()
    }

    /// Takes back counts that could not be written.
    pub(super) fn put_back(&mut self, of: Of, older: Counts) {
        self.counts.entry(of).or_insert_with(|| Counts::new(older.since)).merge(older);
    }
}

/// The line as a JSON object.
pub(super) fn line((what, host): &Of, counts: &Counts, request: &str, now: SystemTime) -> Value {
    let (event, outcome) = match what {
        What::Refused => (EVENT, "refused"),
        What::Repeated => (REPEATS, "repeated"),
    };
    let mut line = Map::new();
    let time = |time| timestamp(time).unwrap_or_default();
    line.insert("time".into(), time(now).into());
    line.insert("request".into(), request.into());
    line.insert("event".into(), event.into());
    line.extend(host.as_deref().map(|host| ("host".into(), host.into())));
    line.insert("outcome".into(), outcome.into());
    line.insert("count".into(), counts.outcomes.values().sum::<u64>().into());
    line.insert("outcomes".into(), json!(counts.outcomes));
    line.insert("addresses".into(), json!(counts.addresses));
    if counts.other_addresses > 0 {
        line.insert("other_addresses".into(), counts.other_addresses.into());
    }
    line.insert("requests".into(), json!(counts.requests));
    line.insert("since".into(), time(counts.since).into());
    Value::Object(line)
}

/// The form in which an address is counted: for IPv6 its network, because one machine can use all addresses in it.
fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::request::Attempt;

    fn refusal(host: Option<&str>, address: &str, outcome: &str, request: usize) -> Entry {
        let mut attempt = Attempt::new(request.to_string()).sent_from(Some(address.parse().unwrap()));
        attempt.host = host.map(str::to_owned);
        attempt.known = host.is_some();
        attempt.entry("release", outcome)
    }

    fn written(summary: &mut Summary) -> Vec<Value> {
        let now = SystemTime::UNIX_EPOCH;
        summary.take().iter().map(|(of, counts)| line(of, counts, "id", now)).collect()
    }

    #[test]
    fn a_flood_is_one_short_line() {
        let mut summary = Summary::default();
        for at in 0..100_000usize {
            let address = format!("10.0.{}.{}", at / 250 % 250, at % 250);
            summary.add(What::Refused, &refusal(None, &address, ["A", "B"][at % 2], at));
        }
        let [line] = written(&mut summary).try_into().unwrap();
        assert_eq!((&line["count"], &line["outcomes"]), (&json!(100_000), &json!({"A": 50_000, "B": 50_000})));
        let named = line["addresses"].as_object().unwrap();
        let counted: u64 = named.values().map(|count| count.as_u64().unwrap()).sum();
        assert_eq!((named.len(), counted + line["other_addresses"].as_u64().unwrap()), (ADDRESSES, 100_000));
        assert_eq!(line["requests"].as_array().unwrap().len(), REQUESTS);
        assert!(line["host"].is_null() && line.to_string().len() < 1000, "{line}");
        assert!(written(&mut summary).is_empty());
    }

    #[test]
    fn names_that_are_not_proved_have_few_lines() {
        let mut summary = Summary::default();
        for host in 0..300 {
            let entry = Entry { proved: false, ..refusal(Some(&format!("node-{host}")), "10.0.0.1", "A", host) };
            summary.add(What::Refused, &entry);
        }
        for host in 0..2 {
            summary.add(What::Refused, &refusal(Some(&format!("known-{host}")), "10.0.0.2", "A", host));
        }
        let lines = written(&mut summary);
        assert_eq!(lines.len(), CLAIMED + 2 + 1);
        let nobody = lines.iter().find(|line| line["host"].is_null()).unwrap();
        assert_eq!(nobody["count"], json!(300 - CLAIMED));
        // Each second anew.
        summary.add(What::Refused, &Entry { proved: false, ..refusal(Some("node-9"), "10.0.0.1", "A", 9) });
        assert_eq!(written(&mut summary)[0]["host"], "node-9");
    }

    #[test]
    fn each_host_has_its_own_and_nothing_is_lost() {
        let mut summary = Summary::default();
        for host in 0..LINES + 10 {
            summary.add(What::Refused, &refusal(Some(&format!("node-{host}")), "::ffff:10.0.0.1", "A", host));
        }
        summary.add(What::Refused, &refusal(None, "2001:db8:1:2:3::4", "A", 0));
        summary.add(What::Refused, &refusal(None, "2001:db8:1:2:ffff::", "A", 1));
        let first = written(&mut summary);
        assert_eq!(first.len(), LINES);
        let nobody = first.iter().find(|line| line["host"].is_null()).unwrap();
        assert_eq!(nobody["addresses"], json!({"2001:db8:1:2::/64": 2}));
        let taken = summary.take();
        assert_eq!(taken.len(), 11);
        for (of, counts) in taken {
            assert_eq!(counts.addresses, BTreeMap::from([("10.0.0.1".to_owned(), 1)]));
            summary.add(What::Refused, &refusal(of.1.as_deref(), "10.0.0.2", "B", 7));
            summary.put_back(of, counts);
        }
        let lines = written(&mut summary);
        assert_eq!(lines.len(), 11);
        for line in lines {
            assert_eq!((&line["outcomes"], &line["count"]), (&json!({"A": 1, "B": 1}), &json!(2)));
            assert_eq!(line["requests"].as_array().unwrap().len(), 2);
        }
    }

    #[test]
    fn more_hosts_than_there_can_be_take_no_more_memory() {
        let mut summary = Summary::default();
        for host in 0..HOSTS + 100 {
            summary.add(What::Refused, &refusal(Some(&host.to_string()), "10.0.0.1", "A", host));
        }
        assert_eq!(summary.counts.len(), HOSTS + 1);
        assert_eq!(summary.counts[&(What::Refused, None)].outcomes["A"], 100);
    }

    #[test]
    fn what_was_handed_out_again_is_no_refusal() {
        let mut summary = Summary::default();
        summary.add(What::Refused, &refusal(Some("node"), "10.0.0.1", "A", 1));
        for request in 2..5 {
            summary.add(What::Repeated, &refusal(Some("node"), "10.0.0.2", "success", request));
        }
        let mut lines = written(&mut summary);
        lines.sort_by_key(|line| line["event"].to_string());
        let [refused, repeated] = lines.try_into().unwrap();
        assert_eq!((&refused["event"], &refused["count"]), (&json!("refusals"), &json!(1)));
        assert_eq!((&repeated["event"], &repeated["outcome"]), (&json!("repeats"), &json!("repeated")));
        assert_eq!((&repeated["host"], &repeated["count"]), (&json!("node"), &json!(3)));
        assert_eq!(repeated["addresses"], json!({"10.0.0.2": 3}));
    }
}
