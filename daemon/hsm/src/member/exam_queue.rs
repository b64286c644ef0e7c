//! Exams that have not begun: results that become doubtful before an exam begins share it.

use std::sync::Mutex;

use claviger_process::lock::lock;
use tokio::sync::watch;

use crate::error::HsmError;
use crate::job::Exam;
use crate::policy::credibility;

/// The party at fault for a doubtful result.
pub(super) type Verdict = credibility::Verdict<HsmError>;

/// Receives the verdict of an exam.
pub(super) type Awaited = watch::Receiver<Option<Verdict>>;

/// The exams of a member that have not begun. Its lock is a leaf.
#[derive(Default)]
pub(super) struct ExamQueue(Mutex<Vec<Entry>>);

struct Entry {
    /// Number of the worker that is examined.
    worker: u64,
    exam: Exam,
    verdict: Awaited,
}

impl Entry {
    fn is(&self, worker: u64, exam: &Exam) -> bool {
        self.worker == worker && self.exam.is(exam)
    }
}

impl ExamQueue {
    /// Joins an exam that has not begun, or adds one. If it is new, also returns the sender of its verdict: the caller then
    /// has to hold the exam.
    pub(super) fn join(&self, worker: u64, exam: &Exam) -> (Awaited, Option<watch::Sender<Option<Verdict>>>) {
        let mut entries = lock(&self.0);
        if let Some(same) = entries.iter().find(|entry| entry.is(worker, exam)) {
            return (same.verdict.clone(), None);
        }
        let (tell, verdict) = watch::channel(None);
        entries.push(Entry { worker, exam: exam.clone(), verdict: verdict.clone() });
        (verdict, Some(tell))
    }

    /// Begins an exam: nobody can join it from now on.
    pub(super) fn begin(&self, worker: u64, exam: &Exam) {
        lock(&self.0).retain(|entry| !entry.is(worker, exam));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::job::Job;
    use crate::link::Request;

    #[test]
    fn an_exam_is_shared_until_it_begins() {
        let queue = ExamQueue::default();
        let [exam, other] =
            [0, 1].map(|_| Exam { key: Some(Arc::new(Job::new(&Request::Ping).unwrap())), token: None });
        let tell = queue.join(1, &exam).1.unwrap();
        let (joined, none) = queue.join(1, &exam);
        assert!(none.is_none());
        assert!(queue.join(1, &other).1.is_some() && queue.join(2, &exam).1.is_some(), "other tests, another worker");
        queue.begin(1, &exam);
        let (next, new) = queue.join(1, &exam);
        assert!(new.is_some());
        tell.send_replace(Some(Verdict::Input));
        assert_eq!((*joined.borrow(), *next.borrow()), (Some(Verdict::Input), None));
    }
}
