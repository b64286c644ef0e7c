//! PKCS#12: a private key and its certificate in one file under a password, as Windows and OpenSSL write them.

use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::RsaPrivateKey;
use p12_keystore::Pkcs12Archive;

use super::Failure;

/// Opens a file under `password`: its one private key, and the certificate of that key. Other certificates, those that
/// lead to a root, are left out.
///
/// # Errors
/// It is not such a file, the password is another, or it does not hold one private key with its certificate.
pub fn open(file: &[u8], password: &str) -> Result<(RsaPrivateKey, Certificate), Failure> {
    let archive = Pkcs12Archive::from_pkcs12(file, password)
        .map_err(|error| format!("cannot be opened ({error}); is it a PFX, and the password right?"))?;
    let [bag] = archive.keys.as_slice() else {
        return Err(format!("holds {} private keys; one is needed", archive.keys.len()).into());
    };
    let key = RsaPrivateKey::from_pkcs8_der(bag.key.as_der()).map_err(|e| format!("its private key: {e}"))?;
    let certificates = archive.certs.iter().filter_map(|bag| Certificate::parse(bag.cert.as_der()).ok());
    let own = certificates.into_iter().find(|certificate| certificate.key().spki_der() == key.public().spki_der());
    Ok((key, own.ok_or("holds no certificate of its private key")?))
}
