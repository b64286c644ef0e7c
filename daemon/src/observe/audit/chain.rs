//! The chain: every line has a number and the SHA-256 of the previous line. A line that was changed, removed, inserted
//! or moved is detected at the next line.
//!
//! ```text
//! {"n":41,"prev":"<SHA-256 of line 40>", …}
//! {"n":42,"prev":"<SHA-256 of line 41, without its line break>", …}
//! ```
//! The first line of the trail has `n` 1 and 64 zeros. The chain continues across restarts and files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use serde::Deserialize;

/// Bytes at the end of a file that are first searched for the last line, and the most that are searched.
const FIRST_WINDOW: u64 = 64 * 1024;
const LARGEST_WINDOW: u64 = 64 * 1024 * 1024;

/// The event of a checkpoint line.
pub(super) const CHECKPOINT: &str = "checkpoint";

/// SHA-256 of a line, without its line break.
pub(super) type Hash = [u8; 32];

pub(super) fn hash(bytes: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// A position in the chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Number of the line; 0: none, or a line of a version without a chain.
    pub n: u64,
    /// SHA-256 of the line; zeros: none.
    pub hash: [u8; 32],
}

impl Link {
    /// The hash in its written form.
    #[must_use]
    pub fn hex(&self) -> String {
        HEXLOWER.encode(&self.hash)
    }

    /// Appends the next line to `out`: `body` (a JSON object), preceded by the links and `node` (also JSON).
    pub(super) fn extend(self, node: &str, body: &[u8], out: &mut Vec<u8>) -> Self {
        let start = out.len();
        let n = self.n + 1;
        out.extend_from_slice(format!("{{\"n\":{n},\"prev\":\"{}\",\"node\":{node},", self.hex()).as_bytes());
        // Skip the opening brace.
        out.extend_from_slice(body.get(1..).unwrap_or_default());
        let hash = hash(&out[start..]);
        out.push(b'\n');
        Self { n, hash }
    }
}

/// The fields of a line that the chain uses.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Links {
    pub(super) n: Option<u64>,
    pub(super) prev: Option<String>,
    pub(super) event: Option<String>,
    /// In the first line after a crash: the hash of the unfinished line before it.
    pub(super) torn: Option<String>,
    pub(super) time: Option<String>,
    pub(super) node: Option<String>,
    /// In a checkpoint: number and hash of the signed line, and the signature.
    pub(super) line: Option<u64>,
    pub(super) hash: Option<String>,
    pub(super) signer: Option<String>,
    pub(super) signer_certificate: Option<String>,
    pub(super) signature: Option<String>,
}

impl Links {
    /// Parses a line without its line break. `None`: not a JSON object.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        // serde would also accept an array of the fields' values.
        (line.first() == Some(&b'{')).then(|| serde_json::from_slice(line).ok()).flatten()
    }
}

/// The end of a file of the trail.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Tail {
    /// The last complete line.
    pub(super) last: Option<Link>,
    /// Whether that line is a checkpoint.
    pub(super) signed: bool,
    /// The hash of an unfinished line after it (see [`torn_hash`]), left by a crash.
    pub(super) torn: Option<Hash>,
    /// Whether the file does not end with a line break.
    pub(super) open_line: bool,
}

/// The hash of an unfinished line in the trail: of its bytes with a line break at the end.
pub(super) fn torn_hash(bytes: &[u8]) -> Hash {
    if bytes.ends_with(b"\n") { hash(bytes) } else { hash(&[bytes, b"\n"].concat()) }
}

/// Reads the end of a file of `length` bytes.
pub(super) fn tail(file: &File, length: u64) -> io::Result<Tail> {
    let mut window = FIRST_WINDOW;
    loop {
        let start = length.saturating_sub(window);
        let mut end = vec![0; usize::try_from(length - start).unwrap_or(0)];
        file.read_exact_at(&mut end, start)?;
        match tail_of(&end, start == 0) {
            Some(tail) => return Ok(tail),
            None if window >= LARGEST_WINDOW => return Err(io::Error::other("its last line is too long")),
            None => window *= 8,
        }
    }
}

/// `None` if the last complete line begins before these bytes.
fn tail_of(bytes: &[u8], is_all: bool) -> Option<Tail> {
    let open_line = !bytes.is_empty() && !bytes.ends_with(b"\n");
    let mut end = bytes.len();
    loop {
        if end == 0 {
            let torn = (!bytes.is_empty()).then(|| torn_hash(bytes));
            return is_all.then_some(Tail { torn, open_line, ..Tail::default() });
        }
        // The line ends before `end`, which is after its line break or at the end of the input.
        let body_end = if bytes[end - 1] == b'\n' { end - 1 } else { end };
        let start = bytes[..body_end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if start == 0 && !is_all {
            return None;
        }
        let line = &bytes[start..body_end];
        if let Some(links) = Links::read(line).filter(|_| !line.is_empty()) {
            let rest = &bytes[end..];
            return Some(Tail {
                last: Some(Link { n: links.n.unwrap_or(0), hash: hash(line) }),
                signed: links.event.as_deref() == Some(CHECKPOINT),
                torn: (!rest.is_empty()).then(|| torn_hash(rest)),
                open_line,
            });
        }
        end = start;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lines(count: usize) -> (Vec<u8>, Link) {
        let mut out = Vec::new();
        let last = (0..count).fold(Link::default(), |link, at| {
            link.extend("\"node\"", format!("{{\"event\":\"e{at}\"}}").as_bytes(), &mut out)
        });
        (out, last)
    }

    #[test]
    fn a_line_names_the_one_before() {
        let (text, last) = lines(3);
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with(&format!(r#"{{"n":1,"prev":"{}","node":"node","event":"e0"}}"#, "0".repeat(64))));
        let links = Links::read(lines[2].as_bytes()).unwrap();
        assert_eq!((links.n, links.prev.unwrap()), (Some(3), HEXLOWER.encode(&hash(lines[1].as_bytes()))));
        assert_eq!(last, Link { n: 3, hash: hash(lines[2].as_bytes()) });
    }

    #[test]
    fn the_end_of_a_file_is_found_whatever_a_crash_left() {
        let (whole, last) = lines(2);
        let of = |bytes: &[u8]| tail_of(bytes, true).unwrap();
        assert_eq!(of(b""), Tail::default());
        assert_eq!(of(&whole), Tail { last: Some(last), ..Tail::default() });
        // A fragment, a fragment with a line break, two fragments, and an empty line.
        for (rest, open_line) in
            [(&b"{\"n\":3,\"pr"[..], true), (b"{\"n\"\n", false), (b"{\"n\"\n{\"", true), (b"\n", false)]
        {
            let torn = Some(torn_hash(rest));
            let bytes = [&whole, rest].concat();
            assert_eq!(of(&bytes), Tail { last: Some(last), torn, open_line, signed: false });
        }
        assert_eq!(torn_hash(b"x"), torn_hash(b"x\n"));
        // Only the line break is missing.
        let cut = &whole[..whole.len() - 1];
        assert_eq!(of(cut), Tail { last: Some(last), open_line: true, ..Tail::default() });
        // A line of an older version has a successor but no number.
        let old = b"{\"request\":\"a\"}";
        assert_eq!(of(&[old, &b"\n"[..]].concat()).last, Some(Link { n: 0, hash: hash(old) }));
        // Text that does not begin inside the window does not count as a line.
        assert_eq!(tail_of(&whole[1..whole.len() / 3], false), None);
        assert_eq!(of(b"no line").last, None);
    }

    #[test]
    fn a_long_line_is_found_in_a_larger_window() {
        let mut out = Vec::new();
        let first = Link::default().extend("\"\"", b"{\"event\":\"a\"}", &mut out);
        let long = format!("{{\"event\":\"{}\"}}", "b".repeat(300_000));
        let last = first.extend("\"\"", long.as_bytes(), &mut out);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trail");
        std::fs::write(&path, &out).unwrap();
        assert_eq!(tail(&File::open(&path).unwrap(), out.len() as u64).unwrap().last, Some(last));
    }
}
