//! Tests with real sockets and handwritten HTTP, because they check what clients see, byte by byte.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::http::body::{Pace, UpTo, read_body};
use crate::request::Network;
use crate::tls::{ServerTls, tls_config};
use arc_swap::ArcSwap;
use http_body_util::Full;
use hyper::StatusCode;
use hyper::service::service_fn;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

/// Time limit of every wait.
const LONG: Duration = Duration::from_secs(20);

const LARGE: usize = 64 * 1024;

fn limits() -> Limits {
    Limits { grace: Duration::from_millis(200), drain_timeout: LONG, ..Limits::default() }
}

/// `/MILLISECONDS` replies after that time with the request's body; `/deaf` replies at once without reading the body; `/large`
/// replies with [`LARGE`] bytes.
async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    assert!(request.extensions().get::<Peer>().is_some());
    if request.uri().path() == "/deaf" {
        let mut response = Response::new(Full::from("I heard nothing"));
        *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
        return Ok(response);
    }
    if request.uri().path() == "/large" {
        return Ok(Response::new(Full::from(vec![7; LARGE])));
    }
    let pause = request.uri().path()[1..].parse().unwrap();
    let reading = request.extensions().get::<Origin>().unwrap().reading();
    let pace = Pace { within: LONG, least: 0 };
    let body = read_body(request.into_body(), 1 << 20, pace, &mut UpTo(1 << 20)).await;
    let body = body.unwrap_or_else(|error| error.to_string().into());
    drop(reading);
    tokio::time::sleep(Duration::from_millis(pause)).await;
    Ok(Response::new(Full::from(body)))
}

struct Running {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    run: JoinHandle<Drained>,
}

impl Running {
    fn start(limits: Limits, tls: Option<ServerTls>) -> Self {
        let listener = Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr();
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let run = tokio::spawn(run(
            listener,
            tls.map(|tls| Arc::new(ArcSwap::from_pointee(tls))),
            limits,
            service_fn(answer),
            shutdown,
        ));
        Self { address, stop: Some(stop), run }
    }

    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    async fn drained(self) -> Drained {
        tokio::time::timeout(LONG, self.run).await.unwrap().unwrap()
    }

    async fn connect(&self) -> Connection<TcpStream> {
        Connection { stream: TcpStream::connect(self.address).await.unwrap(), read: Vec::new() }
    }
}

/// Serves clients at this machine, whose address has used up its processor time.
async fn serve_in_debt<S>(limits: Limits, tls: Option<ServerTls>, service: S) -> SocketAddr
where
    S: Service<Request<Incoming>, Response = Response<Full<Bytes>>, Error = Infallible> + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (phases, phase) = watch::channel(Phase::Serving);
    let tls = tls.map(|tls| Arc::new(ArcSwap::from_pointee(tls)));
    let limits = Limits { unproven_time_percent: 1, ..limits };
    let server = Arc::new(connection::Server::new(limits, tls, service, phase));
    server.ration().use_up(&Network::of(address.ip()));
    tokio::spawn(async move {
        let _serving = phases;
        let (alive, _all) = mpsc::channel(1);
        loop {
            let (stream, peer) = listener.accept().await.unwrap();
            let (server, slot) = (server.clone(), Slot::new(Arc::default(), false, None, alive.clone()));
            tokio::spawn(async move { server.serve(stream, peer, server.activity(), &slot).await });
        }
    });
    address
}

/// The client side of an HTTP/1.1 connection.
struct Connection<S> {
    stream: S,
    read: Vec<u8>,
}

#[derive(Debug, PartialEq)]
struct Answered {
    status: u16,
    body: String,
    close: bool,
}

/// Why there was no reply.
#[derive(Debug, PartialEq)]
enum Silence {
    /// The connection ended before the first byte of a reply.
    Nothing,
    /// The connection ended inside a reply.
    Torn,
}

fn post(path: &str, body: &str) -> String {
    format!("POST /{path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    async fn receive(&mut self) -> Result<Answered, Silence> {
        loop {
            if let Some(end) = self.read.windows(4).position(|octets| octets == b"\r\n\r\n") {
                let head = String::from_utf8(self.read[..end].to_vec()).unwrap().to_lowercase();
                let header = |name: &str| {
                    head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).map(str::to_owned)
                };
                let length: usize = header("content-length").unwrap().parse().unwrap();
                if self.read.len() >= end + 4 + length {
                    let rest = self.read.split_off(end + 4 + length);
                    let answer = std::mem::replace(&mut self.read, rest);
                    return Ok(Answered {
                        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
                        body: String::from_utf8(answer[end + 4..].to_vec()).unwrap(),
                        close: header("connection").as_deref() == Some("close"),
                    });
                }
            }
            let read =
                tokio::time::timeout(LONG, self.stream.read_buf(&mut self.read)).await.expect("neither answer nor end");
            if read.unwrap_or(0) == 0 {
                return Err(if self.read.is_empty() { Silence::Nothing } else { Silence::Torn });
            }
        }
    }

    async fn ask(&mut self, path: &str, body: &str) -> Result<Answered, Silence> {
        self.send(&post(path, body)).await;
        self.receive().await
    }
}

fn ok(body: &str, close: bool) -> Result<Answered, Silence> {
    Ok(Answered { status: 200, body: body.to_owned(), close })
}

#[tokio::test]
async fn a_connection_serves_many_requests() {
    let mut server = Running::start(limits(), None);
    let mut client = server.connect().await;
    for body in ["one", "", "three"] {
        assert_eq!(client.ask("0", body).await, ok(body, false));
    }
    // Two pipelined requests are answered in order.
    client.send(&format!("{}{}", post("0", "a"), post("0", "b"))).await;
    assert_eq!((client.receive().await, client.receive().await), (ok("a", false), ok("b", false)));
    // A client that has closed its side still gets its reply.
    client.send(&post("50", "last")).await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.receive().await, ok("last", false));
    assert_eq!(client.receive().await, Err(Silence::Nothing));
    server.stop();
    assert_eq!(server.drained().await.cut, 0);
}

/// The guarantee of a stop: with many active clients, every complete request gets a complete reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stop_under_load_drops_no_request() {
    for round in 0..3u64 {
        let mut server = Running::start(Limits { grace: Duration::from_millis(500), ..limits() }, None);
        let address = server.address;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut clients = JoinSet::new();
        for client in 0..96u64 {
            let stopping = stopping.clone();
            clients.spawn(async move {
                let (mut answered, mut number, mut answered_late) = (0, 0u64, 0);
                'connections: loop {
                    let Ok(stream) = TcpStream::connect(address).await else {
                        assert!(stopping.load(Ordering::SeqCst), "refused before the stop");
                        return (answered, answered_late);
                    };
                    let mut connection = Connection { stream, read: Vec::new() };
                    let mut fresh = true;
                    loop {
                        // Some clients send the next request at once, some pause; some requests take longer.
                        number += 1;
                        let dice = (client * 7919 + number * 104_729 + round) % 100;
                        if dice < 30 {
                            tokio::time::sleep(Duration::from_millis(dice * 3)).await;
                        }
                        let body = format!("{client}-{number}");
                        let late = stopping.load(Ordering::SeqCst);
                        let request = post(&(dice % 20).to_string(), &body);
                        // Send it in two pieces, as a network may deliver it.
                        let (one, two) = request.split_at(request.len() / 2);
                        let mut written = connection.stream.write_all(one.as_bytes()).await;
                        if dice > 90 && written.is_ok() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        if written.is_ok() {
                            written = connection.stream.write_all(two.as_bytes()).await;
                        }
                        match connection.receive().await {
                            Ok(reply) => {
                                assert_eq!((reply.status, &reply.body), (200, &body));
                                (answered, answered_late, fresh) =
                                    (answered + 1, answered_late + u32::from(late), false);
                                if reply.close {
                                    continue 'connections;
                                }
                            }
                            // The closing socket never accepted this connection, so not even its first byte was read.
                            Err(Silence::Nothing) if fresh => {
                                assert!(stopping.load(Ordering::SeqCst), "dropped before the stop");
                                continue 'connections;
                            }
                            Err(silence) => {
                                panic!(
                                    "{body}: {silence:?}, written: {written:?}, stopping: {}",
                                    stopping.load(Ordering::SeqCst)
                                );
                            }
                        }
                    }
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        stopping.store(true, Ordering::SeqCst);
        server.stop();
        let (mut answered, mut late) = (0, 0);
        while let Some(client) = clients.join_next().await {
            let (all, after) = client.unwrap();
            (answered, late) = (answered + all, late + after);
        }
        let drained = server.drained().await;
        assert_eq!(drained.cut, 0);
        assert!(drained.open > 0 && answered > 50 && late > 0, "{drained:?}, {answered} answered, {late} late");
    }
}

#[tokio::test]
async fn a_stop_finishes_what_has_begun_and_closes_what_is_idle() {
    let mut server = Running::start(limits(), None);
    let (mut slow, mut idle, mut silent) = (server.connect().await, server.connect().await, server.connect().await);
    let (mut halved, mut late) = (server.connect().await, server.connect().await);
    assert_eq!(idle.ask("0", "x").await, ok("x", false));
    assert_eq!(late.ask("0", "x").await, ok("x", false));
    assert_eq!(halved.ask("0", "x").await, ok("x", false));
    slow.send(&post("2000", "slow")).await;
    let request = post("0", "halved");
    let (one, two) = request.split_at(30);
    halved.send(one).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begun = std::time::Instant::now();
    server.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(late.ask("0", "within the grace").await, ok("within the grace", true));
    assert_eq!(late.receive().await, Err(Silence::Nothing));
    assert!(TcpStream::connect(server.address).await.is_err(), "the listening socket is closed");
    assert_eq!(idle.receive().await, Err(Silence::Nothing));
    assert_eq!(silent.receive().await, Err(Silence::Nothing));
    assert!(begun.elapsed() >= Duration::from_millis(200), "they had the grace");
    // The slow request did not delay the others.
    assert!(begun.elapsed() < Duration::from_millis(1900), "and no more: {:?}", begun.elapsed());
    // After the grace period, a request that has begun to arrive is still awaited.
    halved.send(two).await;
    assert_eq!(halved.receive().await, ok("halved", true));
    assert_eq!(slow.receive().await, ok("slow", true));
    assert_eq!(server.drained().await, Drained { open: 5, cut: 0 });
}

#[tokio::test]
async fn a_stop_answers_what_waits_in_the_backlog() {
    let mut server = Running::start(Limits { max_connections: 1, ..limits() }, None);
    let mut first = server.connect().await;
    first.send(&post("300", "first")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut client = server.connect().await;
        client.send(&post("0", "waited")).await;
        waiting.push(client);
    }
    server.stop();
    for client in &mut waiting {
        assert_eq!(client.receive().await, ok("waited", true));
    }
    assert_eq!(first.receive().await, ok("first", true));
    assert_eq!(server.drained().await, Drained { open: 21, cut: 0 });
}

#[tokio::test]
async fn a_stop_cuts_what_takes_too_long() {
    let mut server = Running::start(Limits { drain_timeout: Duration::from_millis(400), ..limits() }, None);
    let mut client = server.connect().await;
    client.send(&post("60000", "")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop();
    assert_eq!(client.receive().await, Err(Silence::Nothing));
    assert_eq!(server.drained().await, Drained { open: 1, cut: 1 });
}

#[tokio::test]
async fn at_the_limit_connections_wait_while_all_others_are_worked_for() {
    let mut server = Running::start(Limits { max_connections: 2, ..limits() }, None);
    let (mut one, mut two) = (server.connect().await, server.connect().await);
    one.send(&post("2000", "1")).await;
    two.send(&post("4000", "2")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut three = server.connect().await;
    three.send(&post("0", "3")).await;
    assert!(
        tokio::time::timeout(Duration::from_millis(200), three.receive()).await.is_err(),
        "served beyond the limit"
    );
    // The first connection has its reply and is idle.
    assert_eq!(one.receive().await, ok("1", false));
    assert_eq!(three.receive().await, ok("3", false));
    assert_eq!(one.receive().await, Err(Silence::Nothing));
    assert_eq!(two.receive().await, ok("2", false));
    server.stop();
    assert_eq!(server.drained().await.cut, 0);
}

#[test]
fn a_listener_is_blocked_when_it_is_for_longer_than_a_moment() {
    let blocked = Blocked::default();
    assert!(!blocked.is_full(true) && blocked.why().is_none());
    *blocked.full.lock().unwrap() = standstill::now().checked_sub(MOMENT);
    assert!(blocked.is_full(true) && blocked.why().unwrap().contains("all of them are busy"));
    blocked.is_full(false);
    assert_eq!(blocked.why(), None);
    *blocked.failing.lock().unwrap() = standstill::now().checked_sub(MOMENT);
    assert!(blocked.why().unwrap().contains("cannot be accepted"));
    blocked.is_failing(false);
    assert_eq!(blocked.why(), None);
}

/// A connection that waits for its client, in any state, gives up its place for an active one.
#[tokio::test]
async fn at_the_limit_the_connection_that_has_waited_longest_for_its_client_is_closed() {
    let server = Running::start(Limits { max_connections: 60, ..limits() }, None);
    let mut kept = server.connect().await;
    for kind in ["", "POST /0 HTTP/1.1\r\nHost:", "POST /0 HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nab"] {
        let mut silent = Vec::new();
        for _ in 0..60 {
            let mut connection = server.connect().await;
            connection.send(kind).await;
            silent.push(connection);
        }
        for number in 0..3 {
            let body = number.to_string();
            assert_eq!(server.connect().await.ask("0", &body).await, ok(&body, false), "beside {kind:?}");
        }
        // The oldest connection was closed first.
        assert_eq!(kept.receive().await, Err(Silence::Nothing));
        kept = server.connect().await;
        assert_eq!(kept.ask("0", "x").await, ok("x", false));
    }
}

#[tokio::test]
async fn an_address_has_a_limit_of_its_own() {
    let server = Running::start(Limits { per_address: 3, ..limits() }, None);
    let from = async |address: [u8; 4]| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((address, 0))).unwrap();
        Connection { stream: socket.connect(server.address).await.unwrap(), read: Vec::new() }
    };
    let mut other = from([127, 0, 0, 2]).await;
    assert_eq!(other.ask("0", "x").await, ok("x", false));
    let mut first = from([127, 0, 0, 1]).await;
    assert_eq!(first.ask("0", "x").await, ok("x", false));
    let mut busy = [from([127, 0, 0, 1]).await, from([127, 0, 0, 1]).await];
    for connection in &mut busy {
        connection.send(&post("2000", "busy")).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut next = from([127, 0, 0, 1]).await;
    next.send(&post("2000", "next")).await;
    assert_eq!(first.receive().await, Err(Silence::Nothing));
    // All connections of this address are active: it gets no more. Other addresses do.
    assert_eq!(from([127, 0, 0, 1]).await.receive().await, Err(Silence::Nothing));
    assert_eq!(from([127, 0, 0, 2]).await.ask("0", "y").await, ok("y", false));
    for connection in &mut busy {
        assert_eq!(connection.receive().await, ok("busy", false));
    }
    assert_eq!(next.receive().await, ok("next", false));
    assert_eq!(other.ask("0", "z").await, ok("z", false));
}

#[tokio::test]
async fn a_connection_has_as_long_for_its_first_byte_as_for_a_header() {
    let times = Limits { header_timeout: Duration::from_millis(300), idle_timeout: LONG * 10, ..limits() };
    let server = Running::start(times, None);
    // A connection without any data, and an HTTP/2 connection without a request.
    assert_eq!(server.connect().await.receive().await, Err(Silence::Nothing));
    let mut stream = server.connect().await.stream;
    stream.write_all(&h2::hello()).await.unwrap();
    let mut all = Vec::new();
    let closed = tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await;
    assert!(closed.is_ok(), "an HTTP/2 connection without a request stays");
}

#[tokio::test]
async fn slow_headers_and_idle_connections_are_closed() {
    let short = |header, idle| Limits {
        header_timeout: Duration::from_millis(header),
        idle_timeout: Duration::from_millis(idle),
        ..limits()
    };
    // Idle connections are closed after their time, but not during a request, and not by the limit for headers.
    let server = Running::start(short(400, 1500), None);
    let mut client = server.connect().await;
    assert_eq!(client.ask("2000", "slow").await, ok("slow", false));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(client.ask("0", "still open").await, ok("still open", false));
    let begun = std::time::Instant::now();
    assert_eq!(client.receive().await, Err(Silence::Nothing));
    assert!(begun.elapsed() > Duration::from_millis(1300), "{:?}", begun.elapsed());
    // A connection without any request.
    assert_eq!(server.connect().await.receive().await, Err(Silence::Nothing));

    // A header whose bytes each arrive in time, but whose end is too late.
    let server = Running::start(short(300, 60_000), None);
    let mut client = server.connect().await;
    assert_eq!(client.ask("0", "x").await, ok("x", false));
    tokio::time::sleep(Duration::from_millis(400)).await;
    let begun = std::time::Instant::now();
    for octet in post("0", "").chars() {
        if client.stream.write_all(octet.to_string().as_bytes()).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(client.receive().await, Err(Silence::Nothing));
    assert!(begun.elapsed() > Duration::from_millis(250), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_client_that_is_still_writing_reads_an_early_answer() {
    let server = Running::start(limits(), None);
    let mut client = server.connect().await;
    let body = "x".repeat(4 << 20);
    assert_eq!(client.ask("deaf", &body).await.unwrap().body, "I heard nothing");
    let mut client = server.connect().await;
    assert_eq!(client.ask("0", &body).await, ok("the request's body is too large", false));
}

#[tokio::test]
async fn an_open_connection_is_counted_only_where_asked() {
    let open = crate::observe::metrics::connections_open;
    let listener = Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap().counted();
    let address = listener.local_addr();
    tokio::spawn(run(listener, None, limits(), service_fn(answer), std::future::pending()));
    let before = open();
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut client = Connection { stream: TcpStream::connect(address).await.unwrap(), read: Vec::new() };
        client.ask("0", "x").await.unwrap();
        clients.push(client);
    }
    // Concurrent tests may also hold connections.
    assert!(open() >= before + 40, "{} {before}", open());
    drop(clients);
    for _ in 0..100 {
        if open() < before + 40 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still counted: {} {before}", open());
}

#[test]
fn accept_errors_pause_longer_and_longer() {
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut backoff = Backoff::default();
    assert_eq!(backoff.failure(&io::ErrorKind::ConnectionAborted.into(), address), None);
    let files = io::Error::from_raw_os_error(24);
    let pauses: Vec<_> = (0..9).map(|_| backoff.failure(&files, address).unwrap().as_millis()).collect();
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 640, 640]);
    backoff.success();
    assert_eq!(backoff.failure(&files, address), Some(Duration::from_millis(10)));
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let error = Listener::bind(taken.local_addr()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot listen on {}: ", taken.local_addr())), "{error}");
}

/// Handwritten HTTP/2: enough to send requests without new header names, and to read frames.
mod h2 {
    use super::*;

    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const GOAWAY: u8 = 7;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const ACK: u8 = 1;

    pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    pub(super) fn hello() -> Vec<u8> {
        hello_with(&[])
    }

    /// A client that reads nothing of any answer's body.
    pub(super) fn hello_without_window() -> Vec<u8> {
        hello_with(&[0, 4, 0, 0, 0, 0])
    }

    fn hello_with(settings: &[u8]) -> Vec<u8> {
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, settings)].concat()
    }

    pub(super) fn ping() -> Vec<u8> {
        frame(PING, 0, 0, &[7; 8])
    }

    pub(super) fn get(stream: u32, path: &str) -> Vec<u8> {
        // :method GET, :scheme http, :path literal, :authority literal; no Huffman codes.
        let mut block = vec![0x82, 0x86, 0x04, path.len() as u8];
        block.extend(path.as_bytes());
        block.extend([0x01, 4]);
        block.extend(b"test");
        frame(HEADERS, 0x4 | 0x1, stream, &block)
    }

    /// The next frame that concerns a stream: kind and stream. `None` at the end.
    pub(super) async fn next<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Option<(u8, u32)> {
        loop {
            let mut head = [0; 9];
            tokio::time::timeout(LONG, stream.read_exact(&mut head)).await.unwrap().ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).await.ok()?;
            let (kind, flags) = (head[3], head[4]);
            match kind {
                SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await.unwrap(),
                PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, &payload)).await.unwrap(),
                DATA | HEADERS | GOAWAY => {
                    return Some((kind, u32::from_be_bytes([head[5], head[6], head[7], head[8]])));
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn http2_is_spoken_and_stopped_without_loss() {
    let mut server = Running::start(limits(), None);
    let mut stream = server.connect().await.stream;
    stream.write_all(&h2::hello()).await.unwrap();
    stream.write_all(&h2::get(1, "/0")).await.unwrap();
    assert_eq!(h2::next(&mut stream).await, Some((h2::HEADERS, 1)));
    // Add an idle connection.
    let mut idle = server.connect().await.stream;
    idle.write_all(&h2::hello()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;

    stream.write_all(&h2::get(3, "/600")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begun = std::time::Instant::now();
    server.stop();
    let mut seen = Vec::new();
    while let Some(frame) = h2::next(&mut stream).await {
        seen.push(frame);
    }
    assert!(seen.contains(&(h2::GOAWAY, 0)) && seen.contains(&(h2::HEADERS, 3)), "{seen:?}");
    assert!(begun.elapsed() >= Duration::from_millis(500));
    let mut seen = Vec::new();
    while let Some(frame) = h2::next(&mut idle).await {
        seen.push(frame);
    }
    assert!(seen.contains(&(h2::GOAWAY, 0)), "{seen:?}");
    assert_eq!(server.drained().await, Drained { open: 2, cut: 0 });
}

/// Sends frames again and again on a connection whose client does not read an answer. Returns when it is cut.
async fn until_cut(server: &Running, mut frames: impl FnMut(u32) -> Vec<u8>) {
    let mut stream = server.connect().await.stream;
    stream.write_all(&h2::hello_without_window()).await.unwrap();
    stream.write_all(&h2::get(1, "/large")).await.unwrap();
    let (mut reads, mut writes) = stream.into_split();
    let cut = async {
        let mut all = Vec::new();
        let _ = reads.read_to_end(&mut all).await;
    };
    let sends = async {
        for number in 1.. {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if writes.write_all(&frames(2 * number + 1)).await.is_err() {
                break;
            }
        }
    };
    let ended = async { tokio::join!(cut, sends) };
    tokio::time::timeout(LONG, ended).await.expect("the connection stays");
}

#[tokio::test]
async fn a_client_that_does_not_read_an_answer_is_cut_whatever_else_it_sends_and_reads() {
    // Each beat of the client comes well within the time limits.
    let limits = Limits { idle_timeout: Duration::from_millis(500), body_rate: 1 << 20, ..limits() };
    let server = Running::start(limits, None);
    until_cut(&server, |_| h2::ping()).await;
    // Answers without a body are sent even if nothing is read.
    until_cut(&server, |stream| h2::get(stream, "/0")).await;
}

#[tokio::test]
async fn a_client_that_reads_its_answers_has_the_time_that_they_take() {
    let limits = Limits { idle_timeout: Duration::from_secs(2), body_rate: 64 * 1024, ..limits() };
    let server = Running::start(limits, None);
    let mut client = server.connect().await;
    for _ in 0..3 {
        client.send("GET /large HTTP/1.1\r\nHost: test\r\n\r\n").await;
        assert_eq!(client.receive().await.unwrap().body.len(), LARGE);
    }
    let mut stream = server.connect().await.stream;
    stream.write_all(&[h2::hello(), h2::get(1, "/large")].concat()).await.unwrap();
    // The usual window is one byte smaller than this answer.
    let mut parts = 0;
    while parts < 4 {
        let frame = h2::next(&mut stream).await.unwrap();
        parts += usize::from(frame == (h2::DATA, 1));
    }
}

/// HTTP/2 lets a client send as many requests as it has streams within one turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_the_requests_that_strangers_send_in_a_turn_few_are_worked_on() {
    let begun = Arc::new(Mutex::new(Vec::new()));
    let service = service_fn({
        let begun = begun.clone();
        move |_| {
            let begun = begun.clone();
            async move {
                lock(&begun).push(Instant::now());
                let works = std::time::Instant::now();
                while works.elapsed() < Duration::from_millis(1) {}
                Ok(Response::new(Full::from("")))
            }
        }
    });
    // The waits for turns are half as long as this limit.
    let limits = Limits { header_timeout: Duration::from_secs(2), ..limits() };
    let address = serve_in_debt(limits, None, service).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let requests: Vec<_> = (0..128).flat_map(|number| h2::get(2 * number + 1, "/")).collect();
    stream.write_all(&[h2::hello(), requests].concat()).await.unwrap();
    while lock(&begun).len() < 5 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Each turn that follows begins after a wait.
    let begun = lock(&begun);
    let in_a_turn = begun.iter().filter(|at| at.duration_since(begun[0]) < Duration::from_millis(900)).count();
    assert!(in_a_turn <= 4, "{in_a_turn} requests began in one turn");
}

#[tokio::test]
async fn an_idle_http2_connection_is_closed_even_if_it_answers_no_ping() {
    let limits =
        Limits { header_timeout: Duration::from_millis(200), idle_timeout: Duration::from_millis(200), ..limits() };
    let server = Running::start(limits, None);
    let mut stream = server.connect().await.stream;
    stream.write_all(&h2::hello()).await.unwrap();
    let mut all = Vec::new();
    tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await.unwrap().unwrap();
    assert!(all.windows(9).any(|frame| frame[3] == h2::GOAWAY), "{all:?}");
}

/// A self-signed certificate for `localhost` and its key, made by hand: (certificate PEM, key PEM, certificate DER).
fn certificate() -> (String, String, Vec<u8>) {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.as_ref(), &random).unwrap();
    let tlv = |tag: u8, content: &[u8]| {
        let mut out = vec![tag];
        match content.len() {
            length @ 0..0x80 => out.push(length as u8),
            length @ 0x80..0x100 => out.extend([0x81, length as u8]),
            length => out.extend([0x82, (length >> 8) as u8, length as u8]),
        }
        out.extend(content);
        out
    };
    let sequence = |parts: &[&[u8]]| tlv(0x30, &parts.concat());
    let ecdsa_sha256 = sequence(&[&tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2])]);
    let name = sequence(&[&tlv(0x31, &sequence(&[&tlv(6, &[0x55, 4, 3]), &tlv(0x0c, b"localhost")]))]);
    let public = sequence(&[
        &sequence(&[&tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1]), &tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7])]),
        &tlv(3, &[&[0], pair.public_key().as_ref()].concat()),
    ]);
    let alternative = sequence(&[&tlv(0x82, b"localhost")]);
    let extensions = sequence(&[&sequence(&[&tlv(6, &[0x55, 0x1d, 0x11]), &tlv(4, &alternative)])]);
    let tbs = sequence(&[
        &tlv(0xa0, &tlv(2, &[2])),
        &tlv(2, &[1]),
        &ecdsa_sha256,
        &name,
        &sequence(&[&tlv(0x17, b"200101000000Z"), &tlv(0x17, b"491231235959Z")]),
        &name,
        &public,
        &tlv(0xa3, &extensions),
    ]);
    let signature = pair.sign(&random, &tbs).unwrap();
    let der = sequence(&[&tbs, &ecdsa_sha256, &tlv(3, &[&[0], signature.as_ref()].concat())]);
    let pem = |label: &str, der: &[u8]| {
        let base64 = data_encoding::BASE64.encode(der);
        format!("-----BEGIN {label}-----\n{base64}\n-----END {label}-----\n")
    };
    (pem("CERTIFICATE", &der), pem("PRIVATE KEY", key.as_ref()), der)
}

/// A configuration for `localhost`, and the certificate that its clients trust.
fn tls() -> (ServerTls, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key, der) = certificate();
    let [certificate_path, key_path] = ["tls.pem", "tls.key"].map(|name| folder.path().join(name));
    std::fs::write(&certificate_path, &certificate).unwrap();
    std::fs::write(&key_path, &key).unwrap();
    std::fs::set_permissions(&key_path, std::fs::Permissions::from_mode(0o600)).unwrap();
    (tls_config(&files(&certificate_path, &key_path)).unwrap(), der)
}

/// A client that trusts this certificate.
fn connector(
    trusted: &[u8],
    protocols: &[&[u8]],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.to_vec().into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    tokio_rustls::TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn a_wait_for_a_turn_is_no_part_of_the_time_for_a_handshake() {
    let (config, der) = tls();
    let limits = Limits { header_timeout: Duration::from_secs(1), ..limits() };
    let address = serve_in_debt(limits, Some(config), service_fn(answer)).await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let connector = connector(&der, &[], rustls::DEFAULT_VERSIONS);
    let stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let mut client = Connection { stream, read: Vec::new() };
    assert_eq!(client.ask("0", "served").await, ok("served", false));
}

#[tokio::test]
async fn tls_is_served_with_both_protocols() {
    let (config, der) = tls();
    let mut server = Running::start(Limits { header_timeout: Duration::from_millis(1500), ..limits() }, Some(config));
    let connector = |protocols: &[&[u8]], versions: &[&'static rustls::SupportedProtocolVersion]| {
        connector(&der, protocols, versions)
    };
    let localhost = || "localhost".try_into().unwrap();

    let mut idle = Vec::new();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        for protocols in [&[][..], &[&b"http/1.1"[..]]] {
            let tcp = server.connect().await.stream;
            let stream = connector(protocols, &[version]).connect(localhost(), tcp).await.unwrap();
            let mut client = Connection { stream, read: Vec::new() };
            assert_eq!(client.ask("0", "secret").await, ok("secret", false));
            idle.push(client);
        }
    }
    let tcp = server.connect().await.stream;
    let mut stream = connector(&[b"h2"], rustls::DEFAULT_VERSIONS).connect(localhost(), tcp).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    stream.write_all(&h2::hello()).await.unwrap();
    stream.write_all(&h2::get(1, "/0")).await.unwrap();
    assert_eq!(h2::next(&mut stream).await, Some((h2::HEADERS, 1)));
    // One client is silent after its handshake, another one does not even start it.
    let tcp = server.connect().await.stream;
    let mut silent = connector(&[], rustls::DEFAULT_VERSIONS).connect(localhost(), tcp).await.unwrap();
    assert_eq!(server.connect().await.receive().await, Err(Silence::Nothing));

    let tcp = server.connect().await.stream;
    let stream_in_progress = connector(&[], rustls::DEFAULT_VERSIONS).connect(localhost(), tcp).await.unwrap();
    let mut busy = Connection { stream: stream_in_progress, read: Vec::new() };
    busy.send(&post("400", "busy")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop();
    assert_eq!(busy.receive().await, ok("busy", true));
    for client in &mut idle {
        assert_eq!(client.receive().await, Err(Silence::Nothing));
    }
    while h2::next(&mut stream).await.is_some() {}
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    assert_eq!(server.drained().await.cut, 0);
}

fn files(certificate: &Path, key: &Path) -> crate::config::Tls {
    crate::config::Tls::new(certificate, key)
}

#[test]
fn what_is_wrong_with_tls_files_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key, _) = certificate();
    let (_, other_key, _) = self::certificate();
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let (certificate, key) = (write("c", &certificate), write("k", &key));
    let fault = |certificate: &Path, key: &Path| tls_config(&files(certificate, key)).unwrap_err().to_string();
    let missing = folder.path().join("missing");
    let empty = write("e", "nothing");
    assert!(fault(&missing, &key).contains("missing: No such file"), "{}", fault(&missing, &key));
    assert!(fault(&empty, &key).contains("/e: it is text without a PEM block"), "{}", fault(&empty, &key));
    let said = fault(&certificate, &empty);
    assert!(said.contains("/e: it is text") && said.contains("a private key is needed"), "{said}");
    let said = fault(&certificate, &write("o", &other_key));
    assert!(said.contains("cannot be used together: the key is that of another certificate"), "{said}");
    tls_config(&files(&certificate, &key)).unwrap();
}
