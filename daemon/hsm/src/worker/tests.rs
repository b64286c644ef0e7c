//! Tests of the worker with SoftHSM2. The worker runs on a thread, and the test holds the daemon's end of the socket.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use claviger_process::lock::lock;
use cryptoki::context::Pkcs11;
use cryptoki::error::RvError;
use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use cryptoki::slot::Slot;
use rsa::rand_core::OsRng;
use rsa::traits::PublicKeyParts;
use rsa::{Pkcs1v15Sign, RsaPrivateKey, RsaPublicKey, sha2};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::objects::private_numbers;
use super::session_threads::Finished;
use super::{ServeError, init_token, serve, set_env};
use crate::code::Function;
use crate::config::{Pin, TokenRef};
use crate::error::{Failure, HsmError};
use crate::identity::{Fingerprint, KeyId};
use crate::keys::{Hash, KeyUsage, NewKey, Oaep, SignScheme, TokenKey};
use crate::link::{self, Answer, MAX_FRAME, Report, Request, Start};
use crate::software_rsa;

const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
const USER_PIN: &str = "123456";
const SO_PIN: &str = "76543210";
const OAEP: Oaep = Oaep { hash: Hash::Sha256, mgf: Hash::Sha256 };

static KEY: LazyLock<RsaPrivateKey> = LazyLock::new(|| RsaPrivateKey::new(&mut OsRng, 2048).unwrap());

/// The directory of all tokens. The process has one instance of the module, so only one test uses it at a time.
static TOKENS: LazyLock<Mutex<tempfile::TempDir>> = LazyLock::new(|| {
    assert!(Path::new(SOFTHSM).exists(), "{SOFTHSM} is missing. Install it: apt-get install libsofthsm2");
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tokens")).unwrap();
    let conf = dir.path().join("softhsm2.conf");
    let text = format!("directories.tokendir = {}\nobjectstore.backend = file\n", dir.path().join("tokens").display());
    fs::write(&conf, text).unwrap();
    set_env(&BTreeMap::from([("SOFTHSM2_CONF".to_owned(), conf.display().to_string())]));
    Mutex::new(dir)
});

fn softhsm(label: &str) -> MutexGuard<'static, tempfile::TempDir> {
    let turn = lock(&TOKENS);
    init_token(SOFTHSM.as_ref(), label, &pin(SO_PIN), &pin(USER_PIN)).unwrap();
    turn
}

fn pin(pin: &str) -> Pin {
    Pin::new(pin.to_owned())
}

fn start(label: &str, sessions: u32) -> Start {
    Start {
        module: PathBuf::from(SOFTHSM),
        token: TokenRef::Label(label.to_owned()),
        pin: pin(USER_PIN),
        sessions,
        may_use_final_try: false,
        pin_number: 1,
    }
}

/// Reports of the worker other than answers.
#[derive(Default)]
struct Seen {
    logins: usize,
    searches: usize,
    opened: usize,
    not_opened: Vec<HsmError>,
    closed: usize,
    notes: Vec<String>,
    /// Numbers of refused PINs.
    refused: Vec<u64>,
    start_failed: Option<Failure>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Got {
    Bytes(Vec<u8>),
    Keys(Vec<TokenKey>),
    Public,
    Done,
}

/// The daemon's end of the socket.
struct Daemon {
    socket: OwnedFd,
    worker: JoinHandle<Result<Finished, ServeError>>,
    seen: Seen,
    /// Answers that no caller has fetched yet.
    got: HashMap<u32, Result<Got, HsmError>>,
    last_id: u32,
}

impl Daemon {
    fn new() -> Self {
        let (socket, worker) = link::pair().unwrap();
        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        let worker = thread::spawn(move || serve(worker, || (Duration::ZERO, 0)));
        Daemon { socket, worker, seen: Seen::default(), got: HashMap::new(), last_id: 0 }
    }

    /// Starts a worker and waits until it has answered the start.
    fn started(start: Start) -> Self {
        let mut daemon = Daemon::new();
        assert_eq!(daemon.call(&Request::Start(start)), Ok(Got::Done));
        daemon
    }

    fn send_frame(&self, frame: &[u8]) {
        assert_eq!(send(&self.socket, frame, SendFlags::NOSIGNAL).unwrap(), frame.len());
    }

    fn frame(id: u32, request: &Request<'_>) -> Vec<u8> {
        [&id.to_le_bytes()[..], &link::encode(request).unwrap()].concat()
    }

    fn send(&mut self, request: &Request<'_>) -> u32 {
        self.last_id += 1;
        self.send_frame(&Self::frame(self.last_id, request));
        self.last_id
    }

    fn call(&mut self, request: &Request<'_>) -> Result<Got, HsmError> {
        let id = self.send(request);
        self.answer(id)
    }

    fn answer(&mut self, id: u32) -> Result<Got, HsmError> {
        loop {
            if let Some(result) = self.got.remove(&id) {
                return result;
            }
            assert!(self.read(), "the worker ended");
        }
    }

    /// Reads one report. Returns false at the end.
    fn read(&mut self) -> bool {
        let mut buffer = vec![0; MAX_FRAME];
        let Ok((len @ 1.., _)) = recv(&self.socket, &mut buffer, RecvFlags::empty()) else { return false };
        let seen = &mut self.seen;
        match link::decode_report(&buffer[..len]).unwrap() {
            Report::Reply { id, result, .. } => {
                let result = result.map(|answer| match answer {
                    Answer::Bytes(bytes) => Got::Bytes(bytes.to_vec()),
                    Answer::Keys { keys, more } => {
                        assert!(!more);
                        Got::Keys(keys)
                    }
                    Answer::Public(_) => Got::Public,
                    Answer::Done => Got::Done,
                });
                assert!(self.got.insert(id, result).is_none(), "{id} is answered twice");
            }
            Report::StartFailed(failure) => seen.start_failed = Some(failure),
            Report::Login => seen.logins += 1,
            Report::KeySearch => seen.searches += 1,
            Report::SessionOpened { result: Ok(()), .. } => seen.opened += 1,
            Report::SessionOpened { result: Err(error), .. } => seen.not_opened.push(error),
            Report::SessionClosed => seen.closed += 1,
            Report::FewSessions { given } => panic!("SoftHSM2 has sessions enough, not {given}"),
            Report::Note { text, .. } => seen.notes.push(text.to_owned()),
            Report::PinRefused { number, .. } => {
                assert!(!seen.refused.contains(&number), "told twice");
                seen.refused.push(number);
            }
            Report::Usage { .. } => {}
        }
        true
    }

    fn wait_until(&mut self, wanted: impl Fn(&Seen) -> bool) {
        while !wanted(&self.seen) {
            assert!(self.read(), "the worker ended");
        }
    }

    /// Tells the worker that no more calls follow, and reads its remaining reports.
    fn finish(mut self) -> (Seen, Finished) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        while self.read() {}
        (self.seen, self.worker.join().unwrap().unwrap())
    }
}

const CLEAN: Finished = Finished { started: true, clean: true };

const ID: &[u8] = &[1, 2, 3];

fn public() -> Fingerprint {
    Fingerprint::of_modulus(&KEY.n().to_bytes_be())
}

fn import() -> Request<'static> {
    Request::Import(new_key(ID), software_rsa::parts(&KEY))
}

fn new_key(id: &[u8]) -> NewKey {
    NewKey { id: KeyId(id.to_vec()), label: "worker test".to_owned(), bits: 2048, usage: KeyUsage::Both }
}

fn encrypt(message: &[u8]) -> Vec<u8> {
    RsaPublicKey::from(&*KEY).encrypt(&mut OsRng, rsa::Oaep::new::<sha2::Sha256>(), message).unwrap()
}

fn decrypt(ciphertext: &[u8]) -> Request<'_> {
    Request::Decrypt { id: ID, public: public(), oaep: OAEP, ciphertext }
}

/// The module, in the worker's instance, and the slot of a token.
fn token(label: &str) -> (Pkcs11, Slot) {
    let module = Pkcs11::new(SOFTHSM).unwrap();
    let slots = module.get_slots_with_token().unwrap();
    let slot = slots.into_iter().find(|slot| module.get_token_info(*slot).unwrap().label() == label).unwrap();
    (module, slot)
}

/// Imports a private key that permits only these mechanisms, without the worker's knowledge. The worker has logged in.
fn import_restricted(label: &str, id: &[u8], key: &RsaPrivateKey, mechanisms: &[MechanismType]) {
    let (module, slot) = token(label);
    let template = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Token(true),
        Attribute::Id(id.to_vec()),
        Attribute::Decrypt(true),
        Attribute::AllowedMechanisms(mechanisms.to_vec()),
    ];
    let template: Vec<_> = template.into_iter().chain(private_numbers(&software_rsa::parts(key))).collect();
    module.open_rw_session(slot).unwrap().create_object(&template).unwrap();
}

/// Closes all sessions of a token without the worker's knowledge: test and worker share the module's instance.
fn close_all_sessions(label: &str) {
    let (_module, slot) = token(label);
    assert!(super::ffi::close_all_sessions(SOFTHSM.as_ref(), slot));
}

#[test]
fn every_operation_is_served_and_the_end_is_clean() {
    let _turn = softhsm("operations");
    let mut daemon = Daemon::started(start("operations", 3));
    daemon.wait_until(|seen| seen.opened == 3);
    assert_eq!(daemon.seen.logins, 1, "one login for all sessions");

    assert_eq!(daemon.call(&import()), Ok(Got::Done));
    assert_eq!(daemon.call(&import()), Err(HsmError::KeyExists));
    let ciphertext = encrypt(b"secret");
    assert_eq!(daemon.call(&decrypt(&ciphertext)), Ok(Got::Bytes(b"secret".to_vec())));
    let short = daemon.call(&decrypt(&ciphertext[1..]));
    assert_eq!(short, Err(HsmError::new(Function::Decrypt, RvError::EncryptedDataLenRange)));
    let mut broken = ciphertext;
    broken[100] ^= 1;
    assert!(daemon.call(&decrypt(&broken)).is_err());

    let digest = [7; 32];
    let scheme = SignScheme::Pkcs1(Hash::Sha256);
    let signed = daemon.call(&Request::Sign { id: ID, public: public(), scheme, digest: &digest });
    let Ok(Got::Bytes(signature)) = signed else { panic!("{signed:?}") };
    RsaPublicKey::from(&*KEY).verify(Pkcs1v15Sign::new::<sha2::Sha256>(), &digest, &signature).unwrap();

    let other = Fingerprint::of_modulus(b"another key of that id");
    let lacking = daemon.call(&Request::Sign { id: ID, public: other, scheme, digest: &digest });
    assert_eq!(lacking, Err(HsmError::NoSuchKey));
    assert_eq!(daemon.call(&Request::Ping), Ok(Got::Done));
    assert!(matches!(daemon.call(&Request::Random(48)), Ok(Got::Bytes(bytes)) if bytes.len() == 48));
    assert_eq!(daemon.call(&Request::Random(u16::MAX)), Err(HsmError::UnexpectedReply), "larger than a frame");
    for search in [true, false] {
        let keys = daemon.call(&Request::Keys { search });
        assert!(
            matches!(&keys, Ok(Got::Keys(keys)) if keys.len() == 1 && keys[0].fingerprint == Some(public())),
            "{keys:?}"
        );
    }
    assert_eq!(daemon.call(&Request::Start(start("operations", 1))), Err(HsmError::UnexpectedReply), "it has started");

    let (seen, finished) = daemon.finish();
    assert_eq!(finished, CLEAN);
    assert_eq!((seen.opened, seen.closed, seen.logins), (3, 3, 1));

    // A key exists now, so the next worker finds out at its start how the token does OAEP.
    let daemon = Daemon::started(start("operations", 1));
    let notes = daemon.finish().0.notes;
    assert!(notes.iter().any(|note| note.starts_with("token tried out for OAEP")), "{notes:?}");
}

#[test]
fn a_key_that_one_session_makes_is_known_to_all() {
    let _turn = softhsm("new key");
    let mut daemon = Daemon::started(start("new key", 4));
    daemon.wait_until(|seen| seen.opened == 4);
    assert_eq!(daemon.call(&Request::Generate(new_key(b"new"))), Ok(Got::Public));
    let ids: Vec<_> = (0..32).map(|_| daemon.send(&Request::Keys { search: false })).collect();
    for id in ids {
        assert!(matches!(daemon.answer(id), Ok(Got::Keys(keys)) if keys.len() == 1));
    }
    assert_eq!(daemon.finish().1, CLEAN);
}

#[test]
fn stale_sessions_are_renewed_before_the_daemon_hears_of_it() {
    let _turn = softhsm("stale");
    let mut daemon = Daemon::started(start("stale", 2));
    daemon.wait_until(|seen| seen.opened == 2);
    assert_eq!(daemon.call(&import()), Ok(Got::Done));
    let ciphertext = encrypt(b"secret");
    close_all_sessions("stale");
    let ids: Vec<_> = (0..8).map(|_| daemon.send(&decrypt(&ciphertext))).collect();
    for id in ids {
        assert_eq!(daemon.answer(id), Ok(Got::Bytes(b"secret".to_vec())));
    }
    assert_eq!(daemon.seen.logins, 2, "one login again, for both");
    let (seen, finished) = daemon.finish();
    assert_eq!((seen.opened, finished), (seen.closed, CLEAN));
    assert!((3..=4).contains(&seen.opened), "each stale session once: {}", seen.opened);
}

#[test]
fn a_key_of_another_application_does_not_decide_how_ours_decrypts() {
    let _turn = softhsm("foreign");
    let foreign = RsaPrivateKey::new(&mut OsRng, 2048).unwrap();
    let daemon = Daemon::started(start("foreign", 1));
    import_restricted("foreign", b"foreign", &foreign, &[MechanismType::RSA_PKCS]);
    daemon.finish();
    // At its start, the worker tries OAEP with the only key that there is.
    let mut daemon = Daemon::started(start("foreign", 1));
    import_restricted("foreign", ID, &KEY, &[MechanismType::RSA_PKCS_OAEP]);
    let oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
    let padding = rsa::Oaep::new::<sha1::Sha1>();
    let ciphertext = RsaPublicKey::from(&*KEY).encrypt(&mut OsRng, padding, b"secret").unwrap();
    let decrypt = Request::Decrypt { id: ID, public: public(), oaep, ciphertext: &ciphertext };
    for _ in 0..2 {
        assert_eq!(daemon.call(&decrypt), Ok(Got::Bytes(b"secret".to_vec())));
    }
    let theirs = RsaPublicKey::from(&foreign).encrypt(&mut OsRng, rsa::Oaep::new::<sha1::Sha1>(), b"x").unwrap();
    let public = Fingerprint::of_modulus(&foreign.n().to_bytes_be());
    let decrypt_theirs = Request::Decrypt { id: b"foreign", public, oaep, ciphertext: &theirs };
    assert!(daemon.call(&decrypt_theirs).unwrap_err().is_inability());
    assert_eq!(daemon.call(&decrypt), Ok(Got::Bytes(b"secret".to_vec())));
    assert_eq!(daemon.finish().1, CLEAN);
}

#[test]
fn a_refused_pin_is_tried_once_and_another_one_brings_the_token_back() {
    let _turn = softhsm("pin");
    let mut daemon = Daemon::new();
    daemon.send(&Request::Start(Start { pin: pin("wrong!"), ..start("pin", 2) }));
    let (seen, finished) = daemon.finish();
    assert_eq!(seen.start_failed.map(|failure| failure.error.refuses_pin()), Some(true));
    assert_eq!((seen.logins, seen.refused, finished.started), (1, vec![1], false));

    // The token now reports that wrong try.
    let mut daemon = Daemon::started(start("pin", 2));
    assert!(daemon.seen.notes.iter().any(|note| note.contains("CKF_USER_PIN_COUNT_LOW")), "{:?}", daemon.seen.notes);
    daemon.wait_until(|seen| seen.opened == 2);
    assert_eq!(daemon.call(&import()), Ok(Got::Done));

    assert_eq!(daemon.call(&Request::SetPin(2, pin("wrong!"))), Ok(Got::Done));
    close_all_sessions("pin");
    let ciphertext = encrypt(b"secret");
    for _ in 0..10 {
        let error = daemon.call(&decrypt(&ciphertext)).unwrap_err();
        assert!(error.refuses_pin() || error == HsmError::PinRefused, "{error}");
    }
    assert_eq!(daemon.seen.logins, 2, "the right one and the wrong one, each once");
    assert_eq!(daemon.seen.refused, [2]);
    // The same PIN again does not count as a new PIN.
    assert_eq!(daemon.call(&Request::SetPin(3, pin("wrong!"))), Ok(Got::Done));
    assert_eq!(daemon.call(&decrypt(&ciphertext)), Err(HsmError::PinRefused));
    assert_eq!(daemon.call(&Request::SetPin(4, pin(USER_PIN))), Ok(Got::Done));
    assert_eq!(daemon.call(&decrypt(&ciphertext)), Ok(Got::Bytes(b"secret".to_vec())));
    // Both threads have a session again.
    daemon.wait_until(|seen| seen.opened - seen.closed == 2);
    let (seen, finished) = daemon.finish();
    assert_eq!((seen.logins, finished), (3, CLEAN));
    assert!(seen.not_opened.iter().all(|error| error.refuses_pin() || *error == HsmError::PinRefused));
}

#[test]
fn frames_that_cannot_be_read_harm_no_other_call() {
    let _turn = softhsm("torn");
    let mut daemon = Daemon::started(start("torn", 1));
    assert_eq!(daemon.call(&import()), Ok(Got::Done));
    let ciphertext = encrypt(b"secret");
    let whole = Daemon::frame(77, &decrypt(&ciphertext));
    for len in (4..whole.len()).step_by(13) {
        daemon.send_frame(&whole[..len]);
        assert_eq!(daemon.answer(77), Err(HsmError::UnexpectedReply), "{len}");
    }
    // A truncated id, an unknown request, and a frame above the maximum length.
    daemon.send_frame(&whole[..3]);
    daemon.send_frame(&[&5_u32.to_le_bytes()[..], &[0xff; 20]].concat());
    assert_eq!(daemon.answer(5), Err(HsmError::UnexpectedReply));
    daemon.send_frame(&Daemon::frame(6, &decrypt(&vec![1; MAX_FRAME])));
    assert_eq!(daemon.answer(6), Err(HsmError::UnexpectedReply));
    // Two calls with the same id are two calls.
    daemon.send_frame(&whole);
    assert_eq!(daemon.answer(77), Ok(Got::Bytes(b"secret".to_vec())));
    daemon.send_frame(&whole);
    assert_eq!(daemon.answer(77), Ok(Got::Bytes(b"secret".to_vec())));
    assert_eq!(daemon.finish().1, CLEAN);
}

#[test]
fn a_flood_is_answered_call_by_call() {
    const CALLS: u32 = 600;
    let _turn = softhsm("flood");
    let mut daemon = Daemon::started(start("flood", 4));
    assert_eq!(daemon.call(&import()), Ok(Got::Done));
    let messages: Vec<Vec<u8>> = (0..8).map(|n| vec![n; 16]).collect();
    let ciphertexts: Vec<_> = messages.iter().map(|message| encrypt(message)).collect();
    let writer = daemon.socket.try_clone().unwrap();
    let sent = ciphertexts.clone();
    let flood = thread::spawn(move || {
        for n in 0..CALLS {
            let frame = Daemon::frame(1000 + n, &decrypt(&sent[n as usize % sent.len()]));
            send(&writer, &frame, SendFlags::NOSIGNAL).unwrap();
        }
    });
    for n in 0..CALLS {
        assert_eq!(daemon.answer(1000 + n), Ok(Got::Bytes(messages[n as usize % messages.len()].clone())));
    }
    flood.join().unwrap();
    assert!(daemon.got.is_empty());
    assert_eq!(daemon.finish().1, CLEAN);
}

#[test]
fn calls_that_were_sent_before_the_end_are_answered() {
    let _turn = softhsm("end");
    let mut daemon = Daemon::started(start("end", 2));
    assert_eq!(daemon.call(&import()), Ok(Got::Done));
    let ciphertext = encrypt(b"secret");
    let ids: Vec<_> = (0..20).map(|_| daemon.send(&decrypt(&ciphertext))).collect();
    rustix::net::shutdown(&daemon.socket, rustix::net::Shutdown::Write).unwrap();
    for id in ids {
        assert_eq!(daemon.answer(id), Ok(Got::Bytes(b"secret".to_vec())));
    }
    assert_eq!(daemon.finish().1, CLEAN);
}

#[test]
fn a_start_that_fails_says_why() {
    let _turn = softhsm("there");
    let missing_module = Start { module: PathBuf::from("/nowhere/x.so"), ..start("there", 1) };
    for (start, error, detail) in [
        (missing_module, HsmError::Module, "/nowhere/x.so"),
        (start("elsewhere", 1), HsmError::NoSuchToken, "label \"elsewhere\" in /usr/lib"),
    ] {
        let mut daemon = Daemon::new();
        daemon.send(&Request::Start(start));
        let (seen, finished) = daemon.finish();
        let failure = seen.start_failed.unwrap();
        assert_eq!(failure.error, error);
        assert!(failure.detail.contains(detail), "{failure}");
        assert!(!finished.started && seen.logins == 0);
    }
}

#[test]
fn what_does_not_begin_with_a_start_ends() {
    let mut daemon = Daemon::new();
    daemon.send(&Request::Ping);
    assert!(daemon.worker.join().unwrap().is_err());
    let daemon = Daemon::new();
    daemon.send_frame(b"garbage");
    assert!(daemon.worker.join().unwrap().is_err());
    let (seen, finished) = Daemon::new().finish();
    assert_eq!(finished, CLEAN);
    assert_eq!(seen.opened, 0);
}
