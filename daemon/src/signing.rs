//! HSM signatures over the daemon's own documents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Check, Cluster, Done, Hash, HsmError, KeyRef, RsaPrivateParts, SignScheme};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use ring::digest;

/// Time limit for the daemon's own HSM operations (for the metadata document or an attestation signer).
pub(crate) const OWN_DEADLINE: Duration = Duration::from_secs(10);

/// Signs `message` in an HSM with RSASSA-PKCS1-v1_5 and SHA-256, for the daemon's own documents. `public` is the public
/// key; a signature that it does not verify is never returned.
///
/// # Errors
/// The error of the cluster.
pub(crate) async fn sign(
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

/// A check for RSASSA-PKCS1-v1_5 signatures by the key of `public` over the message with this SHA-256.
#[must_use]
pub(crate) fn signed_by(public: &RsaPublicKey, digest: digest::Digest) -> Check {
    let public = public.clone();
    Arc::new(move |signature| public.verify_digest(digest.as_ref(), signature).is_ok())
}

/// Converts a software key to the HSM crate's form.
#[must_use]
pub(crate) fn private_parts(key: &RsaPrivateKey) -> RsaPrivateParts {
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
