//! The resources of an open connection: a place of its listener, and its entries in the counts.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use tokio::sync::{Notify, mpsc};

use super::activity::{Activity, Cut};
use crate::observe::metrics;
use crate::request::Network;
use crate::sys::places::{NoPlace, Places};

/// The places of a listener, and the connections that wait for one.
pub(super) struct House {
    pub(super) places: Mutex<Places<Network, Arc<Activity>>>,
    pub(super) freed: Notify,
}

impl House {
    fn places(&self) -> MutexGuard<'_, Places<Network, Arc<Activity>>> {
        lock(&self.places)
    }

    /// Takes a place. `in_debt`: the address has used up its share of processor time.
    pub(super) fn arrive(
        self: &Arc<Self>,
        peer: SocketAddr,
        activity: &Arc<Activity>,
        in_debt: bool,
    ) -> Result<Place, NoPlace> {
        let (network, now) = (Network::of(peer.ip()), standstill::now());
        let (number, _) = match in_debt {
            true => self.places().arrive_in_debt(network, activity, now),
            false => self.places().arrive(network, activity, now),
        }?;
        // It may have been in the line for a place until now, in which it was not the client that was waited for.
        activity.wait_for_turn(false);
        Ok(Place { house: self.clone(), network, number })
    }
}

/// The place of one connection.
pub(super) struct Place {
    house: Arc<House>,
    network: Network,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.house.places().leave(self.network, self.number);
        self.house.freed.notify_one();
    }
}

/// The resources of an open connection, released when it ends for any reason.
pub(super) struct Slot {
    open: Arc<AtomicUsize>,
    counted: bool,
    place: Option<Place>,
    _alive: mpsc::Sender<Infallible>,
}

impl Slot {
    pub(super) fn new(
        open: Arc<AtomicUsize>,
        counted: bool,
        place: Option<Place>,
        alive: mpsc::Sender<Infallible>,
    ) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        if counted {
            metrics::connection_opened();
        }
        Self { open, counted, place, _alive: alive }
    }

    /// The connection's number. Connections that were accepted during a stop share one number.
    pub(super) fn connection(&self) -> u64 {
        self.place.as_ref().map_or(u64::MAX, |place| place.number)
    }

    /// Records that the connection was told to close but remains open.
    pub(super) fn stay(&self) {
        self.place.iter().for_each(|place| place.house.places().stay(place.network, place.number));
    }

    /// Counts that the connection was closed for this reason.
    pub(super) fn cut(&self, reason: Cut) {
        if self.counted {
            metrics::connection_cut(reason.as_str());
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        if self.counted {
            metrics::connection_closed();
        }
    }
}
