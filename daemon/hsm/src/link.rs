//! The frames between daemon and worker, and the two ends of the socket between them.
//!
//! The socket is a pair of type `SOCK_SEQPACKET`: one packet is one frame, delivered whole or not at all. The daemon sends
//! [`Call`]s, the worker [`Report`]s; postcard encodes both. A reply carries the id of its call; the worker answers in any
//! order. The first call is [`Request::Start`]; the worker serves no other call until it has answered that one.
//!
//! Frames carry PINs, private keys and plaintexts, so every buffer in this module is overwritten after use.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use tokio::net::unix::pipe;
use zeroize::{Zeroize, Zeroizing};

use crate::config::{Pin, TokenRef};
use crate::error::{Failure, HsmError};
use crate::identity::Fingerprint;
use crate::keys::{NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme, TokenKey};
use crate::operation::Operation;

/// Maximum length of a frame in bytes. Longer lists of keys are split into several frames.
pub(crate) const MAX_FRAME: usize = 64 * 1024;
/// Maximum length of a request in bytes: a frame without the call's id.
pub(crate) const MAX_REQUEST: usize = MAX_FRAME - ID;
/// Length in bytes of the call's id, which precedes its request, little-endian. The id is separate so that a request is
/// encoded once and can be sent to another member under another id.
const ID: usize = 4;

/// A request of the daemon. In a frame it follows the call's id.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request<'a> {
    /// The first call: load the module, log in, open the first session. The answer is [`Answer::Done`] or, because of its
    /// details, [`Report::StartFailed`].
    Start(Start),
    /// Sets the PIN for logins from now on, and its number.
    SetPin(u64, Pin),
    /// Decrypts with `CKM_RSA_PKCS_OAEP`; or with the bare RSA operation, after which software removes the padding.
    Decrypt {
        #[serde(borrow)]
        id: &'a [u8],
        public: Fingerprint,
        oaep: Oaep,
        ciphertext: &'a [u8],
    },
    /// Signs a digest.
    Sign {
        #[serde(borrow)]
        id: &'a [u8],
        public: Fingerprint,
        scheme: SignScheme,
        digest: &'a [u8],
    },
    /// Returns this number of random bytes.
    Random(u16),
    /// Checks that the session is alive (`C_GetSessionInfo`).
    Ping,
    /// Lists the private keys that the session knows; with `search`, searches the token first. The answer is one or more
    /// [`Answer::Keys`].
    Keys { search: bool },
    /// Generates a key pair on the token.
    Generate(NewKey),
    /// Imports a private key into the token.
    Import(NewKey, RsaPrivateParts),
    /// Destroys the private key with this id and public key, and its public key objects.
    Destroy {
        #[serde(borrow)]
        id: &'a [u8],
        public: Fingerprint,
    },
}

impl Request<'_> {
    pub(crate) fn operation(&self) -> Operation {
        match self {
            Request::Start(_) | Request::SetPin(..) => Operation::Open,
            Request::Decrypt { .. } => Operation::Decrypt,
            Request::Sign { .. } => Operation::Sign,
            Request::Random(_) => Operation::Random,
            Request::Ping => Operation::Probe,
            Request::Keys { .. } => Operation::Keys,
            Request::Generate(_) => Operation::Generate,
            Request::Import(..) => Operation::Import,
            Request::Destroy { .. } => Operation::Destroy,
        }
    }
}

/// Settings that a worker needs to serve its token. The module's environment is that of the process.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Path of the vendor's library.
    pub(crate) module: PathBuf,
    pub(crate) token: TokenRef,
    pub(crate) pin: Pin,
    /// Number of sessions to open, at least 1.
    pub(crate) sessions: u32,
    /// True if an administrator allows use of the last PIN try.
    pub(crate) may_use_final_try: bool,
    /// Number of the PIN. It is sent back when the token refuses the PIN, so that the daemon knows which PIN was refused.
    pub(crate) pin_number: u64,
}

/// A message of the worker.
#[derive(Serialize, Deserialize)]
pub(crate) enum Report<'a> {
    /// The answer to a call.
    Reply {
        id: u32,
        cost: Cost,
        #[serde(borrow)]
        result: Result<Answer<'a>, HsmError>,
    },
    /// The answer to [`Request::Start`] if the start failed. The worker then ends.
    StartFailed(Failure),
    /// `C_Login` was called.
    Login,
    /// A session searched the token for its private keys.
    KeySearch,
    /// A session was opened or could not be opened; `took` is the time of the attempt.
    SessionOpened {
        #[serde(with = "nanoseconds")]
        took: Duration,
        result: Result<(), HsmError>,
    },
    /// A session is closed.
    SessionClosed,
    /// The token currently grants no more than `given` sessions.
    FewSessions { given: u32 },
    /// Information for an administrator.
    Note { level: Level, text: &'a str },
    /// The token refused the PIN of this number. The worker sends this before any other report, so that no other worker
    /// tries the PIN again even if this worker ends at once.
    PinRefused { number: u64, error: HsmError },
    /// Cost of the process so far: processor time, and resident memory in bytes. The daemon cannot read these figures
    /// itself where a service cannot see other processes (systemd's `ProtectProc`).
    Usage {
        #[serde(with = "nanoseconds")]
        processor: Duration,
        resident: u64,
    },
}

/// Time that PKCS#11 calls took.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Time from call to return, without waiting in the socket.
    #[serde(with = "nanoseconds")]
    pub(crate) took: Duration,
    /// Processor time of the worker's thread. Software tokens compute in that thread.
    #[serde(with = "nanoseconds")]
    pub(crate) processor: Duration,
}

/// Encodes durations as whole nanoseconds, so that the daemon can add up every number that a frame can hold.
mod nanoseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(super::nanos(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_nanos)
    }
}

/// Severity of a note.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Level {
    Info,
    Warn,
    Error,
}

/// A result inside a frame.
#[derive(Serialize, Deserialize)]
pub(crate) enum Answer<'a> {
    Bytes(#[serde(borrow)] &'a [u8]),
    /// One part of a list.
    Keys {
        keys: Vec<TokenKey>,
        more: bool,
    },
    Public(RsaPublic),
    Done,
}

/// A result, as the daemon and the session own it.
pub(crate) enum Value {
    Bytes(Zeroizing<Vec<u8>>),
    Keys(Vec<TokenKey>),
    Public(RsaPublic),
    Done,
}

/// Encodes a value without leaving copies in memory: the buffer has its final size from the start.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Zeroizing<Vec<u8>>, HsmError> {
    let len = postcard::experimental::serialized_size(value).map_err(|_| HsmError::UnexpectedReply)?;
    let mut bytes = Zeroizing::new(vec![0; len]);
    postcard::to_slice(value, &mut bytes).map_err(|_| HsmError::UnexpectedReply)?;
    Ok(bytes)
}

/// A call as the worker decodes it.
pub(crate) struct Call<'a> {
    pub(crate) id: u32,
    pub(crate) request: Request<'a>,
}

impl<'a> Call<'a> {
    /// Decodes a frame; `None` if the frame is invalid.
    pub(crate) fn decode(frame: &'a [u8]) -> Option<Self> {
        let (id, request) = frame.split_first_chunk::<ID>()?;
        Some(Call { id: u32::from_le_bytes(*id), request: postcard::from_bytes(request).ok()? })
    }
}

/// Decodes a report; `None` if the frame is invalid.
pub(crate) fn decode_report(frame: &[u8]) -> Option<Report<'_>> {
    postcard::from_bytes(frame).ok()
}

/// Creates both ends of a new link. The daemon's end does not block; the worker's end does. `exec` closes both.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (daemon, worker) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&daemon, true)?;
    Ok((daemon, worker))
}

/// The daemon's end. The runtime treats it as a pipe: it wakes the reader for frames that can be read, not for each frame
/// that the worker takes out.
pub(crate) struct DaemonEnd(pipe::Receiver);

impl DaemonEnd {
    /// Registers the socket with the current tokio runtime, which must exist.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        pipe::Receiver::from_owned_fd_unchecked(socket).map(DaemonEnd)
    }

    /// Sends an encoded [`Request`] under an id. Does not block; the error is `EAGAIN` while the socket is full.
    pub(crate) fn send(&self, id: u32, request: &[u8]) -> Result<(), Errno> {
        let id = id.to_le_bytes();
        let parts = [io::IoSlice::new(&id), io::IoSlice::new(request)];
        let mut none = rustix::net::SendAncillaryBuffer::default();
        rustix::net::sendmsg(&self.0, &parts, &mut none, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).map(drop)
    }

    /// Reads the next frame and returns its length, 0 at the end. If no frame is there yet, calls `idle` and waits.
    pub(crate) async fn recv(&self, buffer: &mut [u8], mut idle: impl FnMut()) -> io::Result<usize> {
        let mut reset = false;
        loop {
            match self.0.try_read(buffer) {
                // The worker ended before it had read everything. The system reports this once, first, and then delivers
                // the frames that the worker had sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !reset => reset = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    idle();
                    self.0.readable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Tells the worker that no more calls follow. The worker ends when it has answered its calls.
    pub(crate) fn finish(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write);
    }
}

/// The worker's end. All threads of the worker wait on it.
///
/// A library may close descriptors that do not belong to it, and a file that it opens next gets the same number. The inode
/// distinguishes the socket from such a file. If it differs, every call fails with `EBADF`, so that nothing is sent
/// elsewhere.
pub(crate) struct WorkerEnd {
    socket: OwnedFd,
    inode: (u64, u64),
}

impl WorkerEnd {
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let inode = inode(&socket)?;
        Ok(WorkerEnd { socket, inode })
    }

    fn expect_ours(&self) -> Result<(), Errno> {
        if inode(&self.socket)? == self.inode { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Reads the next frame and returns its length, 0 at the end. If no frame is there yet, calls `idle` and waits.
    pub(crate) fn recv(&self, buffer: &mut [u8], idle: impl FnOnce()) -> io::Result<usize> {
        match self.recv_with(buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                idle();
                Ok(self.recv_with(buffer, RecvFlags::empty())?)
            }
            result => Ok(result?),
        }
    }

    fn recv_with(&self, buffer: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
        loop {
            match rustix::net::recv(&self.socket, &mut *buffer, flags) {
                Err(Errno::INTR) => {}
                result => return result.map(|(len, _)| len),
            }
        }
    }

    /// Sends a report. Blocks while the socket is full because the daemon does not read.
    pub(crate) fn send(&self, report: &Report<'_>) -> io::Result<()> {
        self.send_with(report, SendFlags::NOSIGNAL)
    }

    /// Sends a report that is not worth waiting for: it is dropped while the socket is full.
    pub(crate) fn try_send(&self, report: &Report<'_>) -> io::Result<()> {
        match self.send_with(report, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn send_with(&self, report: &Report<'_>, flags: SendFlags) -> io::Result<()> {
        let bytes = encode(report).map_err(io::Error::other)?;
        self.expect_ours()?;
        loop {
            match rustix::net::send(&self.socket, &bytes, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits at most `time` for the daemon to close its end or to finish, and returns true if it did. Works without reading
    /// a frame. Returns an error if the descriptor is not the socket any more.
    pub(crate) fn ends_within(&self, time: Duration) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        let mut ends = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let polled = poll(&mut ends, Some(&time));
        // The end of another socket is not the daemon's end.
        self.expect_ours()?;
        match polled {
            Ok(_) => Ok(!ends[0].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for WorkerEnd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns the device and inode, which identify an open file.
fn inode(file: &OwnedFd) -> Result<(u64, u64), Errno> {
    rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
}

/// A buffer for received frames. It is overwritten after each frame and when it is dropped.
pub(crate) struct FrameBuffer(Zeroizing<Vec<u8>>);

impl FrameBuffer {
    pub(crate) fn new() -> Self {
        FrameBuffer(Zeroizing::new(vec![0; MAX_FRAME]))
    }

    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.0
    }

    pub(crate) fn frame(&self, len: usize) -> &[u8] {
        self.0.get(..len).unwrap_or_default()
    }

    pub(crate) fn wipe(&mut self, len: usize) {
        if let Some(used) = self.0.get_mut(..len) {
            used.zeroize();
        }
    }
}

/// Converts a duration to nanoseconds for a frame or counter, limited to `u64::MAX`.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
