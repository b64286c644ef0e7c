//! The attestation signers, as an immutable snapshot for requests.

use bytes::Bytes;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::pkcs7;

use super::error::Unreadable;
use super::keys::Key;
use crate::store;

/// A snapshot of the signers that health certificates are accepted from.
#[derive(Debug, Default)]
pub struct Signers {
    current: Option<Key>,
    /// Known even if the certificate cannot be read.
    current_thumbprint: Option<String>,
    certificates: Vec<Certificate>,
    /// Thumbprints of `certificates`, for a fast check at every release.
    thumbprints: Vec<[u8; 32]>,
    /// The certificates as a PKCS#7 document, as hosts and tenants get them.
    published: Bytes,
    /// When the earliest of the previous signers was replaced.
    first_replaced: Option<i64>,
}

impl Signers {
    /// Reads the signers of the state. A certificate that cannot be read excludes only its own signer; all such certificates are
    /// returned.
    #[must_use]
    pub fn new(signers: &[store::Signer]) -> (Self, Vec<Unreadable>) {
        let (mut all, mut unreadable) = (Self::default(), Vec::new());
        for signer in signers {
            if signer.current {
                all.current_thumbprint = Some(signer.thumbprint.clone());
            }
            all.first_replaced = all.first_replaced.into_iter().chain(signer.replaced).min();
            match Certificate::parse(&signer.der) {
                Ok(certificate) => {
                    if signer.current {
                        all.current = Some(Key::new(certificate.clone(), &signer.key_id));
                    }
                    all.thumbprints.push(certificate.thumbprint());
                    all.certificates.push(certificate);
                }
                Err(error) => unreadable.push(Unreadable { thumbprint: signer.thumbprint.clone(), error }),
            }
        }
        let ders: Vec<&[u8]> = all.certificates.iter().map(Certificate::der).collect();
        all.published = pkcs7::certificates_only(&ders).into();
        (all, unreadable)
    }

    /// The signer in use.
    #[must_use]
    pub fn current(&self) -> Option<&Key> {
        self.current.as_ref()
    }

    /// Whether health certificates of the signer with this thumbprint are accepted.
    #[must_use]
    pub fn trust(&self, thumbprint: &[u8; 32]) -> bool {
        self.thumbprints.contains(thumbprint)
    }

    /// The thumbprint of the current signer, hexadecimal, even if its certificate cannot be read.
    #[must_use]
    pub fn current_thumbprint(&self) -> Option<&str> {
        self.current_thumbprint.as_deref()
    }

    /// When the earliest of the previous signers was replaced, in seconds since 1970.
    pub(crate) fn first_replaced(&self) -> Option<i64> {
        self.first_replaced
    }

    /// The certificates as a PKCS#7 file without a signature.
    #[must_use]
    pub fn published(&self) -> Bytes {
        self.published.clone()
    }

    /// The certificates of the current signer and of the previous ones.
    #[must_use]
    pub fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::HEXLOWER;

    #[test]
    fn a_certificate_that_cannot_be_read_costs_its_own_signer_only() {
        let signer = |der: Vec<u8>, current, replaced| store::Signer {
            thumbprint: HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, &der).as_ref()),
            der,
            key_id: b"id".to_vec(),
            not_before: 1,
            not_after: 2,
            current,
            replaced,
        };
        let [one, two] = [(); 2].map(|()| crate::service::testing::certificate());
        let broken = signer(b"broken".to_vec(), true, None);
        let all = [broken.clone(), signer(one.clone(), false, Some(7)), signer(two, false, Some(9))];
        let (signers, unreadable) = Signers::new(&all);
        assert_eq!(unreadable.iter().map(|of| &of.thumbprint).collect::<Vec<_>>(), [&broken.thumbprint]);
        assert_eq!(signers.certificates().len(), 2);
        assert!(signers.published().windows(one.len()).any(|part| part == one));
        // It cannot sign, and the next signer takes its place.
        assert!(signers.current().is_none());
        assert_eq!((signers.current_thumbprint(), signers.first_replaced), (Some(&*broken.thumbprint), Some(7)));
    }
}
