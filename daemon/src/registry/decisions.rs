//! The order of decisions and changes: what was decided by the old state is recorded before a change to it is complete.

use std::sync::{RwLock, RwLockReadGuard};

use claviger_process::lock::unpoisoned;

/// Makes the confirmation of a decision and its way to the audit trail's writer one step for those who change the state. Without
/// it, a thread could confirm a release, lose its processor, and record the release after the command that disabled its host.
#[derive(Debug, Default)]
pub(crate) struct Decisions(RwLock<()>);

impl Decisions {
    /// To be held while a decision is confirmed by the snapshots, and until its line is with the writer. Nothing is waited for
    /// meanwhile.
    pub(crate) fn deciding(&self) -> RwLockReadGuard<'_, ()> {
        unpoisoned(self.0.read())
    }

    /// Returns when every decision that was confirmed by earlier snapshots is with the writer. To be called between the change of
    /// a snapshot and the record of that change.
    pub(crate) fn settle(&self) {
        drop(unpoisoned(self.0.write()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn a_change_is_complete_when_what_was_confirmed_before_is_on_its_way() {
        let (decisions, recorded) = (Decisions::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let deciding = decisions.deciding();
            let changing = scope.spawn(|| {
                decisions.settle();
                recorded.load(Ordering::SeqCst)
            });
            std::thread::sleep(Duration::from_millis(50));
            recorded.store(true, Ordering::SeqCst);
            drop(deciding);
            assert!(changing.join().is_ok_and(|was_recorded| was_recorded));
        });
    }
}
