//! Tests of changes while the daemon serves: clients notice nothing.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use claviger::config::{Clients, Hsm, Tls};
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{
    Administrator, Daemon, Lab, Options, PATIENCE, ROLL, block, open_release, roll_request, run, said, tool, until,
};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Number of reloads.
const ROUNDS: usize = 8;

/// Creates a self-signed certificate and its key with OpenSSL.
fn certificate(lab: &Lab, name: &str) -> (PathBuf, PathBuf) {
    let (certificate, key) = (lab.file(&format!("{name}.crt.pem")), lab.file(&format!("{name}.key.pem")));
    let config = lab.file("openssl.cnf");
    let text = format!(
        "[req]\nprompt = no\ndistinguished_name = dn\nx509_extensions = ext\n[dn]\nCN = {name}\n\
         [ext]\nsubjectAltName = IP:127.0.0.1\nbasicConstraints = CA:FALSE\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-nodes", "-days", "90", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    let made =
        tool("openssl", command.arg("-config").arg(config).arg("-keyout").arg(&key).arg("-out").arg(&certificate));
    assert!(made.status.success(), "{}", said(&made));
    (certificate, key)
}

fn der(path: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(path).unwrap()
}

/// Trusts these server certificates; shows `own` if the server requests a certificate.
fn connector(trusted: &[&Path], own: Option<(&Path, &Path)>) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    trusted.iter().for_each(|path| roots.add(der(path)).unwrap());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            builder.with_client_auth_cert(vec![der(certificate)], PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

/// A connection, and the certificate of its server.
struct Connection {
    requests: SendRequest<Full<Bytes>>,
    shown: CertificateDer<'static>,
}

impl Connection {
    async fn open(address: SocketAddr, connector: &TlsConnector) -> Result<Self, String> {
        let tcp = TcpStream::connect(address).await.map_err(|e| format!("connect: {e}"))?;
        let name = ServerName::IpAddress(address.ip().into());
        let tls = connector.connect(name, tcp).await.map_err(|e| format!("handshake: {e}"))?;
        let shown = tls.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
        let (requests, connection) = handshake(TokioIo::new(tls)).await.map_err(|e| format!("http: {e}"))?;
        tokio::spawn(connection);
        Ok(Self { requests, shown })
    }

    async fn send(&mut self, method: &str, path: &str, body: &Bytes) -> Result<(u16, Bytes), String> {
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "claviger")
            .header("content-type", "application/xml")
            .body(Full::new(body.clone()))
            .unwrap();
        self.requests.ready().await.map_err(|e| format!("closed: {e}"))?;
        let answer = self.requests.send_request(request).await.map_err(|e| format!("no answer: {e}"))?;
        let status = answer.status().as_u16();
        Ok((status, answer.into_body().collect().await.map_err(|e| format!("torn: {e}"))?.to_bytes()))
    }
}

/// Returns the certificate that the server shows on a new connection.
async fn shown(address: SocketAddr, connector: &TlsConnector) -> Option<CertificateDer<'static>> {
    Connection::open(address, connector).await.ok().map(|connection| connection.shown)
}

async fn eventually(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !done().await {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn members(lab: &Lab) -> Vec<Value> {
    let listed = run(["hsm", "list", "--json", "--config", lab.config_file().to_str().unwrap()]);
    assert!(listed.status.success(), "{}", said(&listed));
    serde_json::from_slice::<Value>(&listed.stdout).unwrap().as_array().unwrap().clone()
}

fn tls(files: &(PathBuf, PathBuf)) -> Tls {
    Tls::new(&files.0, &files.1)
}

/// Serves the lab with TLS; returns the daemon and a release request of the lab's host.
fn serve_encrypted(lab: &Lab, files: &(PathBuf, PathBuf)) -> (Daemon, Bytes) {
    // The attestation uses plain HTTP, because the harness's client does not support TLS.
    let plain = lab.serve();
    let health = block(lab.host(plain.client()).attest()).unwrap();
    assert!(plain.stop().success());
    lab.configure(|config| config.server.tls = Some(tls(files)));
    let daemon = lab.serve();
    assert!(daemon.url.starts_with("https://"), "{}", daemon.url);
    (daemon, roll_request(&health, &lab.protector()).into())
}

#[test]
fn reloads_under_load_fail_no_request() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let files = [certificate(&lab, "one"), certificate(&lab, "two")];
    let current = (lab.file("tls.crt.pem"), lab.file("tls.key.pem"));
    let install = |(certificate, key): &(PathBuf, PathBuf)| {
        std::fs::copy(key, &current.1).unwrap();
        std::fs::copy(certificate, &current.0).unwrap();
    };
    install(&files[0]);
    let (daemon, body) = serve_encrypted(&lab, &current);
    let (address, identity) = (daemon.address(), lab.identity());
    let key = Arc::new(lab.owner().open(&lab.protector()).unwrap().to_vec());
    let connector = connector(&[&files[0].0, &files[1].0], None);
    let both: Vec<Hsm> = lab.config().hsm;

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let client = |keep: bool| {
        let (connector, body, identity, key) = (connector.clone(), body.clone(), identity.clone(), key.clone());
        let (stop, done) = (stop.clone(), done.clone());
        runtime.spawn(async move {
            let mut connection = None;
            while !stop.load(Ordering::Relaxed) {
                let mut open = match connection.take() {
                    Some(open) => open,
                    None => Connection::open(address, &connector).await?,
                };
                let (status, answer) = open.send("POST", ROLL, &body).await?;
                if status != 200 {
                    return Err(format!("{status} {}", String::from_utf8_lossy(&answer)));
                }
                let (keys, _) = open_release(&answer, &identity)?;
                assert_eq!(keys.ingress[..], key[..]);
                done.fetch_add(1, Ordering::Relaxed);
                // A kept connection is never reopened, so its end is a failure.
                connection = keep.then_some(open);
            }
            Ok::<_, String>(())
        })
    };
    let clients: Vec<_> = [true, true, false].into_iter().map(client).collect();
    for round in 0..ROUNDS {
        let before = done.load(Ordering::Relaxed);
        let rotated = lab.file(&format!("state/audit.jsonl.{round}"));
        std::fs::rename(lab.file("state/audit.jsonl"), &rotated).unwrap();
        let now = &files[(round + 1) % 2];
        install(now);
        lab.configure(|config| {
            config.release.host_burst = 5_000 + u32::try_from(round).unwrap();
            config.hsm = if round % 4 == 1 { both[..1].to_vec() } else { both.clone() };
            config.hsm[0].weight = 1 + u32::try_from(round).unwrap();
        });
        daemon.process.hang_up();
        let expected = der(&now.0);
        runtime.block_on(eventually("the new certificate", async || {
            shown(address, &connector).await.as_ref() == Some(&expected)
        }));
        let wanted = lab.config().hsm.len();
        until("the members of the configuration, serving", || {
            let members = members(&lab);
            let up = members.iter().all(|member| member["state"] == "up");
            (members.len() == wanted && up && members[0]["weight"] == round + 1).then_some(())
        });
        until("ten releases", || (done.load(Ordering::Relaxed) > before + 10).then_some(()));
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        runtime.block_on(client).unwrap().unwrap();
    }
    let said = daemon.process.output();
    assert!(!said.contains("ERROR"), "{said}");
    assert!(daemon.stop().success());
    // Every release is in the trail, in one of its files.
    let files = (0..ROUNDS).map(|round| lab.file(&format!("state/audit.jsonl.{round}")));
    let trail: String =
        files.chain([lab.file("state/audit.jsonl")]).map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let body = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let releases = trail.lines().map(body).filter(|line| line["event"] == "release" && line["outcome"] == "success");
    assert!(releases.count() >= done.load(Ordering::Relaxed));
}

#[test]
fn what_is_bad_changes_nothing_and_what_needs_a_restart_is_named() {
    let lab = Lab::make(Options::default());
    let files = [certificate(&lab, "one"), certificate(&lab, "two")];
    let client = certificate(&lab, "client");
    let (daemon, body) = serve_encrypted(&lab, &files[0]);
    let address = daemon.address();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let trusted = [files[0].0.as_path(), files[1].0.as_path()];
    let (stranger, known) = (connector(&trusted, None), connector(&trusted, Some((&client.0, &client.1))));
    let good = std::fs::read_to_string(lab.config_file()).unwrap();

    // A misspelt setting, beside a valid change.
    lab.configure(|config| config.server.tls = Some(tls(&files[1])));
    let wanted = std::fs::read_to_string(lab.config_file()).unwrap();
    std::fs::write(lab.config_file(), format!("unknown = 1\n{wanted}")).unwrap();
    daemon.process.hang_up();
    daemon.process.line(|line| (line.contains("was not reloaded") && line.contains("unknown")).then_some(()));
    assert_eq!(runtime.block_on(shown(address, &stranger)).unwrap(), der(&files[0].0));

    // The key of another certificate.
    std::fs::write(lab.config_file(), &good).unwrap();
    lab.configure(|config| config.server.tls = Some(tls(&(files[1].0.clone(), files[0].1.clone()))));
    daemon.process.hang_up();
    daemon
        .process
        .line(|line| (line.contains("was not reloaded") && line.contains("that of another certificate")).then_some(()));
    assert_eq!(runtime.block_on(shown(address, &stranger)).unwrap(), der(&files[0].0));

    // Settings that need a restart, beside a new member whose environment has a new variable.
    std::fs::write(lab.config_file(), &good).unwrap();
    lab.configure(|config| {
        let mut more = config.hsm[0].clone();
        more.name = "more".to_owned();
        more.env.insert("CLAVIGER_TEST_LATE".to_owned(), "1".to_owned());
        config.hsm.push(more);
        config.server.listen.set_port(1);
        config.hsm[0].sessions = 7;
    });
    daemon.process.hang_up();
    let named = daemon.process.line(|line| line.contains("need a restart").then(|| line.to_owned()));
    for setting in ["server.listen", "hsm.hsm-a.sessions"] {
        assert!(named.contains(setting), "{named}");
    }
    assert!(!named.contains("hsm.more"), "{named}");
    until_state(&lab, "more", "up");

    // New connections must show client certificates from now on; open connections stay.
    let mut open = runtime.block_on(Connection::open(address, &stranger)).unwrap();
    std::fs::write(lab.config_file(), &good).unwrap();
    lab.configure(|config| {
        config.server.tls = Some(Tls { clients: Clients::Required(client.0.clone()), ..tls(&files[1]) });
    });
    daemon.process.hang_up();
    until("the new member is gone", || state(&lab, "more").is_none().then_some(()));
    let asked = async |connector: &TlsConnector| -> Result<u16, String> {
        let mut connection = Connection::open(address, connector).await?;
        Ok(connection.send("POST", ROLL, &body).await?.0)
    };
    runtime.block_on(eventually("strangers are turned away", async || asked(&stranger).await.is_err()));
    assert_eq!(runtime.block_on(asked(&known)), Ok(200));
    assert_eq!(runtime.block_on(open.send("POST", ROLL, &body)).unwrap().0, 200);
    assert!(daemon.stop().success());
}

/// Returns the state of a member; `None` if no member has this name.
fn state(lab: &Lab, name: &str) -> Option<String> {
    let found = members(lab).into_iter().find(|member| member["name"] == name)?;
    Some(found["state"].as_str().unwrap().to_owned())
}

fn until_state(lab: &Lab, name: &str, wanted: &str) {
    until(&format!("{name} is {wanted}"), || (state(lab, name)? == wanted).then_some(()));
}

/// Sends one release as the lab's host.
fn release(lab: &Lab, daemon: &Daemon, health: &[u8]) {
    block(lab.host(daemon.client()).roll(ApiVersion::V2, health, &lab.protector())).unwrap();
}

#[test]
fn a_pin_that_was_corrected_brings_its_member_back() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let pin = lab.file("pins/hsm-b.pin");
    let right = std::fs::read_to_string(&pin).unwrap();
    std::fs::write(&pin, "wrong\n").unwrap();
    let daemon = lab.serve();
    until_state(&lab, "hsm-a", "up");
    until_state(&lab, "hsm-b", "pin_refused");
    let refusals = || daemon.process.output().matches("REFUSES THE PIN").count();
    until("the refusal is said", || (refusals() == 1).then_some(()));

    // The same PIN is not tried again; a different one is tried once.
    for (weight, wrong, refused) in [(2, "wrong\n", 1), (3, "other\n", 2)] {
        std::fs::write(&pin, wrong).unwrap();
        // The weight changes after the PIN has been applied, so it shows that the reload is complete.
        lab.configure(|config| config.hsm[1].weight = weight);
        daemon.process.hang_up();
        until("the configuration is reloaded", || (members(&lab)[1]["weight"] == weight).then_some(()));
        until("what there is to refuse is refused", || (refusals() >= refused).then_some(()));
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!((refusals(), state(&lab, "hsm-b")), (refused, Some("pin_refused".to_owned())), "{wrong:?}");
    }
    std::fs::write(&pin, right).unwrap();
    daemon.process.hang_up();
    until_state(&lab, "hsm-b", "up");
    // The remaining member serves alone.
    lab.configure(|config| config.hsm.retain(|hsm| hsm.name == "hsm-b"));
    daemon.process.hang_up();
    until("hsm-a is gone", || state(&lab, "hsm-a").is_none().then_some(()));
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    release(&lab, &daemon, &health);
    assert!(daemon.stop().success());
}

#[test]
fn all_other_members_go_at_once_when_the_one_that_stays_serves() {
    let lab = Lab::make(Options { hsms: 3, ..Options::default() });
    let all = lab.config().hsm;
    let daemon = lab.serve();
    for hsm in &all {
        until_state(&lab, &hsm.name, "up");
    }
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let administrator = Administrator(&lab);

    // The others are not removed while the only member that stays is drained.
    administrator.json(&["hsm", "drain", "hsm-c"]);
    lab.configure(|config| config.hsm.retain(|hsm| hsm.name == "hsm-c"));
    daemon.process.hang_up();
    for name in ["hsm-a", "hsm-b"] {
        daemon.process.line(|line| (line.contains("is not removed") && line.contains(name)).then_some(()));
    }
    assert_eq!(members(&lab).len(), 3);
    release(&lab, &daemon, &health);

    administrator.json(&["hsm", "resume", "hsm-c"]);
    until_state(&lab, "hsm-c", "up");
    daemon.process.hang_up();
    until("the others are gone", || (members(&lab).len() == 1).then_some(()));
    assert_eq!(state(&lab, "hsm-c").as_deref(), Some("up"));
    release(&lab, &daemon, &health);

    // The change is reverted: the earlier members take over again.
    lab.configure(|config| config.hsm = all[..2].to_vec());
    daemon.process.hang_up();
    until("hsm-c is gone", || (members(&lab).len() == 2 && state(&lab, "hsm-c").is_none()).then_some(()));
    release(&lab, &daemon, &health);
    assert!(daemon.stop().success());
}
