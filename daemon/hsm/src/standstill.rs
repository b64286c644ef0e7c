//! A clock that leaves out the time in which the whole process or its machine stood still.
//!
//! A process may be stopped (`SIGSTOP`, a debugger, a frozen cgroup), and a virtual machine may be migrated or resumed from
//! a snapshot. The system's monotonic clock then jumps for all threads at once: every waiter exceeds its deadline although
//! nothing was slow. Deadlines, watchdogs and estimates therefore use this clock.
//!
//! A thread beats 40 times per second. If a beat is much too late, the process stood still, and the delay is lost time. A
//! reader that comes before that beat sees the gap as well, so [`now`] never jumps. Without a thread that beats (tools,
//! unit tests) this is the system's clock.
//!
//! Instants of this clock must not be compared with those of another clock. Subtract an instant taken with [`now`] only
//! from [`now`], and wait for it with [`sleep_until`] or [`timeout_at`].

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

/// Time between two beats, and the unit in which they are stored.
const BEAT: Duration = Duration::from_millis(25);
/// A beat with this delay means a standstill, not a busy machine.
const STANDSTILL: Duration = Duration::from_millis(500);

/// The instant from which beats are counted.
static EPOCH: OnceLock<Instant> = OnceLock::new();
/// The current [`Pulse`]; 0 if no thread beats.
static PULSE: AtomicU64 = AtomicU64::new(0);

/// The last beat, and the time lost before it, both counted in beats. There is room for 54 years and 77 days. They share
/// one word so that both are read at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Pulse {
    beats: u64,
    lost: u64,
}

const LOST_BITS: u32 = 28;
const MOST_LOST: u64 = (1 << LOST_BITS) - 1;

impl Pulse {
    fn pack(self) -> u64 {
        self.beats << LOST_BITS | self.lost.min(MOST_LOST)
    }

    fn unpack(word: u64) -> Self {
        Pulse { beats: word >> LOST_BITS, lost: word & MOST_LOST }
    }

    /// Returns the lost time when `now` has passed since the epoch: the time lost before, plus the gap since the last beat
    /// if that is too wide.
    fn lost(self, now: Duration) -> Duration {
        times(BEAT, self.lost) + self.gap(now).unwrap_or_default()
    }

    /// Returns the length of the standstill since the last beat, if there is one.
    fn gap(self, now: Duration) -> Option<Duration> {
        let gap = now.saturating_sub(times(BEAT, self.beats));
        (gap >= STANDSTILL).then(|| gap - BEAT)
    }

    /// Returns the pulse after the next beat.
    fn beat(self, now: Duration) -> Self {
        let beats = |time: Duration| u64::try_from(time.as_millis() / BEAT.as_millis()).unwrap_or(u64::MAX);
        Pulse { beats: beats(now), lost: beats(self.lost(now)).min(MOST_LOST) }
    }
}

fn times(time: Duration, count: u64) -> Duration {
    Duration::from_nanos((time.as_nanos() as u64).saturating_mul(count))
}

/// Starts the thread that beats, once in a process. If the thread cannot be started, the clock continues as the system's
/// clock.
pub fn watch() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let epoch = *EPOCH.get_or_init(|| Instant::now().checked_sub(BEAT).unwrap_or_else(Instant::now));
        let beat = move || {
            let mut pulse = Pulse { beats: 0, lost: 0 }.beat(epoch.elapsed().min(BEAT));
            loop {
                let now = epoch.elapsed();
                if let Some(stood) = pulse.gap(now) {
                    warn!(ms = stood.as_millis(), "the process stood still; no deadline counts that time");
                }
                pulse = pulse.beat(now);
                PULSE.store(pulse.pack(), Ordering::Release);
                thread::sleep(BEAT);
            }
        };
        if let Err(error) = thread::Builder::new().name("standstill".to_owned()).spawn(beat) {
            warn!(%error, "no thread can be started that notices standstills; deadlines count them");
        }
    });
}

/// Returns the current time of this clock.
#[must_use]
pub fn now() -> Instant {
    // Tokio's clock, because tests pause and set it.
    let system = tokio::time::Instant::now().into_std();
    system.checked_sub(lost(system)).unwrap_or(system)
}

/// Returns the time that has passed since `then`, an instant of this clock.
#[must_use]
pub fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

fn lost(system: Instant) -> Duration {
    match (PULSE.load(Ordering::Acquire), EPOCH.get()) {
        (0, _) | (_, None) => Duration::ZERO,
        (word, Some(epoch)) => Pulse::unpack(word).lost(system.saturating_duration_since(*epoch)),
    }
}

/// Returns the system's time that corresponds to `deadline`, if no standstill occurs until then.
fn on_system_clock(deadline: Instant) -> tokio::time::Instant {
    tokio::time::Instant::now() + deadline.saturating_duration_since(now())
}

/// Waits until an instant of this clock.
pub async fn sleep_until(deadline: Instant) {
    // A standstill during the wait moves the deadline.
    while now() < deadline {
        tokio::time::sleep_until(on_system_clock(deadline)).await;
    }
}

/// The deadline passed before the future was ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("deadline passed")]
pub struct Elapsed;

/// Waits for `future`, at most until an instant of this clock.
///
/// # Errors
/// Returns an error if the deadline passes first.
pub async fn timeout_at<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    timeout_by(|| deadline, future).await
}

/// Waits for `future`, at most until an instant of this clock that may move to a later one meanwhile.
///
/// # Errors
/// Returns an error if the deadline passes first.
pub async fn timeout_by<F: Future>(deadline: impl Fn() -> Instant, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    loop {
        match tokio::time::timeout_at(on_system_clock(deadline()), &mut future).await {
            Ok(output) => return Ok(output),
            Err(_) if now() >= deadline() => return Err(Elapsed),
            Err(_) => {}
        }
    }
}

/// Waits for `future`, at most for `time`.
///
/// # Errors
/// Returns an error if the time is over first.
pub async fn timeout<F: Future>(time: Duration, future: F) -> Result<F::Output, Elapsed> {
    timeout_at(now() + time, future).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn after(pulse: Pulse, moments: impl IntoIterator<Item = u64>) -> Pulse {
        moments.into_iter().fold(pulse, |pulse, moment| pulse.beat(ms(moment)))
    }

    const START: Pulse = Pulse { beats: 1, lost: 0 };

    #[test]
    fn a_busy_machine_loses_no_time() {
        let pulse = after(START, [50, 80, 300, 320, 790]);
        assert_eq!((pulse.lost, pulse.lost(ms(1250))), (0, Duration::ZERO));
    }

    #[test]
    fn a_standstill_is_lost_before_and_after_the_beat_that_finds_it() {
        let pulse = after(START, [50, 75, 100]);
        // A reader before the beat sees the same loss as a reader after it, within one beat.
        assert_eq!(pulse.lost(ms(6100)), ms(6000 - 25));
        let beaten = pulse.beat(ms(6103));
        assert_eq!(beaten.lost(ms(6103)), ms(6000 - 25));
        assert_eq!(after(beaten, [6125, 6150, 6300]).lost(ms(6310)), ms(6000 - 25));
        // The next standstill adds to the lost time.
        assert_eq!(after(beaten, [6125, 7125]).lost(ms(7130)), ms(6000 - 25 + 1000 - 25));
    }

    #[test]
    fn both_numbers_fit_into_a_word() {
        for pulse in [START, Pulse { beats: 1 << 35, lost: 7 }, Pulse { beats: 9, lost: MOST_LOST }] {
            assert_eq!(Pulse::unpack(pulse.pack()), pulse);
        }
        let late = Pulse { beats: 1, lost: MOST_LOST - 1 }.beat(ms(60_000));
        assert_eq!((late.beats, late.lost), (2400, MOST_LOST), "saturates");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_beat_it_is_the_systems_clock() {
        let begun = now();
        sleep_until(begun + ms(5_000)).await;
        assert_eq!(since(begun), ms(5_000));
        assert_eq!(timeout(ms(100), std::future::pending::<()>()).await, Err(Elapsed));
        assert_eq!(timeout(ms(100), async { 7 }).await, Ok(7));
        assert_eq!(timeout_at(begun, async { 7 }).await, Ok(7), "what is there is taken, however late");
        assert_eq!(since(begun), ms(5_100));
    }
}
