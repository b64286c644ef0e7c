//! The file of the trail: opened by its name, looked after for each group of lines, and continued where it ends.
//!
//! What stands under the trail's name decides, not what is open: a file that was removed, renamed away or replaced is noticed
//! before anything is acknowledged that is written to it. Only a file that a rotation has just renamed, in the same folder, is
//! written to for another moment, until the new one is there.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use claviger_client::files;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chain::{self, Hash, Link};
use super::entry::timestamp;
use crate::observe::metrics;
use crate::sys::id::request_id;

/// The event of a line with which a file begins, or goes on after a fault.
pub const EVENT: &str = "trail";

/// How long a renamed file is written to while there is none under the trail's name.
const ROTATING: Duration = Duration::from_secs(1);
/// Longest file that keeps a link.
const HEAD: usize = 4096;

/// The trail's file.
#[derive(Debug)]
pub(super) struct Trail {
    path: PathBuf,
    sync: bool,
    /// As JSON.
    node: String,
    open: Option<Open>,
    link: Link,
    /// Whether the last line of the file was a checkpoint when it was opened.
    signed: bool,
    marker: Option<Marker>,
    /// Since when there is no file under the name, while the open one is written to.
    renamed: Option<Instant>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Pipes and devices have no end to look at.
    is_regular: bool,
    identity: (u64, u64),
    /// Where it ends, as far as this process knows.
    end: u64,
    /// Whether the file may end in the middle of a line.
    is_torn: bool,
}

/// What the first line says that is written next, besides the records.
#[derive(Debug)]
struct Marker {
    outcome: &'static str,
    torn: Option<Hash>,
    /// The file that has the line before.
    previous: Option<String>,
}

impl Marker {
    fn body(&self, link: Link) -> Vec<u8> {
        let mut line = Map::new();
        line.insert("time".into(), timestamp(SystemTime::now()).unwrap_or_default().into());
        line.insert("request".into(), request_id().into());
        line.insert("event".into(), EVENT.into());
        line.insert("outcome".into(), self.outcome.into());
        line.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        if link.n > 0 {
            line.insert("after".into(), link.n.into());
        }
        line.extend(self.previous.as_ref().map(|name| ("previous_file".into(), name.as_str().into())));
        line.extend(self.torn.map(|torn| ("torn".into(), HEXLOWER.encode(&torn).into())));
        Value::Object(line).to_string().into_bytes()
    }
}

impl Trail {
    /// Opens the file; it is made with mode 0640 where there is none.
    pub(super) fn open(path: &Path, sync: bool, node: &str) -> io::Result<Self> {
        let mut trail = Self {
            path: path.to_owned(),
            sync,
            node: Value::from(node).to_string(),
            open: None,
            link: Link::default(),
            signed: false,
            marker: None,
            renamed: None,
        };
        let lock = trail.lock();
        trail.open_by_name()?;
        drop(lock);
        Ok(trail)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The last line.
    pub(super) fn link(&self) -> Link {
        self.link
    }

    /// Whether the trail was left with lines that no checkpoint covers.
    pub(super) fn is_unsigned(&self) -> bool {
        self.link.n > 0 && !self.signed
    }

    /// Closes the file and opens it by its name again.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        let _lock = self.lock();
        if self.open.is_some() {
            self.catch_up()?;
        }
        let previous = self.name_now();
        self.open = None;
        self.open_by_name()?;
        self.name_previous(previous);
        Ok(())
    }

    /// Appends lines, all or - as far as anybody may rely on it - none of them.
    pub(super) fn append(&mut self, bodies: &[Vec<u8>]) -> io::Result<()> {
        let _lock = self.lock();
        let written = self.append_locked(bodies);
        if written.is_err() {
            // What is in the file all the same is part of the chain. Whatever the file's state is, the next group
            // starts with a fresh look at it.
            if self.open.as_ref().is_some_and(|open| open.is_regular) {
                let _ = self.catch_up();
            }
            self.open = None;
        }
        written
    }

    fn append_locked(&mut self, bodies: &[Vec<u8>]) -> io::Result<()> {
        loop {
            self.be_ready()?;
            let Some(open) = self.open.as_mut() else { return Err(io::Error::other("not open")) };
            let mut lines = Vec::with_capacity(bodies.iter().map(|body| body.len() + 160).sum());
            if open.is_torn {
                lines.push(b'\n');
            }
            let mut link = self.link;
            if let Some(marker) = &self.marker {
                link = link.extend(&self.node, &marker.body(link), &mut lines);
            }
            for body in bodies {
                link = link.extend(&self.node, body, &mut lines);
            }
            // Until all is written, the file may end anywhere.
            open.is_torn = true;
            open.file.write_all(&lines)?;
            if self.sync {
                open.file.sync_data()?;
            }
            open.is_torn = false;
            open.end += lines.len() as u64;
            // Removed meanwhile: these lines are nowhere. Those of a file that a rotation renames are in it.
            if open.is_regular && open.file.metadata()?.nlink() == 0 {
                self.lose("deleted", None);
                continue;
            }
            self.link = link;
            self.marker = None;
            return Ok(());
        }
    }

    /// Several daemons may share a folder: one writes at a time. Whoever may only read the trail cannot take this lock.
    fn lock(&self) -> Option<File> {
        let path = self.path.with_extension("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).ok()?;
        lock.lock().ok().map(|()| lock)
    }

    fn be_ready(&mut self) -> io::Result<()> {
        if self.open.is_some() {
            self.look()?;
        }
        if self.open.is_none() { self.open_by_name() } else { Ok(()) }
    }

    /// Sees whether the open file is still the trail's.
    fn look(&mut self) -> io::Result<()> {
        self.catch_up()?;
        let Some(open) = &self.open else { return Ok(()) };
        let found = match self.path.metadata() {
            Ok(metadata) => Some((metadata.dev(), metadata.ino())),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if found == Some(open.identity) {
            self.renamed = None;
            return Ok(());
        }
        let is_gone = open.is_regular && open.file.metadata()?.nlink() == 0;
        let name = self.name_now();
        if found.is_none() && !is_gone && name.is_some() {
            let since = *self.renamed.get_or_insert_with(Instant::now);
            if since.elapsed() < ROTATING {
                return Ok(());
            }
        }
        let how = match found {
            _ if is_gone => "deleted",
            Some(_) => "replaced",
            None => "renamed",
        };
        self.lose(how, name);
        Ok(())
    }

    /// The open file is not the trail's any more.
    fn lose(&mut self, how: &'static str, name: Option<String>) {
        metrics::audit_file_changed(how);
        let (file, line) = (self.path.display(), self.link.n);
        if how == "deleted" {
            tracing::error!(
                %file, line,
                "the audit trail was deleted while it was written: its lines up to this number are lost, a new file begins"
            );
        } else {
            tracing::warn!(%file, line, how, "another file stands in the audit trail's place; the trail goes on there");
        }
        self.open = None;
        self.renamed = None;
        self.name_previous(name);
    }

    /// Notes which file has the line before, for the first line of the next one.
    fn name_previous(&mut self, name: Option<String>) {
        let own = self.path.file_name().and_then(|own| own.to_str());
        let Some(name) = name.filter(|name| own != Some(name)) else { return };
        match &mut self.marker {
            Some(marker) => marker.previous = Some(name),
            // Of a file that goes on nothing is said.
            None if self.open.is_none() => {
                self.marker = Some(Marker { outcome: BEGINS, torn: None, previous: Some(name) });
            }
            None => {}
        }
    }

    /// The name that the open file has now, if it is one that a rotation gives: in the same folder, beginning with its own.
    fn name_now(&self) -> Option<String> {
        let open = self.open.as_ref().filter(|open| open.is_regular)?;
        let now = std::fs::read_link(format!("/proc/self/fd/{}", open.file.as_raw_fd())).ok()?;
        let own = self.path.file_name()?.to_str()?;
        let name = now.file_name()?.to_str()?.to_owned();
        let folder = std::fs::metadata(files::folder(&self.path)).ok()?;
        let other = std::fs::metadata(files::folder(&now)).ok()?;
        let is_there = std::fs::metadata(&now).is_ok_and(|found| (found.dev(), found.ino()) == open.identity);
        let is_here = (folder.dev(), folder.ino()) == (other.dev(), other.ino());
        (is_there && is_here && name.starts_with(own)).then_some(name)
    }

    /// Learns what was written to the open file by another daemon, or taken from it.
    fn catch_up(&mut self) -> io::Result<()> {
        let Some(open) = self.open.as_mut().filter(|open| open.is_regular) else { return Ok(()) };
        let length = open.file.metadata()?.len();
        if length == open.end && !open.is_torn {
            return Ok(());
        }
        let tail = chain::tail(&open.file, length)?;
        if length < open.end {
            metrics::audit_file_changed("shortened");
            tracing::error!(
                file = %self.path.display(), line = self.link.n,
                "the audit trail was shortened while it was written: lines before this number are missing"
            );
        }
        (open.end, open.is_torn) = (length, tail.open_line);
        if let Some(last) = tail.last.filter(|last| last.n > self.link.n) {
            (self.link, self.signed) = (last, tail.signed);
        }
        if tail.torn.is_some() {
            let marker = self.marker.get_or_insert(Marker { outcome: TORN, torn: None, previous: None });
            marker.torn = tail.torn;
        }
        Ok(())
    }

    fn open_by_name(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).append(true).read(true).mode(0o640).open(&self.path)?;
        let metadata = file.metadata()?;
        let is_regular = metadata.is_file();
        let end = if is_regular { metadata.len() } else { 0 };
        let mut tail = chain::tail(&file, end)?;
        let is_torn = tail.open_line;
        let is_first = self.link == Link::default();
        let is_new = tail.last.is_none();
        let mut previous = None;
        if is_new && is_first && is_regular {
            // Rotated while no daemon ran: the line before is in the file that was renamed.
            if let Some((name, before)) = newest(&self.path) {
                tail = chain::Tail { torn: tail.torn.or(before.torn), ..before };
                previous = Some(name);
            }
        }
        if let Some(last) = tail.last.filter(|last| last.n > self.link.n || is_first) {
            (self.link, self.signed) = (last, tail.signed);
        }
        let known = if is_first { read_head(&self.path) } else { None };
        let is_behind = known.is_some_and(|known| known.n > self.link.n);
        if let Some(known) = known.filter(|_| is_behind) {
            if tail.last.is_some() {
                metrics::audit_file_changed("shortened");
                tracing::error!(
                    file = %self.path.display(), last = self.link.n, known = known.n,
                    "the audit trail ends before a line that was there: lines were removed, or lost with the machine's power"
                );
            }
            (self.link, self.signed) = (known, true);
        }
        // What a former marker knows is of use in a new file only.
        let former = self.marker.take().filter(|_| is_new);
        if is_new || is_behind || tail.torn.is_some() {
            let outcome = match () {
                () if is_behind && tail.last.is_some() => MISSING,
                () if tail.torn.is_some() && !is_new => TORN,
                () => BEGINS,
            };
            let (torn, name) = former.map_or((None, None), |marker| (marker.torn, marker.previous));
            self.marker = Some(Marker { outcome, torn: tail.torn.or(torn), previous: previous.or(name) });
        }
        let identity = (metadata.dev(), metadata.ino());
        self.open = Some(Open { file, is_regular, identity, end, is_torn });
        Ok(())
    }
}

/// What a line of the event `trail` says: a file begins, goes on after what a crash left, or lines before it are missing.
const BEGINS: &str = "file-begins";
const TORN: &str = "torn-line";
const MISSING: &str = "lines-missing";

/// The rotated file with the highest number, and its end. Compressed ones are left out: rotation compresses one turn later.
fn newest(path: &Path) -> Option<(String, chain::Tail)> {
    let own = path.file_name()?.to_str()?;
    let files = std::fs::read_dir(files::folder(path)).ok()?.flatten();
    let ends = files.filter_map(|found| {
        let name = found.file_name().into_string().ok()?;
        let is_other = name.starts_with(own) && name != own;
        let file = is_other.then(|| File::open(found.path()).ok()).flatten()?;
        let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
        let tail = chain::tail(&file, metadata.len()).ok()?;
        tail.last.is_some().then_some((name, tail))
    });
    ends.max_by_key(|(_, tail)| tail.last.map(|last| last.n))
}

/// The number of the last line that is in the file, or in one that a rotation renamed. Blocks on the disk.
#[must_use]
pub fn last_line(path: &Path) -> Option<u64> {
    let own = File::open(path).ok().and_then(|file| {
        let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
        chain::tail(&file, metadata.len()).ok()?.last
    });
    own.or_else(|| newest(path)?.1.last).map(|last| last.n)
}

/// A link that is kept beside the trail: how far it is known to have come.
#[derive(Serialize, Deserialize)]
struct Head {
    n: u64,
    hash: String,
}

fn head_file(path: &Path) -> PathBuf {
    path.with_extension("head")
}

/// The link that [`write_head`] kept.
pub(super) fn read_head(path: &Path) -> Option<Link> {
    let head: Head = serde_json::from_slice(&files::read(&head_file(path), HEAD).ok()?).ok()?;
    let hash = HEXLOWER.decode(head.hash.as_bytes()).ok()?.try_into().ok()?;
    Some(Link { n: head.n, hash })
}

/// Keeps a link beside the trail, so that a trail that was cut is noticed when the daemon starts.
pub(super) fn write_head(path: &Path, link: Link) -> Result<(), files::FileError> {
    let head = serde_json::to_vec(&Head { n: link.n, hash: link.hex() }).unwrap_or_default();
    files::write(&head_file(path), &head, files::Existing::Replace)
}
