//! Sets of platform configuration registers, and their values in the SHA-256 bank.

use std::fmt;

use data_encoding::HEXLOWER;

use super::reader::Reader;
use super::{Malformed, algorithm};
use crate::hash::sha256;

/// Number of PCRs in the TPM of a PC.
pub const COUNT: usize = 24;

/// Bytes of the bit field in a selection of this protocol.
const SELECT_BYTES: u8 = 3;

/// The value of a PCR in the SHA-256 bank.
pub type Value = [u8; 32];

/// A set of PCRs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PcrSet(u32);

impl PcrSet {
    /// The PCRs that every host quotes: firmware, option ROMs, boot loader, Secure Boot.
    pub const ALWAYS: Self = Self(1 << 0 | 1 << 2 | 1 << 4 | 1 << 7);

    /// Adds a PCR. Indices of 24 and more do not exist and are ignored.
    pub fn insert(&mut self, pcr: usize) {
        if pcr < COUNT {
            self.0 |= 1 << pcr;
        }
    }

    /// Whether this PCR is in the set.
    #[must_use]
    pub fn contains(self, pcr: usize) -> bool {
        pcr < COUNT && self.0 >> pcr & 1 == 1
    }

    /// The PCRs of both sets.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The PCRs in ascending order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..COUNT).filter(move |pcr| self.contains(*pcr))
    }

    /// Number of PCRs in the set.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set as `TPML_PCR_SELECTION`: one bank, SHA-256, three bytes of bits.
    #[must_use]
    pub fn to_selection(self) -> [u8; 10] {
        let [a, b, c, _] = self.0.to_le_bytes();
        let [high, low] = algorithm::SHA256.to_be_bytes();
        [0, 0, 0, 1, high, low, SELECT_BYTES, a, b, c]
    }

    /// Parses the form that [`Self::to_selection`] writes.
    ///
    /// # Errors
    /// [`Malformed`], also if the bank is not SHA-256 or if there are several banks.
    pub fn from_selection(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.u32_be()? != 1 || reader.u16_be()? != algorithm::SHA256 || reader.u8()? != SELECT_BYTES {
            return Err(Malformed("the selection is not of the SHA-256 bank alone, with three bytes of bits"));
        }
        let bits = [reader.u8()?, reader.u8()?, reader.u8()?, 0];
        reader.finish()?;
        Ok(Self(u32::from_le_bytes(bits)))
    }
}

impl FromIterator<usize> for PcrSet {
    fn from_iter<I: IntoIterator<Item = usize>>(pcrs: I) -> Self {
        let mut set = Self::default();
        pcrs.into_iter().for_each(|pcr| set.insert(pcr));
        set
    }
}

impl fmt::Debug for PcrSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The values of some PCRs.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PcrValues {
    values: [Option<Value>; COUNT],
}

impl PcrValues {
    /// The value of a PCR, if present.
    #[must_use]
    pub fn get(&self, pcr: usize) -> Option<&Value> {
        self.values.get(pcr)?.as_ref()
    }

    /// Sets the value of a PCR. Returns `false` if the PCR does not exist.
    pub fn set(&mut self, pcr: usize, value: Value) -> bool {
        match self.values.get_mut(pcr) {
            Some(slot) => {
                *slot = Some(value);
                true
            }
            None => false,
        }
    }

    /// Removes the value of a PCR.
    pub fn remove(&mut self, pcr: usize) -> Option<Value> {
        self.values.get_mut(pcr)?.take()
    }

    /// The PCRs with their values, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Value)> {
        self.values.iter().enumerate().filter_map(|(pcr, value)| Some((pcr, value.as_ref()?)))
    }

    /// The PCRs that have a value.
    #[must_use]
    pub fn set_of(&self) -> PcrSet {
        self.iter().map(|(pcr, _)| pcr).collect()
    }

    /// Parses the values that a host sends: 32 bytes for each PCR of the selection, in ascending order. `None`: the
    /// number of bytes is wrong.
    #[must_use]
    pub fn read(selection: PcrSet, bytes: &[u8]) -> Option<Self> {
        let (values, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() || values.len() != selection.len() {
            return None;
        }
        let mut read = Self::default();
        for (pcr, value) in selection.iter().zip(values) {
            read.set(pcr, *value);
        }
        Some(read)
    }

    /// All values in ascending order of the PCRs, in the form that a host sends.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|(_, value)| *value).collect()
    }

    /// The digest of these values in a quote.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        sha256(&self.to_bytes())
    }
}

impl fmt::Debug for PcrValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(pcr, value)| (pcr, HEXLOWER.encode(value)))).finish()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_three_bytes_of_bits() {
        let set: PcrSet = [0, 2, 4, 7, 9, 23, 24, 1000].into_iter().collect();
        assert_eq!(set.to_selection(), [0, 0, 0, 1, 0, 0x0b, 3, 0x95, 0x02, 0x80]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 2, 4, 7, 9, 23]);
        assert_eq!(PcrSet::from_selection(&set.to_selection()), Ok(set));
        assert_eq!(format!("{set:?}"), "{0, 2, 4, 7, 9, 23}");
        let good = set.to_selection();
        for length in 0..good.len() {
            assert!(PcrSet::from_selection(&good[..length]).is_err());
        }
        for (at, value) in [(3, 2), (3, 0), (5, 4), (6, 4), (6, 2)] {
            let mut changed = good;
            changed[at] = value;
            assert!(PcrSet::from_selection(&changed).is_err(), "{changed:?}");
        }
    }

    #[test]
    fn values_stand_in_the_order_of_their_pcrs() {
        let set: PcrSet = [4, 0].into_iter().collect();
        let bytes = [[1; 32], [2; 32]].concat();
        let values = PcrValues::read(set, &bytes).unwrap();
        assert_eq!((values.get(0), values.get(4), values.get(1)), (Some(&[1; 32]), Some(&[2; 32]), None));
        assert_eq!(values.to_bytes(), bytes);
        assert_eq!(values.set_of(), set);
        for wrong in [&bytes[..32], &bytes[..63], &[&bytes[..], &[0]].concat(), &[0; 96], &[]] {
            assert_eq!(PcrValues::read(set, wrong), None);
        }
    }
}
