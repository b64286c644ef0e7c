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
use crate::identity::KeyId;
use crate::keys::Hash;
use crate::link::{Answer, Call, Cost, MAX_FRAME, Report, encode, pair};
use crate::member::{Environment, HiddenVariables, MemberState};

/// Kinds of requests that a script distinguishes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    Start {
        pin: u64,
    },
    SetPin {
        pin: u64,
    },
    Ping,
    Random,
    /// The key's id, and the first byte of the ciphertext.
    Decrypt(u8, u8),
    /// The key's id.
    Sign(u8),
    Other,
}

/// First byte of the ciphertexts of known-answer tests.
const TEST: u8 = 1;
/// First byte of a caller's ciphertext.
const CALLER: u8 = 2;
/// The right result of every decryption.
const PLAINTEXT: &[u8] = b"plain";
/// The right result of every signature.
const SIGNATURE: &[u8] = b"signed";

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
            Request::Decrypt { id: &[key], ciphertext: &[input, ..], .. } => Asked::Decrypt(key, input),
            Request::Sign { id: &[key], .. } => Asked::Sign(key),
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
        let answer = match asked {
            Asked::Random => Answer::Bytes(b"rand"),
            Asked::Decrypt(..) => Answer::Bytes(PLAINTEXT),
            Asked::Sign(_) => Answer::Bytes(SIGNATURE),
            _ => Answer::Done,
        };
        self.reply(id, Ok(answer));
    }

    /// Serves calls until the daemon ends the conversation.
    fn serve(&self) {
        self.serve_until(|_| false);
    }

    /// Serves calls, except those for which `fault` returns an error.
    fn serve_with(&self, mut fault: impl FnMut(Asked) -> Option<HsmError>) {
        while let Some((id, asked)) = self.next() {
            match fault(asked) {
                Some(error) => self.reply(id, Err(error)),
                None => self.answer(id, asked),
            }
        }
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

    async fn start_with_keys(&self, keys: &[u8]) {
        self.set_keys(keys);
        self.cluster.start().await.unwrap();
    }

    /// Sets known-answer tests of these keys, the primary one first.
    fn set_keys(&self, keys: &[u8]) {
        let decrypt = |key: &u8| {
            KnownAnswerTest::decrypt(&key_of(*key), OAEP, &[TEST], Zeroizing::new(PLAINTEXT.to_vec())).unwrap()
        };
        let sign = |key: &u8| {
            let check: Check = Arc::new(|signature| signature == SIGNATURE);
            KnownAnswerTest::sign(&key_of(*key), SignScheme::Pkcs1(Hash::Sha256), &[0; 32], check).unwrap()
        };
        self.cluster.set_known_answers(keys.iter().map(decrypt).chain(keys.iter().map(sign)).collect());
    }

    async fn decrypt(&self, key: u8) -> Result<(), HsmError> {
        self.decrypt_within(key, LONG).await
    }

    async fn decrypt_within(&self, key: u8, time: Duration) -> Result<(), HsmError> {
        let check: Check = Arc::new(|plaintext| plaintext == PLAINTEXT);
        let deadline = standstill::now() + time;
        self.cluster.decrypt(&key_of(key), OAEP, &[CALLER], deadline, Some(check)).await.map(drop)
    }

    async fn until_decrypts(&self, key: u8) {
        let patience = standstill::now() + Duration::from_secs(20);
        while self.decrypt(key).await.is_err() {
            assert!(standstill::now() < patience, "{:?}", self.cluster.members());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn sign(&self, key: u8) -> Result<(), HsmError> {
        let check: Check = Arc::new(|signature| signature == SIGNATURE);
        let deadline = standstill::now() + LONG;
        let scheme = SignScheme::Pkcs1(Hash::Sha256);
        self.cluster.sign(&key_of(key), scheme, &[0; 32], deadline, Some(check)).await.map(drop)
    }

    fn closings(&self) -> u64 {
        self.cluster.members()[0].closings
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

const OAEP: Oaep = Oaep { hash: Hash::Sha256, mgf: Hash::Sha256 };

fn key_of(id: u8) -> KeyRef {
    KeyRef::new(KeyId(vec![id]), &[id])
}

/// The error that tokens return for a bad ciphertext, and others when they are broken or have no room.
fn unclear(code: RvError) -> HsmError {
    HsmError::new(Function::Decrypt, code)
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
    for len in [2_049, MAX_FRAME - 100, MAX_FRAME, 10 * MAX_FRAME] {
        let deadline = standstill::now() + LONG;
        let error = stage.cluster.decrypt(&key_of(1), OAEP, &vec![7; len], deadline, None).await.unwrap_err();
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

// Doubtful results: the input, a key or the member may be at fault.

/// The script of a token that works, but for bad input.
fn rejects_bad_input(peer: &Peer) {
    peer.serve_with(|asked| matches!(asked, Asked::Decrypt(_, CALLER)).then(|| unclear(RvError::EncryptedDataInvalid)));
}

#[tokio::test]
async fn bad_input_is_its_callers_fault() {
    let stage = Stage::set(LONG, |_, peer| rejects_bad_input(&peer));
    stage.start_with_keys(&[1]).await;
    for _ in 0..20 {
        assert_eq!(stage.decrypt(1).await, Err(HsmError::Refused { wrong: false }));
    }
    assert_eq!((stage.state(), stage.closings()), (MemberState::Up, 0));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_token_that_is_throttled_now_and_then_stays_up_and_serves() {
    let stage = Stage::set(LONG, |_, peer| {
        let (mut decryptions, mut tests) = (0, 0);
        peer.serve_with(|asked| {
            let throttled = match asked {
                Asked::Decrypt(_, TEST) => {
                    tests += 1;
                    // The first one is that of the start.
                    tests % 2 == 0
                }
                Asked::Decrypt(..) => {
                    decryptions += 1;
                    decryptions % 3 == 0
                }
                _ => false,
            };
            throttled.then(|| unclear(RvError::FunctionFailed))
        });
    });
    stage.start_with_keys(&[1]).await;
    let mut callers = JoinSet::new();
    let stage = Arc::new(stage);
    for _ in 0..8 {
        let stage = Arc::clone(&stage);
        callers.spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..10 {
                outcomes.push(stage.decrypt(1).await);
            }
            outcomes
        });
    }
    let outcomes = callers.join_all().await.concat();
    let served = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!(served > outcomes.len() / 2, "{served} {outcomes:?}");
    assert!(!outcomes.iter().any(|outcome| outcome.is_err_and(HsmError::is_data)), "valid input is refused");
    assert_eq!(stage.closings(), 0, "{}", stage.last_error());
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_token_that_decrypts_nothing_goes_down_although_it_signs() {
    let stage = Stage::set(LONG, |number, peer| {
        let mut tests = 0;
        peer.serve_with(|asked| {
            tests += usize::from(matches!(asked, Asked::Decrypt(_, TEST)));
            let fails = number == 0 && (matches!(asked, Asked::Decrypt(_, CALLER)) || tests > 1);
            (fails && matches!(asked, Asked::Decrypt(..))).then(|| unclear(RvError::GeneralError))
        });
    });
    stage.start_with_keys(&[1]).await;
    let patience = standstill::now() + Duration::from_secs(60);
    while stage.closings() == 0 {
        assert!(standstill::now() < patience, "{:?}", stage.cluster.members());
        let _ = stage.decrypt(1).await;
        let _ = stage.sign(1).await;
    }
    stage.until("a fresh worker", |stage| stage.state() == MemberState::Up).await;
    assert_eq!(stage.decrypt(1).await, Ok(()));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_rejection_is_not_believed_because_of_a_test_that_began_before() {
    let stage = Stage::set(LONG, |number, peer| {
        let mut tests = 0;
        peer.serve_with(|asked| match asked {
            Asked::Decrypt(_, CALLER) => Some(unclear(RvError::FunctionFailed)),
            // The tests of the start and of the first rejection pass; then the token has no room.
            Asked::Decrypt(_, TEST) => {
                tests += 1;
                (number > 0 || tests > 2).then(|| unclear(RvError::FunctionFailed))
            }
            _ => None,
        });
    });
    stage.start_with_keys(&[1]).await;
    let error = stage.decrypt(1).await.unwrap_err();
    assert!(!error.is_data(), "{error}");
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_member_that_fails_while_it_rejects_an_input_is_not_believed() {
    let (tell, told) = std::sync::mpsc::channel();
    let tell = Mutex::new(tell);
    let stage = Stage::set(LONG, move |number, peer| {
        if number > 0 {
            return peer.serve_with(|_| Some(HsmError::new(Function::OpenSession, RvError::DeviceError)));
        }
        let mut tests = Vec::new();
        let mut callers = 0;
        while let Some((id, asked)) = peer.next() {
            match asked {
                Asked::Decrypt(_, CALLER) => {
                    callers += 1;
                    peer.reply(id, Ok(Answer::Bytes(b"wrong")));
                    if callers == 1 {
                        let _ = tell.lock().unwrap().send(());
                    }
                }
                // The answers of all tests after the first are held until the second caller has its result.
                Asked::Decrypt(_, TEST) if callers > 0 => tests.push(id),
                _ => peer.answer(id, asked),
            }
            if callers > 1 {
                thread::sleep(Duration::from_millis(50));
                tests.drain(..).for_each(|id| peer.reply(id, Ok(Answer::Bytes(b"wrong"))));
            }
        }
    });
    stage.start_with_keys(&[1]).await;
    let stage = Arc::new(stage);
    let first = tokio::spawn({
        let stage = Arc::clone(&stage);
        async move { stage.decrypt(1).await }
    });
    tokio::task::spawn_blocking(move || told.recv()).await.unwrap().unwrap();
    // The first result is doubted, and its test is on its way.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let second = stage.decrypt(1).await.unwrap_err();
    let first = first.await.unwrap().unwrap_err();
    assert!(!first.is_data() && !second.is_data(), "{first}, {second}");
    assert_eq!(stage.closings(), 1);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_key_that_fails_takes_no_member_down() {
    for (how, code) in
        [("error", Some(RvError::GeneralError)), ("refusal", Some(RvError::DataInvalid)), ("wrong", None)]
    {
        let stage = Stage::set(LONG, move |_, peer| {
            while let Some((id, asked)) = peer.next() {
                match (asked, code) {
                    (Asked::Decrypt(2, _), Some(code)) => peer.reply(id, Err(unclear(code))),
                    (Asked::Decrypt(2, _), None) | (Asked::Sign(2), _) => peer.reply(id, Ok(Answer::Bytes(b"wrong"))),
                    _ => peer.answer(id, asked),
                }
            }
        });
        stage.start_with_keys(&[1, 2]).await;
        for _ in 0..3 {
            let error = stage.decrypt(2).await.unwrap_err();
            assert!(!error.is_data(), "{how}: {error}");
            let error = stage.sign(2).await.unwrap_err();
            assert!(!error.is_data(), "{how}: {error}");
            assert_eq!((stage.decrypt(1).await, stage.sign(1).await), (Ok(()), Ok(())), "{how}");
        }
        assert_eq!((stage.state(), stage.closings(), stage.started()), (MemberState::Up, 0, 1), "{how}");
        stage.cluster.close().await;
    }
}

#[tokio::test]
async fn a_token_that_fails_with_some_parameters_is_not_believed_about_them() {
    let sha1 = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
    // First byte of the ciphertext of the test with the parameters that the token mistakes.
    const OTHER_TEST: u8 = 3;
    let stage = Stage::set(LONG, |_, peer| {
        peer.serve_with(|asked| {
            let mistaken = matches!(asked, Asked::Decrypt(_, CALLER | OTHER_TEST));
            mistaken.then(|| unclear(RvError::EncryptedDataInvalid))
        });
    });
    let test =
        |oaep, input| KnownAnswerTest::decrypt(&key_of(1), oaep, &[input], Zeroizing::new(PLAINTEXT.to_vec())).unwrap();
    stage.cluster.set_known_answers(vec![test(sha1, TEST), test(OAEP, OTHER_TEST)]);
    stage.cluster.start().await.unwrap();
    for _ in 0..3 {
        let error = stage.decrypt(1).await.unwrap_err();
        assert!(!error.is_data(), "{error}");
    }
    let deadline = standstill::now() + LONG;
    stage.cluster.decrypt(&key_of(1), sha1, &[TEST], deadline, None).await.unwrap();
    assert_eq!((stage.state(), stage.closings()), (MemberState::Up, 0));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_wrong_signature_of_the_primary_key_takes_its_member_down() {
    let stage = Stage::set(LONG, |number, peer| {
        let mut signatures = 0;
        while let Some((id, asked)) = peer.next() {
            signatures += usize::from(asked == Asked::Sign(1));
            if number == 0 && asked == Asked::Sign(1) && signatures == 2 {
                peer.reply(id, Ok(Answer::Bytes(b"wrong")));
            } else {
                peer.answer(id, asked);
            }
        }
    });
    stage.start_with_keys(&[1]).await;
    assert_eq!(stage.sign(1).await, Ok(()), "the next worker signs");
    assert_eq!((stage.closings(), stage.started()), (1, 2));
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_test_that_hangs_delays_no_answer_beyond_its_deadline() {
    let stage = Stage::set(LONG, |_, peer| {
        let mut doubtful = false;
        while let Some((id, asked)) = peer.next() {
            match asked {
                Asked::Decrypt(_, CALLER) => {
                    doubtful = true;
                    peer.reply(id, Err(unclear(RvError::GeneralError)));
                }
                Asked::Decrypt(_, TEST) if doubtful => {}
                _ => peer.answer(id, asked),
            }
        }
    });
    stage.start_with_keys(&[1]).await;
    let begun = standstill::now();
    let error = stage.decrypt_within(1, SHORT).await.unwrap_err();
    let took = standstill::since(begun);
    assert!(took < LONG / 2, "{took:?}");
    assert!(!error.is_data(), "{error}");
    assert_eq!(stage.closings(), 0, "the test may still pass");
    stage.cluster.close().await;
}

// What a key or a token does not support.

fn unable(function: Function) -> HsmError {
    HsmError::new(function, RvError::KeyFunctionNotPermitted)
}

#[tokio::test]
async fn a_member_that_cannot_use_its_primary_key_goes_down() {
    for code in [RvError::KeyFunctionNotPermitted, RvError::MechanismInvalid] {
        for (function, signs) in [(Function::DecryptInit, false), (Function::SignInit, true)] {
            let stage = Stage::set(LONG, move |number, peer| {
                let mut started = false;
                peer.serve_with(|asked| {
                    started |=
                        matches!(asked, Asked::Decrypt(_, CALLER)) || (started && matches!(asked, Asked::Sign(_)));
                    let affected = if signs { asked == Asked::Sign(1) } else { matches!(asked, Asked::Decrypt(..)) };
                    (number == 0 && started && affected).then(|| HsmError::new(function, code))
                });
            });
            stage.start_with_keys(&[1]).await;
            // The first decryption begins the fault.
            let _ = stage.decrypt(1).await;
            let _ = stage.sign(1).await;
            stage.until("a fresh worker", |stage| stage.closings() == 1 && stage.state() == MemberState::Up).await;
            assert_eq!((stage.decrypt(1).await, stage.sign(1).await), (Ok(()), Ok(())));
            stage.cluster.close().await;
        }
    }
}

#[tokio::test]
async fn a_member_that_could_not_use_a_key_once_is_asked_for_it_again() {
    let stage = Stage::set(LONG, |_, peer| {
        let mut calls = 0;
        peer.serve_with(|asked| {
            calls += usize::from(matches!(asked, Asked::Decrypt(_, CALLER)));
            (matches!(asked, Asked::Decrypt(_, CALLER)) && calls == 1).then(|| unable(Function::DecryptInit))
        });
    });
    stage.start_with_keys(&[1]).await;
    let _ = stage.decrypt(1).await;
    stage.until_decrypts(1).await;
    assert_eq!(stage.closings(), 0);
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_member_that_cannot_use_another_key_stays_up() {
    let stage = Stage::set(LONG, |_, peer| {
        peer.serve_with(|asked| match asked {
            Asked::Decrypt(2, _) => Some(unable(Function::DecryptInit)),
            Asked::Sign(2) => Some(unable(Function::SignInit)),
            _ => None,
        });
    });
    stage.start_with_keys(&[1, 2]).await;
    for _ in 0..3 {
        assert!(!stage.decrypt(2).await.unwrap_err().is_data());
        assert!(!stage.sign(2).await.unwrap_err().is_data());
        assert_eq!((stage.decrypt(1).await, stage.sign(1).await), (Ok(()), Ok(())));
    }
    assert_eq!((stage.state(), stage.closings()), (MemberState::Up, 0));
    stage.cluster.close().await;
}

// A worker that is kept although its tests failed.

/// The script of a token that lacks every key.
fn lacks_its_keys(peer: &Peer) {
    peer.serve_with(|asked| matches!(asked, Asked::Decrypt(..) | Asked::Sign(_)).then_some(HsmError::NoSuchKey));
}

#[tokio::test]
async fn a_drained_member_that_lacks_a_key_ends_with_its_cluster() {
    for _ in 0..30 {
        let stage = Stage::set(LONG, |_, peer| lacks_its_keys(&peer));
        stage.set_keys(&[1]);
        assert_eq!(stage.cluster.start().await.unwrap_err().error, HsmError::NoSuchKey);
        stage.cluster.drain("m", true).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        standstill::timeout(LONG, stage.cluster.close()).await.unwrap();
        assert_eq!(stage.state(), MemberState::Off);
    }
}

#[tokio::test]
async fn a_worker_that_hangs_is_not_kept_for_its_missing_key() {
    let stage = Stage::set(SHORT, |number, peer| {
        if number > 0 {
            return peer.serve();
        }
        while let Some((id, asked)) = peer.next() {
            match asked {
                Asked::Decrypt(..) | Asked::Sign(_) => peer.reply(id, Err(HsmError::NoSuchKey)),
                // The list of keys hangs.
                Asked::Other => {}
                _ => peer.answer(id, asked),
            }
        }
    });
    stage.set_keys(&[1]);
    assert_eq!(stage.cluster.start().await.unwrap_err().error, HsmError::NoSuchKey);
    let member = stage.cluster.member("m").unwrap();
    let list = Job::new(&Request::Keys { search: true }).unwrap();
    assert!(member.direct(&list, SHORT / 4).await.is_err());
    stage.until("a fresh worker", |stage| stage.started() > 1 && stage.state() == MemberState::Up).await;
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_member_without_traffic_whose_tests_fail_does_not_stay_up() {
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stage = Stage::set(LONG, {
        let broken = Arc::clone(&broken);
        move |_, peer| {
            peer.serve_with(|asked| {
                let fails = broken.load(Ordering::Acquire) && matches!(asked, Asked::Decrypt(..));
                fails.then(|| HsmError::new(Function::DecryptInit, RvError::DeviceMemory))
            });
        }
    });
    stage.start_with_keys(&[1]).await;
    broken.store(true, Ordering::Release);
    // What /ready does, and the regular test of a member that is silent.
    assert!(stage.cluster.check("m").await.is_err());
    assert_eq!(stage.state(), MemberState::Up, "one such failure may be a busy token");
    assert_eq!(stage.last_error(), "C_DecryptInit: CKR_DEVICE_MEMORY");
    stage.until("it goes down", |stage| stage.closings() == 1).await;
    broken.store(false, Ordering::Release);
    stage.until("it comes back", |stage| stage.state() == MemberState::Up).await;
    stage.cluster.close().await;
}

#[tokio::test]
async fn a_call_whose_answer_nobody_read_does_not_hang() {
    let (answer, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let stage = Stage::set(SHORT, move |_, peer| {
        while let Some((id, asked)) = peer.next() {
            if asked == Asked::Random {
                let _ = wait.lock().unwrap().recv();
                thread::sleep(SHORT / 2);
            }
            peer.answer(id, asked);
        }
    });
    stage.cluster.start().await.unwrap();
    let stage = Arc::new(stage);
    for _ in 0..5 {
        let call = tokio::spawn({
            let stage = Arc::clone(&stage);
            async move { stage.random().await }
        });
        stage.until("the call runs", |stage| stage.cluster.members()[0].sessions_busy == 1).await;
        // The only thread of the runtime is kept from running: for a moment, so that the regular check is due, and then by a
        // task that runs before the check. Meanwhile the answer comes.
        let blocker = tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            thread::sleep(SHORT * 2);
        });
        tokio::task::yield_now().await;
        answer.send(()).unwrap();
        thread::sleep(SHORT / 4);
        blocker.await.unwrap();
        assert_eq!(call.await.unwrap().unwrap(), b"rand");
    }
    assert_eq!((stage.closings(), stage.started()), (0, 1));
    stage.cluster.close().await;
}
