//! Tests of clusters whose workers are scripts in the test: the script holds the other end of the socket, and the process
//! is idle.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::*;
use crate::config::TokenRef;
use crate::error::WorkerFault;
use crate::link::{Answer, Call, Cost, MAX_FRAME, Report, encode, pair};
use crate::member::{Environment, HiddenVariables, MemberState};

/// Kinds of requests that a script distinguishes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    Start { pin: u64 },
    SetPin { pin: u64 },
    Ping,
    Random,
    Other,
}

/// The worker's end of a socket.
struct Peer {
    socket: OwnedFd,
    /// Standard input of the idle process, which ends when this is closed.
    _input: OwnedFd,
}

impl Peer {
    /// Reads the next call; `None` if the daemon has ended the conversation.
    fn next(&self) -> Option<(u32, Asked)> {
        let mut buffer = vec![0; MAX_FRAME];
        let (len @ 1.., _) = recv(&self.socket, &mut buffer, RecvFlags::empty()).ok()? else { return None };
        let call = Call::decode(&buffer[..len])?;
        let asked = match call.request {
            Request::Start(start) => Asked::Start { pin: start.pin_number },
            Request::SetPin(pin, _) => Asked::SetPin { pin },
            Request::Ping => Asked::Ping,
            Request::Random(_) => Asked::Random,
            _ => Asked::Other,
        };
        Some((call.id, asked))
    }

    fn say(&self, report: &Report<'_>) {
        let _ = send(&self.socket, &encode(report).unwrap(), SendFlags::NOSIGNAL);
    }

    fn reply(&self, id: u32, result: Result<Answer<'_>, HsmError>) {
        self.say(&Report::Reply { id, cost: Cost::default(), result });
    }

    /// Answers a call as the worker of a working token does.
    fn answer(&self, id: u32, asked: Asked) {
        if matches!(asked, Asked::Start { .. }) {
            self.say(&Report::SessionOpened { took: Duration::from_nanos(1), result: Ok(()) });
        }
        self.reply(id, Ok(if asked == Asked::Random { Answer::Bytes(b"rand") } else { Answer::Done }));
    }

    /// Serves calls until the daemon ends the conversation.
    fn serve(&self) {
        self.serve_until(|_| false);
    }

    /// Serves calls until `enough` accepts one, which is returned unanswered.
    fn serve_until(&self, enough: impl Fn(Asked) -> bool) -> Option<u32> {
        while let Some((id, asked)) = self.next() {
            if enough(asked) {
                return Some(id);
            }
            self.answer(id, asked);
        }
        None
    }
}

struct Stage {
    cluster: Cluster,
    started: Arc<AtomicUsize>,
}

impl Stage {
    /// One member whose workers run `script`. The script gets the number of workers started before.
    fn set(watchdog: Duration, script: impl Fn(usize, Peer) + Send + Sync + 'static) -> Self {
        Self::of(watchdog, |_| Ok(()), script)
    }

    /// Like `set`, but `launches` may make the start of a process fail.
    fn of(
        watchdog: Duration,
        launches: impl Fn(usize) -> io::Result<()> + Send + Sync + 'static,
        script: impl Fn(usize, Peer) + Send + Sync + 'static,
    ) -> Self {
        let started = Arc::new(AtomicUsize::new(0));
        let script = Arc::new(script);
        let beside = launch(WorkerProgram {
            path: PathBuf::from("/bin/sh"),
            arguments: vec!["-c".into(), "read nothing".into()],
            hidden: Vec::new(),
        });
        let launch = {
            let started = Arc::clone(&started);
            move |member: &str, environment: Environment<'_>| {
                let number = started.fetch_add(1, Ordering::AcqRel);
                launches(number)?;
                let (process, input) = beside(member, environment)?;
                let (daemon, socket) = pair()?;
                let script = Arc::clone(&script);
                thread::spawn(move || script(number, Peer { socket, _input: input }));
                Ok((process, daemon))
            }
        };
        let surroundings = Surroundings {
            launch: Arc::new(launch),
            hidden: HiddenVariables::default(),
            breaker: breaker::Settings::default(),
            watchdog,
            known: Arc::new(RwLock::new(Arc::new([]))),
            observer: Arc::new(|_, _| {}),
            somebody_up: Arc::new(Notify::new()),
        };
        let member = MemberConfig {
            name: "m".to_owned(),
            module: PathBuf::from("/none"),
            token: TokenRef::Label("m".to_owned()),
            pin: Pin::new("1111".to_owned()),
            env: BTreeMap::new(),
            priority: 0,
            weight: 1,
            sessions: 1,
            queue: 64,
        };
        Stage { cluster: Cluster::of(vec![member], surroundings), started }
    }

    fn state(&self) -> MemberState {
        self.cluster.members()[0].state
    }

    fn started(&self) -> usize {
        self.started.load(Ordering::Acquire)
    }

    fn last_error(&self) -> String {
        self.cluster.members()[0].last_error.as_ref().map(|last| last.text.clone()).unwrap_or_default()
    }

    async fn random(&self) -> Result<Vec<u8>, HsmError> {
        self.cluster.random(4, standstill::now() + Duration::from_secs(10)).await
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let patience = standstill::now() + Duration::from_secs(20);
        while !holds(self) {
            assert!(standstill::now() < patience, "{what}: {:?}", self.cluster.members());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A script: the first worker ends when it is asked for random bytes; later workers serve.
fn the_first_ends_in_a_call(number: usize, peer: Peer) {
    if number == 0 {
        peer.serve_until(|asked| asked == Asked::Random);
    } else {
        peer.serve();
    }
}

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(200);

fn refused() -> HsmError {
    HsmError::new(Function::Login, RvError::PinIncorrect)
}

#[tokio::test]
async fn a_worker_that_starts_and_passes_brings_its_member_up() {
    let stage = Stage::set(LONG, |_, peer| peer.serve());
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.state(), MemberState::Up);
    assert_eq!(stage.random().await.unwrap(), b"rand");
    let status = &stage.cluster.members()[0];
    assert_eq!((status.sessions_open, status.closings, status.in_flight), (1, 0, 0));
    stage.cluster.close().await;
    assert_eq!((stage.state(), stage.started()), (MemberState::Off, 1));
}

#[tokio::test]
async fn the_only_member_whose_worker_ends_in_a_call_serves_that_call_with_the_next_one() {
    let stage = Stage::set(LONG, the_first_ends_in_a_call);
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.random().await.unwrap(), b"rand");
    let status = &stage.cluster.members()[0];
    assert_eq!((status.state, status.closings, stage.started()), (MemberState::Up, 1, 2));
    stage.cluster.close().await;
}

#[tokio::test]
async fn hang_after_hang_the_member_comes_back() {
    const HANGS: usize = 3;
    let stage = Stage::set(SHORT, |number, peer| {
        if number < HANGS {
            peer.serve_until(|asked| asked == Asked::Random);
            // This call hangs until the process is killed.
            let _ = peer.next();
        } else {
            peer.serve();
        }
    });
    stage.cluster.start().await.unwrap();
    for hang in 1..=HANGS {
        // The next worker answers the call that hangs; or the call fails if the next worker hangs too.
        let _ = stage.random().await;
        stage.until("a fresh worker", |stage| stage.started() > hang && stage.state() == MemberState::Up).await;
    }
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert_eq!(stage.cluster.members()[0].sessions_stuck, 0);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_worker_that_ends_right_after_its_test_leaves_no_member_up_without_one() {
    let stage = Stage::set(LONG, |number, peer| {
        if number < 20 {
            if let Some(id) = peer.serve_until(|asked| asked == Asked::Ping) {
                peer.answer(id, Asked::Ping);
            }
        } else {
            peer.serve();
        }
    });
    let _ = stage.cluster.start().await;
    stage
        .until("a worker that stays", |stage| {
            stage.cluster.0.members.read().unwrap()[0].member.probe_now();
            stage.started() > 20 && stage.state() == MemberState::Up
        })
        .await;
    assert_eq!(stage.random().await.unwrap(), b"rand");
    stage.cluster.close().await;
}

#[tokio::test]
async fn what_is_said_of_the_last_worker_does_not_count_for_the_next_one() {
    let member = Arc::new(Mutex::new(None::<Arc<Member>>));
    let late = {
        let member = Arc::clone(&member);
        move |number| {
            // While the second worker starts, a call finds that the first worker is gone.
            if let Some(member) = member.lock().unwrap().as_ref().filter(|_| number == 1) {
                member.lost_worker(1);
            }
            Ok(())
        }
    };
    let stage = Stage::of(LONG, late, the_first_ends_in_a_call);
    *member.lock().unwrap() = Some(Arc::clone(&stage.cluster.0.members.read().unwrap()[0].member));
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert_eq!((stage.state(), stage.started()), (MemberState::Up, 2));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_pin_that_comes_while_a_worker_starts_reaches_it() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (starts, started) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (starts, wait) = (Mutex::new(starts), Mutex::new(wait));
    let stage = Stage::set(LONG, {
        let told = Arc::clone(&told);
        move |_, peer| {
            while let Some((id, asked)) = peer.next() {
                match asked {
                    Asked::Start { .. } => {
                        starts.lock().unwrap().send(()).unwrap();
                        let _ = wait.lock().unwrap().recv();
                    }
                    Asked::SetPin { pin } => told.lock().unwrap().push(pin),
                    _ => {}
                }
                peer.answer(id, asked);
            }
        }
    });
    let starting = tokio::spawn({
        let cluster = stage.cluster.clone();
        async move { cluster.start().await }
    });
    tokio::task::spawn_blocking(move || started.recv()).await.unwrap().unwrap();
    stage.cluster.set_pin("m", Pin::new("2222".to_owned())).await.unwrap();
    drop(go_on);
    starting.await.unwrap().unwrap();
    assert_eq!(*told.lock().unwrap(), [1]);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_start_that_fails_is_tried_again_and_says_why() {
    let stage = Stage::set(LONG, |number, peer| {
        if number == 0 {
            let _ = peer.next();
            peer.say(&Report::StartFailed(Failure::new(HsmError::Module, "/none: not found")));
        } else {
            peer.serve();
        }
    });
    let failure = stage.cluster.start().await.unwrap_err();
    assert_eq!(failure.to_string(), "the module cannot be used: /none: not found");
    stage.until("the next attempt", |stage| stage.state() == MemberState::Up).await;
    assert_eq!(stage.random().await.unwrap(), b"rand");
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_process_that_cannot_be_started_is_a_failed_attempt() {
    // Simulates a missing program or a full process table.
    let no_fork = |number| if number < 3 { Err(io::Error::from(Errno::AGAIN)) } else { Ok(()) };
    let stage = Stage::of(LONG, no_fork, |_, peer| peer.serve());
    let failure = stage.cluster.start().await.unwrap_err();
    assert_eq!(failure.error, HsmError::Worker(WorkerFault::NotStarted));
    stage.until("a process", |stage| stage.state() == MemberState::Up).await;
    assert_eq!(stage.started(), 4);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_pin_that_is_refused_is_tried_once_whatever_becomes_of_the_worker() {
    let tried = Arc::new(Mutex::new(Vec::new()));
    let stage = Stage::set(LONG, {
        let tried = Arc::clone(&tried);
        move |_, peer| {
            let Some((id, Asked::Start { pin })) = peer.next() else { panic!("no start") };
            tried.lock().unwrap().push(pin);
            if pin == 0 {
                // The worker ends before it can say more.
                peer.say(&Report::PinRefused { number: pin, error: refused() });
            } else {
                peer.answer(id, Asked::Start { pin });
                peer.serve();
            }
        }
    });
    assert!(stage.cluster.start().await.is_err());
    stage.until("the refusal", |stage| stage.state() == MemberState::PinRefused).await;
    assert_eq!(stage.cluster.check("m").await.unwrap_err().error, HsmError::PinRefused);
    stage.cluster.0.members.read().unwrap()[0].member.probe_now();
    assert_eq!(stage.random().await.unwrap_err(), HsmError::NoneServing);
    // Setting the same PIN again allows no further try.
    stage.cluster.set_pin("m", Pin::new("1111".to_owned())).await.unwrap();
    tokio::time::sleep(SHORT).await;
    assert_eq!((stage.state(), stage.started()), (MemberState::PinRefused, 1));
    stage.cluster.set_pin("m", Pin::new("2222".to_owned())).await.unwrap();
    stage.until("the new PIN", |stage| stage.state() == MemberState::Up).await;
    assert_eq!(*tried.lock().unwrap(), [0, 1]);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_pin_that_replaced_the_refused_one_in_time_is_tried() {
    let told = Arc::new(AtomicUsize::new(0));
    let tell = Arc::clone(&told);
    let stage = Stage::set(LONG, move |number, peer| {
        if number == 0 {
            peer.serve_until(|asked| matches!(asked, Asked::SetPin { pin: 1 }));
            tell.fetch_add(1, Ordering::AcqRel);
            // This report is about the first PIN and comes too late.
            peer.say(&Report::PinRefused { number: 0, error: refused() });
        }
        peer.serve();
    });
    stage.cluster.start().await.unwrap();
    let set = stage.cluster.set_pin("m", Pin::new("2222".to_owned()));
    let _ = standstill::timeout(SHORT, set).await;
    assert_eq!((stage.state(), told.load(Ordering::Acquire)), (MemberState::Up, 1));
    assert_eq!(stage.random().await.unwrap(), b"rand");
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_drained_member_keeps_its_worker_and_serves_again_at_once() {
    let stage = Stage::set(LONG, |_, peer| peer.serve());
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.cluster.drain("m", true).unwrap().state, MemberState::Drained);
    assert_eq!(stage.random().await.unwrap_err(), HsmError::NoneServing);
    assert_eq!(stage.cluster.drain("m", false).unwrap().state, MemberState::Up);
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert_eq!(stage.started(), 1);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_drained_member_whose_worker_ended_gets_another_one_when_it_is_resumed() {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let ended = Mutex::new(ended);
    let stage = Stage::set(LONG, move |number, peer| {
        if number == 0 {
            let start = peer.next().unwrap();
            peer.answer(start.0, start.1);
            let ping = peer.next().unwrap();
            peer.answer(ping.0, ping.1);
            let _ = ended.lock().unwrap().recv();
        } else {
            peer.serve();
        }
    });
    stage.cluster.start().await.unwrap();
    stage.cluster.drain("m", true).unwrap();
    drop(end);
    stage.until("the worker's end", |stage| stage.cluster.members()[0].worker.is_none()).await;
    assert_eq!(stage.state(), MemberState::Drained);
    stage.cluster.drain("m", false).unwrap();
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert_eq!(stage.started(), 2);
    stage.cluster.close().await;
}

#[tokio::test]
async fn few_sessions_are_no_fault() {
    let stage = Stage::set(LONG, |_, peer| {
        let start = peer.next().unwrap();
        peer.answer(start.0, start.1);
        let full = HsmError::new(Function::OpenSession, RvError::SessionCount);
        for _ in 0..50 {
            peer.say(&Report::SessionOpened { took: Duration::from_nanos(1), result: Err(full) });
        }
        peer.serve();
    });
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert_eq!(stage.cluster.members()[0].closings, 0);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_ciphertext_that_fits_into_no_frame_is_its_callers_fault() {
    let stage = Stage::set(LONG, |_, peer| peer.serve());
    stage.cluster.start().await.unwrap();
    let key = KeyRef { id: crate::identity::KeyId(vec![1]), public: crate::identity::Fingerprint::of_modulus(&[7]) };
    let oaep = Oaep { hash: crate::keys::Hash::Sha256, mgf: crate::keys::Hash::Sha256 };
    for len in [2_049, MAX_FRAME - 100, MAX_FRAME, 10 * MAX_FRAME] {
        let deadline = standstill::now() + LONG;
        let error = stage.cluster.decrypt(&key, oaep, &vec![7; len], deadline, None).await.unwrap_err();
        assert!(error.is_data(), "{len}: {error}");
    }
    assert_eq!((stage.state(), stage.cluster.members()[0].faults), (MemberState::Up, 0));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_worker_that_says_nonsense_is_replaced() {
    let stage = Stage::set(LONG, |number, peer| {
        if number == 0 {
            peer.serve_until(|asked| asked == Asked::Random);
            let _ = send(&peer.socket, b"\xff\xff\xff", SendFlags::NOSIGNAL);
            let _ = peer.next();
        } else {
            peer.serve();
        }
    });
    stage.cluster.start().await.unwrap();
    assert_eq!(stage.random().await.unwrap(), b"rand");
    assert!(stage.last_error().contains("cannot be read"), "{}", stage.last_error());
    assert_eq!(stage.started(), 2);
    stage.cluster.close().await;
}

#[tokio::test]
async fn what_a_worker_costs_is_summed_over_all_of_them() {
    let stage = Stage::set(LONG, |number, peer| {
        peer.say(&Report::Usage { processor: Duration::from_millis(2), resident: 4096 });
        if number == 0 {
            peer.serve_until(|asked| asked == Asked::Random);
        } else {
            peer.serve();
        }
    });
    stage.cluster.start().await.unwrap();
    stage.random().await.unwrap();
    let status = &stage.cluster.members()[0];
    assert_eq!((status.worker_processor, status.worker_resident), (Duration::from_millis(4), 4096));
    stage.cluster.close().await;
    assert_eq!(stage.cluster.members()[0].worker_resident, 0);
}
