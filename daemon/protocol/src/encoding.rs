//! Bytes as text.

use data_encoding::BASE64;
use memchr::memchr;

/// Decodes canonical base64 of exactly one value. The library alone would also accept several padded values in a row.
pub(crate) fn strict_base64(text: &[u8]) -> Option<Vec<u8>> {
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
    let data = &text[..text.len() - padding];
    if memchr(b'=', data).is_some() { None } else { BASE64.decode(text).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_canonical_value_is_base64() {
        assert_eq!(strict_base64(b"QUI="), Some(b"AB".to_vec()));
        assert_eq!(strict_base64(b""), Some(Vec::new()));
        for bad in ["QQ==QQ==", "QUJ=", "QQ", "QQ=", "QQ===", "====", "Q Q=", "-_=="] {
            assert_eq!(strict_base64(bad.as_bytes()), None, "{bad}");
        }
    }
}
