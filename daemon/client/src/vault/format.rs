//! The format of a vault: sealing, opening and parsing, without I/O. All numbers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8   "CLVVAULT"
//!      8      4   version: 1
//!     12      4   bytes of the protector
//!     16      4   bytes of the sealed secrets, with their tag of 16
//!     20      4   bytes of the machine's name, 1 to 64
//!     24      8   generation: 1 in a new vault, one more in each successor
//!     32     16   id of the vault, random; all generations have it
//!     48     32   salt, random for each sealing
//!     80     32   SHA-256 of the protector
//!    112          the machine's name; the protector; the sealed secrets; nothing after them
//! ```
//! The sealing key is HKDF-SHA-256 of the transport key with the salt and the info "claviger-vault-1". It seals once, so the
//! nonce of AES-256-GCM is zero. The first 112 bytes and the name are the additional authenticated data.

use claviger_protocol::protector::{MAX_PROTECTOR, Protector, TransportKey};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::secrets::{MAX_ENCODED, Secrets};

const MAGIC: &[u8; 8] = b"CLVVAULT";
const VERSION: u32 = 1;
const HEADER: usize = 112;
/// Longest name of a machine, in bytes.
const MAX_MACHINE: usize = 64;
const TAG: usize = 16;
const INFO: &[u8] = b"claviger-vault-1";

/// Longest vault, in bytes.
pub const MAX_VAULT: usize = HEADER + MAX_MACHINE + MAX_PROTECTOR + MAX_ENCODED + TAG;

/// Why a vault cannot be read, opened or sealed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// The file is not a vault.
    #[error("it is no vault; claviger host vm create makes one")]
    NoVault,
    /// The version of the file is not supported.
    #[error("it is a vault of version {0}, and this claviger knows version {VERSION}; use a newer claviger")]
    Version(u32),
    /// The file is damaged.
    #[error("the vault is damaged: {0}; take it from a backup, or have its owner recover it from one")]
    Damaged(&'static str),
    /// The protector cannot be parsed.
    #[error("the vault's protector: {0}")]
    Protector(String),
    /// The machine's name is not valid.
    #[error(
        "{0:?} is no name of a machine: 1 to {MAX_MACHINE} of A-Z, a-z, 0-9, '.', '_', '+' and '-', and no '.' first"
    )]
    Machine(String),
    /// The key to seal with is not the transport key of the protector.
    #[error("the key that came is not that of the protector that came with it; nothing is changed")]
    ForeignKey,
    /// The transport key does not open the secrets.
    #[error("the vault does not open with the key of its protector: it was changed; take it from a backup")]
    Sealed,
    /// The generation number has reached its maximum.
    #[error("the vault has no generation left")]
    Exhausted,
    /// The system has no randomness.
    #[error("the system has no randomness")]
    Randomness,
}

/// A parsed vault. Its form is valid; its secrets are still sealed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vault {
    /// Random id, the same in all generations.
    pub id: [u8; 16],
    /// Name of the machine, the same in all generations.
    pub machine: String,
    /// Generation number: 1 for a new vault, increased by one at each sealing.
    pub generation: u64,
    /// The protector whose transport key seals the secrets.
    pub protector: Vec<u8>,
    header: [u8; HEADER],
    sealed: Vec<u8>,
}

impl Vault {
    /// Creates the vault of a machine with these secrets, sealed with the transport key of `protector`.
    ///
    /// # Errors
    /// [`VaultError::Machine`], [`VaultError::Protector`], [`VaultError::ForeignKey`], [`VaultError::Randomness`].
    pub fn create(machine: &str, protector: &[u8], key: &TransportKey, secrets: &Secrets) -> Result<Self, VaultError> {
        check_machine(machine)?;
        Self::seal(machine, random()?, 1, protector, key, secrets)
    }

    /// Creates the next generation of this vault with these secrets, sealed with the transport key of another
    /// protector.
    ///
    /// # Errors
    /// [`VaultError::Protector`], [`VaultError::ForeignKey`], [`VaultError::Exhausted`], [`VaultError::Randomness`].
    pub fn successor(&self, protector: &[u8], key: &TransportKey, secrets: &Secrets) -> Result<Self, VaultError> {
        self.successor_beyond(0, protector, key, secrets)
    }

    /// The same, with a generation number above `seen`. If an old copy is used on purpose, its successor must not have
    /// the number of a generation that followed the copy.
    ///
    /// # Errors
    /// See [`successor`](Self::successor).
    pub fn successor_beyond(
        &self,
        seen: u64,
        protector: &[u8],
        key: &TransportKey,
        secrets: &Secrets,
    ) -> Result<Self, VaultError> {
        let generation = self.generation.max(seen).checked_add(1).ok_or(VaultError::Exhausted)?;
        Self::seal(&self.machine, self.id, generation, protector, key, secrets)
    }

    fn seal(
        machine: &str,
        id: [u8; 16],
        generation: u64,
        protector: &[u8],
        key: &TransportKey,
        secrets: &Secrets,
    ) -> Result<Self, VaultError> {
        // The next start asks for the key of this protector. If another key sealed the vault, the machine would be lost.
        let parsed = Protector::parse(protector).map_err(|refusal| VaultError::Protector(refusal.message))?;
        if !parsed.transport_key_signature.verify(key, &parsed.signed_octets) {
            return Err(VaultError::ForeignKey);
        }
        let mut content = secrets.encode();
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(protector.len() as u32).to_le_bytes());
        header[16..20].copy_from_slice(&((content.len() + TAG) as u32).to_le_bytes());
        header[20..24].copy_from_slice(&(machine.len() as u32).to_le_bytes());
        header[24..32].copy_from_slice(&generation.to_le_bytes());
        header[32..48].copy_from_slice(&id);
        header[48..80].copy_from_slice(&random::<32>()?);
        header[80..].copy_from_slice(digest(&SHA256, protector).as_ref());
        let key = sealing_key(key, &header).ok_or(VaultError::Sealed)?;
        let clear = [&header[..], machine.as_bytes()].concat();
        let tag = key.seal_in_place_separate_tag(zero_nonce(), Aad::from(&clear), &mut content);
        let mut sealed = content.to_vec();
        sealed.extend_from_slice(tag.map_err(|_| VaultError::Sealed)?.as_ref());
        let bytes = [&clear, protector, &sealed].concat();
        // Parse the result like the next start will.
        Self::parse(&bytes)
    }

    /// Parses a vault. Checks its form, the digest of its protector, and the protector's form.
    ///
    /// # Errors
    /// [`VaultError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, VaultError> {
        if !bytes.starts_with(MAGIC) {
            return Err(VaultError::NoVault);
        }
        let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(VaultError::Damaged("it is cut off"))?;
        let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if number(8) != VERSION {
            return Err(VaultError::Version(number(8)));
        }
        let (protector, sealed) = (number(12) as usize, number(16) as usize);
        let lengths = (1..=MAX_PROTECTOR).contains(&protector) && (TAG..=MAX_ENCODED + TAG).contains(&sealed);
        let machine = number(20) as usize;
        if !lengths || !(1..=MAX_MACHINE).contains(&machine) {
            return Err(VaultError::Damaged("its header makes no sense"));
        }
        if rest.len() != machine + protector + sealed {
            return Err(VaultError::Damaged("its length is not what its header says"));
        }
        let (machine, rest) = rest.split_at(machine);
        let (protector, sealed) = rest.split_at(protector);
        let machine = std::str::from_utf8(machine).ok().filter(|name| check_machine(name).is_ok());
        let machine = machine.ok_or(VaultError::Damaged("the name of its machine is not valid"))?.to_owned();
        if digest(&SHA256, protector).as_ref() != &header[80..] {
            return Err(VaultError::Damaged("its protector was changed"));
        }
        Protector::parse(protector).map_err(|refusal| VaultError::Protector(refusal.message))?;
        let (mut id, mut generation) = ([0; 16], [0; 8]);
        id.copy_from_slice(&header[32..48]);
        generation.copy_from_slice(&header[24..32]);
        let generation = match u64::from_le_bytes(generation) {
            0 => return Err(VaultError::Damaged("its header makes no sense")),
            generation => generation,
        };
        Ok(Self { id, machine, generation, protector: protector.to_vec(), header: *header, sealed: sealed.to_vec() })
    }

    /// Opens the secrets. `key` is the transport key of [`Vault::protector`].
    ///
    /// # Errors
    /// [`VaultError::Sealed`].
    pub fn open(&self, key: &TransportKey) -> Result<Secrets, VaultError> {
        let key = sealing_key(key, &self.header).ok_or(VaultError::Sealed)?;
        let mut content = Zeroizing::new(self.sealed.clone());
        let opened = key.open_in_place(zero_nonce(), Aad::from(self.clear()), &mut content);
        let opened = opened.map_err(|_| VaultError::Sealed)?;
        Secrets::decode(opened).ok_or(VaultError::Sealed)
    }

    /// The content of the file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.clear(), &self.protector[..], &self.sealed].concat()
    }

    /// Digest of everything but the secrets. Each sealing has another salt, so no two vaults have the same one.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, &self.clear()).as_ref());
        fingerprint
    }

    /// The additional authenticated data.
    fn clear(&self) -> Vec<u8> {
        [&self.header[..], self.machine.as_bytes()].concat()
    }

    /// SHA-256 of the protector.
    #[must_use]
    pub fn protector_digest(&self) -> &[u8] {
        &self.header[80..]
    }
}

/// Checks that this can be the name of a machine.
///
/// # Errors
/// [`VaultError::Machine`].
pub fn check_machine(name: &str) -> Result<(), VaultError> {
    let right = |c: u8| c.is_ascii_alphanumeric() || b"._+-".contains(&c);
    if (1..=MAX_MACHINE).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(right) {
        return Ok(());
    }
    Err(VaultError::Machine(name.chars().take(2 * MAX_MACHINE).collect()))
}

fn sealing_key(key: &TransportKey, header: &[u8; HEADER]) -> Option<LessSafeKey> {
    let derived = Salt::new(HKDF_SHA256, &header[48..80]).extract(&key[..]);
    let mut octets = Zeroizing::new([0; 32]);
    derived.expand(&[INFO], HKDF_SHA256).ok()?.fill(&mut octets[..]).ok()?;
    UnboundKey::new(&AES_256_GCM, &octets[..]).ok().map(LessSafeKey::new)
}

fn zero_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn random<const N: usize>() -> Result<[u8; N], VaultError> {
    let mut octets = [0; N];
    SystemRandom::new().fill(&mut octets).map_err(|_| VaultError::Randomness)?;
    Ok(octets)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::protector;

    fn secrets() -> Secrets {
        let mut secrets = Secrets::default();
        secrets.add("state-key", Zeroizing::new(vec![7; 32]), false).unwrap();
        secrets
    }

    #[test]
    fn a_vault_opens_with_its_key_alone_and_says_which_generation_it_is() {
        let (file, key) = protector();
        let vault = Vault::create("web-1", &file, &key, &secrets()).unwrap();
        assert_eq!((vault.generation, &vault.protector), (1, &file));
        let read = Vault::parse(&vault.to_bytes()).unwrap();
        assert_eq!(read.open(&key).unwrap(), secrets());
        let (other_file, other_key) = protector();
        assert_eq!(read.open(&other_key), Err(VaultError::Sealed));
        let next = read.successor(&other_file, &other_key, &secrets()).unwrap();
        assert_eq!((next.id, next.generation), (vault.id, 2));
        assert_eq!(next.open(&other_key).unwrap(), secrets());
        assert_eq!(next.open(&key), Err(VaultError::Sealed));
        // Sealing twice gives entirely different bytes.
        let again = read.successor(&other_file, &other_key, &secrets()).unwrap();
        assert_ne!(again.sealed, next.sealed);
        assert_ne!(again.fingerprint(), next.fingerprint());
        assert_eq!(Vault::parse(&next.to_bytes()).unwrap().fingerprint(), next.fingerprint());
        let mut last = again;
        last.generation = u64::MAX;
        assert_eq!(last.successor(&file, &key, &secrets()), Err(VaultError::Exhausted));
    }

    /// An independent implementation from the description alone must produce the same bytes. This is one.
    #[test]
    fn the_format_is_the_described_one() {
        let (file, key) = protector();
        let bytes = Vault::create("web-1", &file, &key, &secrets()).unwrap().to_bytes();
        assert_eq!(&bytes[..12], b"CLVVAULT\x01\0\0\0");
        assert_eq!(bytes[12..16], (file.len() as u32).to_le_bytes());
        assert_eq!(bytes[16..32], [62, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[80..112], digest(&SHA256, &file).as_ref());
        assert_eq!(&bytes[112..117], b"web-1");
        assert_eq!(&bytes[117..117 + file.len()], file);
        // HKDF according to RFC 5869, from HMAC.
        let hmac = |key: &[u8], data: &[u8]| {
            ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key), data).as_ref().to_vec()
        };
        let derived = hmac(&hmac(&bytes[48..80], &key[..]), b"claviger-vault-1\x01");
        let sealing = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &derived).unwrap());
        let mut sealed = bytes[117 + file.len()..].to_vec();
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let opened = sealing.open_in_place(nonce, Aad::from(&bytes[..117]), &mut sealed).unwrap();
        assert_eq!(opened, [b"\x01\0\x09state-key\x20\0", &[7; 32][..]].concat());
    }

    #[test]
    fn no_changed_byte_goes_unnoticed() {
        let (file, key) = protector();
        let bytes = Vault::create("web-1", &file, &key, &secrets()).unwrap().to_bytes();
        let opens = |bytes: &[u8]| Vault::parse(bytes).and_then(|vault| vault.open(&key)).is_ok();
        assert!(opens(&bytes));
        // The whole header, the machine's name, all sealed secrets, and a part of the protector.
        let end = 117 + file.len();
        for at in (0..117).chain((117..end).step_by(97)).chain(end..bytes.len()) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(!opens(&changed), "byte {at}");
        }
        for length in (0..112).chain((112..bytes.len()).step_by(101)) {
            assert!(!opens(&bytes[..length]), "cut to {length}");
        }
        assert!(!opens(&[&bytes[..], &[0]].concat()));
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert_eq!(Vault::parse(&newer), Err(VaultError::Version(2)));
        assert_eq!(Vault::parse(b"<Protector/>"), Err(VaultError::NoVault));
    }

    #[test]
    fn a_vault_is_sealed_with_the_key_of_its_protector_alone_and_has_a_name() {
        let ((file, key), (_, other)) = (protector(), protector());
        assert_eq!(Vault::create("web-1", &file, &other, &secrets()), Err(VaultError::ForeignKey));
        let vault = Vault::create("web-1", &file, &key, &secrets()).unwrap();
        assert_eq!(vault.successor(&file, &other, &secrets()), Err(VaultError::ForeignKey));
        assert_eq!(vault.successor(&file, &key, &secrets()).unwrap().machine, "web-1");
        for name in ["a", "Web_1.example+x", &"x".repeat(64)] {
            assert_eq!(Vault::create(name, &file, &key, &secrets()).unwrap().machine, name);
        }
        for name in ["", ".a", "a/b", "a b", "\u{e4}", &"x".repeat(65)] {
            assert!(matches!(Vault::create(name, &file, &key, &secrets()), Err(VaultError::Machine(_))), "{name}");
        }
    }
}
