//! Measures the server's memory for an idle connection. This is a test of its own, because it counts the memory of
//! the whole process.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use claviger::config::Tls;
use claviger::http::server::{self, Limits, Listener};
use claviger::tls::tls_config;
use claviger_tests::PATIENCE;
use claviger_tests::authority::Authority;
use claviger_tests::idle::{Opener, Speaks};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use peak_alloc::PeakAlloc;
use tokio::runtime::Runtime;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const CONNECTIONS: usize = 300;

/// Limit of the memory for a connection, in bytes: twice the value that was measured when this test was written, without
/// optimisation.
fn bound(speaks: Speaks) -> usize {
    match speaks {
        Speaks::Http1 => 14 * 1024,
        Speaks::Https1 => 28 * 1024,
        Speaks::Http2 => 914 * 1024,
        Speaks::Https2 => 100 * 1024,
    }
}

async fn answer(_: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::from("an answer")))
}

/// Starts a server in this process.
fn serve(runtime: &Runtime, speaks: Speaks) -> SocketAddr {
    let folder = tempfile::tempdir().unwrap();
    let tls = speaks.is_encrypted().then(|| {
        let (certificate, key) =
            Authority::new(folder.path(), "authority").issue("server", "/CN=localhost", "DNS:localhost");
        Arc::new(ArcSwap::from_pointee(tls_config(&Tls::new(certificate, key)).unwrap()))
    });
    let _inside = runtime.enter();
    let listener = Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = listener.local_addr();
    let limits = Limits { idle_timeout: Duration::from_secs(600), ..Limits::default() };
    runtime.spawn(server::run(listener, tls, limits, service_fn(answer), std::future::pending()));
    address
}

/// Waits until a value no longer changes: a connection releases memory when it has been idle for a moment.
fn settled(value: impl Fn() -> usize) -> usize {
    let begun = Instant::now();
    let mut before = value();
    loop {
        std::thread::sleep(Duration::from_secs(2));
        let now = value();
        if now == before || begun.elapsed() > PATIENCE {
            return now;
        }
        before = now;
    }
}

#[test]
fn an_idle_connection_takes_little_memory() {
    let runtime = Runtime::new().unwrap();
    let mut report = String::new();
    let mut passed = true;
    for speaks in Speaks::ALL {
        let opener = Opener::new(serve(&runtime, speaks), speaks);
        // Memory that is allocated only once.
        let first = opener.open("/");
        let before = ALLOCATOR.current_usage();
        let idle: Vec<_> = (0..CONNECTIONS).map(|_| opener.open("/")).collect();
        let each = || ALLOCATOR.current_usage().saturating_sub(before) / CONNECTIONS;
        let taken = settled(each);
        passed &= taken <= bound(speaks);
        report += &format!("\n{speaks}: {taken} bytes for each of {CONNECTIONS} idle connections");
        drop((first, idle));
    }
    println!("{report}");
    assert!(passed, "{report}");
}
