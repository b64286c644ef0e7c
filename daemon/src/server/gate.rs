//! The gate in front of the service: how fast an address whose callers are turned away may come again.
//!
//! Accepting a connection, shaking hands and looking at its first requests costs processor time before anything is known
//! of the caller. A connection that ends because it asked for more than a stranger may have costs its address (IPv6: its /64
//! network) a token. While the address has none, its new connections wait, unread, until each of them has got one; it is
//! given back unless the connection is turned away, so hosts of that address pass. Nothing is refused, so a caller that comes
//! back at once gains nothing by it.
//!
//! The newest connection is let in first: those that an attacker left waiting are old, and a host's has come just now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, oneshot};

use crate::network::Network;
use crate::rate::Rate;

/// Waiting connections of an address before those that were closed meanwhile are looked for.
const FEW: usize = 64;

/// The gate of a listener.
#[derive(Debug)]
pub struct Gate {
    rate: ArcSwap<Rate<Network>>,
    lanes: Mutex<HashMap<Network, Lane>>,
}

/// The connections of one address that wait, the newest last. Their turns are handed out by a task that ends with the last.
#[derive(Debug)]
struct Lane {
    waiting: Vec<oneshot::Sender<()>>,
    /// How many there may be before the closed ones are forgotten.
    most: usize,
    given_back: Arc<Notify>,
}

impl Gate {
    /// Of each address `rate` connections a second may be turned away, and `burst` at once, before new ones wait; a rate of 0 is
    /// no limit.
    #[must_use]
    pub fn new(rate: u32, burst: u32) -> Arc<Self> {
        Arc::new(Self { rate: ArcSwap::from_pointee(Rate::new(rate, burst)), lanes: Mutex::default() })
    }

    /// Takes another rate and burst. Where they are others than before, all addresses start with a full burst.
    pub fn change(&self, rate: u32, burst: u32) {
        let mut fresh = Rate::new(rate, burst);
        fresh.inherit(&self.rate.load());
        self.rate.store(Arc::new(fresh));
        self.lanes().values().for_each(|lane| lane.given_back.notify_one());
    }

    /// Whether a connection that comes now does not have to wait.
    pub(super) fn is_open_for(&self, network: Network) -> bool {
        !self.lanes().contains_key(&network) && self.rate.load().look(&network).is_ok()
    }

    /// Waits until a connection is let in. Returns whether it got a token, to be spent or given back.
    pub(super) async fn enter(self: &Arc<Self>, network: Network) -> bool {
        let turn = {
            let mut lanes = self.lanes();
            if !lanes.contains_key(&network) {
                if self.rate.load().look(&network).is_ok() {
                    return false;
                }
                let given_back = Arc::new(Notify::new());
                let lane = Lane { waiting: Vec::new(), most: FEW, given_back: given_back.clone() };
                lanes.insert(network, lane);
                tokio::spawn(Arc::clone(self).hand_out(network, given_back));
            }
            let (sender, turn) = oneshot::channel();
            lanes.entry(network).and_modify(|lane| lane.push(sender));
            turn
        };
        // An error would mean that the lane is gone, and with it the reason to wait.
        turn.await.is_ok()
    }

    /// A connection that came without a token is turned away.
    pub(super) fn spend(&self, network: Network) {
        // What an address has not got, it need not pay later: its next connections wait as it is.
        let _ = self.rate.load().take(&network);
    }

    /// A connection with a token was not turned away.
    pub(super) fn give_back(&self, network: Network) {
        self.rate.load().give_back(&network);
        if let Some(lane) = self.lanes().get(&network) {
            lane.given_back.notify_one();
        }
    }

    async fn hand_out(self: Arc<Self>, network: Network, given_back: Arc<Notify>) {
        loop {
            let taken = self.rate.load().take(&network);
            match taken {
                Ok(()) if self.let_one_in(network) => {}
                Ok(()) => return self.rate.load().give_back(&network),
                Err(wait) => tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = given_back.notified() => {}
                },
            }
        }
    }

    /// Whether one was waiting. Where none was, the lane is gone.
    fn let_one_in(&self, network: Network) -> bool {
        let mut lanes = self.lanes();
        let Some(lane) = lanes.get_mut(&network) else { return false };
        while let Some(waiting) = lane.waiting.pop() {
            if waiting.send(()).is_ok() {
                return true;
            }
        }
        lanes.remove(&network);
        false
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<Network, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    fn push(&mut self, waiting: oneshot::Sender<()>) {
        if self.waiting.len() >= self.most {
            self.waiting.retain(|waiting| !waiting.is_closed());
            self.most = FEW.max(2 * self.waiting.len());
        }
        self.waiting.push(waiting);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::task::yield_now;

    fn network(number: u8) -> Network {
        Network::of([192, 0, 2, number].into())
    }

    async fn until_waiting(gate: &Gate, of: Network, number: usize) {
        while gate.lanes().get(&of).map_or(0, |lane| lane.waiting.len()) != number {
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_newest_is_let_in_first_and_each_address_has_its_own_tokens() {
        // A token comes back after more time than the test takes.
        let gate = Gate::new(1, 2);
        gate.change(1, 3);
        // Whoever comes is let in until some are turned away.
        for _ in 0..10 {
            assert!(!gate.enter(network(1)).await);
        }
        (0..10).for_each(|_| gate.spend(network(1)));
        let turns = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for number in 0..4usize {
            let (gate, turns) = (gate.clone(), turns.clone());
            let of = gate.clone();
            waiting.push(tokio::spawn(async move {
                assert!(gate.enter(network(1)).await);
                turns.lock().unwrap().push(number);
                // It is not turned away: the next one follows.
                gate.give_back(network(1));
            }));
            until_waiting(&of, network(1), number + 1).await;
        }
        assert!(!gate.enter(network(2)).await);
        // One of those that wait is closed.
        waiting.remove(1).abort();
        gate.give_back(network(1));
        for turn in waiting {
            turn.await.unwrap();
        }
        assert_eq!(*turns.lock().unwrap(), [3, 2, 0]);
        until_waiting(&gate, network(1), 0).await;
    }

    #[tokio::test]
    async fn what_was_closed_while_it_waited_is_forgotten() {
        let gate = Gate::new(1, 1);
        gate.spend(network(1));
        let closed = AtomicUsize::new(0);
        for _ in 0..10 * FEW {
            tokio::select! {
                biased;
                _ = gate.enter(network(1)) => {}
                () = std::future::ready(()) => { closed.fetch_add(1, Ordering::Relaxed); }
            }
            assert!(gate.lanes().get(&network(1)).map_or(0, |lane| lane.waiting.len()) <= FEW);
        }
        assert!(closed.into_inner() > 9 * FEW);
    }

    #[tokio::test]
    async fn without_a_limit_all_are_let_in_and_a_limit_that_goes_lets_in_who_waits() {
        let gate = Gate::new(0, 1);
        (0..10_000).for_each(|_| gate.spend(network(1)));
        assert!(!gate.enter(network(1)).await);
        gate.change(1, 1);
        gate.spend(network(1));
        let waiting = (
            gate.clone(),
            tokio::spawn({
                let gate = gate.clone();
                async move { gate.enter(network(1)).await }
            }),
        );
        until_waiting(&waiting.0, network(1), 1).await;
        gate.change(0, 1);
        waiting.1.await.unwrap();
    }
}
