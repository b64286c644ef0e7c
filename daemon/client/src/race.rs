//! Connects to several addresses as in RFC 8305 ("Happy Eyeballs"). The attempts start one after the other, with a
//! short delay between them, and run until the first one succeeds. The caller provides the addresses and makes the
//! connections.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Longest delay between two attempts: the "Connection Attempt Delay" that the RFC recommends.
const LONGEST_DELAY: Duration = Duration::from_millis(250);
/// Shortest delay. The RFC forbids a shorter one.
const SHORTEST_DELAY: Duration = Duration::from_millis(10);

/// The winner of a race.
#[derive(Debug)]
pub(crate) struct Won<S> {
    pub(crate) stream: S,
    /// The address of the connection.
    pub(crate) address: SocketAddr,
    /// Addresses that were tried before this one, and refused or did not answer in time.
    pub(crate) passed: Vec<SocketAddr>,
}

/// Computes the delay between two attempts if all of them share `time`. The last address must also get its share.
pub(crate) fn delay(time: Duration, addresses: usize) -> Duration {
    let share = time / u32::try_from(addresses + 1).unwrap_or(u32::MAX);
    share.clamp(SHORTEST_DELAY, LONGEST_DELAY)
}

/// Orders the addresses. The order of the resolver stays, but address families take turns, so a family without a route
/// costs only one attempt. Addresses in `last` come after all others. Duplicates are removed.
pub(crate) fn order(resolved: &[SocketAddr], last: impl Fn(SocketAddr) -> bool) -> Vec<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = Vec::with_capacity(resolved.len());
    for address in resolved {
        if !addresses.contains(address) {
            addresses.push(*address);
        }
    }
    let Some(first) = addresses.first().map(SocketAddr::is_ipv6) else { return addresses };
    let same = |address: &SocketAddr| address.is_ipv6() == first;
    let (preferred, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(same);
    let mut turns = Vec::with_capacity(resolved.len());
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    loop {
        let pair = [preferred.next(), other.next()];
        if pair == [None, None] {
            break;
        }
        turns.extend(pair.into_iter().flatten());
    }
    // The sort is stable: addresses in the same group keep their order.
    turns.sort_by_key(|address| last(*address));
    turns
}

/// Tries `addresses` in order. The next attempt starts when the previous one failed or `delay` has passed. The first
/// connection wins, and all other attempts are cancelled.
///
/// # Errors
/// Every attempt failed. Holds their errors, in the order in which they failed.
pub(crate) async fn race<S, F>(
    addresses: &[SocketAddr],
    delay: Duration,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<Won<S>, Vec<(SocketAddr, io::Error)>>
where
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: Send + 'static,
{
    let mut waiting = addresses.iter().copied();
    let mut begun = Vec::with_capacity(addresses.len());
    let mut failed = Vec::new();
    let mut running = JoinSet::new();
    let mut begin = |running: &mut JoinSet<_>, begun: &mut Vec<_>| match waiting.next() {
        Some(address) => {
            let attempt = connect(address);
            running.spawn(async move { (address, attempt.await) });
            begun.push(address);
            Some(Instant::now() + delay)
        }
        None => None,
    };
    let mut next = begin(&mut running, &mut begun);
    loop {
        let pause = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = running.join_next() => ended,
            () = pause => {
                next = begin(&mut running, &mut begun);
                continue;
            }
        };
        match ended {
            Some(Ok((address, Ok(stream)))) => {
                begun.retain(|other| *other != address);
                let passed = begun.into_iter().filter(|other| precedes(addresses, *other, address)).collect();
                return Ok(Won { stream, address, passed });
            }
            Some(Ok((address, Err(error)))) => {
                failed.push((address, error));
                next = begin(&mut running, &mut begun);
            }
            // The attempt panicked; the panic handler has already reported it.
            Some(Err(_)) => next = begin(&mut running, &mut begun),
            None => return Err(failed),
        }
    }
}

fn precedes(addresses: &[SocketAddr], one: SocketAddr, other: SocketAddr) -> bool {
    let place = |of| addresses.iter().position(|address| *address == of);
    place(one) < place(other)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::time::sleep;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn numbered(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|n| SocketAddr::from(([192, 0, 2, n], 80))).collect()
    }

    /// The outcome of an attempt, and the time it takes.
    #[derive(Clone, Copy)]
    enum Fate {
        Answers(u64),
        Refuses(u64),
        Swallows,
    }

    /// Runs a race over addresses with these outcomes. Returns the result, and the start times of the attempts in
    /// milliseconds.
    async fn run(fates: &[Fate]) -> (Result<(SocketAddr, Vec<SocketAddr>), usize>, Vec<u128>, u128) {
        let addresses = numbered(u8::try_from(fates.len()).unwrap());
        let begun = Instant::now();
        let starts = Arc::new(Mutex::new(Vec::new()));
        let connect = |address: SocketAddr| {
            starts.lock().unwrap().push(begun.elapsed().as_millis());
            let fate = fates[addresses.iter().position(|other| *other == address).unwrap()];
            async move {
                match fate {
                    Fate::Answers(after) => sleep(Duration::from_millis(after)).await,
                    Fate::Refuses(after) => {
                        sleep(Duration::from_millis(after)).await;
                        return Err(io::ErrorKind::ConnectionRefused.into());
                    }
                    Fate::Swallows => std::future::pending().await,
                }
                Ok(())
            }
        };
        let ended = race(&addresses, LONGEST_DELAY, connect).await;
        let ended = ended.map(|won| (won.address, won.passed)).map_err(|failed| failed.len());
        let starts = starts.lock().unwrap().clone();
        (ended, starts, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_swallows_packets_costs_one_delay() {
        let all = numbered(3);
        let (ended, starts, took) = run(&[Fate::Swallows, Fate::Answers(40), Fate::Answers(0)]).await;
        assert_eq!(ended, Ok((all[1], vec![all[0]])));
        assert_eq!((starts, took), (vec![0, 250], 290));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_refuses_costs_nothing() {
        let all = numbered(2);
        let (ended, starts, took) = run(&[Fate::Refuses(1), Fate::Answers(2)]).await;
        assert_eq!(ended, Ok((all[1], vec![all[0]])));
        assert_eq!((starts, took), (vec![0, 1], 3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_address_stays_in_the_race() {
        let all = numbered(3);
        let (ended, starts, took) = run(&[Fate::Answers(600), Fate::Swallows, Fate::Swallows]).await;
        assert_eq!(ended, Ok((all[0], vec![])));
        assert_eq!((starts, took), (vec![0, 250, 500], 600));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_that_answers_is_the_only_one_tried() {
        let (ended, starts, took) = run(&[Fate::Answers(249), Fate::Answers(0)]).await;
        assert_eq!(ended, Ok((numbered(2)[0], vec![])));
        assert_eq!((starts, took), (vec![0], 249));
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_refuse_every_reason_is_told() {
        let (ended, _, took) = run(&[Fate::Refuses(700), Fate::Refuses(0), Fate::Refuses(0)]).await;
        assert_eq!((ended, took), (Err(3), 700));
        let (ended, starts, _) = run(&[]).await;
        assert_eq!((ended, starts), (Err(0), vec![]));
    }

    #[test]
    fn families_take_turns_and_troublesome_addresses_come_last() {
        let resolved = ["[::1]:1", "[::2]:1", "[::1]:1", "192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"].map(at);
        let text = |addresses: Vec<SocketAddr>| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let plain = text(order(&resolved, |_| false));
        assert_eq!(plain, "[::1]:1 192.0.2.1:1 [::2]:1 192.0.2.2:1 192.0.2.3:1");
        let last = text(order(&resolved, |address| address == at("[::1]:1")));
        assert_eq!(last, "192.0.2.1:1 [::2]:1 192.0.2.2:1 192.0.2.3:1 [::1]:1");
    }

    #[test]
    fn every_address_has_its_share_of_a_short_time() {
        assert_eq!(delay(Duration::from_secs(30), 2), LONGEST_DELAY);
        assert_eq!(delay(Duration::from_millis(300), 2), Duration::from_millis(100));
        assert_eq!(delay(Duration::ZERO, 5), SHORTEST_DELAY);
    }
}
