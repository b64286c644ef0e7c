//! Octets as text.

use data_encoding::BASE64;

/// Canonical base64 of one value. (The library would also take several padded values in a row.)
pub(crate) fn strict_base64(text: &str) -> Option<Vec<u8>> {
    let data = text.trim_end_matches('=');
    if data.contains('=') { None } else { BASE64.decode(text.as_bytes()).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_canonical_value_is_base64() {
        assert_eq!(strict_base64("QUI="), Some(b"AB".to_vec()));
        assert_eq!(strict_base64(""), Some(Vec::new()));
        for bad in ["QQ==QQ==", "QUJ=", "QQ", "QQ=", "QQ===", "====", "Q Q=", "-_=="] {
            assert_eq!(strict_base64(bad), None, "{bad}");
        }
    }
}
