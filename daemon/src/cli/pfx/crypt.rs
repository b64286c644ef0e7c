//! Cryptography of PKCS#12 with a password: MACs (RFC 7292, RFC 9579) and decryption (PKCS#12's own schemes, and PBES2
//! of RFC 8018).
//!
//! Programs encode a password into bytes in different ways. All known encodings are tried; the MAC, or the structure of
//! the decrypted data, shows which one is right.

use std::cell::Cell;
use std::num::NonZeroU32;

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, Algorithm, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use cbc::Decryptor;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockCipher, BlockDecryptMut, InnerIvInit, KeyInit};
use claviger_protocol::ber::{BerError, Element, tag};
use des::{TdesEde2, TdesEde3};
use rc2::Rc2;
use ring::{digest, hmac, pbkdf2};
use zeroize::Zeroizing;

use super::error::{PfxError, damaged};

/// Limit of hash iterations for a whole file, which is some seconds. Windows and OpenSSL use 2,000 to 4,000, Java
/// 20,000; careful settings use 600,000.
const MAX_ROUNDS: u64 = 5_000_000;
/// Longest key of a PBMAC1: twice the longest digest.
const MAX_MAC_KEY: usize = 128;

const MAC: &str = "its MAC";

/// The purpose of a key derived by RFC 7292, B.2.
#[derive(Clone, Copy)]
enum Purpose {
    Key = 1,
    Iv = 2,
    Mac = 3,
}

/// A password, and the remaining budget of hash iterations for the file.
pub(super) struct Opener<'a> {
    password: &'a str,
    rounds_left: Cell<u64>,
    /// Whether a MAC has proved that the password is right.
    has_mac: bool,
}

/// An object identifier in dotted form.
pub(super) fn dotted(element: Element<'_>) -> Result<String, BerError> {
    let content = element.expect(tag::OBJECT_IDENTIFIER)?.content;
    let mut numbers = Vec::new();
    let mut value = 0_u64;
    for byte in content {
        if value >> 56 != 0 {
            return Err(BerError::Structure);
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            numbers.push(value);
            value = 0;
        }
    }
    let Some((first, rest)) = numbers.split_first() else { return Err(BerError::Structure) };
    if content.last().is_some_and(|byte| byte & 0x80 != 0) || numbers.len() > 32 {
        return Err(BerError::Structure);
    }
    let top = (first / 40).min(2);
    let tail: String = rest.iter().map(|number| format!(".{number}")).collect();
    Ok(format!("{top}.{}{tail}", first - 40 * top))
}

/// An `AlgorithmIdentifier`.
fn algorithm(element: Element<'_>) -> Result<(String, Option<Element<'_>>), BerError> {
    match element.expect(tag::SEQUENCE)?.children()?[..] {
        [oid] => Ok((dotted(oid)?, None)),
        [oid, parameters] => Ok((dotted(oid)?, Some(parameters))),
        _ => Err(BerError::Structure),
    }
}

/// The name of a known but unsupported algorithm, for messages.
fn unsupported(part: &'static str, what: &str, oid: &str) -> PfxError {
    let name = match oid {
        "1.2.840.113549.1.12.1.1" => "RC4 with 128 bits",
        "1.2.840.113549.1.12.1.2" => "RC4 with 40 bits",
        "1.2.840.113549.1.5.1" | "1.2.840.113549.1.5.3" | "1.2.840.113549.1.5.10" => "DES",
        "1.2.840.113549.1.5.4" | "1.2.840.113549.1.5.6" | "1.2.840.113549.1.5.11" | "1.2.840.113549.3.2" => {
            "RC2 under PKCS#5"
        }
        "1.3.6.1.4.1.11591.4.11" => "scrypt",
        "1.2.840.113549.2.5" => "MD5",
        "2.16.840.1.101.3.4.2.4" | "1.2.840.113549.2.8" => "SHA-224",
        "2.16.840.1.101.3.4.2.5" | "1.2.840.113549.2.12" => "SHA-512/224",
        "2.16.840.1.101.3.4.2.6" | "1.2.840.113549.2.13" => "SHA-512/256",
        oid if oid.starts_with("2.16.840.1.101.3.4.2.") => "SHA-3",
        oid if oid.starts_with("2.16.840.1.101.3.4.1.") => "AES in another mode than CBC",
        oid if oid.starts_with("1.2.392.200011.61.1.1.1.") => "Camellia",
        oid if oid.starts_with("1.2.643.") => "GOST",
        oid if oid.starts_with("1.2.156.10197.") => "a Chinese standard (SM)",
        _ => what,
    };
    PfxError::Unsupported { part, name: format!("{name} ({oid})") }
}

impl<'a> Opener<'a> {
    pub(super) fn new(password: &'a str, has_mac: bool) -> Self {
        Self { password, rounds_left: Cell::new(MAX_ROUNDS), has_mac }
    }

    /// Subtracts `rounds` iterations, `times` times, from the budget.
    fn work(&self, rounds: u64, times: u64) -> Result<NonZeroU32, PfxError> {
        let left = self.rounds_left.get().checked_sub(rounds.saturating_mul(times));
        self.rounds_left.set(left.ok_or(PfxError::TooMuchWork(rounds))?);
        u32::try_from(rounds).ok().and_then(NonZeroU32::new).ok_or(PfxError::TooMuchWork(rounds))
    }

    /// The byte encodings of the password for PKCS#12's own derivation: UTF-16 with a final NUL; by OpenSSL before 1.1,
    /// each byte of the UTF-8 as one character; and no bytes for an empty password.
    fn wide(&self) -> Vec<Zeroizing<Vec<u8>>> {
        let widen = |units: &mut dyn Iterator<Item = u16>| {
            let mut bytes = Zeroizing::new(Vec::with_capacity(2 * self.password.len() + 2));
            units.chain([0]).for_each(|unit| bytes.extend_from_slice(&unit.to_be_bytes()));
            bytes
        };
        let mut forms = vec![widen(&mut self.password.encode_utf16())];
        if !self.password.is_ascii() {
            forms.push(widen(&mut self.password.bytes().map(u16::from)));
        }
        if self.password.is_empty() {
            forms.push(Zeroizing::default());
        }
        forms
    }

    /// The byte encodings for PBKDF2: UTF-8; and by NSS before 3.90, the encoding of PKCS#12's own derivation.
    fn narrow(&self) -> Vec<Zeroizing<Vec<u8>>> {
        let mut forms = vec![Zeroizing::new(self.password.as_bytes().to_vec())];
        forms.extend(self.wide());
        forms.retain(|form| !form.is_empty() || self.password.is_empty());
        forms
    }

    /// Verifies the MAC over `content`.
    ///
    /// # Errors
    /// [`PfxError::Password`] if the MAC does not match.
    pub(super) fn check_mac(&self, mac: Element<'_>, content: &[u8]) -> Result<(), PfxError> {
        let read = || {
            let parts = mac.expect(tag::SEQUENCE)?.children()?;
            let (info, salt, rounds) = match parts[..] {
                [info, salt] => (info, salt, 1),
                [info, salt, rounds] => (info, salt, rounds.number()?),
                _ => return Err(BerError::Structure),
            };
            let [algorithm_of, value] = info.expect(tag::SEQUENCE)?.children()?[..] else {
                return Err(BerError::Structure);
            };
            Ok((algorithm(algorithm_of)?, value.octet_string()?, salt.octet_string()?, rounds))
        };
        let ((oid, parameters), value, salt, rounds) = read().map_err(damaged(MAC))?;
        let right = if oid == "1.2.840.113549.1.5.14" {
            self.check_pbmac1(parameters, content, &value)?
        } else {
            let (digest, hmac) = digest_of(&oid).ok_or_else(|| unsupported(MAC, "a digest", &oid))?;
            let mut right = false;
            for password in self.wide() {
                let key = self.derive(digest, &password, &salt, rounds, Purpose::Mac, digest.output_len())?;
                right |= hmac::verify(&hmac::Key::new(hmac, &key), content, &value).is_ok();
            }
            right
        };
        if right { Ok(()) } else { Err(PfxError::Password) }
    }

    /// PBMAC1 (RFC 9579): the key of an HMAC comes from PBKDF2.
    fn check_pbmac1(&self, parameters: Option<Element<'_>>, content: &[u8], value: &[u8]) -> Result<bool, PfxError> {
        let read = || {
            let parameters = parameters.ok_or(BerError::Structure)?.expect(tag::SEQUENCE)?.children()?;
            let [kdf, mac] = parameters[..] else { return Err(BerError::Structure) };
            Ok((algorithm(kdf)?, algorithm(mac)?.0))
        };
        let (kdf, mac) = read().map_err(damaged(MAC))?;
        let kdf = Kdf::read(MAC, kdf)?;
        let (hmac, _) = hmac_of(&mac).ok_or_else(|| unsupported(MAC, "a MAC", &mac))?;
        // RFC 9579 requires an explicit key length.
        let length = kdf.key_length.ok_or(PfxError::Damaged { part: MAC, source: BerError::Structure })?;
        if !(1..=MAX_MAC_KEY).contains(&length) {
            return Err(PfxError::Damaged { part: MAC, source: BerError::Structure });
        }
        let mut right = false;
        for password in self.narrow() {
            let key = self.pbkdf2(&kdf, &password, length)?;
            right |= hmac::verify(&hmac::Key::new(hmac, &key), content, value).is_ok();
        }
        Ok(right)
    }

    /// Decrypts data that must be a SEQUENCE after decryption.
    ///
    /// # Errors
    /// The scheme is not supported, or the password does not decrypt the data.
    pub(super) fn decrypt(
        &self,
        part: &'static str,
        scheme: Element<'_>,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, PfxError> {
        let (oid, parameters) = algorithm(scheme).map_err(damaged(part))?;
        let parameters = parameters.ok_or(PfxError::Damaged { part, source: BerError::Structure })?;
        let opened = match oid.as_str() {
            "1.2.840.113549.1.5.13" => self.pbes2(part, parameters, sealed)?,
            _ => self.pbes1(part, &oid, parameters, sealed)?,
        };
        opened.ok_or(if self.has_mac { PfxError::OtherPassword { part } } else { PfxError::Unauthenticated { part } })
    }

    /// Decrypts with PKCS#12's own schemes.
    fn pbes1(
        &self,
        part: &'static str,
        oid: &str,
        parameters: Element<'_>,
        sealed: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, PfxError> {
        let (cipher, key_length) = match oid {
            "1.2.840.113549.1.12.1.3" => (Cipher::Des3, 24),
            "1.2.840.113549.1.12.1.4" => (Cipher::Des2, 16),
            "1.2.840.113549.1.12.1.5" => (Cipher::Rc2(128), 16),
            "1.2.840.113549.1.12.1.6" => (Cipher::Rc2(40), 5),
            _ => return Err(unsupported(part, "an algorithm", oid)),
        };
        let read = || {
            let [salt, rounds] = parameters.expect(tag::SEQUENCE)?.children()?[..] else {
                return Err(BerError::Structure);
            };
            Ok((salt.octet_string()?, rounds.number()?))
        };
        let (salt, rounds) = read().map_err(damaged(part))?;
        let sha1 = &digest::SHA1_FOR_LEGACY_USE_ONLY;
        for password in self.wide() {
            let key = self.derive(sha1, &password, &salt, rounds, Purpose::Key, key_length)?;
            let iv = self.derive(sha1, &password, &salt, rounds, Purpose::Iv, 8)?;
            if let Some(opened) = cipher.decrypt(&key, &iv, sealed).filter(|opened| is_sequence(opened)) {
                return Ok(Some(opened));
            }
        }
        Ok(None)
    }

    fn pbes2(
        &self,
        part: &'static str,
        parameters: Element<'_>,
        sealed: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, PfxError> {
        let read = || {
            let [kdf, cipher] = parameters.expect(tag::SEQUENCE)?.children()?[..] else {
                return Err(BerError::Structure);
            };
            Ok((algorithm(kdf)?, algorithm(cipher)?))
        };
        let (kdf, (oid, parameters)) = read().map_err(damaged(part))?;
        let kdf = Kdf::read(part, kdf)?;
        let (cipher, key_length) = match oid.as_str() {
            "2.16.840.1.101.3.4.1.2" => (Cipher::Aes(&AES_128), 16),
            "2.16.840.1.101.3.4.1.22" => (Cipher::Aes(&AES_192), 24),
            "2.16.840.1.101.3.4.1.42" => (Cipher::Aes(&AES_256), 32),
            "1.2.840.113549.3.7" => (Cipher::Des3, 24),
            _ => return Err(unsupported(part, "an algorithm", &oid)),
        };
        let iv = parameters.ok_or(BerError::Structure).and_then(|iv| iv.octet_string()).map_err(damaged(part))?;
        for password in self.narrow() {
            let key = self.pbkdf2(&kdf, &password, key_length)?;
            if let Some(opened) = cipher.decrypt(&key, &iv, sealed).filter(|opened| is_sequence(opened)) {
                return Ok(Some(opened));
            }
        }
        Ok(None)
    }

    fn pbkdf2(&self, kdf: &Kdf, password: &[u8], length: usize) -> Result<Zeroizing<Vec<u8>>, PfxError> {
        let rounds = self.work(kdf.rounds, length.div_ceil(kdf.digest_length) as u64)?;
        let mut key = Zeroizing::new(vec![0; length]);
        pbkdf2::derive(kdf.prf, rounds, &kdf.salt, password, &mut key);
        Ok(key)
    }

    /// The derivation of RFC 7292, B.2.
    fn derive(
        &self,
        digest: &'static digest::Algorithm,
        password: &[u8],
        salt: &[u8],
        rounds: u64,
        purpose: Purpose,
        length: usize,
    ) -> Result<Zeroizing<Vec<u8>>, PfxError> {
        let block = digest.block_len();
        let filled = |bytes: &[u8]| {
            let length = bytes.len().div_ceil(block) * block;
            Zeroizing::new(bytes.iter().copied().cycle().take(length).collect::<Vec<u8>>())
        };
        let mut input = Zeroizing::new([&filled(salt)[..], &filled(password)].concat());
        let mut key = Zeroizing::new(Vec::with_capacity(length + digest.output_len()));
        while key.len() < length {
            let rounds = self.work(rounds, 1)?;
            let mut context = digest::Context::new(digest);
            context.update(&vec![purpose as u8; block]);
            context.update(&input);
            let mut hash = context.finish();
            for _ in 1..rounds.get() {
                hash = digest::digest(digest, hash.as_ref());
            }
            key.extend_from_slice(hash.as_ref());
            // Each block of the input becomes block + hash (repeated) + 1.
            for part in input.chunks_mut(block) {
                let mut carry = 1;
                for (at, byte) in part.iter_mut().enumerate().rev() {
                    carry += u16::from(*byte) + u16::from(hash.as_ref()[at % digest.output_len()]);
                    *byte = carry as u8;
                    carry >>= 8;
                }
            }
        }
        key.truncate(length);
        Ok(key)
    }
}

/// The parameters of PBKDF2.
struct Kdf {
    prf: pbkdf2::Algorithm,
    digest_length: usize,
    salt: Zeroizing<Vec<u8>>,
    rounds: u64,
    key_length: Option<usize>,
}

impl Kdf {
    fn read(part: &'static str, (oid, parameters): (String, Option<Element<'_>>)) -> Result<Self, PfxError> {
        if oid != "1.2.840.113549.1.5.12" {
            return Err(unsupported(part, "a key derivation", &oid));
        }
        let read = || {
            let parameters = parameters.ok_or(BerError::Structure)?.expect(tag::SEQUENCE)?.children()?;
            let [salt, rounds, rest @ ..] = &parameters[..] else { return Err(BerError::Structure) };
            let (key_length, rest) = match rest {
                [length, rest @ ..] if length.tag == tag::INTEGER => (Some(length.number()?), rest),
                rest => (None, rest),
            };
            let prf = match rest {
                [] => "1.2.840.113549.2.7".to_owned(),
                [prf] => algorithm(*prf)?.0,
                _ => return Err(BerError::Structure),
            };
            let key_length = key_length.map(usize::try_from).transpose().map_err(|_| BerError::Structure)?;
            // The standard allows other sources of the salt, but none is defined.
            if !salt.is_octet_string() {
                return Err(BerError::Structure);
            }
            Ok((salt.octet_string()?, rounds.number()?, key_length, prf))
        };
        let (salt, rounds, key_length, oid) = read().map_err(damaged(part))?;
        let (hmac, prf) = hmac_of(&oid).ok_or_else(|| unsupported(part, "a pseudorandom function", &oid))?;
        Ok(Self { prf, digest_length: hmac.digest_algorithm().output_len(), salt, rounds, key_length })
    }
}

fn digest_of(oid: &str) -> Option<(&'static digest::Algorithm, hmac::Algorithm)> {
    Some(match oid {
        "1.3.14.3.2.26" => (&digest::SHA1_FOR_LEGACY_USE_ONLY, hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY),
        "2.16.840.1.101.3.4.2.1" => (&digest::SHA256, hmac::HMAC_SHA256),
        "2.16.840.1.101.3.4.2.2" => (&digest::SHA384, hmac::HMAC_SHA384),
        "2.16.840.1.101.3.4.2.3" => (&digest::SHA512, hmac::HMAC_SHA512),
        _ => return None,
    })
}

fn hmac_of(oid: &str) -> Option<(hmac::Algorithm, pbkdf2::Algorithm)> {
    Some(match oid {
        "1.2.840.113549.2.7" => (hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, pbkdf2::PBKDF2_HMAC_SHA1),
        "1.2.840.113549.2.9" => (hmac::HMAC_SHA256, pbkdf2::PBKDF2_HMAC_SHA256),
        "1.2.840.113549.2.10" => (hmac::HMAC_SHA384, pbkdf2::PBKDF2_HMAC_SHA384),
        "1.2.840.113549.2.11" => (hmac::HMAC_SHA512, pbkdf2::PBKDF2_HMAC_SHA512),
        _ => return None,
    })
}

/// Block ciphers in CBC mode with the padding of PKCS#7.
#[derive(Clone, Copy)]
enum Cipher {
    Aes(&'static Algorithm),
    Des3,
    Des2,
    /// With this number of effective key bits.
    Rc2(usize),
}

impl Cipher {
    /// `None` if the lengths do not fit or the padding is invalid, usually because the key is wrong.
    fn decrypt(self, key: &[u8], iv: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        match self {
            Self::Aes(algorithm) => {
                let key = PaddedBlockDecryptingKey::cbc_pkcs7(UnboundCipherKey::new(algorithm, key).ok()?).ok()?;
                let iv = DecryptionContext::Iv128(FixedLength::from(<&[u8; 16]>::try_from(iv).ok()?));
                let mut buffer = Zeroizing::new(sealed.to_vec());
                let length = key.decrypt(&mut buffer, iv).ok()?.len();
                buffer.truncate(length);
                Some(buffer)
            }
            Self::Des3 => cbc(TdesEde3::new_from_slice(key).ok()?, iv, sealed),
            Self::Des2 => cbc(TdesEde2::new_from_slice(key).ok()?, iv, sealed),
            Self::Rc2(bits) => cbc(Rc2::new_with_eff_key_len(key, bits), iv, sealed),
        }
    }
}

fn cbc<C: BlockCipher + BlockDecryptMut>(cipher: C, iv: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let decryptor = Decryptor::inner_iv_slice_init(cipher, iv).ok()?;
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let length = decryptor.decrypt_padded_mut::<Pkcs7>(&mut buffer).ok()?.len();
    buffer.truncate(length);
    Some(buffer)
}

fn is_sequence(opened: &[u8]) -> bool {
    Element::parse(opened).is_ok_and(|element| element.tag == tag::SEQUENCE)
}
