//! Tests of the limits of the HTTP layer, on raw sockets.

use std::io::Read;
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger_protocol::attestation::parse_error_reply;
use claviger_protocol::error::{Code, Refusal};
use claviger_tests::raw::{Connection, Silence, get, post, post_head};
use claviger_tests::{ATTEST, Daemon, Lab, METADATA, Options, PATIENCE, ROLL, block, open_release, roll_request};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinSet;

const MIB: usize = 1024 * 1024;

/// Checks that an ordinary client is served.
fn works(daemon: &Daemon) {
    let answer = Connection::open(daemon.address()).unwrap().exchange(&get(METADATA)).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Reads until the server ends the connection.
fn until_closed(connection: &mut Connection) -> Vec<u8> {
    let mut rest = Vec::new();
    match connection.stream.read_to_end(&mut rest) {
        Ok(_) => {}
        // A reset also counts as an end.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "not closed: {error}"),
    }
    rest
}

#[test]
fn who_is_slow_is_cut_and_nobody_else() {
    let lab = Lab::make(Options::default());
    lab.configure(|config| {
        config.server.header_timeout_ms = 1000;
        config.server.body_timeout_ms = 2000;
        config.server.idle_timeout_ms = 2500;
    });
    let daemon = lab.serve();
    let open = || Connection::open(daemon.address()).unwrap();

    // A header that does not end, sent in one piece and byte by byte.
    let mut stalled = open();
    stalled.send(b"POST /KeyProtection HTTP/1.1\r\nHost:").unwrap();
    let mut dripping = open();
    let mut writer = dripping.stream.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        use std::io::Write;
        let begun = Instant::now();
        writer.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
        while writer.write_all(b"x").is_ok() {
            assert!(begun.elapsed() < PATIENCE, "a header may take for ever");
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    // A connection without any bytes, one that is idle after an answer, and one whose body does not arrive.
    let mut silent = open();
    let mut idle = open();
    assert_eq!(idle.exchange(&get(METADATA)).unwrap().status, 200);
    let mut release = open();
    release.send(&post_head(ROLL, "application/xml", 1000)).unwrap();
    release.send(b"<x").unwrap();
    let mut attestation = open();
    attestation.send(&post_head(ATTEST, "application/json", 1000)).unwrap();
    works(&daemon);
    let answer = release.answer().unwrap();
    assert_eq!((answer.status, Refusal::parse(&answer.body).unwrap().code), (408, Code::RequestTimeout));
    let answer = attestation.answer().unwrap();
    let reply = parse_error_reply(&answer.body).unwrap();
    assert_eq!((answer.status, &*reply.name, reply.retryable), (408, "ErrorReply", true));
    for connection in [&mut stalled, &mut dripping, &mut silent, &mut idle] {
        let rest = until_closed(connection);
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
    drip.join().unwrap();
    works(&daemon);
    assert!(daemon.stop().success());
}

#[test]
fn what_is_too_much_is_refused_and_nobody_else_is_harmed() {
    let (daemon, _lab) = Lab::start(Options::default());
    let open = || Connection::open(daemon.address()).unwrap();

    // Bodies at the limit and one byte above it, from a client that sends everything before it reads.
    for (path, media_type) in [(ROLL, "application/xml"), (ATTEST, "application/json")] {
        let answer = open().exchange(&post(path, media_type, &vec![b' '; MIB])).unwrap();
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
        let answer = open().exchange(&post(path, media_type, &vec![b' '; MIB + 1])).unwrap();
        assert_eq!(answer.status, 413, "{path}: {}", answer.text());
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: {media_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        let chunk = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
        let whole = [head.into_bytes(), chunk.repeat(MIB / 0x10000), b"1\r\n \r\n0\r\n\r\n".to_vec()].concat();
        let mut connection = open();
        let answer = connection.exchange(&whole).unwrap();
        assert_eq!(answer.status, 413, "{path}, chunked: {}", answer.text());
        // If the server keeps the connection, it still works.
        if !answer.closes() {
            assert_eq!(connection.exchange(&get(METADATA)).unwrap().status, 200);
        }
    }

    // Requests that arrive in one piece are answered in their order.
    let mut connection = open();
    let requests = [get(METADATA), get("/Attestation/getinfo"), post(ROLL, "text/plain", b"x"), get("/nothing")];
    connection.send(&requests.concat()).unwrap();
    let answers = requests.map(|_| connection.answer().unwrap().status);
    assert_eq!(answers, [200, 200, 415, 404]);

    // Bytes that are not HTTP.
    let mut good = open();
    assert_eq!(good.exchange(&get(METADATA)).unwrap().status, 200);
    let large = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 200 * 1024], b"\r\n\r\n".to_vec()].concat();
    let twice = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx".to_vec();
    let both = b"POST /Attestation/v2.0/hostkeyattest HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n\
        Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n"
        .to_vec();
    for garbage in [b"\x16\x03\x01\x02\x00\x01\x00".repeat(40), b"GARBAGE\r\n\r\n".to_vec(), large, twice] {
        let mut connection = open();
        match connection.exchange(&garbage) {
            Ok(answer) => assert!((400..500).contains(&answer.status), "{}", answer.status),
            Err(Silence::Closed) => {}
            Err(other) => panic!("{other:?}"),
        }
        assert_eq!(good.exchange(&get(METADATA)).unwrap().status, 200);
    }
    // Two contradictory lengths: the server must not answer both interpretations.
    let mut connection = open();
    if let Ok(first) = connection.exchange(&both) {
        assert!(first.status == 400, "{}", first.status);
    }

    // Many idle connections and one that is served; then all of them are served.
    let mut idle: Vec<Connection> = (0..200).map(|_| open()).collect();
    works(&daemon);
    for connection in &mut idle {
        assert_eq!(connection.exchange(&get("/Attestation/getinfo")).unwrap().status, 200);
    }
    assert!(block(daemon.metrics()).count("claviger_connections_open", &[]) >= 200);
    drop(idle);
    works(&daemon);
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_is_spoken_by_who_knows_that_it_is() {
    let (daemon, lab) = Lab::start(Options::default());
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let stream = tokio::net::TcpStream::connect(daemon.address()).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.unwrap();
    let driven = tokio::spawn(connection);
    let release = Bytes::from(roll_request(&health, &lab.protector()));
    let mut asking = JoinSet::new();
    for turn in 0..40 {
        let mut sender = sender.clone();
        let uri = |path: &str| format!("{}{path}", daemon.url);
        let request = if turn % 2 == 0 {
            Request::get(uri(METADATA)).body(Full::default()).unwrap()
        } else {
            Request::post(uri(ROLL)).header("content-type", "application/xml").body(Full::new(release.clone())).unwrap()
        };
        asking.spawn(async move {
            let reply = sender.send_request(request).await.unwrap();
            let status = reply.status();
            (turn, status, reply.into_body().collect().await.unwrap().to_bytes())
        });
    }
    let (key, identity) = (lab.owner().open(&lab.protector()).unwrap(), lab.identity());
    while let Some(asked) = asking.join_next().await {
        let (turn, status, body) = asked.unwrap();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        if turn % 2 == 1 {
            assert!(*open_release(&body, &identity).unwrap().0.ingress == *key);
        }
    }
    // A body that is too large.
    let mut sender = sender;
    let large = Request::post(format!("{}{ROLL}", daemon.url)).header("content-type", "application/xml");
    let reply = sender.send_request(large.body(Full::new(Bytes::from(vec![b' '; MIB + 1]))).unwrap()).await.unwrap();
    assert_eq!(reply.status(), 413);
    drop(sender);
    driven.await.unwrap().unwrap();
    assert!(daemon.stop().success());
}
