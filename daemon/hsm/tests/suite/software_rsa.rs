//! Converts keys of the crate `rsa` to this crate's types. Shared by the suite and the unit tests, which use the same type
//! names.

use rsa::traits::{PrivateKeyParts, PublicKeyParts};
use rsa::{RsaPrivateKey, sha2};

use super::{Hash, Oaep, RsaPrivateParts};

/// Returns the numbers of a private key.
pub(crate) fn parts(key: &RsaPrivateKey) -> RsaPrivateParts {
    RsaPrivateParts {
        n: key.n().to_bytes_be(),
        e: key.e().to_bytes_be(),
        d: key.d().to_bytes_be(),
        p: key.primes()[0].to_bytes_be(),
        q: key.primes()[1].to_bytes_be(),
        dp: key.dp().unwrap().to_bytes_be(),
        dq: key.dq().unwrap().to_bytes_be(),
        qinv: key.crt_coefficient().unwrap().to_bytes_be(),
    }
}

/// Returns the same OAEP parameters.
pub(crate) fn padding(oaep: Oaep) -> rsa::Oaep {
    fn with_hash<D>(mgf: Hash) -> rsa::Oaep
    where
        D: 'static + sha1::digest::Digest + sha1::digest::DynDigest + Send + Sync,
    {
        match mgf {
            Hash::Sha1 => rsa::Oaep::new_with_mgf_hash::<D, sha1::Sha1>(),
            Hash::Sha256 => rsa::Oaep::new_with_mgf_hash::<D, sha2::Sha256>(),
            Hash::Sha384 => rsa::Oaep::new_with_mgf_hash::<D, sha2::Sha384>(),
            Hash::Sha512 => rsa::Oaep::new_with_mgf_hash::<D, sha2::Sha512>(),
        }
    }
    match oaep.hash {
        Hash::Sha1 => with_hash::<sha1::Sha1>(oaep.mgf),
        Hash::Sha256 => with_hash::<sha2::Sha256>(oaep.mgf),
        Hash::Sha384 => with_hash::<sha2::Sha384>(oaep.mgf),
        Hash::Sha512 => with_hash::<sha2::Sha512>(oaep.mgf),
    }
}
