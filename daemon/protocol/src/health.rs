//! Health certificates: attestation issues them to healthy hosts, and a release requires one.

use data_encoding::HEXLOWER;

use crate::certificate::build::{BuildError, DistinguishedName, Template, ToBeSigned, key_id, random_serial};
use crate::certificate::{Certificate, CertificateError, KeyUsage};
use crate::rsa_key::RsaPublicKey;

/// The extended key usage of health certificates: system health authentication.
pub const SYSTEM_HEALTH_AUTHENTICATION: &str = "1.3.6.1.4.1.311.47.1.1";
/// Seconds by which `notBefore` precedes the time of issue, for hosts with slow clocks.
pub const BACKDATED_SECONDS: i64 = 5 * 60;
/// Seconds from a health certificate's notBefore to its notAfter.
pub const LIFETIME_SECONDS: i64 = 8 * 60 * 60;

/// The kinds of certificate that a host may request, with their numbers on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ResultType {
    /// 1: a certificate for encryption to the host. Releases require this kind.
    EncryptionCertificate = 1,
    /// 2: a certificate for signatures of the host.
    SigningCertificate = 2,
}

impl ResultType {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    fn key_usage(self) -> KeyUsage {
        match self {
            Self::EncryptionCertificate => KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DATA_ENCIPHERMENT,
            Self::SigningCertificate => KeyUsage::DIGITAL_SIGNATURE,
        }
    }
}

/// Builds a health certificate over the identity key of the host that is registered as `host_name` with `host_key`.
/// `now` is unix time in seconds. The attestation signer's key has to sign the result.
///
/// # Errors
/// [`BuildError`], and [`BuildError::Name`] for an empty host name.
pub fn issue(
    signer: &Certificate,
    host_name: &str,
    host_key: &RsaPublicKey,
    identity_key: &RsaPublicKey,
    content: ResultType,
    now: i64,
) -> Result<ToBeSigned, BuildError> {
    template(signer, host_name, host_key, identity_key, content, now)?.to_be_signed()
}

/// Like [`issue`], for a host that attested with its TPM. The endorsement key takes the place of the host key, and the
/// certificate names the matching baseline.
///
/// # Errors
/// The errors of [`issue`], and [`BuildError::Name`] for an empty baseline name.
pub fn issue_measured(
    signer: &Certificate,
    host_name: &str,
    endorsement_key: &RsaPublicKey,
    baseline: &str,
    identity_key: &RsaPublicKey,
    content: ResultType,
    now: i64,
) -> Result<ToBeSigned, BuildError> {
    let mut template = template(signer, host_name, endorsement_key, identity_key, content, now)?;
    template.subject.organizational_unit = Some(baseline.to_owned());
    template.to_be_signed()
}

fn template(
    signer: &Certificate,
    host_name: &str,
    host_key: &RsaPublicKey,
    identity_key: &RsaPublicKey,
    content: ResultType,
    now: i64,
) -> Result<Template, BuildError> {
    let not_before = now.saturating_sub(BACKDATED_SECONDS);
    Ok(Template {
        subject: DistinguishedName {
            above: Vec::new(),
            common_name: host_name.to_owned(),
            serial_number: Some(HEXLOWER.encode(&host_key.spki_sha256())),
            organizational_unit: None,
        },
        issuer_der: Some(signer.subject_der().to_vec()),
        key: identity_key.clone(),
        serial: random_serial()?,
        not_before,
        not_after: not_before.saturating_add(LIFETIME_SECONDS),
        key_usage: content.key_usage(),
        extended_key_usages: vec![SYSTEM_HEALTH_AUTHENTICATION],
        ca: None,
        subject_key_id: None,
        authority_key_id: signer.subject_key_id().map(<[u8]>::to_vec),
        dns_names: Vec::new(),
    })
}

/// The template of an attestation signer's own certificate: self-signed, and named after its key so that names are
/// unique. Times are unix seconds.
///
/// # Errors
/// [`BuildError::Random`].
pub fn signer_template(key: &RsaPublicKey, not_before: i64, not_after: i64) -> Result<Template, BuildError> {
    let id = key_id(key);
    Ok(Template {
        subject: DistinguishedName::new(format!("Claviger attestation signer {}", HEXLOWER.encode(&id[..8]))),
        issuer_der: None,
        key: key.clone(),
        serial: random_serial()?,
        not_before,
        not_after,
        key_usage: KeyUsage::KEY_CERT_SIGN,
        extended_key_usages: Vec::new(),
        ca: Some(true),
        subject_key_id: Some(id.to_vec()),
        authority_key_id: None,
        dns_names: Vec::new(),
    })
}

/// The content of a valid health certificate. The caller has to check that the host is still registered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthClaims {
    /// The name under which the host is registered.
    pub host_name: String,
    /// SHA-256 of the SubjectPublicKeyInfo of the host key or endorsement key, lower-case hex.
    pub host_key_sha256: String,
    /// The baseline that the host's measurements matched; `None` for a host that attested by a host key.
    pub baseline: Option<String>,
    /// The host's identity key. Released keys are encrypted to it.
    pub key: RsaPublicKey,
    /// SHA-256 of that key's SubjectPublicKeyInfo, lower-case hex.
    pub key_sha256: String,
    /// The certificate's serial number, lower-case hex.
    pub serial: String,
    /// First second of the validity, unix time.
    pub not_before: i64,
    /// Last second of the validity, unix time.
    pub not_after: i64,
    /// Thumbprint of the attestation signer that issued the certificate.
    pub signer: [u8; 32],
}

impl HealthClaims {
    /// When the certificate was issued, unix time.
    #[must_use]
    pub fn issued(&self) -> i64 {
        self.not_before.saturating_add(BACKDATED_SECONDS)
    }
}

/// Why a health certificate is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HealthError {
    /// The certificate cannot be parsed, or its key is not accepted.
    #[error("the health certificate: {0}")]
    Certificate(#[from] CertificateError),
    /// None of the attestation signers issued it.
    #[error("the health certificate was not issued by this service's attestation")]
    Issuer,
    /// The certificate is not valid yet.
    #[error("the health certificate is not valid yet")]
    NotYetValid,
    /// The certificate has expired.
    #[error("the health certificate has expired")]
    Expired,
    /// The certificate lacks the extended key usage system health authentication or the key usage keyEncipherment.
    #[error("the certificate is not for key release: it must have system health authentication and keyEncipherment")]
    Usage,
    /// The certificate lacks a host name or a host key.
    #[error("the health certificate names no host, or no host key")]
    Subject,
}

/// Verifies the health certificate of a release request against the current and previous attestation signers. `now` is
/// in unix seconds.
///
/// # Errors
/// [`HealthError`].
pub fn check(der: &[u8], signers: &[Certificate], now: i64) -> Result<HealthClaims, HealthError> {
    let certificate = Certificate::parse(der)?;
    // The validity of the signer's own certificate is ignored: a signer stays listed for as long as its certificates
    // are accepted.
    let issuer = signers.iter().find(|signer| {
        signer.subject_der() == certificate.issuer_der() && certificate.verify_signed_by(signer.key()).is_ok()
    });
    let issuer = issuer.ok_or(HealthError::Issuer)?;
    if now < certificate.not_before() {
        return Err(HealthError::NotYetValid);
    }
    if now > certificate.not_after() {
        return Err(HealthError::Expired);
    }
    if !certificate.has_extended_key_usage(SYSTEM_HEALTH_AUTHENTICATION)
        || !certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT)
    {
        return Err(HealthError::Usage);
    }
    let (Some(host_name), Some(host_key)) = (certificate.common_name(), certificate.subject_serial_number()) else {
        return Err(HealthError::Subject);
    };
    Ok(HealthClaims {
        host_name: host_name.to_owned(),
        host_key_sha256: host_key.to_owned(),
        baseline: certificate.organizational_unit().map(str::to_owned),
        key: certificate.key().clone(),
        key_sha256: HEXLOWER.encode(&certificate.key().spki_sha256()),
        serial: HEXLOWER.encode(certificate.serial()),
        not_before: certificate.not_before(),
        not_after: certificate.not_after(),
        signer: issuer.thumbprint(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::rsa_key::testing::key;

    const NOW: i64 = 1_800_000_000;

    fn signer(index: usize) -> Certificate {
        let template = signer_template(key(index).public(), NOW - 1000, NOW - 500).unwrap();
        Certificate::parse(&template.to_be_signed().unwrap().sign_with(key(index)).unwrap()).unwrap()
    }

    fn certificate(content: ResultType) -> Vec<u8> {
        let to_be_signed = issue(&signer(0), "host-1", key(1).public(), key(2).public(), content, NOW).unwrap();
        to_be_signed.sign_with(key(0)).unwrap()
    }

    #[test]
    fn an_issued_certificate_is_accepted() {
        let der = certificate(ResultType::EncryptionCertificate);
        let signers = [signer(1), signer(0)];
        let claims = check(&der, &signers, NOW).unwrap();
        assert_eq!(claims.host_name, "host-1");
        assert_eq!(claims.host_key_sha256, HEXLOWER.encode(&key(1).public().spki_sha256()));
        assert_eq!(&claims.key, key(2).public());
        assert_eq!(claims.key_sha256, HEXLOWER.encode(&key(2).public().spki_sha256()));
        assert_eq!(claims.serial, HEXLOWER.encode(Certificate::parse(&der).unwrap().serial()));
        assert!(claims.serial.len() >= 16, "{}", claims.serial);
        assert_eq!((claims.not_before, claims.not_after), (NOW - 300, NOW - 300 + 8 * 3600));
        assert_eq!(claims.signer, signers[1].thumbprint());
        let parsed = Certificate::parse(&der).unwrap();
        assert!(parsed.has_key_usage(KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DATA_ENCIPHERMENT));
        assert!(!parsed.has_key_usage(KeyUsage::DIGITAL_SIGNATURE));
        assert_ne!(der, certificate(ResultType::EncryptionCertificate));
    }

    #[test]
    fn a_measured_host_s_certificate_names_its_baseline() {
        let content = ResultType::EncryptionCertificate;
        let made =
            |baseline| issue_measured(&signer(0), "host-1", key(1).public(), baseline, key(2).public(), content, NOW);
        let der = made("fleet-2026").unwrap().sign_with(key(0)).unwrap();
        let claims = check(&der, &[signer(0)], NOW).unwrap();
        assert_eq!(claims.baseline.as_deref(), Some("fleet-2026"));
        assert_eq!((claims.host_name.as_str(), claims.issued()), ("host-1", NOW));
        // The order has to be CN, serialNumber, OU.
        let subject = Certificate::parse(&der).unwrap().subject_der().to_vec();
        let at = |oid: &[u8]| subject.windows(oid.len()).position(|part| part == oid).unwrap();
        assert!(at(&[0x55, 4, 3]) < at(&[0x55, 4, 5]) && at(&[0x55, 4, 5]) < at(&[0x55, 4, 11]));
        assert!(matches!(made(""), Err(BuildError::Name(_))));
        let plain = check(&certificate(content), &[signer(0)], NOW).unwrap();
        assert_eq!(plain.baseline, None);
    }

    #[test]
    fn the_validity_includes_both_ends() {
        let der = certificate(ResultType::EncryptionCertificate);
        let at = |now| check(&der, &[signer(0)], now).err();
        assert_eq!(at(NOW - 301), Some(HealthError::NotYetValid));
        assert_eq!(at(NOW - 300), None);
        assert_eq!(at(NOW - 300 + 8 * 3600), None);
        assert_eq!(at(NOW - 300 + 8 * 3600 + 1), Some(HealthError::Expired));
        assert_eq!(at(i64::MIN), Some(HealthError::NotYetValid));
        assert_eq!(at(i64::MAX), Some(HealthError::Expired));
    }

    #[test]
    fn only_the_signers_count() {
        let der = certificate(ResultType::EncryptionCertificate);
        assert_eq!(check(&der, &[], NOW), Err(HealthError::Issuer));
        assert_eq!(check(&der, &[signer(1)], NOW), Err(HealthError::Issuer));
        // First: the right name with a signature by another key. Then: the right key with another name.
        let other =
            issue(&signer(0), "host-1", key(1).public(), key(2).public(), ResultType::EncryptionCertificate, NOW);
        let forged = other.unwrap().sign_with(key(1)).unwrap();
        assert_eq!(check(&forged, &[signer(0), signer(1)], NOW), Err(HealthError::Issuer));
        let mut renamed = signer_template(key(0).public(), NOW, NOW).unwrap();
        renamed.subject = DistinguishedName::new("another name");
        let renamed = Certificate::parse(&renamed.to_be_signed().unwrap().sign_with(key(0)).unwrap()).unwrap();
        assert_eq!(check(&der, &[renamed], NOW), Err(HealthError::Issuer));
        let mut flipped = der.clone();
        *flipped.last_mut().unwrap() ^= 1;
        assert_eq!(check(&flipped, &[signer(0)], NOW), Err(HealthError::Issuer));
    }

    #[test]
    fn what_is_not_for_this_use_is_refused() {
        let signing = certificate(ResultType::SigningCertificate);
        assert!(Certificate::parse(&signing).unwrap().has_key_usage(KeyUsage::DIGITAL_SIGNATURE));
        assert_eq!(check(&signing, &[signer(0)], NOW), Err(HealthError::Usage));
        // The attestation signer's own certificate is also signed by an attestation signer.
        let mut own = signer_template(key(0).public(), NOW, NOW).unwrap();
        own.key_usage = KeyUsage::KEY_ENCIPHERMENT;
        let own = own.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        assert_eq!(check(&own, &[signer(0)], NOW), Err(HealthError::Usage));

        let mut nameless = signer_template(key(0).public(), NOW, NOW).unwrap();
        nameless.key_usage = KeyUsage::KEY_ENCIPHERMENT;
        nameless.extended_key_usages = vec![SYSTEM_HEALTH_AUTHENTICATION];
        let nameless = nameless.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        assert_eq!(check(&nameless, &[signer(0)], NOW), Err(HealthError::Subject));

        let good = certificate(ResultType::EncryptionCertificate);
        let longer = [&good[..], &[0]].concat();
        assert_eq!(check(&longer, &[signer(0)], NOW), Err(CertificateError::TrailingOctets.into()));
        assert_eq!(check(b"", &[signer(0)], NOW), Err(CertificateError::NotX509.into()));
    }

    #[test]
    fn signers_have_names_of_their_own() {
        assert_ne!(signer(0).subject_der(), signer(1).subject_der());
        assert!(signer(0).common_name().unwrap().starts_with("Claviger attestation signer "));
        assert!(signer(0).has_key_usage(KeyUsage::KEY_CERT_SIGN));
        assert_eq!(signer(0).verify_signed_by(key(0).public()), Ok(()));
    }

    #[test]
    fn a_host_without_a_name_gets_nothing() {
        let result = issue(&signer(0), "", key(1).public(), key(2).public(), ResultType::EncryptionCertificate, NOW);
        assert!(matches!(result, Err(BuildError::Name(_))));
    }
}
