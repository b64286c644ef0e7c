//! State of a member, and the events that change it. Every change is logged here, once.
//!
//! ```text
//!               attempt due                    test passed
//!    ┌─▶ Down ───────────────▶ Starting ─────────────────────▶ Up ──┬── fault ──▶ Down
//!    │    ▲                       │ attempt failed                  │
//!    │    └───────────────────────┘                                 │ drain
//!    │                                                              ▼
//!    │ resume, without a worker                                 Draining ── nothing in flight ──▶ Drained
//!    └──────────────────────────────────────────────────────────────┴──────── resume ───────────────┘ ──▶ Up
//!
//!    any but Removed ── the token refuses the PIN ──▶ PinRefused ── another PIN, or a try on request ──▶ Down, or Drained if
//!                                                                                                        it was drained
//!    Down, Starting ── drain ──▶ Drained                 any ── remove ──▶ Removed
//! ```
//!
//! An *attempt* starts a worker process if there is none and runs the known-answer tests. The breaker decides when the next
//! attempt is due, and when the evidence against a member that is up takes it down.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use tracing::{error, info, warn};

use crate::error::{Failure, HsmError};
use crate::policy::breaker::{Breaker, Settings};
use crate::policy::pick::Latency;

/// Estimated time of a call before anything is known.
const FIRST_GUESS: Duration = Duration::from_millis(10);
/// Time after a failure without a further result, after which a member is tested.
const DOUBT: Duration = Duration::from_millis(300);

/// State of a member, as shown to people and in metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemberState {
    /// The member takes calls.
    Up,
    /// The member takes no calls after a fault. A fresh worker that passes the known-answer tests brings it up again.
    Down,
    /// A worker process is being started and tested.
    Probing,
    /// The member is down because a call hung in its module.
    Hung,
    /// An administrator drains the member: it finishes its calls and takes no new ones.
    Draining,
    /// The member was drained and has no calls left.
    Drained,
    /// The token refused the PIN. The PIN is not tried again until a different one is set or an administrator allows it.
    PinRefused,
    /// The member was removed or has not started yet.
    Off,
}

impl MemberState {
    /// All states.
    pub const ALL: [MemberState; 8] = [
        MemberState::Up,
        MemberState::Down,
        MemberState::Probing,
        MemberState::Hung,
        MemberState::Draining,
        MemberState::Drained,
        MemberState::PinRefused,
        MemberState::Off,
    ];

    /// Returns the state's name for tables, JSON and labels, such as `pin_refused`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            MemberState::Up => "up",
            MemberState::Down => "down",
            MemberState::Probing => "probing",
            MemberState::Hung => "hung",
            MemberState::Draining => "draining",
            MemberState::Drained => "drained",
            MemberState::PinRefused => "pin_refused",
            MemberState::Off => "off",
        }
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The last error that was the member's fault.
#[derive(Clone, Debug)]
pub struct LastError {
    /// The call and its return code, or a sentence.
    pub text: String,
    /// Time of the error.
    pub at: SystemTime,
    /// Action that an administrator must take; `None` if the fault may pass by itself or is unknown.
    pub remedy: Option<String>,
}

/// State of a member: see the diagram above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// `hung`: true if a call hung.
    Down {
        hung: bool,
    },
    Starting,
    Up,
    Draining,
    Drained,
    /// `drained`: true if the member was drained before.
    PinRefused {
        drained: bool,
    },
    Removed,
}

/// Events of a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// The breaker decides that an attempt is due.
    AttemptDue,
    /// A worker passed the known-answer tests.
    Passed,
    /// An attempt failed.
    AttemptFailed,
    /// A fault took the member out of service. `hung`: true if a call hangs.
    Fault { hung: bool },
    /// The token refused the PIN.
    PinRefused,
    /// A different PIN was set, or an administrator allows one more try.
    PinAllowed,
    /// An administrator drains the member.
    Drain,
    /// An administrator resumes the member. `worker`: true if the member's worker lives and passed its tests.
    Resume { worker: bool },
    /// No calls are in flight.
    Idle,
    /// The member is removed from the cluster.
    Remove,
}

/// Returns the state after an event; `None` if the event changes nothing in this state.
pub(crate) fn next(state: State, event: Event) -> Option<State> {
    use Event as E;
    use State as S;
    match (state, event) {
        (S::Removed, _) => None,
        (_, E::Remove) => Some(S::Removed),
        (S::Down { .. }, E::AttemptDue) => Some(S::Starting),
        (S::Starting, E::Passed) => Some(S::Up),
        (S::Starting, E::AttemptFailed) => Some(S::Down { hung: false }),
        (S::Starting | S::Up, E::Fault { hung }) => Some(S::Down { hung }),
        (S::Draining, E::Fault { .. }) => Some(S::Drained),
        (S::Down { .. } | S::Starting | S::Up, E::PinRefused) => Some(S::PinRefused { drained: false }),
        (S::Draining | S::Drained, E::PinRefused) => Some(S::PinRefused { drained: true }),
        (S::PinRefused { drained: false }, E::PinAllowed) => Some(S::Down { hung: false }),
        (S::PinRefused { drained: true }, E::PinAllowed) => Some(S::Drained),
        (S::PinRefused { drained: true }, E::Resume { .. }) => Some(S::PinRefused { drained: false }),
        (S::Up, E::Drain) => Some(S::Draining),
        (S::Down { .. } | S::Starting, E::Drain) => Some(S::Drained),
        (S::Draining, E::Resume { .. }) | (S::Drained, E::Resume { worker: true }) => Some(S::Up),
        (S::Drained, E::Resume { worker: false }) => Some(S::Down { hung: false }),
        (S::Draining, E::Idle) => Some(S::Drained),
        _ => None,
    }
}

/// One member's state and health. It is kept behind a lock, so every method is quick.
pub(crate) struct Machine {
    member: String,
    state: State,
    /// True if the member has a worker that passed the known-answer tests and has not ended since.
    worker: bool,
    /// True if the worker must be ended although the state would keep it: after a fault while the member drains or is
    /// drained.
    condemned: bool,
    /// True if the worker is lost and the reason is still to come.
    lost: bool,
    /// True if the loss of the worker took the member down and the log does not have the reason yet.
    unexplained: bool,
    breaker: Breaker,
    pub(crate) latency: Latency,
    /// Time at which the member came up or stopped serving, for people; attempts do not change it.
    since: SystemTime,
    /// Time at which the member stopped serving.
    down_since: Instant,
    last_error: Option<LastError>,
    /// Number of times that a fault took the member down.
    closings: u64,
    has_been_up: bool,
    /// True if an attempt has failed since the member went down.
    attempted_in_vain: bool,
    /// Time of the last failure, if there was no result since.
    doubt: Option<Instant>,
}

impl Machine {
    /// Creates the state of a new member, whose first attempt is due at once.
    pub(crate) fn new(member: &str, settings: Settings, now: Instant) -> Self {
        let mut breaker = Breaker::new(settings);
        breaker.force_open(now, 0.0);
        breaker.probe_now(now);
        Machine {
            member: member.to_owned(),
            state: State::Down { hung: false },
            worker: false,
            condemned: false,
            lost: false,
            unexplained: false,
            breaker,
            latency: Latency::new(FIRST_GUESS),
            since: SystemTime::now(),
            down_since: now,
            last_error: None,
            closings: 0,
            has_been_up: false,
            attempted_in_vain: false,
            doubt: None,
        }
    }

    /// Returns true if the member takes calls.
    pub(crate) fn serves(&self) -> bool {
        self.state == State::Up && self.worker
    }

    /// Returns true if an attempt is under way or will be made without an administrator.
    pub(crate) fn is_on_its_way(&self) -> bool {
        matches!(self.state, State::Down { .. } | State::Starting)
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.state == State::Removed
    }

    /// Returns true if a fault requires that the worker is ended.
    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned
    }

    pub(crate) fn is_pin_refused(&self) -> bool {
        matches!(self.state, State::PinRefused { .. })
    }

    /// Returns true if the worker is to be kept: the member serves, or would serve if an administrator resumed it.
    pub(crate) fn keeps_worker(&self) -> bool {
        matches!(self.state, State::Starting | State::Up | State::Draining | State::Drained) && !self.condemned
    }

    /// Returns the time of the fault, if a member that has served is restarting after one. Returns `None` once a fresh
    /// worker has failed too: the fault is then not limited to one worker.
    pub(crate) fn returning_since(&self) -> Option<Instant> {
        (self.has_been_up && self.is_on_its_way() && !self.attempted_in_vain).then_some(self.down_since)
    }

    /// Returns true if the member has a worker that passed the known-answer tests and has not ended since.
    pub(crate) fn has_proven_worker(&self) -> bool {
        self.worker
    }

    /// Applies an event; returns true if it changed the state.
    fn step(&mut self, event: Event) -> bool {
        let next = next(self.state, event);
        if let Some(next) = next {
            self.state = next;
        }
        next.is_some()
    }

    /// Records that a caller's call succeeded.
    pub(crate) fn succeeded(&mut self, took: Duration, now: Instant) {
        self.latency.observe(took, now);
        self.answered(now);
    }

    /// Records that the member answered and rejected the input.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.breaker.success(now);
        self.doubt = None;
    }

    /// Records a failure that is the member's fault; returns true if it took the member down.
    pub(crate) fn failed(&mut self, error: HsmError, took: Duration, now: Instant) -> bool {
        if error == HsmError::WrongAnswer {
            return self.fault(&error.into(), now);
        }
        self.latency.observe_failure(took, now);
        self.blame(&error.into());
        self.doubt = Some(now);
        // The breaker counts in every state that has a worker; only `Up` and `Draining` change by it.
        self.breaker.failure(now, fastrand::f64()) && self.went_down(&error.into(), now)
    }

    /// Takes the member down at once; returns true if it was up.
    pub(crate) fn fault(&mut self, failure: &Failure, now: Instant) -> bool {
        self.latency.observe_failure(Duration::ZERO, now);
        self.blame(failure);
        self.breaker.force_open(now, fastrand::f64());
        self.went_down(failure, now)
    }

    fn went_down(&mut self, failure: &Failure, now: Instant) -> bool {
        let down = self.stop(matches!(failure.error, HsmError::Hung(_)), now);
        if down {
            self.say_down(failure);
        }
        down
    }

    /// Records that the worker ended or broke the protocol, for a reason not known yet. Returns true if this took the
    /// member down. [`explain`](Self::explain) receives the reason.
    pub(crate) fn lost_worker(&mut self, now: Instant) -> bool {
        (self.worker, self.lost) = (false, true);
        if !matches!(self.state, State::Up | State::Draining) {
            return false;
        }
        self.latency.observe_failure(Duration::ZERO, now);
        self.breaker.force_open(now, fastrand::f64());
        let down = self.stop(false, now);
        self.unexplained |= down;
        down
    }

    /// Records why the worker was lost.
    pub(crate) fn explain(&mut self, failure: &Failure) {
        self.blame(failure);
        if std::mem::take(&mut self.unexplained) {
            self.say_down(failure);
        }
    }

    /// Records that a fresh worker was started: nothing known of the last one counts.
    pub(crate) fn fresh_worker(&mut self) {
        (self.worker, self.lost) = (false, false);
    }

    /// Records that the worker is being ended; returns true if this took the member down, which cannot serve without it.
    pub(crate) fn give_up_worker(&mut self, now: Instant) -> bool {
        let down = matches!(self.state, State::Up | State::Draining) && self.lost_worker(now);
        (self.worker, self.lost) = (false, false);
        down
    }

    /// Returns true if an attempt is under way.
    pub(crate) fn is_starting(&self) -> bool {
        self.state == State::Starting
    }

    pub(crate) fn has_lost_worker(&self) -> bool {
        self.lost
    }

    fn stop(&mut self, hung: bool, now: Instant) -> bool {
        (self.worker, self.condemned) = (false, true);
        let served = matches!(self.state, State::Up | State::Draining);
        if !self.step(Event::Fault { hung }) || !served {
            return false;
        }
        self.since = SystemTime::now();
        self.down_since = now;
        self.attempted_in_vain = false;
        self.closings += 1;
        true
    }

    fn say_down(&self, failure: &Failure) {
        let state = self.state(0);
        warn!(
            member = self.member, %state, error = %failure,
            "member is down: it gets no calls until a fresh worker process passes the known-answer tests"
        );
    }

    fn blame(&mut self, failure: &Failure) {
        let remedy = failure.error.remedy(&self.member);
        self.last_error = Some(LastError { text: failure.to_string(), at: SystemTime::now(), remedy });
    }

    /// Returns true once after each failure that was the last result for some time: the member must then be tested. While
    /// the picker prefers other members, callers alone would take long to show whether it recovered.
    pub(crate) fn is_in_doubt(&mut self, now: Instant) -> bool {
        let due = self.serves() && self.doubt.is_some_and(|at| now.saturating_duration_since(at) >= DOUBT);
        if due {
            self.doubt = None;
        }
        due
    }

    /// Returns the time of the next attempt, if one will be made.
    pub(crate) fn attempt_due(&self) -> Option<Instant> {
        match (self.state, self.breaker.state()) {
            (State::Down { .. }, crate::policy::breaker::State::Open { until }) => Some(until),
            _ => None,
        }
    }

    /// Begins an attempt if one is due; returns true if it did.
    pub(crate) fn begin_attempt(&mut self, now: Instant) -> bool {
        let begins = self.attempt_due().is_some() && self.breaker.may_probe(now) && self.step(Event::AttemptDue);
        if begins {
            // Facts about the last worker say nothing about the next one.
            (self.worker, self.condemned, self.lost) = (false, false, false);
        }
        begins
    }

    /// Brings forward the next attempt, because no other member serves or because a change may help.
    pub(crate) fn probe_now(&mut self, now: Instant) {
        self.breaker.probe_now(now);
    }

    /// Records that a worker passed the tests in `took`; returns true if the member came up. If the worker was lost
    /// meanwhile, the member does not come up.
    pub(crate) fn passed(&mut self, took: Duration, now: Instant) -> bool {
        if self.lost {
            return false;
        }
        self.breaker.probe_succeeded(now);
        self.worker = true;
        if !self.step(Event::Passed) {
            return false;
        }
        // The time of the tests is capped and counts as observed: the first operation of a worker is slower than later ones,
        // and a guess never fades. Without the cap, or as a guess, it would leave the member idle while others are faster.
        self.latency = Latency::new(FIRST_GUESS);
        self.latency.observe(took.min(FIRST_GUESS), now);
        self.doubt = None;
        self.since = SystemTime::now();
        let down = now.saturating_duration_since(self.down_since);
        if std::mem::replace(&mut self.has_been_up, true) {
            info!(
                member = self.member,
                state = %MemberState::Up,
                down_ms = down.as_millis(),
                "member is up again: it passed the known-answer tests"
            );
        } else {
            info!(member = self.member, state = %MemberState::Up, "member is up");
        }
        true
    }

    /// Returns true if the member has been up before.
    pub(crate) fn has_been_up(&self) -> bool {
        self.has_been_up
    }

    /// Records that an attempt failed.
    pub(crate) fn attempt_failed(&mut self, failure: &Failure, now: Instant) {
        if self.state == State::Starting && !self.has_been_up && self.last_error.is_none() {
            // Later attempts usually fail for the same reason, so they are not logged here.
            warn!(
                member = self.member, state = %MemberState::Down, error = %failure,
                "member does not come up; trying again"
            );
        }
        self.blame(failure);
        self.attempted_in_vain = true;
        self.breaker.probe_failed(now, fastrand::f64());
        self.step(Event::AttemptFailed);
    }

    /// Records that the token refused the PIN; returns true if this is new.
    pub(crate) fn pin_refused(&mut self, refused: HsmError) -> bool {
        let news = self.step(Event::PinRefused);
        if news {
            self.since = SystemTime::now();
            self.blame(&refused.into());
            error!(
                member = self.member, state = %MemberState::PinRefused, error = %refused,
                "THE TOKEN REFUSES THE PIN. It is not tried again, since tokens count and lock: the member is out until \
                 the configuration is reloaded with another one, or `claviger hsm probe` tries this one again"
            );
        }
        news
    }

    /// Allows one try of the PIN: a different PIN was set, or an administrator asks for it.
    pub(crate) fn allow_pin(&mut self, now: Instant) -> bool {
        let changed = self.step(Event::PinAllowed);
        if changed && self.is_on_its_way() {
            info!(member = self.member, state = %MemberState::Down, "the PIN is tried again, once");
            self.breaker.force_open(now, 0.0);
            self.breaker.probe_now(now);
        }
        changed
    }

    /// Drains the member or puts it back into service; returns true if that changed anything.
    pub(crate) fn drain(&mut self, drain: bool, now: Instant) -> bool {
        let changed = self.step(if drain { Event::Drain } else { Event::Resume { worker: self.worker } });
        if changed {
            self.since = SystemTime::now();
            if self.is_on_its_way() {
                self.breaker.force_open(now, 0.0);
                self.breaker.probe_now(now);
            }
        }
        changed
    }

    /// Records that nothing is in flight: a draining member is then drained.
    pub(crate) fn idle(&mut self) {
        if self.step(Event::Idle) {
            info!(member = self.member, state = %MemberState::Drained, "member's running operations have ended");
        }
    }

    /// Removes the member; returns true if it was not removed before.
    pub(crate) fn remove(&mut self) -> bool {
        let news = self.step(Event::Remove);
        if news {
            info!(member = self.member, state = %MemberState::Off, "member removed");
        }
        news
    }

    pub(crate) fn closings(&self) -> u64 {
        self.closings
    }

    pub(crate) fn since(&self) -> SystemTime {
        self.since
    }

    pub(crate) fn last_error(&self) -> Option<&LastError> {
        self.last_error.as_ref()
    }

    /// Returns the state to show. `stuck`: number of calls that hang in the worker.
    pub(crate) fn state(&self, stuck: usize) -> MemberState {
        match self.state {
            State::Down { hung } if hung || stuck > 0 => MemberState::Hung,
            State::Down { .. } => MemberState::Down,
            State::Starting => MemberState::Probing,
            State::Up => MemberState::Up,
            State::Draining => MemberState::Draining,
            State::Drained => MemberState::Drained,
            State::PinRefused { .. } => MemberState::PinRefused,
            State::Removed => MemberState::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::Function;
    use cryptoki::error::RvError;

    /// Checks every state with every event against the diagram.
    #[test]
    fn every_event_in_every_state() {
        use State as S;
        let states = [
            S::Down { hung: false },
            S::Down { hung: true },
            S::Starting,
            S::Up,
            S::Draining,
            S::Drained,
            S::PinRefused { drained: false },
            S::PinRefused { drained: true },
            S::Removed,
        ];
        let (down, hung) = (Some(S::Down { hung: false }), Some(S::Down { hung: true }));
        let removed = Some(S::Removed);
        let (refused, drained) = (Some(S::PinRefused { drained: false }), Some(S::PinRefused { drained: true }));
        let table: [(Event, [Option<State>; 9]); 12] = [
            (Event::AttemptDue, [Some(S::Starting), Some(S::Starting), None, None, None, None, None, None, None]),
            (Event::Passed, [None, None, Some(S::Up), None, None, None, None, None, None]),
            (Event::AttemptFailed, [None, None, down, None, None, None, None, None, None]),
            (Event::Fault { hung: false }, [None, None, down, down, Some(S::Drained), None, None, None, None]),
            (Event::Fault { hung: true }, [None, None, hung, hung, Some(S::Drained), None, None, None, None]),
            (Event::PinRefused, [refused, refused, refused, refused, drained, drained, None, None, None]),
            (Event::PinAllowed, [None, None, None, None, None, None, down, Some(S::Drained), None]),
            (
                Event::Drain,
                [Some(S::Drained), Some(S::Drained), Some(S::Drained), Some(S::Draining), None, None, None, None, None],
            ),
            (Event::Resume { worker: true }, [None, None, None, None, Some(S::Up), Some(S::Up), None, refused, None]),
            (Event::Resume { worker: false }, [None, None, None, None, Some(S::Up), down, None, refused, None]),
            (Event::Idle, [None, None, None, None, Some(S::Drained), None, None, None, None]),
            (Event::Remove, [removed, removed, removed, removed, removed, removed, removed, removed, None]),
        ];
        for (event, expected) in table {
            for (state, expected) in states.into_iter().zip(expected) {
                assert_eq!(next(state, event), expected, "{event:?} in {state:?}");
            }
        }
    }

    fn up(now: Instant) -> Machine {
        let mut machine = Machine::new("m", Settings::default(), now);
        assert!(machine.begin_attempt(now) && machine.passed(Duration::from_millis(1), now));
        machine
    }

    #[test]
    fn a_fault_is_followed_by_an_attempt_soon() {
        let start = Instant::now();
        let mut machine = up(start);
        let now = start + Duration::from_secs(20);
        let crash = Failure::from(HsmError::Worker(crate::error::WorkerFault::Signal(11)));
        assert!(machine.fault(&crash, now) && !machine.fault(&crash, now), "it goes down once");
        assert_eq!((machine.state(0), machine.closings()), (MemberState::Down, 1));
        assert!(!machine.begin_attempt(now), "not at once: a module that crashes at its start would cost a processor");
        let due = machine.attempt_due();
        assert!(due.is_some_and(|due| due <= now + Duration::from_millis(100)));
        assert_eq!(machine.returning_since(), Some(now));
        assert!(due.is_some_and(|due| machine.begin_attempt(due)));
        assert_eq!(machine.state(0), MemberState::Probing);
    }

    #[test]
    fn a_refused_pin_is_not_tried_by_itself() {
        let now = Instant::now();
        let mut machine = Machine::new("m", Settings::default(), now);
        assert!(machine.begin_attempt(now));
        let refused = HsmError::new(Function::Login, RvError::PinIncorrect);
        assert!(machine.pin_refused(refused) && !machine.pin_refused(refused));
        machine.attempt_failed(&refused.into(), now);
        assert_eq!(machine.state(0), MemberState::PinRefused);
        let later = now + Duration::from_secs(3600);
        machine.probe_now(later);
        assert!(machine.attempt_due().is_none() && !machine.begin_attempt(later));
        assert!(!machine.drain(true, later), "draining does not make it forget");
        assert!(machine.allow_pin(later) && machine.begin_attempt(later));
    }

    #[test]
    fn a_drained_member_whose_pin_was_refused_stays_drained() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.drain(true, now));
        machine.idle();
        assert!(machine.pin_refused(HsmError::new(Function::Login, RvError::PinIncorrect)));
        assert!(machine.allow_pin(now));
        assert_eq!((machine.state(0), machine.attempt_due()), (MemberState::Drained, None));
        machine.give_up_worker(now);
        assert!(machine.drain(false, now) && machine.begin_attempt(now + Duration::from_millis(50)));
    }

    #[test]
    fn a_drained_member_whose_worker_died_is_started_when_it_is_resumed() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.drain(true, now));
        assert_eq!(machine.state(0), MemberState::Draining);
        assert!(machine.lost_worker(now) && !machine.lost_worker(now));
        assert_eq!(machine.state(0), MemberState::Drained);
        assert!(machine.attempt_due().is_none());
        assert!(machine.drain(false, now) && machine.begin_attempt(now + Duration::from_millis(50)));
    }

    #[test]
    fn a_worker_that_is_lost_serves_in_no_state() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.serves() && machine.lost_worker(now) && !machine.serves());
        assert_eq!(machine.returning_since(), Some(now), "known before the calls that it had fail");
        let mut drained = up(now);
        assert!(drained.drain(true, now));
        drained.idle();
        assert!(!drained.lost_worker(now), "it did not serve");
        assert!(drained.drain(false, now) && !drained.serves(), "there is nothing to serve with");
        assert!(drained.is_on_its_way());
    }

    #[test]
    fn a_drained_member_with_its_worker_serves_again_at_once() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.drain(true, now));
        machine.idle();
        assert_eq!(machine.state(0), MemberState::Drained);
        assert!(machine.drain(false, now) && machine.serves());
    }

    #[test]
    fn a_worker_that_fails_while_its_member_is_drained_is_not_kept() {
        let now = Instant::now();
        for idle in [false, true] {
            let mut machine = up(now);
            assert!(machine.drain(true, now));
            if idle {
                machine.idle();
            }
            machine.fault(&HsmError::Hung(crate::operation::Operation::Keys).into(), now);
            assert_eq!(machine.state(0), MemberState::Drained);
            assert!(!machine.keeps_worker());
            assert!(machine.drain(false, now) && machine.begin_attempt(now + Duration::from_millis(50)));
            assert!(machine.keeps_worker());
        }
    }

    #[test]
    fn a_member_that_was_drained_for_a_moment_goes_down_by_evidence_as_before() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.drain(true, now) && machine.drain(false, now) && machine.serves());
        let error = HsmError::new(Function::Decrypt, RvError::DeviceError);
        let down = (0..1_000).any(|ms| machine.failed(error, Duration::ZERO, now + Duration::from_millis(ms)));
        assert!(down && machine.state(0) == MemberState::Down);
    }

    #[test]
    fn a_second_hang_ends_its_worker_like_the_first() {
        let mut now = Instant::now();
        let mut machine = up(now);
        for _ in 0..2 {
            now += Duration::from_secs(60);
            assert!(machine.fault(&HsmError::Hung(crate::operation::Operation::Sign).into(), now));
            assert!(!machine.keeps_worker() && !machine.has_lost_worker());
            assert!(!machine.give_up_worker(now));
            // The worker's socket ends when the process is killed.
            assert!(!machine.lost_worker(now));
            now += Duration::from_secs(60);
            assert!(machine.begin_attempt(now) && machine.passed(Duration::from_millis(1), now));
            assert!(machine.serves());
        }
    }

    #[test]
    fn a_worker_that_is_lost_at_its_last_test_brings_nobody_up() {
        let now = Instant::now();
        let mut machine = Machine::new("m", Settings::default(), now);
        assert!(machine.begin_attempt(now) && !machine.lost_worker(now));
        assert!(!machine.passed(Duration::from_millis(1), now) && !machine.serves() && machine.is_starting());
    }

    #[test]
    fn a_worker_that_is_given_up_takes_its_member_down() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.give_up_worker(now) && machine.state(0) == MemberState::Down);
        assert!(!machine.give_up_worker(now));
    }

    #[test]
    fn a_pin_that_is_refused_while_the_member_is_down_is_not_tried_again() {
        let now = Instant::now();
        let mut machine = up(now);
        assert!(machine.lost_worker(now) && machine.pin_refused(HsmError::new(Function::Login, RvError::PinIncorrect)));
        assert!(machine.attempt_due().is_none());
    }
}
