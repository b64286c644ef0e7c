//! Reads fields from the front of a byte slice.

use super::Malformed;

/// Bytes of a coordinate on P-256, and of each number of an ECDSA signature.
pub(super) const P256_BYTES: usize = 32;

/// The unread part of a structure. Each read checks the length first.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The unread bytes.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed("it ends in the middle of a field"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed("it ends in the middle of a field"))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn u16_be(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32_be(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64_be(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn u16_le(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32_le(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64_le(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// The content of a structure with a big-endian 16-bit size in front (`TPM2B_*`), at most `longest` bytes.
    pub(super) fn sized(&mut self, longest: usize) -> Result<&'a [u8], Malformed> {
        let length = usize::from(self.u16_be()?);
        if length > longest {
            return Err(Malformed("a field is longer than its type allows"));
        }
        self.take(length)
    }

    /// The next `length` bytes, where `length` is a little-endian 32-bit number of the log or Context.
    pub(super) fn take_u32(&mut self, length: u32) -> Result<&'a [u8], Malformed> {
        self.take(usize::try_from(length).map_err(|_| Malformed("a length is absurd"))?)
    }

    /// Finishes reading.
    ///
    /// # Errors
    /// [`Malformed`] if bytes are left.
    pub(super) fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed("bytes are left after its last field")) }
    }
}

/// Pads a number of at most 32 bytes with leading zeros.
pub(super) fn padded(number: &[u8]) -> [u8; P256_BYTES] {
    let mut padded = [0; P256_BYTES];
    if let Some(place) = P256_BYTES.checked_sub(number.len()).and_then(|at| padded.get_mut(at..)) {
        place.copy_from_slice(number);
    }
    padded
}
