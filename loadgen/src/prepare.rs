//! Prepares everything that must exist before the clock starts: hosts with keys, registered and attested, and virtual
//! machines with protectors. Data that is slow to make is stored for the next run.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use claviger_process::lock::{lock, unpoisoned};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::TransportKey;
use claviger_protocol::rsa_key::RsaPrivateKey;
use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::attest;
use crate::cache;
use crate::host::{self, Host, HostKeys, HostProof};
use crate::http::Client;
use crate::progress::Progress;
use crate::site::Site;

/// Length of a host's keys, in bits.
const BITS: u32 = 2048;
/// Largest number of identity keys. One takes about 100 ms to make. Hosts may share an identity key without changing
/// the work of the service, because their health certificates differ.
const IDENTITIES: usize = 64;
/// Number of attestations at a time.
const ATTESTING: usize = 16;
/// Number of items that are made before they are written to the disk.
const CHUNK: usize = 256;

/// The protector of a virtual machine, and the key that a release must return.
#[derive(Clone)]
pub struct Machine {
    /// The protector file.
    pub protector: Arc<Vec<u8>>,
    /// The transport key; `None` if it is unknown because the protector came from a release.
    pub key: Option<TransportKey>,
}

/// The hosts and virtual machines of a run.
pub struct World {
    /// The hosts, at least one.
    pub hosts: Arc<[Host]>,
    /// The virtual machines, at least one.
    pub machines: Vec<Machine>,
    /// The guardian of all protectors.
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
    /// Prepares a run. Uses stored data if there is any.
    ///
    /// # Errors
    /// The service refuses or does not answer, or keys are missing.
    pub async fn prepare(
        client: &Arc<Client>,
        site: &Site,
        hosts: usize,
        by_tpm: bool,
        machines: usize,
    ) -> Result<Self, Failure> {
        let guardian = guardian(client).await?;
        let (site, metadata) = (site.clone(), guardian.clone());
        let made = tokio::task::spawn_blocking(move || make(&site, &metadata, hosts, by_tpm, machines)).await?;
        let (keys, machines) = made?;
        let mut hosts = Vec::with_capacity(keys.len());
        attest::each(client, keys, ATTESTING, |attested, _| {
            hosts.push(attested?);
            Ok(())
        })
        .await?;
        Ok(Self { hosts: hosts.into(), machines, guardian })
    }
}

async fn guardian(client: &Client) -> Result<Metadata, Failure> {
    let reply = client.get(host::METADATA).await?;
    if reply.status != 200 {
        let code = host::error_code(&reply);
        return Err(format!("the service does not tell its metadata: {code}; is it Claviger's service URL?").into());
    }
    Ok(Metadata::parse(&reply.body)?)
}

/// Prepares a run against a service whose administrators register the hosts. Writes the public keys of the hosts to
/// `out/NAME.pub.pem`. Returns the names of the hosts.
///
/// # Errors
/// The service does not answer, keys are missing, or a folder cannot be written.
pub async fn ahead(
    client: &Client,
    site: &Site,
    hosts: usize,
    by_tpm: bool,
    machines: usize,
    out: &Path,
) -> Result<Vec<String>, Failure> {
    let guardian = guardian(client).await?;
    let (site, out) = (site.clone(), out.to_owned());
    let make = move || {
        let _lock = cache::lock(site.cache())?;
        protectors(&site, &site.owner()?, &guardian, machines)?;
        std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
        let mut names = Vec::new();
        for OwnHost { name, key, .. } in own_hosts(&site, hosts, by_tpm)? {
            let file = out.join(format!("{name}.pub.pem"));
            let pem = key.public().to_pem();
            std::fs::write(&file, pem).map_err(|error| format!("{}: {error}", file.display()))?;
            names.push(name);
        }
        Ok::<_, Failure>(names)
    };
    tokio::task::spawn_blocking(make).await?
}

fn make(
    site: &Site,
    guardian: &Metadata,
    hosts: usize,
    by_tpm: bool,
    machines: usize,
) -> Result<(Vec<HostKeys>, Vec<Machine>), Failure> {
    let owner = site.owner()?;
    let keys = registered(site, hosts, by_tpm)?;
    let _lock = cache::lock(site.cache())?;
    Ok((keys, protectors(site, &owner, guardian, machines)?))
}

/// Returns registered hosts. If one host is enough and there is a registered one, it is used. Otherwise the hosts are
/// this program's own: it registers them if there is an admin socket. Without a socket, [`ahead`] has made them and an
/// administrator has registered them. Blocks.
///
/// # Errors
/// The daemon refuses or does not answer, or keys are missing.
pub fn registered(site: &Site, hosts: usize, by_tpm: bool) -> Result<Vec<HostKeys>, Failure> {
    let _lock = cache::lock(site.cache())?;
    match site.host_keys()? {
        // This host is already registered, wherever the service runs.
        Some((host, identity)) if hosts <= 1 && !by_tpm => {
            let identity = match identity {
                Some(identity) => Arc::new(identity),
                None => identities(site, 1)?.remove(0),
            };
            Ok(vec![(HostProof::HostKey(Box::new(host)), identity)])
        }
        _ => {
            let hosts = own_hosts(site, hosts, by_tpm)?;
            if site.has_socket() {
                register(site, &hosts, by_tpm)?;
            }
            hosts.into_iter().map(|host| host.proof(by_tpm)).collect()
        }
    }
}

fn identities(site: &Site, count: usize) -> Result<Vec<Arc<RsaPrivateKey>>, Failure> {
    Ok(kept_keys(site, "identities.jsonl", "identity keys", count)?.into_iter().map(Arc::new).collect())
}

/// A host that this program made.
struct OwnHost {
    name: String,
    /// The host key, or the endorsement key of the TPM.
    key: RsaPrivateKey,
    identity: Arc<RsaPrivateKey>,
}

impl OwnHost {
    fn proof(self, by_tpm: bool) -> Result<HostKeys, Failure> {
        let proof = if by_tpm { HostProof::tpm(self.key)? } else { HostProof::HostKey(Box::new(self.key)) };
        Ok((proof, self.identity))
    }
}

fn own_hosts(site: &Site, hosts: usize, by_tpm: bool) -> Result<Vec<OwnHost>, Failure> {
    let (file, what, prefix) = match by_tpm {
        false => ("hosts.jsonl", "host keys", "loadgen"),
        true => ("tpms.jsonl", "endorsement keys", "loadgen-tpm"),
    };
    let keys = kept_keys(site, file, what, hosts)?;
    let identities = identities(site, hosts.min(IDENTITIES))?;
    let host = |(at, key): (usize, RsaPrivateKey)| {
        let identity = identities[at % identities.len()].clone();
        OwnHost { name: format!("{prefix}-{:04}", at + 1), key, identity }
    };
    Ok(keys.into_iter().enumerate().map(host).collect())
}

fn register(site: &Site, hosts: &[OwnHost], by_tpm: bool) -> Result<(), Failure> {
    let mut admin = site.admin()?;
    let registered = admin.hosts()?;
    let known: std::collections::HashMap<_, _> = registered.into_iter().collect();
    let progress = Progress::new("registering hosts", hosts.len() as u64);
    for OwnHost { name, key, .. } in hosts {
        let fingerprint = HEXLOWER.encode(&key.public().spki_sha256());
        let as_it_should = known.get(name).map(|known| *known == fingerprint);
        if as_it_should == Some(false) {
            admin.remove_host(name)?;
        }
        if as_it_should != Some(true) {
            let key = key.public().spki_der();
            if by_tpm { admin.add_tpm_host(name, key)? } else { admin.add_host(name, key)? }
        }
        progress.advance(1);
    }
    if by_tpm {
        admin.accept_boot()?;
    }
    Ok(())
}

fn kept_keys(site: &Site, file: &str, what: &'static str, count: usize) -> Result<Vec<RsaPrivateKey>, Failure> {
    let path = site.cache().join(file);
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

fn protectors(site: &Site, owner: &Owner, guardian: &Metadata, count: usize) -> Result<Vec<Machine>, Failure> {
    // A protector belongs to one owner and one guardian, so the protectors of another service or lab cannot be used.
    let mut parties = guardian.encryption_key.spki_sha256().to_vec();
    parties.extend(owner.signing_certificate.thumbprint());
    let digest = ring::digest::digest(&ring::digest::SHA256, &parties);
    let path = site.cache().join(format!("machines-{}.jsonl", HEXLOWER.encode(&digest.as_ref()[..8])));
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

/// Makes `count` items on all processors.
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
            lock(&made).push(result);
            progress.advance(1);
            if failed {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..processors {
            // If a thread cannot be started, the work takes longer on the others.
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    unpoisoned(made.into_inner()).into_iter().collect()
}
