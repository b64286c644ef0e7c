//! The file of the trail: opened by its name, checked before each group of lines, and continued at its end.
//!
//! The file under the trail's name counts, not the open descriptor. If the file was deleted, renamed or replaced, this
//! is noticed before any line in it is acknowledged. Only a file that a rotation has just renamed within the folder is
//! still used for a moment, until the new file exists.

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
use super::sink::Sink;
use crate::observe::metrics;
use crate::sys::id::request_id;

/// The event of the first line of a file, or of the first line after a fault.
pub(crate) const EVENT: &str = "trail";

/// How long a renamed file is still used while no file has the trail's name.
const ROTATING: Duration = Duration::from_secs(1);
/// Largest size of the file with the saved position, in bytes.
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
    /// Whether the last line was a checkpoint when the file was opened.
    signed: bool,
    marker: Option<Marker>,
    /// Gets a copy of each line.
    sink: Option<Sink>,
    /// Since when no file has the trail's name, while the renamed one is used.
    renamed: Option<Instant>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Pipes and devices have no end that could be checked.
    is_regular: bool,
    identity: (u64, u64),
    /// End of the file, as far as this process knows.
    end: u64,
    /// Whether the file may end inside a line.
    is_torn: bool,
}

/// The content of the next `trail` line.
#[derive(Debug)]
struct Marker {
    outcome: &'static str,
    torn: Option<Hash>,
    /// Name of the file with the previous line.
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
    /// Opens the file, or creates it with mode 0640.
    pub(super) fn open(path: &Path, sync: bool, node: &str) -> io::Result<Self> {
        let mut trail = Self {
            path: path.to_owned(),
            sync,
            node: Value::from(node).to_string(),
            open: None,
            link: Link::default(),
            signed: false,
            marker: None,
            sink: None,
            renamed: None,
        };
        let lock = trail.lock();
        trail.open_by_name()?;
        drop(lock);
        Ok(trail)
    }

    /// Copies each line to a syslog daemon or the journal.
    pub(super) fn with_sink(self, sink: Option<Sink>) -> Self {
        Self { sink, ..self }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Position of the last line.
    pub(super) fn link(&self) -> Link {
        self.link
    }

    /// Whether there are lines without a checkpoint from before the start.
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

    /// Appends all lines. After an error, none of them counts as written.
    pub(super) fn append(&mut self, bodies: &[Vec<u8>]) -> io::Result<()> {
        let _lock = self.lock();
        let written = self.append_locked(bodies);
        if written.is_err() {
            // Lines that reached the file anyway are part of the chain. So the next group checks the file again.
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
            // Until everything is written, the file may end anywhere.
            open.is_torn = true;
            open.file.write_all(&lines)?;
            if self.sync {
                open.file.sync_data()?;
            }
            open.is_torn = false;
            open.end += lines.len() as u64;
            // If the file was deleted meanwhile, these lines are lost. If a rotation renamed it, they are in it.
            if open.is_regular && open.file.metadata()?.nlink() == 0 {
                self.lose("deleted", None);
                continue;
            }
            self.link = link;
            self.marker = None;
            if let Some(sink) = &mut self.sink {
                sink.send(&lines);
            }
            return Ok(());
        }
    }

    /// Locks the file, because several daemons may share a folder. A user with read access only cannot take this lock.
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

    /// Checks whether the open file is still the trail's.
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

    /// Records that the open file is no longer the trail's.
    fn lose(&mut self, how: &'static str, name: Option<String>) {
        metrics::audit_file_changed(how);
        let (file, line) = (self.path.display(), self.link.n);
        if how == "deleted" {
            tracing::error!(
                %file, line,
                "the audit trail's file was deleted while it was in use: its lines up to this number are lost, but for those in rotated files; a new file begins"
            );
        } else {
            tracing::warn!(%file, line, how, "the audit trail's file was renamed or replaced; the trail continues in the file of that name");
        }
        self.open = None;
        self.renamed = None;
        self.name_previous(name);
    }

    /// Records the name of the file with the previous line, for the first line of the next file.
    fn name_previous(&mut self, name: Option<String>) {
        let own = self.path.file_name().and_then(|own| own.to_str());
        let Some(name) = name.filter(|name| own != Some(name)) else { return };
        match &mut self.marker {
            Some(marker) => marker.previous = Some(name),
            // If the same file continues, nothing is recorded.
            None if self.open.is_none() => {
                self.marker = Some(Marker { outcome: BEGINS, torn: None, previous: Some(name) });
            }
            None => {}
        }
    }

    /// The current name of the open file if it looks like a rotated one: in the same folder, starting with the trail's
    /// name.
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

    /// Finds lines that another daemon has added to the open file, and lines that were removed.
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
                "the audit trail was shortened while it was in use: lines up to this number are missing"
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
            // The file was rotated while no daemon ran: the previous line is in the renamed file.
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
                    "the audit trail ends before a line that was written: lines were removed, or were lost in a power failure"
                );
            }
            (self.link, self.signed) = (known, true);
        }
        // An earlier marker only matters for a new file.
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

/// The reasons for a `trail` line: a file begins, continues after a crash, or lines are missing.
const BEGINS: &str = "file-begins";
const TORN: &str = "torn-line";
const MISSING: &str = "lines-missing";

/// The rotated file with the highest line number, and its end. Compressed files are ignored, because rotation
/// compresses one turn later.
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

/// Number of the last line in the file, or in a file that a rotation renamed. Blocks on the disk.
#[must_use]
pub(crate) fn last_line(path: &Path) -> Option<u64> {
    let own = File::open(path).ok().and_then(|file| {
        let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
        chain::tail(&file, metadata.len()).ok()?.last
    });
    own.or_else(|| newest(path)?.1.last).map(|last| last.n)
}

/// The saved position of the trail.
#[derive(Serialize, Deserialize)]
struct Head {
    n: u64,
    hash: String,
}

fn head_file(path: &Path) -> PathBuf {
    path.with_extension("head")
}

/// Reads the position that [`write_head`] saved.
pub(super) fn read_head(path: &Path) -> Option<Link> {
    let head: Head = serde_json::from_slice(&files::read(&head_file(path), HEAD).ok()?).ok()?;
    let hash = HEXLOWER.decode(head.hash.as_bytes()).ok()?.try_into().ok()?;
    Some(Link { n: head.n, hash })
}

/// Saves the position next to the trail, so that the next start notices if the trail was truncated.
pub(super) fn write_head(path: &Path, link: Link) -> Result<(), files::FileError> {
    let head = serde_json::to_vec(&Head { n: link.n, hash: link.hex() }).unwrap_or_default();
    files::write(&head_file(path), &head, files::Existing::Replace)
}
