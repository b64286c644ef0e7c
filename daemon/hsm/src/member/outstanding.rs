//! Outstanding calls: those that a worker was sent and has not answered. A plain value that is handed `now`.
//!
//! The worker's threads take calls out of the socket in the order in which they were sent. So with N sessions the N oldest
//! outstanding calls run and the others wait in the socket. From this rule the daemon knows how long a call has run,
//! without any message from the worker.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::operation::Operation;

/// Time limits of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    /// Time after which its caller is sent to another member.
    pub(crate) share: Duration,
    /// Time after which the member counts as hung.
    pub(crate) watchdog: Duration,
}

impl Limits {
    /// Returns true if a call without an answer within its share is evidence against the member. For callers with little
    /// time left it is not: under load such calls would take down a member that works.
    pub(crate) fn are_evidence(self) -> bool {
        self.share * 2 >= self.watchdog
    }
}

/// A call that was sent and is not answered.
#[derive(Debug)]
pub(crate) struct Entry<T> {
    id: u32,
    operation: Operation,
    limits: Limits,
    running_since: Option<Instant>,
    late: bool,
    hung: bool,
    /// Owner of the call.
    pub(crate) owner: T,
}

impl<T> Entry<T> {
    /// Returns true if a session has taken the call out of the socket.
    pub(crate) fn runs(&self) -> bool {
        self.running_since.is_some()
    }
}

/// The outstanding calls. Invariant: entries are in the order in which they were sent. The first `sessions` of them have
/// `running_since`; after sessions have closed, more than that may have it.
#[derive(Debug)]
pub(crate) struct Outstanding<T> {
    entries: VecDeque<Entry<T>>,
    next_id: u32,
    sessions: usize,
}

impl<T> Outstanding<T> {
    /// Starts with one session: the first thread of a worker answers the first call before it has opened a session.
    pub(crate) fn new() -> Self {
        Outstanding { entries: VecDeque::new(), next_id: 1, sessions: 1 }
    }

    /// Adds the next call that is sent and returns its id.
    pub(crate) fn add(&mut self, operation: Operation, limits: Limits, owner: T, now: Instant) -> u32 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.entries.push_back(Entry { id, operation, limits, running_since: None, late: false, hung: false, owner });
        self.mark_running(now);
        id
    }

    /// Returns the call with this id, if it is outstanding.
    pub(crate) fn get(&mut self, id: u32) -> Option<&mut Entry<T>> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    /// Removes the call with this id, which was answered or could not be sent.
    pub(crate) fn take(&mut self, id: u32, now: Instant) -> Option<Entry<T>> {
        let at = self.entries.iter().position(|entry| entry.id == id)?;
        let entry = self.entries.remove(at);
        self.mark_running(now);
        entry
    }

    /// Removes all calls, because the worker has ended.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = Entry<T>> + use<T> {
        std::mem::take(&mut self.entries).into_iter()
    }

    /// Sets the number of sessions that the worker has.
    pub(crate) fn set_sessions(&mut self, sessions: usize, now: Instant) {
        self.sessions = sessions.max(1);
        self.mark_running(now);
    }

    fn mark_running(&mut self, now: Instant) {
        for entry in self.entries.iter_mut().take(self.sessions) {
            entry.running_since.get_or_insert(now);
        }
    }

    /// Leaves this time, which has just passed, out of the time that calls have run: nobody read their answers.
    pub(crate) fn forgive(&mut self, unread: Duration, now: Instant) {
        for since in self.entries.iter_mut().filter_map(|entry| entry.running_since.as_mut()) {
            *since = (*since + unread).min(now);
        }
    }

    /// Finds calls that take too long. `late` is called once for each call whose caller must be sent to another member.
    /// Returns the operation that hangs, if any; each hang is returned once.
    pub(crate) fn look(&mut self, now: Instant, mut late: impl FnMut(Operation, Limits, &mut T)) -> Option<Operation> {
        let mut hung = None;
        for entry in &mut self.entries {
            let Some(since) = entry.running_since else { continue };
            let took = now.saturating_duration_since(since);
            let hangs = took >= entry.limits.watchdog;
            if hangs && !entry.hung {
                entry.hung = true;
                hung = hung.or(Some(entry.operation));
            }
            if !entry.late && (hangs || took >= entry.limits.share) {
                entry.late = true;
                late(entry.operation, entry.limits, &mut entry.owner);
            }
        }
        hung
    }

    /// Returns the time that the oldest running repeatable call has run. Calls that are not repeatable are left out:
    /// generation of a key may take minutes.
    pub(crate) fn oldest(&self, now: Instant) -> Option<Duration> {
        let running = self.entries.iter().filter(|entry| entry.operation.may_repeat());
        let since = running.filter_map(|entry| entry.running_since).min()?;
        Some(now.saturating_duration_since(since))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the number of running calls. It may exceed the number of sessions: a session that is closed for renewal is
    /// still in its call.
    pub(crate) fn running(&self) -> usize {
        self.entries.iter().filter(|entry| entry.runs()).count()
    }

    /// Returns the number of running calls whose share of time is over.
    pub(crate) fn late(&self) -> usize {
        self.entries.iter().filter(|entry| entry.late).count()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LIMITS: Limits = Limits { share: Duration::from_millis(50), watchdog: Duration::from_millis(100) };

    fn late(calls: &mut Outstanding<u32>, now: Instant) -> (Vec<u32>, Option<Operation>) {
        let mut late = Vec::new();
        let hung = calls.look(now, |_, _, owner| late.push(*owner));
        (late, hung)
    }

    #[test]
    fn a_call_that_waits_in_the_socket_does_not_run() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        calls.set_sessions(2, start);
        let ids: Vec<_> = (0..4).map(|owner| calls.add(Operation::Sign, LIMITS, owner, start)).collect();
        assert_eq!((calls.len(), calls.running()), (4, 2));
        assert_eq!(late(&mut calls, start + 49 * MS), (vec![], None));
        // A running call is answered, so the next one runs from then on.
        assert_eq!(calls.take(ids[1], start + 30 * MS).unwrap().owner, 1);
        assert_eq!(late(&mut calls, start + 50 * MS), (vec![0], None));
        assert_eq!(late(&mut calls, start + 79 * MS), (vec![], None), "said once");
        assert_eq!(late(&mut calls, start + 80 * MS), (vec![2], None));
        assert_eq!(late(&mut calls, start + 100 * MS), (vec![], Some(Operation::Sign)));
        assert_eq!(late(&mut calls, start + 101 * MS), (vec![], None), "said once");
        assert_eq!((calls.late(), calls.oldest(start + 100 * MS)), (2, Some(100 * MS)));
        // The last call still waits, so both sessions hang.
        assert!(calls.get(ids[3]).is_some_and(|entry| !entry.runs()));
    }

    #[test]
    fn more_sessions_take_more_calls() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        for owner in 0..3 {
            calls.add(Operation::Decrypt, LIMITS, owner, start);
        }
        assert_eq!(calls.running(), 1);
        calls.set_sessions(3, start + 40 * MS);
        assert_eq!(calls.running(), 3);
        assert_eq!(late(&mut calls, start + 60 * MS).0, vec![0]);
        assert_eq!(late(&mut calls, start + 90 * MS).0, vec![1, 2]);
    }

    #[test]
    fn a_call_runs_on_while_its_session_is_renewed() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        calls.set_sessions(2, start);
        for owner in 0..2 {
            calls.add(Operation::Decrypt, LIMITS, owner, start);
        }
        calls.set_sessions(0, start);
        assert_eq!(calls.running(), 2);
        assert_eq!(late(&mut calls, start + 50 * MS).0, vec![0, 1]);
        assert_eq!(calls.late(), calls.running(), "nothing more is to be waited for");
    }

    #[test]
    fn time_in_which_no_answer_was_read_is_not_counted() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        calls.set_sessions(2, start);
        calls.add(Operation::Sign, LIMITS, 0, start);
        calls.add(Operation::Sign, LIMITS, 1, start + 1_005 * MS);
        calls.forgive(1_000 * MS, start + 1_010 * MS);
        assert_eq!(late(&mut calls, start + 1_010 * MS), (vec![], None));
        assert_eq!(late(&mut calls, start + 1_050 * MS), (vec![0], None));
        assert_eq!(late(&mut calls, start + 1_060 * MS), (vec![1], None), "it began meanwhile");
    }

    #[test]
    fn making_a_key_is_no_sign_of_a_slow_member() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        calls.add(Operation::Generate, LIMITS, 0, start);
        assert_eq!(calls.oldest(start + 5 * MS), None);
    }

    #[test]
    fn unknown_ids_are_nothing() {
        let start = Instant::now();
        let mut calls = Outstanding::new();
        let id = calls.add(Operation::Random, LIMITS, 7, start);
        assert!(calls.take(id.wrapping_add(1), start).is_none());
        assert_eq!(calls.take(id, start).unwrap().owner, 7);
        assert!(calls.take(id, start).is_none(), "answered twice");
        calls.add(Operation::Random, LIMITS, 8, start);
        assert_eq!(calls.take_all().map(|entry| entry.owner).collect::<Vec<_>>(), [8]);
        assert_eq!(calls.len(), 0);
    }
}
