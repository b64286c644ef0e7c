//! Tests of the distributed store. The rules of the state are tested with both stores, next to the records.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use super::super::tests::{message, plan_and_import, soon};
use super::super::{Host, HostKind, Import, Labels, State, StateError};
use super::testing::Server;
use super::*;

const PREFIX: &str = "/claviger/";
/// Patience with an etcd that will not answer.
const SHORT: Duration = Duration::from_secs(3);

fn open(server: &Server) -> State {
    State::etcd(server.settings(PREFIX)).unwrap()
}

fn add(state: &mut State, name: &str) -> Result<Host, StateError> {
    state.add_host(name, name.as_bytes(), &Labels::default(), 1)
}

fn names(state: &State) -> Vec<String> {
    state.hosts().unwrap().into_iter().map(|host| host.name).collect()
}

fn hosts(number: usize) -> Vec<Host> {
    let host = |number: usize| {
        let spki = [b"a public key of 294 bytes ".repeat(11), number.to_be_bytes().to_vec()].concat();
        Host {
            name: format!("host-{number}"),
            kind: HostKind::HostKey,
            spki_sha256: super::super::records::sha256_hex(&spki),
            spki,
            enabled: true,
            added: 1,
            labels: Labels::default(),
        }
    };
    (0..number).map(host).collect()
}

/// A client for operations that the store does not have.
fn by_hand<T: Send + 'static>(server: &Server, call: impl AsyncFnOnce(&mut etcd_client::Client) -> T) -> T {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let endpoints = server.settings(PREFIX).endpoints;
        call(&mut Client::connect(endpoints, None).await.unwrap()).await
    })
}

/// Number of values in a folder below the prefix.
fn values_in(server: &Server, folder: &str) -> i64 {
    let folder = format!("{PREFIX}{folder}");
    by_hand(server, async |client| {
        let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
        client.get(folder, Some(options)).await.unwrap().count()
    })
}

/// The settings with the user `node`, whose password is in a file in this folder.
fn with_password(server: &Server, folder: &std::path::Path) -> EtcdSettings {
    use std::os::unix::fs::PermissionsExt;
    let file = folder.join("password");
    std::fs::write(&file, "a password\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    EtcdSettings { user: Some(("node".to_owned(), file)), ..server.settings(PREFIX) }
}

#[test]
fn changes_of_many_nodes_at_the_same_time_are_all_made() {
    let server = Server::start();
    std::thread::scope(|scope| {
        for node in 0..4 {
            let server = &server;
            scope.spawn(move || {
                let mut state = open(server);
                for number in 0..10 {
                    add(&mut state, &format!("host-{node}-{number}")).unwrap();
                    assert!(names(&state).contains(&format!("host-{node}-{number}")), "seen by who made it");
                }
            });
        }
    });
    assert_eq!(names(&open(&server)).len(), 40);
}

#[test]
fn a_change_is_seen_by_other_nodes() {
    let server = Server::start();
    let (mut one, two) = (open(&server), open(&server));
    let mut told = two.changes().unwrap();
    for number in 0..20 {
        let name = format!("host-{number}");
        told.mark_unchanged();
        add(&mut one, &name).unwrap();
        soon(|| names(&two).contains(&name));
        soon(|| told.has_changed().unwrap());
    }
}

#[test]
fn without_etcd_nothing_is_changed_and_the_last_contents_stay() {
    let mut server = Server::start();
    let mut state = open(&server);
    add(&mut state, "a").unwrap();
    let condition = state.condition().unwrap();
    assert!(condition.link.is_ok() && condition.age < Duration::from_secs(10), "{condition:?}");
    server.kill(0);
    soon(|| state.condition().unwrap().link.is_err());
    std::thread::sleep(GRACE);
    let asked = Instant::now();
    assert!(message(add(&mut state, "b")).contains("etcd cannot be reached, so nothing is changed"));
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(names(&state), ["a"]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(state.condition().unwrap().age >= Duration::from_millis(300));
    server.begin(0);
    soon(|| state.condition().unwrap().link.is_ok());
    add(&mut state, "b").unwrap();
    assert_eq!(names(&state), ["a", "b"]);
    server.kill(0);
    assert!(message(Etcd::open(server.settings(PREFIX), SHORT)).contains("cannot be reached"));
}

#[test]
fn after_a_gap_all_is_read_again_also_when_it_was_compacted() {
    let server = Server::cluster(3);
    // One node knows only one member and is cut off with it; the other node continues at another member.
    let mut settings = server.settings(PREFIX);
    settings.endpoints.truncate(1);
    let (one, mut two) = (State::etcd(settings).unwrap(), open(&server));
    add(&mut two, "a").unwrap();
    soon(|| names(&one) == ["a"]);
    server.stop(0, true);
    soon(|| one.condition().unwrap().link.is_err());
    soon(|| add(&mut two, "b").is_ok() || names(&two).contains(&"b".to_owned()));
    soon(|| two.remove_host("a").is_ok() || !names(&two).contains(&"a".to_owned()));
    let (revision, endpoint) = (two.condition().unwrap().revision, two.condition().unwrap().link.unwrap());
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        Client::connect([endpoint], None).await.unwrap().compact(revision, None).await.unwrap();
    });
    assert_eq!(names(&one), ["a"], "the last contents stay");
    server.stop(0, false);
    soon(|| names(&one) == ["b"]);
}

#[test]
fn the_loss_of_any_member_of_three_loses_no_change() {
    let mut server = Server::cluster(3);
    let mut state = open(&server);
    let other = open(&server);
    let mut made = Vec::new();
    for (round, member) in [0, 1, 2].into_iter().enumerate() {
        if round % 2 == 0 {
            server.kill(member)
        } else {
            server.stop(member, true)
        }
        for number in 0..5 {
            let name = format!("host-{round}-{number}");
            let start = Instant::now();
            loop {
                match add(&mut state, &name) {
                    Ok(_) => break,
                    // It was made before the answer was lost.
                    Err(StateError::Conflict(_)) => break,
                    Err(StateError::Unavailable { .. } | StateError::Unknown) => {}
                    Err(error) => panic!("{error}"),
                }
                assert!(start.elapsed() < Duration::from_secs(30));
                std::thread::sleep(Duration::from_millis(50));
            }
            made.push(name);
        }
        if round % 2 == 0 {
            server.begin(member)
        } else {
            server.stop(member, false)
        }
        soon(|| made.iter().all(|name| names(&other).contains(name)));
    }
    assert_eq!(names(&other), made);
}

#[test]
fn a_large_change_is_made_as_a_whole() {
    let server = Server::start();
    let (mut one, two) = (open(&server), open(&server));
    let import = Import { hosts: hosts(2_000), ..Import::default() };
    let seen = std::thread::scope(|scope| {
        let numbers = scope.spawn(move || {
            let mut numbers = vec![0];
            while numbers.last() != Some(&2_000) {
                numbers.push(two.hosts().unwrap().len());
            }
            numbers.dedup();
            numbers
        });
        plan_and_import(&mut one, &import, 1).unwrap();
        numbers.join().unwrap()
    });
    assert_eq!(seen, [0, 2_000], "nobody sees a part of it");
    // If that answer came too late, the next change clears the journal.
    add(&mut one, "next").unwrap();
    assert_eq!(values_in(&server, "v1/journal/"), 0);
    assert_eq!(names(&open(&server)).len(), 2_001);
}

/// etcd counts conditions, too, and takes 128 of them.
#[test]
fn a_change_may_have_more_parts_than_a_transaction_may_have_conditions() {
    let server = Server::start();
    let writes: Vec<_> = (0..13_000).map(|number| layout::Write::Delete(format!("v1/state/none/{number}"))).collect();
    assert!(batch::groups(writes.clone()).len() > 128);
    let outcome = by_hand(&server, async |client| {
        let layout = layout::Layout::new(PREFIX);
        let newest = calls::read_head(client, &layout).await.unwrap();
        calls::commit(client, &layout, &newest, "large", "node", writes).await.unwrap()
    });
    assert!(matches!(outcome, Outcome::Made(_)), "{outcome:?}");
    assert_eq!(values_in(&server, "v1/journal/"), 0);
}

#[test]
fn a_change_that_etcd_refuses_is_told_at_once() {
    let server = Server::start();
    by_hand(&server, async |client| {
        client.role_add("reader").await.unwrap();
        let all = etcd_client::Permission::read(PREFIX).with_prefix();
        client.role_grant_permission("reader", all).await.unwrap();
        client.role_add("root").await.unwrap();
        for (user, role) in [("root", "root"), ("node", "reader")] {
            client.user_add(user, "a password", None).await.unwrap();
            client.user_grant_role(user, role).await.unwrap();
        }
        client.auth_enable().await.unwrap();
    });
    let folder = tempfile::tempdir().unwrap();
    let mut state = State::etcd(with_password(&server, folder.path())).unwrap();
    for change in [1, 300] {
        let asked = Instant::now();
        let refused = message(plan_and_import(&mut state, &Import { hosts: hosts(change), ..Import::default() }, 1));
        assert!(refused.contains("etcd has refused the change") && refused.contains("permission denied"), "{refused}");
        assert!(asked.elapsed() < CHANGE / 2, "{:?}", asked.elapsed());
    }
    assert!(names(&state).is_empty());
}

/// A node writes a large change and dies before the parts are in their places. Removes the host `before`, and adds 500.
fn die_in_a_large_change(server: &Server, state: &State) {
    let mut after = Contents::clone(&state.contents().unwrap());
    let before = Contents::clone(&after);
    after.import(&Import { hosts: hosts(500), ..Import::default() }, 1, 0).unwrap();
    after.remove_host("before").unwrap();
    let parts = batch::groups(layout::writes_of(&after.delta_since(&before)).unwrap());
    let layout = layout::Layout::new(PREFIX);
    let (head, count) = (layout.head(), parts.len());
    by_hand(server, async |client| {
        for (number, writes) in parts.into_iter().enumerate() {
            let part = serde_json::to_string(&batch::Part { v: 1, writes }).unwrap();
            client.put(layout.part("large", number), part, None).await.unwrap();
        }
        let found = client.get(head.clone(), None).await.unwrap();
        let last = layout::decode(found.kvs()[0].value()).unwrap();
        let next = batch::Head::next(Some(&last), "large", "dead", Some(count));
        client.put(head, serde_json::to_string(&next).unwrap(), None).await.unwrap();
    });
}

#[test]
fn a_large_change_whose_node_died_is_finished_by_the_next_one() {
    let server = Server::start();
    let mut state = open(&server);
    add(&mut state, "before").unwrap();
    die_in_a_large_change(&server, &state);
    // The change is made, also for a node that starts now.
    soon(|| names(&state).len() == 500);
    let mut other = open(&server);
    assert_eq!(names(&other).len(), 500);
    add(&mut other, "next").unwrap();
    soon(|| names(&state).len() == 501);
    assert_eq!(values_in(&server, "v1/state/hosts/"), 501);
}

/// A head without the journal would hide parts that are not in their places yet.
#[test]
fn no_change_is_made_on_a_large_one_before_that_is_in_its_place() {
    let server = Server::start();
    let mut state = open(&server);
    add(&mut state, "before").unwrap();
    die_in_a_large_change(&server, &state);
    let outcome = by_hand(&server, async |client| {
        let layout = layout::Layout::new(PREFIX);
        let newest = calls::read_head(client, &layout).await.unwrap();
        assert!(newest.has_journal());
        calls::fence(client, &layout, &newest, "another", "other").await.unwrap()
    });
    assert_eq!(outcome, Outcome::Conflict);
    assert_eq!(names(&open(&server)).len(), 500, "the change is still there for a node that starts now");
}

#[test]
fn a_key_is_claimed_once_and_deleted_by_whoever_has_it() {
    let server = Server::start();
    let state = open(&server);
    let board = state.board().unwrap();
    Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let claim = |value: &str| board.claim("v1/alive/a", value.to_owned(), Duration::from_secs(60));
        let lease = claim("one").await.unwrap().unwrap();
        assert_eq!(claim("two").await.unwrap(), None);
        board.delete_if("v1/alive/a", "two").await.unwrap();
        assert_eq!(board.get("v1/alive/a").await.unwrap().unwrap().value, b"one");
        board.delete_if("v1/alive/a", "one").await.unwrap();
        assert_eq!(board.get("v1/alive/a").await.unwrap(), None);
        assert!(board.renew(lease).await.unwrap(), "the lease goes on without its key");
        board.release(lease).await.unwrap();
        assert!(!board.renew(lease).await.unwrap());
    });
}

#[test]
fn a_value_that_cannot_be_read_costs_its_own_table_only() {
    let server = Server::start();
    let mut state = open(&server);
    add(&mut state, "a").unwrap();
    let put = |key: &str, value: &str| {
        let (key, value) = (format!("{PREFIX}v1/state/{key}"), value.to_owned());
        by_hand(&server, async |client| client.put(key, value, None).await.map(drop)).unwrap();
    };
    for bad in ["{}", "no JSON", r#"{"v":2,"order":1,"record":{}}"#, r#"{"v":1,"order":1,"record":{"name":"b"}}"#] {
        put("baselines/b", bad);
        soon(|| state.baselines().is_err_and(|error| error.to_string().contains("baselines/b")));
        assert_eq!(names(&state), ["a"]);
        assert!(state.remove_host("a").is_ok(), "other tables can be changed");
        add(&mut state, "a").unwrap();
    }
    by_hand(&server, async |client| client.delete(format!("{PREFIX}v1/state/baselines/b"), None).await.map(drop))
        .unwrap();
    soon(|| state.baselines().is_ok());
    // A host stored under another host's name would stay when that host is removed.
    let a = r#"{"v":1,"order":9,"record":{"name":"a","kind":"host-key","spki":"YQ==","enabled":true,"added":1,"labels":[]}}"#;
    put("hosts/b", a);
    soon(|| state.hosts().is_err());
    assert!(message(state.hosts()).contains("belongs under v1/state/hosts/a"));
}

#[test]
fn a_removed_baseline_has_the_form_that_is_documented() {
    let server = Server::start();
    let mut state = open(&server);
    let mut values = claviger_protocol::tpm::pcr::PcrValues::default();
    [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
    state.add_baseline("Fleet", &values, None, 1).unwrap();
    state.remove_baseline("fleet", 100).unwrap();
    let key = format!("{PREFIX}v1/state/removed-baselines/fleet");
    let get = |key: String| {
        by_hand(&server, async |client| client.get(key, None).await.unwrap().kvs()[0].value_str().unwrap().to_owned())
    };
    let value: serde_json::Value = serde_json::from_str(&get(key.clone())).unwrap();
    let hex = "01".repeat(32);
    let pcrs = format!("0={hex} 4={hex} 7={hex}");
    let record =
        serde_json::json!({"name": "Fleet", "pcrs": pcrs, "added": 1, "removed": 100, "reserved_until": 100 + 29_401});
    assert_eq!(value, serde_json::json!({"v": 1, "order": 1, "record": record}));
    // One that cannot be read refuses every change of baselines, which could depend on it, and nothing else.
    by_hand(&server, async |client| client.put(key.clone(), "{}", None).await.map(drop)).unwrap();
    soon(|| state.reserved_until("b", &values, 1).is_err());
    assert!(message(state.add_baseline("b", &values, None, 1)).contains("removed-baselines/fleet"));
    assert_eq!(state.baselines().unwrap(), []);
    add(&mut state, "a").unwrap();
}

/// Runs openssl in a folder.
fn openssl(folder: &std::path::Path, arguments: &str) {
    let done = std::process::Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn tls_with_certificates_of_both_sides() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str| folder.path().join(name);
    let text = |name: &str| of(name).to_str().unwrap().to_owned();
    openssl(folder.path(), "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca");
    std::fs::write(of("extensions"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n").unwrap();
    for name in ["server", "node"] {
        openssl(
            folder.path(),
            &format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"),
        );
        openssl(
            folder.path(),
            &format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile extensions"
            ),
        );
        std::fs::set_permissions(of(&format!("{name}.key")), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let arguments = ["--cert-file", &text("server.pem"), "--key-file", &text("server.key"), "--client-cert-auth"];
    let arguments = arguments.into_iter().chain(["--trusted-ca-file"]).map(str::to_owned).chain([text("ca.pem")]);
    let server = Server::with_tls(arguments.collect());
    let settings = EtcdSettings {
        ca: Some(of("ca.pem")),
        identity: Some((of("node.pem"), of("node.key"))),
        ..server.settings(PREFIX)
    };
    let mut state = State::etcd(settings.clone()).unwrap();
    add(&mut state, "a").unwrap();
    let refused = |settings| {
        let shared = Shared::new(settings);
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let endpoint = &shared.settings.endpoints[0];
            match shared.settings.connect(endpoint).await {
                Err(error) => error.problem,
                Ok(client) => calls::read_head(&client, &shared.layout).await.unwrap_err().to_string(),
            }
        })
    };
    let problem = refused(EtcdSettings { identity: None, ..settings.clone() });
    assert!(!problem.is_empty());
    let problem = refused(EtcdSettings { ca: Some(of("node.pem")), ..settings.clone() });
    assert!(problem.contains("UnknownIssuer"), "{problem}");
    // A key file that other users can read is not used.
    std::fs::set_permissions(of("node.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let problem = refused(settings);
    assert!(problem.contains("node.key"), "{problem}");
}

#[test]
fn a_user_with_a_password_needs_rights_below_the_prefix_only() {
    let server = Server::start();
    by_hand(&server, async |client| {
        client.role_add("claviger").await.unwrap();
        let all = etcd_client::Permission::read_write(PREFIX).with_prefix();
        client.role_grant_permission("claviger", all).await.unwrap();
        for user in ["root", "node"] {
            client.user_add(user, "a password", None).await.unwrap();
        }
        client.role_add("root").await.unwrap();
        client.user_grant_role("root", "root").await.unwrap();
        client.user_grant_role("node", "claviger").await.unwrap();
        client.auth_enable().await.unwrap();
    });
    let folder = tempfile::tempdir().unwrap();
    let settings = with_password(&server, folder.path());
    let mut state = State::etcd(settings.clone()).unwrap();
    plan_and_import(&mut state, &Import { hosts: hosts(300), ..Import::default() }, 1).unwrap();
    add(&mut state, "a").unwrap();
    assert_eq!(names(&State::etcd(settings.clone()).unwrap()).len(), 301);
    let elsewhere = EtcdSettings { prefix: "/other/".to_owned(), ..settings.clone() };
    assert!(message(Etcd::open(elsewhere, SHORT)).contains("permission denied"));
    std::fs::write(folder.path().join("password"), "another one\n").unwrap();
    assert!(message(Etcd::open(settings, SHORT)).contains("authentication failed"));
}
