//! Counts the events of a run on its own thread, so that counting delays no request.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::tally::{Event, Tally};
use crate::threshold::Threshold;
use crate::units;

/// Number of whole seconds before a condition may stop a run. The first seconds are the slowest.
const STOPS_AFTER: usize = 5;
/// Interval between two updates of the progress and of the conditions.
const GLANCE: Duration = Duration::from_millis(250);

/// Counts events until every sender is dropped, and shows the progress. After the first seconds, a condition in `stop`
/// that fails ends the run.
#[must_use]
pub fn record(
    events: &Receiver<Event>,
    duration: Duration,
    show: bool,
    stop: &[Threshold],
    interrupt: &Interrupt,
) -> Tally {
    let mut tally = Tally::default();
    let progress = show.then(|| Progress::new("seconds", duration.as_secs_f64().ceil() as u64));
    loop {
        match events.recv_timeout(GLANCE) {
            Ok(event) => {
                tally.count(event);
                // A burst of events is handled as one.
                while let Ok(event) = events.try_recv() {
                    tally.count(event);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return tally,
        }
        if tally.seconds.len() > STOPS_AFTER
            && let Some(reason) = stop.iter().find_map(|condition| condition.fails_already(&tally))
        {
            interrupt.stop(format!("{reason}, in second {}", tally.seconds.len() - 1));
        }
        if let Some(progress) = &progress {
            progress.tell(tally.seconds.len() as u64, || glance(&tally));
        }
    }
}

fn glance(tally: &Tally) -> String {
    let rate = tally.seconds.iter().rev().nth(1).map_or(0, |second| second.achieved);
    let p99 = tally.latency.value_at_quantile(0.99) as f64 / 1e6;
    let (errors, dropped) = (tally.failed(), tally.dropped);
    format!("{rate}/s, p99 {}, {errors} errors, {dropped} dropped", units::seconds(p99))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(due: f64, latency: f64) -> Event {
        let (errors, retries) = (Vec::new(), Vec::new());
        Event::Done { due, lag: 0.001, service: latency / 2.0, latency, released: 1, errors, retries }
    }

    #[test]
    fn a_condition_that_fails_stops_the_run_but_not_in_its_first_seconds() {
        let told = |seconds: u32, latency: f64| {
            let (events, received) = std::sync::mpsc::channel();
            for at in 0..seconds * 10 {
                let _ = events.send(done(f64::from(at) / 10.0, latency));
            }
            drop(events);
            let (interrupt, stop) = (Interrupt::default(), ["p99<50ms".parse().unwrap_or_else(|e| panic!("{e}"))]);
            let _ = record(&received, Duration::from_secs(9), false, &stop, &interrupt);
            interrupt.reason().map(str::to_owned)
        };
        assert_eq!(told(3, 0.2), None);
        assert_eq!(told(9, 0.01), None);
        assert_eq!(told(9, 0.2).as_deref(), Some("p99<50ms failed (200 ms), in second 9"));
    }
}
