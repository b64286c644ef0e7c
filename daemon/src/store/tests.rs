//! What holds for every store. Tests of single records are beside them.
#![allow(clippy::unwrap_used)]

use std::fmt;
use std::path::PathBuf;

use super::*;

/// Makes of functions of a [`Place`] a test for each store.
macro_rules! on_every_store {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn sqlite() {
                super::$name(&crate::store::tests::Place::sqlite());
            }
        })+
    };
}

pub(super) use on_every_store;

/// Where the state of one test is.
pub(super) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(super) fn sqlite() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("a/state")
    }

    /// The state, as one more daemon opens it.
    pub(super) fn open(&self) -> State {
        State::open(&self.path()).unwrap()
    }

    /// A place of the same kind that has nothing to do with this one.
    pub(super) fn another(&self) -> Self {
        Self::sqlite()
    }
}

pub(super) fn message<T: fmt::Debug>(result: Result<T, StateError>) -> String {
    result.unwrap_err().to_string()
}

on_every_store!(a_change_by_anybody_is_noticed_until_it_was_read);

fn a_change_by_anybody_is_noticed_until_it_was_read(place: &Place) {
    let mut ours = place.open();
    let mut theirs = place.open();
    let read = |contents: &Contents| contents.hosts().map(Iterator::count);
    assert!(!ours.changed().unwrap());
    theirs.add_host("a", b"a", &Labels::default(), 1).unwrap();
    assert_eq!((ours.changed().unwrap(), ours.changed().unwrap()), (true, true));
    // A reading that fails has seen nothing.
    assert!(ours.snapshot(|_| Err::<(), _>(StateError::Invalid("on purpose".to_owned()))).is_err());
    assert!(ours.changed().unwrap());
    assert_eq!((ours.snapshot(read).unwrap(), ours.changed().unwrap()), (1, false));
    ours.add_host("b", b"b", &Labels::default(), 1).unwrap();
    assert_eq!((ours.changed().unwrap(), ours.snapshot(read).unwrap(), ours.changed().unwrap()), (true, 2, false));
    assert!(theirs.changed().unwrap());
    assert!(ours.add_host("b", b"c", &Labels::default(), 1).is_err());
    assert!(!ours.changed().unwrap(), "a refusal is no change");
    // What is written while it reads is a change after it.
    let counted = ours.snapshot(|contents| {
        theirs.add_host("c", b"c", &Labels::default(), 1)?;
        read(contents)
    });
    assert_eq!((counted.unwrap(), ours.changed().unwrap()), (2, true));
    assert_eq!(ours.snapshot(read).unwrap(), 3);
}
