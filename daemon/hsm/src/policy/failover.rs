//! Failover of one operation: decides which member is asked next, until one succeeds or nothing is left to try. A plain
//! value that is handed `now`: no clock, no I/O, no randomness of its own.
//!
//! A member can turn an operation away, fail, or reject the input. Only a rejection is the caller's fault, and the opinion
//! of one member is not enough for it: a throttled or broken token gives the same answer. So other members confirm a
//! rejection; a failure is retried on another member at the cost of the retry [`Budget`]; and a member that turned the
//! operation away costs no retry.

use std::time::{Duration, Instant};

use super::budget::Budget;
use super::pick::{Candidate, Choice, Tiers, pick};

/// Number of rejections after which the caller is told that the input is invalid. With fewer members, the same members are
/// asked again: a throttled token may reject a valid input once. The caller's rate limit should be charged for each
/// attempt.
pub const REJECTION_QUORUM: usize = 5;

/// Maximum number of times that each member is asked, unless a member rejected the input: an operation that failed a moment
/// ago may work now. The number is small so that an input that crashes members does not take all of them down repeatedly.
const ROUNDS: usize = 2;

/// Maximum time after its fault during which a restarting member is waited for. A fresh worker is up within a second; a
/// member that is down for longer has a problem that a caller should not wait for.
pub const GRACE: Duration = Duration::from_secs(2);

/// Ability of a member to take an operation now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// The member can take the operation.
    Able(Candidate),
    /// The member cannot take the operation, but is restarting after a fault.
    Returning {
        /// Time at which the member went down.
        since: Instant,
    },
    /// The member cannot take the operation, and no time is known: full, drained, down for long, or without the key.
    Unable,
}

/// Next step of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Submit the operation to this member, then call [`Failover::replied`] or [`Failover::succeeded`].
    Ask {
        /// Index of the member.
        member: usize,
        /// Time limit of this attempt: half of the time left while another member could use the other half, else all of it;
        /// at most the watchdog's time.
        share: Duration,
    },
    /// No member can take the operation now. Call [`Failover::next`] again when a member has changed its state, at the
    /// latest at `until`.
    Wait {
        /// Time after which waiting is useless.
        until: Instant,
    },
}

/// Result of an attempt, other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<E> {
    /// No token was asked, so another attempt costs no retry.
    NotRun(E),
    /// The member rejected the input as invalid.
    Rejected {
        /// Error for the caller.
        error: E,
        /// True if the member is believed. If false, the member itself may be wrong, because it was wrong a short time ago
        /// or failed to prove itself; `error` must then not blame the input.
        credible: bool,
        /// Returned in [`Success::contradicted`] if another member accepts the input.
        rejection: Rejection,
    },
    /// The member failed; another member may succeed, at the cost of the retry budget.
    Failed(E),
    /// The operation failed, and no other member could do better.
    Final(E),
}

/// A rejection of the input by a member; returned in [`Success::contradicted`] if it was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// True if the member gave a wrong result; false if it returned an error.
    pub wrong: bool,
    /// Identifies the member's worker at the time of the attempt. Opaque to this module.
    pub generation: u64,
}

/// Reason for giving up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GaveUp<E> {
    /// The deadline passed before any member failed.
    Deadline,
    /// No member can take the operation, and none is restarting.
    NoCandidate,
    /// Error of a member.
    Error(E),
}

/// Facts known after a member gave the right result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Success {
    /// Number of attempts paid for by the retry budget.
    pub retries: u32,
    /// The member that failed last, if it is a different one.
    pub failed_over_from: Option<usize>,
    /// Members that had rejected the input, which turned out to be valid.
    pub contradicted: Vec<(usize, Rejection)>,
}

/// Progress of a member in this round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Untried,
    /// The member did not run the operation.
    TurnedAway,
    Asked,
}

/// Failover state of one operation.
///
/// ```text
///          ┌───────────────────────────────────────────────────────────┐
///          ▼             ┌─ Ask ──► the shell submits ──┬─► replied ────┤
/// new ─► next ──► Ok ────┤                              │      └─► Err  │
///          │             └─ Wait ─► the shell waits ────┼───────────────┘
///          └────► Err (gave up)                         └─► succeeded
/// ```
///
/// A *round* asks each member that can take the operation once. There are two; up to [`REJECTION_QUORUM`] once a member has
/// rejected the input.
#[derive(Debug)]
pub struct Failover<E> {
    deadline: Instant,
    watchdog: Duration,
    /// Index of the member that was asked last, until its reply is known.
    asked: Option<usize>,
    /// Progress of each member. Empty until the first reply, so that an operation that succeeds at once allocates nothing.
    marks: Vec<Mark>,
    rounds: usize,
    rejections: Vec<(usize, Rejection)>,
    /// Error for the caller if no member accepts the input: the first error that does not blame the input, else the latest.
    rejected: Option<(E, bool)>,
    failed: Option<E>,
    failing: Option<usize>,
    retries: u32,
}

impl<E> Failover<E> {
    /// Starts an operation that must end by `deadline`. The operation earns its share of a retry.
    pub fn new(deadline: Instant, watchdog: Duration, budget: &mut Budget, now: Instant) -> Self {
        budget.deposit(now);
        Failover {
            deadline,
            watchdog,
            asked: None,
            marks: Vec::new(),
            rounds: 1,
            rejections: Vec::new(),
            rejected: None,
            failed: None,
            failing: None,
            retries: 0,
        }
    }

    /// Returns the next step. `tiers` must have the same members at every step. `standing(member)` is called for as few
    /// members as [`pick`] examines, unless none of them can take the operation. An attempt without a reply counts as
    /// turned away.
    ///
    /// # Errors
    /// Returns an error when nothing is left to do.
    pub fn next(
        &mut self,
        now: Instant,
        tiers: &Tiers,
        standing: impl Fn(usize) -> Standing,
        mut random: impl FnMut(usize) -> usize,
    ) -> Result<Step, GaveUp<E>> {
        if let Some(member) = self.asked.take() {
            self.mark(member, Mark::TurnedAway);
        }
        if now >= self.deadline {
            return Err(self.failed.take().map_or(GaveUp::Deadline, GaveUp::Error));
        }
        let mut choice = self.pick(tiers, &standing, &mut random);
        let (round, in_vain) = (self.rounds, !self.marks.contains(&Mark::Asked));
        let rounds = if self.rejections.is_empty() { ROUNDS } else { REJECTION_QUORUM };
        if choice.is_none() && self.rounds < rounds && self.marks.iter().any(|mark| *mark != Mark::Untried) {
            self.rounds += 1;
            self.marks.clear();
            choice = self.pick(tiers, &standing, &mut random);
        }
        if let Some(choice) = choice {
            self.asked = Some(choice.member);
            let left = self.deadline.saturating_duration_since(now);
            let share = if choice.alone { left } else { left / 2 };
            return Ok(Step::Ask { member: choice.member, share: share.min(self.watchdog) });
        }
        // A member that was asked in the last round is not waited for, since it would not be asked again.
        let worth_until = |member: usize| match standing(member) {
            Standing::Returning { since } if self.marked(member) != Mark::Asked => Some(since + GRACE),
            _ => None,
        };
        match (0..tiers.members()).filter_map(worth_until).max() {
            Some(until) if until > now => {
                // A member that turned the operation away has not failed: this costs no round, and it may be asked again
                // after the wait.
                if in_vain {
                    self.rounds = round;
                }
                self.marks.iter_mut().filter(|mark| **mark == Mark::TurnedAway).for_each(|mark| *mark = Mark::Untried);
                Ok(Step::Wait { until: until.min(self.deadline) })
            }
            _ => {
                // A rejection says more than a failure, because the input may also have caused the failure.
                let rejected = self.rejected.take().map(|(error, _)| error);
                Err(rejected.or(self.failed.take()).map_or(GaveUp::NoCandidate, GaveUp::Error))
            }
        }
    }

    /// Records the reply of the member that was asked last.
    ///
    /// # Errors
    /// Returns an error when no other member is to be asked.
    pub fn replied(&mut self, reply: Reply<E>, budget: &mut Budget, now: Instant) -> Result<(), E> {
        let Some(member) = self.asked.take() else { return Ok(()) };
        match reply {
            Reply::NotRun(error) => {
                self.mark(member, Mark::TurnedAway);
                self.failed.get_or_insert(error);
                self.failing = Some(member);
                Ok(())
            }
            Reply::Rejected { error, credible, rejection } => {
                self.mark(member, Mark::Asked);
                self.rejections.push((member, rejection));
                let (error, credible) = match self.rejected.take() {
                    Some((earlier, false)) => (earlier, false),
                    _ => (error, credible),
                };
                if self.rejections.len() >= REJECTION_QUORUM {
                    return Err(error);
                }
                self.rejected = Some((error, credible));
                Ok(())
            }
            Reply::Failed(error) => {
                self.mark(member, Mark::Asked);
                if !budget.withdraw(now) {
                    return Err(error);
                }
                self.retries += 1;
                self.failed = Some(error);
                self.failing = Some(member);
                Ok(())
            }
            Reply::Final(error) => Err(error),
        }
    }

    /// Records that the member that was asked last gave the right result.
    #[must_use]
    pub fn succeeded(self) -> Success {
        Success {
            retries: self.retries,
            failed_over_from: self.failing.filter(|failing| Some(*failing) != self.asked),
            contradicted: self.rejections,
        }
    }

    /// Returns the members that rejected the input so far.
    #[must_use]
    pub fn rejections(&self) -> &[(usize, Rejection)] {
        &self.rejections
    }

    fn pick(
        &self,
        tiers: &Tiers,
        standing: impl Fn(usize) -> Standing,
        random: impl FnMut(usize) -> usize,
    ) -> Option<Choice> {
        let candidate = |member| match self.marked(member) {
            Mark::Untried => match standing(member) {
                Standing::Able(candidate) => Some(candidate),
                Standing::Returning { .. } | Standing::Unable => None,
            },
            Mark::TurnedAway | Mark::Asked => None,
        };
        pick(tiers, candidate, random)
    }

    fn marked(&self, member: usize) -> Mark {
        self.marks.get(member).copied().unwrap_or(Mark::Untried)
    }

    fn mark(&mut self, member: usize, mark: Mark) {
        if self.marks.len() <= member {
            self.marks.resize(member + 1, Mark::Untried);
        }
        self.marks[member] = mark;
    }
}

#[cfg(test)]
mod tests;
