//! Verifies a trail: its lines must form a chain, and signatures show up to which line an HSM has signed it.
//!
//! It needs only the files, and for the signatures the certificates that the reader trusts. It stops at the first
//! fault.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::certificate::Certificate;
use data_encoding::{BASE64, HEXLOWER};
use flate2::bufread::MultiGzDecoder;
use serde::Serialize;

use super::chain::{Hash, Links, hash, torn_hash};
use super::{checkpoint, file};

/// Longest line that is read, far above the longest that is written.
const LONGEST: u64 = 16 * 1024 * 1024;
/// Maximum distance between a checkpoint and the line that it signs: other lines are written in the meantime.
const REMEMBERED: usize = 256 * 1024;

/// A fault and its position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Fault {
    /// Name of the file.
    pub file: String,
    /// Line in the file, counted from 1.
    pub line: u64,
    /// The problem.
    pub what: String,
}

/// The last valid checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Signed {
    /// Number of the last line that it covers.
    pub line: u64,
    pub time: String,
    /// Thumbprint of the signer's certificate.
    pub signer: String,
    /// Whether that certificate is one of the given ones.
    pub trusted: bool,
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    /// The files in the order in which they were read.
    pub files: Vec<String>,
    /// Number of the first line of the chain.
    pub first: Option<u64>,
    /// Number of the last line of the chain.
    pub last: Option<u64>,
    /// SHA-256 of the last line.
    pub last_hash: Option<String>,
    /// The machines that wrote it.
    pub nodes: Vec<String>,
    /// Lines before the chain, from a version without one: they are unproven.
    pub unchained: u64,
    /// Number of valid checkpoints, by the thumbprint of the signer.
    pub checkpoints: BTreeMap<String, u64>,
    /// The last valid checkpoint; if certificates were given, of one of them.
    pub signed: Option<Signed>,
    /// Number of records after the line that it covers.
    pub unsigned: u64,
    /// Number of lines that a crash or a full disk left unfinished, and that the trail reports.
    pub torn: u64,
    /// Whether the last file ends with an unfinished line, which the next record will report.
    pub ends_torn: bool,
    /// The first fault.
    pub fault: Option<Fault>,
}

/// The position of the reader.
#[derive(Clone, Debug, Default)]
struct Place {
    file: String,
    line: u64,
}

/// Reads the files of a trail one after the other.
#[derive(Debug, Default)]
pub(crate) struct Verifier {
    trusted: BTreeMap<String, Certificate>,
    /// Certificates that checkpoints contain.
    brought: BTreeMap<String, Certificate>,
    report: Report,
    last: Option<(u64, Hash)>,
    /// The last line before the chain.
    before: Option<Hash>,
    /// An unfinished line that the next line has to report.
    torn: Vec<u8>,
    torn_at: Place,
    /// Hashes of the latest lines, and whether they are records.
    recent: VecDeque<(Hash, bool)>,
}

impl Verifier {
    /// Trusts signatures of these certificates. Without any, a signature only proves that its signer signed.
    #[must_use]
    pub(crate) fn new(trusted: Vec<Certificate>) -> Self {
        let named = |certificate: Certificate| (HEXLOWER.encode(&certificate.thumbprint()), certificate);
        Self { trusted: trusted.into_iter().map(named).collect(), ..Self::default() }
    }

    /// Reads a file that follows the previous one.
    ///
    /// # Errors
    /// The operating system's error. A fault of the trail is not an error; it is in the report.
    pub(crate) fn read(&mut self, name: &str, mut reader: impl BufRead) -> io::Result<()> {
        if self.report.fault.is_some() {
            return Ok(());
        }
        self.report.files.push(name.to_owned());
        let mut place = Place { file: name.to_owned(), line: 0 };
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)?;
            if length == 0 {
                break;
            }
            place.line += 1;
            let checked = if length as u64 == LONGEST && !line.ends_with(b"\n") {
                Err("the line is far too long".to_owned())
            } else {
                self.line(&line, &place)
            };
            if let Err(what) = checked {
                self.fault(&place, what);
                break;
            }
        }
        Ok(())
    }

    /// The result for all files.
    #[must_use]
    pub(crate) fn finish(mut self) -> Report {
        if !self.torn.is_empty() {
            // At the end of the last file, a daemon may be writing, or a crash was the last event.
            if self.torn.ends_with(b"\n") && self.last.is_some() {
                let place = self.torn_at.clone();
                self.fault(&place, "is no record".to_owned());
            }
            self.report.ends_torn = true;
        }
        self.report.last = self.last.map(|(n, _)| n);
        self.report.last_hash = self.last.map(|(_, hash)| HEXLOWER.encode(&hash));
        self.report.unsigned = match &self.report.signed {
            Some(signed) => self.records_after(signed.line),
            None => self.recent.iter().filter(|(_, is_record)| *is_record).count() as u64,
        };
        self.report
    }

    fn fault(&mut self, place: &Place, what: String) {
        if self.report.fault.is_none() {
            self.report.fault = Some(Fault { file: place.file.clone(), line: place.line, what });
        }
    }

    fn line(&mut self, line: &[u8], place: &Place) -> Result<(), String> {
        let body = line.strip_suffix(b"\n").unwrap_or(line);
        let Some(links) = Links::read(body) else {
            if self.torn.is_empty() {
                self.torn_at = place.clone();
            }
            self.torn.extend_from_slice(line);
            return Ok(());
        };
        let Some(n) = links.n else { return self.unchained(body) };
        let own = hash(body);
        let torn_at = if self.torn.is_empty() { place.clone() } else { self.torn_at.clone() };
        if let Err(what) = self.torn(&links) {
            self.fault(&torn_at, what.clone());
            return Err(what);
        }
        self.follows(n, &links)?;
        self.last = Some((n, own));
        self.report.first.get_or_insert(n);
        if let Some(node) = links.node.as_ref().filter(|node| !self.report.nodes.contains(node)) {
            self.report.nodes.push(node.clone());
        }
        let is_checkpoint = links.event.as_deref() == Some(checkpoint::EVENT);
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((own, !is_checkpoint));
        if is_checkpoint { self.checkpoint(n, &links) } else { Ok(()) }
    }

    fn unchained(&mut self, body: &[u8]) -> Result<(), String> {
        if self.last.is_some() {
            return Err("the line has no number: it was not written by this trail".to_owned());
        }
        self.torn.clear();
        self.before = Some(hash(body));
        self.report.unchained += 1;
        Ok(())
    }

    /// The next line has to report an unfinished line.
    fn torn(&mut self, links: &Links) -> Result<(), String> {
        let torn = std::mem::take(&mut self.torn);
        let told = links.torn.as_deref().filter(|_| links.event.as_deref() == Some(file::EVENT));
        // Lines before the chain are not proven anyway, and nothing is known about lines before these files.
        let is_before = self.last.is_none() && (links.n == Some(1) || torn.is_empty());
        if is_before || torn.is_empty() && told.is_none() {
            return Ok(());
        }
        if torn.is_empty() {
            return Err("the trail tells of an unfinished line before this one, and there is none".to_owned());
        }
        if told != Some(HEXLOWER.encode(&torn_hash(&torn)).as_str()) {
            return Err("is no record, and not what the trail tells of".to_owned());
        }
        self.report.torn += 1;
        Ok(())
    }

    fn follows(&self, n: u64, links: &Links) -> Result<(), String> {
        let prev = links.prev.as_deref().unwrap_or_default();
        let Some((last, hash)) = self.last else {
            return match self.before {
                Some(before) if prev != HEXLOWER.encode(&before) => {
                    Err("the chain does not begin after the line before it: that was changed".to_owned())
                }
                _ => Ok(()),
            };
        };
        if n > last + 1 {
            return Err(format!("its number is {n} after {last}: lines are missing before it"));
        }
        if n <= last {
            return Err(format!(
                "its number is {n} after {last}: it was inserted, moved or copied, or another chain begins"
            ));
        }
        if prev != HEXLOWER.encode(&hash) {
            return Err(format!(
                "line {n} of the chain does not follow line {last} as it is here: one of them was changed"
            ));
        }
        Ok(())
    }

    fn checkpoint(&mut self, n: u64, links: &Links) -> Result<(), String> {
        let (Some(line), Some(signed), Some(time), Some(node), Some(signer), Some(signature)) =
            (links.line, &links.hash, &links.time, &links.node, &links.signer, &links.signature)
        else {
            return Err("the checkpoint is not whole".to_owned());
        };
        if line >= n {
            return Err(format!("the checkpoint covers line {line}, which comes after it"));
        }
        match self.recent(line) {
            Some(seen) if *signed != HEXLOWER.encode(&seen) => {
                return Err(format!("the checkpoint signs another line {line} than the one that is here"));
            }
            // A daemon signs lines that are seconds old. A line that can no longer be compared is not proven by the
            // checkpoint.
            None if self.report.first.is_some_and(|first| line >= first) => {
                return Err(format!("the checkpoint covers line {line}, too far back to be compared with it"));
            }
            // The signed line is in an earlier file.
            Some(_) | None => {}
        }
        if let Some(der) = &links.signer_certificate {
            let certificate = BASE64.decode(der.as_bytes()).ok().and_then(|der| Certificate::parse(&der).ok());
            let certificate = certificate.filter(|known| HEXLOWER.encode(&known.thumbprint()) == *signer);
            let certificate = certificate.ok_or("the checkpoint's certificate is not the one that it names")?;
            self.brought.insert(signer.clone(), certificate);
        }
        let trusted = self.trusted.get(signer);
        let Some(certificate) = trusted.or_else(|| self.brought.get(signer)) else {
            return Err(format!("the checkpoint's certificate {signer} is not known; give it"));
        };
        let message = checkpoint::message(node, line, signed, time);
        let signature = BASE64.decode(signature.as_bytes()).map_err(|_| "the checkpoint's signature is not base64")?;
        if certificate.key().verify(SignatureAlgorithm::DEFAULT, &message, &signature).is_err() {
            return Err("the checkpoint's signature is wrong".to_owned());
        }
        *self.report.checkpoints.entry(signer.clone()).or_default() += 1;
        let is_trusted = trusted.is_some();
        // A checkpoint of another signer does not replace a proven one.
        if (is_trusted || self.trusted.is_empty())
            && self.report.signed.as_ref().is_none_or(|known| known.line < line)
            && self.report.first.is_some_and(|first| line >= first)
        {
            let signer = signer.clone();
            self.report.signed = Some(Signed { line, time: time.clone(), signer, trusted: is_trusted });
        }
        Ok(())
    }

    /// The hash of a recent line.
    fn recent(&self, n: u64) -> Option<Hash> {
        let (last, _) = self.last?;
        let back = usize::try_from(last.checked_sub(n)?).ok()?;
        self.recent.get(self.recent.len().checked_sub(back + 1)?).map(|(hash, _)| *hash)
    }

    fn records_after(&self, n: u64) -> u64 {
        let after = self.last.map_or(0, |(last, _)| last.saturating_sub(n));
        let after = usize::try_from(after).unwrap_or(usize::MAX);
        if after > self.recent.len() {
            // The line is older than the remembered ones.
            return after as u64;
        }
        self.recent.iter().rev().take(after).filter(|(_, is_record)| *is_record).count() as u64
    }
}

/// Opens a file of the trail; it may be compressed with gzip.
///
/// # Errors
/// The operating system's error.
pub(crate) fn open(path: &Path) -> io::Result<Box<dyn BufRead>> {
    let mut reader = BufReader::with_capacity(256 * 1024, File::open(path)?);
    let is_compressed = reader.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    Ok(if is_compressed { Box::new(BufReader::new(MultiGzDecoder::new(reader))) } else { Box::new(reader) })
}

/// Number of a file's first line, by which files are sorted. `None` if it has none.
///
/// # Errors
/// The operating system's error.
pub(crate) fn first_number(mut reader: impl BufRead) -> io::Result<Option<u64>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        let body = line.strip_suffix(b"\n").unwrap_or(&line);
        if let Some(n) = Links::read(body).and_then(|links| links.n) {
            return Ok(Some(n));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::observe::audit::chain::Link;
    use crate::observe::audit::checkpoint::Draft;
    use crate::service::testing::{certificate, key};
    use std::time::SystemTime;

    /// A trail with this number of records, and the links of its lines.
    fn trail(records: usize) -> (Vec<u8>, Vec<Link>) {
        let (mut lines, mut link) = (Vec::new(), Link::default());
        let links = (0..records).map(|_| {
            link = link.extend("\"node\"", b"{\"event\":\"release\"}", &mut lines);
            link
        });
        let links = links.collect();
        (lines, links)
    }

    /// The result if a checkpoint follows that covers line `covered`.
    fn report((lines, links): &(Vec<u8>, Vec<Link>), covered: u64, certificate: &Certificate) -> Report {
        let draft = Draft::new(links[covered as usize - 1], covered, "node", SystemTime::now());
        let signature = key().sign(SignatureAlgorithm::DEFAULT, &draft.message()).unwrap();
        let (body, mut trail) = (draft.line("request", certificate, &signature).to_string(), lines.clone());
        links[links.len() - 1].extend("\"node\"", body.as_bytes(), &mut trail);
        let mut verifier = Verifier::new(vec![certificate.clone()]);
        verifier.read("audit.jsonl", &trail[..]).unwrap();
        verifier.finish()
    }

    #[test]
    fn a_checkpoint_covers_a_line_as_far_back_as_is_remembered_and_no_further() {
        let certificate = Certificate::parse(&certificate()).unwrap();
        // The checkpoint itself is remembered as well.
        let records = REMEMBERED + 9;
        let oldest = (records + 2 - REMEMBERED) as u64;
        let trail = trail(records);
        let found = report(&trail, oldest, &certificate);
        assert_eq!((&found.fault, found.last), (&None, Some(records as u64 + 1)), "{found:?}");
        assert_eq!(found.signed.unwrap().line, oldest);
        assert_eq!(found.unsigned, records as u64 - oldest);

        // A line earlier, the signed line can no longer be compared: the result says that it is not proven.
        let found = report(&trail, oldest - 1, &certificate);
        let fault = found.fault.unwrap();
        assert!(fault.what.contains("too far back"), "{fault:?}");
        assert_eq!((found.signed, fault.line), (None, records as u64 + 1));
    }
}
