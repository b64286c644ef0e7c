//! Tests that play the worker's end of the socket, with valid and invalid frames.

use std::os::fd::OwnedFd;
use std::sync::mpsc;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::*;
use crate::code::Function;
use crate::link::{Call, Level, Request, encode, pair};

const LIMITS: Limits = Limits { share: Duration::from_millis(50), watchdog: Duration::from_millis(100) };

/// Guard of a call; its receiver sees when the guard is dropped.
type Guard = mpsc::Sender<()>;

struct Peer {
    socket: OwnedFd,
    talk: Conversation<Guard>,
}

impl Peer {
    fn new() -> Self {
        let (daemon, socket) = pair().unwrap();
        Peer { socket, talk: Conversation::new(DaemonEnd::new(daemon).unwrap(), 1) }
    }

    fn submit(&self) -> (Waiting, mpsc::Receiver<()>) {
        let (guard, given_back) = mpsc::channel();
        match self.talk.submit(&Job::new(&Request::Random(4)).unwrap(), LIMITS, guard) {
            Ok(waiting) => (waiting, given_back),
            Err(_) => panic!("not sent"),
        }
    }

    /// Receives a call and returns its id.
    fn next(&self) -> u32 {
        let mut buffer = [0; 1024];
        let (len, _) = recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT).unwrap();
        let call = Call::decode(&buffer[..len]).unwrap();
        assert!(matches!(call.request, Request::Random(4)));
        call.id
    }

    fn say(&self, report: &Report<'_>) {
        self.send(&encode(report).unwrap());
    }

    fn send(&self, frame: &[u8]) {
        assert_eq!(send(&self.socket, frame, SendFlags::NOSIGNAL).unwrap(), frame.len());
    }

    /// Ends the worker, and returns the reason that the reader gives after it has read all reports.
    async fn end(self, tell: impl FnMut(News<'_>)) -> (WorkerFault, Conversation<Guard>) {
        drop(self.socket);
        match self.talk.read(tell).await.error {
            HsmError::Worker(fault) => (fault, self.talk),
            error => panic!("{error}"),
        }
    }

    async fn fault(self) -> WorkerFault {
        self.end(|_| {}).await.0
    }
}

fn bytes(id: u32, bytes: &[u8]) -> Report<'_> {
    let cost = Cost { took: Duration::from_nanos(7), processor: Duration::from_nanos(5) };
    Report::Reply { id, cost, result: Ok(Answer::Bytes(bytes)) }
}

fn reply(waiting: &mut Waiting) -> CallResult {
    waiting.try_recv().unwrap().unwrap()
}

fn value(waiting: &mut Waiting) -> Vec<u8> {
    match reply(waiting).result {
        Ok(Value::Bytes(bytes)) => bytes.to_vec(),
        _ => panic!("no bytes"),
    }
}

#[tokio::test]
async fn replies_come_in_any_order_and_find_their_callers() {
    let peer = Peer::new();
    let (mut first, place) = peer.submit();
    let (mut second, _) = peer.submit();
    let ids = [peer.next(), peer.next()];
    peer.say(&bytes(ids[1], b"two"));
    peer.say(&bytes(ids[0], b"one"));
    let mut at_once = Vec::new();
    let (fault, _talk) = peer
        .end(|news| match news {
            News::Replies(count) => at_once.push(count),
            _ => panic!("nothing else was said"),
        })
        .await;
    assert_eq!(fault, WorkerFault::Gone);
    assert_eq!((value(&mut first), value(&mut second)), (b"one".to_vec(), b"two".to_vec()));
    assert_eq!(place.try_recv(), Err(mpsc::TryRecvError::Disconnected), "the place is given back");
}

#[tokio::test]
async fn a_frame_that_is_torn_at_any_byte_ends_the_conversation() {
    let whole = encode(&bytes(1, &[0xab; 40])).unwrap();
    for len in 1..whole.len() {
        let peer = Peer::new();
        let (mut waiting, _) = peer.submit();
        peer.send(&whole[..len]);
        assert_eq!(peer.fault().await, WorkerFault::Unreadable, "{len} bytes");
        assert!(waiting.try_recv().is_err());
    }
}

#[tokio::test]
async fn damaged_frames_do_no_harm() {
    let whole = encode(&bytes(1, &[7; 8])).unwrap();
    for at in 0..whole.len() {
        for value in 0..=u8::MAX {
            let peer = Peer::new();
            let _waiting = peer.submit();
            let mut damaged = whole.to_vec();
            damaged[at] = value;
            peer.send(&damaged);
            // All reports are read without a panic; many mutations are still valid frames.
            peer.end(|_| {}).await;
        }
    }
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_ends_the_conversation() {
    let peer = Peer::new();
    let _waiting = peer.submit();
    peer.say(&bytes(peer.next() + 1, b"?"));
    assert_eq!(peer.fault().await, WorkerFault::Unreadable);
}

#[tokio::test]
async fn an_answer_that_comes_twice_ends_the_conversation() {
    let peer = Peer::new();
    let (mut waiting, _) = peer.submit();
    let id = peer.next();
    peer.say(&bytes(id, b"once"));
    peer.say(&bytes(id, b"twice"));
    assert_eq!(peer.fault().await, WorkerFault::Unreadable);
    assert_eq!(value(&mut waiting), b"once");
}

#[tokio::test]
async fn a_reply_after_its_caller_was_sent_elsewhere_frees_the_place_and_is_dropped() {
    let peer = Peer::new();
    let (mut waiting, place) = peer.submit();
    let (late, hung) = peer.talk.look(standstill::now() + LIMITS.share);
    assert_eq!((late.len(), hung), (1, None));
    assert!(waiting.try_recv().is_err(), "not told before the member's state is right");
    late.into_iter().for_each(|late| late.tell());
    assert!(matches!(reply(&mut waiting).result, Err(HsmError::Hung(Operation::Random))));
    assert_eq!(place.try_recv(), Err(mpsc::TryRecvError::Empty), "it still runs at the worker");
    peer.say(&bytes(peer.next(), b"late"));
    let (fault, _talk) = peer.end(|_| {}).await;
    assert_eq!(fault, WorkerFault::Gone);
    assert_eq!(place.try_recv(), Err(mpsc::TryRecvError::Disconnected));
}

#[tokio::test]
async fn what_only_waited_in_the_socket_was_not_asked_of_the_token() {
    let peer = Peer::new();
    let (mut runs, _) = peer.submit();
    let (mut waits, _) = peer.submit();
    let (fault, talk) = peer.end(|_| {}).await;
    talk.fail(HsmError::Worker(fault));
    assert!(matches!(reply(&mut runs).result, Err(HsmError::Worker(WorkerFault::Gone))));
    assert!(waits.try_recv().unwrap().is_none());
    let (guard, _) = mpsc::channel();
    assert!(
        matches!(talk.submit(&Job::new(&Request::Random(4)).unwrap(), LIMITS, guard), Err(Unsent::Gone)),
        "it is over"
    );
}

#[tokio::test]
async fn a_list_comes_in_parts() {
    let peer = Peer::new();
    let (mut waiting, _) = peer.submit();
    let key = |label: &str| TokenKey {
        id: None,
        label: label.to_owned(),
        public: None,
        decrypts: true,
        signs: true,
        always_authenticate: false,
        fingerprint: None,
    };
    let id = peer.next();
    for (label, more) in [("one", true), ("two", false)] {
        let result = Ok(Answer::Keys { keys: vec![key(label)], more });
        peer.say(&Report::Reply { id, cost: Cost::default(), result });
    }
    peer.end(|_| {}).await;
    let Ok(Value::Keys(keys)) = reply(&mut waiting).result else { panic!("no keys") };
    assert_eq!(keys, [key("one"), key("two")]);
}

#[tokio::test]
async fn a_list_without_an_end_ends_the_conversation() {
    let peer = Peer::new();
    let _waiting = peer.submit();
    let id = peer.next();
    let parts = std::thread::spawn({
        let socket = peer.socket.try_clone().unwrap();
        move || {
            rustix::io::ioctl_fionbio(&socket, false).unwrap();
            let result = Ok(Answer::Keys { keys: Vec::new(), more: true });
            let part = encode(&Report::Reply { id, cost: Cost::default(), result }).unwrap();
            while send(&socket, &part, SendFlags::NOSIGNAL).is_ok() {}
        }
    });
    let failure = peer.talk.read(|_| {}).await;
    assert_eq!(failure.error, HsmError::Worker(WorkerFault::Unreadable));
    drop(peer);
    parts.join().unwrap();
}

#[tokio::test]
async fn a_full_socket_gives_the_place_back_and_takes_calls_again_once_it_is_read() {
    let peer = Peer::new();
    let mut sent = 0;
    let refused = loop {
        assert!(sent < 100_000, "a socket without an end");
        match peer.talk.submit(&Job::new(&Request::Random(4)).unwrap(), LIMITS, mpsc::channel().0) {
            Ok(_) => sent += 1,
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, Unsent::Full(_)));
    assert_eq!(peer.talk.sent(), sent, "what was not sent is not waited for");
    for _ in 0..sent {
        peer.next();
    }
    let _waiting = peer.submit();
    assert_eq!(peer.talk.sent(), sent + 1);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_notes_ends_the_conversation() {
    let peer = Peer::new();
    let talker = std::thread::spawn({
        let socket = peer.socket.try_clone().unwrap();
        move || {
            rustix::io::ioctl_fionbio(&socket, false).unwrap();
            let note = encode(&Report::Note { level: Level::Info, text: "again" }).unwrap();
            while send(&socket, &note, SendFlags::NOSIGNAL).is_ok() {}
        }
    });
    let mut heard = 0;
    let failure = peer.talk.read(|_| heard += 1).await;
    assert_eq!((failure.error, heard), (HsmError::Worker(WorkerFault::Floods), MOST_REPORTS));
    // The talker ends when its peer is dropped.
    drop(peer);
    talker.join().unwrap();
}

#[test]
fn reports_are_counted_by_the_second() {
    let start = Instant::now();
    let mut flood = Flood { second: start, reports: 0 };
    for second in 0..3 {
        let now = start + Duration::from_secs(second);
        assert!((0..MOST_REPORTS).all(|_| !flood.another(now)));
        assert!(flood.another(now));
    }
}

#[tokio::test]
async fn a_refused_pin_is_heard_of_before_the_call_that_met_it_fails() {
    let peer = Peer::new();
    let (mut waiting, _) = peer.submit();
    let error = HsmError::new(Function::Login, cryptoki::error::RvError::PinIncorrect);
    peer.say(&Report::PinRefused { number: 3, error });
    peer.say(&Report::Reply { id: peer.next(), cost: Cost::default(), result: Err(error) });
    let mut refused = None;
    peer.end(|news| {
        if let News::Report(Report::PinRefused { number, .. }) = news {
            assert!(waiting.try_recv().is_err(), "too early");
            refused = Some(number);
        }
    })
    .await;
    assert_eq!(refused, Some(3));
    assert!(reply(&mut waiting).result.is_err_and(|failed| failed == error));
}

#[tokio::test]
async fn sessions_are_counted() {
    let peer = Peer::new();
    let opened = Report::SessionOpened { took: Duration::from_nanos(1), result: Ok(()) };
    peer.say(&opened);
    peer.say(&opened);
    peer.say(&Report::SessionClosed);
    let (_, talk) = peer.end(|_| {}).await;
    assert_eq!(talk.sessions(), 1);
    let peer = Peer::new();
    peer.say(&Report::SessionClosed);
    let (_, talk) = peer.end(|_| {}).await;
    assert_eq!(talk.sessions(), 0, "a worker that cannot count does no harm");
}

#[tokio::test]
async fn a_worker_that_is_told_to_finish_may_still_answer() {
    let peer = Peer::new();
    let (mut waiting, _) = peer.submit();
    peer.talk.finish();
    let id = peer.next();
    let mut buffer = [0; 16];
    assert_eq!(recv(&peer.socket, &mut buffer, RecvFlags::DONTWAIT).unwrap().0, 0, "nothing more comes");
    peer.say(&bytes(id, b"last"));
    peer.end(|_| {}).await;
    assert_eq!(value(&mut waiting), b"last");
}
