//! Signatures by the HSMs for the daemon's own documents, and keys on their way to them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Check, Cluster, Done, Hash, HsmError, KeyRef, RsaPrivateParts, SignScheme};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use ring::digest;

/// How long the daemon's own work (the metadata document, an attestation signer) may take at the HSMs.
pub const OWN_DEADLINE: Duration = Duration::from_secs(10);

/// Signs `message` with RSASSA-PKCS1-v1_5 and SHA-256 in an HSM, for the daemon's own documents. `public` is the key's
/// other half: no signature that it does not verify leaves.
///
/// # Errors
/// What the cluster says.
pub async fn sign(
    cluster: &Cluster,
    key: &KeyRef,
    public: &RsaPublicKey,
    message: &[u8],
    deadline: Instant,
) -> Result<Done<Vec<u8>>, HsmError> {
    let digest = digest::digest(&digest::SHA256, message);
    let right = Some(signed_by(public, digest));
    cluster.sign(key, SignScheme::Pkcs1(Hash::Sha256), digest.as_ref(), deadline, right).await
}

/// Whether a signature of the message with this SHA-256 is one: RSASSA-PKCS1-v1_5, by the key whose other half is `public`.
#[must_use]
pub fn signed_by(public: &RsaPublicKey, digest: digest::Digest) -> Check {
    let public = public.clone();
    Arc::new(move |signature| public.verify_digest(digest.as_ref(), signature).is_ok())
}

/// Converts a software key to the HSM crate's form.
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
