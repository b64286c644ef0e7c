//! The cost of verification and encryption, so that it can be charged to the host that caused it.

use crate::rsa_key::RsaPublicKey;

/// Key size of the unit of work, in bits.
const UNIT_BITS: u64 = 2048;

/// Number of public-key operations. The time of one operation grows with the square of the key's length.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Work {
    /// Sum of the squares of the key lengths, in bits.
    squares: u64,
}

impl Work {
    /// Adds one operation with `key`.
    pub fn add(&mut self, key: &RsaPublicKey) {
        let bits = 8 * key.modulus_len() as u64;
        self.squares = self.squares.saturating_add(bits * bits);
    }

    /// The equivalent number of operations with 2048-bit keys, rounded up.
    #[must_use]
    pub fn operations(self) -> u32 {
        u32::try_from(self.squares.div_ceil(UNIT_BITS * UNIT_BITS)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_counts_by_the_square_of_its_key() {
        let key = |bits: usize| RsaPublicKey::from_components(&vec![0xff; bits / 8], &[1, 0, 1]).unwrap();
        let mut work = Work::default();
        assert_eq!(work.operations(), 0);
        work.add(&key(2048));
        assert_eq!(work.operations(), 1);
        work.add(&key(4096));
        assert_eq!(work.operations(), 5);
        work.add(&key(8192));
        assert_eq!(work.operations(), 21);
        // This protector costs as much as sixty usual ones.
        let mut heavy = Work::default();
        (0..52).for_each(|_| heavy.add(&key(7168)));
        assert_eq!(heavy.operations(), 637);
    }
}
