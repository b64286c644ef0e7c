//! Tests of both sides of the socket.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::admin::call;
use crate::admin::error::PATH_LIMIT;
use tokio::io::{AsyncBufReadExt, AsyncReadExt};
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
    // A panic affects only its own command.
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
    stream.write_all(b"{\"command\":\"echo\",\"value\":1}\n{\"command\":\"echo\",\"value\":2}\nno\n").await.unwrap();
    let mut reader = BufReader::new(&mut stream);
    for expected in ["{\"ok\":1}\n", "{\"ok\":2}\n", "{\"error\":\"the request is not JSON: "] {
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        assert!(line.starts_with(expected), "{line}");
    }
    // The daemon reads only a part of it.
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
    // A listener without the lock also counts as alive.
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
    // The oldest connections were closed.
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
    // One client waits until its time limit, one leaves at once, one is aborted by the stop.
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
    // The longest allowed path works.
    let folder = tempfile::tempdir().unwrap();
    let room = PATH_LIMIT - folder.path().as_os_str().len() - 1;
    stop(start(&folder.path().join("x".repeat(room)))).await;
}
