//! The token suite: requirements that hold for every token. It is run once for each kind of token.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)]

pub mod program;
pub mod software_rsa;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger_hsm::{
    CallTimeouts, Cluster, Event, Failure, FaultOwner, Hash, HsmError, KeyId, KeyRef, KeyUsage, MemberConfig,
    MemberState, MemberStatus, NewKey, Oaep, Observer, Operation, Pin, RsaPrivateParts, RsaPublic, SignScheme,
    TokenRef, WorkerProgram,
};
use cryptoki::context::Pkcs11;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use cryptoki::session::{Session, UserType};
use ring::signature as verify;
use rsa::rand_core::{OsRng, RngCore};
use rsa::traits::PublicKeyParts;
use rsa::{BigUint, RsaPrivateKey, RsaPublicKey};

pub const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
pub const USER_PIN: &str = "123456";
pub const SO_PIN: &str = "76543210";
/// Label of the objects that the suite makes, by which it also removes objects of earlier, aborted runs.
const LABEL: &str = "claviger-hsm suite";
const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];

/// Fails, instead of skipping the test, if a token is not installed.
pub fn expect_installed(path: &str, package: &str) {
    assert!(Path::new(path).exists(), "{path} is missing. Install it: apt-get install {package}");
}

/// Creates a directory with SoftHSM2 tokens and points the process environment to it.
pub fn softhsm_tokens(labels: &[&str]) -> tempfile::TempDir {
    expect_installed(SOFTHSM, "libsofthsm2");
    let dir = tempfile::tempdir().unwrap();
    let tokens = dir.path().join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    let conf = dir.path().join("softhsm2.conf");
    std::fs::write(
        &conf,
        format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display()),
    )
    .unwrap();
    claviger_hsm::set_env(&BTreeMap::from([("SOFTHSM2_CONF".to_owned(), conf.display().to_string())]));
    for label in labels {
        claviger_hsm::init_token(SOFTHSM.as_ref(), label, &pin(SO_PIN), &pin(USER_PIN)).unwrap();
    }
    dir
}

pub fn pin(pin: &str) -> Pin {
    Pin::new(pin.to_owned())
}

pub fn member(name: &str, module: &str, label: &str) -> MemberConfig {
    MemberConfig {
        name: name.to_owned(),
        module: PathBuf::from(module),
        token: TokenRef::Label(label.to_owned()),
        pin: pin(USER_PIN),
        env: BTreeMap::new(),
        priority: 0,
        weight: 1,
        sessions: 8,
        queue: 4096,
    }
}

/// Returns the example of this crate that is only a worker.
pub fn worker_program() -> WorkerProgram {
    WorkerProgram { path: program::worker().to_owned(), arguments: Vec::new(), hidden: Vec::new() }
}

/// Waits until all sessions of all members are open. A worker opens the first session before it serves, and the others
/// later.
pub async fn all_sessions_open(cluster: &Cluster) {
    let patience = soon();
    while cluster.members().iter().any(|member| member.sessions_open < member.sessions_wanted) {
        assert!(Instant::now() < patience, "{:?}", cluster.members());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn load(members: Vec<MemberConfig>, observer: Observer) -> Result<Cluster, HsmError> {
    Cluster::new(members, CallTimeouts { watchdog: Duration::from_secs(10) }, worker_program(), observer)
}

pub fn is_up(status: &MemberStatus) -> bool {
    status.state == MemberState::Up
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Counts of the observer's events.
#[derive(Default)]
pub struct Counts {
    pub logins: AtomicUsize,
    pub searches: AtomicUsize,
    pub opened: AtomicUsize,
    pub closed: AtomicUsize,
    pub decrypts: AtomicUsize,
}

impl Counts {
    pub fn observer(self: &Arc<Self>) -> Observer {
        let counts = Arc::clone(self);
        Arc::new(move |_, event| {
            let counter = match event {
                Event::Login => &counts.logins,
                Event::KeySearch => &counts.searches,
                Event::SessionOpened => &counts.opened,
                Event::SessionClosed => &counts.closed,
                Event::Call { op: Operation::Decrypt, rv: "ok", .. } => &counts.decrypts,
                _ => return,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        })
    }
}

pub fn count(counter: &AtomicUsize) -> usize {
    counter.load(Ordering::Relaxed)
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

pub fn new_id() -> KeyId {
    let mut id = vec![0; 16];
    OsRng.fill_bytes(&mut id);
    KeyId(id)
}

/// Returns the reference to the key with this id and this public key.
pub fn named(id: &KeyId, key: &RsaPublicKey) -> KeyRef {
    KeyRef::new(id.clone(), &key.n().to_bytes_be())
}

pub fn new_key(id: &KeyId, usage: KeyUsage) -> NewKey {
    NewKey { id: id.clone(), label: LABEL.to_owned(), bits: 2048, usage }
}

pub fn software_key() -> RsaPrivateKey {
    RsaPrivateKey::new(&mut OsRng, 2048).unwrap()
}

pub fn encrypt(key: &RsaPublicKey, oaep: Oaep, message: &[u8]) -> Vec<u8> {
    key.encrypt(&mut OsRng, software_rsa::padding(oaep), message).unwrap()
}

fn combinations() -> impl Iterator<Item = Oaep> {
    HASHES.into_iter().flat_map(|hash| HASHES.into_iter().map(move |mgf| Oaep { hash, mgf }))
}

pub const SHA1: Oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
pub const SHA256: Oaep = Oaep { hash: Hash::Sha256, mgf: Hash::Sha256 };

fn public(key: &RsaPublic) -> RsaPublicKey {
    RsaPublicKey::new(BigUint::from_bytes_be(&key.n), BigUint::from_bytes_be(&key.e)).unwrap()
}

/// Runs the whole suite. `tested` is the token under test, `other` a spare token.
pub fn run(tested: MemberConfig, other: MemberConfig) {
    let runtime = runtime();
    one_token(&runtime, &tested);
    concurrent_callers(&runtime, &tested);
    keys_of_other_programs(&runtime, &tested);
    two_tokens(&runtime, &tested, &other);
    clean_up(&tested);
    clean_up(&other);
}

fn one_token(runtime: &tokio::runtime::Runtime, tested: &MemberConfig) {
    let counts = Arc::new(Counts::default());
    let cluster = load(vec![tested.clone()], counts.observer()).unwrap();
    let name = tested.name.as_str();
    runtime.block_on(async {
        cluster.start().await.unwrap();
        let status = &cluster.members()[0];
        assert!(is_up(status), "{status:?}");
        assert!((1..=tested.sessions).contains(&status.sessions_open), "{status:?}");
        all_sessions_open(&cluster).await;

        // Tests imported and generated keys.
        let key = software_key();
        let id = new_id();
        cluster.import_rsa(name, new_key(&id, KeyUsage::Both), software_rsa::parts(&key)).await.unwrap();
        let again = cluster.import_rsa(name, new_key(&id, KeyUsage::Both), software_rsa::parts(&key)).await;
        assert!(matches!(again, Err(Failure { error: HsmError::KeyExists, .. })), "{again:?}");
        let id = named(&id, &key.to_public_key());
        let found = shown(&cluster, name, &id).await.unwrap();
        assert_eq!(found.n, key.n().to_bytes_be());
        assert_eq!(found.e, key.e().to_bytes_be());
        let signs = new_id();
        let made = cluster.generate_rsa(name, new_key(&signs, KeyUsage::Sign)).await.unwrap();
        assert_eq!(made.n.len(), 256);
        assert_eq!(made.e, [1, 0, 1]);
        let signs = named(&signs, &public(&made));
        assert_eq!(shown(&cluster, name, &signs).await, Some(made.clone()));
        assert!(shown(&cluster, name, &id).await.is_some());
        assert_eq!(count(&counts.logins), 1);

        decrypts_everything(&cluster, &id, &key.to_public_key()).await;
        signs_everything(&cluster, &id, &found).await;
        signs_everything(&cluster, &signs, &made).await;
        refuses_nonsense(&cluster, name, &id, &signs, &public(&made)).await;

        let random = cluster.random(64, soon()).await.unwrap();
        assert_eq!(random.len(), 64);
        assert_ne!(random, cluster.random(64, soon()).await.unwrap());

        deadlines(&cluster, &id, &key.to_public_key()).await;
        callers_that_leave(&cluster, &id, &key.to_public_key()).await;

        // A key created in one session is available in all sessions.
        let late = new_id();
        let made = cluster.generate_rsa(name, new_key(&late, KeyUsage::Decrypt)).await.unwrap();
        let late = named(&late, &public(&made));
        let ciphertext = encrypt(&public(&made), SHA1, b"late");
        let all: Vec<_> = (0..32)
            .map(|_| {
                let (cluster, late, ciphertext) = (cluster.clone(), late.clone(), ciphertext.clone());
                tokio::spawn(async move { cluster.decrypt(&late, SHA1, &ciphertext, soon(), None).await.unwrap() })
            })
            .collect();
        for task in all {
            assert_eq!(*task.await.unwrap().value, b"late");
        }

        assert_eq!(count(&counts.logins), 1, "one login for the token");
        cluster.close().await;
        assert_eq!(count(&counts.opened), count(&counts.closed));
        let closed = cluster.random(8, soon()).await;
        assert!(matches!(closed, Err(HsmError::NoneServing)), "{closed:?}");
    });
}

async fn decrypts_everything(cluster: &Cluster, id: &KeyRef, key: &RsaPublicKey) {
    for oaep in combinations() {
        for message in [&b""[..], b"0123456789abcdef0123456789abcdef"] {
            let ciphertext = encrypt(key, oaep, message);
            let done = cluster
                .decrypt(id, oaep, &ciphertext, soon(), None)
                .await
                .unwrap_or_else(|error| panic!("{oaep:?}: {error}"));
            assert_eq!(*done.value, message, "{oaep:?}");
            assert_eq!(done.retries, 0);
        }
        // The ciphertext is valid, the parameters are not.
        let other = Oaep { hash: if oaep.hash == Hash::Sha1 { Hash::Sha256 } else { Hash::Sha1 }, ..oaep };
        let mixed = encrypt(key, other, b"mixed");
        let error = cluster.decrypt(id, oaep, &mixed, soon(), None).await.unwrap_err();
        assert!(error.is_data(), "{oaep:?}: {error:?}");
    }
}

async fn signs_everything(cluster: &Cluster, id: &KeyRef, key: &RsaPublic) {
    let message = b"signed";
    let digests: [(Hash, &verify::RsaParameters, &verify::RsaParameters, _); 3] = [
        (Hash::Sha256, &verify::RSA_PKCS1_2048_8192_SHA256, &verify::RSA_PSS_2048_8192_SHA256, &ring::digest::SHA256),
        (Hash::Sha384, &verify::RSA_PKCS1_2048_8192_SHA384, &verify::RSA_PSS_2048_8192_SHA384, &ring::digest::SHA384),
        (Hash::Sha512, &verify::RSA_PKCS1_2048_8192_SHA512, &verify::RSA_PSS_2048_8192_SHA512, &ring::digest::SHA512),
    ];
    let key = verify::RsaPublicKeyComponents { n: &key.n, e: &key.e };
    for (hash, pkcs1, pss, algorithm) in digests {
        let digest = ring::digest::digest(algorithm, message);
        for (scheme, parameters) in [(SignScheme::Pkcs1(hash), pkcs1), (SignScheme::Pss(hash), pss)] {
            let done = cluster
                .sign(id, scheme, digest.as_ref(), soon(), None)
                .await
                .unwrap_or_else(|error| panic!("{scheme:?}: {error}"));
            key.verify(parameters, message, &done.value).unwrap_or_else(|_| panic!("{scheme:?} does not verify"));
        }
        let short = cluster.sign(id, SignScheme::Pss(hash), &[1, 2, 3], soon(), None).await.unwrap_err();
        assert!(short.is_data());
    }
}

async fn refuses_nonsense(cluster: &Cluster, name: &str, id: &KeyRef, signs: &KeyRef, signs_public: &RsaPublicKey) {
    let before = cluster.members()[0].clone();
    for oaep in [SHA1, SHA256] {
        for ciphertext in [vec![0; 256], vec![1; 256], vec![0xff; 256], vec![1; 255], vec![]] {
            let error = cluster.decrypt(id, oaep, &ciphertext, soon(), None).await.unwrap_err();
            assert!(error.is_data(), "{} bytes, {oaep:?}: {error:?}", ciphertext.len());
        }
    }
    let unknown = named(&new_id(), signs_public);
    for _ in 0..5 {
        let error = cluster.decrypt(&unknown, SHA1, &[0; 256], soon(), None).await.unwrap_err();
        assert_eq!(error, HsmError::NoSuchKey);
    }
    assert_eq!(shown(cluster, name, &unknown).await, None);
    // A key for signatures does not decrypt, and this is not the fault of the ciphertext.
    let ciphertext = encrypt(signs_public, SHA1, b"no");
    let error = cluster.decrypt(signs, SHA1, &ciphertext, soon(), None).await.unwrap_err();
    assert!(!error.is_data() && error.fault().owner == FaultOwner::Nobody, "{error:?}");
    // None of this closed a session or counted against the member.
    let status = &cluster.members()[0];
    assert!(is_up(status), "{status:?}");
    assert_eq!((status.sessions_open, status.worker), (before.sessions_open, before.worker), "{status:?}");
    let unknown = cluster.keys_on("unknown", false).await;
    assert_eq!(unknown.unwrap_err().error, HsmError::UnknownMember);
}

async fn deadlines(cluster: &Cluster, id: &KeyRef, key: &RsaPublicKey) {
    let ciphertext = encrypt(key, SHA1, b"late");
    let past = cluster.decrypt(id, SHA1, &ciphertext, Instant::now(), None).await;
    assert!(matches!(past, Err(HsmError::Deadline)), "{past:?}");
    let short: Vec<_> = (0..256)
        .map(|_| {
            let (cluster, id, ciphertext) = (cluster.clone(), id.clone(), ciphertext.clone());
            let deadline = Instant::now() + Duration::from_millis(5);
            tokio::spawn(async move { cluster.decrypt(&id, SHA1, &ciphertext, deadline, None).await })
        })
        .collect();
    let mut late = 0;
    for task in short {
        match task.await.unwrap() {
            Ok(_) => {}
            Err(HsmError::Deadline) => late += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(late > 0, "256 decryptions do not fit into 5 ms");
    // Callers with too little time are no evidence against the member.
    let status = &cluster.members()[0];
    assert!(is_up(status) && status.closings == 0 && status.sessions_open == 8, "{status:?}");
}

async fn callers_that_leave(cluster: &Cluster, id: &KeyRef, key: &RsaPublicKey) {
    let ciphertext = encrypt(key, SHA1, b"gone");
    let leaving: Vec<_> = (0..64)
        .map(|_| {
            let (cluster, id, ciphertext) = (cluster.clone(), id.clone(), ciphertext.clone());
            tokio::spawn(async move { cluster.decrypt(&id, SHA1, &ciphertext, soon(), None).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(3)).await;
    leaving.iter().for_each(tokio::task::JoinHandle::abort);
    let patience = soon();
    while cluster.members()[0].in_flight > 0 {
        assert!(Instant::now() < patience, "{:?}", cluster.members());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let done = cluster.decrypt(id, SHA1, &ciphertext, soon(), None).await;
    assert_eq!(*done.unwrap().value, b"gone");
}

/// Returns the public key of a key, as the token shows it.
async fn shown(cluster: &Cluster, member: &str, wanted: &KeyRef) -> Option<RsaPublic> {
    let keys = cluster.keys_on(member, false).await.unwrap();
    keys.into_iter().find(|key| key.is(wanted)).and_then(|key| key.public)
}

/// Returns the attributes of a private key that another program imports into a token.
pub fn others_key(id: Option<&KeyId>, key: &RsaPrivateKey) -> Vec<Attribute> {
    let parts = software_rsa::parts(key);
    let mut template = vec![
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Label(LABEL.as_bytes().to_vec()),
        Attribute::Sign(true),
        Attribute::Decrypt(true),
        Attribute::Modulus(parts.n.clone()),
        Attribute::PublicExponent(parts.e.clone()),
        Attribute::PrivateExponent(parts.d.clone()),
        Attribute::Prime1(parts.p.clone()),
        Attribute::Prime2(parts.q.clone()),
        Attribute::Exponent1(parts.dp.clone()),
        Attribute::Exponent2(parts.dq.clone()),
        Attribute::Coefficient(parts.qinv.clone()),
    ];
    template.extend(id.map(|id| Attribute::Id(id.0.clone())));
    template
}

/// Other programs make keys while the cluster runs: one with an id that is taken, and one without an id.
fn keys_of_other_programs(runtime: &tokio::runtime::Runtime, tested: &MemberConfig) {
    let [ours, theirs, nameless] = [(); 3].map(|()| software_key());
    let id = new_id();
    let name = tested.name.as_str();
    let [our_id, their_id, no_id] = [&ours, &theirs, &nameless].map(|key| named(&id, &key.to_public_key()));
    let both_decrypt = async |cluster: &Cluster| {
        for (key, id) in [(&ours, &our_id), (&theirs, &their_id)] {
            let ciphertext = encrypt(&key.to_public_key(), SHA1, b"mine");
            let done = cluster.decrypt(id, SHA1, &ciphertext, soon(), None).await.unwrap();
            assert_eq!(*done.value, b"mine");
        }
    };
    // With one session, the times of its searches are known: at its start and on request.
    let tested = &MemberConfig { sessions: 1, ..tested.clone() };
    // Also after a restart, when the token may list the keys in another order.
    for restarted in [false, true] {
        let cluster = load(vec![tested.clone()], Arc::new(|_, _| {})).unwrap();
        runtime.block_on(async {
            cluster.start().await.unwrap();
            if !restarted {
                cluster.import_rsa(name, new_key(&id, KeyUsage::Both), software_rsa::parts(&ours)).await.unwrap();
                assert!(shown(&cluster, name, &our_id).await.is_some());
                let other_program = side_session(tested);
                other_program.create_object(&others_key(Some(&id), &theirs)).unwrap();
                other_program.create_object(&others_key(None, &nameless)).unwrap();
                assert!(shown(&cluster, name, &their_id).await.is_none(), "no session has searched since");
            }
            let found = cluster.keys_on(name, true).await.unwrap();
            assert_eq!(found.iter().filter(|key| key.has_id(&id)).count(), 2, "{found:?}");
            let last = found.last().unwrap();
            assert_eq!((last.id.as_ref(), last.fingerprint), (None, Some(no_id.public)), "{found:?}");
            both_decrypt(&cluster).await;
            let missing = cluster.decrypt(&no_id, SHA1, &[0; 256], soon(), None).await.unwrap_err();
            assert_eq!(missing, HsmError::NoSuchKey);
            assert!(is_up(&cluster.members()[0]), "{:?}", cluster.members());
            cluster.close().await;
        });
    }
}

/// Expects one login for each token and one key search for each session, for any number of callers.
fn concurrent_callers(runtime: &tokio::runtime::Runtime, tested: &MemberConfig) {
    const CALLERS: usize = 32;
    const EACH: usize = 200;
    let key = software_key();
    let id = new_id();
    let counts = Arc::new(Counts::default());
    let cluster = load(vec![tested.clone()], Arc::new(|_, _| {})).unwrap();
    runtime.block_on(async {
        cluster.start().await.unwrap();
        cluster.import_rsa(&tested.name, new_key(&id, KeyUsage::Both), software_rsa::parts(&key)).await.unwrap();
        cluster.close().await;
    });
    let id = named(&id, &key.to_public_key());
    let cluster = load(vec![tested.clone()], counts.observer()).unwrap();
    runtime.block_on(async {
        cluster.start().await.unwrap();
        all_sessions_open(&cluster).await;
        let ciphertext = encrypt(&key.to_public_key(), SHA1, b"together");
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let (cluster, id, ciphertext) = (cluster.clone(), id.clone(), ciphertext.clone());
                tokio::spawn(async move {
                    for _ in 0..EACH {
                        let done = cluster.decrypt(&id, SHA1, &ciphertext, soon(), None).await;
                        let done = done.unwrap();
                        assert_eq!(*done.value, b"together");
                        assert_eq!(done.retries, 0);
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.await.unwrap();
        }
        let status = &cluster.members()[0];
        assert_eq!(status.sessions_open, tested.sessions, "load neither opens nor closes sessions");
        assert_eq!(count(&counts.decrypts), CALLERS * EACH);
        assert_eq!(count(&counts.logins), 1, "one login for the token");
        assert_eq!(count(&counts.opened), tested.sessions);
        assert_eq!(count(&counts.searches), tested.sessions, "one search for a session");
        cluster.close().await;
    });
}

/// Changes the keys of a token without the cluster's knowledge, kills its worker, and expects the other token to take over.
fn two_tokens(runtime: &tokio::runtime::Runtime, tested: &MemberConfig, other: &MemberConfig) {
    let counts = Arc::new(Counts::default());
    // The other token has a lower rank, so that the order of members is certain.
    let spare = MemberConfig { priority: 1, ..other.clone() };
    let cluster = load(vec![tested.clone(), spare], counts.observer()).unwrap();
    runtime.block_on(async {
        cluster.start().await.unwrap();
        let key = software_key();
        let id = new_id();
        for name in [&tested.name, &other.name] {
            cluster.import_rsa(name, new_key(&id, KeyUsage::Both), software_rsa::parts(&key)).await.unwrap();
        }
        let id = named(&id, &key.to_public_key());
        let ciphertext = encrypt(&key.to_public_key(), SHA256, b"either");
        let decrypt = || async {
            let done = cluster.decrypt(&id, SHA256, &ciphertext, soon(), None).await.unwrap();
            assert_eq!(*done.value, b"either");
            (done.member.to_string(), done.retries)
        };
        let (first, second) = ((tested.name.clone(), 0), (other.name.clone(), 0));
        assert_eq!(decrypt().await, first);

        // Another program replaces the key's object. Every session then holds an invalid handle, and finds the new object
        // before a caller sees an error.
        let asked = count(&counts.searches);
        replace_object(tested, &id, &key);
        for _ in 0..4 * tested.sessions {
            assert_eq!(decrypt().await, first, "found again in place");
        }
        assert!(count(&counts.searches) > asked);
        assert_eq!(count(&counts.logins), 2, "one for each token");

        // A drained member gets no calls; a resumed one serves again.
        assert_eq!(cluster.drain(&tested.name, true).unwrap().state, MemberState::Drained);
        assert_eq!(decrypt().await, second);
        cluster.probe(&tested.name).await.unwrap();
        assert!(is_up(&cluster.drain(&tested.name, false).unwrap()));
        assert_eq!(decrypt().await, first);
        assert!(
            cluster.members().iter().all(|member| is_up(member) && member.closings == 0),
            "{:?}",
            cluster.members()
        );

        // The worker is killed under load: no caller sees an error, and the member recovers by itself.
        let killed = cluster.members()[0].worker.unwrap();
        let callers: Vec<_> = (0..16)
            .map(|_| {
                let (cluster, id, ciphertext) = (cluster.clone(), id.clone(), ciphertext.clone());
                tokio::spawn(async move {
                    for _ in 0..50 {
                        let done = cluster.decrypt(&id, SHA256, &ciphertext, soon(), None).await.unwrap();
                        assert_eq!(*done.value, b"either");
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(5)).await;
        kill(killed);
        for caller in callers {
            caller.await.unwrap();
        }
        let patience = soon();
        while decrypt().await != first {
            assert!(Instant::now() < patience, "{:?}", cluster.members());
        }
        let status = &cluster.members()[0];
        assert!(status.closings == 1 && status.worker.is_some_and(|worker| worker != killed), "{status:?}");
        assert!(status.last_error.as_ref().is_some_and(|last| last.text.contains("signal 9")), "{status:?}");
        cluster.close().await;
    });
}

pub fn kill(process: u32) {
    use rustix::process::{Pid, Signal, kill_process};
    kill_process(Pid::from_raw(process.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// Loads and initialises a module in this program, which is a different process than the workers. The module stays loaded:
/// not every module can be initialised twice in a process.
pub fn module(path: &Path) -> Pkcs11 {
    use cryptoki::context::{CInitializeArgs, CInitializeFlags};
    static LOADED: Mutex<BTreeMap<PathBuf, Pkcs11>> = Mutex::new(BTreeMap::new());
    let mut loaded = LOADED.lock().unwrap();
    let module = loaded.entry(path.to_owned()).or_insert_with(|| {
        let module = Pkcs11::new(path).unwrap();
        module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
        module
    });
    module.clone()
}

/// Opens a session of another program, logged in.
pub fn side_session(token: &MemberConfig) -> Session {
    let TokenRef::Label(label) = &token.token else {
        panic!("the suite names tokens by label");
    };
    let module = module(&token.module);
    let slot = module
        .get_slots_with_token()
        .unwrap()
        .into_iter()
        // cryptoki cannot read the information of opencryptoki's token, which is the only token of its module.
        .find(|slot| module.get_token_info(*slot).map_or(true, |info| info.label() == label))
        .unwrap();
    let session = module.open_rw_session(slot).unwrap();
    session.login(UserType::User, Some(&USER_PIN.to_owned().into())).unwrap();
    session
}

/// Destroys a private key on the token and imports it again as another object.
fn replace_object(token: &MemberConfig, id: &KeyRef, key: &RsaPrivateKey) {
    let session = side_session(token);
    let wanted = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Id(id.id.0.clone())];
    let objects = session.find_objects(&wanted).unwrap();
    assert_eq!(objects.len(), 1);
    session.destroy_object(objects[0]).unwrap();
    session.create_object(&others_key(Some(&id.id), key)).unwrap();
}

/// Removes the suite's objects, so that tokens that outlive the test do not fill up.
fn clean_up(token: &MemberConfig) {
    let session = side_session(token);
    for object in session.find_objects(&[Attribute::Label(LABEL.as_bytes().to_vec())]).unwrap() {
        session.destroy_object(object).unwrap();
    }
}
