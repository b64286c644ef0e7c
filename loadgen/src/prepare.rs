//! Everything that has to be there before the clock starts: hosts with keys, registered and attested; machines with
//! protectors. What is slow to make is kept for the next run.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
    /// A service that does not answer or refuses, keys that are missing.
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

/// Makes what runs against a service will need, and writes the public keys of its hosts to `out/NAME.pub.pem`: to be registered
/// by those who may. Gives the names.
///
/// # Errors
/// A service that does not answer, keys that are missing, a folder that cannot be written.
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

/// Hosts that are registered: the one that was before, where that is enough, or this program's own. Those are registered
/// where there is a socket for that; where there is none, they were made by [`ahead`] and registered by others. Blocks.
///
/// # Errors
/// A daemon that refuses or does not answer, keys that are missing.
pub fn registered(site: &Site, hosts: usize, by_tpm: bool) -> Result<Vec<HostKeys>, Failure> {
    let _lock = cache::lock(site.cache())?;
    match site.host_keys()? {
        // It is registered already, wherever the service runs.
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

/// A host of this program's own.
struct OwnHost {
    name: String,
    /// Its host key, or the endorsement key of its TPM.
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
    // Machines are of one owner and for one guardian: those of another service or lab are of no use.
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
