//! Whether a member gets calls: its breaker, its latency, and what an administrator said. Every change is logged here, once.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use tracing::{error, info, warn};

use crate::error::HsmError;
use crate::policy::breaker::{Breaker, Settings, State};
use crate::policy::pick::Latency;

/// What a member is expected to take for a call before anything is known.
const FIRST_GUESS: Duration = Duration::from_millis(10);

/// How long a member that failed may go unheard of before it is asked how it is.
const DOUBT: Duration = Duration::from_millis(300);

/// What a member is doing, for people and metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemberState {
    /// Takes calls.
    Up,
    /// Closed after faults; a known-good probe will open it again.
    Down,
    /// A known-good probe is under way to see whether it can be opened.
    Probing,
    /// Closed because calls hang in its module.
    Hung,
    /// Finishes what runs, on an administrator's word, and takes nothing new.
    Draining,
    /// Nothing runs any more after `Draining`.
    Drained,
    /// The token refused the PIN. It is not tried again until there is another one, or an administrator says so.
    PinRefused,
    /// Not started yet, or closed for good.
    Off,
}

impl MemberState {
    /// Every state there is.
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

    /// A word for tables, JSON and labels: `pin_refused`.
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

/// What a member was last blamed for.
#[derive(Clone, Debug)]
pub struct LastError {
    /// The call and its return code, or a sentence.
    pub text: String,
    /// When.
    pub at: SystemTime,
    /// What an administrator has to do about it; `None`: it may pass by itself, or is not known.
    pub remedy: Option<String>,
}

/// One member's health. Behind a lock; every method is quick.
pub(crate) struct Health {
    member: String,
    breaker: Breaker,
    pub(crate) latency: Latency,
    pub(crate) pin_refused: bool,
    draining: bool,
    said_drained: bool,
    closed: bool,
    /// Since when it is what it is: up, or not.
    since: SystemTime,
    down_since: Instant,
    pub(crate) last_error: Option<LastError>,
    /// How often it was closed for a fault.
    closings: u64,
    has_been_up: bool,
    /// For which `since` it was said that the module does not come back.
    said_module: Option<SystemTime>,
    /// For which `since` it was said that other members keep the module from being initialised again.
    said_in_use: Option<SystemTime>,
    /// For which `since` the module was initialised anew.
    renewed_for: Option<SystemTime>,
    /// When it last failed, if nothing came back since.
    doubt: Option<Instant>,
}

impl Health {
    /// Of a member that has proved nothing yet: it opens with its first good probe.
    pub(crate) fn new(member: &str, now: Instant) -> Self {
        let mut breaker = Breaker::new(Settings::default());
        breaker.force_open(now, 0.0);
        Health {
            member: member.to_owned(),
            breaker,
            latency: Latency::new(FIRST_GUESS),
            pin_refused: false,
            draining: false,
            said_drained: false,
            closed: false,
            since: SystemTime::now(),
            down_since: now,
            last_error: None,
            closings: 0,
            has_been_up: false,
            said_module: None,
            said_in_use: None,
            renewed_for: None,
            doubt: None,
        }
    }

    pub(crate) fn is_able(&self) -> bool {
        self.is_up() && !self.draining
    }

    /// Up, whether or not an administrator wants it used.
    pub(crate) fn is_up(&self) -> bool {
        self.breaker.state() == State::Closed && !self.pin_refused && !self.closed
    }

    pub(crate) fn succeeded(&mut self, took: Duration, now: Instant) {
        self.latency.observe(took, now);
        self.answered(now);
    }

    /// The member did what it was asked for, and the input was refused.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.breaker.success(now);
        self.doubt = None;
    }

    /// A failure that the member is to blame for; whether that closed it.
    pub(crate) fn failed(&mut self, error: &HsmError, took: Duration, now: Instant) -> bool {
        self.latency.observe_failure(took, now);
        self.blame(error);
        let closed = if *error == HsmError::WrongAnswer {
            self.breaker.force_open(now, fastrand::f64())
        } else {
            self.breaker.failure(now, fastrand::f64())
        };
        self.doubt = Some(now);
        if closed {
            self.say_closed(error, now);
        }
        closed
    }

    /// Whether a member that is up is to show that it works: who has failed is avoided as long as others idle, so that it takes
    /// long until calls find out. Once for a failure.
    pub(crate) fn is_in_doubt(&mut self, now: Instant) -> bool {
        let due = self.is_up() && self.doubt.is_some_and(|at| now.saturating_duration_since(at) >= DOUBT);
        if due {
            self.doubt = None;
        }
        due
    }

    /// Closes the member at once; whether it was open.
    pub(crate) fn force_open(&mut self, error: &HsmError, now: Instant) -> bool {
        self.latency.observe_failure(Duration::ZERO, now);
        self.blame(error);
        let closed = self.breaker.force_open(now, fastrand::f64());
        if closed {
            self.say_closed(error, now);
        }
        closed
    }

    fn blame(&mut self, error: &HsmError) {
        let remedy = error.remedy(&self.member);
        self.last_error = Some(LastError { text: error.to_string(), at: SystemTime::now(), remedy });
    }

    fn say_closed(&mut self, error: &HsmError, now: Instant) {
        self.since = SystemTime::now();
        self.down_since = now;
        self.closings += 1;
        let state = if matches!(error, HsmError::Hung { .. }) { MemberState::Hung } else { MemberState::Down };
        warn!(member = self.member, %state, %error, "member is closed: it gets no calls until a probe shows that it works");
    }

    /// Whether the caller is to probe now, and to tell how that ended.
    pub(crate) fn may_probe(&mut self, now: Instant) -> bool {
        !self.pin_refused && !self.closed && !self.draining && self.breaker.may_probe(now)
    }

    /// Lets the next probe come soon: nobody else serves, or something has changed that may help.
    pub(crate) fn probe_now(&mut self, now: Instant) {
        self.breaker.probe_now(now);
    }

    pub(crate) fn probed(&mut self, result: Result<(), &HsmError>, took: Duration, now: Instant) {
        match result {
            Ok(()) => {
                let was_probing = self.breaker.state() == State::Probing;
                self.breaker.probe_succeeded(now);
                if was_probing && self.is_up() {
                    // A probe opens a session as well, which calls do not, and a guess never fades: as either, its time
                    // would leave the member idle for as long as others are faster than that.
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
                            "member is open again: its probe passed"
                        );
                    } else {
                        info!(member = self.member, state = %MemberState::Up, "member is up");
                    }
                }
            }
            Err(error) => {
                // The first probe of all tells why a member does not come up; later ones repeat themselves.
                if !self.has_been_up && self.last_error.is_none() {
                    warn!(
                        member = self.member, state = %MemberState::Down, %error,
                        "member does not come up; it is tried again and again"
                    );
                }
                self.blame(error);
                self.breaker.probe_failed(now, fastrand::f64());
            }
        }
    }

    /// The module is as new. The first time after the member was closed that may be all it takes, and the next probe comes soon;
    /// when it did not help, renewal and probe keep their distance, or a device that is away would cost a processor.
    pub(crate) fn module_renewed(&mut self, now: Instant) {
        if self.renewed_for.replace(self.since) != Some(self.since) {
            self.probe_now(now);
        }
    }

    /// The module cannot be initialised anew. Said once for each time that the member is closed.
    pub(crate) fn module_failed(&mut self, error: &HsmError) {
        if self.said_module != Some(self.since) {
            self.said_module = Some(self.since);
            warn!(member = self.member, %error, "the module cannot be initialised anew yet; it is tried again and again");
        }
        self.blame(error);
    }

    /// The member's token is in no slot, and its module is not initialised again while other members serve with it. Said once
    /// for each time that the member is closed.
    pub(crate) fn module_in_use(&mut self, by: &str) {
        let remedy = format!(
            "once the token is there, restart the daemon: a module finds new tokens when it is initialised, and {by} serves \
             with this one"
        );
        if self.said_in_use != Some(self.since) {
            self.said_in_use = Some(self.since);
            warn!(member = self.member, "the member's token is in no slot of its module; {remedy}");
        }
        if let Some(error) = &mut self.last_error {
            error.remedy = Some(remedy);
        }
    }

    pub(crate) fn refuse_pin(&mut self, refused: &HsmError) {
        if !std::mem::replace(&mut self.pin_refused, true) {
            self.since = SystemTime::now();
            self.blame(refused);
            error!(
                member = self.member, state = %MemberState::PinRefused, error = %refused,
                "THE TOKEN REFUSES THE PIN. It is not tried again, since tokens count and lock: the member is out until \
                 the configuration is reloaded with another one, or `claviger hsm probe` tries this one again"
            );
        }
    }

    /// There is another PIN, or an administrator says so: it may be tried, once.
    pub(crate) fn allow_pin(&mut self, now: Instant) {
        if std::mem::replace(&mut self.pin_refused, false) {
            info!(member = self.member, state = %MemberState::Down, "the PIN is tried again, once");
            self.probe_now(now);
        }
    }

    /// Whether this changed anything.
    pub(crate) fn drain(&mut self, drain: bool, now: Instant) -> bool {
        let changed = self.draining != drain;
        self.draining = drain;
        if changed {
            self.since = SystemTime::now();
            self.probe_now(now);
            self.said_drained = false;
        }
        changed
    }

    /// Says once that nothing runs any more on a member that is drained.
    pub(crate) fn say_drained(&mut self, in_flight: usize) {
        if self.draining && in_flight == 0 && !std::mem::replace(&mut self.said_drained, true) {
            info!(member = self.member, state = %MemberState::Drained, "member has finished what it had");
        }
    }

    pub(crate) fn close(&mut self) {
        self.closed = true;
        info!(member = self.member, state = %MemberState::Off, "member is let go of");
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn closings(&self) -> u64 {
        self.closings
    }

    pub(crate) fn since(&self) -> SystemTime {
        self.since
    }

    /// Whether a probe is under way.
    pub(crate) fn is_probing(&self) -> bool {
        self.breaker.state() == State::Probing
    }

    /// The state, given how many calls are in flight and how many threads hang.
    pub(crate) fn state(&self, in_flight: usize, stuck: usize) -> MemberState {
        match self.breaker.state() {
            _ if self.closed => MemberState::Off,
            _ if self.pin_refused => MemberState::PinRefused,
            _ if self.draining && in_flight > 0 => MemberState::Draining,
            _ if self.draining => MemberState::Drained,
            State::Closed => MemberState::Up,
            _ if stuck > 0 => MemberState::Hung,
            State::Probing => MemberState::Probing,
            State::Open { .. } => MemberState::Down,
        }
    }
}
