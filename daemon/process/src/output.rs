//! The standard output and standard error of a command.
//!
//! The macros of the standard library panic when the output cannot be written. Its `Stdout` reports success for a
//! descriptor that is not open for writing. The functions here write to the descriptor itself and remember the first
//! error, so commands print without checking a result each time; [`finish`] returns the error at the end. A reader that
//! closed the pipe (`| head`) is not an error.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;

use crate::lock::lock;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat, fsync};
use rustix::io::Errno;

/// The standard output is incomplete: some of the text could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the standard output could not be written: {0}; what was printed is incomplete")]
pub struct OutputError(io::Error);

#[derive(Debug)]
enum State {
    Writing,
    /// The reader has closed the pipe. Nothing more is written, and this is not an error.
    Left,
    Failed(io::Error),
}

static STDOUT: Mutex<State> = Mutex::new(State::Writing);

/// Writes all bytes to a descriptor. The descriptor may be non-blocking, for example a terminal or pipe that is shared
/// with a program that made it so.
///
/// # Errors
/// The error of the operating system. This includes `EBADF`, which the standard library ignores.
pub fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&to, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes a line to the standard output. [`finish`] reports an error.
pub fn line(text: &str) {
    bytes(format!("{text}\n").as_bytes());
}

/// Writes bytes to the standard output. [`finish`] reports an error.
pub fn bytes(bytes: &[u8]) {
    let mut state = lock(&STDOUT);
    if !matches!(*state, State::Writing) {
        return;
    }
    *state = match write_all(rustix::stdio::stdout(), bytes) {
        Ok(()) => State::Writing,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => State::Left,
        Err(error) => State::Failed(error),
    };
}

/// Writes a line to the standard error. An error is ignored, because there is no place left to report it.
pub fn note(text: &str) {
    let _ = write_all(rustix::stdio::stderr(), format!("{text}\n").as_bytes());
}

/// Checks that all output was written. Syncs a file to the disk first, because a full disk or a quota may be reported
/// only then.
///
/// # Errors
/// [`OutputError`], with the first error.
pub fn finish() -> Result<(), OutputError> {
    let mut state = lock(&STDOUT);
    match std::mem::replace(&mut *state, State::Left) {
        State::Failed(error) => Err(OutputError(error)),
        State::Left => Ok(()),
        State::Writing => {
            *state = State::Writing;
            sync(rustix::stdio::stdout()).map_err(OutputError)
        }
    }
}

/// Returns the exit status of a program: `status`, or `unwritten` (with a message) if the standard output is
/// incomplete.
#[must_use]
pub fn exit_status(program: &str, status: ExitCode, unwritten: u8) -> ExitCode {
    match finish() {
        Ok(()) => status,
        Err(error) => {
            note(&format!("{program}: {error}"));
            ExitCode::from(unwritten)
        }
    }
}

fn sync(file: BorrowedFd<'_>) -> io::Result<()> {
    if !fstat(file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile) {
        return Ok(());
    }
    match fsync(file) {
        // Not every file system supports this call. Such a file system keeps files safe in its own way.
        Ok(()) | Err(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS | Errno::ROFS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Writes a file that a command produces. The file is on the disk when this function returns. The path may also be a
/// device or a pipe.
///
/// # Errors
/// The error of the operating system. The file may be incomplete then.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    sync(file.as_fd())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::Duration;

    #[test]
    fn a_descriptor_that_does_not_block_gets_everything() {
        let (mut reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let bytes = vec![7; 4 * 1024 * 1024];
        let expected = bytes.len();
        let writing = std::thread::spawn(move || write_all(writer.as_fd(), &bytes).unwrap());
        // The sleep lets the kernel's buffer fill up before the first read.
        std::thread::sleep(Duration::from_millis(50));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        writing.join().unwrap();
        assert_eq!(read.len(), expected);
    }

    #[test]
    fn a_descriptor_that_is_not_open_for_writing_is_an_error() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(write_all(file.as_fd(), b"x").unwrap_err().raw_os_error(), Some(Errno::BADF.raw_os_error()));
    }

    #[test]
    fn a_file_is_written_or_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_file(&path, b"whole").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        write_file(Path::new("/dev/null"), b"x").unwrap();
        let error = write_file(Path::new("/dev/full"), b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
