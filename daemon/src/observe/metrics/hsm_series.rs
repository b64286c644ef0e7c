//! Caches the series of token operations per thread: finding a series by its labels costs more than recording a value,
//! and each session thread works for one member.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Counter, Histogram, counter, histogram};

use super::recorder::INSTALLED;
use super::table::{HSM_BATCH_JOBS, HSM_CALLS, HSM_RESPONSE_TIME, HSM_SERVICE_TIME};

thread_local! {
    static MEMBERS: RefCell<Vec<Member>> = const { RefCell::new(Vec::new()) };
}

/// The cached series of a member.
struct Member {
    /// Cheap to clone.
    hsm: Arc<str>,
    batch_jobs: Histogram,
    by_op: Vec<(&'static str, Operation)>,
}

struct Operation {
    ok: Counter,
    service_time: Histogram,
    /// Some operations do not wait in a queue.
    response_time: Option<Histogram>,
}

/// Counts a completed call.
pub(super) fn call(hsm: &str, op: &'static str, rv: &'static str, took: Duration) {
    of(hsm, |member| {
        let operation = member.op(op);
        operation.service_time.record(took);
        if rv == "ok" {
            operation.ok.increment(1);
        } else {
            counter!(HSM_CALLS.name, "hsm" => member.hsm.clone(), "op" => op, "rv" => rv).increment(1);
        }
    });
}

/// Records the duration of an operation, including its time in the queue.
pub(super) fn answered(hsm: &str, op: &'static str, took: Duration) {
    of(hsm, |member| {
        let hsm = member.hsm.clone();
        let series = || histogram!(HSM_RESPONSE_TIME.name, "hsm" => hsm, "op" => op);
        member.op(op).response_time.get_or_insert_with(series).record(took);
    });
}

/// Records how many jobs a session took at once.
pub(super) fn batch(hsm: &str, jobs: usize) {
    of(hsm, |member| member.batch_jobs.record(jobs as f64));
}

fn of(hsm: &str, record: impl FnOnce(&mut Member)) {
    // Do not cache series before a recorder is installed: they would stay empty for ever.
    if INSTALLED.get().is_none() {
        return;
    }
    MEMBERS.with_borrow_mut(|members| {
        let at = members.iter().position(|of| &*of.hsm == hsm).unwrap_or_else(|| {
            members.push(Member::new(hsm));
            members.len() - 1
        });
        record(&mut members[at]);
    });
}

impl Member {
    fn new(hsm: &str) -> Self {
        let hsm = Arc::<str>::from(hsm);
        Self { batch_jobs: histogram!(HSM_BATCH_JOBS.name, "hsm" => hsm.clone()), hsm, by_op: Vec::new() }
    }

    fn op(&mut self, op: &'static str) -> &mut Operation {
        let at = self.by_op.iter().position(|(known, _)| *known == op).unwrap_or_else(|| {
            let hsm = &self.hsm;
            let operation = Operation {
                ok: counter!(HSM_CALLS.name, "hsm" => hsm.clone(), "op" => op, "rv" => "ok"),
                service_time: histogram!(HSM_SERVICE_TIME.name, "hsm" => hsm.clone(), "op" => op),
                response_time: None,
            };
            self.by_op.push((op, operation));
            self.by_op.len() - 1
        });
        &mut self.by_op[at].1
    }
}
