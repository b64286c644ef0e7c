//! A fast reader for documents in their usual form: fixed text with values in between. If the fixed text matches byte
//! for byte, no XML parser is needed: a value without `<`, `>`, `&` and quotes stands for itself.

use memchr::memchr;

use crate::encoding::strict_base64;

/// The unread rest of a document.
pub(crate) struct Rest<'d> {
    document: &'d [u8],
    at: usize,
}

impl<'d> Rest<'d> {
    pub(crate) fn new(document: &'d [u8]) -> Self {
        Self { document, at: 0 }
    }

    /// Number of bytes that were read.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn literal(&mut self, expected: &str) -> Option<()> {
        let there = self.document.get(self.at..self.at + expected.len())?;
        (there == expected.as_bytes()).then(|| self.at += expected.len())
    }

    /// Returns the text before the next `mark`.
    pub(crate) fn until(&mut self, mark: u8) -> Option<&'d [u8]> {
        let rest = self.document.get(self.at..)?;
        let value = &rest[..memchr(mark, rest)?];
        self.at += value.len();
        Some(value)
    }

    pub(crate) fn text_until(&mut self, mark: u8) -> Option<&'d str> {
        std::str::from_utf8(self.until(mark)?).ok()
    }

    pub(crate) fn end(&self) -> Option<()> {
        (self.at == self.document.len()).then_some(())
    }
}

/// Decodes a non-empty base64 value without white space.
pub(crate) fn plain_base64(text: &[u8]) -> Option<Vec<u8>> {
    strict_base64(text).filter(|bytes| !bytes.is_empty())
}
