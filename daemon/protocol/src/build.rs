//! Writing protectors: a fresh transport key for the same parties (step 8 of a release).
//!
//! The document is written in canonical form from the start, so that what is signed is a slice of what is sent.

use data_encoding::{BASE64, HEXLOWER};
use ring::{hkdf, hmac, rand::SecureRandom};

use crate::algorithm::{HKDF, HMAC_SHA256, OAEP_11, OAEP_MGF1P, SignatureAlgorithm};
use crate::error::Refusal;
use crate::protector::{
    Encryption, HKDF_NS, Hkdf, MAX_PROTECTOR, Signature, TRANSPORT_KEY_LEN, TransportKey, TransportKeySignature,
    Wrapping,
};
use crate::rsa_key::RsaPublicKey;
use crate::xml::{DSIG_NS, KPS_NS, write_base64};
use crate::{algorithm::Digest, random};

impl TransportKeySignature {
    /// Whether `key` made this signature over `signed_octets`. Takes the same time whatever the answer.
    #[must_use]
    pub fn verify(&self, key: &TransportKey, signed_octets: &[u8]) -> bool {
        hmac::verify(&self.derivation.key(key), signed_octets, &self.value).is_ok()
    }
}

impl Hkdf {
    /// A derivation with a fresh salt of 32 octets and no info.
    fn fresh() -> Result<Self, Refusal> {
        Ok(Self { salt: random::octets::<32>().map_err(|_| Refusal::internal())?.to_vec(), info: Vec::new() })
    }

    /// The HMAC key that the transport key gives.
    fn key(&self, transport_key: &TransportKey) -> hmac::Key {
        let info = [self.info.as_slice()];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &self.salt).extract(&transport_key[..]);
        // `expand` fails only for more than 255 blocks; HMAC-SHA-256 takes one.
        match prk.expand(&info, hmac::HMAC_SHA256) {
            Ok(okm) => hmac::Key::from(okm),
            Err(_) => hmac::Key::new(hmac::HMAC_SHA256, &[]),
        }
    }
}

/// A fresh transport key.
///
/// # Errors
/// `InternalErrorException` when the system has no randomness.
pub fn fresh_transport_key() -> Result<TransportKey, Refusal> {
    let mut key = TransportKey::default();
    random::source().fill(&mut key[..]).map_err(|_| Refusal::internal())?;
    Ok(key)
}

/// A protector that lacks nothing but the guardian's signature.
#[derive(Debug)]
pub struct Unsigned {
    /// `<Wrappings xmlns="K">…</Wrappings>`, canonical.
    wrappings: String,
    signature: TransportKeySignature,
    max_offline_unwraps: u32,
}

impl Unsigned {
    /// Encrypts `key` for every wrapping by the algorithm it used before, and signs with a key derived from it.
    /// `recipients` are the encryption keys, in the order of `wrappings`; the rest of each wrapping is kept.
    ///
    /// # Errors
    /// `InternalErrorException` when an encryption fails or the system has no randomness; `InvalidProtectorException` when
    /// the file would be larger than a protector may be.
    pub fn new<'a>(
        wrappings: &[Wrapping],
        recipients: impl IntoIterator<Item = &'a RsaPublicKey>,
        key: &TransportKey,
        max_offline_unwraps: u32,
    ) -> Result<Self, Refusal> {
        let mut out = format!("<Wrappings xmlns=\"{KPS_NS}\">");
        for (wrapping, recipient) in wrappings.iter().zip(recipients) {
            let oaep = wrapping.encryption.oaep;
            let cipher_value = recipient.encrypt_oaep(oaep, &key[..]).map_err(|_| Refusal::internal())?;
            write_wrapping(wrapping, &cipher_value, &mut out);
        }
        out.push_str("</Wrappings>");
        // What is hopeless is refused before anybody signs it.
        within_limit(out.len())?;
        let derivation = Hkdf::fresh()?;
        let value = hmac::sign(&derivation.key(key), out.as_bytes()).as_ref().to_vec();
        Ok(Self { wrappings: out, signature: TransportKeySignature { derivation, value }, max_offline_unwraps })
    }

    /// What the guardian signs.
    #[must_use]
    pub fn signed_octets(&self) -> &[u8] {
        self.wrappings.as_bytes()
    }

    /// The protector file, with the guardian's signature `value` made by the signing key of wrapping `guardian` (an Id).
    ///
    /// # Errors
    /// `InvalidProtectorException` when the file would be larger than a protector may be.
    pub fn finish(&self, guardian: u32, algorithm: SignatureAlgorithm, value: Vec<u8>) -> Result<Vec<u8>, Refusal> {
        let mut out = format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><Protector xmlns=\"{KPS_NS}\"");
        if self.max_offline_unwraps > 0 {
            out.push_str(&format!(" MaxOfflineUnwraps=\"{}\"", self.max_offline_unwraps));
        }
        out.push_str("><Wrappings>");
        // Inside the document the default namespace is declared by the root already.
        let declared = "<Wrappings xmlns=\"\">".len() + KPS_NS.len();
        out.push_str(&self.wrappings[declared..]);
        write_transport_key_signature(&self.signature, &mut out);
        out.push_str(&format!("<GuardianSignature WrappingId=\"{guardian}\">"));
        write_signature("Signature", &Signature { algorithm, parameters: None, value }, &mut out);
        out.push_str("</GuardianSignature></Protector>");
        within_limit(out.len())?;
        Ok(out.into_bytes())
    }
}

fn within_limit(octets: usize) -> Result<(), Refusal> {
    if octets > MAX_PROTECTOR {
        return Err(Refusal::protector(format!("the new protector would be larger than {MAX_PROTECTOR} octets")));
    }
    Ok(())
}

fn write_wrapping(wrapping: &Wrapping, cipher_value: &[u8], out: &mut String) {
    out.push_str(&format!("<Wrapping><Id>{}</Id>", wrapping.id));
    write_base64("SigningCertificate", &wrapping.signing_certificate, out);
    out.push_str(&format!("<SigningCertificateSignature ParentWrappingId=\"{}\">", wrapping.parent));
    write_signature("Signature", &wrapping.signing_certificate_signature, out);
    out.push_str("</SigningCertificateSignature>");
    write_base64("EncryptionCertificate", &wrapping.encryption_certificate, out);
    out.push_str("<EncryptionCertificateSignature>");
    write_signature("Signature", &wrapping.encryption_certificate_signature, out);
    out.push_str("</EncryptionCertificateSignature><TransportKey>");
    write_encryption(&wrapping.encryption, out);
    write_base64("CipherValue", cipher_value, out);
    out.push_str("</EncryptedData></TransportKey></Wrapping>");
}

/// The start of `EncryptedData`, up to its `Parameters`. XML Encryption 1.1's are written even where they are the
/// defaults, but not where there were none: absent means SHA-1 for both.
fn write_encryption(encryption: &Encryption, out: &mut String) {
    if !encryption.version_11 {
        out.push_str(&format!("<EncryptedData Algorithm=\"{OAEP_MGF1P}\">"));
        return;
    }
    out.push_str(&format!("<EncryptedData Algorithm=\"{OAEP_11}\">"));
    let oaep = encryption.oaep;
    if (oaep.digest, oaep.mgf) != (Digest::Sha1, Digest::Sha1) {
        out.push_str(&format!(
            "<Parameters><ds:DigestMethod xmlns:ds=\"{DSIG_NS}\" Algorithm=\"{}\"></ds:DigestMethod>\
             <xenc11:MGF xmlns:xenc11=\"http://www.w3.org/2009/xmlenc11#\" Algorithm=\"{}\"></xenc11:MGF></Parameters>",
            oaep.digest.uri(),
            oaep.mgf.mgf_uri()
        ));
    }
}

fn write_transport_key_signature(signature: &TransportKeySignature, out: &mut String) {
    out.push_str(&format!(
        "<TransportKeySignature><KeyDerivationMethod Algorithm=\"{HKDF}\"><Parameters>\
         <h:HKDFParams xmlns:h=\"{HKDF_NS}\"><h:PRF Algorithm=\"{HMAC_SHA256}\"></h:PRF><h:Salt>{}</h:Salt>\
         <h:KeyLength>{TRANSPORT_KEY_LEN}</h:KeyLength></h:HKDFParams></Parameters></KeyDerivationMethod>\
         <Signature Algorithm=\"{HMAC_SHA256}\"><SignatureValue>{}</SignatureValue></Signature></TransportKeySignature>",
        HEXLOWER.encode(&signature.derivation.salt),
        BASE64.encode(&signature.value)
    ));
}

/// A `Signature_T` under the name `element`.
pub(crate) fn write_signature(element: &str, signature: &Signature, out: &mut String) {
    out.push_str(&format!("<{element} Algorithm=\"{}\">", signature.algorithm.uri()));
    if let Some(parameters) = &signature.parameters {
        out.push_str("<Parameters>");
        out.push_str(parameters);
        out.push_str("</Parameters>");
    }
    write_base64("SignatureValue", &signature.value, out);
    out.push_str(&format!("</{element}>"));
}
