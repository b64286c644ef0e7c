//! A host with several servers. It attests and unwraps; if one server cannot serve, it asks the next one, and it
//! repeats the request if a later attempt can succeed.

use std::time::{Duration, Instant};

use claviger_process::clock::unix_now;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::error::Code;
use claviger_protocol::payload::ApiVersion;
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::Step as RequestStep;
use crate::host::{Host, HostError, Proof, Unwrapped};
use crate::host_files::{Folder, Keys, StoreError};
use crate::http::{Client, ClientError, TlsSettings};
use crate::retry::{Fallback, Fault, Step};
use crate::tpm::TpmPlace;

/// Longest time for the reply of one server. A server that hangs leaves time for the others.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Reasons why a host got no health certificate or no keys.
#[derive(Debug, thiserror::Error)]
pub enum ServicesError {
    /// A URL or the file of trusted certificates is unusable.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file of the host is missing or unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The service refused, or did not answer correctly.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl ServicesError {
    /// `true` if the same request may succeed later.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Host(error) if !matches!(error.fault(), Fault::Lasting | Fault::Unusable))
    }
}

/// One host and the servers that it may ask.
pub struct Services {
    folder: Folder,
    keys: Keys,
    hosts: Vec<Host>,
    fallback: Fallback,
    /// For all requests together.
    timeout: Duration,
}

/// A health certificate, and its origin.
#[derive(Debug)]
pub struct Health {
    /// The health certificate itself.
    pub certificate: Certificate,
    /// The server that has just issued it; `None` if it was read from disk.
    pub issued_by: Option<String>,
}

/// The result of [`Services::unwrap`].
pub struct Released {
    /// The keys and the new protector.
    pub unwrapped: Unwrapped,
    /// The server that released the keys.
    pub server: String,
    /// The version of the interface that the server used.
    pub api: ApiVersion,
    /// `true` if the host had to attest for this release.
    pub attested: bool,
}

impl Services {
    /// Makes the host whose keys are in `folder`, with the servers at `urls` in order of preference (at least one).
    /// With a TPM given, the host attests with it; otherwise it attests with its host key. Sends no request yet.
    /// `timeout` is the limit for all requests together, and starts now. Blocks on files.
    ///
    /// # Errors
    /// [`ServicesError`]: keys, URLs or TLS files are unusable.
    pub fn new(
        folder: Folder,
        tpm: Option<TpmPlace>,
        urls: &[String],
        tls: &TlsSettings,
        timeout: Duration,
    ) -> Result<Self, ServicesError> {
        let keys = if tpm.is_some() { folder.volatile_keys()? } else { folder.keys()? };
        let proof = match (&tpm, &keys.host) {
            (Some(place), _) => Proof::Tpm(place.clone()),
            (None, Some(key)) => Proof::HostKey(key.clone()),
            (None, None) => return Err(StoreError::NoKey(folder.public_key_file()).into()),
        };
        let mut hosts = Vec::with_capacity(urls.len());
        for url in urls {
            let client = Client::with_tls(url, tls)?.with_timeout(ATTEMPT.min(timeout));
            hosts.push(Host::new(client, proof.clone(), keys.identity.clone()));
        }
        let fallback = Fallback::new(hosts.len(), Instant::now() + timeout);
        Ok(Self { folder, keys, hosts, fallback, timeout })
    }

    /// Returns the stored health certificate if it is still usable, or else a new one.
    ///
    /// # Errors
    /// [`ServicesError`].
    pub async fn health(&mut self) -> Result<Health, ServicesError> {
        match self.kept() {
            Some(kept) => Ok(kept),
            None => self.attest().await,
        }
    }

    /// The health certificate that is kept, if it will do.
    #[must_use]
    pub fn kept(&self) -> Option<Health> {
        let certificate = self.folder.health(&self.keys, unix_now())?;
        Some(Health { certificate, issued_by: None })
    }

    /// Gets a new health certificate and stores it.
    ///
    /// # Errors
    /// [`ServicesError`].
    pub async fn attest(&mut self) -> Result<Health, ServicesError> {
        let health = self.attested().await?;
        self.folder.keep_health(&health.certificate)?;
        Ok(health)
    }

    /// Gets a new health certificate. If the certificate cannot be stored, the release goes on: a full disk must not
    /// keep a virtual machine from starting.
    async fn attest_to_unwrap(&mut self) -> Result<Health, HostError> {
        let health = self.attested().await?;
        if let Err(error) = self.folder.keep_health(&health.certificate) {
            tracing::warn!(%error, "the health certificate cannot be stored; every start has to attest");
        }
        Ok(health)
    }

    async fn attested(&mut self) -> Result<Health, HostError> {
        let identity = self.keys.identity.clone();
        // The certificate is checked here, while other servers can still be asked: a wrong certificate is a fault of
        // that server.
        let issued = self.ask(async |host: &Host| {
            let certificate =
                Certificate::parse(&host.attest().await?).map_err(|e| HostError::Answer(e.to_string()))?;
            if certificate.key() != identity.public() {
                return Err(HostError::Answer("the certificate is not over this host's identity key".to_owned()));
            }
            Ok(certificate)
        });
        let (server, certificate) = issued.await?;
        Ok(Health { certificate, issued_by: Some(server) })
    }

    /// Exchanges a protector for its keys and a new protector. If the service rejects the stored health certificate,
    /// the host attests once and tries again: the certificate may be older than the current attestation signer, or
    /// belong to another cluster.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn unwrap(&mut self, protector: &[u8]) -> Result<Released, HostError> {
        let mut health = match self.kept() {
            Some(kept) => kept,
            None => self.attest_to_unwrap().await?,
        };
        let released = match self.roll(&health.certificate, protector).await {
            Err(HostError::Release { refusal, .. }) if refusal.code == Code::HealthCertificate => {
                tracing::info!(%refusal, "attesting again");
                health = self.attest_to_unwrap().await?;
                self.roll(&health.certificate, protector).await
            }
            other => other,
        };
        let (server, (api, unwrapped)) = released?;
        Ok(Released { unwrapped, server, api, attested: health.issued_by.is_some() })
    }

    /// Exchanges many protectors in one request, or one after the other where the service knows no batches. What becomes of each
    /// is in its own result, and is not asked again.
    ///
    /// # Errors
    /// [`HostError`], where none was exchanged.
    pub(crate) async fn unwrap_batch(
        &mut self,
        protectors: &[Vec<u8>],
    ) -> Result<Vec<Result<Unwrapped, HostError>>, HostError> {
        let health = match self.kept() {
            Some(kept) => kept,
            None => self.attest_to_unwrap().await?,
        };
        match self.roll_batch(&health.certificate, protectors).await {
            Err(HostError::Release { refusal, .. }) if refusal.code == Code::HealthCertificate => {
                tracing::info!(%refusal, "attesting again");
                let health = self.attest_to_unwrap().await?;
                self.roll_batch(&health.certificate, protectors).await
            }
            other => other,
        }
    }

    async fn roll_batch(
        &mut self,
        health: &Certificate,
        protectors: &[Vec<u8>],
    ) -> Result<Vec<Result<Unwrapped, HostError>>, HostError> {
        let exchanged = self.ask(async |host: &Host| match host.roll_batch(health.der(), protectors).await {
            Err(HostError::Release { status: 404, .. } | HostError::Status { status: 404, .. }) => Ok(None),
            other => other.map(Some),
        });
        if let (_, Some(results)) = exchanged.await? {
            return Ok(results);
        }
        let mut results = Vec::with_capacity(protectors.len());
        for protector in protectors {
            results.push(self.roll(health, protector).await.map(|(_, (_, unwrapped))| unwrapped));
        }
        Ok(results)
    }

    async fn roll(
        &mut self,
        health: &Certificate,
        protector: &[u8],
    ) -> Result<(String, (ApiVersion, Unwrapped)), HostError> {
        self.ask(async |host: &Host| {
            match host.roll(ApiVersion::V2, health.der(), protector).await {
                // The service supports only the first version of the interface.
                Err(HostError::Release { status: 404, .. } | HostError::Status { status: 404, .. }) => {
                    Ok((ApiVersion::V1, host.roll(ApiVersion::V1, health.der(), protector).await?))
                }
                other => Ok((ApiVersion::V2, other?)),
            }
        })
        .await
    }

    /// Asks the servers in turn until one gives a correct reply. Returns the server and the reply.
    async fn ask<T>(
        &mut self,
        question: impl AsyncFn(&Host) -> Result<T, HostError>,
    ) -> Result<(String, T), HostError> {
        let mut last = None;
        loop {
            let server = match self.fallback.next(Instant::now()) {
                Step::Ask(server) => server,
                Step::Wait(rest) => {
                    tokio::time::sleep(rest).await;
                    continue;
                }
                Step::GiveUp => return Err(last.unwrap_or_else(|| self.too_late(0))),
            };
            let left = self.fallback.left(Instant::now());
            let answer = tokio::time::timeout(left, question(&self.hosts[server])).await;
            let error = match answer.unwrap_or_else(|_| Err(self.too_late(server))) {
                Ok(answer) => {
                    self.fallback.answered(server);
                    return Ok((self.hosts[server].server().to_owned(), answer));
                }
                Err(error) => error,
            };
            let fault = error.fault();
            if fault == Fault::Lasting {
                self.fallback.answered(server);
                return Err(error);
            }
            tracing::warn!(server = self.hosts[server].server(), %error, "asking another server, or this one again");
            self.fallback.failed(server, fault, Instant::now(), luck());
            // A temporary error tells the caller to try again later, so it is reported before a permanent error.
            if fault != Fault::Unusable || last.is_none() {
                last = Some(error);
            }
        }
    }

    fn too_late(&self, server: usize) -> HostError {
        let server = self.hosts[server].server().to_owned();
        HostError::Client(ClientError::Timeout { server, step: RequestStep::FirstByte, limit: self.timeout })
    }
}

/// A uniform random number from 0 to 1. If there is no randomness, it is 1: the longest pause is the safe choice.
fn luck() -> f64 {
    let mut octets = [0; 4];
    let drawn = SystemRandom::new().fill(&mut octets);
    drawn.map_or(1.0, |()| f64::from(u32::from_le_bytes(octets)) / f64::from(u32::MAX))
}
