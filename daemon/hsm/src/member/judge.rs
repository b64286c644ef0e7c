//! Judges results: decides whether the caller or the member is at fault, and updates the member's state.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use cryptoki::error::RvError;
use zeroize::Zeroizing;

use super::conversation::CallResult;
use super::exam_queue::Verdict;
use super::parts::Member;
use super::places::Talk;
use crate::error::{HsmError, class};
use crate::event::Event;
use crate::fault::FaultOwner;
use crate::job::{Exam, Job, must_pass};
use crate::link::{Cost, Value, nanos};
use crate::operation::Operation;
use crate::standstill;

/// Result of an operation before the party at fault is known.
enum Finding {
    Right(Zeroizing<Vec<u8>>),
    /// The input or the member is at fault: the result was wrong (`wrong`), or the token returned an error.
    Doubtful {
        wrong: bool,
    },
    /// The member failed or lacks something.
    Failed(HsmError),
}

impl Finding {
    fn of(result: Result<Value, HsmError>, job: &Job) -> Self {
        match result {
            Ok(Value::Bytes(bytes)) if job.accepts(&bytes) => Finding::Right(bytes),
            Ok(Value::Bytes(_)) => Finding::Doubtful { wrong: true },
            Ok(_) => Finding::Failed(HsmError::UnexpectedReply),
            Err(error) if is_about_input(error) => {
                // A random key is compared in vain, so that an error takes as long as a wrong result.
                let mut random = Zeroizing::new([0_u8; 32]);
                random.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
                let _ = job.accepts(&*random);
                Finding::Doubtful { wrong: false }
            }
            Err(error) => Finding::Failed(error),
        }
    }
}

/// Returns true if the input may be at fault or was found to be.
fn is_about_input(error: HsmError) -> bool {
    matches!(error.fault().owner, FaultOwner::Caller | FaultOwner::Unclear)
}

impl Member {
    /// Judges a result, until `until` at the latest. A result that its own check accepts is right, whichever member made it.
    /// All other outcomes that may be due to the input, errors and wrong results alike, are treated and reported the same
    /// from here on, so that a caller does not learn which one occurred.
    pub(super) async fn judge(
        self: &Arc<Self>,
        talk: &Talk,
        job: &Job,
        reply: CallResult,
        submitted: Instant,
        until: Instant,
    ) -> Result<Value, HsmError> {
        if !matches!(job.operation, Operation::Decrypt | Operation::Sign) {
            self.book_call(job.operation, class(&reply.result), reply.cost);
            self.observe(Event::Answered { op: job.operation, took: standstill::since(submitted) });
            return reply.result;
        }
        let queued = standstill::since(submitted).saturating_sub(reply.cost.took);
        let finding = Finding::of(reply.result, job);
        let booked = self.book(job.operation, &finding, reply.cost);
        self.observe(Event::Answered { op: job.operation, took: queued + booked.took });
        let wrong = match finding {
            Finding::Right(bytes) => return Ok(Value::Bytes(bytes)),
            Finding::Failed(error) => return Err(error),
            Finding::Doubtful { wrong } => wrong,
        };
        let known = self.known();
        let exam = if wrong && job.operation == Operation::Sign {
            Some(Exam::of_wrong_result(&known, job))
        } else {
            Exam::of(&known, job)
        };
        let verdict = match exam {
            Some(exam) => self.verdict(talk, exam, until).await,
            // Without a known-answer test the member cannot be blamed.
            None => Some(Verdict::Input),
        };
        let error = match verdict {
            Some(Verdict::Input) => HsmError::Refused { wrong },
            Some(Verdict::Key) => HsmError::FaultyKey,
            Some(Verdict::Member(HsmError::WrongAnswer)) => HsmError::WrongAnswer,
            Some(Verdict::Member(_)) | None => HsmError::NotCredible,
        };
        if wrong && matches!(error, HsmError::FaultyKey | HsmError::WrongAnswer) {
            self.observe_wrong_answer();
        }
        Err(error)
    }

    /// Records an operation once. All decryptions that may be the caller's fault get the same class and the same time, so
    /// that the metrics are no oracle.
    fn book(&self, operation: Operation, finding: &Finding, own: Cost) -> Cost {
        let (rv, cost) = match (operation, finding) {
            (Operation::Decrypt, Finding::Right(_)) => ("ok", self.usual_decryption.booked(own, true)),
            (Operation::Decrypt, Finding::Doubtful { .. }) => ("refused", self.usual_decryption.booked(own, false)),
            (_, Finding::Right(_) | Finding::Doubtful { wrong: true }) => ("ok", own),
            (_, Finding::Doubtful { wrong: false }) => ("refused", own),
            (_, Finding::Failed(error)) => (error.class(), own),
        };
        self.book_call(operation, rv, cost);
        cost
    }

    pub(super) fn book_call(&self, op: Operation, rv: &'static str, cost: Cost) {
        self.stats.calls.fetch_add(1, Ordering::Relaxed);
        self.stats.worked.fetch_add(nanos(cost.took), Ordering::Relaxed);
        self.stats.spent.fetch_add(nanos(cost.processor), Ordering::Relaxed);
        if matches!(rv, "stale" | "busy" | "pin" | "broken") {
            self.stats.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.observe(Event::Call { op, rv, took: cost.took });
    }

    /// Records a wrong plaintext or signature that is the member's fault.
    pub(super) fn observe_wrong_answer(&self) {
        self.stats.faults.fetch_add(1, Ordering::Relaxed);
        self.observe(Event::WrongAnswer);
    }

    /// Updates the member's state after a caller's operation. Enough evidence takes the member down.
    pub(super) fn learn(self: &Arc<Self>, talk: &Talk, job: &Job, error: Option<HsmError>, submitted: Instant) {
        // Results of an earlier worker say nothing about the current one. Key management may take any time.
        if talk.number != self.generation() || !job.operation.may_repeat() {
            return;
        }
        let now = standstill::now();
        *lock(&self.heard) = now;
        let took = now.saturating_duration_since(submitted);
        match error {
            None => {
                if job.operation == Operation::Decrypt {
                    lock(&self.credibility).proved_right();
                }
                self.machine().succeeded(took, now);
            }
            // The worker has already reported the refusal.
            Some(error) if error.refuses_pin() => {}
            Some(HsmError::NoSuchKey) if self.tests_need(job) => self.fault(&HsmError::NoSuchKey.into()),
            Some(HsmError::NoSuchKey | HsmError::FaultyKey) => self.remember_lack(job, now),
            // The member must not attract calls because it refuses them fast. Whether it can do what every member must do is
            // found out beside this call, which goes to another member at once.
            Some(error) if error.is_inability() => {
                self.remember_lack(job, now);
                if let Some(exam) = Exam::of(&self.known(), job) {
                    drop(self.schedule(talk, exam));
                }
            }
            // The task that reads from the worker judges its end.
            Some(HsmError::Worker(_)) => {}
            Some(error) if error.is_code(RvError::CryptokiNotInitialized) => self.fault(&error.into()),
            // Counted when the call was found to hang.
            Some(HsmError::Hung(_)) => {}
            // The exam has counted it.
            Some(HsmError::WrongAnswer) => {}
            // The wait for an exam is not the token's time.
            Some(HsmError::NotCredible) => self.machine().latency.observe_failure(Duration::ZERO, now),
            Some(error) if error.fault().owner == FaultOwner::Member => self.failed(error, took, now),
            // The member answered. Only accepted operations update its latency: see `usual_cost`.
            Some(_) => self.machine().answered(now),
        }
    }

    /// Returns true if a member without the job's key fails the known-answer tests.
    fn tests_need(&self, job: &Job) -> bool {
        must_pass(&self.known()).any(|test| test.key() == job.key())
    }

    /// Another member's result proved that this member was wrong to reject an input, by a `wrong` result or by an error.
    pub(crate) fn contradicted(&self, wrong: bool, number: u64) {
        let now = standstill::now();
        lock(&self.credibility).contradicted(now);
        if number != self.generation() {
            return;
        }
        // A busy token may return an error; a wrong result has no such excuse.
        if wrong {
            self.observe_wrong_answer();
            self.fault(&HsmError::WrongAnswer.into());
        } else {
            self.failed(HsmError::Nonsense, Duration::ZERO, now);
        }
    }
}
