//! A TPM behind a device file or a socket: sends commands and reads responses (TPM 2.0 Part 1, section 18; Part 3).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroize::Zeroizing;

/// Longest time for a response on a socket. A TPM may need many seconds to make a key.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Longest response of a TPM, in bytes.
const LONGEST: usize = 4096;
/// Bytes in the header of a command or response: tag, size, code.
const HEADER: usize = 10;

/// Tags of a command or response without and with authorizations.
const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;

/// Response codes after which the same command is sent again: yielded, retry, testing.
const AGAIN: [u32; 3] = [0x908, 0x922, 0x90a];
/// Number of attempts for these codes.
const TIMES: u32 = 20;
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Reasons why a TPM operation failed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The device cannot be opened, written or read.
    #[error("the TPM at {} cannot be used: {source}", path.display())]
    Device {
        /// The path of the device.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The TPM refused a command.
    #[error("the TPM refused {command} with response code {code:#x}")]
    Refused {
        /// The name of the command.
        command: &'static str,
        /// The response code.
        code: u32,
    },
    /// The data from the TPM or the service cannot be parsed.
    #[error("{0}")]
    Answer(String),
    /// The event log cannot be read.
    #[error("the event log {} cannot be read: {source}", path.display())]
    Log {
        /// The path of the log.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// The connection to the TPM, by the type of the file.
#[derive(Debug)]
enum Connection {
    /// A character device: one read returns one response.
    Device(File),
    /// The socket of a software TPM, such as swtpm.
    Socket(UnixStream),
}

/// An open TPM.
#[derive(Debug)]
pub(super) struct Tpm {
    path: PathBuf,
    connection: Connection,
}

/// The authorization for a handle of a command.
#[derive(Clone, Copy, Debug)]
pub(super) enum Auth {
    /// An empty password.
    Empty,
    /// A policy session whose policy is satisfied.
    Policy(u32),
}

impl Tpm {
    /// Opens a device such as `/dev/tpmrm0`, or connects to the socket of a software TPM.
    pub(super) fn open(path: &Path) -> Result<Self, TpmError> {
        let failed = |source| TpmError::Device { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        let connection = if metadata.file_type().is_socket() {
            let socket = UnixStream::connect(path).map_err(failed)?;
            socket.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
            Connection::Socket(socket)
        } else {
            Connection::Device(OpenOptions::new().read(true).write(true).open(path).map_err(failed)?)
        };
        Ok(Self { path: path.to_owned(), connection })
    }

    /// Runs a command with its handles, authorizations and parameters. Returns the response without its header: handles
    /// and parameters, then the authorizations. A response may hold a credential, so it is zeroised on drop.
    pub(super) fn run(
        &mut self,
        (name, code): (&'static str, u32),
        handles: &[u32],
        auths: &[Auth],
        parameters: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let command = command(code, handles, auths, parameters);
        for _ in 0..TIMES {
            let response = self.transmit(&command).map_err(|source| self.failed(source))?;
            let answer = |text: &str| TpmError::Answer(format!("the TPM's response to {name} {text}"));
            let (header, body) = response.split_first_chunk::<HEADER>().ok_or_else(|| answer("is too short"))?;
            let size = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
            if size as usize != response.len() {
                return Err(answer("has another length than it says"));
            }
            match u32::from_be_bytes([header[6], header[7], header[8], header[9]]) {
                0 => return Ok(Zeroizing::new(body.to_vec())),
                code if AGAIN.contains(&code) => std::thread::sleep(PAUSE),
                code => return Err(TpmError::Refused { command: name, code }),
            }
        }
        Err(TpmError::Answer(format!("the TPM is too busy for {name}")))
    }

    fn failed(&self, source: io::Error) -> TpmError {
        TpmError::Device { path: self.path.clone(), source }
    }

    fn transmit(&mut self, command: &[u8]) -> io::Result<Zeroizing<Vec<u8>>> {
        // The buffer has its full length from the start: a vector that grows leaves its old content in memory.
        let mut response = Zeroizing::new(vec![0; LONGEST]);
        match &mut self.connection {
            Connection::Device(file) => {
                // The kernel accepts a command in one write, and returns a response in one read.
                file.write_all(command)?;
                let length = file.read(&mut response)?;
                response.truncate(length);
                Ok(response)
            }
            Connection::Socket(socket) => {
                socket.write_all(command)?;
                socket.read_exact(&mut response[..HEADER])?;
                let size = u32::from_be_bytes([response[2], response[3], response[4], response[5]]) as usize;
                if !(HEADER..=LONGEST).contains(&size) {
                    return Err(io::Error::other("a response of absurd size"));
                }
                response.truncate(size);
                socket.read_exact(&mut response[HEADER..])?;
                Ok(response)
            }
        }
    }
}

/// Encodes a command.
fn command(code: u32, handles: &[u32], auths: &[Auth], parameters: &[u8]) -> Vec<u8> {
    let tag = if auths.is_empty() { NO_SESSIONS } else { SESSIONS };
    let mut out = Vec::with_capacity(HEADER + 64 + parameters.len());
    out.extend_from_slice(&tag.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&code.to_be_bytes());
    handles.iter().for_each(|handle| out.extend_from_slice(&handle.to_be_bytes()));
    if !auths.is_empty() {
        // Handle, empty nonce, attributes, empty HMAC: 9 bytes for each authorization.
        out.extend_from_slice(&(9 * auths.len() as u32).to_be_bytes());
        for auth in auths {
            let session = match auth {
                Auth::Empty => 0x4000_0009,
                Auth::Policy(session) => *session,
            };
            out.extend_from_slice(&session.to_be_bytes());
            out.extend_from_slice(&[0; 5]);
        }
    }
    out.extend_from_slice(parameters);
    let size = (out.len() as u32).to_be_bytes();
    out[2..6].copy_from_slice(&size);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_its_authorizations_between_handles_and_parameters() {
        assert_eq!(command(0x165, &[], &[], &[1, 2, 3, 4]), [0x80, 1, 0, 0, 0, 14, 0, 0, 1, 0x65, 1, 2, 3, 4]);
        let with = command(0x147, &[0x8000_0001], &[Auth::Empty, Auth::Policy(0x0300_0000)], &[9]);
        let expected = [
            &[0x80, 2, 0, 0, 0, 37, 0, 0, 1, 0x47, 0x80, 0, 0, 1, 0, 0, 0, 18][..],
            &[0x40, 0, 0, 9, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 9],
        ];
        assert_eq!(with, expected.concat());
    }
}
