//! Reads text files and PEM (RFC 7468) in all usual forms: with a byte-order mark, with CRLF, with text around the
//! blocks. Every `-----BEGIN` gives a block, or an error that names it.

use data_encoding::BASE64;
use zeroize::Zeroizing;

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";

/// The byte-order mark in UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes are not a UTF-8 text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is {}; {}", self.problem(), self.advice())]
pub enum TextError {
    /// UTF-16, with or without a byte-order mark.
    Utf16,
    /// Another encoding, or not text at all.
    NotUtf8,
    /// The text contains a NUL byte: the file was damaged, or is not text.
    Nul,
}

impl TextError {
    /// Describes the content.
    #[must_use]
    pub fn problem(self) -> &'static str {
        match self {
            Self::Utf16 => "text in UTF-16, as Windows programs and the > of PowerShell 5 write it",
            Self::NotUtf8 => "not text in UTF-8",
            Self::Nul => "not text: it has NUL bytes in it",
        }
    }

    /// Says how to fix the file.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Utf16 => "save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE)",
            Self::NotUtf8 => "save it as UTF-8 (iconv -f LATIN1 -t UTF-8 FILE), or give the right file",
            Self::Nul => "the file is damaged, or the wrong one",
        }
    }
}

/// Returns `bytes` as text, without a leading byte-order mark.
///
/// # Errors
/// [`TextError`] names the encoding if it is recognised.
pub fn text(bytes: &[u8]) -> Result<&str, TextError> {
    if is_utf16(bytes) {
        return Err(TextError::Utf16);
    }
    let text = std::str::from_utf8(bytes.strip_prefix(MARK).unwrap_or(bytes)).map_err(|_| TextError::NotUtf8)?;
    if text.contains('\0') { Err(TextError::Nul) } else { Ok(text) }
}

/// Whether these bytes are UTF-16: they start with its byte-order mark, or every other byte at the beginning is zero.
pub(crate) fn is_utf16(bytes: &[u8]) -> bool {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return true;
    }
    let start = bytes.get(..bytes.len().min(64)).unwrap_or_default();
    let every_other = |first: usize| {
        let (zero, other) = (start.iter().skip(first).step_by(2), start.iter().skip(1 - first).step_by(2));
        zero.clone().all(|byte| *byte == 0) && other.clone().all(|byte| (b'\t'..0x7f).contains(byte))
    };
    start.len() >= 2 && start.len().is_multiple_of(2) && (every_other(0) || every_other(1))
}

/// A PEM block cannot be read. The line number is the block's first line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PemError {
    /// A block has no END line.
    #[error("the block {label} of line {line} has no -----END {label}-----; the file is cut off or damaged")]
    NoEnd {
        /// The block's label.
        label: String,
        /// Line of the BEGIN line.
        line: usize,
    },
    /// An END line has no BEGIN line.
    #[error("line {line} ends a block that no -----BEGIN line begins; the file is damaged at its start")]
    NoBegin {
        /// Line of the END line.
        line: usize,
    },
    /// The content of a block is not base64.
    #[error("the block {label} of line {line} is not base64; it was damaged on its way, copy the file again")]
    NotBase64 {
        /// The block's label.
        label: String,
        /// Line of the BEGIN line.
        line: usize,
    },
}

/// A PEM block.
pub struct Block<'a> {
    /// The label, for example `CERTIFICATE`.
    pub label: &'a str,
    /// Line of the BEGIN line; the first line of the text is 1.
    pub line: usize,
    /// Whether the block is encrypted in the format of old OpenSSL versions (`Proc-Type: 4,ENCRYPTED`). Then `bytes` is
    /// not DER.
    pub encrypted: bool,
    /// The decoded content.
    pub bytes: Zeroizing<Vec<u8>>,
}

/// All blocks of a text, in order. Text around the blocks is skipped.
///
/// # Errors
/// [`PemError`] for the first block that cannot be read.
pub fn blocks(text: &str) -> Result<Vec<Block<'_>>, PemError> {
    let line_of = |rest: &str| {
        let before = &text.as_bytes()[..text.len() - rest.len()];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    };
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(BEGIN) {
        let from = &rest[start..];
        if let Some(end) = rest[..start].find(END) {
            return Err(PemError::NoBegin { line: line_of(&rest[end..]) });
        }
        let line = line_of(from);
        let header = from[BEGIN.len()..].split(['\n', '\r']).next().unwrap_or_default();
        let Some((label, _)) = header.split_once(DASHES) else {
            return Err(PemError::NoEnd { label: shown(header), line });
        };
        let no_end = || PemError::NoEnd { label: shown(label), line };
        let body = &from[BEGIN.len() + label.len() + DASHES.len()..];
        let (body, after) = body.split_once(END).ok_or_else(no_end)?;
        // Another block begins before this one ends. Reject the file, or one of the two blocks would be lost.
        if body.contains(BEGIN) {
            return Err(no_end());
        }
        let after = after.strip_prefix(label).and_then(|after| after.strip_prefix(DASHES)).ok_or_else(no_end)?;
        // Reserve enough memory: a growing vector would leave copies of a secret behind.
        let mut characters = Zeroizing::new(Vec::with_capacity(body.len()));
        let mut encrypted = false;
        for line in body.lines() {
            // Base64 has no colon. A colon before the data marks a header (RFC 1421); after the start of the data it
            // means damage.
            if characters.is_empty() && line.contains(':') {
                encrypted |= line.contains("ENCRYPTED");
            } else {
                characters.extend(line.bytes().filter(|byte| !byte.is_ascii_whitespace()));
            }
        }
        let bytes = BASE64.decode(&characters).map_err(|_| PemError::NotBase64 { label: shown(label), line })?;
        blocks.push(Block { label, line, encrypted, bytes: Zeroizing::new(bytes) });
        rest = after;
    }
    match rest.find(END) {
        Some(end) => Err(PemError::NoBegin { line: line_of(&rest[end..]) }),
        None => Ok(blocks),
    }
}

/// A text that does not contain exactly one readable block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NotOneBlock {
    /// There is no block, or it is damaged or encrypted.
    Unreadable,
    Several,
}

/// The only block of a text: its label and its content.
pub(crate) fn only_block(text: &str) -> Result<(&str, Zeroizing<Vec<u8>>), NotOneBlock> {
    let mut blocks = blocks(text).map_err(|_| NotOneBlock::Unreadable)?;
    match &mut blocks[..] {
        [block] if !block.encrypted => Ok((block.label, std::mem::take(&mut block.bytes))),
        [] | [_] => Err(NotOneBlock::Unreadable),
        _ => Err(NotOneBlock::Several),
    }
}

/// Shortens a label and removes unusual characters, for messages.
fn shown(label: &str) -> String {
    label.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(40).collect()
}

/// Encodes a block with lines of 64 characters.
pub(crate) fn encode(label: &str, bytes: &[u8]) -> Zeroizing<String> {
    let body = Zeroizing::new(BASE64.encode(bytes));
    let lines = body.len().div_ceil(64);
    let mut text = Zeroizing::new(String::with_capacity(body.len() + lines + 2 * label.len() + 40));
    text.push_str(BEGIN);
    text.push_str(label);
    text.push_str("-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII: every index is a character boundary.
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(END);
    text.push_str(label);
    text.push_str("-----\n");
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn utf16(text: &str, mark: bool) -> Vec<u8> {
        text.encode_utf16().fold(if mark { vec![0xff, 0xfe] } else { Vec::new() }, |mut bytes, unit| {
            bytes.extend(unit.to_le_bytes());
            bytes
        })
    }

    #[test]
    fn nothing_inside_a_block_is_passed_over() {
        let block = |inside: &str| format!("-----BEGIN X-----\n{inside}\n-----END X-----\n");
        assert_eq!(
            *blocks(&block("Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA")).unwrap()[0].bytes,
            [0; 3]
        );
        for (inside, wrong) in [
            ("AAAA\nnote: a line that is no base64\nAAAA", "NotBase64"),
            ("AAAA\nx:-----BEGIN X-----:\nAAAA", "NoEnd"),
            ("x:-----BEGIN X-----:\nAAAA", "NoEnd"),
            ("AAAA\n-----BEGIN X-----\nAAAA", "NoEnd"),
        ] {
            let error = format!("{:?}", blocks(&block(inside)).err().unwrap());
            assert!(error.starts_with(wrong), "{inside}: {error}");
        }
    }

    #[test]
    fn encodings_of_text_are_told_apart() {
        assert_eq!(text(b"\xef\xbb\xbfa = 1\r\n"), Ok("a = 1\r\n"));
        assert_eq!((text(b""), text("Größe".as_bytes())), (Ok(""), Ok("Größe")));
        for mark in [false, true] {
            assert_eq!(text(&utf16("1234\r\n", mark)), Err(TextError::Utf16));
        }
        let big: Vec<u8> = "[server]".encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert_eq!(text(&big), Err(TextError::Utf16));
        assert_eq!(text(b"Gr\xfc\xdfe"), Err(TextError::NotUtf8));
        assert_eq!(text(b"a\0b"), Err(TextError::Nul));
    }

    #[test]
    fn every_block_is_read() {
        let [one, two] = ["one", "two"].map(|content| encode("CERTIFICATE", content.as_bytes()));
        let found = |text: &str| {
            let blocks = blocks(text).unwrap();
            blocks.iter().map(|block| String::from_utf8(block.bytes.to_vec()).unwrap()).collect::<Vec<_>>()
        };
        let both = ["one", "two"];
        assert_eq!(found(&format!("{}{}", *one, *two)), both);
        assert_eq!(found(&format!("\u{feff}{}\u{feff}{}", *one, *two)), both, "two files with a mark each");
        assert_eq!(found(&format!("{}{}", one.trim_end(), *two)), both, "without a line break between them");
        assert_eq!(found(&format!("# ours\n{}\n  {}", *one, *two).replace('\n', "\r\n")), both);
        assert_eq!(found("no block"), Vec::<String>::new());
        let lines: Vec<_> = blocks(&format!("# ours\n{}{}", *one, *two)).unwrap().iter().map(|b| b.line).collect();
        assert_eq!(lines, [2, 5]);
        let old = one.replace("-----\nb", "-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nb");
        let old = blocks(&old).unwrap();
        assert!(old[0].encrypted && *old[0].bytes == b"one"[..]);
    }

    #[test]
    fn a_block_that_is_not_whole_is_an_error_and_not_skipped() {
        let [one, two] = ["one", "two"].map(|content| encode("CERTIFICATE", content.as_bytes()));
        let error = |text: &str| blocks(text).err().unwrap().to_string();
        let cut = format!("{}{}", *one, two.split_at(40).0);
        assert!(error(&cut).contains("CERTIFICATE of line 4 has no -----END"), "{}", error(&cut));
        assert!(error(&format!("-{}{}", &one[2..], *two)).contains("line 3 ends a block"), "a damaged first line");
        assert!(error(&format!("{}-{}", *one, &two[2..])).contains("line 6 ends a block"));
        assert!(error(&two.replace("dHdv", "d*dv")).contains("of line 1 is not base64"));
        assert!(error(&two.replace("END CERTIFICATE", "END KEY")).contains("has no -----END CERTIFICATE"));
        assert!(error("-----BEGIN \x1b[2J").contains("the block [2J of line 1"), "nothing that moves the cursor");
    }
}
