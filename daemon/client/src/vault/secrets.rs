//! The secrets of a vault, by name.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

/// Most secrets in a vault.
pub(crate) const MAX_SECRETS: usize = 64;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 64;
/// Longest value, in bytes. It fits into the smallest pipe of Linux, so writing it to a pipe never blocks.
pub const MAX_VALUE: usize = 4096;
/// Longest encoding of a vault's secrets, in bytes.
pub(crate) const MAX_ENCODED: usize = 2 + MAX_SECRETS * (1 + MAX_NAME + 2 + MAX_VALUE);

/// Why a secret cannot be added or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The name is not valid.
    #[error(
        "{0:?} is no name of a secret: 1 to {MAX_NAME} of a-z, 0-9, '.', '_' and '-', and the first one a letter or a digit"
    )]
    Name(String),
    /// The value is empty or too long.
    #[error("the secret {name} has {length} bytes; 1 to {MAX_VALUE} are possible")]
    Length {
        /// The secret's name.
        name: String,
        /// Length of the value in bytes.
        length: usize,
    },
    /// A secret with this name exists.
    #[error("the vault has a secret {0} already; choose another name, or use --replace")]
    Exists(String),
    /// The vault has the maximum number of secrets.
    #[error("the vault is full: it has {MAX_SECRETS} secrets")]
    Full,
    /// There is no secret with this name.
    #[error("the vault has no secret {name}; it has: {}", .known.join(", "))]
    Missing {
        /// The requested name.
        name: String,
        /// The existing names.
        known: Vec<String>,
    },
}

/// Secrets by name. They are wiped from memory on drop.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets(BTreeMap<String, Zeroizing<Vec<u8>>>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Checks that this can be the name of a secret.
///
/// # Errors
/// [`SecretError::Name`].
pub fn check_name(name: &str) -> Result<(), SecretError> {
    let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let other = |c: u8| first(c) || b"._-".contains(&c);
    let right = name.len() <= MAX_NAME && name.bytes().next().is_some_and(first) && name.bytes().all(other);
    if right { Ok(()) } else { Err(SecretError::Name(name.chars().take(2 * MAX_NAME).collect())) }
}

impl Secrets {
    /// Adds a secret.
    ///
    /// # Errors
    /// [`SecretError`]; nothing is changed.
    pub fn add(&mut self, name: &str, value: Zeroizing<Vec<u8>>, replace: bool) -> Result<(), SecretError> {
        check_name(name)?;
        if !(1..=MAX_VALUE).contains(&value.len()) {
            return Err(SecretError::Length { name: name.to_owned(), length: value.len() });
        }
        let known = self.0.contains_key(name);
        if known && !replace {
            return Err(SecretError::Exists(name.to_owned()));
        }
        if !known && self.0.len() == MAX_SECRETS {
            return Err(SecretError::Full);
        }
        self.0.insert(name.to_owned(), value);
        Ok(())
    }

    /// Adds the secrets of `other` that are missing here. Returns the names whose values differ; they are not changed.
    ///
    /// # Errors
    /// [`SecretError::Full`].
    pub fn merge(&mut self, other: &Self) -> Result<Vec<String>, SecretError> {
        let mut differ = Vec::new();
        for (name, value) in &other.0 {
            match self.0.get(name) {
                None => self.add(name, value.clone(), false)?,
                Some(own) if own != value => differ.push(name.clone()),
                Some(_) => {}
            }
        }
        Ok(differ)
    }

    /// The secret with this name.
    ///
    /// # Errors
    /// [`SecretError::Missing`].
    pub fn get(&self, name: &str) -> Result<&[u8], SecretError> {
        let found = self.0.get(name).map(|value| &value[..]);
        found.ok_or_else(|| SecretError::Missing {
            name: name.to_owned(),
            known: self.names().map(String::from).collect(),
        })
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The encoding: u16 count; then for each, by name: u8 length and name, u16 length and value. Numbers are little-endian.
    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let length = |(name, value): (&String, &Zeroizing<Vec<u8>>)| 3 + name.len() + value.len();
        // Reserve enough memory: a growing vector would leave copies of secrets behind.
        let mut out = Zeroizing::new(Vec::with_capacity(2 + self.0.iter().map(length).sum::<usize>()));
        out.extend_from_slice(&(self.0.len() as u16).to_le_bytes());
        for (name, value) in &self.0 {
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(&(value.len() as u16).to_le_bytes());
            out.extend_from_slice(value);
        }
        out
    }

    /// Parses exactly the output of [`Secrets::encode`].
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (count, mut rest) = take_u16(bytes)?;
        let mut secrets = Self::default();
        for _ in 0..count {
            let (length, after) = rest.split_first()?;
            let (name, after) = after.split_at_checked((*length).into())?;
            let (length, after) = take_u16(after)?;
            let (value, after) = after.split_at_checked(length.into())?;
            let name = std::str::from_utf8(name).ok()?;
            if secrets.0.last_key_value().is_some_and(|(last, _)| last.as_str() >= name) {
                return None;
            }
            secrets.add(name, Zeroizing::new(value.to_vec()), false).ok()?;
            rest = after;
        }
        rest.is_empty().then_some(secrets)
    }
}

fn take_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_le_bytes(*number), rest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn value(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(bytes.to_vec())
    }

    #[test]
    fn secrets_are_encoded_in_the_order_of_their_names() {
        let mut secrets = Secrets::default();
        secrets.add("b", value(b"two"), false).unwrap();
        secrets.add("a", value(b"1"), false).unwrap();
        let encoded = secrets.encode();
        assert_eq!(*encoded, *b"\x02\0\x01a\x01\x001\x01b\x03\0two");
        assert_eq!(Secrets::decode(&encoded), Some(secrets));
        for length in 0..encoded.len() {
            assert_eq!(Secrets::decode(&encoded[..length]), None);
        }
        for wrong in [
            &b"\x02\0\x01b\x01\x001\x01a\x01\x002"[..],
            b"\x02\0\x01a\x01\x001\x01a\x01\x002",
            b"\x01\0\x01a\0\0",
            b"\x01\0\x01A\x01\x001",
            b"\0\0\0",
        ] {
            assert_eq!(Secrets::decode(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn missing_secrets_are_taken_and_others_stay() {
        let of = |pairs: &[(&str, &str)]| {
            let mut secrets = Secrets::default();
            pairs.iter().for_each(|(name, text)| secrets.add(name, value(text.as_bytes()), false).unwrap());
            secrets
        };
        let mut one = of(&[("a", "1"), ("b", "2")]);
        assert_eq!(one.merge(&of(&[("a", "1"), ("b", "3"), ("c", "4")])), Ok(vec!["b".to_owned()]));
        assert_eq!(one, of(&[("a", "1"), ("b", "2"), ("c", "4")]));
    }

    #[test]
    fn names_and_values_have_bounds() {
        let mut secrets = Secrets::default();
        for name in ["", ".a", "-", "A", "ä", "a/b", "a b", &"a".repeat(65)] {
            assert!(matches!(secrets.add(name, value(b"1"), false), Err(SecretError::Name(_))), "{name}");
        }
        for bytes in [0, MAX_VALUE + 1] {
            let refused = secrets.add("a", value(&vec![1; bytes]), false);
            assert!(matches!(refused, Err(SecretError::Length { length, .. }) if length == bytes));
        }
        for at in 0..MAX_SECRETS {
            secrets.add(&format!("{at:064}"), value(&[1; MAX_VALUE]), false).unwrap();
        }
        assert_eq!(secrets.add("a", value(b"1"), false), Err(SecretError::Full));
        assert!(matches!(secrets.add(&"0".repeat(64), value(b"1"), false), Err(SecretError::Exists(_))));
        assert_eq!(secrets.encode().len(), MAX_ENCODED);
        secrets.add(&"0".repeat(64), value(b"1"), true).unwrap();
        assert_eq!(secrets.get(&"0".repeat(64)).unwrap(), b"1");
        assert!(!format!("{secrets:?}").contains('\u{1}'));
    }
}
