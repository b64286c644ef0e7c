//! Makes session threads wait on different processors, so that two calls that arrive together run at the same time.
//!
//! A release sends two calls in quick succession. The kernel wakes a thread on the processor where it ran last, if that
//! processor is idle, and otherwise near the sender, which is busy for a moment. A thread that is queued there is not moved
//! for half a millisecond (`sched_migration_cost`), which is as long as an operation of a fast token. So threads that ran
//! last on the same processor serve the two calls one after the other, time after time, while another processor is idle.
//!
//! Therefore a thread first moves to the next processor if it is about to wait on the processor where another thread began
//! to wait last. Before it waits it is allowed on all processors again: this influences the kernel's placement but never
//! restricts it. Under load no thread waits, and none moves. If other programs keep the processors busy, a moving thread
//! queues behind them. So after a slow move, no thread moves for a while.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use rustix::process::{Pid, getpid};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Time above which a move has waited for other programs. Otherwise a move takes some ten microseconds.
const SLOW: Duration = Duration::from_micros(200);
/// Time without moves after a slow move.
const REST: Duration = Duration::from_secs(1);

/// Placement of the waiting threads of a process.
#[derive(Debug)]
pub(crate) struct Spread {
    /// The main thread, which never moves. Its allowed processors are those that the administrator allows the process.
    main: Pid,
    /// The processor on which a thread last began to wait.
    last: AtomicUsize,
    /// True if there are several processors and the system lets threads choose (`seccomp` may forbid it).
    useful: AtomicBool,
    /// Time of the last slow move.
    slow: Mutex<Option<Instant>>,
}

impl Spread {
    pub(crate) fn new() -> Self {
        let several = sched_getaffinity(None).is_ok_and(|allowed| allowed.count() > 1);
        Spread {
            main: getpid(),
            last: AtomicUsize::new(usize::MAX),
            useful: AtomicBool::new(several),
            slow: Mutex::default(),
        }
    }

    /// Must be called by a thread before it waits for a call.
    pub(crate) fn before_waiting(&self) {
        if !self.useful.load(Ordering::Relaxed) {
            return;
        }
        let here = sched_getcpu();
        if self.last.swap(here, Ordering::Relaxed) != here {
            return;
        }
        let begun = Instant::now();
        if lock(&self.slow).is_some_and(|slow| begun.saturating_duration_since(slow) < REST) {
            return;
        }
        // Read each time, because an administrator may change it.
        let Ok(allowed) = sched_getaffinity(Some(self.main)) else { return };
        let Some(next) = next(&allowed, here) else { return };
        let mut only = CpuSet::new();
        only.set(next);
        match sched_setaffinity(None, &only) {
            Ok(()) => self.last.store(next, Ordering::Relaxed),
            Err(_) => self.useful.store(false, Ordering::Relaxed),
        }
        let _ = sched_setaffinity(None, &allowed);
        if begun.elapsed() >= SLOW {
            *lock(&self.slow) = Some(begun);
        }
    }
}

/// Returns the next allowed processor in a ring; `None` if there is no other.
fn next(allowed: &CpuSet, here: usize) -> Option<usize> {
    let mut others = (here + 1..CpuSet::MAX_CPU).chain(0..here);
    others.find(|processor| allowed.is_set(*processor))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_next_processor_is_one_that_is_allowed() {
        let mut allowed = CpuSet::new();
        [1, 3].iter().for_each(|processor| allowed.set(*processor));
        let next = |here| next(&allowed, here);
        assert_eq!([next(0), next(1), next(3), next(7)], [Some(1), Some(3), Some(1), Some(1)]);
        allowed.unset(3);
        assert_eq!(super::next(&allowed, 1), None);
    }

    #[test]
    fn threads_wait_apart_and_stay_free() {
        let allowed = sched_getaffinity(None).unwrap();
        if allowed.count() < 2 {
            return;
        }
        let spread = Spread::new();
        let moves = |slow: Option<Instant>| {
            let moved = |_: &_| {
                let before = sched_getcpu();
                spread.last.store(before, Ordering::Relaxed);
                *lock(&spread.slow) = slow;
                spread.before_waiting();
                assert_eq!(sched_getaffinity(None).unwrap(), allowed, "free to run anywhere");
                spread.last.load(Ordering::Relaxed) != before
            };
            (0..100).filter(moved).count()
        };
        // The kernel may move this thread at any time.
        assert!(moves(None) > 50);
        assert!(moves(Some(Instant::now() + REST)) < 50, "the machine is busy with other things");
        assert!(spread.useful.load(Ordering::Relaxed));
    }
}
