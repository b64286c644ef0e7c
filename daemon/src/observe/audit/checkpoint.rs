//! Checkpoints: from time to time, an HSM signs number and hash of the last line. An attacker with the files but
//! without the HSM cannot rewrite lines that a checkpoint covers.

use std::time::{Duration, Instant, SystemTime};

use claviger_protocol::certificate::Certificate;
use data_encoding::{BASE64, HEXLOWER};
use serde_json::{Map, Value};

use super::chain::{CHECKPOINT, Link};
use super::entry::timestamp;

/// The event of a checkpoint line.
pub(crate) const EVENT: &str = CHECKPOINT;

/// The message that is signed with RSASSA-PKCS1-v1_5 and SHA-256: five lines of text. Its beginning differs from
/// everything else that the key signs (XML and DER certificates).
#[must_use]
pub(crate) fn message(node: &str, line: u64, hash: &str, time: &str) -> Vec<u8> {
    format!("claviger audit checkpoint 1\n{node}\n{line}\n{hash}\n{time}\n").into_bytes()
}

/// A checkpoint before its signature.
#[derive(Debug)]
pub struct Draft {
    /// The last line that it covers.
    pub(super) link: Link,
    /// Number of records up to that line.
    pub(super) records: u64,
    node: String,
    time: String,
}

impl Draft {
    pub(super) fn new(link: Link, records: u64, node: &str, now: SystemTime) -> Self {
        Self { link, records, node: node.to_owned(), time: timestamp(now).unwrap_or_default() }
    }

    /// The message to sign.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        message(&self.node, self.link.n, &self.link.hex(), &self.time)
    }

    /// The line as a JSON object.
    pub(super) fn line(&self, request: &str, certificate: &Certificate, signature: &[u8]) -> Value {
        let mut line = Map::new();
        line.insert("time".into(), self.time.as_str().into());
        line.insert("request".into(), request.into());
        line.insert("event".into(), EVENT.into());
        line.insert("outcome".into(), "signed".into());
        line.insert("line".into(), self.link.n.into());
        line.insert("hash".into(), self.link.hex().into());
        line.insert("signer".into(), HEXLOWER.encode(&certificate.thumbprint()).into());
        // Include the certificate in every checkpoint: the files must be verifiable without the daemon, and older files
        // may have been deleted.
        line.insert("signer_certificate".into(), BASE64.encode(certificate.der()).into());
        line.insert("signature".into(), BASE64.encode(signature).into());
        Value::Object(line)
    }
}

/// When the next checkpoint is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// After this number of records.
    pub(super) lines: u64,
    /// And at the latest this long after the first uncovered record.
    pub(super) time: Duration,
}

impl Pace {
    pub(super) fn is_due(self, unsigned: u64, since: Option<Instant>, now: Instant) -> bool {
        unsigned > 0
            && (unsigned >= self.lines || since.is_some_and(|since| now.saturating_duration_since(since) >= self.time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_due_when_there_is_something_to_sign() {
        let pace = Pace { lines: 100, time: Duration::from_secs(60) };
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(61));
        assert!(!pace.is_due(0, None, later) && !pace.is_due(0, Some(now), later));
        assert!(!pace.is_due(99, Some(now), now) && pace.is_due(100, Some(now), now));
        assert!(pace.is_due(1, Some(now), later));
    }

    #[test]
    fn what_is_signed_is_nothing_else_that_a_key_signs() {
        let message = message("node", 7, "ab", "2026-01-01T00:00:00.000Z");
        assert_eq!(message, b"claviger audit checkpoint 1\nnode\n7\nab\n2026-01-01T00:00:00.000Z\n");
    }
}
