//! Tests of a process that stands still for a while, alone or with its workers, as in a migration of its virtual machine.
//! It then continues without errors.

#![allow(clippy::print_stdout)]

use std::time::Duration;

use claviger_tests::openloop::Traffic;
use claviger_tests::{Administrator, Lab, Options, until};
use rustix::process::{Pid, Signal, kill_process};

/// Longer than the time limits of a release and of a call.
const STANDSTILL: Duration = Duration::from_secs(6);
/// Time limit of the clients, who behave as if they stood still too.
const PATIENCE: Duration = Duration::from_secs(90);

/// Returns the processes of the members' workers.
fn workers(lab: &Lab) -> [Pid; 2] {
    ["hsm-a", "hsm-b"].map(|member| Administrator(lab).worker(member).unwrap())
}

fn send(to: &[Pid], signal: Signal) {
    to.iter().for_each(|pid| kill_process(*pid, signal).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn time_in_which_the_process_stood_still_is_counted_for_nobody() {
    let lab = Lab::make(Options { hsms: 2, vms: 4, ..Options::default() });
    let faulty = lab.behind_faulty();
    lab.configure(|config| {
        config.release.deadline_ms = 5_000;
        config.release.watchdog_ms = 2_000;
        // The calls are slowed down below, so that some are at the tokens and releases wait whenever the process stops.
        config.hsm.iter_mut().for_each(|hsm| hsm.sessions = 2);
    });
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    until("both members are up", || {
        let members = Administrator(&lab).json(&["hsm", "list"]);
        members.as_array().unwrap().iter().all(|member| member["state"] == "up").then_some(())
    });
    let health = lab.host(daemon.client()).attest().await.unwrap();
    for member in ["hsm-a", "hsm-b"] {
        faulty.set(member, &["call=C_Decrypt,C_Sign delay_ms=60"]);
    }
    let traffic = Traffic::of_vms(&lab, &health);
    // The requests of 6 s are done well within the deadline afterwards.
    let load = traffic.start(&daemon, 8.0, PATIENCE);
    let all = workers(&lab);
    // First the daemon alone stops; then all of its processes, continued in either order.
    for (frozen, workers_first) in [(&[][..], false), (&all[..], true), (&all[..], false)] {
        tokio::time::sleep(Duration::from_millis(800)).await;
        daemon.process.freeze();
        send(frozen, Signal::STOP);
        tokio::time::sleep(STANDSTILL).await;
        if !workers_first {
            daemon.process.thaw();
        }
        send(frozen, Signal::CONT);
        daemon.process.thaw();
    }
    daemon.until_ready_is(200).await;
    let report = load.stop().await;
    println!("{}", report.line());
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.sum("claviger_hsm_closings_total", &[]), Some(0.0));
    assert_eq!(metrics.sum("claviger_hsm_stuck_calls_total", &[]), Some(0.0));
    for reason in ["late", "deadline", "full"] {
        assert_eq!(metrics.sum("claviger_queue_dropped_total", &[("reason", reason)]), Some(0.0), "{reason}");
    }
    assert_eq!(workers(&lab), all, "a worker was killed");
    report.assert_all_right();
    assert!(daemon.stop().success());
}
