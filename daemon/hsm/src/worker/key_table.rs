//! The table of a token's RSA private keys as one session found them, and the lookup by id and public key.
//!
//! Several private keys may have the same `CKA_ID`. The modulus decides between them. If the token does not reveal the
//! modulus of a private key, the public key object that belongs to the key is used. A private key whose modulus stays
//! unknown is used only if no other key has its id; its results are checked like all others.

use std::collections::HashMap;

use crate::error::HsmError;
use crate::identity::{Fingerprint, KeyId, without_leading_zeros};
use crate::keys::{RsaPublic, TokenKey};

/// The operation that needs a private key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    Decrypt,
    Sign,
}

/// Attributes that the token reveals of a private key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct FoundKey<H> {
    pub(crate) handle: H,
    /// Empty if the key has no id.
    pub(crate) id: Vec<u8>,
    pub(crate) label: String,
    /// Empty if the token does not reveal it; the same holds for `e`.
    pub(crate) n: Vec<u8>,
    pub(crate) e: Vec<u8>,
    /// `CKA_DECRYPT`. A token that does not show the attribute counts as if it were true.
    pub(crate) decrypts: bool,
    /// `CKA_SIGN`, in the same way.
    pub(crate) signs: bool,
    /// True if every operation requires a login of its own (`CKA_ALWAYS_AUTHENTICATE`).
    pub(crate) always_authenticate: bool,
}

/// A public key object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct FoundPublic {
    pub(crate) id: Vec<u8>,
    pub(crate) label: String,
    pub(crate) key: RsaPublic,
}

/// A key of the table, with everything that an operation needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key<H> {
    pub(crate) handle: H,
    /// Length in bytes; `None` if the token does not reveal the modulus.
    pub(crate) modulus_len: Option<usize>,
    pub(crate) decrypts: bool,
    pub(crate) signs: bool,
    pub(crate) always_authenticate: bool,
    public: Option<Fingerprint>,
}

impl<H> Key<H> {
    fn serves(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Decrypt => self.decrypts,
            Purpose::Sign => self.signs,
        }
    }
}

/// The private keys of a token.
#[derive(Debug)]
pub(crate) struct KeyTable<H> {
    by_id: HashMap<Vec<u8>, Vec<Key<H>>>,
    /// All keys, including those without an id, in the order in which the token listed them.
    found: Vec<FoundKey<H>>,
    /// Errors of private keys whose attributes cannot be read.
    unreadable: Vec<HsmError>,
}

impl<H> Default for KeyTable<H> {
    fn default() -> Self {
        KeyTable { by_id: HashMap::new(), found: Vec::new(), unreadable: Vec::new() }
    }
}

impl<H: Copy> KeyTable<H> {
    /// Builds the table from the private keys of a token. The public key objects are used only for private keys that do not
    /// reveal their modulus. `unreadable`: errors of private keys whose attributes cannot be read.
    pub(crate) fn new(mut found: Vec<FoundKey<H>>, publics: &[FoundPublic], unreadable: &[HsmError]) -> Self {
        let halves: Vec<_> = found.iter().map(|key| public_half(key, &found, publics).cloned()).collect();
        for (key, half) in found.iter_mut().zip(halves) {
            if let Some(half) = half {
                (key.n, key.e) = (half.n, half.e);
            }
        }
        let mut table = KeyTable { unreadable: unreadable.to_vec(), ..KeyTable::default() };
        found.into_iter().for_each(|key| table.insert(key));
        table
    }

    /// Adds a key that was created after the search.
    pub(crate) fn insert(&mut self, found: FoundKey<H>) {
        if !found.id.is_empty() {
            let n = without_leading_zeros(&found.n);
            self.by_id.entry(found.id.clone()).or_default().push(Key {
                handle: found.handle,
                modulus_len: Some(n.len()).filter(|len| *len > 0),
                decrypts: found.decrypts,
                signs: found.signs,
                always_authenticate: found.always_authenticate,
                public: fingerprint_of(n),
            });
        }
        self.found.push(found);
    }

    /// Returns the private key with this id and public key. A key may be stored as two objects, one of which signs and the
    /// other decrypts: the object that permits `purpose` is preferred.
    pub(crate) fn find(&self, id: &[u8], public: Fingerprint, purpose: Purpose) -> Option<&Key<H>> {
        let of_id = self.by_id.get(id)?;
        let exact = || of_id.iter().filter(|key| key.public == Some(public));
        if let Some(key) = exact().find(|key| key.serves(purpose)).or_else(|| exact().next()) {
            return Some(key);
        }
        let mut unknown = of_id.iter().filter(|key| key.public.is_none());
        match (unknown.next(), unknown.next()) {
            (Some(key), None) => Some(key),
            _ => None,
        }
    }

    /// Returns true if the table has a key with this id and modulus, for any purpose.
    pub(crate) fn holds(&self, id: &KeyId, modulus: &[u8]) -> bool {
        let public = Some(Fingerprint::of_modulus(modulus));
        self.by_id.get(&id.0).is_some_and(|keys| keys.iter().any(|key| key.public == public))
    }

    /// Returns the handles of all private keys with this id and public key.
    pub(crate) fn handles_of(&self, id: &[u8], public: Fingerprint) -> Vec<H> {
        let of_id = self.by_id.get(id).map(Vec::as_slice).unwrap_or_default();
        of_id.iter().filter(|key| key.public == Some(public)).map(|key| key.handle).collect()
    }

    /// Returns true if the table has a key with this id.
    pub(crate) fn has_id(&self, id: &KeyId) -> bool {
        self.by_id.contains_key(&id.0)
    }

    /// Returns any key that may decrypt and whose length is known.
    pub(crate) fn any_that_decrypts(&self) -> Option<&Key<H>> {
        let decrypts = |key: &&Key<H>| key.decrypts && key.modulus_len.is_some() && !key.always_authenticate;
        self.by_id.values().flatten().find(decrypts)
    }

    /// Returns all keys, those without an id last.
    pub(crate) fn list(&self) -> Vec<TokenKey> {
        let mut keys: Vec<_> = self
            .found
            .iter()
            .map(|key| TokenKey {
                id: (!key.id.is_empty()).then(|| KeyId(key.id.clone())),
                label: key.label.clone(),
                public: public_of(&key.n, &key.e),
                decrypts: key.decrypts,
                signs: key.signs,
                always_authenticate: key.always_authenticate,
                fingerprint: fingerprint_of(&key.n),
            })
            .collect();
        keys.sort_by(|one, other| (one.id.is_none(), &one.id).cmp(&(other.id.is_none(), &other.id)));
        keys
    }

    /// Describes, in sentences, the facts about these keys that an administrator should know.
    pub(crate) fn oddities(&self) -> Vec<String> {
        let unreadable = |error| format!("a private key cannot be read and is not used: {error}");
        let mut said: Vec<_> = self.unreadable.iter().map(unreadable).collect();
        for key in self.found.iter().filter(|key| key.id.is_empty()) {
            said.push(format!("the private key labelled {:?} has no CKA_ID and is not used", key.label));
        }
        let mut of_one_id: Vec<_> = self.by_id.iter().filter(|(_, keys)| keys.len() > 1).collect();
        of_one_id.sort_by_key(|(id, _)| *id);
        for (id, keys) in of_one_id {
            let unknown = keys.iter().filter(|key| key.public.is_none()).count();
            if unknown > 1 {
                said.push(format!(
                    "{} private keys have the CKA_ID {}, and of {unknown} the token does not tell the public key: these \
                     are not used",
                    keys.len(),
                    KeyId(id.clone())
                ));
            }
        }
        said
    }
}

/// Returns the public key of a private key that does not reveal its own modulus: that of the only public key object with
/// its id and label, or of the only one with its id if only one private key has that id.
fn public_half<'a, H>(key: &FoundKey<H>, found: &[FoundKey<H>], publics: &'a [FoundPublic]) -> Option<&'a RsaPublic> {
    if key.id.is_empty() || (!key.n.is_empty() && !key.e.is_empty()) {
        return None;
    }
    if !key.n.is_empty() {
        // The modulus is known and only the exponent is missing.
        let n = without_leading_zeros(&key.n);
        let same = |public: &&FoundPublic| public.id == key.id && without_leading_zeros(&public.key.n) == n;
        return publics.iter().find(same).map(|public| &public.key);
    }
    let labelled = |public: &&FoundPublic| public.id == key.id && public.label == key.label;
    let alone_by_label = found.iter().filter(|other| other.id == key.id && other.label == key.label).count() == 1;
    let alone_by_id = found.iter().filter(|other| other.id == key.id).count() == 1;
    let by_label = only(publics.iter().filter(labelled)).filter(|_| alone_by_label);
    let by_id = || only(publics.iter().filter(|public| public.id == key.id)).filter(|_| alone_by_id);
    by_label.or_else(by_id).map(|public| &public.key)
}

fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}

fn fingerprint_of(n: &[u8]) -> Option<Fingerprint> {
    (!without_leading_zeros(n).is_empty()).then(|| Fingerprint::of_modulus(n))
}

/// Returns the public key; `None` if a number is missing.
fn public_of(n: &[u8], e: &[u8]) -> Option<RsaPublic> {
    let (n, e) = (without_leading_zeros(n), without_leading_zeros(e));
    (!n.is_empty() && !e.is_empty()).then(|| RsaPublic { n: n.to_vec(), e: e.to_vec() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(handle: u32, id: &[u8], label: &str, n: &[u8]) -> FoundKey<u32> {
        FoundKey {
            handle,
            id: id.to_vec(),
            label: label.to_owned(),
            n: n.to_vec(),
            e: if n.is_empty() { Vec::new() } else { vec![1, 0, 1] },
            decrypts: true,
            signs: true,
            always_authenticate: false,
        }
    }

    fn public(id: &[u8], label: &str, n: &[u8]) -> FoundPublic {
        FoundPublic { id: id.to_vec(), label: label.to_owned(), key: RsaPublic { n: n.to_vec(), e: vec![3] } }
    }

    fn handle(table: &KeyTable<u32>, id: &[u8], n: &[u8]) -> Option<u32> {
        table.find(id, Fingerprint::of_modulus(n), Purpose::Sign).map(|key| key.handle)
    }

    #[test]
    fn the_public_key_decides_between_keys_of_one_id() {
        let table = KeyTable::new(vec![key(1, b"id", "a", b"one"), key(2, b"id", "b", b"\0two")], &[], &[]);
        assert_eq!(handle(&table, b"id", b"one"), Some(1));
        assert_eq!(handle(&table, b"id", b"two"), Some(2));
        assert_eq!(handle(&table, b"id", b"three"), None, "another key of that id is not it");
        assert_eq!(handle(&table, b"other", b"one"), None);
        assert!(table.oddities().is_empty(), "{:?}", table.oddities());
        assert!(table.holds(&KeyId(b"id".to_vec()), b"two") && !table.holds(&KeyId(b"id".to_vec()), b"three"));
    }

    #[test]
    fn of_one_key_that_is_there_twice_the_object_that_may_is_taken() {
        let signs = FoundKey { decrypts: false, ..key(1, b"id", "a", b"n") };
        let decrypts = FoundKey { signs: false, ..key(2, b"id", "a", b"n") };
        for order in [[signs.clone(), decrypts.clone()], [decrypts, signs.clone()]] {
            let table = KeyTable::new(order.to_vec(), &[], &[]);
            let public = Fingerprint::of_modulus(b"n");
            assert_eq!(table.find(b"id", public, Purpose::Sign).unwrap().handle, 1);
            assert_eq!(table.find(b"id", public, Purpose::Decrypt).unwrap().handle, 2);
        }
        // The token then refuses, with its own code.
        let table = KeyTable::new(vec![signs], &[], &[]);
        assert!(table.find(b"id", Fingerprint::of_modulus(b"n"), Purpose::Decrypt).is_some());
    }

    #[test]
    fn a_modulus_that_the_private_key_does_not_tell_comes_from_the_public_key() {
        let publics = [public(b"id", "a", b"one"), public(b"id", "b", b"two"), public(b"alone", "x", b"three")];
        let table = KeyTable::new(
            vec![key(1, b"id", "a", b""), key(2, b"id", "b", b""), key(3, b"alone", "y", b"")],
            &publics,
            &[],
        );
        assert_eq!(handle(&table, b"id", b"one"), Some(1));
        assert_eq!(handle(&table, b"id", b"two"), Some(2));
        assert_eq!(handle(&table, b"alone", b"three"), Some(3));
        assert_eq!(table.list().iter().filter(|key| key.public.is_some()).count(), 3);
        // The private key lacks only the exponent.
        let table = KeyTable::new(vec![FoundKey { e: Vec::new(), ..key(1, b"id", "z", b"\0one") }], &publics, &[]);
        assert_eq!(table.list()[0].public, Some(RsaPublic { n: b"one".to_vec(), e: vec![3] }));
    }

    #[test]
    fn keys_that_cannot_be_told_apart_are_not_guessed_at() {
        let table =
            KeyTable::new(vec![key(1, b"id", "a", b""), key(2, b"id", "a", b"")], &[public(b"id", "a", b"one")], &[]);
        assert_eq!(handle(&table, b"id", b"one"), None);
        assert!(table.oddities()[0].contains("2 private keys have the CKA_ID 6964"), "{:?}", table.oddities());
        // The only key of an id is used, and its results are checked.
        let table = KeyTable::new(vec![key(1, b"id", "a", b""), key(2, b"id", "b", b"two")], &[], &[]);
        assert_eq!(handle(&table, b"id", b"one"), Some(1));
        assert_eq!(handle(&table, b"id", b"two"), Some(2));
    }

    #[test]
    fn a_key_without_an_id_is_named() {
        let table = KeyTable::new(vec![key(1, b"", "forgotten", b"n"), key(2, b"id", "b", b"m")], &[], &[]);
        assert_eq!(table.oddities(), ["the private key labelled \"forgotten\" has no CKA_ID and is not used"]);
        let listed = table.list();
        assert_eq!((listed[0].id.as_ref(), listed[1].id.as_ref()), (Some(&KeyId(b"id".to_vec())), None));
        assert_eq!(handle(&table, b"", b"n"), None);
    }

    #[test]
    fn a_key_that_cannot_be_read_is_mentioned() {
        let table = KeyTable::new(vec![key(1, b"id", "b", b"m")], &[], &[HsmError::Nonsense]);
        assert!(table.oddities()[0].starts_with("a private key cannot be read and is not used: the module gave"));
    }
}
