//! The attestation signer: the key that health certificates are signed with. The daemon makes and renews it itself.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{Cluster, HsmError, KeyId, KeyUsage, NewKey, RsaPrivateParts};
use claviger_protocol::certificate::{BuildError, Certificate, CertificateError};
use claviger_protocol::health::{self, LIFETIME_SECONDS};
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey, RsaPublicKey};

use crate::keys::Key;
use crate::service::{Service, unix_now};
use crate::state::{self, NewSigner};

/// How long a signer's certificate is valid, and how long before its end a new one takes over (seconds).
const VALIDITY: i64 = 365 * 24 * 3600;
const RENEWAL: i64 = 30 * 24 * 3600;
/// How often the daemon looks whether it is time.
const LOOK_EVERY: Duration = Duration::from_secs(600);
const BITS: u32 = 2048;

/// A snapshot of the signers that health certificates are accepted from.
#[derive(Debug, Default)]
pub struct Signers {
    current: Option<Key>,
    certificates: Vec<Certificate>,
}

impl Signers {
    /// Reads the signers of the state.
    ///
    /// # Errors
    /// A certificate that cannot be read.
    pub fn new(signers: &[state::Signer]) -> Result<Self, CertificateError> {
        let mut all = Self::default();
        for signer in signers {
            let certificate = Certificate::parse(&signer.der)?;
            if signer.current {
                all.current = Some(Key { certificate: certificate.clone(), id: KeyId(signer.key_id.clone()) });
            }
            all.certificates.push(certificate);
        }
        Ok(all)
    }

    /// The one that signs now.
    #[must_use]
    pub fn current(&self) -> Option<&Key> {
        self.current.as_ref()
    }

    /// The current one and those before it.
    #[must_use]
    pub fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }
}

/// Why there is no new signer.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// The HSMs did not make or take the key, or do not sign with it.
    #[error("the HSMs: {0}")]
    Hsm(#[from] HsmError),
    /// A key that was made here is not one.
    #[error("the key: {0}")]
    Key(#[from] KeyError),
    /// The certificate cannot be built.
    #[error("the certificate: {0}")]
    Build(#[from] BuildError),
    /// The state cannot be written.
    #[error("the state: {0}")]
    State(String),
}

/// Makes sure that there is a current signer with enough time left; forgets those that nothing can refer to any more.
///
/// # Errors
/// See [`SignerError`]; the current signer stays as it was.
pub async fn renew(service: &Arc<Service>) -> Result<(), SignerError> {
    let now = unix_now();
    let signers = service.signers.load_full();
    if signers.current().is_some_and(|key| key.certificate.not_after() - now > RENEWAL) {
        // A previous signer is trusted until the last health certificate it can have issued has expired.
        let oldest = now - LIFETIME_SECONDS;
        let forgotten = service.change(move |state| state.forget_signers_before(oldest)).await;
        if forgotten.map_err(SignerError::State)? > 0 {
            service.health.clear();
        }
        return Ok(());
    }
    let (id, public) = new_key(&service.cluster).await?;
    let to_be_signed =
        health::signer_template(&public, now - health::BACKDATED_SECONDS, now + VALIDITY)?.to_be_signed()?;
    let der = to_be_signed.assemble(&service.sign(&id, &public, to_be_signed.octets()).await?.value);
    let not_after = now + VALIDITY;
    service
        .change(move |state| {
            let new = NewSigner { der: &der, key_id: &id.0, not_before: now - health::BACKDATED_SECONDS, not_after };
            state.add_signer(&new, now)
        })
        .await
        .map_err(SignerError::State)?;
    tracing::info!("a new attestation signer issues health certificates");
    Ok(())
}

/// Looks from time to time whether the signer has to be renewed, for as long as the daemon runs.
pub async fn keep_renewed(service: Arc<Service>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Err(error) = renew(&service).await {
            tracing::error!(%error, "the attestation signer cannot be renewed; trying again in ten minutes");
        }
    }
}

/// A new signing key on every member. One member makes its key itself. For several, whether their vendor replicates
/// keys between them cannot be known, so the key is made here, given to each, and forgotten.
async fn new_key(cluster: &Cluster) -> Result<(KeyId, RsaPublicKey), SignerError> {
    let members: Vec<String> = cluster.members().into_iter().map(|m| m.name).collect();
    let mut id = [0; 20];
    use ring::rand::SecureRandom;
    ring::rand::SystemRandom::new().fill(&mut id).map_err(|_| SignerError::Build(BuildError::Random))?;
    let id = KeyId(id.to_vec());
    let spec =
        NewKey { id: id.clone(), label: "claviger attestation signer".to_owned(), bits: BITS, usage: KeyUsage::Sign };
    if let [only] = members.as_slice() {
        let public = cluster.generate_rsa(only, spec).await?;
        return Ok((id, RsaPublicKey::from_components(&public.n, &public.e)?));
    }
    let key = tokio::task::spawn_blocking(|| RsaPrivateKey::generate(BITS))
        .await
        .map_err(|_| SignerError::Build(BuildError::Random))??;
    let mut failed = None;
    let mut imported = 0;
    for member in &members {
        match cluster.import_rsa(member, spec.clone(), private_parts(&key)).await {
            Ok(()) => imported += 1,
            // Others hold it: the cluster signs there.
            Err(error) => {
                tracing::warn!(hsm = member, %error, "the new attestation signer's key is missing on a member");
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) if imported == 0 => Err(error.into()),
        _ => Ok((id, key.public().clone())),
    }
}

/// A software key as the HSM crate takes it.
#[must_use]
pub fn private_parts(key: &RsaPrivateKey) -> RsaPrivateParts {
    let p = key.parts();
    let copy = |part: &[u8]| part.to_vec();
    RsaPrivateParts {
        n: copy(&p.n),
        e: copy(&p.e),
        d: copy(&p.d),
        p: copy(&p.p),
        q: copy(&p.q),
        dp: copy(&p.dp),
        dq: copy(&p.dq),
        qinv: copy(&p.qinv),
    }
}
