//! The Context: the envelope in which host and service exchange TPM structures.

use super::Malformed;
use super::reader::Reader;

/// The version number of Contexts in this protocol. Windows uses 1.
pub const VERSION: u32 = 0x434c_0001;
/// Most blobs in a Context.
pub(crate) const MAX_BLOBS: usize = 16;
/// Longest State in bytes.
pub(crate) const MAX_STATE: usize = 4 * 1024;
/// Longest public area of an attestation key in bytes.
pub(crate) const MAX_AK_PUBLIC: usize = 1024;
/// Longest event log in bytes.
pub const MAX_LOG: usize = 512 * 1024;

/// Bytes of the header: size, version, number of blobs, a reserved field.
const HEADER: usize = 16;
/// Bytes before each blob: its kind and its length.
const BLOB_HEADER: usize = 8;

/// The kinds of blobs, with their numbers on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// 1: the sealed session data that the service needs in step 2.
    State = 1,
    /// 2: `TPMT_PUBLIC` of the attestation key.
    AkPublic = 2,
    /// 3: the contents of a `TPM2B_ID_OBJECT`.
    IdObject = 3,
    /// 4: the contents of a `TPM2B_ENCRYPTED_SECRET`.
    EncryptedSecret = 4,
    /// 5: `TPML_PCR_SELECTION`.
    PcrSelection = 5,
    /// 6: `TPMS_ATTEST`.
    Quote = 6,
    /// 7: `TPMT_SIGNATURE` over the quote.
    Signature = 7,
    /// 8: the selected PCRs' values, ascending.
    PcrValues = 8,
    /// 9: the event log.
    Log = 9,
}

/// A parsed Context: blobs by kind. Unknown kinds are kept, so that each step can reject them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Context<'a> {
    blobs: Vec<(u32, &'a [u8])>,
}

impl<'a> Context<'a> {
    /// Parses a Context. The contents of the blobs are not checked.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let size = reader.u32_le()?;
        if usize::try_from(size).ok() != Some(bytes.len()) {
            return Err(Malformed("Size is not the Context's length"));
        }
        if reader.u32_le()? != VERSION {
            return Err(Malformed("Version is not 0x434C0001"));
        }
        let count = reader.u32_le()? as usize;
        if count > MAX_BLOBS {
            return Err(Malformed("there are more than 16 blobs"));
        }
        if reader.u32_le()? != 0 {
            return Err(Malformed("Reserved is not 0"));
        }
        let mut blobs = Vec::with_capacity(count);
        for _ in 0..count {
            let kind = reader.u32_le()?;
            let length = reader.u32_le()?;
            let content = reader.take_u32(length)?;
            if blobs.iter().any(|(other, _)| *other == kind) {
                return Err(Malformed("a kind of blob is there twice"));
            }
            blobs.push((kind, content));
        }
        reader.finish()?;
        Ok(Self { blobs })
    }

    /// The content of the blob of this kind.
    #[must_use]
    pub fn get(&self, kind: Kind) -> Option<&'a [u8]> {
        self.blobs.iter().find(|(number, _)| *number == kind as u32).map(|(_, content)| *content)
    }

    /// The contents of these kinds, in this order.
    ///
    /// # Errors
    /// [`Malformed`] if a kind is missing, an additional kind is present, or a blob is longer than its kind allows.
    pub fn exactly<const N: usize>(&self, kinds: [Kind; N]) -> Result<[&'a [u8]; N], Malformed> {
        if self.blobs.iter().any(|(number, _)| kinds.iter().all(|kind| *kind as u32 != *number)) {
            return Err(Malformed("the Context holds a kind of blob that this step does not have"));
        }
        let mut contents = [&[][..]; N];
        for (content, kind) in contents.iter_mut().zip(kinds) {
            *content = self.get(kind).ok_or(Malformed("the Context lacks a blob of this step"))?;
            let allowed = match kind {
                Kind::State => 0..=MAX_STATE,
                Kind::AkPublic => 0..=MAX_AK_PUBLIC,
                Kind::Log => 1..=MAX_LOG,
                _ => 0..=usize::MAX,
            };
            if !allowed.contains(&content.len()) {
                return Err(Malformed("a blob is shorter or longer than its kind allows"));
            }
        }
        Ok(contents)
    }
}

/// A Context of these blobs.
#[must_use]
pub fn write(blobs: &[(Kind, &[u8])]) -> Vec<u8> {
    let size = HEADER + blobs.iter().map(|(_, content)| BLOB_HEADER + content.len()).sum::<usize>();
    let mut out = Vec::with_capacity(size);
    for field in [size as u32, VERSION, blobs.len() as u32, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    for (kind, content) in blobs {
        out.extend_from_slice(&(*kind as u32).to_le_bytes());
        out.extend_from_slice(&(content.len() as u32).to_le_bytes());
        out.extend_from_slice(content);
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        write(&[(Kind::State, b"state"), (Kind::Quote, b""), (Kind::Log, &[7; 300])])
    }

    #[test]
    fn a_context_is_read_as_it_was_written() {
        let bytes = sample();
        assert_eq!(bytes[..16], [0x59, 1, 0, 0, 1, 0, 0x4c, 0x43, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..29], [1, 0, 0, 0, 5, 0, 0, 0, b's', b't', b'a', b't', b'e']);
        let context = Context::parse(&bytes).unwrap();
        assert_eq!(context.get(Kind::State), Some(&b"state"[..]));
        assert_eq!(context.get(Kind::Quote), Some(&b""[..]));
        assert_eq!(context.get(Kind::AkPublic), None);
        let [log, state, quote] = context.exactly([Kind::Log, Kind::State, Kind::Quote]).unwrap();
        assert_eq!((log, state, quote), (&[7; 300][..], &b"state"[..], &b""[..]));
        assert!(Context::parse(&write(&[])).is_ok());
    }

    #[test]
    fn what_is_not_exactly_a_context_is_refused() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(Context::parse(&bytes[..length]).is_err(), "{length}");
        }
        assert!(Context::parse(&[&bytes[..], &[0]].concat()).is_err());
        // Offsets of: size, version of Windows, number of blobs, reserved field, a length.
        for (at, value) in [(0, 0x58), (4, 2), (8, 2), (8, 4), (8, 17), (11, 0xff), (12, 1), (20, 4), (23, 0xff)] {
            let mut changed = bytes.clone();
            changed[at] = value;
            assert!(Context::parse(&changed).is_err(), "byte {at}");
        }
        let windows = [&bytes[..4], &1_u32.to_le_bytes(), &bytes[8..]].concat();
        assert_eq!(Context::parse(&windows), Err(Malformed("Version is not 0x434C0001")));
        // The size counts one byte too many, and that byte is present.
        let mut longer = [&bytes[..], &[0]].concat();
        longer[0] += 1;
        assert!(Context::parse(&longer).is_err());
        let twice = write(&[(Kind::State, b"a"), (Kind::State, b"b")]);
        assert_eq!(Context::parse(&twice), Err(Malformed("a kind of blob is there twice")));
    }

    #[test]
    fn sixteen_blobs_are_the_most() {
        let of = |count: u32| {
            let mut bytes = write(&[]);
            for kind in 100..100 + count {
                bytes.extend_from_slice(&kind.to_le_bytes());
                bytes.extend_from_slice(&[0; 4]);
            }
            let size = (bytes.len() as u32).to_le_bytes();
            bytes[..4].copy_from_slice(&size);
            bytes[8] = count as u8;
            Context::parse(&bytes).is_ok()
        };
        assert!(of(16));
        assert!(!of(17));
    }

    #[test]
    fn a_step_takes_its_own_kinds_only() {
        let exactly = |blobs: &[(Kind, &[u8])]| {
            let bytes = write(blobs);
            Context::parse(&bytes).unwrap().exactly([Kind::State, Kind::Log]).is_ok()
        };
        assert!(exactly(&[(Kind::State, b""), (Kind::Log, b"x")]));
        assert!(!exactly(&[(Kind::State, b"")]));
        assert!(!exactly(&[(Kind::State, b""), (Kind::Log, b"")]));
        assert!(!exactly(&[(Kind::State, b""), (Kind::Log, b"x"), (Kind::Quote, b"")]));
        assert!(exactly(&[(Kind::State, &[0; MAX_STATE]), (Kind::Log, &[0; MAX_LOG])]));
        assert!(!exactly(&[(Kind::State, &[0; MAX_STATE + 1]), (Kind::Log, b"x")]));
        assert!(!exactly(&[(Kind::State, b""), (Kind::Log, &[0; MAX_LOG + 1])]));
        // A reserved kind.
        let mut bytes = write(&[(Kind::State, b""), (Kind::Log, b"x"), (Kind::Quote, b"")]);
        bytes[33] = 10;
        let context = Context::parse(&bytes).unwrap();
        assert!(context.exactly([Kind::State, Kind::Log]).is_err());
    }
}
