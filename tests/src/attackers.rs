//! Attackers on the service: unregistered callers that repeat one costly action until they are stopped. They run on threads
//! of their own, while a test runs honest load.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::attestation::{self, ResultType};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;

use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::paths::{ATTEST, METADATA, ROLL};

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";
const OTHER_MODE: &str = "/Attestation/v2.0/attest";
const MIB: usize = 1024 * 1024;
/// Number of connections held by one attacker that only holds connections.
const HELD: usize = 5;
/// Number of streams that an attacker opens at once; the server may allow fewer.
const STREAMS: u32 = 128;

/// Action of an attacker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Connects and sends nothing.
    Silent,
    /// Connects to the metrics address and sends nothing.
    SilentAtMetrics,
    /// Sends a header, one byte from time to time.
    Header,
    /// Announces the body of a release and sends one byte of it.
    Announced,
    /// Announces the largest batch and sends one byte of it.
    AnnouncedBatch,
    /// Sends a body just fast enough.
    Dripping,
    /// Sends a batch of 16 MiB without any certificate.
    LargeBatch,
    /// Opens as many HTTP/2 streams as possible, each with a body that never arrives.
    Streams,
    /// Sends HTTP/2 requests and resets each one at once.
    Resets,
    /// Requests documents over HTTP/2 and reads no answer.
    Unread,
    /// Requests documents over HTTP/1.1 and reads no answer.
    UnreadPipeline,
    /// Attests with a JSON body of 1 MiB.
    LargeJson,
    /// Attests with a host key of 8192 bits.
    LargeKeys,
    /// Sends a release with 1 MiB of XML.
    LargeXml,
    /// Repeats a recorded attestation request of a registered host.
    Replay,
    /// Sends invalid data to every endpoint.
    Junk,
    /// Attests with a mebibyte at the endpoint of the mode that is not configured.
    OtherMode,
    /// Asks for documents over HTTP/2, as many as it can, and comes back on another connection.
    Documents,
    /// Asks for a document on a connection of its own, again and again.
    Reconnects,
    /// Begins TLS handshakes, and leaves when the server has answered. Needs a daemon that speaks TLS.
    Handshakes,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 20] = [
        Self::Silent,
        Self::SilentAtMetrics,
        Self::Header,
        Self::Announced,
        Self::AnnouncedBatch,
        Self::Dripping,
        Self::LargeBatch,
        Self::Streams,
        Self::Resets,
        Self::Unread,
        Self::UnreadPipeline,
        Self::LargeJson,
        Self::LargeKeys,
        Self::LargeXml,
        Self::Replay,
        Self::Junk,
        Self::OtherMode,
        Self::Documents,
        Self::Reconnects,
        Self::Handshakes,
    ];

    /// Returns a line that describes the kind.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Silent => "silent connections",
            Self::SilentAtMetrics => "silent connections to the metrics address",
            Self::Header => "headers, byte by byte",
            Self::Announced => "bodies announced, not sent",
            Self::AnnouncedBatch => "batches announced, not sent",
            Self::Dripping => "bodies just fast enough",
            Self::LargeBatch => "batches of 16 MiB without a certificate",
            Self::Streams => "HTTP/2 streams without bodies",
            Self::Resets => "HTTP/2 requests taken back",
            Self::Unread => "HTTP/2 answers not read",
            Self::UnreadPipeline => "HTTP/1.1 answers not read",
            Self::LargeJson => "attestations of 1 MiB",
            Self::LargeKeys => "attestations with 8192-bit keys",
            Self::LargeXml => "releases of 1 MiB",
            Self::Replay => "attestation replayed",
            Self::Junk => "junk to every endpoint",
            Self::OtherMode => "attestations of 1 MiB in the other mode",
            Self::Documents => "HTTP/2 documents on ever new connections",
            Self::Reconnects => "a connection for each document",
            Self::Handshakes => "TLS handshakes",
        }
    }

    /// Returns true if this kind attacks only a daemon that speaks TLS.
    #[must_use]
    pub fn needs_tls(self) -> bool {
        self == Self::Handshakes
    }
}

/// Target of the attackers, with prepared requests.
pub struct Target {
    service: SocketAddr,
    metrics: SocketAddr,
    requests: Requests,
}

struct Requests {
    replay: Vec<u8>,
    large_keys: Vec<u8>,
    large_json: Vec<u8>,
    large_xml: Vec<u8>,
    large_batch: Vec<u8>,
    other_mode: Vec<u8>,
    client_hello: Vec<u8>,
    junk: Vec<Vec<u8>>,
}

impl Target {
    /// Prepares attacks on a daemon that serves a lab.
    ///
    /// # Panics
    /// If the daemon's addresses cannot be read.
    #[must_use]
    pub fn new(lab: &Lab, daemon: &Daemon) -> Arc<Self> {
        let metrics = daemon.metrics_url.split_once("://").unwrap().1.parse().unwrap();
        Arc::new(Self { service: daemon.address(), metrics, requests: Requests::of(lab) })
    }
}

impl Requests {
    fn of(lab: &Lab) -> Self {
        let (host, identity) = (lab.key("host/hostkey.pem"), lab.identity());
        let json = |body: &[u8]| post(ATTEST, "application/json", body.len(), body);
        let xml = |path, body: &[u8]| post(path, "application/xml", body.len(), body);
        // A public key that verifies nothing needs no private key.
        let mut modulus = vec![0; 1024];
        SystemRandom::new().fill(&mut modulus).unwrap();
        modulus[0] |= 0x80;
        modulus[1023] |= 1;
        let large = RsaPublicKey::from_components(&modulus, &[1, 0, 1]).unwrap();
        let item = format!("{{\"m_Item1\":77,\"m_Item2\":\"{}\"}},", "A".repeat(40));
        let items = item.repeat((MIB - 4096) / item.len());
        let large_json = format!(
            "{{\"__type\":\"AttestationRequest:#Microsoft.Windows.RemoteAttestation.Core\",\"SessionId\":\"x\",\
             \"RequestedContent\":[1],\"ProvidedContent\":[{}]}}",
            items.trim_end_matches(',')
        );
        let elements = "<a b=\"c\">d</a>".repeat((MIB - 4096) / 14 / 16);
        let padding = "x".repeat(MIB - 8192 - elements.len());
        let large_xml = format!(
            "<RollTransportKeyRequest xmlns=\"http://schemas.microsoft.com/kps/2014/07\"><IngressProtector>{elements}\
             {padding}</IngressProtector></RollTransportKeyRequest>"
        );
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: t\r\n\r\n").into_bytes();
        let rubbish = b"<Envelope>{}[]".repeat(64);
        Self {
            replay: json(&attest(&host, host.public(), identity.public())),
            large_keys: json(&attest(&host, &large, &large)),
            other_mode: post(OTHER_MODE, "application/json", large_json.len(), large_json.as_bytes()),
            client_hello: client_hello(),
            large_json: json(large_json.as_bytes()),
            large_xml: xml(ROLL, large_xml.as_bytes()),
            large_batch: xml(BATCH, &vec![b' '; 16 * MIB]),
            junk: vec![
                xml(ROLL, &rubbish),
                xml("/KeyProtection/service/v1.0/RollTransportKey", b"<RollTransportKeyRequest/>"),
                xml(BATCH, &rubbish),
                json(&rubbish),
                json(b"{\"__type\":\"AttestationRequest:#Microsoft.Windows.RemoteAttestation.Core\"}"),
                xml(OTHER_MODE, &rubbish),
                get(METADATA),
                get("/Attestation/getinfo"),
                get("/Attestation/v2.0/signingcertificates"),
                get("/nothing"),
            ],
        }
    }
}

/// What a client of TLS sends first.
fn client_hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let server = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), server).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

/// An attestation's body, with a signature of `signer`.
fn attest(signer: &RsaPrivateKey, host: &RsaPublicKey, identity: &RsaPublicKey) -> Vec<u8> {
    let (host, identity) = (host.spki_der(), identity.spki_der());
    let signed = attestation::signed_octets(host, identity);
    let mut signature = signer.sign(SignatureAlgorithm::DEFAULT, &signed).unwrap();
    if host.len() > 1000 {
        // As long as the key's own signature, and below its modulus.
        signature = vec![1; 1024];
    }
    attestation::host_key_request([7; 16], &[ResultType::EncryptionCertificate], host, identity, &signature)
}

/// Returns a request that announces a body of `length` bytes and contains `body`.
fn post(path: &str, media_type: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head =
        format!("POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

/// Number and manners of attackers.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    /// Number of attackers.
    pub attackers: usize,
    /// Pause between two requests of an attacker that repeats requests.
    pub pause: Duration,
    /// Priority of their threads. At 19 they use the processor time that others leave, as if they ran on another machine.
    pub nice: i32,
    /// Addresses from which they connect.
    pub addresses: Addresses,
}

/// Addresses from which attackers connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addresses {
    /// The address of the honest hosts, as if all were behind one gateway.
    OfHosts,
    /// One address of their own for all attackers.
    One,
    /// An address of its own for each attacker.
    Many,
}

impl Addresses {
    fn of(self, number: usize) -> Ipv4Addr {
        let [.., high, low] = number.to_be_bytes();
        match self {
            Self::OfHosts => Ipv4Addr::LOCALHOST,
            Self::One => Ipv4Addr::new(127, 0, 0, 66),
            Self::Many => Ipv4Addr::new(127, 66, high, low),
        }
    }
}

/// Address of a server, and the address from which to connect to it.
#[derive(Clone, Copy)]
struct Route {
    from: Ipv4Addr,
    to: SocketAddr,
}

impl Route {
    async fn connect(self) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.from, 0).into())?;
        socket.connect(self.to).await
    }
}

/// Running attackers. They stop when this is dropped.
pub struct Attack {
    runtime: Option<Runtime>,
}

impl Attack {
    /// What the attackers' threads are called.
    pub const THREADS: &str = "attacker";

    /// Starts attackers of one kind.
    ///
    /// # Panics
    /// If the system cannot start threads.
    #[must_use]
    pub fn start(kind: Kind, target: &Arc<Target>, crowd: Crowd) -> Self {
        let Crowd { attackers, pause, nice, addresses } = crowd;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(Self::THREADS)
            .on_thread_start(move || {
                // Of this thread alone, on Linux.
                let _ = rustix::process::setpriority_process(None, nice);
            })
            .enable_all()
            .build()
            .unwrap();
        for number in 0..attackers {
            let target = target.clone();
            let from = addresses.of(number);
            runtime.spawn(async move {
                loop {
                    // The outcome does not matter: the next attempt follows.
                    let _ = once(kind, &target, from, pause).await;
                    tokio::time::sleep(pause.max(Duration::from_millis(20))).await;
                }
            });
        }
        Self { runtime: Some(runtime) }
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

type Done<'a> = Pin<Box<dyn Future<Output = std::io::Result<()>> + Send + 'a>>;

/// Performs an attacker's action once, until the server cuts it off.
fn once(kind: Kind, target: &Target, from: Ipv4Addr, pause: Duration) -> Done<'_> {
    let requests = &target.requests;
    let service = Route { from, to: target.service };
    let metrics = Route { from, to: target.metrics };
    let body = |path: &str, length, sent: &[u8]| post(path, "application/xml", length, sent);
    match kind {
        Kind::Silent => Box::pin(hold(service, HELD, Vec::new())),
        Kind::SilentAtMetrics => Box::pin(hold(metrics, HELD, Vec::new())),
        Kind::Header => Box::pin(drip(service, b"GET / HTTP/1.1\r\nHost: t\r\nX: ".to_vec(), 1, 200)),
        Kind::Announced => Box::pin(hold(service, HELD, body(ROLL, MIB, b"<"))),
        Kind::AnnouncedBatch => Box::pin(hold(service, HELD, body(BATCH, 16 * MIB, b"<"))),
        Kind::Dripping => Box::pin(drip(service, body(ROLL, MIB, &[b' '; 16 * 1024]), 1024, 100)),
        Kind::LargeBatch => Box::pin(ask(service, std::slice::from_ref(&requests.large_batch), pause)),
        Kind::Streams => Box::pin(streams(service)),
        Kind::Resets => Box::pin(resets(service, pause)),
        Kind::Unread => Box::pin(unread(service)),
        Kind::UnreadPipeline => {
            let get = format!("GET {METADATA} HTTP/1.1\r\nHost: t\r\n\r\n");
            Box::pin(hold(service, 1, get.repeat(400).into_bytes()))
        }
        Kind::LargeJson => Box::pin(ask(service, std::slice::from_ref(&requests.large_json), pause)),
        Kind::LargeKeys => Box::pin(ask(service, std::slice::from_ref(&requests.large_keys), pause)),
        Kind::LargeXml => Box::pin(ask(service, std::slice::from_ref(&requests.large_xml), pause)),
        Kind::Replay => Box::pin(ask(service, std::slice::from_ref(&requests.replay), pause)),
        Kind::Junk => Box::pin(ask(service, &requests.junk, pause)),
        Kind::OtherMode => Box::pin(ask(service, std::slice::from_ref(&requests.other_mode), pause)),
        Kind::Documents => Box::pin(many(service, |service| Box::pin(documents(service)))),
        Kind::Reconnects => {
            let get = format!("GET {METADATA} HTTP/1.1\r\nHost: t\r\n\r\n").into_bytes();
            Box::pin(many(service, move |service| Box::pin(exchange(service, get.clone()))))
        }
        Kind::Handshakes => {
            let hello = requests.client_hello.clone();
            Box::pin(many(service, move |service| Box::pin(exchange(service, hello.clone()))))
        }
    }
}

/// Opens connections, writes the same bytes on each, and holds them until the server closes the first one.
async fn hold(route: Route, connections: usize, written: Vec<u8>) -> std::io::Result<()> {
    let mut held = Vec::new();
    for _ in 0..connections {
        let mut stream = route.connect().await?;
        // Writes as much as the socket takes at once.
        let _ = tokio::time::timeout(Duration::from_millis(100), stream.write_all(&written)).await;
        held.push(stream);
    }
    loop {
        for stream in &held {
            if is_closed(stream).await {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Returns true if the other side has closed the connection. Reads nothing from it.
async fn is_closed(stream: &TcpStream) -> bool {
    let ready = tokio::time::timeout(Duration::from_millis(1), stream.ready(Interest::READABLE)).await;
    ready.is_ok_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
}

/// Writes `begin`, and then `bytes` bytes at intervals of `milliseconds`.
async fn drip(route: Route, begin: Vec<u8>, bytes: usize, milliseconds: u64) -> std::io::Result<()> {
    let mut stream = route.connect().await?;
    stream.write_all(&begin).await?;
    loop {
        stream.write_all(&vec![b'x'; bytes]).await?;
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }
}

/// Sends the requests one after the other on one connection and reads the answers.
async fn ask(route: Route, requests: &[Vec<u8>], pause: Duration) -> std::io::Result<()> {
    let mut stream = route.connect().await?;
    let mut read = vec![0; 64 * 1024];
    for request in requests.iter().cycle() {
        let (mut reader, mut writer) = stream.split();
        // An early answer stops the writing.
        let answered = tokio::select! {
            written = writer.write_all(request) => {
                written?;
                reader.read(&mut read).await?
            }
            answered = reader.read(&mut read) => answered?,
        };
        if answered == 0 || !read.starts_with(b"HTTP/1.1 200") && request.len() > MIB {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(crate) fn hello() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[]), &frame(4, 1, 0, &[])].concat()
}

/// Returns the header frame of a request without a body.
pub(crate) fn h2_get(stream: u32, path: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x86, 0x04, path.len() as u8];
    block.extend(path.as_bytes());
    block.extend(b"\x01\x01t");
    frame(1, 0x5, stream, &block)
}

/// Returns the header frame of a request whose body follows.
fn h2_post(stream: u32, path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, path.len() as u8];
    block.extend(path.as_bytes());
    block.extend(b"\x01\x01t");
    // The name content-type, whose index needs more than the prefix of the first byte.
    block.extend(b"\x0f\x10\x0fapplication/xml");
    frame(1, 0x4, stream, &block)
}

/// Reads and discards everything until the end.
async fn swallow(mut stream: TcpStream) -> std::io::Result<()> {
    let mut read = vec![0; 64 * 1024];
    while stream.read(&mut read).await? > 0 {}
    Ok(())
}

async fn streams(route: Route) -> std::io::Result<()> {
    let mut stream = route.connect().await?;
    let requests = (0..STREAMS).flat_map(|number| h2_post(2 * number + 1, BATCH));
    stream.write_all(&hello().into_iter().chain(requests).collect::<Vec<_>>()).await?;
    swallow(stream).await
}

async fn resets(route: Route, pause: Duration) -> std::io::Result<()> {
    let stream = route.connect().await?;
    let (mut reader, mut writer) = stream.into_split();
    let reading = tokio::spawn(async move {
        let mut read = vec![0; 64 * 1024];
        while reader.read(&mut read).await.is_ok_and(|read| read > 0) {}
    });
    writer.write_all(&hello()).await?;
    for number in 0..1_000_000 {
        let stream = 2 * number + 1;
        let request = [h2_get(stream, METADATA), frame(3, 0, stream, &[0, 0, 0, 8])].concat();
        writer.write_all(&request).await?;
        if reading.is_finished() {
            break;
        }
        if number % 8 == 7 {
            tokio::time::sleep(pause).await;
        }
    }
    Ok(())
}

async fn unread(route: Route) -> std::io::Result<()> {
    let requests: Vec<u8> = (0..STREAMS).flat_map(|number| h2_get(2 * number + 1, METADATA)).collect();
    hold(route, 1, [hello(), requests].concat()).await
}

type Visit = Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>>;

/// Some connections at the same time, each of which is opened again as soon as it was closed, until the system has no more.
async fn many(route: Route, visit: impl Fn(Route) -> Visit + Clone + Send + 'static) -> std::io::Result<()> {
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..HELD {
        let visit = visit.clone();
        all.spawn(async move {
            loop {
                if let Err(error) = visit(route).await
                    && !matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
                {
                    return Err::<(), _>(error);
                }
            }
        });
    }
    // It ends with the first that fails; the others are dropped with it.
    all.join_next().await.map_or(Ok(()), |ended| ended.unwrap_or(Ok(())))
}

/// Opens a connection, sends something, and leaves when an answer begins.
async fn exchange(route: Route, sent: Vec<u8>) -> std::io::Result<()> {
    let mut stream = route.connect().await?;
    stream.write_all(&sent).await?;
    let _ = stream.read(&mut vec![0; 16 * 1024]).await?;
    Ok(())
}

/// Asks for as many documents as one connection may have at once, and reads until all are there or the connection is closed.
async fn documents(route: Route) -> std::io::Result<()> {
    const PATHS: [&str; 3] = [METADATA, "/Attestation/getinfo", "/Attestation/v2.0/signingcertificates"];
    let mut stream = route.connect().await?;
    let requests = (0..STREAMS).flat_map(|at| h2_get(2 * at + 1, PATHS[at as usize % PATHS.len()]));
    // All answers fit into the window.
    let window = frame(8, 0, 0, &(1_u32 << 30).to_be_bytes());
    stream.write_all(&hello().into_iter().chain(window).chain(requests).collect::<Vec<_>>()).await?;
    let (mut read, mut answered) = (Vec::new(), 0);
    while answered < STREAMS {
        if stream.read_buf(&mut read).await? == 0 {
            break;
        }
        let mut at = 0;
        while let Some(head) = read.get(at..at + 9) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            if read.len() < at + 9 + length {
                break;
            }
            // DATA and HEADERS that end a stream.
            answered += u32::from(head[3] <= 1 && head[4] & 1 == 1);
            at += 9 + length;
        }
        read.drain(..at);
    }
    Ok(())
}
