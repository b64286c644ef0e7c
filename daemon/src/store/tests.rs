//! Tests for every store. Tests of single records are next to them.
#![allow(clippy::unwrap_used)]

use std::fmt;
use std::sync::Arc;

use super::etcd::testing::Server;
use super::import::{Import, Merged};
use super::{Contents, Labels, State, StateError};

/// Makes a test for each store from functions with a [`Place`].
macro_rules! on_every_store {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn sqlite() {
                super::$name(&crate::store::tests::Place::sqlite());
            }

            #[test]
            fn etcd() {
                super::$name(&crate::store::tests::Place::etcd());
            }
        })+
    };
}

pub(super) use on_every_store;

/// The store of one test.
pub(super) struct Place(Kind);

enum Kind {
    Sqlite(tempfile::TempDir),
    /// A server, and a key prefix.
    Etcd(Arc<Server>, String),
}

impl Place {
    pub(super) fn sqlite() -> Self {
        Self(Kind::Sqlite(tempfile::tempdir().unwrap()))
    }

    pub(super) fn etcd() -> Self {
        Self(Kind::Etcd(Arc::new(Server::start()), "/claviger/".to_owned()))
    }

    /// Opens the state like another daemon.
    pub(super) fn open(&self) -> State {
        match &self.0 {
            Kind::Sqlite(folder) => State::open(&folder.path().join("a/state")).unwrap(),
            Kind::Etcd(server, prefix) => State::etcd(server.settings(prefix)).unwrap(),
        }
    }

    /// A separate store of the same kind.
    pub(super) fn another(&self) -> Self {
        match &self.0 {
            Kind::Sqlite(_) => Self::sqlite(),
            Kind::Etcd(server, prefix) => Self(Kind::Etcd(Arc::clone(server), format!("{prefix}another/"))),
        }
    }
}

/// Waits until `found` returns true: changes by another daemon in etcd take a moment to arrive.
pub(super) fn soon(mut found: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !found() {
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "not within 20 seconds");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Plans an import, and makes it if that is possible.
pub(super) fn plan_and_import(state: &mut State, import: &Import, now: i64) -> Result<Merged, StateError> {
    let planned = state.plan_import(import, now)?;
    state.import(import, now, &planned.changes)
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
    soon(|| ours.changed().unwrap());
    assert!(ours.changed().unwrap());
    // A failed read does not count as seen.
    assert!(ours.snapshot(|_| Err::<(), _>(StateError::Invalid("on purpose".to_owned()))).is_err());
    assert!(ours.changed().unwrap());
    assert_eq!((ours.snapshot(read).unwrap(), ours.changed().unwrap()), (1, false));
    ours.add_host("b", b"b", &Labels::default(), 1).unwrap();
    assert_eq!((ours.changed().unwrap(), ours.snapshot(read).unwrap(), ours.changed().unwrap()), (true, 2, false));
    soon(|| theirs.hosts().unwrap().len() == 2);
    assert!(theirs.changed().unwrap());
    assert!(ours.add_host("b", b"c", &Labels::default(), 1).is_err());
    assert!(!ours.changed().unwrap(), "a refusal is no change");
    // A write during the read is a change after it.
    let counted = ours.snapshot(|contents| {
        theirs.add_host("c", b"c", &Labels::default(), 1)?;
        read(contents)
    });
    assert_eq!(counted.unwrap(), 2);
    soon(|| ours.changed().unwrap());
    assert_eq!(ours.snapshot(read).unwrap(), 3);
}
