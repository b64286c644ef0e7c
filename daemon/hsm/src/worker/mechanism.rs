//! Conversion of the crate's OAEP parameters and signature schemes to PKCS#11 mechanisms.

use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki_sys::CK_ULONG;

use crate::keys::{Hash, Oaep, SignScheme};

/// Returns `CKM_RSA_PKCS_OAEP` with an empty label.
pub(crate) fn decryption(oaep: Oaep) -> Mechanism<'static> {
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(digest(oaep.hash), mgf(oaep.mgf), PkcsOaepSource::empty()))
}

/// Returns `CKM_RSA_PKCS` or `CKM_RSA_PKCS_PSS`, to be used on [`signed_input`].
pub(crate) fn signature(scheme: SignScheme) -> Mechanism<'static> {
    match scheme {
        SignScheme::Pkcs1(_) => Mechanism::RsaPkcs,
        SignScheme::Pss(hash) => Mechanism::RsaPkcsPss(PkcsPssParams {
            hash_alg: digest(hash),
            mgf: mgf(hash),
            // The length is at most 64.
            s_len: CK_ULONG::from(hash.output_len() as u32).into(),
        }),
    }
}

/// Returns the token's input for a signature: CKM_RSA_PKCS pads but does not build the DigestInfo; CKM_RSA_PKCS_PSS takes
/// the digest itself.
pub(crate) fn signed_input(scheme: SignScheme, digest: &[u8]) -> Vec<u8> {
    match scheme {
        SignScheme::Pkcs1(hash) => [digest_info_prefix(hash), digest].concat(),
        SignScheme::Pss(_) => digest.to_vec(),
    }
}

fn digest(hash: Hash) -> MechanismType {
    match hash {
        Hash::Sha1 => MechanismType::SHA1,
        Hash::Sha256 => MechanismType::SHA256,
        Hash::Sha384 => MechanismType::SHA384,
        Hash::Sha512 => MechanismType::SHA512,
    }
}

fn mgf(hash: Hash) -> PkcsMgfType {
    match hash {
        Hash::Sha1 => PkcsMgfType::MGF1_SHA1,
        Hash::Sha256 => PkcsMgfType::MGF1_SHA256,
        Hash::Sha384 => PkcsMgfType::MGF1_SHA384,
        Hash::Sha512 => PkcsMgfType::MGF1_SHA512,
    }
}

/// Returns the DER of a `DigestInfo` up to the digest (RFC 8017, section 9.2, note 1).
fn digest_info_prefix(hash: Hash) -> &'static [u8] {
    match hash {
        Hash::Sha1 => b"\x30\x21\x30\x09\x06\x05\x2b\x0e\x03\x02\x1a\x05\x00\x04\x14",
        Hash::Sha256 => b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
        Hash::Sha384 => b"\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30",
        Hash::Sha512 => b"\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn digest_info_says_its_own_length() {
        for hash in Hash::ALL {
            let info = signed_input(SignScheme::Pkcs1(hash), &vec![0; hash.output_len()]);
            assert_eq!(usize::from(info[1]), info.len() - 2);
            assert_eq!(usize::from(*digest_info_prefix(hash).last().unwrap()), hash.output_len());
        }
    }
}
