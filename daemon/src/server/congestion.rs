//! Connections whose clients read so little that further requests wait.
//!
//! What such requests have sent of their bodies waits, too, so there may be only so many connections of this kind: in all, and
//! of one address. A connection has one place, however many of its requests wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::network::Network;

/// Most such connections.
const MOST: usize = 256;
/// Most of one address, or of one /64 network of IPv6.
const OF_A_NETWORK: usize = 64;

/// The places of a listener.
#[derive(Debug, Default)]
pub(super) struct Congestion(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    networks: HashMap<Network, usize>,
}

/// The place of a connection, for as long as one of its requests waits.
#[derive(Debug)]
pub(super) struct Place {
    congestion: Arc<Congestion>,
    network: Network,
}

/// What a connection knows of its place.
#[derive(Debug, Default)]
pub(super) struct Own(Mutex<Weak<Place>>);

impl Congestion {
    /// The place of the connection that `own` belongs to. `None`: all are taken.
    pub(super) fn place(self: &Arc<Self>, own: &Own, network: Network) -> Option<Arc<Place>> {
        let mut own = own.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = own.upgrade() {
            return Some(place);
        }
        let mut taken = self.taken();
        let of_network = taken.networks.get(&network).copied().unwrap_or_default();
        if taken.all >= MOST || of_network >= OF_A_NETWORK {
            return None;
        }
        taken.all += 1;
        taken.networks.insert(network, of_network + 1);
        let place = Arc::new(Place { congestion: Arc::clone(self), network });
        *own = Arc::downgrade(&place);
        Some(place)
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.congestion.taken();
        taken.all -= 1;
        if let Some(of_network) = taken.networks.get_mut(&self.network) {
            *of_network -= 1;
            if *of_network == 0 {
                taken.networks.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn network(number: u8) -> Network {
        Network::of([192, 0, 2, number].into())
    }

    #[test]
    fn a_connection_has_one_place_and_an_address_not_all_of_them() {
        let congestion = Arc::new(Congestion::default());
        // Three connections with many requests each.
        let stalled: [Own; 3] = Default::default();
        let of_stalled: Vec<_> =
            stalled.iter().flat_map(|own| [(); 128].map(|()| congestion.place(own, network(1)).unwrap())).collect();
        assert_eq!(congestion.taken().all, 3);
        let others: Vec<Own> = (0..OF_A_NETWORK).map(|_| Own::default()).collect();
        let of_others: Vec<_> = others.iter().filter_map(|own| congestion.place(own, network(1))).collect();
        assert_eq!(of_others.len(), OF_A_NETWORK - 3);
        // Elsewhere there are places until all are taken.
        let elsewhere: Vec<Own> = (0..MOST).map(|_| Own::default()).collect();
        let places: Vec<_> = elsewhere
            .iter()
            .enumerate()
            .filter_map(|(at, own)| congestion.place(own, network(2 + (at / OF_A_NETWORK) as u8)))
            .collect();
        assert_eq!(places.len(), MOST - OF_A_NETWORK);
        drop((of_stalled, of_others, places));
        let taken = congestion.taken();
        assert!(taken.all == 0 && taken.networks.is_empty(), "{taken:?}");
    }
}
