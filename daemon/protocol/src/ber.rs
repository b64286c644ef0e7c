//! A bounded reader for BER. Unlike DER, BER allows indefinite lengths and strings in pieces; NSS, Java libraries and
//! older Windows programs write it.
//!
//! Only files from administrators (PKCS#7 and PKCS#12) are read as BER. Data from the network is DER and has stricter
//! parsers.

use zeroize::Zeroizing;

/// Deepest nesting of elements. Usual PKCS#12 files have about twelve levels.
const MAX_DEPTH: u8 = 32;

/// The bit of an identifier byte that marks content made of elements.
const CONSTRUCTED: u8 = 0x20;

/// The identifier bytes that readers in this workspace use.
pub mod tag {
    /// INTEGER.
    pub const INTEGER: u8 = 0x02;
    /// BIT STRING.
    pub(crate) const BIT_STRING: u8 = 0x03;
    /// OCTET STRING in one piece.
    pub const OCTET_STRING: u8 = 0x04;
    /// NULL.
    pub const NULL: u8 = 0x05;
    /// OBJECT IDENTIFIER.
    pub const OBJECT_IDENTIFIER: u8 = 0x06;
    /// SEQUENCE, SEQUENCE OF.
    pub const SEQUENCE: u8 = 0x30;
    /// SET, SET OF.
    pub const SET: u8 = 0x31;
    /// `[0]` around other elements (explicit tag).
    pub const CONTEXT_0: u8 = 0xa0;
    /// `[0]` in place of a primitive type's own tag (implicit tag).
    pub const CONTEXT_0_PRIMITIVE: u8 = 0x80;
}

/// The bytes are not BER, or are nested too deeply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BerError {
    /// An element is longer than the input.
    #[error("it is cut off")]
    CutOff,
    /// Bytes follow the element.
    #[error("there are bytes after its end")]
    Trailing,
    /// The nesting is deeper than 32 levels.
    #[error("it is nested deeper than any honest file")]
    TooDeep,
    /// The element is not the expected one, or is not valid BER.
    #[error("its structure is damaged")]
    Structure,
}

/// A parsed BER element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Element<'a> {
    /// The identifier byte: class, the constructed bit, and number.
    pub tag: u8,
    /// The content, without the two bytes that end an indefinite length.
    pub content: &'a [u8],
    /// The whole element, unchanged.
    pub raw: &'a [u8],
}

impl<'a> Element<'a> {
    /// Parses `bytes` as exactly one element.
    ///
    /// # Errors
    /// [`BerError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BerError> {
        let (element, rest) = next(bytes, MAX_DEPTH)?;
        if rest.is_empty() { Ok(element) } else { Err(BerError::Trailing) }
    }

    /// Returns the element if it has this identifier byte.
    ///
    /// # Errors
    /// [`BerError::Structure`].
    pub fn expect(self, tag: u8) -> Result<Self, BerError> {
        if self.tag == tag { Ok(self) } else { Err(BerError::Structure) }
    }

    /// Parses the elements in the content.
    ///
    /// # Errors
    /// [`BerError`]; [`BerError::Structure`] if the content is not made of elements.
    pub fn children(&self) -> Result<Vec<Element<'a>>, BerError> {
        if self.tag & CONSTRUCTED == 0 {
            return Err(BerError::Structure);
        }
        let mut children = Vec::new();
        let mut rest = self.content;
        while !rest.is_empty() {
            let (child, after) = next(rest, MAX_DEPTH)?;
            children.push(child);
            rest = after;
        }
        Ok(children)
    }

    /// Parses the content as exactly one element.
    ///
    /// # Errors
    /// [`BerError`]; [`BerError::Structure`] if the content has no elements or several.
    pub fn only_child(&self) -> Result<Element<'a>, BerError> {
        match self.children()?[..] {
            [child] => Ok(child),
            _ => Err(BerError::Structure),
        }
    }

    /// Whether the tag is OCTET STRING, in one piece or in several.
    #[must_use]
    pub fn is_octet_string(&self) -> bool {
        self.tag & !CONSTRUCTED == tag::OCTET_STRING
    }

    /// The bytes of an OCTET STRING, with the pieces joined. The tag is not checked, because an implicit tag may
    /// replace it.
    ///
    /// # Errors
    /// [`BerError`].
    pub fn octet_string(&self) -> Result<Zeroizing<Vec<u8>>, BerError> {
        // The pieces cannot be longer than the whole. The vector never grows, so no copies of a secret are left behind.
        let mut whole = Zeroizing::new(Vec::with_capacity(self.content.len()));
        self.collect(&mut whole, MAX_DEPTH)?;
        Ok(whole)
    }

    fn collect(&self, whole: &mut Vec<u8>, depth: u8) -> Result<(), BerError> {
        if self.tag & CONSTRUCTED == 0 {
            whole.extend_from_slice(self.content);
            return Ok(());
        }
        let depth = depth.checked_sub(1).ok_or(BerError::TooDeep)?;
        for piece in self.children()? {
            if !piece.is_octet_string() {
                return Err(BerError::Structure);
            }
            piece.collect(whole, depth)?;
        }
        Ok(())
    }

    /// The value of a non-negative INTEGER of at most 64 bits.
    ///
    /// # Errors
    /// [`BerError::Structure`].
    pub fn number(&self) -> Result<u64, BerError> {
        let content = self.expect(tag::INTEGER)?.content;
        if content.is_empty() || content.len() > 9 || content[0] & 0x80 != 0 || (content.len() == 9 && content[0] != 0)
        {
            return Err(BerError::Structure);
        }
        Ok(content.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Converts the element to DER: definite lengths, OCTET STRINGs in one piece.
    ///
    /// # Errors
    /// [`BerError`].
    pub fn to_der(&self) -> Result<Zeroizing<Vec<u8>>, BerError> {
        self.der(MAX_DEPTH)
    }

    fn der(&self, depth: u8) -> Result<Zeroizing<Vec<u8>>, BerError> {
        let depth = depth.checked_sub(1).ok_or(BerError::TooDeep)?;
        let (tag, content) = if self.tag == tag::OCTET_STRING | CONSTRUCTED {
            (tag::OCTET_STRING, self.octet_string()?)
        } else if self.tag & CONSTRUCTED != 0 {
            let children = self.children()?.iter().map(|child| child.der(depth)).collect::<Result<Vec<_>, _>>()?;
            let mut content = Zeroizing::new(Vec::with_capacity(children.iter().map(|child| child.len()).sum()));
            children.iter().for_each(|child| content.extend_from_slice(child));
            (self.tag, content)
        } else {
            (self.tag, Zeroizing::new(self.content.to_vec()))
        };
        Ok(Zeroizing::new(tlv(tag, &[&content])))
    }
}

/// Splits the first element from the rest.
fn next(bytes: &[u8], depth: u8) -> Result<(Element<'_>, &[u8]), BerError> {
    let depth = depth.checked_sub(1).ok_or(BerError::TooDeep)?;
    let [tag, length, after @ ..] = bytes else { return Err(BerError::CutOff) };
    // Tag numbers of 31 and more do not occur in these formats. Tag 0 ends an indefinite length.
    if tag & 0x1f == 0x1f || *tag == 0 {
        return Err(BerError::Structure);
    }
    if *length == 0x80 {
        if tag & CONSTRUCTED == 0 {
            return Err(BerError::Structure);
        }
        let mut at = after;
        while !at.starts_with(&[0, 0]) {
            (_, at) = next(at, depth)?;
        }
        let content = &after[..after.len() - at.len()];
        let rest = &at[2..];
        return Ok((Element { tag: *tag, content, raw: &bytes[..bytes.len() - rest.len()] }, rest));
    }
    let (length, after) = match usize::from(*length) {
        short @ ..0x80 => (short, after),
        long => {
            let count = long & 0x7f;
            let bytes = after.get(..count).ok_or(BerError::CutOff)?;
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            if count - zeros > size_of::<u32>() {
                return Err(BerError::CutOff);
            }
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), &after[count..])
        }
    };
    let content = after.get(..length).ok_or(BerError::CutOff)?;
    let rest = &after[length..];
    Ok((Element { tag: *tag, content, raw: &bytes[..bytes.len() - rest.len()] }, rest))
}

/// Encodes a DER element with a definite length. The content is given in pieces. Unlike a general encoder, this
/// function cannot fail.
pub(crate) fn tlv(tag: u8, content: &[&[u8]]) -> Vec<u8> {
    let length: usize = content.iter().map(|piece| piece.len()).sum();
    let mut out = Vec::with_capacity(length + 10);
    out.push(tag);
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let octets = length.to_be_bytes();
        let zeros = octets.iter().take_while(|octet| **octet == 0).count();
        out.push(0x80 | (octets.len() - zeros) as u8);
        out.extend_from_slice(&octets[zeros..]);
    }
    for piece in content {
        out.extend_from_slice(piece);
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An element with an indefinite length.
    fn open(tag: u8, content: &[&[u8]]) -> Vec<u8> {
        [&[tag, 0x80], &content.concat()[..], &[0, 0]].concat()
    }

    #[test]
    fn open_lengths_and_strings_in_pieces_become_der() {
        let pieces = open(0x24, &[&[4, 2, 1, 2], &open(0x24, &[&[4, 1, 3]]), &[4, 0], &[4, 0x81, 1, 4]]);
        let ber = open(0x30, &[&[2, 0x83, 0, 0, 1, 7], &pieces, &open(0xa0, &[&[5, 0]])]);
        let element = Element::parse(&ber).unwrap();
        assert_eq!(element.raw, ber);
        assert_eq!(*element.to_der().unwrap(), [0x30, 13, 2, 1, 7, 4, 4, 1, 2, 3, 4, 0xa0, 2, 5, 0]);
        let children = element.children().unwrap();
        assert_eq!(*children[1].octet_string().unwrap(), [1, 2, 3, 4]);
        assert_eq!((children[0].number(), children[2].only_child().unwrap().tag), (Ok(7), tag::NULL));
        // DER is not changed.
        let der = element.to_der().unwrap();
        assert_eq!(Element::parse(&der).unwrap().to_der().unwrap(), der);
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let ber = open(0x30, &[&open(0x24, &[&[4, 2, 1, 2]]), &[2, 1, 7]]);
        for length in 0..ber.len() {
            assert_eq!(Element::parse(&ber[..length]), Err(BerError::CutOff), "{length}");
        }
        assert_eq!(Element::parse(&[&ber[..], &[0]].concat()), Err(BerError::Trailing));
        // Errors: a length beyond the input, an indefinite length of a primitive, a large tag number.
        assert_eq!(Element::parse(&[0x30, 0x89, 1, 0, 0, 0, 0, 0, 0, 0, 0]), Err(BerError::CutOff));
        assert_eq!(Element::parse(&[4, 0x80, 0, 0]), Err(BerError::Structure));
        assert_eq!(Element::parse(&[0x3f, 1, 0]), Err(BerError::Structure));
        let deep = (0..40).fold(vec![5, 0], |inner, _| open(0x30, &[&inner]));
        assert_eq!(Element::parse(&deep), Err(BerError::TooDeep));
        let deep = (0..40).fold(vec![5, 0], |inner, _| [&[0x30, 0x82, 0, inner.len() as u8], &inner[..]].concat());
        assert_eq!(Element::parse(&deep).unwrap().to_der(), Err(BerError::TooDeep));
        let text = open(0x24, &[&[12, 1, b'a']]);
        assert_eq!(Element::parse(&text).unwrap().octet_string(), Err(BerError::Structure));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(element) = Element::parse(&bytes) {
                let _ = (element.to_der(), element.octet_string(), element.number());
            }
        }
    }

    #[test]
    fn lengths_are_minimal() {
        let length = |octets: usize| {
            let element = tlv(4, &[&vec![0; octets]]);
            element[1..element.len() - octets].to_vec()
        };
        assert_eq!(length(0), [0]);
        assert_eq!(length(127), [127]);
        assert_eq!(length(128), [0x81, 128]);
        assert_eq!(length(256), [0x82, 1, 0]);
        assert_eq!(length(65536), [0x83, 1, 0, 0]);
    }
}
