//! Several daemons with one state in etcd: real etcd servers, real soft tokens, real clients that know all URLs.

#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use claviger::admin::{self, Command as AdminCommand};
use claviger::config::{AttestMode, Config, Etcd as EtcdSection, Link};
use claviger_client::failover::Services;
use claviger_client::host::Host;
use claviger_client::host_files::Folder;
use claviger_client::http::{Client, TlsSettings};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::etcd::{Etcd, Proxy};
use claviger_tests::tpm::{SoftwareHost, boot_log, replayed};
use claviger_tests::{Daemon, HOST, Lab, Options, PATIENCE, block, claviger, run, said, tool, until, until_attested};
use data_encoding::{BASE64, HEXLOWER};
use serde_json::Value;

/// Time limit of a request with all its repetitions. A request that takes longer is lost.
const LOST: Duration = Duration::from_secs(180);
/// Prefix of the keys in etcd.
const PREFIX: &str = "/nodes-test/";

/// Nodes of one service on the same tokens.
struct Service {
    etcd: Etcd,
    lab: Lab,
    nodes: Vec<Node>,
}

struct Node {
    name: String,
    config: PathBuf,
    daemon: Option<Daemon>,
    /// Environment of its process.
    env: Vec<(String, String)>,
}

impl Service {
    /// Makes a lab, moves its state to etcd, and writes a configuration for each node. `endpoints` of a node may be
    /// those of proxies.
    fn make(
        etcd: Etcd,
        options: Options,
        nodes: usize,
        max_staleness: Duration,
        endpoints: impl Fn(usize, &Etcd) -> Vec<String>,
    ) -> Self {
        let lab = Lab::make(options);
        let service = Self { etcd, lab, nodes: Vec::new() };
        let migrate = service.write("migrate.toml", service.etcd.endpoints(), max_staleness, |_| {});
        let records = |output: &Output| -> Value {
            assert!(output.status.success(), "{}", said(output));
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        let migrate = |more: &[&str]| {
            let config = ["--json", "--config", migrate.to_str().unwrap()];
            run(["migrate"].into_iter().chain(more.iter().copied()).chain(config))
        };
        let planned = records(&migrate(&["--to-etcd", "--dry-run"]));
        assert_eq!((&planned["applied"], &planned["records"]["hosts"]), (&false.into(), &1.into()), "{planned}");
        let made = records(&migrate(&["--to-etcd"]));
        assert_eq!((&made["records"], &made["applied"]), (&planned["records"], &true.into()));
        assert!(
            !service.lab.file("state/state.db").exists() && service.lab.file("state/state.db.moved-to-etcd").exists()
        );
        assert!(said(&migrate(&["--to-etcd"])).contains("there is no state"));
        let node = |at: usize| {
            let name = format!("node-{}", at + 1);
            let state = service.lab.file(&format!("state-{}", at + 1));
            let config =
                service.write(&format!("{name}.toml"), endpoints(at, &service.etcd), max_staleness, |config| {
                    config.server.state = state;
                    config.server.node = Some(name.clone());
                });
            Node { name, config, daemon: None, env: Vec::new() }
        };
        let nodes = (0..nodes).map(node).collect();
        Self { nodes, ..service }
    }

    fn write(
        &self,
        file: &str,
        endpoints: Vec<String>,
        max_staleness: Duration,
        change: impl FnOnce(&mut Config),
    ) -> PathBuf {
        let mut config = self.lab.config();
        config.etcd = Some(EtcdSection {
            endpoints,
            prefix: PREFIX.to_owned(),
            link: Link::Loopback,
            login: None,
            max_staleness_ms: u64::try_from(max_staleness.as_millis()).unwrap(),
        });
        config.hsm.iter_mut().for_each(|hsm| hsm.sessions = 2);
        // The machine is slow and shared, and the tokens are on it.
        config.release.watchdog_ms = 30_000;
        change(&mut config);
        let path = self.lab.file(file);
        std::fs::write(&path, config.to_toml().unwrap()).unwrap();
        path
    }

    /// Starts all nodes at the same time.
    fn start(&mut self) {
        std::thread::scope(|scope| {
            for node in &mut self.nodes {
                scope.spawn(|| node.start());
            }
        });
    }

    fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.daemon().url.clone()).collect()
    }

    /// Registers a host with a new key at a node, and returns it as a client of each running node.
    fn new_host(&self, name: &str) -> Vec<Host> {
        let key = RsaPrivateKey::generate(2048).unwrap();
        let file = self.lab.file(&format!("{name}.pub.pem"));
        std::fs::write(&file, key.public().to_pem()).unwrap();
        self.nodes[0].done(&["hosts", "add", name, "--public-key", file.to_str().unwrap()]);
        let (key, identity) = (Arc::new(key), self.lab.identity());
        let client = |node: &Node| Client::new(&node.daemon().url).unwrap().with_timeout(PATIENCE);
        self.nodes.iter().map(|node| Host::new(client(node), Arc::clone(&key), Arc::clone(&identity))).collect()
    }

    /// Asserts that every node has this host, or that none has it.
    fn agree(&self, what: &str, has: impl Fn(&Value) -> bool) {
        for node in &self.nodes {
            until(&format!("{what} at {}", node.name), || has(&node.json(&["hosts", "list"])).then_some(()));
        }
    }
}

impl Node {
    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Starts the daemon. From the second time on, it has the addresses of the first time.
    fn start(&mut self) {
        let mut command = Command::new(claviger());
        command.arg("serve").arg("--config").arg(&self.config).envs(self.env.iter().cloned());
        let daemon = Daemon::start(&mut command);
        let mut config = Config::load(&self.config).unwrap();
        config.server.listen = daemon.address();
        config.server.metrics = daemon.metrics_url.strip_prefix("http://").unwrap().parse().unwrap();
        std::fs::write(&self.config, config.to_toml().unwrap()).unwrap();
        self.daemon = Some(daemon);
    }

    fn run(&self, arguments: &[&str]) -> Output {
        run(arguments.iter().copied().chain(["--config", self.config.to_str().unwrap()]))
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}: {arguments:?}: {}", self.name, said(&output));
        said(&output)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{}: {arguments:?}: {}", self.name, said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn socket(&self) -> PathBuf {
        Config::load(&self.config).unwrap().server.admin_socket()
    }

    fn ready(&self) -> (u16, String) {
        let reply = block(self.daemon().probe("/ready"));
        (reply.status.as_u16(), String::from_utf8_lossy(&reply.body).into_owned())
    }

    fn metric(&self, name: &str) -> f64 {
        block(self.daemon().metrics()).sum(name, &[]).unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }
}

fn host_of<'v>(list: &'v Value, name: &str) -> Option<&'v Value> {
    list.as_array().unwrap().iter().find(|host| host["name"] == name)
}

/// What came of a client's requests.
#[derive(Default)]
struct Outcome {
    released: usize,
    lost: Vec<String>,
    wrong: Vec<String>,
    slowest: Duration,
}

/// Clients that ask for keys, each at all nodes, until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Outcome>>,
}

impl Load {
    fn start(service: &Service, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let owner = service.lab.owner();
        let protectors = service.lab.protectors();
        let keys: Vec<_> = protectors.iter().map(|protector| owner.open(protector).unwrap()).collect();
        let known: Arc<Vec<_>> = Arc::new(protectors.into_iter().zip(keys).collect());
        let client = |number: usize| {
            let folder = service.lab.file(&format!("client-{number}"));
            copy_folder(&service.lab.file("host"), &folder);
            let mut urls = service.urls();
            let first = number % urls.len();
            urls.rotate_left(first);
            let (stop, known, owner) = (Arc::clone(&stop), Arc::clone(&known), service.lab.owner());
            std::thread::spawn(move || {
                let mut outcome = Outcome::default();
                while !stop.load(Ordering::Relaxed) {
                    let (protector, key) = &known[(outcome.released + number) % known.len()];
                    let begun = Instant::now();
                    let released = block(async {
                        let folder = Folder::new(&folder);
                        let mut services = Services::new(folder, None, &urls, &TlsSettings::default(), LOST);
                        services
                            .as_mut()
                            .map_err(|error| error.to_string())?
                            .unwrap(protector)
                            .await
                            .map_err(|e| e.to_string())
                    });
                    outcome.slowest = outcome.slowest.max(begun.elapsed());
                    match released {
                        Err(error) => outcome.lost.push(error),
                        Ok(released) => {
                            outcome.released += 1;
                            let of = &released.unwrapped;
                            if of.keys.ingress != *key {
                                outcome.wrong.push("another ingress key".to_owned());
                            }
                            if outcome.released % 8 == 1
                                && owner.open(&of.egress_protector).ok().as_ref() != Some(&of.keys.egress)
                            {
                                outcome.wrong.push("the owner finds another egress key".to_owned());
                            }
                        }
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, clients }
    }

    /// Stops it; asserts that every request was answered rightly, and returns their number and the slowest.
    fn stop(self) -> (usize, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let outcomes: Vec<_> = self.clients.into_iter().map(|client| client.join().unwrap()).collect();
        let lost: Vec<_> = outcomes.iter().flat_map(|outcome| &outcome.lost).collect();
        let wrong: Vec<_> = outcomes.iter().flat_map(|outcome| &outcome.wrong).collect();
        assert!(lost.is_empty() && wrong.is_empty(), "lost: {lost:#?}\nwrong: {wrong:#?}");
        let released = outcomes.iter().map(|outcome| outcome.released).sum();
        (released, outcomes.iter().map(|outcome| outcome.slowest).max().unwrap())
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A writer that changes one host at one node after the other: its label is the number of the last change.
struct Writer {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Written>,
}

/// What the writer was told.
#[derive(Default)]
struct Written {
    /// The last number that was acknowledged.
    made: u64,
    /// Later numbers of which nobody said whether they were made.
    unknown: BTreeSet<u64>,
    acknowledged: usize,
    refused: usize,
}

impl Writer {
    fn start(service: &Service, host: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sockets: Vec<_> = service.nodes.iter().map(Node::socket).collect();
        let (stopped, host) = (Arc::clone(&stop), host.to_owned());
        let task = std::thread::spawn(move || {
            let label = |number: u64| format!("change={number}");
            let mut written = Written::default();
            for number in 1.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let earlier: Vec<_> = written.unknown.iter().chain([&written.made]).copied().map(label).collect();
                let command = AdminCommand::LabelHost {
                    name: host.clone(),
                    add: vec![label(number)].try_into().unwrap(),
                    remove: earlier.try_into().unwrap(),
                };
                match block(admin::call(&sockets[number as usize % sockets.len()], &command)) {
                    Ok(_) => {
                        written.made = number;
                        written.unknown.clear();
                        written.acknowledged += 1;
                    }
                    Err(error) if error.to_string().contains("so nothing is changed") => written.refused += 1,
                    // The daemon was killed, or etcd was lost in the middle of the change.
                    Err(_) => drop(written.unknown.insert(number)),
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            written
        });
        Self { stop, task }
    }

    /// Stops it, and asserts that every node has the last change that was acknowledged, or a later one.
    fn stop(self, service: &Service, host: &str) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let written = self.task.join().unwrap();
        let mut possible = written.unknown.clone();
        possible.insert(written.made);
        service.agree("the last change that was acknowledged", |list| {
            let labels = host_of(list, host).unwrap()["labels"].as_array().unwrap().clone();
            let numbers: Vec<u64> =
                labels.iter().filter_map(|label| label.as_str()?.strip_prefix("change=")?.parse().ok()).collect();
            numbers.len() == 1 && possible.contains(&numbers[0])
        });
        written
    }
}

/// The number of private keys with this label on a token.
fn private_keys(lab: &Lab, label: &str) -> usize {
    let config = lab.config();
    let hsm = &config.hsm[0];
    let claviger::config::TokenName::Label(token) = &hsm.token else { panic!("a token without a label") };
    let mut command = Command::new("pkcs11-tool");
    command.arg("--module").arg(&hsm.module).args(["--token-label", token, "--login", "--pin"]);
    command.arg(&*hsm.read_pin().unwrap()).args(["--list-objects", "--type", "privkey"]).envs(&config.env);
    let output = tool("opensc", &mut command);
    assert!(output.status.success(), "{}", said(&output));
    said(&output).lines().filter(|line| line.trim_start().starts_with("label:") && line.contains(label)).count()
}

#[test]
fn nodes_that_start_together_make_one_signer_and_share_everything() {
    let options = Options { hsms: 1, vms: 2, ..Options::default() };
    let mut service = Service::make(Etcd::start(1), options, 3, Duration::from_secs(60), |_, etcd| etcd.endpoints());
    // Without the signer that the lab made, each node finds that there is none.
    let keys = private_keys(&service.lab, "claviger attestation signer");
    let signers = format!("{PREFIX}v1/state/signers/");
    etcdctl(&service.etcd, &["del", "--prefix", &signers]);
    service.start();
    // Three nodes release for the certificates of three, and after the rotation once more.
    const RELEASES: usize = 3 * 3 + 3;
    let healths: Vec<_> =
        service.nodes.iter().map(|node| until_attested(&service.lab.host(node.daemon().client()))).collect();
    for node in &service.nodes {
        let host = service.lab.host(node.daemon().client());
        for health in &healths {
            block(host.roll(ApiVersion::V2, health, &service.lab.protector())).unwrap();
        }
        let listed = node.json(&["signers", "list"]);
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    }
    assert_eq!(private_keys(&service.lab, "claviger attestation signer"), keys + 1, "one key was made");

    // All nodes know each other.
    until("all nodes are listed with their members", || {
        let nodes = service.nodes[1].json(&["nodes", "list"]);
        let nodes = nodes.as_array().unwrap();
        let whole = |node: &Value| {
            node["running"] == true
                && node["members_up"] == 1
                && node["keys"] == 3
                && node["missing"] == serde_json::json!([])
        };
        let revisions: BTreeSet<_> = nodes.iter().map(|node| node["revision"].as_i64()).collect();
        (nodes.len() == 3 && nodes.iter().all(whole) && revisions.len() == 1).then_some(())
    });
    let told = service.nodes[0].done(&["nodes", "list"]);
    assert!(told.contains("node-3") && told.contains("1/1"), "{told}");
    // Whoever deletes the key of a node that runs, its announcement comes back.
    etcdctl(&service.etcd, &["del", &format!("{PREFIX}v1/alive/node-2")]);
    let runs = |name: &str| {
        let nodes = service.nodes[0].json(&["nodes", "list"]);
        nodes.as_array().unwrap().iter().any(|node| node["name"] == name && node["running"] == true)
    };
    assert!(!runs("node-2"));
    until("the node is announced again", || runs("node-2").then_some(()));
    let findings: Vec<Value> = serde_json::from_slice(&service.nodes[0].run(&["doctor", "--json"]).stdout).unwrap();
    let found = |check: &str, level: &str| findings.iter().any(|of| of["check"] == check && of["level"] == level);
    assert!(found("nodes", "ok") && found("state", "ok"), "{findings:#?}");
    assert!(!findings.iter().any(|of| of["level"] == "error"), "{findings:#?}");

    // A rotation at one node is in force at the others, and an older certificate stays good.
    service.nodes[2].done(&["signers", "rotate"]);
    let current = |node: &Node| {
        let listed = node.json(&["signers", "list"]);
        listed.as_array().unwrap().iter().find(|of| of["state"] == "current").unwrap()["thumbprint"].clone()
    };
    let rotated = current(&service.nodes[2]);
    for node in &service.nodes {
        until("the new signer", || (current(node) == rotated).then_some(()));
        let host = service.lab.host(node.daemon().client());
        block(host.roll(ApiVersion::V2, &healths[0], &service.lab.protector())).unwrap();
    }

    // Removals: how long until the other nodes refuse.
    let mut seen = Vec::new();
    for number in 0..20 {
        let name = format!("gone-{number}");
        let file = service.lab.file("gone.pub.pem");
        std::fs::write(&file, RsaPrivateKey::generate(2048).unwrap().public().to_pem()).unwrap();
        service.nodes[0].done(&["hosts", "add", &name, "--public-key", file.to_str().unwrap()]);
        service.agree("the new host", |list| host_of(list, &name).is_some());
        let hosts = |node: &Node| node.metric("claviger_hosts_registered");
        let before = hosts(&service.nodes[1]);
        block(admin::call(&service.nodes[0].socket(), &AdminCommand::RemoveHost { name })).unwrap();
        let acknowledged = Instant::now();
        // The metric is read from the snapshot that decides releases.
        until("the removal at the other node", || (hosts(&service.nodes[1]) < before).then_some(()));
        seen.push(acknowledged.elapsed());
    }
    seen.sort_unstable();
    println!("a removal is in force at another node after {:?} (median), {:?} (most of 20)", seen[10], seen[19]);

    // A key is counted wherever it was used.
    for node in &service.nodes {
        until("the releases of all nodes are counted", || {
            let listed = node.json(&["keys", "list"]);
            let used = |key: &Value| key["releases"] == RELEASES && key["counted_since"].is_null();
            listed.as_array().unwrap().iter().all(used).then_some(())
        });
    }

    // Export and import work as with a local state.
    let (export, passphrase) = (service.lab.file("export.age"), service.lab.file("passphrase"));
    std::fs::write(&passphrase, "correct horse battery staple\n").unwrap();
    std::fs::set_permissions(&passphrase, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let files = [export.to_str().unwrap(), "--passphrase-file", passphrase.to_str().unwrap()];
    service.nodes[0].done(&[&["export"], &files[..]].concat());
    service.nodes[0].done(&["hosts", "remove", HOST]);
    service.agree("the host is gone", |list| host_of(list, HOST).is_none());
    service.nodes[1].done(&[&["import"], &files[..], &["--yes"]].concat());
    service.agree("the host is back", |list| host_of(list, HOST).is_some());

    // The trails of all nodes are verified together, and one that was changed is found.
    let folders: Vec<_> = (1..=3).map(|number| service.lab.file(&format!("state-{number}"))).collect();
    let verify = |folders: &[PathBuf]| {
        let folders = folders.iter().map(|folder| folder.to_str().unwrap());
        run(["audit", "verify"].into_iter().chain(folders))
    };
    let verified = verify(&folders);
    assert_eq!(verified.status.code(), Some(0), "{}", said(&verified));
    assert!(
        (1..=3).all(|number| said(&verified).contains(&format!("of node-{number} are one chain"))),
        "{}",
        said(&verified)
    );
    let twice = verify(&[folders[0].clone(), folders[0].clone()]);
    assert!(
        twice.status.code() == Some(2) && said(&twice).contains("both have the trail of node-1"),
        "{}",
        said(&twice)
    );
    let copy = service.lab.file("copy");
    std::fs::create_dir(&copy).unwrap();
    let trail = std::fs::read_to_string(folders[1].join("audit.jsonl")).unwrap();
    let changed = trail.replacen("\"success\"", "\"failed\"", 1);
    assert_ne!(changed, trail);
    std::fs::write(copy.join("audit.jsonl"), changed).unwrap();
    let wrong = verify(&[folders[0].clone(), copy, folders[2].clone()]);
    assert!(wrong.status.code() == Some(1) && said(&wrong).contains("WRONG"), "{}", said(&wrong));

    // Back to a file: not while nodes run.
    let migrate = |node: &Node| node.run(&["migrate", "--to-sqlite"]);
    assert!(said(&migrate(&service.nodes[0])).contains("stop the daemon first"));
    let first = service.nodes[0].daemon.take().unwrap();
    assert!(first.stop().success());
    // On a busy machine the last word of a node may be late: then its lease has to end.
    let refused = until("the first node counts as gone", || {
        let refused = said(&migrate(&service.nodes[0]));
        (!refused.contains("node-1")).then_some(refused)
    });
    assert!(refused.contains("node-2") && refused.contains("node-3"), "{refused}");
    for node in &mut service.nodes[1..] {
        assert!(node.daemon.take().unwrap().stop().success());
    }
    until("the other nodes count as gone, and the state is moved", || {
        let moved = migrate(&service.nodes[0]);
        let waits = said(&moved).contains("these nodes run");
        assert!(moved.status.success() || waits, "{}", said(&moved));
        (!waits).then_some(())
    });
    let mut config = Config::load(&service.nodes[0].config).unwrap();
    config.etcd = None;
    std::fs::write(&service.nodes[0].config, config.to_toml().unwrap()).unwrap();
    service.nodes[0].start();
    let alone = &service.nodes[0];
    let health = until_attested(&service.lab.host(alone.daemon().client()));
    block(service.lab.host(alone.daemon().client()).roll(ApiVersion::V2, &health, &service.lab.protector())).unwrap();
    assert_eq!(current(alone), rotated);
    let refused = alone.run(&["nodes", "list"]);
    assert!(!refused.status.success() && said(&refused).contains("there are no other nodes"), "{}", said(&refused));
}

/// Runs etcd's own client.
fn etcdctl(etcd: &Etcd, arguments: &[&str]) -> String {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg("--endpoints").arg(etcd.endpoints().join(",")).args(arguments);
    let output = tool("etcd-client", &mut command);
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    said(&output)
}

#[test]
fn a_node_that_is_cut_off_serves_for_its_time_and_then_not_before_it_has_caught_up() {
    const LIMIT: Duration = Duration::from_secs(6);
    let etcd = Etcd::start(1);
    let proxy = Proxy::before(etcd.address(0));
    let options = Options { hsms: 1, vms: 1, ..Options::default() };
    let endpoints = |node: usize, etcd: &Etcd| if node == 0 { etcd.endpoints() } else { vec![proxy.url()] };
    let mut service = Service::make(etcd, options, 2, LIMIT, endpoints);
    service.start();
    let [connected, apart] = &service.nodes[..] else { panic!("two nodes") };
    let stays = service.lab.host(apart.daemon().client());
    let health = until_attested(&stays);
    let goner = service.new_host("goner");
    service.agree("the new host", |list| host_of(list, "goner").is_some());
    let gone = until("the new host attests", || block(goner[1].attest()).ok());
    let protector = service.lab.protector();
    for host in &goner {
        block(host.roll(ApiVersion::V2, &gone, &protector)).unwrap();
    }
    until("ready", || (apart.ready().0 == 200).then_some(()));
    assert_eq!((apart.metric("claviger_etcd_connected"), apart.metric("claviger_state_age_limit_seconds")), (1.0, 6.0));
    assert!(apart.metric("claviger_state_revision") > 0.0);

    // Cut off: it serves on, but changes nothing. The time counts from the last confirmation, before the cut.
    proxy.cut();
    let cut = Instant::now();
    connected.done(&["hosts", "remove", "goner"]);
    let refused =
        |host: &Host, health: &[u8]| block(host.roll(ApiVersion::V2, health, &protector)).err().map(|e| e.to_string());
    let said_by_connected =
        refused(&goner[0], &gone).expect("a host that was removed is not served by the node that removed it");
    assert!(said_by_connected.contains("403 HealthCertificateException"), "{said_by_connected}");
    let asked = Instant::now();
    let while_stale = refused(&stays, &health);
    // Only a request that was answered in time proves something.
    if cut.elapsed() < LIMIT - Duration::from_secs(1) {
        assert_eq!(while_stale, None, "asked {:?} after the cut", asked - cut);
    }
    let change = apart.run(&["hosts", "disable", HOST]);
    assert!(!change.status.success(), "a change without etcd");
    // Too old: nothing is released, to nobody.
    until("the node refuses", || {
        let sent = Instant::now();
        let answer = refused(&goner[1], &gone);
        assert!(answer.is_some() || sent < cut + LIMIT, "a removed host was served {:?} after the cut", sent - cut);
        let answer = refused(&stays, &health)?;
        assert!(
            answer.contains("503 ServiceUnavailableException")
                && answer.contains("could not confirm the state in etcd"),
            "{answer}"
        );
        Some(())
    });
    let attested = block(stays.attest()).err().map(|error| error.to_string()).unwrap();
    assert!(attested.contains("503 UnavailableErrorReply"), "{attested}");
    let (status, ready) = apart.ready();
    assert!(status == 503 && ready.contains("etcd has not confirmed the state for"), "{status} {ready}");
    let page = String::from_utf8_lossy(&block(apart.daemon().probe("/")).body).into_owned();
    assert!(page.contains("No keys are released: etcd has not confirmed the state for"), "{page}");
    assert_eq!(apart.metric("claviger_etcd_connected"), 0.0);
    assert!(apart.metric("claviger_state_age_seconds") > 6.0);
    let begun = Instant::now();
    let change = said(&apart.run(&["hosts", "disable", HOST]));
    assert!(change.contains("etcd cannot be reached, so nothing is changed"), "{change}");
    println!("a change without etcd is refused after {:?}", begun.elapsed());
    // The other node goes on.
    block(service.lab.host(connected.daemon().client()).roll(ApiVersion::V2, &health, &protector)).unwrap();

    // Back: the host that was removed meanwhile is never served again.
    proxy.mend();
    until("the node serves again", || {
        let removed = refused(&goner[1], &gone).expect("a host that was removed is served again after the cut");
        assert!(removed.contains("503") || removed.contains("403 HealthCertificateException"), "{removed}");
        refused(&stays, &health).is_none().then_some(())
    });
    until("ready", || (apart.ready().0 == 200).then_some(()));
    apart.done(&["hosts", "disable", HOST]);
    service.agree("the change", |list| host_of(list, HOST).unwrap()["enabled"] == false);
}

#[test]
fn nothing_is_lost_whatever_fails_under_load() {
    let options = Options { hsms: 3, vms: 4, ..Options::default() };
    let mut service = Service::make(Etcd::start(3), options, 3, Duration::from_secs(120), |_, etcd| etcd.endpoints());
    // The clock of one node is ten minutes ahead.
    service.nodes[2].env = ahead(600);
    service.start();
    until_attested(&service.lab.host(service.nodes[0].daemon().client()));
    service.new_host("register");
    let clocks: Vec<_> = service.nodes.iter().map(|node| node.metric("claviger_clock_timestamp_seconds")).collect();
    assert!((500.0..700.0).contains(&(clocks[2] - clocks[0])), "{clocks:?}");
    let load = Load::start(&service, 3);
    let writer = Writer::start(&service, "register");
    let pause = || std::thread::sleep(Duration::from_secs(4));
    let leader = |etcd: &Etcd| until("etcd has a leader", || etcd.leader());
    pause();

    let lost = leader(&service.etcd);
    service.etcd.kill(lost);
    pause();
    service.etcd.begin(lost);
    pause();
    let lost = leader(&service.etcd);
    service.etcd.freeze(lost);
    pause();
    service.etcd.thaw(lost);
    pause();
    // Two of three: there is no majority.
    for kill in [true, false] {
        let two = [leader(&service.etcd), (leader(&service.etcd) + 1) % 3];
        for member in BTreeSet::from(two) {
            if kill { service.etcd.kill(member) } else { service.etcd.freeze(member) }
        }
        until("a change is refused", || {
            let change = said(&service.nodes[0].run(&["hosts", "label", HOST, "never"]));
            (change.contains("so nothing is changed")).then_some(())
        });
        pause();
        for member in BTreeSet::from(two) {
            if kill { service.etcd.begin(member) } else { service.etcd.thaw(member) }
        }
        leader(&service.etcd);
        for node in &service.nodes {
            until("connected again", || (node.metric("claviger_etcd_connected") == 1.0).then_some(()));
        }
    }
    // A node.
    service.nodes[0].daemon.take().unwrap().process.kill();
    pause();
    service.nodes[0].start();
    pause();
    service.nodes[1].daemon().process.freeze();
    pause();
    service.nodes[1].daemon().process.thaw();
    pause();
    // A rolling update: one after the other.
    for node in &mut service.nodes {
        assert!(node.daemon.take().unwrap().stop().success());
        node.start();
        block(node.daemon().until_ready_is(200));
    }
    pause();
    let (released, slowest) = load.stop();
    let written = writer.stop(&service, "register");
    println!(
        "{released} releases, none lost or wrong, the slowest took {slowest:.1?}; {} changes acknowledged, {} refused, {} \
         unknown",
        written.acknowledged,
        written.refused,
        written.unknown.len()
    );
    assert!(released > 20 && written.acknowledged > 5 && written.refused > 0);
    // What was refused was not made.
    service.agree("the state", |list| host_of(list, HOST).unwrap()["labels"] == serde_json::json!([]));
}

/// The environment of a process whose clock is this number of seconds ahead (Debian: faketime).
fn ahead(seconds: i64) -> Vec<(String, String)> {
    let folders = std::fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path().join("faketime"));
    let library = folders.map(|folder| folder.join("libfaketime.so.1")).find(|library| library.exists());
    let library = library.expect("there is no libfaketime; install faketime");
    [
        ("LD_PRELOAD", library.to_str().unwrap().to_owned()),
        ("FAKETIME", format!("+{seconds}")),
        // Time limits are not those of a test.
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

#[test]
fn a_host_with_a_tpm_does_its_two_steps_at_different_nodes() {
    let options = Options { hsms: 1, vms: 1, ..Options::default() };
    let mut service = Service::make(Etcd::start(1), options, 2, Duration::from_secs(60), |_, etcd| etcd.endpoints());
    for node in &service.nodes {
        let mut config = Config::load(&node.config).unwrap();
        config.attest.mode = AttestMode::Tpm;
        std::fs::write(&node.config, config.to_toml().unwrap()).unwrap();
    }
    service.start();
    let mut host = SoftwareHost::new("ovmf-sb-uki");
    let file = service.lab.file("ek.pem");
    std::fs::write(&file, host.tpm.endorsement_key().public().to_pem()).unwrap();
    service.nodes[0].done(&["hosts", "add", "measured", "--ek-public", file.to_str().unwrap(), "--trust-ek"]);
    let values = replayed(&std::fs::read(boot_log("ovmf-sb-uki")).unwrap(), [0, 4, 7].into_iter().collect());
    let given: Vec<_> = values.iter().map(|(pcr, value)| format!("{pcr}={}", HEXLOWER.encode(value))).collect();
    let pcrs = given.iter().flat_map(|value| ["--pcr", value]);
    service.nodes[1].done(&["baselines", "add", "base"].into_iter().chain(pcrs).collect::<Vec<_>>());
    service.agree("the host with the TPM", |list| host_of(list, "measured").is_some());
    let [one, two] = &service.nodes[..] else { panic!("two nodes") };
    for (first, second) in [(one, two), (two, one)] {
        // The nodes take over the common key when they have asked etcd for it.
        until("a certificate by two nodes", || {
            let begun = host.begin(first.daemon()).ok()?;
            begun.send(second.daemon()).ok()
        });
    }
    // The key is in etcd, and only encrypted.
    let sealed = etcdctl(&service.etcd, &["get", "--print-value-only", &format!("{PREFIX}v1/tpm-state-key")]);
    let sealed: Value = serde_json::from_str(&sealed).unwrap();
    assert_eq!(BASE64.decode(sealed["seed"].as_str().unwrap().as_bytes()).unwrap().len(), 256, "RSA-2048");
    // When it cannot be opened, the nodes make another one.
    let broken = format!("{{\"v\":1,\"made\":{},\"spki_sha256\":\"00\",\"seed\":\"AAAA\"}}", sealed["made"]);
    etcdctl(&service.etcd, &["put", &format!("{PREFIX}v1/tpm-state-key"), &broken]);
    until("another key", || {
        let found = etcdctl(&service.etcd, &["get", "--print-value-only", &format!("{PREFIX}v1/tpm-state-key")]);
        let found: Value = serde_json::from_str(&found).unwrap();
        (found["spki_sha256"] == sealed["spki_sha256"] && found["seed"] != sealed["seed"]).then_some(())
    });
    until("a certificate by two nodes", || host.begin(one.daemon()).ok()?.send(two.daemon()).ok());
}
