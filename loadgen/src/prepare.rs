//! Everything that has to be there before the clock starts: hosts with keys, registered and attested; machines with
//! protectors. What is slow to make is kept in `DIR/loadgen`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::TransportKey;
use claviger_protocol::rsa_key::RsaPrivateKey;
use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::Failure;
use crate::cache;
use crate::host::{self, Host};
use crate::http::Client;
use crate::lab::Lab;
use crate::progress::Progress;

/// Bits of a host's keys.
const BITS: u32 = 2048;
/// Most identity keys that are made. Making one takes some 100 ms; what the service has to do does not depend on whether
/// two hosts share one, since their health certificates differ.
const IDENTITIES: usize = 64;
/// Attestations at a time.
const ATTESTING: usize = 16;
/// What is made before it is written to the disk.
const CHUNK: usize = 256;

/// A virtual machine's protector, and the key that it has to give.
#[derive(Clone)]
pub struct Machine {
    /// The file.
    pub protector: Arc<Vec<u8>>,
    /// The transport key, where it is known: that of a protector that came from a release is not.
    pub key: Option<TransportKey>,
}

/// Who and what takes part.
pub struct World {
    /// At least one.
    pub hosts: Arc<[Host]>,
    /// At least one.
    pub machines: Vec<Machine>,
    /// The guardian that all protectors are for.
    pub guardian: Metadata,
}

#[derive(Serialize, Deserialize)]
struct SavedKey {
    /// PKCS#8, PEM.
    key: String,
}

#[derive(Serialize, Deserialize)]
struct SavedMachine {
    /// Transport key, base64.
    key: String,
    /// Protector, base64.
    protector: String,
}

impl World {
    /// Makes, or finds, what a run needs.
    ///
    /// # Errors
    /// A service that does not answer or refuses, a lab that is not whole.
    pub async fn prepare(client: &Arc<Client>, lab: &Lab, hosts: usize, machines: usize) -> Result<Self, Failure> {
        let reply = client.get(host::METADATA).await?;
        if reply.status != 200 {
            let code = host::error_code(reply.status, &reply.body);
            return Err(format!("the service does not tell its metadata: {code}; is it Claviger's service URL?").into());
        }
        let guardian = Metadata::parse(&reply.body)?;
        let (lab, metadata) = (lab.clone(), guardian.clone());
        let made = tokio::task::spawn_blocking(move || make(&lab, &metadata, hosts, machines)).await?;
        let (keys, machines) = made?;
        let hosts = attest(client, keys).await?.into();
        Ok(Self { hosts, machines, guardian })
    }
}

/// A host key and an identity key.
type HostKeys = (RsaPrivateKey, Arc<RsaPrivateKey>);

fn make(
    lab: &Lab,
    guardian: &Metadata,
    hosts: usize,
    machines: usize,
) -> Result<(Vec<HostKeys>, Vec<Machine>), Failure> {
    let _lock = cache::lock(&lab.cache())?;
    let owner = lab.owner()?;
    let keys = if hosts <= 1 {
        // The host that comes with the lab is registered already, wherever the service runs.
        let (host, identity) = lab.host_keys()?;
        vec![(host, Arc::new(identity))]
    } else {
        registered_hosts(lab, hosts)?
    };
    Ok((keys, protectors(lab, &owner, guardian, machines)?))
}

fn registered_hosts(lab: &Lab, hosts: usize) -> Result<Vec<HostKeys>, Failure> {
    let keys = kept_keys(lab, "hosts.jsonl", "host keys", hosts)?;
    let identities: Vec<_> =
        kept_keys(lab, "identities.jsonl", "identity keys", hosts.min(IDENTITIES))?.into_iter().map(Arc::new).collect();
    let mut admin = lab.admin()?;
    let registered = admin.hosts()?;
    let known: std::collections::HashMap<_, _> = registered.into_iter().collect();
    let progress = Progress::new("registering hosts", hosts as u64);
    for (key, at) in keys.iter().zip(1..) {
        let name = format!("loadgen-{at:04}");
        let fingerprint = HEXLOWER.encode(&key.public().spki_sha256());
        let as_it_should = known.get(&name).map(|known| *known == fingerprint);
        if as_it_should == Some(false) {
            admin.remove_host(&name)?;
        }
        if as_it_should != Some(true) {
            admin.add_host(&name, key.public().spki_der())?;
        }
        progress.advance(1);
    }
    Ok(keys.into_iter().enumerate().map(|(at, key)| (key, identities[at % identities.len()].clone())).collect())
}

fn kept_keys(lab: &Lab, file: &str, what: &'static str, count: usize) -> Result<Vec<RsaPrivateKey>, Failure> {
    let path = lab.cache().join(file);
    let mut saved: Vec<SavedKey> = cache::read(&path, count)?;
    let progress = Progress::new(what, (count - saved.len()) as u64);
    while saved.len() < count {
        let made = on_all_processors((count - saved.len()).min(CHUNK), &progress, || {
            let key = RsaPrivateKey::generate(BITS)?;
            Ok(SavedKey { key: key.to_pkcs8_pem().to_string() })
        })?;
        cache::append(&path, &made)?;
        saved.extend(made);
    }
    let key = |saved: &SavedKey| RsaPrivateKey::from_pkcs8_pem(&saved.key);
    let unusable = |error| format!("{}: {error}; delete the file, it will be made again", path.display());
    saved.iter().map(|saved| key(saved).map_err(|error| unusable(error).into())).collect()
}

fn protectors(lab: &Lab, owner: &Owner, guardian: &Metadata, count: usize) -> Result<Vec<Machine>, Failure> {
    // A lab that was made anew has another guardian, and what is for the old one is of no use.
    let mut parties = guardian.encryption_key.spki_sha256().to_vec();
    parties.extend(owner.signing_certificate.thumbprint());
    let digest = ring::digest::digest(&ring::digest::SHA256, &parties);
    let path = lab.cache().join(format!("machines-{}.jsonl", HEXLOWER.encode(&digest.as_ref()[..8])));
    let mut saved: Vec<SavedMachine> = cache::read(&path, count)?;
    let progress = Progress::new("protectors", (count - saved.len()) as u64);
    while saved.len() < count {
        let made = on_all_processors((count - saved.len()).min(CHUNK), &progress, || {
            let (protector, key) = owner.create(std::slice::from_ref(guardian))?;
            Ok(SavedMachine { key: BASE64.encode(&key[..]), protector: BASE64.encode(&protector) })
        })?;
        cache::append(&path, &made)?;
        saved.extend(made);
    }
    let machine = |saved: SavedMachine| {
        let mut key = TransportKey::default();
        let octets = BASE64.decode(saved.key.as_bytes()).ok().filter(|octets| octets.len() == key.len())?;
        key.copy_from_slice(&octets);
        let protector = Arc::new(BASE64.decode(saved.protector.as_bytes()).ok()?);
        Some(Machine { protector, key: Some(key) })
    };
    let machines: Option<Vec<_>> = saved.into_iter().map(machine).collect();
    machines.ok_or_else(|| format!("{} is damaged; delete it, it will be made again", path.display()).into())
}

/// Makes `count` things on all processors.
fn on_all_processors<T: Send>(
    count: usize,
    progress: &Progress,
    make: impl Fn() -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let (made, next) = (Mutex::new(Vec::with_capacity(count)), AtomicUsize::new(0));
    let work = || {
        while next.fetch_add(1, Ordering::Relaxed) < count {
            let result = make();
            let failed = result.is_err();
            made.lock().unwrap_or_else(PoisonError::into_inner).push(result);
            progress.advance(1);
            if failed {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..processors {
            // With fewer threads it takes longer, and that is all.
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    made.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect()
}

async fn attest(client: &Arc<Client>, keys: Vec<HostKeys>) -> Result<Vec<Host>, Failure> {
    let progress = Progress::new("attesting", keys.len() as u64);
    let mut attesting = JoinSet::new();
    let mut hosts = Vec::with_capacity(keys.len());
    for (host_key, identity) in keys {
        if attesting.len() >= ATTESTING
            && let Some(done) = attesting.join_next().await
        {
            hosts.push(done??);
            progress.advance(1);
        }
        let client = client.clone();
        attesting.spawn(async move { Host::attest(&client, &host_key, identity).await });
    }
    while let Some(done) = attesting.join_next().await {
        hosts.push(done??);
        progress.advance(1);
    }
    Ok(hosts)
}
