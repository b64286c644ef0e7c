//! Accepts connections and serves HTTP/1.1 and HTTP/2 on them, with limits and a graceful stop.
//!
//! The guarantee of a stop: **no accepted request is dropped**. When `shutdown` fires, [`run`]
//!
//! 1. accepts the connections that the kernel has already accepted, and closes the listening socket;
//! 2. continues to answer on open connections for [`Limits::grace`]; HTTP/1 replies say `Connection: close`, HTTP/2
//!    connections get a GOAWAY;
//! 3. then closes each connection as soon as no request is in progress on it and no data is waiting to be read;
//! 4. returns when all connections are closed, or cuts the rest after [`Limits::drain_timeout`].
//!
//! The module `connection` is the life of one connection; `activity` tracks its requests.

mod activity;
mod connection;
mod dozing;
mod limits;
mod line;
mod origin;
mod ration;
mod slot;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use claviger_hsm::standstill;
use claviger_process::lock::lock;
use claviger_process::throttle::Throttle;
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper::{Request, Response};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use self::connection::Phase;
use self::line::{Arrival, Line, Outcome};
use self::slot::{House, Place, Slot};
use crate::sys::places::{self, Places};
use crate::tls::SharedTls;

pub(crate) use self::activity::Cut;
pub use self::dozing::BoxError;
pub use self::limits::Limits;
pub use self::origin::{Origin, Peer};

/// Most connections that the kernel queues before they are accepted; `somaxconn` may limit it further.
const BACKLOG: u32 = 4096;

/// Receive buffer of a connection in the kernel, in bytes; the kernel may use twice as much. It is as large as the
/// HTTP/2 window, and large enough for a large batch from a distant client. Without this bound, the kernel would buffer
/// megabytes of every unread body.
const RECEIVE_BUFFER: u32 = 256 * 1024;

/// A socket that is bound to `address` and does not listen yet.
///
/// # Errors
/// What the operating system says.
pub(crate) fn bind_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // After a restart, old connections in TIME_WAIT must not block the address.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// A bound listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    counted: bool,
    blocked: Arc<Blocked>,
}

/// Whether a listener has been unable to accept connections for longer than a moment, or has been told to stop.
#[derive(Debug, Default)]
pub struct Blocked {
    full: Since,
    failing: Since,
    stopping: AtomicBool,
}

/// The time since when a condition holds.
type Since = Mutex<Option<std::time::Instant>>;

/// Duration after which a listener that accepts nothing counts as blocked.
const MOMENT: Duration = Duration::from_secs(2);

impl Blocked {
    /// Why no connection is accepted, if so.
    #[must_use]
    pub fn why(&self) -> Option<&'static str> {
        if self.is_stopping() {
            Some("the daemon is stopping")
        } else if lasts(&self.failing) {
            Some("connections cannot be accepted: the log says why")
        } else if lasts(&self.full) {
            Some("the limit of open connections is reached, and all of them are busy")
        } else {
            None
        }
    }

    /// Whether the listener accepts nothing more, for ever.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Records whether a new connection has to wait because all places are in use. Returns whether this has lasted
    /// longer than a moment.
    fn is_full(&self, full: bool) -> bool {
        note(&self.full, full)
    }

    /// Records whether the last accept failed.
    fn is_failing(&self, failing: bool) {
        note(&self.failing, failing);
    }
}

fn note(since: &Since, holds: bool) -> bool {
    let mut at = lock(since);
    *at = holds.then(|| at.unwrap_or_else(standstill::now));
    at.is_some_and(is_past)
}

fn lasts(since: &Since) -> bool {
    lock(since).is_some_and(is_past)
}

fn is_past(at: std::time::Instant) -> bool {
    standstill::since(at) >= MOMENT
}

impl Listener {
    /// Binds `address` and starts to listen; with port 0 the kernel selects the port. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// What the operating system says, with the address.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let bind = || {
            let socket = bind_socket(address)?;
            // Accepted connections inherit this.
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
            let socket = socket.listen(BACKLOG)?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address, counted: false, blocked: Arc::default() })
        };
        bind().map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
    }

    /// Counts the connections of this listener in `claviger_connections_open`.
    #[must_use]
    pub fn counted(mut self) -> Self {
        self.counted = true;
        self
    }

    /// The state of this listener, kept up to date while it runs.
    #[must_use]
    pub fn blocked(&self) -> Arc<Blocked> {
        self.blocked.clone()
    }

    /// The address of the listener, with the actual port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

/// The result of a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were open when the stop began, including those in the kernel's queue.
    pub open: usize,
    /// Number of these that were cut after [`Limits::drain_timeout`].
    pub cut: usize,
}

/// Serves `service` on every connection until `shutdown` completes, then stops as described above.
///
/// The service is called for many requests concurrently, and also turns errors into responses. If the service panics,
/// its connection is closed without a reply.
pub async fn run<S, B>(
    listener: Listener,
    tls: Option<SharedTls>,
    limits: Limits,
    service: S,
    shutdown: impl Future<Output = ()>,
) -> Drained
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let Listener { socket, address, counted, blocked } = listener;
    let (phases, phase) = watch::channel(Phase::Serving);
    // Nothing is sent: the channel closes when the last connection has dropped its sender.
    let (alive, mut all_closed) = mpsc::channel::<Infallible>(1);
    let open = Arc::new(AtomicUsize::new(0));
    let server = Arc::new(connection::Server::new(limits.clone(), tls, service, phase));
    let house = Arc::new(House {
        places: Mutex::new(Places::new(limits.max_connections, limits.per_address, places::GRACE)),
        freed: Notify::new(),
    });

    let start = |arrival: Arrival, place: Option<Place>| {
        let Arrival { stream, peer, activity } = arrival;
        let slot = Slot::new(open.clone(), counted, place, alive.clone());
        let server = server.clone();
        tokio::spawn(async move {
            server.serve(stream, peer, activity, &slot).await;
            drop(slot);
        });
    };

    tokio::pin!(shutdown);
    let mut backoff = Backoff::default();
    let owes = |peer| server.is_in_debt(peer);
    let mut line = Line::new(limits.in_debt);
    let mut look = tokio::time::interval(LOOK_FOR_PLACE);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Subscribe before the attempt, so that a place that becomes free in between is not missed.
        let freed = house.freed.notified();
        let outcome = tokio::select! {
            biased;
            () = &mut shutdown => break,
            () = freed, if !line.is_empty() => line.advance(&house, owes),
            accepted = socket.accept(), if line.is_open() => match accepted {
                Ok((stream, peer)) => {
                    backoff.success();
                    blocked.is_failing(false);
                    let arrival = Arrival { stream, peer, activity: server.activity() };
                    line.arrive(arrival, &house, owes(peer))
                }
                Err(error) => {
                    let Some(pause) = backoff.failure(&error, address) else { continue };
                    blocked.is_failing(true);
                    tokio::select! {
                        biased;
                        () = &mut shutdown => break,
                        () = tokio::time::sleep(pause) => continue,
                    }
                }
            },
            // A connection may have become idle.
            _ = look.tick(), if !line.is_empty() => line.advance(&house, owes),
        };
        match outcome {
            Outcome::Seated(arrival, place) => {
                blocked.is_full(false);
                start(arrival, Some(place));
                // Several places may have become free at once.
                if !line.is_empty() {
                    house.freed.notify_one();
                }
            }
            Outcome::TurnedAway(Arrival { peer, .. }) => {
                server.charge_for_accepting(peer);
                if counted {
                    crate::observe::metrics::connection_cut(Cut::Address.as_str());
                }
                tracing::debug!(%peer, "a connection is not accepted: its address has too many, and all of them are busy");
            }
            Outcome::Waits { full: true } if blocked.is_full(true) => log_full(address, limits.max_connections),
            Outcome::Waits { .. } | Outcome::Empty => {}
        }
    }

    blocked.stopping.store(true, Ordering::Release);
    let begun = Instant::from_std(standstill::now());
    // `server` holds a receiver, so this cannot fail.
    let _ = phases.send(Phase::Draining(begun + limits.grace));
    line.end().for_each(|arrival| start(arrival, None));
    let take = |stream, peer| start(Arrival { stream, peer, activity: server.activity() }, None);
    empty_backlog(socket, begun + limits.grace, &mut backoff, address, take).await;
    let at_stop = open.load(Ordering::Relaxed);
    tracing::info!(%address, connections = at_stop, "no new connections are accepted; open requests are finished");
    drop(alive);
    let cut = match standstill::timeout_at((begun + limits.drain_timeout).into_std(), all_closed.recv()).await {
        Ok(_) => 0,
        Err(_) => {
            let cut = open.load(Ordering::Relaxed);
            tracing::warn!(%address, cut, drain_timeout = ?limits.drain_timeout, "connections were closed because they took too long");
            let _ = phases.send(Phase::Cut);
            // The tasks only have to notice the cut. Limit the wait, because a service that never yields must not block
            // the process.
            let _ = tokio::time::timeout(Duration::from_secs(1), all_closed.recv()).await;
            cut
        }
    };
    Drained { open: at_stop, cut }
}

/// Accepts all connections in the kernel's queue, beyond any limit: for their clients they are open, and requests may
/// be on their way. Then closes the listening socket.
async fn empty_backlog(
    socket: TcpListener,
    until: Instant,
    backoff: &mut Backoff,
    address: SocketAddr,
    mut start: impl FnMut(TcpStream, SocketAddr),
) {
    // tokio's accept asks the kernel only after the reactor has reported a connection. Ask the kernel directly.
    let socket = match socket.into_std() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%address, %error, "the backlog cannot be emptied");
            return;
        }
    };
    // Not more than the queue can have held: others may come as fast as these are accepted.
    for number in 1..=BACKLOG {
        if number.is_multiple_of(64) {
            tokio::task::yield_now().await;
        }
        let taken = socket.accept().and_then(|(stream, peer)| {
            stream.set_nonblocking(true)?;
            Ok((TcpStream::from_std(stream)?, peer))
        });
        match taken {
            Ok((stream, peer)) => start(stream, peer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                let Some(pause) = backoff.failure(&error, address) else { continue };
                // Descriptors become free when connections end.
                if standstill::now() + pause > until.into_std() {
                    return;
                }
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn log_full(address: SocketAddr, max_connections: usize) {
    static SAID: Throttle = Throttle::new();
    if let Some(unsaid) = SAID.due(standstill::now()) {
        tracing::warn!(
            %address, max_connections, unsaid,
            "the limit of open connections is reached and all of them are busy; new connections wait"
        );
    }
}

/// Interval for checking whether a connection can be closed.
const LOOK_FOR_PLACE: Duration = Duration::from_millis(20);

/// The pause after a failed accept. No error of accept ends the server.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn success(&mut self) {
        self.failures = 0;
    }

    /// `None`: the error concerned a single connection, so the next accept may follow at once.
    fn failure(&mut self, error: &io::Error, address: SocketAddr) -> Option<Duration> {
        use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
        if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted) {
            return None;
        }
        if self.failures == 0 {
            tracing::error!(
                %address, %error,
                "connections cannot be accepted; trying again (is the limit of open files, `ulimit -n`, large enough?)"
            );
        }
        let pause = Duration::from_millis(10 << self.failures.min(6));
        self.failures += 1;
        Some(pause)
    }
}
