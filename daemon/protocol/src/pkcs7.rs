//! The certificate list that attestation publishes.

use der::asn1::ObjectIdentifier;

use crate::ber::tlv;

const DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");

/// A PKCS#7 `SignedData` in a `ContentInfo` (RFC 2315) that contains only these DER certificates and no signature. As
/// DER requires for SET OF, the certificates are sorted by their bytes; duplicates are removed.
#[must_use]
pub fn certificates_only(ders: &[&[u8]]) -> Vec<u8> {
    let mut certificates = ders.to_vec();
    certificates.sort_unstable();
    certificates.dedup();

    let version = tlv(0x02, &[&[1]]);
    let nothing = tlv(0x31, &[]);
    let content = tlv(0x30, &[&oid(DATA)]);
    let certificates = tlv(0xa0, &certificates);
    let signed_data = tlv(0x30, &[&version, &nothing, &content, &certificates, &nothing]);
    tlv(0x30, &[&oid(SIGNED_DATA), &tlv(0xa0, &[&signed_data])])
}

fn oid(oid: ObjectIdentifier) -> Vec<u8> {
    tlv(0x06, &[oid.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::certificates_only;

    #[test]
    fn order_and_repetition_of_the_input_do_not_matter() {
        let (a, b) = (&[0x30, 1, 1][..], &[0x30, 1, 2][..]);
        let list = certificates_only(&[a, b]);
        assert_eq!(certificates_only(&[b, a, b]), list);
        assert!(list.windows(6).any(|window| window == [a, b].concat()));
        assert_ne!(certificates_only(&[a]), list);
    }
}
