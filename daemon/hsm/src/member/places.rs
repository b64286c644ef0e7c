//! Places: the right to have a call at a member's worker, pooled by deadpool.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use deadpool::managed::{self, Metrics, Object, Pool};

use super::conversation::Conversation;
use super::gauges::Gauges;

/// Calls that a session may have at the worker: one that runs and one in the socket.
const PLACES_FOR_A_SESSION: usize = 2;

/// The worker as callers talk to it.
pub(super) type Talk = Arc<Conversation<Held>>;

/// The right to have one call at the worker.
pub(super) struct Place;

/// deadpool's way to places.
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

/// What callers need while the member serves. Each worker, and each return from draining, has a pool of its own: what an earlier
/// one lent does not come back to this one, and closing a pool sends those that wait at it elsewhere.
pub(super) struct CallQueue {
    pub(super) talk: Talk,
    pub(super) places: Pool<Places>,
}

impl CallQueue {
    pub(super) fn new(talk: Talk) -> Option<Arc<Self>> {
        // Fails for pools with time limits and no runtime, which this is not.
        let places = Pool::builder(Places).max_size(places(talk.sessions())).build().ok()?;
        Some(Arc::new(CallQueue { talk, places }))
    }

    /// The worker has opened a session. The pool never shrinks: deadpool gives more than its size after it has shrunk under
    /// load, and a session that closes is mostly one that is renewed.
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

/// Held while a call is outstanding.
pub(super) struct Held {
    /// `None`: a member's own call, which is one more in the socket.
    pub(super) _place: Option<Object<Places>>,
    pub(super) _in_flight: InFlight,
}

/// One call that waits or runs, counted while this lives.
pub(super) struct InFlight(pub(super) Arc<Gauges>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
