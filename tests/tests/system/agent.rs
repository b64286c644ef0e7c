//! The agent of a host: `claviger host agent` between machines that start and a real daemon on a soft token.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use claviger_client::agent::counters::Counters;
use claviger_client::agent::gather::Pace;
use claviger_client::agent::server::{self, Settings};
use claviger_client::agent::wire;
use claviger_client::host::Unwrapped;
use claviger_client::host_files::Folder;
use claviger_client::http::{Client, TlsSettings};
use claviger_client::vault::file;
use claviger_client::vault::format::Vault;
use claviger_client::vault::secrets::Secrets;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::payload::Payload;
use claviger_tests::{
    Daemon, HOST, Lab, Metrics, Options, PATIENCE, Process, block, claviger, metadata, run, said, tool, until,
};

/// Machines that start at once.
const MACHINES: usize = 100;

/// A host with an agent, in a lab that is served.
struct Host {
    lab: Lab,
    daemon: Daemon,
    socket: PathBuf,
}

impl Host {
    fn new() -> Self {
        let (daemon, lab) = Lab::start(Options::default());
        let socket = lab.file("agent/agent.sock");
        Self { lab, daemon, socket }
    }

    fn agent(&self, options: &[&str]) -> Process {
        self.agent_of(&self.daemon.url, options)
    }

    fn agent_of(&self, url: &str, options: &[&str]) -> Process {
        let mut command = Command::new(claviger());
        command.args(["host", "agent", "--url", url, "--metrics", "127.0.0.1:0", "--socket"]);
        command.arg(&self.socket).arg("--dir").arg(self.lab.file("host")).args(options).env("RUST_LOG", "info");
        let agent = Process::start(&mut command);
        agent.line(|line| line.starts_with("metrics on ").then_some(()));
        agent
    }

    /// The vault of a machine whose protector lets these guardians in, and what is in it.
    fn vault(&self, name: &str, guardians: &[Metadata]) -> (PathBuf, Secrets) {
        let (protector, key) = self.lab.owner().create(guardians).unwrap();
        let mut secrets = Secrets::default();
        secrets.add("state-key", name.as_bytes().to_vec().into(), false).unwrap();
        let path = self.lab.file(&format!("{name}.vault"));
        file::create(&path, &Vault::create(name, &protector, &key, &secrets).unwrap()).unwrap();
        (path, secrets)
    }

    fn open(&self, vault: &Path) -> Command {
        self.open_within(vault, PATIENCE.as_secs())
    }

    fn open_within(&self, vault: &Path, seconds: u64) -> Command {
        let mut command = Command::new(claviger());
        command.args(["host", "vm", "open"]).arg(vault).arg("--seen").arg(self.lab.file("seen"));
        command.args(["--timeout", &seconds.to_string()]);
        command.arg("--agent").arg(&self.socket).args(["--", "sh", "-c", "cat /dev/fd/{state-key}"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn guardian(&self) -> Metadata {
        block(metadata(&self.daemon.client()))
    }
}

fn metrics_of(agent: &Process) -> Metrics {
    let url = agent.line(|line| Some(line.strip_prefix("metrics on ")?.to_owned()));
    let reply = block(Client::new(&url).unwrap().with_timeout(PATIENCE).get("/metrics")).unwrap();
    assert_eq!(reply.status, 200);
    Metrics::parse(std::str::from_utf8(&reply.body).unwrap())
}

#[test]
fn machines_that_start_together_share_a_certificate_and_few_requests() {
    let host = Host::new();
    let guardian = host.guardian();
    let machines: Vec<_> =
        (0..MACHINES).map(|at| host.vault(&format!("vm-{at}"), std::slice::from_ref(&guardian))).collect();
    // One whose protector lets nobody in: it fails alone.
    let (foreign, _) = host.vault("foreign", &[]);
    let _ = fs::remove_file(host.lab.file("host/health.pem"));
    let answered = || {
        let metrics = block(host.daemon.metrics());
        metrics.sum("claviger_http_responses_total", &[]).unwrap_or_default() as u64
    };
    let before = answered();
    let agent = host.agent(&[]);
    let starts: Vec<Child> = machines.iter().map(|(vault, _)| host.open(vault).spawn().unwrap()).collect();
    let refused = host.open(&foreign).output().unwrap();
    let owner = host.lab.owner();
    for (child, (path, secrets)) in starts.into_iter().zip(&machines) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}: {}", path.display(), said(&output));
        assert_eq!(output.stdout, secrets.get("state-key").unwrap());
        let vault = file::read(path).unwrap();
        assert_eq!(vault.generation, 2);
        assert_eq!(vault.open(&owner.open(&vault.protector).unwrap()).unwrap(), *secrets);
    }
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("InvalidWrappingException"), "{}", said(&refused));

    let metrics = metrics_of(&agent);
    assert_eq!(metrics.count("claviger_agent_releases_total", &[("outcome", "released")]), MACHINES as u64);
    assert_eq!(metrics.count("claviger_agent_releases_total", &[("outcome", "refused")]), 1);
    assert_eq!(metrics.count("claviger_agent_attestations_total", &[("outcome", "certified")]), 1);
    assert_eq!(metrics.count("claviger_agent_waiting", &[]), 0);
    assert!(metrics.count("claviger_agent_certificate_ends_timestamp_seconds", &[]) > 1_700_000_000);
    let batches = metrics.count("claviger_agent_batches_total", &[]);
    let asked = answered() - before;
    // The attestation is one of them.
    assert_eq!(asked, batches + 1);
    assert!(asked <= 3, "{MACHINES} machines took {asked} requests");
}

#[test]
fn an_agent_minds_who_asks_and_what() {
    let host = Host::new();
    let (vault, secrets) = host.vault("vm", &[host.guardian()]);
    // Nobody is there: worth another try.
    let nobody = host.open(&vault).output().unwrap();
    assert_eq!(nobody.status.code(), Some(75), "{}", said(&nobody));
    assert!(said(&nobody).contains("does claviger host agent run"), "{}", said(&nobody));

    let agent = host.agent(&[]);
    assert_eq!(fs::metadata(&host.socket).unwrap().permissions().mode() & 0o777, 0o600);
    // No second one.
    let mut second = Command::new(claviger());
    second.args(["host", "agent", "--url", &host.daemon.url, "--socket"]).arg(&host.socket);
    let second = second.arg("--dir").arg(host.lab.file("host")).output().unwrap();
    assert!(said(&second).contains("another agent listens"), "{}", said(&second));
    // Bad input, cut-off input, and nothing at all, on connections that stay open.
    let garbage: [&[u8]; 4] =
        [b"", b"\0\0\x01\0\xff\xff\xff\xff", b"\0\0\x01\0\x05\0\0\0hello", b"\0\0\x01\0\x05\0\0\0he"];
    let open: Vec<_> = garbage
        .into_iter()
        .map(|bytes| {
            let mut stream = UnixStream::connect(&host.socket).unwrap();
            stream.write_all(bytes).unwrap();
            stream
        })
        .collect();
    let opened = host.open(&vault).output().unwrap();
    assert!(opened.status.success() && opened.stdout == secrets.get("state-key").unwrap(), "{}", said(&opened));
    drop(open);
    drop(agent);
    assert!(!host.socket.exists());

    // Another user, where this one is root and can become it.
    if rustix::process::geteuid().is_root() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let host = Host { socket: folder.path().join("agent.sock"), ..host };
        let agent = host.agent(&["--allow-uid", "12345"]);
        // An agent that refuses a user does not wait for the request.
        let script = format!(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({:?})\ntry: s.sendall(b'\\0\\0\\x01\\0\\x05\\0\\0\\0hello')\n\
             except OSError: pass\nprint(s.recv(9999))",
            host.socket.to_str().unwrap()
        );
        let asked_by = |user: &str| {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", user, "--clear-groups", "/usr/bin/python3", "-c", &script]).current_dir("/");
            said(&tool("util-linux python3", &mut command))
        };
        let refused = asked_by("12346");
        assert!(refused.contains("user 12346 may not ask this agent"), "{refused}");
        let judged = asked_by("12345");
        assert!(judged.contains("the vault's protector"), "{judged}");
        assert_eq!(metrics_of(&agent).count("claviger_agent_strangers_total", &[]), 1);
    }
}

#[test]
fn a_service_that_hangs_costs_a_machine_its_own_time_and_the_reason_is_readable() {
    let host = Host::new();
    let (vault, secrets) = host.vault("vm", &[host.guardian()]);
    // Connections are made, and nobody answers them.
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", hanging.local_addr().unwrap());
    let agent = host.agent_of(&url, &["--timeout", "2"]);
    let before = fs::read(&vault).unwrap();
    // One goes while it waits, one never reads its answer.
    let mut gone = host.open_within(&vault, 3600).spawn().unwrap();
    until("a machine that waits", || (metrics_of(&agent).count("claviger_agent_waiting", &[]) == 1).then_some(()));
    gone.kill().unwrap();
    gone.wait().unwrap();
    until("it is noticed", || (metrics_of(&agent).count("claviger_agent_waiting", &[]) == 0).then_some(()));
    let mut deaf = UnixStream::connect(&host.socket).unwrap();
    block(async {
        let mut request = Vec::new();
        wire::write_request(&mut request, Duration::from_secs(3), &file::read(&vault).unwrap().protector)
            .await
            .unwrap();
        deaf.write_all(&request).unwrap();
    });
    let late = host.open_within(&vault, 6).output().unwrap();
    assert_eq!(late.status.code(), Some(75), "{}", said(&late));
    assert!(said(&late).contains("try again later") && !said(&late).contains("the agent at"), "{}", said(&late));
    assert!(fs::read(&vault).unwrap() == before);
    // It has tried more than once, as long as the machine waits longer than a request of the agent.
    let metrics = metrics_of(&agent);
    assert!(metrics.count("claviger_agent_batches_total", &[]) >= 2);
    assert!(metrics.count("claviger_agent_releases_total", &[("outcome", "late")]) >= 1);
    until("no machine waits", || (metrics_of(&agent).count("claviger_agent_waiting", &[]) == 0).then_some(()));
    drop(agent);
    let _agent = host.agent(&[]);
    let opened = host.open(&vault).output().unwrap();
    assert!(opened.status.success() && opened.stdout == secrets.get("state-key").unwrap(), "{}", said(&opened));
}

/// An agent, or what stands in its place, is root. Still a mistake of it must not cost a machine.
#[test]
fn keys_that_do_not_belong_together_leave_the_vault_as_it_was() {
    let host = Host::new();
    let guardian = host.guardian();
    let owner = host.lab.owner();
    let (vault, _) = host.vault("vm", std::slice::from_ref(&guardian));
    let before = file::read(&vault).unwrap();
    let ingress = owner.open(&before.protector).unwrap();
    let (egress_protector, egress) = owner.create(std::slice::from_ref(&guardian)).unwrap();
    let (_, foreign) = owner.create(&[guardian]).unwrap();
    fs::create_dir_all(host.socket.parent().unwrap()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&host.socket).unwrap();
    for (ingress, egress, protector, words) in [
        (&ingress, &foreign, &egress_protector[..], "not that of the protector that came with it"),
        (&ingress, &egress, b"<Protector/>", "the vault's protector"),
        (&foreign, &egress, &egress_protector, "does not open with the key of its protector"),
    ] {
        let child = host.open(&vault).spawn().unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let keys = Payload { ingress: ingress.clone(), egress: egress.clone(), max_offline_unwraps: 0 };
        let reply = Ok(Unwrapped { keys, egress_protector: protector.to_vec() });
        let mut bytes = Vec::new();
        block(wire::write_reply(&mut bytes, &reply)).unwrap();
        stream.write_all(&bytes).unwrap();
        // The request is read after the reply was sent, so that neither waits for the other.
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        let refused = child.wait_with_output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
        assert!(refused.stdout.is_empty() && said(&refused).contains(words), "{words}: {}", said(&refused));
        assert!(file::read(&vault).unwrap() == before, "{words}");
    }
}

#[tokio::test]
async fn a_certificate_is_renewed_in_time_and_not_before() {
    let (daemon, lab) = Lab::start(Options::default());
    let settings = |hours: u64| Settings {
        folder: Folder::new(lab.file("host")),
        tpm: None,
        urls: vec![daemon.url.clone()],
        tls: TlsSettings::default(),
        timeout: PATIENCE,
        renew_before: Duration::from_secs(hours * 3600),
        pace: Pace::default(),
        users: Vec::new(),
    };
    let counters = Counters::default();
    let kept = || fs::read(lab.file("host/health.pem")).ok();
    let attested = |expected: u64| assert_eq!(counters.attested.load(Ordering::Relaxed), expected);
    let _ = fs::remove_file(lab.file("host/health.pem"));
    server::attest(&settings(1), &counters).await.unwrap();
    attested(1);
    let first = kept();
    // It lasts for nearly eight hours.
    server::attest(&settings(1), &counters).await.unwrap();
    attested(1);
    assert_eq!(kept(), first);
    // The service repeats itself for two seconds.
    tokio::time::sleep(Duration::from_secs(3)).await;
    server::attest(&settings(8), &counters).await.unwrap();
    attested(2);
    assert_ne!(kept(), first);
    // A host that is not registered any more.
    let config = lab.config_file();
    let removed = run(["hosts".as_ref(), "remove".as_ref(), HOST.as_ref(), "--config".as_ref(), config.as_os_str()]);
    assert!(removed.status.success(), "{}", said(&removed));
    assert!(server::attest(&settings(8), &counters).await.is_err());
    assert_eq!(counters.not_attested.load(Ordering::Relaxed), 1);
}
