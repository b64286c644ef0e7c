//! The line of accepted connections that wait for a place.
//!
//! Connections of addresses in debt (see `ration`) wait in a line of their own: there may be hundreds of them, and none of them
//! would have its turn soon. Any other connection finds a place at once, unless all places are in use for work. Then nothing
//! more is accepted, and the rest waits in the kernel's queue; so it is when too many of addresses in debt wait. None is closed:
//! an honest host may be at the address of others that are not.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::activity::Activity;
use super::slot::{House, Place};
use crate::sys::places::NoPlace;

/// An accepted connection.
pub(super) struct Arrival {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) activity: Arc<Activity>,
}

/// What becomes of the connection that is the first in the line.
pub(super) enum Outcome {
    /// It has a place.
    Seated(Arrival, Place),
    /// It is not taken: its address has too many connections.
    TurnedAway(Arrival),
    /// It waits.
    Waits {
        /// Whether the connections of all addresses wait with it, because all places are in use for work.
        full: bool,
    },
    /// Nobody is in the line.
    Empty,
}

/// The accepted connections that wait for a place.
pub(super) struct Line {
    first: Option<Arrival>,
    in_debt: VecDeque<Arrival>,
    most_in_debt: usize,
}

impl Line {
    /// At most so many connections of addresses in debt wait in it.
    pub(super) fn new(most_in_debt: usize) -> Self {
        Self { first: None, in_debt: VecDeque::new(), most_in_debt: most_in_debt.max(1) }
    }

    /// Whether another connection can be accepted.
    pub(super) fn is_open(&self) -> bool {
        self.first.is_none() && self.in_debt.len() < self.most_in_debt
    }

    /// Whether anybody is in the line.
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none() && self.in_debt.is_empty()
    }

    /// Finds a place for a connection that was just accepted, or lets it wait.
    pub(super) fn arrive(&mut self, arrival: Arrival, house: &Arc<House>, owes: bool) -> Outcome {
        // Those of addresses in debt have places one after another. It also spares the search for a place.
        if owes && !self.in_debt.is_empty() {
            self.in_debt.push_back(arrival);
            return Outcome::Waits { full: false };
        }
        self.seat(arrival, house, owes)
    }

    /// Finds a place for the first in the line.
    pub(super) fn advance(&mut self, house: &Arc<House>, owes: impl Fn(SocketAddr) -> bool) -> Outcome {
        if let Some(arrival) = self.first.take() {
            let owes = owes(arrival.peer);
            return self.seat(arrival, house, owes);
        }
        // Those whose addresses owe nothing any more do not wait for the others.
        let free = self.in_debt.iter().position(|arrival| !owes(arrival.peer));
        match self.in_debt.remove(free.unwrap_or(0)) {
            Some(arrival) => self.seat(arrival, house, free.is_none()),
            None => Outcome::Empty,
        }
    }

    /// Gives up the line, and returns who is in it.
    pub(super) fn end(self) -> impl Iterator<Item = Arrival> {
        self.first.into_iter().chain(self.in_debt)
    }

    fn seat(&mut self, arrival: Arrival, house: &Arc<House>, owes: bool) -> Outcome {
        match house.arrive(arrival.peer, &arrival.activity, owes) {
            Ok(place) => Outcome::Seated(arrival, place),
            Err(NoPlace::Group) => Outcome::TurnedAway(arrival),
            Err(NoPlace::Full | NoPlace::Leaving) if owes => {
                self.in_debt.push_front(arrival);
                Outcome::Waits { full: false }
            }
            Err(why @ (NoPlace::Full | NoPlace::Leaving)) => {
                self.first = Some(arrival);
                Outcome::Waits { full: why == NoPlace::Full }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::http::server::activity::InProgress;
    use crate::sys::places::Places;
    use std::sync::Mutex;
    use std::time::Duration;
    use tokio::net::TcpListener;
    use tokio::sync::Notify;

    const GREEDY: [u8; 4] = [192, 0, 2, 1];
    const HONEST: [u8; 4] = [192, 0, 2, 2];

    fn house(places: usize) -> Arc<House> {
        Arc::new(House { places: Mutex::new(Places::new(places, 0, Duration::ZERO)), freed: Notify::new() })
    }

    async fn from(address: [u8; 4]) -> Arrival {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stream, _) =
            tokio::try_join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept()).unwrap();
        Arrival { stream, peer: (address, 1).into(), activity: Activity::new(false, 1) }
    }

    #[tokio::test]
    async fn nobody_waits_for_an_address_in_debt() {
        let (house, mut line) = (house(2), Line::new(10));
        // All places are taken by connections that wait for their turn, and more of them come.
        let mut seated = Vec::new();
        for _ in 0..2 {
            let Outcome::Seated(arrival, place) = line.arrive(from(GREEDY).await, &house, true) else { panic!() };
            arrival.activity.wait_for_turn(true);
            seated.push((arrival, place));
        }
        for _ in 0..9 {
            assert!(matches!(line.arrive(from(GREEDY).await, &house, true), Outcome::Waits { full: false }));
        }
        assert!(line.is_open() && !line.is_empty());
        let Outcome::Seated(honest, _place) = line.arrive(from(HONEST).await, &house, false) else { panic!() };
        assert_eq!(seated.iter().filter(|(arrival, _)| arrival.activity.is_told_to_close()).count(), 1);
        // A place that becomes free is for the one of them that has waited longest.
        let next = line.in_debt[0].peer;
        drop(seated);
        let Outcome::Seated(arrival, _place) = line.advance(&house, |peer| peer.ip() == next.ip()) else { panic!() };
        assert_eq!((arrival.peer, line.in_debt.len()), (next, 8));
        for _ in 0..2 {
            assert!(line.is_open());
            line.arrive(from(GREEDY).await, &house, true);
        }
        assert!(!line.is_open(), "more of them wait in the kernel");
        drop(honest);
        assert_eq!(line.end().count(), 10);
    }

    #[tokio::test]
    async fn while_all_places_are_in_use_for_work_nothing_is_accepted() {
        let (house, mut line) = (house(1), Line::new(10));
        let Outcome::Seated(busy, place) = line.arrive(from(HONEST).await, &house, false) else { panic!() };
        busy.activity.wait_for_turn(true);
        let mut request = InProgress::new(busy.activity.clone());
        request.begin();
        assert!(matches!(line.arrive(from(HONEST).await, &house, false), Outcome::Waits { full: true }));
        assert!(!line.is_open());
        assert!(matches!(line.advance(&house, |_| false), Outcome::Waits { full: true }));
        drop(place);
        assert!(matches!(line.advance(&house, |_| false), Outcome::Seated(..)));
        assert!(line.is_open() && line.is_empty());
        assert!(matches!(line.advance(&house, |_| false), Outcome::Empty));
    }
}
