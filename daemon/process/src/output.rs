//! The standard output and standard error of a command.
//!
//! The standard library's macros panic when the output cannot be written, and its `Stdout` takes a descriptor that is not open
//! for writing for a success. These functions write to the descriptor itself and remember the first error, so that commands
//! print without looking at a result each time; [`finish`] tells at the end. Only a reader that went away (`| head`) is no error.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat, fsync};
use rustix::io::Errno;

/// The standard output does not have all that the command printed.
#[derive(Debug, thiserror::Error)]
#[error("the standard output could not be written: {0}; what was printed is incomplete")]
pub struct OutputError(io::Error);

#[derive(Debug)]
enum State {
    Writing,
    /// The reader went away: nothing more is written, and that is no error.
    Left,
    Failed(io::Error),
}

static STDOUT: Mutex<State> = Mutex::new(State::Writing);

/// Writes all bytes to a descriptor, also to one that does not block: a terminal or pipe shared with a program that set it so.
///
/// # Errors
/// What the operating system says. `EBADF`, too: the standard library forgives it.
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

/// Writes a line to the standard output. An error is kept for [`finish`].
pub fn line(text: &str) {
    bytes(format!("{text}\n").as_bytes());
}

/// Writes bytes to the standard output, as they are. An error is kept for [`finish`].
pub fn bytes(bytes: &[u8]) {
    let mut state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    if !matches!(*state, State::Writing) {
        return;
    }
    *state = match write_all(rustix::stdio::stdout(), bytes) {
        Ok(()) => State::Writing,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => State::Left,
        Err(error) => State::Failed(error),
    };
}

/// Writes a line to the standard error. Where that cannot be written, nothing can be told.
pub fn note(text: &str) {
    let _ = write_all(rustix::stdio::stderr(), format!("{text}\n").as_bytes());
}

/// Whether everything was written. A file is forced to the disk first: a full disk or a quota may show only then.
///
/// # Errors
/// [`OutputError`], with the first error.
pub fn finish() -> Result<(), OutputError> {
    let mut state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    match std::mem::replace(&mut *state, State::Left) {
        State::Failed(error) => Err(OutputError(error)),
        State::Left => Ok(()),
        State::Writing => {
            *state = State::Writing;
            sync(rustix::stdio::stdout()).map_err(OutputError)
        }
    }
}

/// The exit status of a program: `status`, or `unwritten` with a message where the standard output is incomplete.
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
        // A file system that cannot do it has its own way to keep files.
        Ok(()) | Err(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS | Errno::ROFS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Writes a file that is a command's product: it is on the disk when this returns. A device or a pipe is written, too.
///
/// # Errors
/// What the operating system says; the file may be incomplete then.
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
        // The kernel's buffer is full before anybody reads.
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
