//! EME-OAEP decoding (RFC 8017, section 7.1.2, step 3) for tokens that support only the bare RSA operation.
//!
//! The running time must not reveal if or where a padding is broken, or the daemon becomes an oracle for Manger's attack.
//! So the code makes one pass over the block, collects every check in one mask, and decides only on that mask, at the end.

use std::hint::black_box;

use zeroize::Zeroizing;

use crate::keys::{Hash, Oaep};

/// Removes the padding from a block of the modulus's length; `None` if it is not a valid OAEP block with an empty label.
pub(crate) fn unpad(oaep: Oaep, block: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let hash_len = oaep.hash.output_len();
    // Lengths are public: they depend only on the modulus and the parameters.
    if block.len() < 2 * hash_len + 2 {
        return None;
    }
    let (first, rest) = block.split_first()?;
    let (masked_seed, masked_db) = rest.split_at(hash_len);

    let mut seed = Zeroizing::new(masked_seed.to_vec());
    xor_mgf1(oaep.mgf, masked_db, &mut seed);
    let mut db = Zeroizing::new(masked_db.to_vec());
    xor_mgf1(oaep.mgf, &seed, &mut db);

    let label_hash = ring::digest::digest(oaep.hash.digest_algorithm(), b"");
    let (found_hash, tail) = db.split_at(hash_len);

    let mut difference = *first;
    for (found, expected) in found_hash.iter().zip(label_hash.as_ref()) {
        difference |= found ^ expected;
    }

    // Format: 0x00 … 0x00 0x01 message. `searching` is all ones until the 0x01 is found.
    let mut searching = 0xff_u8;
    let mut start = 0_usize;
    for (index, &byte) in tail.iter().enumerate() {
        let zero = mask_zero(byte);
        let one = mask_zero(byte ^ 1);
        start |= (index + 1) & widen(searching & one);
        // A byte other than zero and one before the 0x01: the padding is broken.
        difference |= searching & !zero & !one;
        searching &= !one;
    }
    // No 0x01 was found.
    difference |= searching;

    let good = black_box(mask_zero(difference));
    if good == 0 {
        return None;
    }
    tail.get(start..).map(|message| Zeroizing::new(message.to_vec()))
}

/// Returns all ones if `byte` is zero, else zero; without a branch.
fn mask_zero(byte: u8) -> u8 {
    // Only zero borrows from the upper byte.
    let [mask, _] = black_box(u16::from(byte)).wrapping_sub(1).to_be_bytes();
    mask
}

/// Extends an all-ones or zero mask from a byte to a word.
fn widen(mask: u8) -> usize {
    usize::from(black_box(mask) & 1).wrapping_neg()
}

/// XORs MGF1(`seed`) over `target`.
fn xor_mgf1(hash: Hash, seed: &[u8], target: &mut [u8]) {
    let algorithm = hash.digest_algorithm();
    for (counter, chunk) in (0_u32..).zip(target.chunks_mut(algorithm.output_len())) {
        let mut context = ring::digest::Context::new(algorithm);
        context.update(seed);
        context.update(&counter.to_be_bytes());
        for (byte, mask) in chunk.iter_mut().zip(context.finish().as_ref()) {
            *byte ^= mask;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::software_rsa::padding;
    use proptest::prelude::*;
    use rsa::rand_core::OsRng;
    use rsa::traits::{PrivateKeyParts, PublicKeyParts};
    use rsa::{BigUint, RsaPrivateKey, RsaPublicKey};
    use std::sync::LazyLock;

    static KEY: LazyLock<RsaPrivateKey> = LazyLock::new(|| RsaPrivateKey::new(&mut OsRng, 2048).unwrap());

    /// The bare RSA operation, as a token performs it with CKM_RSA_X_509.
    fn raw_decrypt(ciphertext: &[u8]) -> Vec<u8> {
        let block = BigUint::from_bytes_be(ciphertext).modpow(KEY.d(), KEY.n()).to_bytes_be();
        let mut padded = vec![0; KEY.size() - block.len()];
        padded.extend(block);
        padded
    }

    fn encrypt(oaep: Oaep, message: &[u8]) -> Vec<u8> {
        RsaPublicKey::from(&*KEY).encrypt(&mut OsRng, padding(oaep), message).unwrap()
    }

    #[test]
    fn reads_what_another_implementation_wrote() {
        for oaep in Oaep::all() {
            let longest = KEY.size() - 2 * oaep.hash.output_len() - 2;
            for len in [0, 1, 32, longest] {
                let message: Vec<u8> = (0..len).map(|i| i as u8).collect();
                let block = raw_decrypt(&encrypt(oaep, &message));
                assert_eq!(*unpad(oaep, &block).unwrap(), message, "{oaep:?} {len}");
            }
        }
    }

    #[test]
    fn refuses_every_flipped_bit() {
        let oaep = Oaep { hash: Hash::Sha256, mgf: Hash::Sha1 };
        let message = [7; 32];
        let block = raw_decrypt(&encrypt(oaep, &message));
        for bit in 0..block.len() * 8 {
            let mut broken = block.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            // Each mask covers the whole other part, so a flipped bit anywhere destroys the label's hash.
            assert!(unpad(oaep, &broken).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn refuses_other_parameters() {
        for oaep in Oaep::all() {
            let block = raw_decrypt(&encrypt(oaep, b"message"));
            for other in Oaep::all().filter(|other| *other != oaep) {
                assert!(unpad(other, &block).is_none(), "{oaep:?} as {other:?}");
            }
        }
    }

    /// Builds a block around any data block, with valid masks.
    fn block_around(oaep: Oaep, first: u8, db: &[u8]) -> Vec<u8> {
        let mut seed = vec![0x5a; oaep.hash.output_len()];
        let mut masked = db.to_vec();
        xor_mgf1(oaep.mgf, &seed, &mut masked);
        xor_mgf1(oaep.mgf, &masked, &mut seed);
        [&[first][..], &seed, &masked].concat()
    }

    #[test]
    fn looks_at_every_part_of_the_padding() {
        let oaep = Oaep { hash: Hash::Sha256, mgf: Hash::Sha256 };
        let label = ring::digest::digest(&ring::digest::SHA256, b"");
        let db = |tail: &[u8]| [label.as_ref(), tail].concat();
        let good = db(&[0, 0, 0, 1, 9, 1, 0]);
        assert_eq!(*unpad(oaep, &block_around(oaep, 0, &good)).unwrap(), [9, 1, 0]);
        assert!(unpad(oaep, &block_around(oaep, 1, &good)).is_none(), "first byte");
        assert!(unpad(oaep, &block_around(oaep, 0, &db(&[0, 0, 2, 1, 9]))).is_none(), "padding");
        assert!(unpad(oaep, &block_around(oaep, 0, &db(&[0, 0, 0, 0]))).is_none(), "no separator");
        assert!(unpad(oaep, &block_around(oaep, 0, &[&[0; 32][..], &[0, 1, 9]].concat())).is_none(), "label");
        assert_eq!(*unpad(oaep, &block_around(oaep, 0, &db(&[1]))).unwrap(), [0_u8; 0]);
    }

    #[test]
    fn masks_are_right_for_every_byte() {
        for byte in 0..=255 {
            assert_eq!(mask_zero(byte), if byte == 0 { 0xff } else { 0 });
        }
        assert_eq!(widen(0xff), usize::MAX);
        assert_eq!(widen(0), 0);
    }

    proptest! {
        #[test]
        fn never_panics_and_never_accepts_noise(block in proptest::collection::vec(any::<u8>(), 0..600)) {
            for oaep in Oaep::all() {
                prop_assert!(unpad(oaep, &block).is_none());
            }
        }
    }
}
