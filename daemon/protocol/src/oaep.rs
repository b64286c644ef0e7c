//! RSA-OAEP encryption (RFC 8017, section 7.1.1) with two different digests. aws-lc does not support this.
//! The exponent, the modulus and all lengths are public, and the padding is random, so the timing of code that depends
//! on them reveals nothing. crypto-bigint does the arithmetic on the padded block in constant time.

use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use ring::digest;
use ring::rand::SecureRandom;
use zeroize::{Zeroize, Zeroizing};

use crate::algorithm::{Digest, Oaep};
use crate::random;

/// A public key, prepared for the raw RSA operation.
#[derive(Debug)]
pub(crate) struct PublicOperation {
    modulus: BoxedMontyParams,
    /// At most 33 bits.
    exponent: u64,
    octets: usize,
}

impl PublicOperation {
    /// `None` if the modulus is even.
    pub(crate) fn new(modulus: &[u8], exponent: u64) -> Option<Self> {
        let odd = Option::<Odd<BoxedUint>>::from(Odd::new(BoxedUint::from_be_slice_vartime(modulus)))?;
        Some(Self { modulus: BoxedMontyParams::new_vartime(odd), exponent, octets: modulus.len() })
    }

    /// Raises `block` to the public exponent. The result has the modulus' length. `None` if the block is longer than
    /// that.
    fn raise(&self, block: &[u8]) -> Option<Vec<u8>> {
        let mut base = BoxedUint::from_be_slice(block, self.modulus.bits_precision()).ok()?;
        let mut base_form = BoxedMontyForm::new(base.clone(), &self.modulus);
        base.zeroize();
        let mut power = base_form.clone();
        // Square and multiply, from the second-highest bit on. For 65537: 16 squarings and one multiplication.
        for bit in (0..self.exponent.checked_ilog2()?).rev() {
            power = power.square();
            if self.exponent >> bit & 1 == 1 {
                power = power.mul(&base_form);
            }
        }
        base_form.as_montgomery_mut().zeroize();
        let octets = power.retrieve().to_be_bytes();
        // The result has whole limbs: if the modulus does not fill its highest limb, zeros precede the value.
        octets.get(octets.len().checked_sub(self.octets)?..).map(<[u8]>::to_vec)
    }

    /// Encrypts with an empty label. `None` if the plaintext is too long or the system has no randomness.
    pub(crate) fn encrypt(&self, oaep: Oaep, plaintext: &[u8]) -> Option<Vec<u8>> {
        self.raise(&pad(oaep, self.octets, plaintext)?)
    }
}

/// EME-OAEP encoding with an empty label: `00 ‖ masked seed ‖ masked (label's digest ‖ 00 … 00 ‖ 01 ‖ plaintext)`.
fn pad(oaep: Oaep, octets: usize, plaintext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let label = digest::digest(ring_digest(oaep.digest), b"");
    let label = label.as_ref();
    // The rest of the block is filled with zeros.
    octets.checked_sub(2 * label.len() + 2 + plaintext.len())?;
    let mut block = Zeroizing::new(vec![0; octets]);
    let (seed, data) = block.get_mut(1..)?.split_at_mut(label.len());
    random::source().fill(seed).ok()?;
    data.get_mut(..label.len())?.copy_from_slice(label);
    let separator = data.len().checked_sub(plaintext.len() + 1)?;
    *data.get_mut(separator)? = 1;
    data.get_mut(separator + 1..)?.copy_from_slice(plaintext);
    xor_mgf1(oaep.mgf, seed, data);
    xor_mgf1(oaep.mgf, data, seed);
    Some(block)
}

/// XORs MGF1(`seed`) over `target`.
fn xor_mgf1(mgf: Digest, seed: &[u8], target: &mut [u8]) {
    let algorithm = ring_digest(mgf);
    for (counter, chunk) in (0_u32..).zip(target.chunks_mut(algorithm.output_len())) {
        let mut context = digest::Context::new(algorithm);
        context.update(seed);
        context.update(&counter.to_be_bytes());
        for (octet, mask) in chunk.iter_mut().zip(context.finish().as_ref()) {
            *octet ^= mask;
        }
    }
}

fn ring_digest(digest: Digest) -> &'static digest::Algorithm {
    match digest {
        Digest::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        Digest::Sha256 => &digest::SHA256,
        Digest::Sha384 => &digest::SHA384,
        Digest::Sha512 => &digest::SHA512,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::rsa_key::testing::key;

    #[test]
    fn the_bare_operation_is_that_of_another_library() {
        // Moduli that fill their limbs and moduli that do not; also the largest exponent. The operation works with any
        // odd modulus, so no primes are needed.
        for bits in [2048_usize, 2049, 3071, 7168, 8191, 8192] {
            for exponent in [65537_u64, (1 << 33) - 1] {
                let mut modulus = vec![0xff; bits.div_ceil(8)];
                modulus[0] >>= modulus.len() * 8 - bits;
                modulus[17] = 0x5a;
                let mut block: Vec<u8> = (0..modulus.len()).map(|at| (at * 7 + bits) as u8).collect();
                block[0] = 0;
                let number = |octets: &[u8]| rsa::BigUint::from_bytes_be(octets);
                let expected = number(&block).modpow(&rsa::BigUint::from(exponent), &number(&modulus));
                let operation = PublicOperation::new(&modulus, exponent).unwrap();
                let raised = operation.raise(&block).unwrap();
                assert_eq!((raised.len(), number(&raised)), (modulus.len(), expected), "{bits} {exponent}");
                assert!(operation.raise(&[&block[..], &[0; 9]].concat()).is_none(), "a block that is too long");
            }
        }
        assert!(PublicOperation::new(&[2; 256], 65537).is_none());
    }

    #[test]
    fn what_is_padded_here_is_read_by_aws_lc_and_by_the_rsa_crate() {
        let key = key(0);
        let operation = PublicOperation::new(key.public().modulus(), 65537).unwrap();
        for digest in Digest::ALL {
            for mgf in Digest::ALL {
                let oaep = Oaep { digest, mgf };
                let longest = vec![7; key.public().max_plaintext_len(oaep)];
                for plaintext in [&b""[..], &[9; 32], &longest] {
                    // aws-lc decrypts if both digests are equal, otherwise the rsa crate.
                    let sealed = operation.encrypt(oaep, plaintext).unwrap();
                    assert_eq!(*key.decrypt_oaep(oaep, &sealed).unwrap(), plaintext, "{oaep:?}");
                }
                assert!(operation.encrypt(oaep, &[&longest[..], &[7]].concat()).is_none());
            }
        }
        assert!(pad(Oaep { digest: Digest::Sha512, mgf: Digest::Sha1 }, 100, b"").is_none());
    }
}
