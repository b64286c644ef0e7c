//! The headline of the status page: whether keys are released, and if not, why.

use std::time::Duration;

use claviger_hsm::{MemberState, MemberStatus};

use crate::observe::history::Point;
use crate::observe::metrics::{Readings, SLO_SECONDS, SharedState};

/// Duration of an audit write after which the disk counts as hanging.
const DISK_HANGS: Duration = Duration::from_secs(2);
/// Seconds before a certificate's expiry from which it is mentioned. The attestation signer is renewed earlier.
const EXPIRES_SOON: i64 = 14 * DAY;
/// Days for which the expiry of a key's certificate is mentioned, like the alert.
const SAID_FOR: i64 = 7;
const DAY: i64 = 24 * 3600;
/// Share of an hour's releases that may fail without a remark: the objective of the alerts, 99.9 %.
const MAY_FAIL: f64 = 0.001;

/// State of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// No problem.
    Good,
    /// Keys are released, but an administrator should act.
    Degraded,
    /// Keys are not released.
    Bad,
}

/// The result of the evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// State of the service.
    pub(super) level: Level,
    pub(super) headline: String,
    /// Further remarks.
    pub(super) remarks: Vec<String>,
}

/// Evaluates the current readings. `points` are the intervals of the last hour, `now` is in seconds since 1970.
pub(super) fn judge(readings: &Readings, points: &[Point], now: i64) -> Verdict {
    let last = points.last();
    let members = &readings.members;
    let (up, others): (Vec<_>, Vec<_>) = members.iter().partition(|member| member.state == MemberState::Up);
    // Drained members are excluded: an administrator took them out of service.
    let wanting: Vec<_> = others.iter().filter(|member| !is_drained(member)).collect();
    let count = |of: fn(&Point) -> u64| last.map_or(0, of);
    let (success, failed, refused) =
        (count(|point| point.success), count(|point| point.failed), count(|point| point.refused));
    let seconds = last.map_or(0, |point| point.lasted.as_secs_f64().round() as u64);
    let under_way = readings.load.running + readings.load.waiting;

    let mut remarks: Vec<String> = wanting.iter().map(|member| ailment(member)).collect();
    if !readings.primaries {
        remarks.push("There is no primary certificate of each kind: tenants get no metadata.".to_owned());
    }
    if readings.state_stale {
        remarks.push("The state file cannot be read: hosts that were removed may go on being served.".to_owned());
    }
    let unconfirmed = readings.shared.as_ref().filter(|shared| !shared.confirmed);
    if let Some(shared) = unconfirmed.filter(|shared| shared.age <= shared.limit) {
        let (age, left) = (shared.age.as_secs(), (shared.limit - shared.age).as_secs());
        remarks.push(format!(
            "etcd has not confirmed the state for {age} s{}: nothing can be changed, hosts that were removed elsewhere may go \
             on being served, and nothing is released {left} s from now.",
            because(shared)
        ));
    }
    if readings.audit.reserve_missing > 0 {
        let used = readings.audit.reserve_missing.div_ceil(1024 * 1024);
        remarks.push(format!("The audit log's disk is full: {used} MiB of its reserve are used."));
    }
    if readings.connections_open * 10 >= readings.connections_limit * 9 && readings.connections_limit > 0 {
        let most = readings.connections_limit;
        remarks.push(format!("{} of at most {most} connections are open.", readings.connections_open));
    }
    remarks.extend(readings.certificates.iter().filter_map(|certificate| expiry(certificate, now)));
    let turned_away = count(|point| point.turned_away);
    if failed > 0 && success > 0 {
        remarks.push(format!("{failed} of {} releases failed in the last {seconds} s.", failed + success));
    }
    if turned_away > 0 {
        remarks.push(format!(
            "{turned_away} of them were turned away before an HSM was asked: more come than can be done."
        ));
    }
    if let Some((_, most)) = last.and_then(|point| point.latency)
        && most.as_secs_f64() > SLO_SECONDS
    {
        let (most, promised) = (most.as_millis(), (SLO_SECONDS * 1e3).round());
        remarks.push(format!(
            "1 in 100 releases took {most} ms or longer in the last {seconds} s; promised are {promised} ms."
        ));
    }
    let hour = |of: fn(&Point) -> u64| points.iter().map(of).sum::<u64>();
    let (succeeded, lost) = (hour(|point| point.success), hour(|point| point.failed));
    let minutes = points.iter().map(|point| point.lasted).sum::<Duration>().as_secs().div_ceil(60);
    let before = format!("{lost} of {} releases failed in the last {minutes} min.", succeeded + lost);
    let many = lost as f64 > MAY_FAIL * (succeeded + lost) as f64;
    if lost > failed && many {
        remarks.push(before.clone());
    }
    let bad = |headline: String, remarks| Verdict { level: Level::Bad, headline, remarks };
    if readings.audit_writing >= DISK_HANGS {
        let since = readings.audit_writing.as_secs();
        return bad(format!("No keys are released: the audit log's disk has not answered for {since} s"), remarks);
    }
    if let Some(shared) = unconfirmed.filter(|shared| shared.age > shared.limit) {
        let since = shared.age.as_secs();
        return bad(
            format!("No keys are released: etcd has not confirmed the state for {since} s{}", because(shared)),
            remarks,
        );
    }
    if up.is_empty() {
        return bad(format!("No keys are released: {}", none_of(members.len())), remarks);
    }
    if failed > 0 && success == 0 {
        return bad(format!("No keys are released: all {failed} releases of the last {seconds} s failed"), remarks);
    }
    let released = if success > 0 {
        "Keys are being released".to_owned()
    } else if refused > 0 {
        remarks.push("What was refused and why is in the audit log.".to_owned());
        format!("No keys are released: all {refused} requests of the last {seconds} s were refused")
    } else if under_way > 0 && last.is_some() {
        remarks.push(format!("{under_way} releases are under way."));
        format!("No key was released in the last {seconds} s")
    } else if under_way > 0 {
        "Keys are asked for".to_owned()
    } else {
        "Ready; nobody asks for keys".to_owned()
    };
    let headline = match wanting.as_slice() {
        [] => released,
        [one] => format!("{released}; {} of {} HSMs serve, {} does not", up.len(), members.len(), one.name),
        _ => format!("{released}; {} of {} HSMs serve", up.len(), members.len()),
    };
    let level = if remarks.is_empty() { Level::Good } else { Level::Degraded };
    if lost > failed && !many {
        // A remark, but not a degraded state.
        remarks.push(before);
    }
    Verdict { level, headline, remarks }
}

/// Describes the expiry of a certificate. A certificate of a key stays in use after its expiry, for old protectors.
fn expiry((kind, name, end): &(&'static str, String, i64), now: i64) -> Option<String> {
    let (left, past) = ((end - now).div_euclid(DAY), (now - end).div_euclid(DAY));
    if *end >= now {
        return (end - now < EXPIRES_SOON).then(|| format!("The {kind} certificate {name} expires in {left} days."));
    }
    let serves_on = matches!(*kind, "signing" | "encryption");
    (!serves_on || past < SAID_FOR).then(|| format!("The {kind} certificate {name} has expired."))
}

fn because(shared: &SharedState) -> String {
    shared.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default()
}

fn is_drained(member: &MemberStatus) -> bool {
    matches!(member.state, MemberState::Draining | MemberState::Drained)
}

fn none_of(members: usize) -> String {
    if members == 1 { "the HSM does not serve".to_owned() } else { format!("none of the {members} HSMs serves") }
}

fn ailment(member: &MemberStatus) -> String {
    let why = member.last_error.as_ref().map(|error| format!(": {}", error.text)).unwrap_or_default();
    let what = match member.state {
        MemberState::Hung => "hangs",
        MemberState::PinRefused => "refuses the PIN",
        MemberState::Off => "is off",
        _ => "is down",
    };
    format!("{} {what}{why}.", member.name)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{member, point};
    use super::*;
    use std::time::SystemTime;

    const NOW: i64 = 1_800_000_000;

    fn verdict(states: &[MemberState], last: Option<(u64, u64)>, change: impl FnOnce(&mut Readings)) -> Verdict {
        let names = ["hsm-a", "hsm-b", "hsm-c"];
        let members = names.iter().zip(states).map(|(name, state)| member(name, *state)).collect();
        let mut readings = Readings { members, primaries: true, ..Readings::default() };
        change(&mut readings);
        let points: Vec<_> = last.into_iter().map(|(success, failed)| point(success, failed)).collect();
        judge(&readings, &points, NOW)
    }

    #[test]
    fn all_is_well() {
        use MemberState::{Drained, Up};
        let good = verdict(&[Up, Up], Some((10, 0)), |_| ());
        assert_eq!((good.level, &*good.headline), (Level::Good, "Keys are being released"));
        assert!(good.remarks.is_empty());
        assert_eq!(verdict(&[Up], None, |_| ()).headline, "Ready; nobody asks for keys");
        let drained = verdict(&[Up, Drained], Some((10, 0)), |_| ());
        assert_eq!((drained.level, &*drained.headline), (Level::Good, "Keys are being released"));
    }

    #[test]
    fn a_member_that_is_missing_is_named_with_its_fault() {
        use MemberState::{Down, Hung, PinRefused, Up};
        let one = verdict(&[Up, Down, Up], Some((10, 0)), |readings| {
            let text = "C_Sign: CKR_DEVICE_REMOVED".to_owned();
            readings.members[1].last_error =
                Some(claviger_hsm::LastError { text, at: SystemTime::now(), remedy: None });
        });
        assert_eq!(one.level, Level::Degraded);
        assert_eq!(one.headline, "Keys are being released; 2 of 3 HSMs serve, hsm-b does not");
        assert_eq!(one.remarks, ["hsm-b is down: C_Sign: CKR_DEVICE_REMOVED."]);
        let two = verdict(&[Hung, PinRefused, Up], Some((10, 0)), |_| ());
        assert_eq!(two.headline, "Keys are being released; 1 of 3 HSMs serve");
        assert_eq!(two.remarks, ["hsm-a hangs.", "hsm-b refuses the PIN."]);
    }

    #[test]
    fn nothing_is_released_and_why() {
        use MemberState::{Down, Drained, Up};
        let none = verdict(&[Down, Drained], Some((0, 3)), |_| ());
        assert_eq!(none.level, Level::Bad);
        assert_eq!(none.headline, "No keys are released: none of the 2 HSMs serves");
        let full = verdict(&[Up], Some((5, 0)), |readings| readings.audit.reserve_missing = 1);
        assert_eq!(full.level, Level::Degraded);
        assert_eq!(full.remarks, ["The audit log's disk is full: 1 MiB of its reserve are used."]);
        let disk = verdict(&[Up], Some((5, 0)), |readings| readings.audit_writing = Duration::from_secs(7));
        assert_eq!(disk.headline, "No keys are released: the audit log's disk has not answered for 7 s");
        let failing = verdict(&[Up], Some((0, 8)), |_| ());
        assert_eq!(failing.headline, "No keys are released: all 8 releases of the last 10 s failed");
        assert_eq!(failing.level, Level::Bad);
    }

    #[test]
    fn a_state_that_etcd_does_not_confirm_is_said_and_then_ends_the_releases() {
        let after = |seconds: u64, confirmed: bool| {
            verdict(&[MemberState::Up], Some((5, 0)), |readings| {
                readings.shared = Some(SharedState {
                    confirmed,
                    age: Duration::from_secs(seconds),
                    limit: Duration::from_secs(300),
                    revision: 7,
                    why: Some("https://e:1: no answer".to_owned()),
                });
            })
        };
        assert_eq!(after(1, true).level, Level::Good);
        let stale = after(20, false);
        assert_eq!((stale.level, &*stale.headline), (Level::Degraded, "Keys are being released"));
        assert!(stale.remarks[0].starts_with("etcd has not confirmed the state for 20 s (https://e:1: no answer)"));
        assert!(stale.remarks[0].ends_with("nothing is released 280 s from now."), "{stale:?}");
        let expired = after(301, false);
        let headline = "No keys are released: etcd has not confirmed the state for 301 s (https://e:1: no answer)";
        assert_eq!((expired.level, &*expired.headline), (Level::Bad, headline));
    }

    #[test]
    fn what_deserves_a_look() {
        use MemberState::Up;
        let look = verdict(&[Up], Some((90, 10)), |readings| {
            readings.state_stale = true;
            let day = 24 * 3600;
            readings.certificates = vec![
                ("tls", "aaaaaaaa".to_owned(), NOW + 3 * day + 1),
                ("signing", "bbbbbbbb".to_owned(), NOW - 1),
                ("encryption", "cccccccc".to_owned(), NOW + 15 * day),
                ("encryption", "dddddddd".to_owned(), NOW - 8 * day),
            ];
        });
        assert_eq!(look.level, Level::Degraded);
        assert_eq!(look.remarks.len(), 4, "{look:?}");
        assert!(look.remarks[0].contains("removed may go on being served"));
        assert_eq!(look.remarks[1], "The tls certificate aaaaaaaa expires in 3 days.");
        assert_eq!(look.remarks[2], "The signing certificate bbbbbbbb has expired.");
        assert_eq!(look.remarks[3], "10 of 100 releases failed in the last 10 s.");
    }

    #[test]
    fn nobody_asks_only_where_nobody_does() {
        use MemberState::Up;
        let members = || vec![member("hsm-a", Up)];
        let readings = |running| Readings {
            members: members(),
            primaries: true,
            load: crate::observe::metrics::Load { running, waiting: 0 },
            ..Readings::default()
        };
        let refused = Point { success: 0, refused: 7, ..point(0, 0) };
        let verdict = judge(&readings(0), &[refused], NOW);
        assert_eq!(verdict.level, Level::Degraded);
        assert_eq!(verdict.headline, "No keys are released: all 7 requests of the last 10 s were refused");
        let stuck = judge(&readings(3), &[point(0, 0)], NOW);
        assert_eq!((stuck.level, &*stuck.headline), (Level::Degraded, "No key was released in the last 10 s"));
        assert_eq!(stuck.remarks, ["3 releases are under way."]);
        let just_started = judge(&readings(3), &[], NOW);
        assert_eq!((just_started.level, &*just_started.headline), (Level::Good, "Keys are asked for"));

        let none = judge(&Readings { primaries: false, ..readings(0) }, &[], NOW);
        assert_eq!(none.remarks, ["There is no primary certificate of each kind: tenants get no metadata."]);
        let full = Readings { connections_open: 95, connections_limit: 100, ..readings(0) };
        assert_eq!(judge(&full, &[], NOW).remarks, ["95 of at most 100 connections are open."]);
    }

    #[test]
    fn a_broken_promise_and_a_queue_that_refuses_are_no_good_state() {
        let readings =
            || Readings { members: vec![member("hsm-a", MemberState::Up)], primaries: true, ..Readings::default() };
        let late = Point { latency: Some((Duration::from_millis(90), Duration::from_millis(640))), ..point(50, 0) };
        let slow = judge(&readings(), &[point(50, 0), late], NOW);
        assert_eq!((slow.level, &*slow.headline), (Level::Degraded, "Keys are being released"));
        let promised = SLO_SECONDS * 1e3;
        let said = format!("1 in 100 releases took 640 ms or longer in the last 10 s; promised are {promised} ms.");
        assert_eq!(slow.remarks, [said]);

        let busy = judge(&readings(), &[Point { turned_away: 4, ..point(50, 5) }], NOW);
        assert_eq!(busy.level, Level::Degraded);
        assert_eq!(busy.remarks[0], "5 of 55 releases failed in the last 10 s.");
        assert!(busy.remarks[1].starts_with("4 of them were turned away before an HSM was asked"), "{busy:?}");
    }

    #[test]
    fn the_failures_of_the_last_hour_are_not_forgotten() {
        let readings =
            || Readings { members: vec![member("hsm-a", MemberState::Up)], primaries: true, ..Readings::default() };
        let after = |failed, success| {
            let points: Vec<_> = std::iter::once(point(success, failed)).chain((0..60).map(|_| point(10, 0))).collect();
            judge(&readings(), &points, NOW)
        };
        let many = after(30, 0);
        assert_eq!((many.level, &*many.headline), (Level::Degraded, "Keys are being released"));
        assert_eq!(many.remarks, ["30 of 630 releases failed in the last 11 min."]);
        let few = after(1, 5_000);
        assert_eq!((few.level, few.remarks.len()), (Level::Good, 1), "{few:?}");
        assert_eq!(few.remarks, ["1 of 5601 releases failed in the last 11 min."]);
    }
}
