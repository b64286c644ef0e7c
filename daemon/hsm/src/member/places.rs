//! Places: the right to have a call at a member's worker, pooled by deadpool.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use deadpool::managed::{self, Metrics, Object, Pool};

use super::conversation::Conversation;
use super::gauges::Gauges;

/// Calls that a session may have at the worker: one that runs and one that waits in the socket.
const PLACES_FOR_A_SESSION: usize = 2;

/// The connection to the worker, as callers use it.
pub(super) type Talk = Arc<Conversation<Held>>;

/// The right to have one call at the worker.
pub(super) struct Place;

/// The deadpool manager of places.
pub(super) struct Places;

impl managed::Manager for Places {
    type Type = Place;
    type Error = std::convert::Infallible;

    async fn create(&self) -> Result<Place, Self::Error> {
        Ok(Place)
    }

    async fn recycle(&self, _: &mut Place, _: &Metrics) -> managed::RecycleResult<Self::Error> {
        Ok(())
    }
}

/// The callers' queue while the member serves. Each worker, and each return from draining, has a pool of its own: places of
/// an earlier pool do not return to this one, and closing a pool sends its waiting callers to other members.
pub(super) struct CallQueue {
    pub(super) talk: Talk,
    pub(super) places: Pool<Places>,
}

impl CallQueue {
    pub(super) fn new(talk: Talk) -> Option<Arc<Self>> {
        // Building fails only for pools with time limits and no runtime; this pool has no time limits.
        let places = Pool::builder(Places).max_size(places(talk.sessions())).build().ok()?;
        Some(Arc::new(CallQueue { talk, places }))
    }

    /// Adds places for a session that the worker has opened. The pool never shrinks: a deadpool that shrank under load
    /// gives out more than its size, and a session that closes is usually renewed at once.
    pub(super) fn session_opened(&self) {
        let wanted = places(self.talk.sessions());
        if wanted > self.places.status().max_size {
            self.places.resize(wanted);
        }
    }

    pub(super) fn close(&self) {
        self.places.close();
    }
}

fn places(sessions: usize) -> usize {
    PLACES_FOR_A_SESSION * sessions.max(1)
}

/// Guard of a call, held while the call is outstanding.
pub(super) struct Held {
    /// `None` for a call of the member itself, which is one more in the socket.
    pub(super) _place: Option<Object<Places>>,
    pub(super) _in_flight: InFlight,
}

/// Counts one call that waits or runs, until it is dropped.
pub(super) struct InFlight(pub(super) Arc<Gauges>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
