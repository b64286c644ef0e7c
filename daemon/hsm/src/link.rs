//! What daemon and worker say to each other, and the two ends of the socket between them.
//!
//! The socket is a pair of type `SOCK_SEQPACKET`: a packet is a frame, whole or not at all. The daemon sends [`Call`]s, the
//! worker [`Report`]s; both are encoded by postcard. A call's id comes back in its reply; the worker answers in any order. The
//! first call is [`Request::Start`]; the worker serves nothing else before it has answered that.
//!
//! Frames carry PINs, private keys and plaintexts: every buffer here is overwritten when it is done with.

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

/// Bytes of the largest frame. Lists of keys are cut into several.
pub(crate) const MAX_FRAME: usize = 64 * 1024;
/// Bytes of the largest request: a frame without the call's id.
pub(crate) const MAX_REQUEST: usize = MAX_FRAME - ID;
/// Bytes of the call's id, little-endian, before its request: the request is encoded once and sent under another id at the
/// next member.
const ID: usize = 4;

/// What the daemon asks for, as it lies in a frame after the call's id.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request<'a> {
    /// The first call: load the module, log in, open the first session. Answered by [`Answer::Done`] or, for the sake of its
    /// details, by [`Report::StartFailed`].
    Start(Start),
    /// From now on this PIN, of this number, is used for logins.
    SetPin(u64, Pin),
    /// `CKM_RSA_PKCS_OAEP`, by the token or with the padding removed in software.
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
    /// So many random bytes.
    Random(u16),
    /// Whether the session lives (`C_GetSessionInfo`).
    Ping,
    /// The private keys: what the session knows, or after a `search` of the token. Answered by one or more [`Answer::Keys`].
    Keys { search: bool },
    /// Makes a key pair on the token.
    Generate(NewKey),
    /// Brings a private key onto the token.
    Import(NewKey, RsaPrivateParts),
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
        }
    }
}

/// What a worker needs to know to serve its token. The module's environment is the process's.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The vendor's library.
    pub(crate) module: PathBuf,
    pub(crate) token: TokenRef,
    pub(crate) pin: Pin,
    /// How many sessions to open, at least one.
    pub(crate) sessions: u32,
    /// An administrator said that the last try of the PIN may be used.
    pub(crate) may_use_final_try: bool,
    /// Comes back when the token refuses the PIN, so that the daemon knows which one was refused.
    pub(crate) pin_number: u64,
}

/// What the worker says.
#[derive(Serialize, Deserialize)]
pub(crate) enum Report<'a> {
    /// The answer to a call.
    Reply {
        id: u32,
        cost: Cost,
        #[serde(borrow)]
        result: Result<Answer<'a>, HsmError>,
    },
    /// The answer to [`Request::Start`] when it went wrong. The worker ends after it.
    StartFailed(Failure),
    /// `C_Login` was called.
    Login,
    /// A session searched the token for its private keys.
    KeySearch,
    /// A session is open, or could not be opened, after so long.
    SessionOpened {
        #[serde(with = "nanoseconds")]
        took: Duration,
        result: Result<(), HsmError>,
    },
    /// A session is closed.
    SessionClosed,
    /// The token gives no more sessions than these for now.
    FewSessions { given: u32 },
    /// Something that an administrator should know.
    Note { level: Level, text: &'a str },
    /// The token refused the PIN of this number. Sent before anything else is said or done, so that no other worker tries it again,
    /// also when this one ends at once.
    PinRefused { number: u64, error: HsmError },
    /// What the process has cost so far: processor time, and bytes of resident memory now. The daemon cannot look for itself where
    /// a service is not shown other processes (systemd's `ProtectProc`).
    Usage {
        #[serde(with = "nanoseconds")]
        processor: Duration,
        resident: u64,
    },
}

/// What PKCS#11 calls took.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// From call to return, without any waiting in the socket.
    #[serde(with = "nanoseconds")]
    pub(crate) took: Duration,
    /// Processor time of the worker's thread: soft tokens work in it.
    #[serde(with = "nanoseconds")]
    pub(crate) processor: Duration,
}

/// Durations as whole nanoseconds: every number that a frame can hold is one that the daemon can add up.
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

/// How loud a note is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Level {
    Info,
    Warn,
    Error,
}

/// A result as it lies in a frame.
#[derive(Serialize, Deserialize)]
pub(crate) enum Answer<'a> {
    Bytes(#[serde(borrow)] &'a [u8]),
    /// A part of a list.
    Keys {
        keys: Vec<TokenKey>,
        more: bool,
    },
    Public(RsaPublic),
    Done,
}

/// A result.
pub(crate) enum Value {
    Bytes(Zeroizing<Vec<u8>>),
    Keys(Vec<TokenKey>),
    Public(RsaPublic),
    Done,
}

/// Encodes without leaving copies behind: the buffer is as large as it has to be from the start.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Zeroizing<Vec<u8>>, HsmError> {
    let len = postcard::experimental::serialized_size(value).map_err(|_| HsmError::UnexpectedReply)?;
    let mut bytes = Zeroizing::new(vec![0; len]);
    postcard::to_slice(value, &mut bytes).map_err(|_| HsmError::UnexpectedReply)?;
    Ok(bytes)
}

/// A call as the worker reads it.
pub(crate) struct Call<'a> {
    pub(crate) id: u32,
    pub(crate) request: Request<'a>,
}

impl<'a> Call<'a> {
    /// `None` when the frame cannot be read.
    pub(crate) fn decode(frame: &'a [u8]) -> Option<Self> {
        let (id, request) = frame.split_first_chunk::<ID>()?;
        Some(Call { id: u32::from_le_bytes(*id), request: postcard::from_bytes(request).ok()? })
    }
}

/// A report as the daemon reads it; `None` when the frame cannot be read.
pub(crate) fn decode_report(frame: &[u8]) -> Option<Report<'_>> {
    postcard::from_bytes(frame).ok()
}

/// Both ends of a new link: the daemon's does not block, the worker's does. Neither survives an `exec`.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (daemon, worker) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&daemon, true)?;
    Ok((daemon, worker))
}

/// The daemon's end. The runtime takes it for a pipe: it is told of what can be read, and not of every frame that the worker
/// takes out.
pub(crate) struct DaemonEnd(pipe::Receiver);

impl DaemonEnd {
    /// Within a tokio runtime.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        pipe::Receiver::from_owned_fd_unchecked(socket).map(DaemonEnd)
    }

    /// Sends an encoded [`Request`] under an id. Does not block: `EAGAIN` while the socket is full.
    pub(crate) fn send(&self, id: u32, request: &[u8]) -> Result<(), Errno> {
        let id = id.to_le_bytes();
        let parts = [io::IoSlice::new(&id), io::IoSlice::new(request)];
        let mut none = rustix::net::SendAncillaryBuffer::default();
        rustix::net::sendmsg(&self.0, &parts, &mut none, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).map(drop)
    }

    /// Reads the next frame; its length, 0 for the end. Calls `idle` when there is none yet, and waits.
    pub(crate) async fn recv(&self, buffer: &mut [u8], mut idle: impl FnMut()) -> io::Result<usize> {
        let mut reset = false;
        loop {
            match self.0.try_read(buffer) {
                // The worker ended before it had read everything. The system says so first, once, and then hands out what the worker
                // had still said.
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

    /// Tells the worker that nothing more comes: it ends when its calls have.
    pub(crate) fn finish(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write);
    }
}

/// The worker's end. All of its threads wait on it.
///
/// A library may close descriptors that are not its own, and what it opens next gets the number of this one. The socket is told
/// from that by its inode, and is `EBADF` then: nothing is sent to a stranger.
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

    /// Reads the next frame; its length, 0 for the end. Calls `idle` when there is none yet, and waits.
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

    /// Blocks while the daemon does not read.
    pub(crate) fn send(&self, report: &Report<'_>) -> io::Result<()> {
        self.send_with(report, SendFlags::NOSIGNAL)
    }

    /// The same for what is not worth waiting for: nothing is sent while the daemon does not read.
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

    /// Waits until the daemon has closed its end, or finished, but no longer than `time`; whether it has. Needs no frame to be
    /// read. A socket that is not ours any more is an error.
    pub(crate) fn ends_within(&self, time: Duration) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        let mut ends = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let polled = poll(&mut ends, Some(&time));
        // The end of another socket is not the daemon's.
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

/// Tells an open file from all others.
fn inode(file: &OwnedFd) -> Result<(u64, u64), Errno> {
    rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
}

/// A buffer for received frames, overwritten after each and at its end.
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

/// Nanoseconds for a frame or a counter, at most what fits.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
