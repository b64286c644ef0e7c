//! A software TPM with the functions that attestation needs, for load generators and tests. It proves nothing: its user
//! can set any PCR value.

use ring::error::Unspecified;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};

use super::Malformed;
use super::credential::{self, Protected};
use super::pcr::{PcrSet, PcrValues};
use super::public::{self, AttestationKey};
use super::quote::Quote;
use super::signature::Signature;
use crate::random;
use crate::rsa_key::RsaPrivateKey;

/// An endorsement key, an attestation key and PCRs.
pub struct SoftwareTpm {
    endorsement_key: RsaPrivateKey,
    attestation_key: EcdsaKeyPair,
    ak_public: Vec<u8>,
    /// The PCRs. The user may set any values.
    pub pcrs: PcrValues,
    /// The restart count in quotes.
    pub restart_count: u32,
}

impl SoftwareTpm {
    /// Creates a TPM with this endorsement key, a fresh attestation key on P-256, and no PCR values.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn new(endorsement_key: RsaPrivateKey) -> Result<Self, Unspecified> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, random::source())?;
        let attestation_key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), random::source())
                .map_err(|_| Unspecified)?;
        let mut ak_public = public::attestation_template();
        // The coordinates replace the empty ones of the template.
        ak_public.truncate(ak_public.len() - 4);
        let (coordinates, _) = attestation_key.public_key().as_ref()[1..].as_chunks::<32>();
        for coordinate in coordinates {
            ak_public.extend_from_slice(&(coordinate.len() as u16).to_be_bytes());
            ak_public.extend_from_slice(coordinate);
        }
        Ok(Self { endorsement_key, attestation_key, ak_public, pcrs: PcrValues::default(), restart_count: 0 })
    }

    /// The endorsement key.
    #[must_use]
    pub fn endorsement_key(&self) -> &RsaPrivateKey {
        &self.endorsement_key
    }

    /// `TPMT_PUBLIC` of the attestation key.
    #[must_use]
    pub fn ak_public(&self) -> &[u8] {
        &self.ak_public
    }

    /// `TPM2_ActivateCredential` for the attestation key.
    ///
    /// # Errors
    /// [`Malformed`]: the credential is not for this TPM.
    pub fn activate(&self, protected: &Protected) -> Result<zeroize::Zeroizing<[u8; credential::LENGTH]>, Malformed> {
        let key = AttestationKey::parse(&self.ak_public)?;
        credential::activate(&self.endorsement_key, key.name(), protected)
    }

    /// `TPM2_Quote` over all PCRs that have a value. Returns `TPMS_ATTEST` and `TPMT_SIGNATURE`.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn quote(&self, qualifying_data: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Unspecified> {
        self.quote_of(qualifying_data, self.pcrs.set_of()).map(|(quote, signature, _)| (quote, signature))
    }

    /// The same over these PCRs; those without a value count as zero. Also returns the values.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn quote_of(&self, qualifying_data: &[u8], set: PcrSet) -> Result<(Vec<u8>, Vec<u8>, PcrValues), Unspecified> {
        let mut values = PcrValues::default();
        for pcr in set.iter() {
            values.set(pcr, self.pcrs.get(pcr).copied().unwrap_or_default());
        }
        let quote = Quote {
            extra_data: qualifying_data,
            reset_count: 1,
            restart_count: self.restart_count,
            selection: &set.to_selection(),
            digest: &values.digest(),
        }
        .to_bytes();
        let signature = self.sign(&quote)?;
        Ok((quote, signature, values))
    }

    /// `TPMT_SIGNATURE` of the attestation key over any message.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let signature = self.attestation_key.sign(random::source(), message)?;
        let both = signature.as_ref().try_into().map_err(|_| Unspecified)?;
        Ok(Signature::Ecdsa(both).to_bytes())
    }
}

impl std::fmt::Debug for SoftwareTpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoftwareTpm").field("pcrs", &self.pcrs).finish_non_exhaustive()
    }
}
