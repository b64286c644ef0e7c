//! The administrators' socket, through which commands like `claviger hosts …` reach the running daemon.
//!
//! A Unix stream socket in the state folder. A request is one JSON object on a line, `{"command": "hosts.list", …}`;
//! so is the reply: `{"ok": …}` or `{"error": "…"}`. A connection carries any number of requests, one after the
//! other. Only root and the daemon's own user may connect; the file's mode and the peer's credentials from the kernel
//! ensure this. If a group is configured, only the file's mode admits its members, because the kernel reports just
//! one of a peer's groups.
//!
//! There are two sockets: `admin.sock` for all commands, and `review.sock` for commands that change nothing.

use std::convert::Infallible;
use std::fs::{File, OpenOptions, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use super::error::{AdminError, check_length};
use super::line::{Line, read_line};
use crate::observe::audit::Peer;
use crate::sys::places::{Guest, Places};

/// Longest request, in bytes, with its line break. An import of some ten thousand hosts is the longest there is.
pub const REQUEST_LIMIT: usize = 16 * 1024 * 1024;

/// The same for read-only requests, which are short.
pub const REVIEW_LIMIT: usize = 64 * 1024;

/// How long a connection may be silent between requests, and time limit for writing a reply.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an administrator waits for a command; the command continues after that. An HSM may need two minutes for a
/// key, an imported key is written to one member after the other, and then all members must show it.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);

/// Time limit for commands in progress when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections. For another one, the connection of the user with the most connections that has been silent
/// longest is closed.
const MAX_CONNECTIONS: usize = 64;

/// The socket of a running daemon. While it exists, no other daemon can bind the same path.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    name: SocketName,
    /// Whether every user who can connect is allowed.
    for_group: bool,
    /// Longest request, in bytes, with its line break.
    longest: usize,
    /// Time limit for a command's reply.
    patience: Duration,
}

/// The socket's file. It is removed on drop, so that a daemon that fails during its start leaves no file behind.
#[derive(Debug)]
struct SocketName {
    path: PathBuf,
    /// Locked while it is open. The file is never removed, because that would race with the next daemon.
    _lock: File,
}

impl Drop for SocketName {
    fn drop(&mut self) {
        // The lock is still held.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AdminSocket {
    /// Creates the socket with mode 0600, or 0660 for a group, and replaces one that a dead daemon left. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// [`AdminError::Taken`] if a daemon is using this path; [`AdminError::PathTooLong`], [`AdminError::NotASocket`],
    /// [`AdminError::Bind`].
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Self, AdminError> {
        check_length(path)?;
        let failed = |source| AdminError::Bind { path: path.to_owned(), source };
        let taken = || AdminError::Taken { path: path.to_owned() };
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock_file(path));
        let lock = lock.map_err(failed)?;
        // The lock ends with its process, even if the socket's file stays.
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(taken()),
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
        match path.symlink_metadata() {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(AdminError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(taken());
                }
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::os::unix::fs::chown(path, None, group).map_err(failed)?;
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)?;
        // Any user may have connected before the mode was set.
        listener.set_nonblocking(true).map_err(failed)?;
        while listener.accept().is_ok() {}
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self {
            listener,
            name: SocketName { path: path.to_owned(), _lock: lock },
            for_group: group.is_some(),
            longest: REQUEST_LIMIT,
            patience: COMMAND_TIMEOUT,
        })
    }

    /// Takes no request that has more bytes than this, with its line break.
    #[must_use]
    pub fn with_longest(self, longest: usize) -> Self {
        Self { longest, ..self }
    }

    /// Answers requests with `handler` until `shutdown` completes and the commands in progress are done. Removes the
    /// socket.
    ///
    /// The handler gets the whole request object; `Err` is a text for the administrator. A started command is
    /// completed even if the administrator no longer waits, because half of a change without a recorded outcome would
    /// be worse.
    pub async fn serve<H, F>(self, handler: H, shutdown: impl Future<Output = ()>)
    where
        H: Fn(Value, Peer) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Value, String>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let (stop, stopping) = watch::channel(false);
        // Every command holds a sender.
        let (running, mut all_done) = mpsc::channel::<Infallible>(1);
        let places = Arc::new(Mutex::new(Places::new(MAX_CONNECTIONS, 0, Duration::ZERO)));
        let mut connections = JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(ended) = connections.join_next() => log_panic(ended),
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let Some((peer, place)) = seat(&stream, &places) else { continue };
                        let terms = Terms {
                            for_group: self.for_group,
                            longest: self.longest,
                            patience: self.patience,
                            running: running.clone(),
                            place,
                        };
                        connections.spawn(converse(stream, peer, terms, handler.clone(), stopping.clone()));
                    }
                    Err(error) => {
                        tracing::error!(%error, "the administrators' socket cannot accept connections; trying again");
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                },
            }
        }
        // No new connections. The lock still keeps other daemons away from the path.
        if let Err(error) = tokio::fs::remove_file(&self.name.path).await {
            tracing::warn!(path = %self.name.path.display(), %error, "the administrators' socket cannot be removed");
        }
        let _ = stop.send(true);
        drop(running);
        let finish = async {
            while let Some(ended) = connections.join_next().await {
                log_panic(ended);
            }
            all_done.recv().await;
        };
        if standstill::timeout(STOP_TIMEOUT, finish).await.is_err() {
            tracing::warn!("an administrator's command was stopped because it took too long");
        }
    }
}

fn late(patience: Duration) -> String {
    format!(
        "the command takes more than {} seconds; it goes on, and the audit trail will say what came of it",
        patience.as_secs()
    )
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "an administrator's command panicked");
    }
}

/// The activity of a connection, which decides about its place.
struct Doing {
    /// Since when it has waited for its administrator; `None` while a command runs.
    waiting: Mutex<Option<Instant>>,
    leave: Notify,
}

impl Doing {
    fn waits(&self, since: Option<Instant>) {
        *lock(&self.waiting) = since;
    }
}

impl Guest for Arc<Doing> {
    fn waiting_since(&self) -> Option<Instant> {
        *lock(&self.waiting)
    }

    fn ask_to_leave(&self) {
        self.leave.notify_one();
    }
}

type AdminPlaces = Mutex<Places<u32, Arc<Doing>>>;

/// The place of a connection, given back when it ends.
struct Place {
    places: Arc<AdminPlaces>,
    uid: u32,
    number: u64,
    doing: Arc<Doing>,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.places).leave(self.uid, self.number);
    }
}

/// Identifies the user of a connection and takes a place for it.
fn seat(stream: &UnixStream, places: &Arc<AdminPlaces>) -> Option<(Peer, Place)> {
    let peer = match stream.peer_cred() {
        Ok(credentials) => Peer { uid: credentials.uid(), pid: credentials.pid() },
        Err(error) => {
            tracing::warn!(%error, "the kernel does not identify the caller of the administrators' socket; the caller is refused");
            return None;
        }
    };
    let now = standstill::now();
    let doing = Arc::new(Doing { waiting: Mutex::new(Some(now)), leave: Notify::new() });
    let arrived = lock(places).arrive(peer.uid, &doing, now);
    let Ok((number, _)) = arrived else {
        // Without waiting: the client may not read.
        let _ = stream.try_write(b"{\"error\":\"too many commands run at the same time; try again\"}\n");
        return None;
    };
    Some((peer, Place { places: places.clone(), uid: peer.uid, number, doing }))
}

/// The terms of a connection.
struct Terms {
    for_group: bool,
    longest: usize,
    patience: Duration,
    place: Place,
    /// Held by commands while they run.
    running: mpsc::Sender<Infallible>,
}

/// Handles an administrator's connection.
async fn converse<H, F>(
    mut stream: UnixStream,
    peer: Peer,
    terms: Terms,
    handler: Arc<H>,
    mut stopping: watch::Receiver<bool>,
) where
    H: Fn(Value, Peer) -> F,
    F: Future<Output = Result<Value, String>> + Send + 'static,
{
    let Terms { for_group, longest, patience, running, place } = terms;
    let doing = &place.doing;
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let allowed = for_group || peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw();
    loop {
        let line = tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => return,
            () = doing.leave.notified() => return,
            line = standstill::timeout(IDLE_TIMEOUT, read_line(&mut reader, longest)) => line,
        };
        doing.waits(None);
        let (result, more) = match line {
            Err(_) | Ok(Ok(Line::End) | Err(_)) => return,
            Ok(Ok(Line::TooLong)) => (Err(format!("a request has at most {longest} octets")), false),
            Ok(Ok(Line::Whole(_))) if !allowed => {
                tracing::warn!(?peer, "the administrators' socket refused a caller");
                (Err("only root and the daemon's own user may use this socket".to_owned()), false)
            }
            Ok(Ok(Line::Whole(line))) => match serde_json::from_slice(&line) {
                Ok(request @ Value::Object(_)) => {
                    let (work, running) = (handler(request, peer), running.clone());
                    // A separate task, which does not end with this connection.
                    let mut command = tokio::spawn(async move {
                        let result = work.await;
                        drop(running);
                        result
                    });
                    match standstill::timeout(patience, &mut command).await {
                        Ok(Ok(result)) => (result, true),
                        Ok(panicked) => return log_panic(panicked.map(drop)),
                        Err(_) => (Err(late(patience)), true),
                    }
                }
                Ok(_) => (Err("a request is a JSON object".to_owned()), true),
                Err(error) => (Err(format!("the request is not JSON: {error}")), true),
            },
        };
        let mut answer = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": error }),
        }
        .to_string();
        answer.push('\n');
        doing.waits(Some(standstill::now()));
        let written = tokio::select! {
            written = standstill::timeout(IDLE_TIMEOUT, writer.write_all(answer.as_bytes())) => written,
            () = doing.leave.notified() => return,
        };
        if !matches!(written, Ok(Ok(()))) || !more {
            return;
        }
    }
}

/// The file that a daemon locks while it uses the socket.
pub(crate) fn lock_file(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

#[cfg(test)]
mod tests;
