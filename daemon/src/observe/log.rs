//! The daemon's log, written by a thread of its own.
//!
//! The log goes to the standard error, which is most often a pipe. Its reader may stand still: a frozen journal, a container's
//! log driver, a terminal after Ctrl-S. A thread that writes to it then hangs, and with it whatever it serves. So threads that
//! serve put their lines into a queue, which is bounded: lines that do not fit are dropped and counted.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use claviger_process::lock::{lock, unpoisoned};
use claviger_process::output::write_all;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::observe::metrics;

/// Most bytes that wait for the reader: some two thousand lines.
const ROOM: usize = 256 * 1024;
/// How long the last lines have before the process ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Lines on their way to the reader of the log.
#[derive(Debug, Default)]
pub struct LogQueue {
    state: Mutex<State>,
    /// There are lines for the writer.
    arrived: Condvar,
    /// The writer has written what it took.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The writer has lines that it took.
    writing: bool,
    /// Lines dropped since the reader was last told.
    untold: u64,
    /// A flush was in vain, and nothing was written since.
    stalled: bool,
}

impl LogQueue {
    /// Starts the thread that writes to the standard error.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start() -> io::Result<Arc<Self>> {
        Self::start_writing(|lines| write_all(rustix::stdio::stderr(), lines))
    }

    fn start_writing(write: impl Fn(&[u8]) -> io::Result<()> + Send + 'static) -> io::Result<Arc<Self>> {
        let queue = Arc::new(Self::default());
        let of = Arc::clone(&queue);
        // It lives as long as the process.
        std::thread::Builder::new().name("log".to_owned()).spawn(move || of.run(&write))?;
        Ok(queue)
    }

    /// Adds a line, which ends with a line break, if there is room. Never blocks on the reader.
    pub fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + line.len() > ROOM {
            state.untold += 1;
            drop(state);
            self.count_dropped(1);
            return;
        }
        state.waiting.extend_from_slice(line);
        drop(state);
        self.arrived.notify_one();
    }

    /// Lines that were dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all lines are written, for a moment at most. Whether they are. To be called before the process ends.
    pub fn flush(&self) -> bool {
        self.flush_within(LAST_LINES)
    }

    /// The same, but where the reader was found to stand still, nobody waits for it again until it has read something.
    fn flush_unless_stalled(&self, patience: Duration) {
        if !self.state().stalled && !self.flush_within(patience) {
            self.state().stalled = true;
        }
    }

    fn flush_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.state();
        while state.writing || !state.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = unpoisoned(self.written.wait_timeout(state, left)).0;
        }
        true
    }

    fn run(&self, write: &impl Fn(&[u8]) -> io::Result<()>) {
        let mut lines = Vec::new();
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() {
                state = unpoisoned(self.arrived.wait(state));
            }
            lines.clear();
            // One burst of lines must not hold its memory for ever.
            lines.shrink_to(64 * 1024);
            std::mem::swap(&mut lines, &mut state.waiting);
            state.writing = true;
            drop(state);
            // Blocks for as long as the reader stands still.
            let result = write(&lines);
            if result.is_err() {
                // How many of them arrived is not known.
                self.count_dropped(lines.iter().filter(|byte| **byte == b'\n').count() as u64);
            }
            let mut state = self.state();
            state.writing = false;
            state.stalled = false;
            let untold = if result.is_ok() { std::mem::take(&mut state.untold) } else { 0 };
            drop(state);
            self.written.notify_all();
            if untold > 0 {
                tracing::warn!(dropped = untold, "log lines were dropped because nothing read the log");
            }
        }
    }

    fn count_dropped(&self, lines: u64) {
        self.dropped.fetch_add(lines, Ordering::Relaxed);
        metrics::log_lines_dropped(lines);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// tracing-subscriber writes each line with one call.
impl Write for &LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the standard error is a stream of systemd's journal (`JOURNAL_STREAM`, systemd.exec(5)).
#[must_use]
pub fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM").and_then(|stream| stream.into_string().ok()) else {
        return false;
    };
    let own = rustix::fs::fstat(rustix::stdio::stderr());
    own.is_ok_and(|own| stream == format!("{}:{}", own.st_dev, own.st_ino))
}

/// Precedes each line with its priority, as the journal reads it (sd-daemon(3)), so that `journalctl -p warning` works.
#[derive(Clone, Debug)]
pub struct WithPriority<W>(pub W);

/// A writer for the lines of one event.
#[derive(Debug)]
pub struct Prioritised<W> {
    priority: &'static [u8],
    writer: W,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for WithPriority<W> {
    type Writer = Prioritised<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Prioritised { priority: priority(&Level::INFO), writer: self.0.make_writer() }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        Prioritised { priority: priority(event.level()), writer: self.0.make_writer_for(event) }
    }
}

/// The beginning of a line of this level.
#[must_use]
pub fn priority(level: &Level) -> &'static [u8] {
    match *level {
        Level::ERROR => b"<3>",
        Level::WARN => b"<4>",
        Level::INFO => b"<6>",
        _ => b"<7>",
    }
}

impl<W: Write> Write for Prioritised<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut out = Vec::with_capacity(lines.len() + self.priority.len());
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            out.extend_from_slice(self.priority);
            out.extend_from_slice(line);
        }
        // With one call, as the queue wants it.
        self.writer.write_all(&out)?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Makes panics lines of the log. The standard library's own hook writes to the standard error itself, and would hang the thread
/// that panics, with its lock held, where the reader stands still.
pub fn log_panics(queue: Arc<LogQueue>) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let message = panic.payload_as_str().unwrap_or("a value that is no text");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::capture();
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            tracing::error!(thread, message, place, %backtrace, "a thread panicked");
        } else {
            tracing::error!(thread, message, place, "a thread panicked");
        }
        // The process may abort as soon as this returns: where unwinding is not possible.
        queue.flush_unless_stalled(LAST_LINES);
    }));
}

/// A writer to the standard output for what a daemon announces: its reader may stand still, too, and it is not what the daemon is
/// for, so that it may as well be missing. It has its thread from the start on, when nothing else has taken the last one.
pub struct Announcer(Option<mpsc::Sender<Vec<String>>>);

impl Announcer {
    /// Starts the thread.
    #[must_use]
    pub fn start() -> Self {
        let (announcer, announced) = mpsc::channel::<Vec<String>>();
        let print = move || {
            if let Ok(lines) = announced.recv() {
                print(rustix::stdio::stdout(), &lines);
            }
        };
        match std::thread::Builder::new().name("stdout".to_owned()).spawn(print) {
            Ok(_) => Announcer(Some(announcer)),
            Err(error) => {
                tracing::warn!(%error, "no thread can be started that writes to standard output");
                Announcer(None)
            }
        }
    }

    /// Has these lines written, without waiting for that.
    pub fn announce(self, lines: Vec<String>) {
        if let Some(thread) = self.0 {
            let _ = thread.send(lines);
        }
    }
}

fn print(stdout: BorrowedFd<'_>, lines: &[String]) {
    let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    if let Err(error) = write_all(stdout, text.as_bytes()) {
        tracing::warn!(%error, "the standard output cannot be written: {}", lines.join(", "));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// More than any machine needs. A test waits so long only when it fails.
    const LONG: Duration = Duration::from_secs(60);

    /// A queue whose writer tells what it took, and then blocks until it gets a result. It blocks no more once the sender of results
    /// is dropped.
    fn queue() -> (Arc<LogQueue>, Sender<io::Result<()>>, Receiver<Vec<u8>>) {
        let (go, going) = channel();
        let (tell, told) = channel();
        let write = move |lines: &[u8]| {
            let _ = tell.send(lines.to_vec());
            going.recv().unwrap_or(Ok(()))
        };
        (LogQueue::start_writing(write).unwrap(), go, told)
    }

    #[test]
    fn a_reader_that_stands_still_costs_lines_and_nothing_else() {
        let (queue, go, told) = queue();
        queue.push(b"first\n");
        assert_eq!(told.recv_timeout(LONG).unwrap(), b"first\n");
        // The writer is blocked, so all room is free, and stays taken.
        let line = [b'x'; 1023].iter().chain(b"\n").copied().collect::<Vec<_>>();
        let lines = ROOM / line.len();
        (0..lines + 10).for_each(|_| queue.push(&line));
        assert_eq!(queue.dropped(), 10);
        assert!(!queue.flush_within(Duration::from_millis(10)));
        // The reader reads again.
        drop(go);
        assert!(queue.flush_within(LONG));
        assert_eq!(told.try_iter().flatten().collect::<Vec<u8>>(), line.repeat(lines));
        assert_eq!(queue.state().untold, 0, "it was told how many are missing");
        queue.push(b"again\n");
        assert!(queue.flush_within(LONG));
        assert_eq!(told.try_iter().last().unwrap(), b"again\n");
    }

    #[test]
    fn nobody_waits_twice_for_a_reader_that_stands_still() {
        let (queue, go, _told) = queue();
        queue.push(b"line\n");
        queue.flush_unless_stalled(Duration::from_millis(1));
        assert!(queue.state().stalled);
        // Would not return.
        queue.flush_unless_stalled(Duration::from_hours(1_000));
        drop(go);
        assert!(queue.flush_within(LONG));
        assert!(!queue.state().stalled);
    }

    #[test]
    fn each_line_of_an_event_has_its_priority_for_the_journal() {
        let mut written = Vec::new();
        let mut writer = Prioritised { priority: priority(&Level::WARN), writer: &mut written };
        writer.write_all(b"one\ntwo\n").unwrap();
        assert_eq!(written, b"<4>one\n<4>two\n");
        assert_eq!((priority(&Level::ERROR), priority(&Level::TRACE)), (&b"<3>"[..], &b"<7>"[..]));
        assert!(!is_journal(), "the standard error of a test is no stream of the journal");
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted() {
        let (queue, go, told) = queue();
        go.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        queue.push(b"one\ntwo\n");
        assert!(queue.flush_within(LONG));
        assert_eq!(queue.dropped(), 2);
        drop(go);
        queue.push(b"three\n");
        assert!(queue.flush_within(LONG));
        assert_eq!(told.try_iter().last().unwrap(), b"three\n");
    }
}
