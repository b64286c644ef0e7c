//! Sends one request to a running daemon, and reads the answer.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use claviger_hsm::standstill;
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::error::{AdminError, check_length};
use super::line::{Line, read_line};
use super::socket::{COMMAND_TIMEOUT, IDLE_TIMEOUT, REQUEST_LIMIT};
use crate::sys::process;

/// The bit of a socket's mode that lets its group connect: a connection needs the right to write.
const GROUP_WRITES: u32 = 0o020;

/// Longest answer that [`call`] reads, in bytes.
pub const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// Sends a request to the daemon at `path` and returns its reply.
///
/// # Errors
/// [`AdminError`]; its text says what to do. [`AdminError::Refused`] is the daemon's own text.
pub async fn call<T: Serialize + ?Sized>(path: &Path, request: &T) -> Result<Value, AdminError> {
    check_length(path)?;
    let broken = |source| AdminError::Broken { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AdminError::Missing { path: path.to_owned() },
        io::ErrorKind::ConnectionRefused => AdminError::Dead { path: path.to_owned() },
        io::ErrorKind::PermissionDenied => {
            let (owner, group) = allowed(path);
            AdminError::Denied { path: path.to_owned(), owner, group }
        }
        _ => broken(source),
    })?;
    let exchange = async {
        // Compute the length first: the request may contain a private key, and a growing buffer would leave copies
        // behind.
        let mut line = Zeroizing::new(Vec::with_capacity(octets_of(request)));
        serde_json::to_writer(&mut *line, request).map_err(io::Error::other)?;
        line.push(b'\n');
        if line.len() > REQUEST_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the request is too long"));
        }
        stream.write_all(&line).await?;
        let malformed = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        match read_line(&mut BufReader::new(stream), ANSWER_LIMIT).await? {
            Line::Whole(line) => {
                serde_json::from_slice::<Value>(&line).map_err(|_| malformed("its answer is not JSON"))
            }
            Line::TooLong => Err(malformed("its answer is too long")),
            Line::End => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    // Longer than the daemon's own time limit, so that its message arrives.
    let answer = standstill::timeout(COMMAND_TIMEOUT + IDLE_TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(broken)?;
    let Value::Object(mut answer) = answer else {
        return Err(broken(io::Error::new(io::ErrorKind::InvalidData, "its answer is not an object")));
    };
    match (answer.remove("ok"), answer.remove("error")) {
        (Some(value), None) => Ok(value),
        (None, Some(Value::String(error))) => Err(AdminError::Refused(error)),
        _ => Err(broken(io::Error::new(io::ErrorKind::InvalidData, "its answer is neither ok nor error"))),
    }
}

/// Length of a request as a line, in bytes.
fn octets_of<T: Serialize + ?Sized>(request: &T) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            self.0 += octets.len();
            Ok(octets.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(1);
    // Counting cannot fail; a request that cannot be written fails again below.
    let _ = serde_json::to_writer(&mut count, request);
    count.0
}

/// The owner of the socket, or of the folder that hides it; and the group that may use it.
fn allowed(path: &Path) -> (String, Option<String>) {
    let Some(metadata) = path.ancestors().find_map(|path| path.metadata().ok()) else {
        return ("the daemon's user".to_owned(), None);
    };
    let user = process::name_of_user(metadata.uid());
    let owner = user.unwrap_or_else(|| format!("the user with id {}", metadata.uid()));
    let is_for_group = metadata.file_type().is_socket() && metadata.mode() & GROUP_WRITES != 0;
    let group = || process::name_of_group(metadata.gid()).unwrap_or_else(|| metadata.gid().to_string());
    (owner, is_for_group.then(group))
}
