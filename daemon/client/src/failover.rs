//! A host and the servers that it may ask: attests and unwraps, goes on to the next server where one cannot serve, and
//! comes again where that helps.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

/// Longest time for one server's answer, so that one that hangs leaves time for the others.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Why a host got nothing.
#[derive(Debug, thiserror::Error)]
pub enum ServicesError {
    /// A URL or the file of trusted certificates cannot be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file of the host.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The service did not serve.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl ServicesError {
    /// Whether the same may succeed later.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Host(error) if !matches!(error.fault(), Fault::Lasting | Fault::Unusable))
    }
}

/// One host, several servers.
pub struct Services {
    folder: Folder,
    keys: Keys,
    hosts: Vec<Host>,
    fallback: Fallback,
    /// For all that is asked.
    timeout: Duration,
}

/// A health certificate, and how it came.
#[derive(Debug)]
pub struct Health {
    /// The certificate.
    pub certificate: Certificate,
    /// The server that issued it just now; `None` for one that was kept.
    pub issued_by: Option<String>,
}

/// What [`Services::unwrap`] got.
pub struct Released {
    /// The keys and the new protector.
    pub unwrapped: Unwrapped,
    /// The server that released them.
    pub server: String,
    /// The version of the interface that it spoke.
    pub api: ApiVersion,
    /// Whether the host had to attest.
    pub attested: bool,
}

impl Services {
    /// The host whose keys are in `folder`, and the servers at `urls` (one at least) in the order in which they are wanted. It
    /// attests by its TPM where that is said, else with its host key. Nothing is sent yet; `timeout` is for all that is asked,
    /// and begins now. Blocks on files.
    ///
    /// # Errors
    /// [`ServicesError`]: keys, URLs or files for TLS cannot be used.
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

    /// The health certificate that is kept if it will do, or a new one.
    ///
    /// # Errors
    /// [`ServicesError`].
    pub async fn health(&mut self) -> Result<Health, ServicesError> {
        match self.kept() {
            Some(kept) => Ok(kept),
            None => self.attest().await,
        }
    }

    fn kept(&self) -> Option<Health> {
        let certificate = self.folder.health(&self.keys, unix_now())?;
        Some(Health { certificate, issued_by: None })
    }

    /// A new health certificate, which is kept from now on.
    ///
    /// # Errors
    /// [`ServicesError`].
    pub async fn attest(&mut self) -> Result<Health, ServicesError> {
        let health = self.attested().await?;
        self.folder.keep_health(&health.certificate)?;
        Ok(health)
    }

    /// A new health certificate; that it cannot be kept stops no machine from starting.
    async fn attest_to_unwrap(&mut self) -> Result<Health, HostError> {
        let health = self.attested().await?;
        if let Err(error) = self.folder.keep_health(&health.certificate) {
            tracing::warn!(%error, "the health certificate cannot be kept: every start has to attest");
        }
        Ok(health)
    }

    async fn attested(&mut self) -> Result<Health, HostError> {
        let identity = self.keys.identity.clone();
        // Judged while there are others to ask: a server that issues something else is at fault itself.
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

    /// Exchanges a protector for its keys and a fresh protector. A health certificate that the service does not accept is
    /// replaced, once: it may have been kept for longer than its signer, or be another cluster's.
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

    async fn roll(
        &mut self,
        health: &Certificate,
        protector: &[u8],
    ) -> Result<(String, (ApiVersion, Unwrapped)), HostError> {
        self.ask(async |host: &Host| {
            match host.roll(ApiVersion::V2, health.der(), protector).await {
                // A service that knows only the first version.
                Err(HostError::Release { status: 404, .. } | HostError::Status { status: 404, .. }) => {
                    Ok((ApiVersion::V1, host.roll(ApiVersion::V1, health.der(), protector).await?))
                }
                other => Ok((ApiVersion::V2, other?)),
            }
        })
        .await
    }

    /// Asks one server after the other until one answers rightly; gives which, and its answer.
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
            tracing::warn!(server = self.hosts[server].server(), %error, "asking elsewhere or again");
            self.fallback.failed(server, fault, Instant::now(), luck());
            // While one server may serve later, that is what the caller is told.
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

/// Seconds since 1970 by this machine's clock.
pub(crate) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Even, from 0 to 1. Without randomness the longest rest is the safe one.
fn luck() -> f64 {
    let mut octets = [0; 4];
    let drawn = SystemRandom::new().fill(&mut octets);
    drawn.map_or(1.0, |()| f64::from(u32::from_le_bytes(octets)) / f64::from(u32::MAX))
}
