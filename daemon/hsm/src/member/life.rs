//! The life of a member, as one task: start a worker, test it, let it serve until a fault, end it, and repeat.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use claviger_process::lock::{lock, unpoisoned};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::conversation::{Conversation, News};
use super::outstanding::Limits;
use super::parts::{END_TIMEOUT, MOST_NOTES, Member, START_TIMEOUT};
use super::places::Talk;
use super::process::{Environment, Process};
use crate::error::{Failure, HsmError, WorkerFault, class};
use crate::event::Event;
use crate::fault::FaultOwner;
use crate::job::Job;
use crate::link::{Cost, DaemonEnd, Level, Report, Request, Start};
use crate::operation::Operation;
use crate::pin_tries::PinTries;
use crate::standstill;

/// Time limit for reading the last reports of a worker that has ended.
const LAST_REPORTS: Duration = Duration::from_millis(100);
/// Time limit for learning why a worker was lost.
const REASON: Duration = Duration::from_secs(1);
/// Time that a worker gets to finalise its module when its member gives it up. Its successor starts after that.
const FINISH: Duration = Duration::from_millis(250);

/// The task that reads from a worker sends the reason for the worker's end, unless the task panicked.
fn lost(read: Result<Failure, oneshot::error::RecvError>) -> Failure {
    read.unwrap_or_else(|_| HsmError::Worker(WorkerFault::Gone).into())
}

/// What ends the wait for the next attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// An attempt has begun.
    Attempt,
    /// The member's worker must be ended: a fault condemned it, or the token refused the PIN.
    Unwanted,
    /// The member was removed from the cluster.
    Removed,
}

/// The way in which the service of a worker ended.
enum End {
    /// The attempt failed before the worker served.
    AttemptFailed(Failure),
    /// The worker ended or broke the protocol.
    Broken(Failure),
    /// The member gives the worker up: after a fault or a refused PIN.
    Unwanted,
    /// The member was removed from the cluster.
    Removed,
}

impl Member {
    /// Starts and ends workers until the member is removed.
    pub(crate) async fn live(self: Arc<Self>) {
        while self.next_turn(false).await == Turn::Attempt {
            // Each worker is served in a task of its own, so that a panic costs the worker, not the member.
            let member = Arc::clone(&self);
            let attempt = tokio::spawn(async move { member.attempt().await });
            if attempt.await.is_err_and(|error| error.is_panic()) {
                self.attempt_panicked();
            }
        }
    }

    async fn attempt(self: Arc<Self>) {
        match self.start_process() {
            Ok((process, talk)) => self.serve(process, talk).await,
            Err(failure) => self.attempt_failed(&failure),
        }
    }

    /// Handles a panic in an attempt. The panic dropped the process, which killed it.
    fn attempt_panicked(&self) {
        let failure = Failure::new(HsmError::Worker(WorkerFault::Gone), "the daemon's task for it panicked");
        error!(member = &*self.name, "the task that serves the member panicked; the member gets a fresh worker");
        *lock(&self.talk) = None;
        *lock(&self.worker_pid) = None;
        self.lost_worker(self.generation());
        self.machine().explain(&failure);
        self.give_up_worker();
        self.attempt_failed(&failure);
    }

    fn give_up_worker(&self) {
        if self.change(|machine| machine.give_up_worker(standstill::now())) {
            self.observe(Event::Down);
        }
    }

    /// Waits until the member has to do something. `has_worker`: true if a worker that did not pass the tests is kept. This
    /// is one function, because a change of the state wakes one waiter only.
    async fn next_turn(&self, has_worker: bool) -> Turn {
        loop {
            let due = {
                let mut machine = self.machine();
                if machine.is_removed() {
                    return Turn::Removed;
                }
                // Checked before an attempt begins, which makes the machine forget that the worker was condemned.
                if has_worker && (machine.is_condemned() || machine.is_pin_refused()) {
                    return Turn::Unwanted;
                }
                if machine.begin_attempt(standstill::now()) {
                    self.begun.fetch_add(1, Ordering::AcqRel);
                    return Turn::Attempt;
                }
                machine.attempt_due()
            };
            match due {
                Some(due) => tokio::select! {
                    () = standstill::sleep_until(due) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    async fn until_removed(&self) {
        while !self.machine().is_removed() {
            self.changed.notified().await;
        }
    }

    /// Waits until the member gives its worker up.
    async fn until_unwanted(&self) -> End {
        let mut told_by = None;
        loop {
            let lost = {
                let machine = self.machine();
                if machine.is_removed() {
                    return End::Removed;
                }
                let lost = machine.has_lost_worker();
                if !lost && !machine.keeps_worker() {
                    return End::Unwanted;
                }
                lost
            };
            if !lost {
                told_by = None;
                self.changed.notified().await;
                continue;
            }
            // A lost worker ends for a reason that the reader reports in a moment. Without such a report the worker is
            // ended all the same.
            let by = *told_by.get_or_insert_with(|| standstill::now() + REASON);
            if standstill::timeout_at(by, self.changed.notified()).await.is_err() {
                return End::Broken(HsmError::Worker(WorkerFault::Gone).into());
            }
        }
    }

    fn start_process(&self) -> Result<(Process, Talk), Failure> {
        let not_started =
            |error: std::io::Error| Failure::new(HsmError::Worker(WorkerFault::NotStarted), error.to_string());
        let (process, socket) = {
            let hidden = unpoisoned(self.hidden.read());
            let environment = Environment { hidden: &hidden, set: &self.config.env };
            (self.launch)(&self.name, environment).map_err(not_started)?
        };
        let end = DaemonEnd::new(socket).map_err(not_started)?;
        let number = {
            // The number changes under the lock, so that no fault of the last worker is counted against this one.
            let mut machine = self.machine();
            machine.fresh_worker();
            lock(&self.credibility).fresh_worker();
            self.workers.fetch_add(1, Ordering::AcqRel) + 1
        };
        Ok((process, Arc::new(Conversation::new(end, number))))
    }

    /// Starts and tests a worker, lets it serve, and ends it.
    async fn serve(self: &Arc<Self>, mut process: Process, talk: Talk) {
        *lock(&self.worker_pid) = process.pid();
        let (broken, mut ended) = oneshot::channel();
        let reader = tokio::spawn({
            let (member, talk) = (Arc::clone(self), Arc::clone(&talk));
            async move {
                let failure = talk.read(|news| member.hear(&talk, news)).await;
                // In this order: before callers are told, the member no longer serves and the details of the failure are
                // known.
                member.lost_worker(talk.number);
                let error = failure.error;
                let _ = broken.send(failure);
                talk.fail(error);
            }
        });
        let end = self.serve_until_end(&talk, &mut process, &mut ended).await;
        self.give_up_worker();
        *lock(&self.talk) = None;
        let end = match end {
            End::Broken(failure) => End::Broken(how_it_ended(&mut process, failure).await),
            End::AttemptFailed(failure) => {
                // If the module works otherwise, it is finalised: some modules keep a record of their users outside the
                // process.
                if talk.is_idle() {
                    finish(&talk, &mut process).await;
                }
                End::AttemptFailed(how_it_ended(&mut process, failure).await)
            }
            End::Unwanted => {
                self.let_calls_finish(&talk).await;
                if talk.is_idle() {
                    finish(&talk, &mut process).await;
                }
                End::Unwanted
            }
            End::Removed => {
                talk.finish();
                if process.wait(END_TIMEOUT).await.is_none() {
                    warn!(member = &*self.name, "the worker process does not end; it is killed");
                }
                End::Removed
            }
        };
        process.kill().await;
        *lock(&self.worker_pid) = None;
        // Waits for the reader's end: its news about this worker must not change the state once the next worker runs.
        reader.abort();
        let _ = reader.await;
        self.usage.ended();
        talk.fail(HsmError::Worker(WorkerFault::Gone));
        (0..talk.sessions()).for_each(|_| self.observe(Event::SessionClosed));
        match end {
            End::AttemptFailed(failure) => self.attempt_failed(&failure),
            End::Broken(failure) if self.machine().is_starting() => self.attempt_failed(&failure),
            End::Broken(failure) => self.machine().explain(&failure),
            End::Unwanted | End::Removed => {}
        }
    }

    /// Marks the worker of this number as lost, for a reason not known yet. Called before callers are told, so that a
    /// caller that picks again finds this member restarting.
    pub(crate) fn lost_worker(&self, number: u64) {
        if self.change(|machine| number == self.generation() && machine.lost_worker(standstill::now())) {
            self.observe(Event::Down);
        }
    }

    /// Waits for the end of the conversation or of the process: a program started by the library may keep the socket open.
    async fn until_lost(&self, talk: &Talk, process: &mut Process, ended: &mut oneshot::Receiver<Failure>) -> Failure {
        let fault = tokio::select! {
            biased;
            read = &mut *ended => return lost(read),
            fault = process.ended() => fault,
        };
        // The last reports are still read, because they may contain the reason.
        let read = standstill::timeout(LAST_REPORTS, ended).await;
        self.lost_worker(talk.number);
        match read {
            Ok(Ok(failure)) if failure.error != HsmError::Worker(WorkerFault::Gone) => failure,
            _ => HsmError::Worker(fault).into(),
        }
    }

    async fn serve_until_end(&self, talk: &Talk, process: &mut Process, ended: &mut oneshot::Receiver<Failure>) -> End {
        let started = tokio::select! {
            // Polled first, because it has details that a failed call lacks.
            biased;
            failure = self.until_lost(talk, process, ended) => Err(failure),
            started = self.start_worker(talk) => started,
            () = self.until_removed() => return End::Removed,
        };
        let pin_number = match started {
            Ok(pin_number) => pin_number,
            Err(failure) => return End::AttemptFailed(failure),
        };
        // From here on the member's keys can be managed, even if it lacks some that the tests need.
        *lock(&self.talk) = Some(Arc::clone(talk));
        loop {
            let tested = tokio::select! {
                biased;
                failure = self.until_lost(talk, process, ended) => Err(failure),
                tested = async {
                    self.tell_newer_pin(talk, pin_number).await;
                    self.test_all(talk).await
                } => tested.map_err(Failure::from),
                () = self.until_removed() => return End::Removed,
            };
            match tested {
                Ok(took) => break self.came_up(took),
                Err(failure) if failure.error == HsmError::NoSuchKey => self.attempt_failed(&failure),
                Err(failure) => return End::AttemptFailed(failure),
            }
            tokio::select! {
                failure = self.until_lost(talk, process, ended) => return End::Broken(failure),
                turn = self.next_turn(true) => match turn {
                    Turn::Attempt => {}
                    Turn::Unwanted => return End::Unwanted,
                    Turn::Removed => return End::Removed,
                },
            }
        }
        tokio::select! {
            failure = self.until_lost(talk, process, ended) => End::Broken(failure),
            end = self.until_unwanted() => end,
        }
    }

    /// Sends the worker a PIN that was set while the worker started with an older one. The check comes after callers can
    /// reach the worker, and [`set_pin`](Self::set_pin) does both in the opposite order, so that one of the two sees the
    /// other.
    async fn tell_newer_pin(&self, talk: &Talk, started_with: u64) {
        let newer = {
            let pin = lock(&self.pin);
            (pin.number != started_with).then(|| (pin.number, pin.pin.clone()))
        };
        if let Some((number, pin)) = newer
            && let Ok(job) = Job::new(&Request::SetPin(number, pin))
        {
            let _ = self.own_call(talk, &job).await;
        }
    }

    /// Makes the first call: the worker loads its module, logs in and opens its first session. Returns the number of the
    /// PIN that the worker logs in with.
    async fn start_worker(&self, talk: &Talk) -> Result<u64, Failure> {
        let (pin, pin_number, may_use_final_try) = {
            let pin = lock(&self.pin);
            (pin.pin.clone(), pin.number, pin.may_use_final_try)
        };
        let start = Start {
            module: self.config.module.clone(),
            token: self.config.token.clone(),
            pin,
            sessions: u32::try_from(self.config.sessions.max(1)).unwrap_or(u32::MAX),
            may_use_final_try,
            pin_number,
        };
        let job = Job::new(&Request::Start(start))?;
        let limits = Limits { share: START_TIMEOUT, watchdog: START_TIMEOUT };
        let deadline = standstill::now() + START_TIMEOUT;
        match self.exchange(talk, &job, self.hold_directly(), deadline, limits).await {
            Ok(reply) => Ok(reply.result.map(|_| pin_number)?),
            Err(HsmError::Deadline) => Err(HsmError::Worker(WorkerFault::StartHangs).into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Records that the worker passed the tests.
    fn came_up(&self, took: Duration) {
        lock(&self.pin).said = PinTries::Full;
        let (again, up) = self.change(|machine| (machine.has_been_up(), machine.passed(took, standstill::now())));
        if up && again {
            self.observe(Event::ModuleRenewed);
        }
        if self.machine().is_starting() {
            // The worker was lost in the last moment; the reason follows.
            return;
        }
        self.attempts.send_modify(|(count, last)| (*count, *last) = (*count + 1, None));
    }

    fn attempt_failed(&self, failure: &Failure) {
        if let HsmError::PinNotTried(tries) = failure.error {
            self.say_pin_not_tried(tries);
        }
        self.change(|machine| machine.attempt_failed(failure, standstill::now()));
        self.attempts.send_modify(|(count, last)| (*count, *last) = (*count + 1, Some(failure.clone())));
    }

    fn say_pin_not_tried(&self, tries: PinTries) {
        let news = std::mem::replace(&mut lock(&self.pin).said, tries) != tries;
        if news {
            let (meaning, remedy) = (tries.meaning(), tries.remedy(&self.name));
            error!(member = &*self.name, token = %self.config.token, "THE PIN IS NOT TRIED: {meaning}. {remedy}");
        }
    }

    /// Before a worker is killed, lets its calls finish until their callers have been sent to other members.
    async fn let_calls_finish(&self, talk: &Talk) {
        talk.stop_sending();
        let until = standstill::now() + self.watchdog;
        loop {
            let now = standstill::now();
            talk.look(now).0.into_iter().for_each(|late| late.tell());
            if talk.is_stuck() || now >= until {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Handles what a worker sends besides its replies.
    fn hear(&self, talk: &Talk, news: News<'_>) {
        match news {
            News::Replies(jobs) => self.observe(Event::Batch { jobs }),
            News::Report(Report::Login) => self.observe(Event::Login),
            News::Report(Report::KeySearch) => self.observe(Event::KeySearch),
            News::Report(Report::SessionOpened { took, result }) => {
                self.book_call(Operation::Open, class(&result), Cost { took, ..Cost::default() });
                match result {
                    Ok(()) => {
                        if let Some(queue) = self.queue() {
                            queue.session_opened();
                        }
                        self.granted.fetch_max(talk.sessions(), Ordering::AcqRel);
                        self.observe(Event::SessionOpened);
                    }
                    // A token that grants fewer sessions than configured serves with those; the worker asks for more from
                    // time to time.
                    Err(error) if talk.sessions() == 0 && error.fault().owner == FaultOwner::Member => {
                        self.failed(error, took, standstill::now());
                    }
                    Err(_) => {}
                }
            }
            News::Report(Report::SessionClosed) => self.observe(Event::SessionClosed),
            News::Report(Report::FewSessions { given }) => {
                let given = given as usize;
                if self.granted.swap(given, Ordering::AcqRel) != given {
                    warn!(
                        member = &*self.name,
                        sessions = given,
                        wanted = self.config.sessions,
                        "the token gives fewer sessions than configured; continuing with fewer"
                    );
                }
            }
            News::Report(Report::Note { level, text }) => self.note(level, text),
            News::Report(Report::PinRefused { number, error }) => self.refused_pin(number, error),
            News::Report(Report::Usage { processor, resident }) => self.usage.reported(processor, resident),
            // The conversation handles these itself.
            News::Report(Report::Reply { .. } | Report::StartFailed(_)) => {}
        }
    }

    /// Logs a worker's note about its token; each note is logged once.
    fn note(&self, level: Level, text: &str) {
        let mut notes = lock(&self.notes);
        if notes.iter().any(|said| said == text) || notes.len() >= MOST_NOTES {
            return;
        }
        notes.push(text.to_owned());
        let (member, token) = (&*self.name, &self.config.token);
        match level {
            Level::Info => info!(member, %token, "{text}"),
            Level::Warn => warn!(member, %token, "{text}"),
            Level::Error => error!(member, %token, "{text}"),
        }
    }
}

/// Lets a worker finalise its module while no call runs.
async fn finish(talk: &Talk, process: &mut Process) {
    talk.finish();
    process.wait(FINISH).await;
}

/// Replaces the failure "the worker ended" by the process's exit status, which is more precise.
async fn how_it_ended(process: &mut Process, failure: Failure) -> Failure {
    if failure.error != HsmError::Worker(WorkerFault::Gone) {
        return failure;
    }
    let how = process.wait(Duration::from_millis(50)).await;
    how.map_or(failure, |fault| HsmError::Worker(fault).into())
}
