//! The administrators' socket: how `claviger hosts …` and its like reach the daemon that is running.
//!
//! A Unix stream socket in the state folder. A request is one JSON object on a line, `{"command": "hosts.list", …}`;
//! the answer is one, too: `{"ok": …}` or `{"error": "…"}`. A connection carries any number of them, one after the other.
//! Only root and the daemon's own user may connect: the file's mode says so, and the kernel's word on the peer is checked.
//! With a group its members may, too, by the file's mode alone: the kernel names but one of a peer's groups.
//!
//! There are two of them: `admin.sock`, and `review.sock` where only that is answered which changes nothing.

use std::convert::Infallible;
use std::fs::{File, OpenOptions, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use claviger_hsm::standstill;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use crate::observe::audit::Peer;
use crate::sys::places::{Guest, Places};

/// Longest request, in octets, with its line break. An import of some ten thousand hosts is the longest there is.
pub const REQUEST_LIMIT: usize = 16 * 1024 * 1024;

/// The same where nothing is changed: those requests are short.
pub const REVIEW_LIMIT: usize = 64 * 1024;

/// Longest answer that [`call`] reads, in octets.
pub const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// How long a connection may be silent between requests, and how long the writing of an answer may take.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an administrator waits for a command; it goes on after that. An HSM may take two minutes for a key, each member
/// takes an imported one after the other, and all have to show it afterwards.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);

/// How long commands in progress may take when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections at once. For one more, the one that has been silent longest is closed, of the user who has the most.
const MAX_CONNECTIONS: usize = 64;

/// Longest path of a Unix socket: `sun_path` less its NUL.
const PATH_LIMIT: usize = 107;

/// Why the socket could not be served or asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The operating system takes no path of this length for a socket.
    #[error("the path of the socket {} is too long: {} bytes, and the system takes {PATH_LIMIT} at most", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Another daemon is running with this folder of sockets.
    #[error("another claviger runs here: it holds {}; stop it first", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else where the socket should be.
    #[error("{} is not a socket; move it away", path.display())]
    NotASocket {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("the administrators' socket {} cannot be made: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// There is no socket.
    #[error("there is no administrators' socket at {}; is the daemon running, and with this --config?", path.display())]
    Missing {
        /// The socket.
        path: PathBuf,
    },
    /// There is a socket, but nobody behind it.
    #[error("nobody answers at {}: the daemon that made it has ended; start it again", path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not use the socket.
    #[error("{} may not be used by this user; run this as root or as {owner}", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
    /// The conversation broke.
    #[error("the daemon behind {} did not answer: {source}; its log may say why", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The daemon answered that it did not do it; the text is its own.
    #[error("{0}")]
    Refused(String),
}

/// The socket of a running daemon. While it exists, no other daemon can bind the same path.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    name: SocketName,
    /// Whoever could connect is allowed to.
    for_group: bool,
    /// Longest request, in octets, with its line break.
    longest: usize,
    /// How long a command is waited for.
    patience: Duration,
}

/// The socket's file. It goes with the value, so that a daemon that ends before it serves leaves none behind.
#[derive(Debug)]
struct SocketName {
    path: PathBuf,
    /// Locked for as long as it is open. The file stays: removing it would race with the next daemon.
    _lock: File,
}

impl Drop for SocketName {
    fn drop(&mut self) {
        // The lock is still held.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AdminSocket {
    /// Makes the socket, mode 0600, or 0660 for a group, in place of one that a dead daemon left. To be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`AdminError::Taken`] when a daemon is alive on this path; [`AdminError::PathTooLong`],
    /// [`AdminError::NotASocket`], [`AdminError::Bind`].
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Self, AdminError> {
        check_length(path)?;
        let failed = |source| AdminError::Bind { path: path.to_owned(), source };
        let taken = || AdminError::Taken { path: path.to_owned() };
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock_file(path));
        let lock = lock.map_err(failed)?;
        // The lock dies with its process, whatever else is left of it.
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
        // Who came in before the mode was set may be anybody.
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

    /// Takes no request that has more octets than this, with its line break.
    #[must_use]
    pub fn with_longest(self, longest: usize) -> Self {
        Self { longest, ..self }
    }

    /// Answers requests with `handler` until `shutdown` ends and the commands in progress are done. Removes the socket.
    ///
    /// The handler gets the whole request object; `Err` is a text for the administrator. A command that was begun is done to
    /// its end, whether the administrator waits for it or not: half of a change, without its outcome on record, helps nobody.
    pub async fn serve<H, F>(self, handler: H, shutdown: impl Future<Output = ()>)
    where
        H: Fn(Value, Peer) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Value, String>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let (stop, stopping) = watch::channel(false);
        // Every command holds the other end.
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
                        tracing::error!(%error, "the administrators' socket cannot accept; trying again");
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                },
            }
        }
        // No new connections: the lock still keeps other daemons away from the path.
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
            tracing::warn!("an administrator's command is cut: it took too long");
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

/// What a connection is doing, as far as its place is concerned.
struct Doing {
    /// Since when it waits for its administrator; `None` while a command runs.
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

/// Finds out who has connected, and takes a place for the connection.
fn seat(stream: &UnixStream, places: &Arc<AdminPlaces>) -> Option<(Peer, Place)> {
    let peer = match stream.peer_cred() {
        Ok(credentials) => Peer { uid: credentials.uid(), pid: credentials.pid() },
        Err(error) => {
            tracing::warn!(%error, "the kernel does not say who uses the administrators' socket: refused");
            return None;
        }
    };
    let now = standstill::now();
    let doing = Arc::new(Doing { waiting: Mutex::new(Some(now)), leave: Notify::new() });
    let arrived = lock(&places).arrive(peer.uid, &doing, now);
    let Ok((number, _)) = arrived else {
        // As far as it takes them: it is written to nobody else.
        let _ = stream.try_write(b"{\"error\":\"too many commands run at the same time; try again\"}\n");
        return None;
    };
    Some((peer, Place { places: places.clone(), uid: peer.uid, number, doing }))
}

/// What holds for a connection.
struct Terms {
    for_group: bool,
    longest: usize,
    patience: Duration,
    place: Place,
    /// Held by commands for as long as they run.
    running: mpsc::Sender<Infallible>,
}

/// One administrator's connection.
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
                tracing::warn!(?peer, "refused at the administrators' socket");
                (Err("only root and the daemon's own user may use this socket".to_owned()), false)
            }
            Ok(Ok(Line::Whole(line))) => match serde_json::from_slice(&line) {
                Ok(request @ Value::Object(_)) => {
                    let (work, running) = (handler(request, peer), running.clone());
                    // A task of its own: it does not end with this connection.
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

/// What came from the other side.
enum Line {
    /// A line without its line break. The last one may lack it. It may carry a private key.
    Whole(Zeroizing<Vec<u8>>),
    /// More octets than allowed.
    TooLong,
    /// Nothing more.
    End,
}

async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), limit: usize) -> io::Result<Line> {
    let mut line = Zeroizing::new(Vec::new());
    loop {
        let octets = reader.fill_buf().await?;
        if octets.is_empty() {
            return Ok(if line.is_empty() { Line::End } else { Line::Whole(line) });
        }
        let end = octets.iter().position(|octet| *octet == b'\n');
        let taken = end.unwrap_or(octets.len());
        if line.len() + taken >= limit {
            return Ok(Line::TooLong);
        }
        if line.capacity() - line.len() < taken {
            // A vector that grows by itself leaves a copy behind.
            let mut wider = Zeroizing::new(Vec::with_capacity(2 * (line.len() + taken)));
            wider.extend_from_slice(&line);
            line = wider;
        }
        line.extend_from_slice(&octets[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Line::Whole(line));
        }
    }
}

/// Sends one request to the daemon behind `path` and returns what it answered.
///
/// # Errors
/// [`AdminError`]; its text says what to do. [`AdminError::Refused`] is the daemon's own.
pub async fn call<T: Serialize + ?Sized>(path: &Path, request: &T) -> Result<Value, AdminError> {
    check_length(path)?;
    let broken = |source| AdminError::Broken { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AdminError::Missing { path: path.to_owned() },
        io::ErrorKind::ConnectionRefused => AdminError::Dead { path: path.to_owned() },
        io::ErrorKind::PermissionDenied => AdminError::Denied { path: path.to_owned(), owner: owner(path) },
        _ => broken(source),
    })?;
    let exchange = async {
        // Its length is known before it is written: a private key may be in it, and a text that grows leaves copies behind.
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
    // Longer than the daemon gives a command, so that its own word arrives.
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

/// How long a request is as a line.
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
    // Counting does not fail, and what cannot be written fails again where it is.
    let _ = serde_json::to_writer(&mut count, request);
    count.0
}

/// The file that a daemon keeps locked while it has the socket.
pub(crate) fn lock_file(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Checks the length of a socket's path, which the kernel limits.
///
/// # Errors
/// [`AdminError::PathTooLong`].
pub fn check_length(path: &Path) -> Result<(), AdminError> {
    if path.as_os_str().as_bytes().len() > PATH_LIMIT {
        return Err(AdminError::PathTooLong { path: path.to_owned() });
    }
    Ok(())
}

/// Whose the socket is, or the folder that hides it.
fn owner(path: &Path) -> String {
    let uid = path.ancestors().find_map(|path| path.metadata().ok()).map(|metadata| metadata.uid());
    uid.map_or_else(|| "the daemon's user".to_owned(), |uid| format!("the user with id {uid}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::sync::{Semaphore, oneshot};
    use tokio::task::JoinHandle;

    async fn handler(request: Value, peer: Peer) -> Result<Value, String> {
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
        match request["command"].as_str() {
            Some("echo") => Ok(request["value"].clone()),
            Some("slow") => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok(json!("done"))
            }
            Some("panic") => panic!("on purpose"),
            other => Err(format!("no command {other:?}")),
        }
    }

    fn start(path: &Path) -> (oneshot::Sender<()>, JoinHandle<()>) {
        let socket = AdminSocket::bind(path, None).unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = socket.serve(handler, async {
            let _ = stopped.await;
        });
        (stop, tokio::spawn(serving))
    }

    async fn stop((stop, serving): (oneshot::Sender<()>, JoinHandle<()>)) {
        stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap();
    }

    async fn fault(path: &Path, request: Value) -> String {
        call(path, &request).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn commands_are_answered_and_refusals_are_the_handlers_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let running = start(&path);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let value = json!({ "text": "a\nline", "list": [1, null] });
        assert_eq!(call(&path, &json!({ "command": "echo", "value": value })).await.unwrap(), value);
        let large = json!("x".repeat(900_000));
        assert_eq!(call(&path, &json!({ "command": "echo", "value": large })).await.unwrap(), large);
        assert_eq!(fault(&path, json!({ "command": "none" })).await, "no command Some(\"none\")");
        assert_eq!(fault(&path, json!([1])).await, "a request is a JSON object");
        assert!(fault(&path, json!("x".repeat(REQUEST_LIMIT))).await.contains("the request is too long"));
        // A panic hurts nobody else.
        assert!(fault(&path, json!({ "command": "panic" })).await.contains("its log may say why"));
        assert_eq!(call(&path, &json!({ "command": "echo", "value": 1 })).await.unwrap(), json!(1));
        stop(running).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_connection_carries_many_requests_and_bounds_each() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let running = start(&path);
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream
            .write_all(b"{\"command\":\"echo\",\"value\":1}\n{\"command\":\"echo\",\"value\":2}\nno\n")
            .await
            .unwrap();
        let mut reader = BufReader::new(&mut stream);
        for expected in ["{\"ok\":1}\n", "{\"ok\":2}\n", "{\"error\":\"the request is not JSON: "] {
            let mut line = String::new();
            reader.read_line(&mut line).await.unwrap();
            assert!(line.starts_with(expected), "{line}");
        }
        // Written as far as the other side takes it.
        let _ = stream.write_all(&vec![b'x'; REQUEST_LIMIT + 1]).await;
        let mut rest = String::new();
        let _ = stream.read_to_string(&mut rest).await;
        assert!(rest.contains("at most 16777216 octets"), "{rest}");
        stop(running).await;
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        assert!(fault(&path, json!({})).await.contains("is the daemon running, and with this --config?"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(fault(&path, json!({})).await.contains("has ended; start it again"));
        let running = start(&path);
        let message = AdminSocket::bind(&path, None).unwrap_err().to_string();
        assert!(message.starts_with("another claviger runs here"), "{message}");
        assert_eq!(call(&path, &json!({ "command": "echo", "value": 1 })).await.unwrap(), json!(1));
        stop(running).await;
        stop(start(&path)).await;
        // One that listens without the lock is alive, too.
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(AdminSocket::bind(&path, None), Err(AdminError::Taken { .. })));
        drop(other);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(AdminSocket::bind(&path, None), Err(AdminError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn connections_that_say_nothing_keep_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let running = start(&path);
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        for value in 0..10 {
            let request = json!({ "command": "echo", "value": value });
            let answer = tokio::time::timeout(IDLE_TIMEOUT / 2, call(&path, &request)).await.expect("kept out");
            assert_eq!(answer.unwrap(), json!(value));
        }
        // The first ones were closed for it.
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0);
        stop(running).await;
    }

    #[tokio::test]
    async fn a_stop_waits_for_the_command_in_progress_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let running = start(&path);
        let _idle = UnixStream::connect(&path).await.unwrap();
        let slow = tokio::spawn({
            let path = path.clone();
            async move { call(&path, &json!({ "command": "slow" })).await.unwrap() }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = std::time::Instant::now();
        stop(running).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "the idle connection kept it");
        assert_eq!(slow.await.unwrap(), json!("done"));
    }

    #[tokio::test]
    async fn a_command_is_done_to_its_end_whoever_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let socket = AdminSocket { patience: Duration::from_millis(50), ..AdminSocket::bind(&path, None).unwrap() };
        let (stop, stopped) = oneshot::channel::<()>();
        let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = done.clone();
        let (gate, begun) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (at_gate, has_begun) = (gate.clone(), begun.clone());
        let handler = move |_, _| {
            let (counter, gate, begun) = (counter.clone(), at_gate.clone(), has_begun.clone());
            async move {
                begun.add_permits(1);
                // The semaphore is never closed.
                let _ = gate.acquire().await;
                counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                Ok(Value::Null)
            }
        };
        let serving = tokio::spawn(socket.serve(handler, async {
            let _ = stopped.await;
        }));
        // One waits in vain, one leaves at once, one is cut by the stop.
        assert!(fault(&path, json!({})).await.contains("it goes on"));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"{}\n").await.unwrap();
        drop(stream);
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"{}\n").await.unwrap();
        let _ = begun.acquire_many(3).await.unwrap();
        assert_eq!(done.load(std::sync::atomic::Ordering::SeqCst), 0);
        stop.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        gate.add_permits(3);
        serving.await.unwrap();
        assert_eq!(done.load(std::sync::atomic::Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_said_to_be() {
        let path = Path::new("/tmp").join("x".repeat(120));
        assert!(fault(&path, json!({})).await.contains("125 bytes, and the system takes 107 at most"));
        assert!(matches!(AdminSocket::bind(&path, None), Err(AdminError::PathTooLong { .. })));
        // The longest one that is allowed works.
        let folder = tempfile::tempdir().unwrap();
        let room = PATH_LIMIT - folder.path().as_os_str().len() - 1;
        stop(start(&folder.path().join("x".repeat(room)))).await;
    }
}
