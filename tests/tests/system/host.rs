//! Tests of a guarded host's commands, `claviger host …`, with a real daemon.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger::config::Tls;
use claviger_protocol::attestation::HealthCertificateReply;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, ResultType, signer_template};
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::raw::{Connection, post};
use claviger_tests::{ATTEST, Daemon, HOST, Lab, Options, PATIENCE, ROLL, claviger, roll_request, run, said, tool};
use serde_json::Value;

/// Runs `claviger host …` in the lab's own host directory.
struct Host<'a> {
    lab: &'a Lab,
    urls: Vec<String>,
    /// Time limit of a command in seconds; the tests expect commands to end earlier.
    timeout: u16,
}

impl<'a> Host<'a> {
    fn new(lab: &'a Lab, urls: &[&str]) -> Self {
        Self { lab, urls: urls.iter().map(|url| (*url).to_owned()).collect(), timeout: 60 }
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(claviger());
        command
            .args(["host", name, "--json", "--timeout", &self.timeout.to_string(), "--dir"])
            .arg(self.lab.file("host"));
        command.args(self.urls.iter().flat_map(|url| ["--url", url]));
        command
    }

    fn attest(&self) -> Value {
        json(&self.command("attest").output().unwrap())
    }

    fn unwrap_command(&self, protector: &Path) -> Command {
        let mut command = self.command("unwrap");
        command.arg("--protector").arg(protector).arg("--egress").arg(self.egress());
        command.arg("--key-file").arg(self.keys());
        command
    }

    /// Unwraps a protector; returns the report and checks that the keys are the owner's.
    fn unwrap(&self, protector: &Path) -> Value {
        let report = json(&self.unwrap_command(protector).output().unwrap());
        let keys = fs::read(self.keys()).unwrap();
        let owner = self.lab.owner();
        assert_eq!(keys.len(), 64);
        assert!(keys[..32] == owner.open(&fs::read(protector).unwrap()).unwrap()[..], "the ingress key");
        assert!(keys[32..] == owner.open(&fs::read(self.egress()).unwrap()).unwrap()[..], "the egress key");
        report
    }

    fn egress(&self) -> PathBuf {
        self.lab.file("next.xml")
    }

    fn keys(&self) -> PathBuf {
        self.lab.file("keys")
    }

    fn health(&self) -> PathBuf {
        self.lab.file("host/health.pem")
    }

    fn protector(&self) -> PathBuf {
        self.lab.file("tenant/vm-0001.protector.xml")
    }
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Returns the number of decisions on this event. Events that are only counted are recorded a second later.
fn decided(lab: &Lab, event: &str) -> usize {
    std::thread::sleep(std::time::Duration::from_millis(2500));
    lab.audit().iter().filter(|line| line["event"] == event).count()
}

/// Returns a URL on which no server listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A proxy in front of a daemon: it answers the first requests for `path` itself and passes on all others.
struct StandIn {
    url: String,
    /// Times of the requests for the path.
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl StandIn {
    fn start(daemon: SocketAddr, path: &'static str, answers: Vec<String>) -> Self {
        Self::answering(daemon, path, move |at| answers.get(at).cloned())
    }

    /// Starts a proxy that uses its own answers until there are none left.
    fn answering(
        daemon: SocketAddr,
        path: &'static str,
        answers: impl Fn(usize) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, next) = (asked.clone(), Arc::new(AtomicUsize::new(0)));
        let answers = Arc::new(answers);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, next, answers) = (log.clone(), next.clone(), answers.clone());
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let request = read_request(&mut stream);
                    if request.starts_with(format!("POST {path} ").as_bytes()) {
                        log.lock().unwrap().push(Instant::now());
                        if let Some(answer) = answers(next.fetch_add(1, Ordering::SeqCst)) {
                            let _ = stream.write_all(answer.as_bytes());
                            return;
                        }
                    }
                    // One request per connection: the daemon closes the connection after its answer.
                    let request = String::from_utf8(request).unwrap().replacen("\r\n", "\r\nConnection: close\r\n", 1);
                    let mut upstream = TcpStream::connect(daemon).unwrap();
                    upstream.write_all(request.as_bytes()).unwrap();
                    let mut answer = Vec::new();
                    upstream.read_to_end(&mut answer).unwrap();
                    let _ = stream.write_all(&answer);
                });
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<Instant> {
        self.asked.lock().unwrap().clone()
    }
}

fn read_request(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut request, mut octets) = (Vec::new(), [0; 16 * 1024]);
    loop {
        let text = String::from_utf8_lossy(&request).to_ascii_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            if body.len() >= length.map_or(0, |length| length.trim().parse().unwrap()) {
                return request;
            }
        }
        match stream.read(&mut octets) {
            Ok(0) | Err(_) => return request,
            Ok(read) => request.extend_from_slice(&octets[..read]),
        }
    }
}

fn answer(status: &str, fields: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn error(code: &str) -> String {
    format!(
        "<Error xmlns=\"http://schemas.microsoft.com/kps/2014/07/service\"><Code>{code}</Code><Message>no</Message></Error>"
    )
}

#[test]
fn a_new_host_attests_once_and_unwraps_again_and_again() {
    let (daemon, lab) = Lab::start(Options::default());
    let dir = lab.file("new-host");
    let made = json(&run(["host", "new-key", "--json", "--bits", "2048", "--dir", dir.to_str().unwrap()]));
    for file in ["hostkey.pem", "identitykey.pem"] {
        assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
    }
    let again = run(["host", "new-key", "--dir", dir.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1), "{}", said(&again));
    assert!(said(&again).contains("is there already"), "{}", said(&again));

    let new_host = |arguments: &[&str]| {
        let mut command = Command::new(claviger());
        command.arg("host").args(arguments).args(["--dir", dir.to_str().unwrap(), "--url", &daemon.url]);
        command.output().unwrap()
    };
    // A host that is not registered is refused, and told what to do.
    let refused = new_host(&["attest"]);
    let text = said(&refused);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("UnauthorizedErrorReply") && text.contains("claviger hosts add NAME --public-key"), "{text}");
    let public = made["public_key"].as_str().unwrap();
    let config = lab.config_file();
    let added = run(["hosts", "add", "new", "--public-key", public, "--json", "--config", config.to_str().unwrap()]);
    assert_eq!(json(&added)["key"], made["key"]);
    let attested = new_host(&["attest"]);
    let text = said(&attested);
    assert!(attested.status.success() && text.starts_with("new holds a health certificate until 20"), "{text}");
    assert!(said(&new_host(&["attest"])).contains("(kept)"));
    assert_eq!(mode(&dir.join("health.pem")), 0o600);
    assert_eq!(decided(&lab, "attest"), 1 + 1 + 2, "the demo attests twice, the second time as a stranger");

    // The lab's own host keeps its certificate between runs.
    let host = Host::new(&lab, &[&daemon.url]);
    assert_eq!(host.attest()["host"], HOST);
    let before = decided(&lab, "attest");
    let report = host.unwrap(&host.protector());
    assert_eq!((&report["api"], &report["attested"]), (&"v2.0".into(), &false.into()));
    assert_eq!((mode(&host.keys()), mode(&host.egress()), mode(&host.health())), (0o600, 0o600, 0o600));
    // Each egress protector is the next ingress protector, as in a start hook.
    let vm = lab.file("vm.xml");
    for _ in 0..3 {
        fs::rename(host.egress(), &vm).unwrap();
        host.unwrap(&vm);
    }
    assert_eq!(decided(&lab, "attest"), before);
    let names = fs::read_dir(lab.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.into_iter().any(|name| name.ends_with(".new")), "something was left behind");
    assert!(daemon.stop().success());
}

#[test]
fn a_certificate_that_does_not_do_is_replaced() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let host = Host::new(&lab, &[&daemon.url]);
    // A certificate that looks valid to the host, issued by a signer that the service does not know.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let signer = RsaPrivateKey::generate(2048).unwrap();
    let own = signer_template(signer.public(), now - 600, now + 600).unwrap().to_be_signed().unwrap();
    let own = Certificate::parse(&own.sign_with(&signer).unwrap()).unwrap();
    let (host_key, identity) = (lab.key("host/hostkey.pem"), lab.identity());
    let keep = |at: i64| {
        let kind = ResultType::EncryptionCertificate;
        let issued = health::issue(&own, HOST, host_key.public(), identity.public(), kind, at).unwrap();
        let certificate = Certificate::parse(&issued.sign_with(&signer).unwrap()).unwrap();
        fs::write(host.health(), certificate.to_pem()).unwrap();
    };
    // Must be read after `decided`, which waits for decisions that are only counted.
    let refusals = || lab.audit().iter().filter(|line| line["outcome"] == "HealthCertificateException").count();
    let (attested, refused) = (decided(&lab, "attest"), refusals());
    keep(now);
    assert!(host.attest()["issued_by"].is_null(), "it looks good from here");
    assert_eq!(host.unwrap(&host.protector())["attested"], true);
    assert_eq!((decided(&lab, "attest"), refusals()), (attested + 1, refused + 1));
    assert_eq!(host.unwrap(&host.protector())["attested"], false);
    // The host does not use an expired certificate.
    keep(now - 8 * 3600);
    assert_eq!(host.unwrap(&host.protector())["attested"], true);
    assert_eq!((decided(&lab, "attest"), refusals()), (attested + 2, refused + 1));

    // A removed host: the service refuses its certificate and issues no new one. The old protector stays.
    let before = fs::read(host.egress()).unwrap();
    fs::remove_file(host.keys()).unwrap();
    let config = lab.config_file();
    assert!(run(["hosts", "remove", HOST, "--config", config.to_str().unwrap()]).status.success());
    let output = host.unwrap_command(&host.protector()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("UnauthorizedErrorReply"), "{}", said(&output));
    assert_eq!(fs::read(host.egress()).unwrap(), before);
    assert!(!host.keys().exists());
    assert_eq!((decided(&lab, "attest"), refusals()), (attested + 3, refused + 2));
    assert!(daemon.stop().success());
}

#[test]
fn a_server_that_cannot_serve_is_passed_over_and_asked_again_when_it_says() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let dead = nobody();
    let report = Host::new(&lab, &[&dead, &daemon.url]).unwrap(&lab.file("tenant/vm-0001.protector.xml"));
    assert_eq!(report["server"].as_str(), daemon.url.strip_prefix("http://"));

    // A single server is asked again at the time that it named. An answer that no service would give is reported as such.
    let busy = answer("503 Service Unavailable", "Retry-After: 2\r\n", &error("ServiceUnavailableException"));
    let proxy = answer("502 Bad Gateway", "", "<html>no</html>");
    let stand_in = StandIn::start(daemon.address(), ROLL, vec![busy.clone(), proxy]);
    let host = Host::new(&lab, &[&stand_in.url]);
    host.unwrap(&host.protector());
    let asked = stand_in.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked[1] - asked[0] >= Duration::from_secs(2), "{:?}", asked[1] - asked[0]);
    // With a second server, the host does not wait for the first one.
    let busy = busy.replace("Retry-After: 2\r\n", "Retry-After: 3600\r\n");
    let stand_in = StandIn::start(daemon.address(), ROLL, vec![busy.clone(), busy.clone()]);
    let report = Host::new(&lab, &[&stand_in.url, &daemon.url]).unwrap(&host.protector());
    assert_eq!(report["server"].as_str(), daemon.url.strip_prefix("http://"));
    assert_eq!(stand_in.asked().len(), 1);
    // If the server asks for more time than is left, the command ends at once.
    let output = Host::new(&lab, &[&stand_in.url]).unwrap_command(&host.protector()).output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", said(&output));
    assert!(said(&output).contains("503 ServiceUnavailableException"), "{}", said(&output));
    assert_eq!(stand_in.asked().len(), 2);
    let hasty = Host { timeout: 1, ..Host::new(&lab, &[&dead]) };
    let output = hasty.command("attest").arg("--fresh").output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", said(&output));
    assert!(
        said(&output).contains("no connection to") && said(&output).contains("try again later"),
        "{}",
        said(&output)
    );

    // A server that does not support the second version.
    let old = StandIn::start(daemon.address(), ROLL, vec![answer("404 Not Found", "", &error("NotFoundException"))]);
    assert_eq!(Host::new(&lab, &[&old.url]).unwrap(&host.protector())["api"], "v1.0");

    // Attestation replies say themselves if a failure is temporary.
    let passes = |retryable: bool| {
        let body = format!(
            "{{\"__type\":\"UnavailableErrorReply:#Microsoft.Windows.RemoteAttestation.Core\",\"Retryable\":{retryable}}}"
        );
        answer("503 Service Unavailable", "Content-Type: application/json\r\n", &body)
    };
    for (retryable, status, asked) in [(true, Some(0), 2), (false, Some(1), 1)] {
        let stand_in = StandIn::start(daemon.address(), ATTEST, vec![passes(retryable)]);
        let output = Host::new(&lab, &[&stand_in.url]).command("attest").arg("--fresh").output().unwrap();
        assert_eq!((output.status.code(), stand_in.asked().len()), (status, asked), "{}", said(&output));
    }
    assert!(daemon.stop().success());
}

#[test]
fn what_is_refused_is_not_asked_again_and_nothing_is_written() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let stand_in = StandIn::start(daemon.address(), ROLL, Vec::new());
    let host = Host::new(&lab, &[&stand_in.url, &daemon.url]);
    host.unwrap(&host.protector());
    let before = fs::read(host.egress()).unwrap();
    fs::remove_file(host.keys()).unwrap();

    // One changed character in the guardian's signature: well-formed, but wrong.
    let mut wrong = lab.protector();
    let tag = b"<SignatureValue>";
    let at = wrong.windows(tag.len()).rposition(|w| w == tag).unwrap() + tag.len() + 10;
    wrong[at] = if wrong[at] == b'A' { b'B' } else { b'A' };
    let file = lab.file("wrong.xml");
    fs::write(&file, &wrong).unwrap();
    let asked = stand_in.asked().len();
    let output = host.unwrap_command(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("400 InvalidProtectorException") && output.stdout.is_empty(), "{}", said(&output));
    assert_eq!(stand_in.asked().len(), asked + 1);
    // A file that is not a protector is not sent.
    fs::write(&file, "<Protector/>").unwrap();
    let output = host.unwrap_command(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("wrong.xml"), "{}", said(&output));
    assert_eq!(stand_in.asked().len(), asked + 1);

    // Writing in place would lose the old protector before the new one is in use.
    let mut command = host.command("unwrap");
    command.arg("--protector").arg(host.protector()).arg("--egress").arg(host.protector());
    let output = command.arg("--key-file").arg(host.keys()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("different files"), "{}", said(&output));
    assert!(lab.owner().open(&lab.protector()).is_ok());

    assert_eq!(fs::read(host.egress()).unwrap(), before);
    assert!(!host.keys().exists());
    assert!(daemon.stop().success());
}

/// Starts a proxy that answers requests for `path` with status 200 and this body.
fn liar(daemon: &Daemon, path: &'static str, body: &str) -> StandIn {
    let answer = answer("200 OK", "", body);
    StandIn::answering(daemon.address(), path, move |_| Some(answer.clone()))
}

#[test]
fn who_answers_wrongly_is_passed_over() {
    let lab = Lab::make(Options { vms: 2, ..Options::default() });
    let daemon = lab.serve();
    let host = Host::new(&lab, &[&daemon.url]);
    host.unwrap(&host.protector());
    let good = daemon.url.strip_prefix("http://").unwrap();

    // An empty answer, an answer for another machine's protector, a valid answer with another protector in it, and an
    // endless one.
    let health = Certificate::from_pem(&fs::read_to_string(host.health()).unwrap()).unwrap();
    let reply = |protector: &[u8]| {
        let request = post(ROLL, "application/xml", &roll_request(health.der(), protector));
        Connection::open(daemon.address()).unwrap().exchange(&request).unwrap().text()
    };
    let [first, second] = [&lab.protectors()[0], &lab.protectors()[1]].map(|protector| reply(protector));
    let egress =
        |reply: &str| reply.split(['<', '>']).skip_while(|part| *part != "EgressProtector").nth(1).unwrap().to_owned();
    let exchanged = first.replace(&egress(&first), &egress(&second));
    let endless = " ".repeat(33 * 1024 * 1024);
    for (body, expected) in [
        ("<RollTransportKeyResponse/>", "RollTransportKeyResponse"),
        (&second, "the ingress key is not that of the protector that was sent"),
        (&exchanged, "the egress key is not that of the new protector"),
        (&endless, "is longer than"),
    ] {
        let liar = liar(&daemon, ROLL, body);
        let before = fs::read(host.egress()).unwrap();
        let alone = Host { timeout: 2, ..Host::new(&lab, &[&liar.url]) };
        fs::remove_file(host.keys()).unwrap();
        let output = alone.unwrap_command(&host.protector()).output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", said(&output));
        assert!(said(&output).contains(expected) && output.stdout.is_empty(), "{}", said(&output));
        assert!(fs::read(host.egress()).unwrap() == before && !host.keys().exists(), "nothing is written");
        // If there is a second service, its answer is used.
        let asked = liar.asked().len();
        assert!(asked > 0);
        let report = Host::new(&lab, &[&liar.url, &daemon.url]).unwrap(&host.protector());
        assert_eq!((report["server"].as_str(), liar.asked().len()), (Some(good), asked + 1));
    }

    // The same for attestation: no certificate, and a certificate for another host's key.
    let somebody = RsaPrivateKey::generate(2048).unwrap();
    let template = signer_template(somebody.public(), 1, 2).unwrap().to_be_signed().unwrap();
    let foreign = template.sign_with(&somebody).unwrap();
    let kind = ResultType::EncryptionCertificate;
    let foreign = HealthCertificateReply { content: vec![(kind, foreign)] }.to_json();
    for (body, expected) in [
        ("{}", "the answer is not right"),
        (std::str::from_utf8(&foreign).unwrap(), "not over this host's identity key"),
    ] {
        let liar = liar(&daemon, ATTEST, body);
        let alone = Host { timeout: 2, ..Host::new(&lab, &[&liar.url]) };
        let output = alone.command("attest").arg("--fresh").output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
        let both = Host::new(&lab, &[&liar.url, &daemon.url]);
        let report = json(&both.command("attest").arg("--fresh").output().unwrap());
        assert_eq!(report["issued_by"].as_str(), Some(good));
        fs::remove_file(host.health()).unwrap();
        let report = both.unwrap(&host.protector());
        assert_eq!(report["attested"], true);
    }
    assert!(daemon.stop().success());
}

/// At every moment the egress protector is complete, while runs replace it one after the other and some are killed.
#[test]
fn the_fresh_protector_is_whole_at_every_moment() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let host = Host::new(&lab, &[&daemon.url]);
    host.unwrap(&host.protector());
    let (owner, egress) = (lab.owner(), host.egress());
    let stop = Arc::new(AtomicUsize::new(0));
    let looking = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut seen = std::collections::HashSet::new();
            while stop.load(Ordering::SeqCst) == 0 {
                let file = fs::read(&egress).unwrap();
                if seen.insert(file.clone()) {
                    owner.open(&file).unwrap();
                }
            }
            seen.len()
        })
    };
    for at in 0..8 {
        let mut child = host.unwrap_command(&host.protector()).stdout(Stdio::null()).spawn().unwrap();
        if at % 2 == 1 {
            std::thread::sleep(Duration::from_millis(10 * at));
            let _ = child.kill();
        }
        child.wait().unwrap();
    }
    stop.store(1, Ordering::SeqCst);
    assert!(looking.join().unwrap() >= 2);
    host.unwrap(&host.protector());
    assert!(daemon.stop().success());
}

#[test]
fn keys_go_down_a_pipe_and_only_there() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let host = Host::new(&lab, &[&daemon.url]);
    let arguments = |fd: &str| {
        let mut command = host.command("unwrap");
        command.arg("--protector").arg(host.protector()).arg("--egress").arg(host.egress()).args(["--fd", fd]);
        command
    };
    // The shell's part of a start hook: the keys go down the pipe, the report elsewhere.
    let shell = |script: &str, fd: &str| {
        let command = arguments(fd);
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(command.get_program()).args(command.get_args());
        shell.env("REPORT", lab.file("report")).output().unwrap()
    };
    let piped = shell("\"$@\" 3>&1 >\"$REPORT\" | cat", "3");
    assert!(piped.status.success(), "{}", said(&piped));
    let owner = lab.owner();
    assert!(piped.stdout[..32] == owner.open(&lab.protector()).unwrap()[..]);
    assert!(piped.stdout[32..] == owner.open(&fs::read(host.egress()).unwrap()).unwrap()[..]);
    let report: Value = serde_json::from_slice(&fs::read(lab.file("report")).unwrap()).unwrap();
    assert_eq!(report["api"], "v2.0");

    // A descriptor that is not open, and a standard descriptor.
    let before = fs::read(host.egress()).unwrap();
    for (script, fd, status) in [("\"$@\" 7>&-", "7", 1), ("\"$@\"", "1", 2)] {
        let output = shell(script, fd);
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
    }
    assert_eq!(fs::read(host.egress()).unwrap(), before, "nobody was asked");
    assert!(daemon.stop().success());
}

#[test]
fn tls_is_spoken_with_whom_the_ca_vouches_for() {
    let lab = Lab::make(Options::default());
    let [certificate, key, other] = ["tls.pem", "tls.key", "other.pem"].map(|name| lab.file(name));
    for (certificate, key) in [(&other, &lab.file("other.key")), (&certificate, &key)] {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
        // Not an authority's certificate, which would not be accepted as a server's own.
        command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
        command.args(["-addext", "subjectAltName=IP:127.0.0.1", "-out"]).arg(certificate).arg("-keyout").arg(key);
        let made = tool("openssl", &mut command);
        assert!(made.status.success(), "{}", said(&made));
    }
    lab.configure(|config| config.server.tls = Some(Tls::new(&certificate, key)));
    let daemon = lab.serve();
    let host = Host::new(&lab, &[&daemon.url]);
    let with = |ca: &Path| host.unwrap_command(&host.protector()).arg("--ca").arg(ca).output().unwrap();
    let output = with(&certificate);
    assert!(output.status.success(), "{}", said(&output));
    assert!(fs::read(host.keys()).unwrap()[..32] == lab.owner().open(&lab.protector()).unwrap()[..]);
    let none = host.unwrap_command(&host.protector()).output().unwrap();
    assert!(none.status.code() == Some(1) && said(&none).contains("--ca FILE"), "{}", said(&none));
    let output = host.command("attest").arg("--fresh").arg("--ca").arg(&other).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let words = "none that --ca or --system-ca vouches for";
    assert!(said(&output).contains("no TLS with") && said(&output).contains(words), "{}", said(&output));
    assert!(daemon.stop().success());
}

#[test]
fn a_server_certificate_that_no_host_accepts_is_named_and_not_tried_for_ever() {
    let lab = Lab::make(Options::default());
    let [certificate, key] = ["tls.pem", "tls.key"].map(|name| lab.file(name));
    let mut command = Command::new("openssl");
    // As in most instructions: OpenSSL marks the certificate as an authority's.
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    command.args(["-addext", "subjectAltName=IP:127.0.0.1", "-out"]).arg(&certificate).arg("-keyout").arg(&key);
    assert!(tool("openssl", &mut command).status.success());
    lab.configure(|config| config.server.tls = Some(Tls::new(&certificate, key)));
    let daemon = lab.serve();
    let host = Host { timeout: 600, ..Host::new(&lab, &[&daemon.url]) };
    let begun = Instant::now();
    let output = host.command("attest").arg("--fresh").arg("--ca").arg(&certificate).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("that of a certificate authority (CA:TRUE)"), "{}", said(&output));
    assert!(begun.elapsed() < Duration::from_secs(300), "it is not asked again until the time is up");
    let doctor = run(["doctor", "--json", "--config", lab.config_file().to_str().unwrap()]);
    assert!(doctor.status.code() == Some(2) && said(&doctor).contains("CA:TRUE"), "{}", said(&doctor));
    assert!(daemon.stop().success());
}

#[test]
fn every_command_has_an_example_and_says_how_it_ends() {
    for name in ["attest", "unwrap", "new-key"] {
        let text = said(&run(["host", name, "--help"]));
        assert!(text.contains(&format!("Example: claviger host {name}")), "{text}");
        assert!(name == "new-key" || text.contains("75 worth trying again later"), "{text}");
    }
    let text = said(&run(["host", "--help"]));
    assert!(text.contains("Example: claviger host attest"), "{text}");
    // The destination of the keys must always be given.
    let output = run(["host", "unwrap", "--url", "http://x", "--protector", "a", "--egress", "b"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}
