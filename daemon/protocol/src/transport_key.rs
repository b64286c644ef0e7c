//! The transport key. It encrypts the state of a virtual machine; protecting and releasing it is the purpose of this
//! service.

use std::fmt;
use std::ops::{Deref, DerefMut};

use zeroize::Zeroizing;

/// Length of a transport key, in bytes.
pub const TRANSPORT_KEY_LEN: usize = 32;

/// A transport key. The key stays at one place in memory for its whole life: a move copies only the pointer, and drop
/// wipes the place.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TransportKey(Box<Zeroizing<[u8; TRANSPORT_KEY_LEN]>>);

/// Makes a transport key from `bytes`. `None`: the length is wrong.
#[must_use]
pub fn transport_key(bytes: &[u8]) -> Option<TransportKey> {
    let mut key = TransportKey::default();
    if bytes.len() != key.len() {
        return None;
    }
    key.copy_from_slice(bytes);
    Some(key)
}

impl Deref for TransportKey {
    type Target = [u8; TRANSPORT_KEY_LEN];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for TransportKey {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl fmt::Debug for TransportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn moving_a_key_does_not_move_its_bytes() {
        let key = transport_key(&[7; 32]).unwrap();
        let place = key.as_ptr();
        let moved = [Some(key)];
        let again = moved.into_iter().flatten().next().unwrap();
        assert_eq!((again.as_ptr(), *again), (place, [7; 32]));
    }

    #[test]
    fn a_key_has_one_length_and_says_nothing_of_itself() {
        for length in [0, 31, 33] {
            assert_eq!(transport_key(&vec![7; length]), None);
        }
        assert_eq!(format!("{:?}", TransportKey::default()), "TransportKey { .. }");
    }
}
