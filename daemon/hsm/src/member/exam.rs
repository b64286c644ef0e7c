//! Known-answer tests of a member: at the start of its worker, when it is idle, on request, and when a result is doubtful.
//!
//! Doubtful results wait for an *exam*, one or two tests that begin after the result. Results that become doubtful before an
//! exam begins share it:
//!
//! ```text
//!  doubtful result ──▶ waits for its turn ──▶ begins ──▶ tests run ──▶ evidence is counted ──▶ verdict to all who wait
//!                          ▲                               ▲
//!  doubtful result ────────┘                               └── a result that becomes doubtful now needs the next exam
//! ```
//!
//! An exam is a task of its own: it goes on when nobody waits for it any more. The evidence counts once, however many
//! results wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;

use super::conversation::CallResult;
use super::exam_queue::{Awaited, Verdict};
use super::outstanding::Limits;
use super::parts::{Member, OWN_TIMEOUT};
use super::places::Talk;
use crate::error::{Failure, HsmError, class};
use crate::fault::FaultOwner;
use crate::job::{Exam, Job, must_pass};
use crate::link::{Request, Value};
use crate::operation::Operation;
use crate::policy::credibility;
use crate::standstill;

/// Number of tests in a row that a key has to fail on a token that works, unless the first one proves its fault.
const KEY_TRIES: usize = 3;

/// Exams.
impl Member {
    /// Returns the verdict of an exam that begins from now on; `None` if there is none by `until`.
    pub(super) async fn verdict(self: &Arc<Self>, talk: &Talk, exam: Exam, until: Instant) -> Option<Verdict> {
        let mut verdict = self.schedule(talk, exam);
        let verdict = standstill::timeout_at(until, verdict.wait_for(Option::is_some)).await;
        // The task of the exam always gives a verdict, unless it panicked.
        *verdict.ok()?.ok()?
    }

    /// Joins an exam that has not begun, or schedules one.
    pub(super) fn schedule(self: &Arc<Self>, talk: &Talk, exam: Exam) -> Awaited {
        let (verdict, new) = self.exams.join(talk.number, &exam);
        if let Some(tell) = new {
            let (member, talk) = (Arc::clone(self), Arc::clone(talk));
            tokio::spawn(async move {
                let turn = lock(&member.credibility).reserve_test(standstill::now());
                standstill::sleep_until(turn).await;
                member.exams.begin(talk.number, &exam);
                tell.send_replace(Some(member.examine(&talk, &exam).await));
            });
        }
        verdict
    }

    async fn examine(&self, talk: &Talk, exam: &Exam) -> Verdict {
        let mut key = match &exam.key {
            Some(test) => self.test_one(talk, test).await,
            None => Err(HsmError::WrongAnswer),
        };
        let token = match &exam.token {
            Some(test) if key.is_err() => Some(self.test_one(talk, test).await),
            _ => None,
        };
        if let (Some(Ok(())), Some(test)) = (token, &exam.key) {
            // A token that is busy now and then must not seem to have a faulty key.
            for _ in 1..KEY_TRIES {
                if key.is_err_and(|error| !error.condemns()) {
                    key = self.test_one(talk, test).await;
                }
            }
        }
        let verdict = match (credibility::verdict(key, token), key) {
            // Nor does it seem to have one after all these.
            (Verdict::Key, Err(busy)) if !busy.condemns() => Verdict::Member(busy),
            (verdict, _) => verdict,
        };
        self.count_tests(talk, if let Verdict::Member(error) = verdict { Err(error) } else { Ok(()) });
        verdict
    }

    /// Counts the result of tests as evidence. A worker that has not passed its first tests is judged by the member's task.
    fn count_tests(&self, talk: &Talk, result: Result<(), HsmError>) {
        if talk.number != self.generation() || !self.machine().has_proven_worker() {
            return;
        }
        let now = standstill::now();
        let Err(error) = result else {
            lock(&self.credibility).proved_right();
            return self.machine().answered(now);
        };
        let too_many = lock(&self.credibility).test_failed();
        match error {
            // Counted by the task that reads from the worker, by the regular check, and by the worker itself.
            HsmError::Worker(_) | HsmError::Hung(_) | HsmError::Deadline => {}
            error if error.refuses_pin() => {}
            error if error.condemns() || too_many => self.fault(&error.into()),
            error => self.failed(error, Duration::ZERO, now),
        }
    }
}

/// Tests.
impl Member {
    /// Runs the tests that every member must pass, or without such tests checks that a session is alive, and returns the
    /// time this took. A failure counts as evidence, and may take the member down.
    pub(crate) async fn test(&self) -> Result<Duration, Failure> {
        let talk = self.talk().ok_or(HsmError::NotServing)?;
        let tested = self.test_all(&talk).await;
        self.count_tests(&talk, tested.map(drop));
        Ok(tested?)
    }

    pub(super) async fn test_all(&self, talk: &Talk) -> Result<Duration, HsmError> {
        let begun = standstill::now();
        let known = self.known();
        let mut tested = 0;
        for test in must_pass(&known) {
            tested += 1;
            self.test_one(talk, test).await?;
        }
        if tested == 0 {
            self.own_call(talk, &Job::new(&Request::Ping)?).await?.result?;
        }
        *lock(&self.heard) = standstill::now();
        Ok(standstill::since(begun))
    }

    /// Runs one known-answer test. Its input is valid, so a token that calls it invalid gives a wrong answer. An error that
    /// only may be about the input proves nothing: throttled tokens return the same ones.
    async fn test_one(&self, talk: &Talk, test: &Job) -> Result<(), HsmError> {
        let reply = self.own_call(talk, test).await?;
        let rv = Some(class(&reply.result)).filter(|rv| *rv != "refused").unwrap_or("broken");
        self.book_call(Operation::Probe, rv, reply.cost);
        match reply.result {
            Ok(Value::Bytes(bytes)) if test.accepts(&bytes) => {
                self.forget_lack(test);
                Ok(())
            }
            Ok(_) => {
                self.observe_wrong_answer();
                Err(HsmError::WrongAnswer)
            }
            Err(error) if error.fault().owner == FaultOwner::Caller => Err(HsmError::WrongAnswer),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn own_call(&self, talk: &Talk, job: &Job) -> Result<CallResult, HsmError> {
        let limits = Limits { share: self.watchdog, watchdog: self.watchdog };
        self.exchange(talk, job, self.hold_directly(), standstill::now() + OWN_TIMEOUT, limits).await
    }
}
