//! The way of one operation through the members, until one of them has done it or nothing is left to try. A plain value
//! that is handed `now`: no clock, no I/O, no randomness of its own.
//!
//! A member can turn an operation away, fail at it, or reject its input. Only the last is the caller's fault, and one
//! member's word is not enough for that: a token that is throttled or broken answers the same way. So a rejection is
//! confirmed by other members, a failure is taken elsewhere out of the retry [`Budget`], and a member that turned the
//! operation away has cost nothing.

use std::time::{Duration, Instant};

use super::budget::Budget;
use super::pick::{Candidate, Choice, Tiers, pick};

/// Number of members that must reject an input before the caller is told that it is invalid. Where there are fewer
/// members, the same ones are asked again: a token may reject a good input once, when it is throttled. Each attempt is
/// to be charged to the caller's rate limit.
pub const REJECTION_QUORUM: usize = 5;

/// How often each member may be asked, at most, unless a member rejected the input: what failed a moment ago may work now.
/// No more, or an input that crashes members would take all of them down again and again.
const ROUNDS: usize = 2;

/// How long after its fault a member that restarts is waited for. A fresh worker is up within a second; a member that is
/// away for longer has a problem that a caller should not wait for.
pub const GRACE: Duration = Duration::from_secs(2);

/// What a member can do for an operation now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// It can take the operation.
    Able(Candidate),
    /// It cannot, but is restarting after a fault.
    Returning {
        /// When it went down.
        since: Instant,
    },
    /// It cannot, and it is not known when it can: full, drained, down for long, without the key.
    Unable,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Submit the operation to this member, then call [`Failover::replied`] or [`Failover::succeeded`].
    Ask {
        /// The member.
        member: usize,
        /// How long this attempt may take: half of the time that is left while another member could use the other half,
        /// else all of it; at most the watchdog's time.
        share: Duration,
    },
    /// No member can take the operation now. Call [`Failover::next`] again when a member has changed its state, and no later
    /// than at `until`.
    Wait {
        /// When nothing is left to wait for.
        until: Instant,
    },
}

/// What came of an attempt, other than the right result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<E> {
    /// No token was asked, so that another attempt costs no retry.
    NotRun(E),
    /// The member found the input invalid.
    Rejected {
        /// What the caller is told.
        error: E,
        /// The member is believed. Otherwise it may be the member that is wrong, because it was not long ago or could not
        /// prove itself, and `error` must not blame the input.
        credible: bool,
        /// Given back in [`Success::contradicted`] if another member accepts the input.
        rejection: Rejection,
    },
    /// The member failed; another one may succeed, out of the retry budget.
    Failed(E),
    /// No member could do better.
    Final(E),
}

/// How a member rejected the input; given back in [`Success::contradicted`] when it was wrong to do so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// It gave a result, which was wrong, instead of an error.
    pub wrong: bool,
    /// Identifies the member's worker at the time of the attempt. Not interpreted here.
    pub generation: u64,
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GaveUp<E> {
    /// The deadline passed before any member failed.
    Deadline,
    /// No member can take the operation, and none is on its way up.
    NoCandidate,
    /// What a member said.
    Error(E),
}

/// What is known when a member has given the right result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Success {
    /// Attempts that were paid for out of the retry budget.
    pub retries: u32,
    /// The member that had failed last, if it is another one.
    pub failed_over_from: Option<usize>,
    /// The members that had rejected the input, which turned out to be valid.
    pub contradicted: Vec<(usize, Rejection)>,
}

/// How far a member has got in this round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Untried,
    /// It did not run the operation.
    TurnedAway,
    Asked,
}

/// One operation.
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
    /// The member that was asked last, until its reply is known.
    asked: Option<usize>,
    /// By member. Empty until the first reply, so that an operation that succeeds at once allocates nothing.
    marks: Vec<Mark>,
    rounds: usize,
    rejections: Vec<(usize, Rejection)>,
    /// What the caller is told if no member accepts the input: the first error that does not blame it, else the latest.
    rejected: Option<(E, bool)>,
    failed: Option<E>,
    failing: Option<usize>,
    retries: u32,
}

impl<E> Failover<E> {
    /// An operation that has to be done by `deadline`. It earns its share of a retry.
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

    /// What to do now. `tiers` are the same members at every step. `standing(member)` is called for as few members as
    /// [`pick`] looks at, unless none of them can take the operation. An attempt without a reply counts as turned away.
    ///
    /// # Errors
    /// When there is nothing left to do.
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
        // A member that was asked in the last round is not waited for: it would not be asked again.
        let worth_until = |member: usize| match standing(member) {
            Standing::Returning { since } if self.marked(member) != Mark::Asked => Some(since + GRACE),
            _ => None,
        };
        match (0..tiers.members()).filter_map(worth_until).max() {
            Some(until) if until > now => {
                // To be turned away is no failure: it costs no round, and the member may be asked again after the wait.
                if in_vain {
                    self.rounds = round;
                }
                self.marks.iter_mut().filter(|mark| **mark == Mark::TurnedAway).for_each(|mark| *mark = Mark::Untried);
                Ok(Step::Wait { until: until.min(self.deadline) })
            }
            _ => {
                // A rejection says more than a failure: the failure may have been the input's, too.
                let rejected = self.rejected.take().map(|(error, _)| error);
                Err(rejected.or(self.failed.take()).map_or(GaveUp::NoCandidate, GaveUp::Error))
            }
        }
    }

    /// Takes the reply of the member that was asked last.
    ///
    /// # Errors
    /// When no other member is to be asked.
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

    /// The member that was asked last gave the right result.
    #[must_use]
    pub fn succeeded(self) -> Success {
        Success {
            retries: self.retries,
            failed_over_from: self.failing.filter(|failing| Some(*failing) != self.asked),
            contradicted: self.rejections,
        }
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
