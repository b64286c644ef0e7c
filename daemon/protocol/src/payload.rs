//! The encryption of both transport keys to the host (protocol page, section 2.4; step 9 of a release), and the host's
//! decryption.

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::algorithm::{HostAlgorithms, KeyWrapping, Sealing};
use crate::error::Refusal;
use crate::protector::{TRANSPORT_KEY_LEN, TransportKey, transport_key};
use crate::random;
use crate::rsa_key::RsaPublicKey;

/// Id of the policy that allows a host to unwrap offline for a number of starts.
const POLICY_ID: u32 = 1;
const POLICY_TYPE_OFFLINE_UNWRAPS: u32 = 6;

/// The version of the interface. It determines the payload's version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ApiVersion {
    /// `v1.0`: payload version 1.
    V1,
    /// `v2.0`: payload version 2, which carries policies.
    V2,
}

impl ApiVersion {
    /// The version in URLs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1.0",
            Self::V2 => "v2.0",
        }
    }
}

/// The plaintext for the host: two keys, and the number of offline unwraps.
pub struct Payload {
    /// The key of the protector that the host sent.
    pub ingress: TransportKey,
    /// The key of the new protector.
    pub egress: TransportKey,
    /// Number of offline unwraps. With 0, no policy is written.
    pub max_offline_unwraps: u32,
}

/// The three ciphertexts of a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EncryptedKeys {
    /// The transfer key, encrypted to the health certificate's key.
    pub transfer_key: Vec<u8>,
    /// The wrapping key, encrypted with the transfer key.
    pub wrapping_key: Vec<u8>,
    /// The payload, encrypted with the wrapping key.
    pub transport_keys: Vec<u8>,
}

/// The host could not decrypt a reply. Deliberately gives no reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the encrypted keys cannot be opened")]
pub struct OpenError;

impl Payload {
    /// The bytes of the payload; u32 fields are little-endian.
    fn encode(&self, version: ApiVersion) -> Zeroizing<Vec<u8>> {
        // Reserve enough memory: a growing vector would leave copies of keys behind.
        let mut out = Zeroizing::new(Vec::with_capacity(128));
        let number = match version {
            ApiVersion::V1 => 1,
            ApiVersion::V2 => 2,
        };
        for field in [0, number, 2, TRANSPORT_KEY_LEN as u32] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.ingress[..]);
        out.extend_from_slice(&self.egress[..]);
        if version == ApiVersion::V2 {
            let policy = [POLICY_ID, POLICY_TYPE_OFFLINE_UNWRAPS, 4, self.max_offline_unwraps];
            let policies: &[u32] = if self.max_offline_unwraps > 0 { &policy } else { &[] };
            out.extend_from_slice(&u32::from(!policies.is_empty()).to_le_bytes());
            for field in policies {
                out.extend_from_slice(&field.to_le_bytes());
            }
        }
        let size = (out.len() as u32).to_le_bytes();
        out[..4].copy_from_slice(&size);
        out
    }

    /// Parses the result of [`Payload::encode`], of either version.
    fn decode(octets: &[u8]) -> Option<Self> {
        let field = |at: usize| octets.get(at * 4..at * 4 + 4)?.try_into().ok().map(u32::from_le_bytes);
        let shape = (field(0)? as usize, field(2)?, field(3)? as usize);
        if shape != (octets.len(), 2, TRANSPORT_KEY_LEN) {
            return None;
        }
        let key = |at: usize| transport_key(octets.get(at..at + TRANSPORT_KEY_LEN)?);
        let (ingress, egress) = (key(16)?, key(16 + TRANSPORT_KEY_LEN)?);
        let max_offline_unwraps = match (field(1)?, octets.len()) {
            (1, 80) => 0,
            (2, 84) if field(20)? == 0 => 0,
            (2, 100)
                if (field(20)?, field(21)?, field(22)?, field(23)?)
                    == (1, POLICY_ID, POLICY_TYPE_OFFLINE_UNWRAPS, 4) =>
            {
                field(24)?
            }
            _ => return None,
        };
        Some(Self { ingress, egress, max_offline_unwraps })
    }

    /// Encrypts the payload to the host for which `keys` were made.
    ///
    /// # Errors
    /// `InternalErrorException` if the system has no randomness or an encryption fails.
    pub fn seal(&self, version: ApiVersion, keys: HostKeys) -> Result<EncryptedKeys, Refusal> {
        let transport_keys = seal(keys.transport, &keys.plain_wrapping_key, &self.encode(version))?;
        Ok(EncryptedKeys { transfer_key: keys.transfer_key, wrapping_key: keys.wrapping_key, transport_keys })
    }
}

/// The fresh keys that encrypt one payload to a host. They do not depend on the payload, so they can be made while the
/// payload is awaited.
pub struct HostKeys {
    /// See [`EncryptedKeys::transfer_key`].
    transfer_key: Vec<u8>,
    /// See [`EncryptedKeys::wrapping_key`].
    wrapping_key: Vec<u8>,
    plain_wrapping_key: Zeroizing<Vec<u8>>,
    transport: Sealing,
}

impl HostKeys {
    /// Makes a transfer key and a wrapping key, and encrypts them to the host.
    ///
    /// # Errors
    /// `InternalErrorException` if the system has no randomness or an encryption fails.
    pub fn fresh(host: &RsaPublicKey, algorithms: HostAlgorithms) -> Result<Self, Refusal> {
        let plain_transfer_key = fresh_key(algorithms.wrapping.key_len())?;
        let plain_wrapping_key = fresh_key(algorithms.transport.key_len())?;
        let transfer_key = host.encrypt_oaep(algorithms.transfer, &plain_transfer_key);
        Ok(Self {
            transfer_key: transfer_key.map_err(|_| Refusal::internal())?,
            wrapping_key: match algorithms.wrapping {
                KeyWrapping::Seal(sealing) => seal(sealing, &plain_transfer_key, &plain_wrapping_key)?,
                KeyWrapping::Aes256Kw => wrap(&plain_transfer_key, &plain_wrapping_key)?,
            },
            plain_wrapping_key,
            transport: algorithms.transport,
        })
    }
}

impl EncryptedKeys {
    /// Decrypts a reply for the host. The host has already decrypted [`EncryptedKeys::transfer_key`] with its own key.
    ///
    /// # Errors
    /// [`OpenError`] for every failure.
    pub fn open(&self, transfer_key: &[u8], wrapping: KeyWrapping, transport: Sealing) -> Result<Payload, OpenError> {
        let wrapping_key = match wrapping {
            KeyWrapping::Seal(sealing) => open(sealing, transfer_key, &self.wrapping_key)?,
            KeyWrapping::Aes256Kw => unwrap(transfer_key, &self.wrapping_key)?,
        };
        let payload = open(transport, &wrapping_key, &self.transport_keys)?;
        Payload::decode(&payload).ok_or(OpenError)
    }
}

fn fresh_key(len: usize) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    use ring::rand::SecureRandom;
    let mut key = Zeroizing::new(vec![0; len]);
    random::source().fill(&mut key).map_err(|_| Refusal::internal())?;
    Ok(key)
}

fn gcm(sealing: Sealing, key: &[u8]) -> Option<LessSafeKey> {
    let algorithm = match sealing {
        Sealing::Aes128Gcm => &AES_128_GCM,
        Sealing::Aes256Gcm => &AES_256_GCM,
    };
    UnboundKey::new(algorithm, key).ok().map(LessSafeKey::new)
}

/// Returns IV ‖ ciphertext ‖ tag. Each key encrypts only once, so a random IV cannot repeat.
fn seal(sealing: Sealing, key: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, Refusal> {
    let key = gcm(sealing, key).ok_or_else(Refusal::internal)?;
    let iv: [u8; NONCE_LEN] = random::octets().map_err(|_| Refusal::internal())?;
    let mut out = Vec::with_capacity(NONCE_LEN + plaintext.len() + 16);
    out.extend_from_slice(&iv);
    out.extend_from_slice(plaintext);
    let nonce = Nonce::assume_unique_for_key(iv);
    let tag =
        key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut out[NONCE_LEN..]).map_err(|_| Refusal::internal())?;
    out.extend_from_slice(tag.as_ref());
    Ok(out)
}

fn open(sealing: Sealing, key: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let key = gcm(sealing, key).ok_or(OpenError)?;
    let (iv, rest) = sealed.split_at_checked(NONCE_LEN).ok_or(OpenError)?;
    let nonce = Nonce::try_assume_unique_for_key(iv).map_err(|_| OpenError)?;
    let mut buffer = Zeroizing::new(rest.to_vec());
    let len = key.open_in_place(nonce, Aad::empty(), &mut buffer).map_err(|_| OpenError)?.len();
    buffer.truncate(len);
    Ok(buffer)
}

fn wrap(key: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, Refusal> {
    let kek = AesKek::new(&AES_256, key).map_err(|_| Refusal::internal())?;
    let mut out = vec![0; plaintext.len() + 8];
    let len = kek.wrap(plaintext, &mut out).map_err(|_| Refusal::internal())?.len();
    out.truncate(len);
    Ok(out)
}

fn unwrap(key: &[u8], wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let kek = AesKek::new(&AES_256, key).map_err(|_| OpenError)?;
    let mut out = Zeroizing::new(vec![0; wrapped.len()]);
    let len = kek.unwrap(wrapped, &mut out).map_err(|_| OpenError)?.len();
    out.truncate(len);
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn payload(max_offline_unwraps: u32) -> Payload {
        let key = |byte| transport_key(&[byte; 32]).unwrap();
        Payload { ingress: key(7), egress: key(9), max_offline_unwraps }
    }

    #[test]
    fn the_layout_is_the_published_one() {
        let v1 = payload(5).encode(ApiVersion::V1);
        assert_eq!(&v1[..16], [80, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!((&v1[16..48], &v1[48..]), (&[7; 32][..], &[9; 32][..]));
        let v2 = payload(0).encode(ApiVersion::V2);
        assert_eq!((v2.len(), &v2[..8], &v2[80..]), (84, &[84, 0, 0, 0, 2, 0, 0, 0][..], &[0; 4][..]));
        let v2 = payload(5).encode(ApiVersion::V2);
        assert_eq!(v2[80..], [1, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(v2[0], 100);
    }

    #[test]
    fn what_is_encoded_decodes_and_nothing_else_does() {
        for (version, unwraps) in [(ApiVersion::V1, 0), (ApiVersion::V2, 0), (ApiVersion::V2, 3)] {
            let octets = payload(unwraps).encode(version);
            let read = Payload::decode(&octets).unwrap();
            assert_eq!((*read.ingress, *read.egress, read.max_offline_unwraps), ([7; 32], [9; 32], unwraps));
            for len in 0..octets.len() {
                assert!(Payload::decode(&octets[..len]).is_none());
            }
        }
    }

    /// RFC 3394, section 4.6: 256 bits of key data with a 256-bit key.
    #[test]
    fn key_wrap_is_rfc_3394() {
        let hex = |s: &str| data_encoding::HEXUPPER.decode(s.as_bytes()).unwrap();
        let kek = hex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F");
        let data = hex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
        let wrapped = hex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21");
        assert_eq!(wrap(&kek, &data).unwrap(), wrapped);
        assert_eq!(*unwrap(&kek, &wrapped).unwrap(), data);
    }
}
