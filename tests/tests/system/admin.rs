//! Tests of administrators' actions with the real command line.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use claviger_client::host::Host;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Administrator, Daemon, HOST, Lab, Options, block, run, said, tool, until};
use data_encoding::{BASE64, HEXLOWER};
use serde_json::Value;

fn add(administrator: &Administrator<'_>, name: &str, key: &Path) -> Value {
    administrator.json(&["hosts", "add", name, "--public-key", key.to_str().unwrap()])
}

fn names(administrator: &Administrator<'_>) -> Vec<String> {
    let hosts = administrator.json(&["hosts", "list"]);
    hosts.as_array().unwrap().iter().map(|host| host["name"].as_str().unwrap().to_owned()).collect()
}

fn write(lab: &Lab, name: &str, octets: &[u8]) -> PathBuf {
    let path = lab.file(name);
    std::fs::write(&path, octets).unwrap();
    path
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    let base64 = BASE64.encode(der);
    let lines: Vec<&str> = (0..base64.len()).step_by(64).map(|at| &base64[at..base64.len().min(at + 64)]).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n")).into_bytes()
}

fn key() -> RsaPrivateKey {
    RsaPrivateKey::generate(2048).unwrap()
}

/// Returns a self-signed certificate for this key as DER, made with OpenSSL.
fn certificate(lab: &Lab, key: &RsaPrivateKey) -> Vec<u8> {
    let private = write(lab, "certificate.key", key.to_pkcs8_pem().as_bytes());
    let made = tool(
        "openssl",
        Command::new("openssl").args(["req", "-x509", "-subj", "/CN=host", "-outform", "DER", "-key"]).arg(private),
    );
    assert!(made.status.success(), "{}", said(&made));
    made.stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_come_and_go() {
    let (daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    assert_eq!(std::fs::metadata(lab.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(&administrator), [HOST]);

    // Every file format of a public key.
    let spki = |key: &RsaPrivateKey| key.public().spki_der().to_vec();
    type Form<'a> = (&'a str, &'a dyn Fn(&RsaPrivateKey) -> Vec<u8>);
    let forms: [Form<'_>; 5] = [
        ("spki.der", &spki),
        ("spki.pem", &|key| pem("PUBLIC KEY", key.public().spki_der())),
        ("certificate.der", &|key| certificate(&lab, key)),
        ("certificate.pem", &|key| pem("CERTIFICATE", &certificate(&lab, key))),
        ("blob", &|key| key.public().to_bcrypt_blob()),
    ];
    for (name, form) in forms {
        let key = key();
        let file = write(&lab, name, &form(&key));
        let added = add(&administrator, name, &file);
        assert_eq!(added["name"], name);
        assert_eq!(added["key"], HEXLOWER.encode(&key.public().spki_sha256()), "{name}");
        let host = Host::new(daemon.client(), key, lab.identity());
        let health = host.attest().await.unwrap();
        host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    }
    assert_eq!(names(&administrator).len(), 1 + forms.len());
    // The list for people, also through the socket's path.
    let list = administrator.run(&["hosts", "list"]);
    let text = said(&list);
    assert!(text.starts_with("NAME") && text.contains("spki.pem") && text.lines().count() == 2 + forms.len(), "{text}");
    let by_socket = run(["hosts", "list", "--socket", lab.socket().to_str().unwrap()]);
    assert_eq!(said(&by_socket), text);
    let removed = administrator.run(&["hosts", "remove", "blob"]);
    assert_eq!(said(&removed), "removed host blob\n");

    // Invalid input, and the error messages.
    let good = write(&lab, "good.der", &spki(&key()));
    let good = good.to_str().unwrap();
    let garbage = write(&lab, "garbage", b"not a key");
    let weak = lab.file("weak.pem");
    let made = Command::new("openssl").args(["genrsa", "1024"]).output().unwrap();
    let private = write(&lab, "weak.key", &made.stdout);
    let made =
        tool("openssl", Command::new("openssl").args(["rsa", "-pubout", "-in"]).arg(private).arg("-out").arg(&weak));
    assert!(made.status.success(), "{}", said(&made));
    let registered = lab.file("host/hostkey.pub.pem");
    let secret = lab.file("host/hostkey.pem");
    for (arguments, expected) in [
        (["a b", good], "1 to 64 letters"),
        (["", good], "1 to 64 letters"),
        (["x/../y", good], "1 to 64 letters"),
        (["new", garbage.to_str().unwrap()], "garbage"),
        (["new", weak.to_str().unwrap()], "1024"),
        (["new", "/nowhere/key.pem"], "/nowhere/key.pem"),
        (["new", secret.to_str().unwrap()], "hostkey.pem"),
        ([HOST, good], "registered already"),
        (["DEMO-HOST", good], "registered already"),
        (["new", registered.to_str().unwrap()], HOST),
    ] {
        let [name, file] = arguments;
        let fault = administrator.fault(&["hosts", "add", name, "--public-key", file]);
        assert!(fault.starts_with("claviger: ") && fault.contains(expected), "{name} {file}: {fault}");
    }
    assert!(administrator.fault(&["hosts", "remove", "nobody"]).contains("no host \"nobody\" is registered"));
    assert_eq!(names(&administrator).len(), forms.len());

    // The keys of the lab.
    let keys = administrator.json(&["keys", "list"]);
    let kinds: Vec<_> = keys.as_array().unwrap().iter().map(|key| key["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds.len(), 2);
    assert!(kinds.contains(&"signing") && kinds.contains(&"encryption"), "{keys}");
    assert!(keys.as_array().unwrap().iter().all(|key| key["primary"] == true && key["bits"] == 2048), "{keys}");
    let text = said(&administrator.run(&["keys", "list"]));
    assert!(text.starts_with("KIND") && text.lines().count() == 3, "{text}");
    assert!(daemon.stop().success());

    // No daemon runs any more.
    let fault = administrator.fault(&["hosts", "list"]);
    assert!(fault.contains("is the daemon running, and with this --config?"), "{fault}");
    // Without options it looks where the package puts them.
    let neither = run(["hosts", "list"]);
    assert_eq!(neither.status.code(), Some(1));
    assert!(said(&neither).contains("--socket PATH or --config FILE"), "{}", said(&neither));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_removed_gets_nothing_more() {
    let (daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let [first, second] = [key(), key()];
    let files = [("first", &first), ("second", &second)].map(|(name, key)| write(&lab, name, key.public().spki_der()));
    add(&administrator, "node", &files[0]);
    let host = Host::new(daemon.client(), first, lab.identity());
    let old = host.attest().await.unwrap();
    host.roll(ApiVersion::V2, &old, &lab.protector()).await.unwrap();
    let refused = async |health: &[u8]| {
        let error = host.roll(ApiVersion::V2, health, &lab.protector()).await.err().unwrap().to_string();
        assert!(error.contains("403 HealthCertificateException"), "{error}");
    };

    // The next request is refused.
    assert!(administrator.run(&["hosts", "remove", "node"]).status.success());
    refused(&old).await;
    let error = host.attest().await.unwrap_err().to_string();
    assert!(error.contains("403 UnauthorizedErrorReply"), "{error}");

    // The same name with another key: the old certificate stays invalid, and the new host is served.
    add(&administrator, "node", &files[1]);
    refused(&old).await;
    assert!(host.attest().await.is_err());
    let replaced = Host::new(daemon.client(), second, lab.identity());
    let health = replaced.attest().await.unwrap();
    replaced.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();

    // The first key under another name: its certificate is for the old name.
    add(&administrator, "other", &files[0]);
    refused(&old).await;
    // The first key under its old name again: name and key are as before.
    assert!(administrator.run(&["hosts", "remove", "other"]).status.success());
    assert!(administrator.run(&["hosts", "remove", "NODE"]).status.success());
    add(&administrator, "node", &files[0]);
    host.roll(ApiVersion::V2, &old, &lab.protector()).await.unwrap();
    assert!(daemon.stop().success());

    // All of this is in the trail, including the name of the refused host.
    let trail = lab.audit();
    let of = |event: &str, outcome: &str| {
        trail.iter().filter(|l| l["event"] == event && l["outcome"] == outcome && l["host"] == "node").count()
    };
    assert_eq!((of("hosts.add", "requested"), of("hosts.remove", "requested")), (3, 1));
    assert_eq!((of("hosts.add", "success"), of("hosts.remove", "success")), (3, 1));
    let added: Vec<_> = trail.iter().filter(|l| l["event"] == "hosts.add" && l["outcome"] == "requested").collect();
    assert!(added.iter().all(|l| l["key"].as_str().unwrap().len() == 64 && l["by"]["uid"].is_u64()), "{added:?}");
    assert_eq!(of("release", "HealthCertificateException"), 3);
}

#[test]
fn damaged_counts_keep_no_daemon_from_serving() {
    let lab = Lab::make(Options::default());
    let administrator = Administrator(&lab);
    // Certificates that are not older than the counters have all of their releases counted.
    let state = rusqlite::Connection::open(lab.file("state/state.db")).unwrap();
    state.execute_batch("UPDATE certificates SET added = added - 1000").unwrap();
    drop(state);
    std::fs::write(lab.file("state/usage.db"), "no database, but long enough to be taken for one".repeat(20)).unwrap();
    let daemon = lab.serve();
    daemon
        .process
        .line(|line| (line.contains("usage.db.damaged-") && line.contains("start again at zero")).then_some(()));
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    block(lab.host(daemon.client()).roll(ApiVersion::V2, &health, &lab.protector())).unwrap();
    let keys = administrator.json(&["keys", "list"]);
    assert!(keys.as_array().unwrap().iter().all(|key| key["counted_since"].is_i64()), "{keys}");
    assert!(said(&administrator.run(&["keys", "list"])).contains("counted since"));
    assert!(administrator.json(&["hosts", "list"])[0]["last_release"].is_i64());
    assert!(daemon.stop().success());
    // The new certificates work.
    let daemon = lab.serve();
    assert!(!daemon.process.output().contains("begin anew"));
    assert!(daemon.stop().success());
}

#[test]
fn two_daemons_with_sockets_of_their_own_share_a_state() {
    let lab = Lab::make(Options::default());
    let (one, config) = (lab.serve(), lab.file("second.toml"));
    let mut second = lab.config();
    let sockets = lab.file("second");
    std::fs::create_dir(&sockets).unwrap();
    second.server.sockets = Some(sockets.clone());
    std::fs::write(&config, second.to_toml().unwrap()).unwrap();
    let two = Daemon::serve(&config);
    block(one.until_ready_is(200));
    block(two.until_ready_is(200));

    // Each daemon accepts certificates of the other, and a host removed at one is removed at the other.
    let health = block(lab.host(one.client()).attest()).unwrap();
    let roll = |daemon: &Daemon| block(lab.host(daemon.client()).roll(ApiVersion::V2, &health, &lab.protector()));
    for daemon in [&one, &two] {
        roll(daemon).unwrap();
    }
    assert!(Administrator(&lab).run(&["hosts", "remove", HOST]).status.success());
    until("the other daemon has heard of it", || roll(&two).is_err().then_some(()));
    assert!(roll(&one).is_err());
    let listed = run(["hosts", "list", "--json", "--socket", sockets.join("admin.sock").to_str().unwrap()]);
    assert_eq!(serde_json::from_slice::<Value>(&listed.stdout).unwrap(), serde_json::json!([]));
    assert!(two.stop().success() && one.stop().success());
    // Both daemons write to one trail.
    let done = lab.audit().iter().filter(|line| line["event"] == "release" && line["outcome"] == "success").count();
    assert!(done >= 2, "{done}");
}

#[test]
fn every_command_has_an_example() {
    for command in [
        &["serve"][..],
        &["demo"],
        &["doctor"],
        &["hosts"],
        &["keys"],
        &["hosts", "add"],
        &["hosts", "list"],
        &["hosts", "remove"],
        &["hosts", "label"],
        &["hosts", "unlabel"],
        &["hosts", "enable"],
        &["hosts", "disable"],
        &["hosts", "check"],
        &["baselines"],
        &["baselines", "capture"],
        &["baselines", "add"],
        &["baselines", "list"],
        &["baselines", "show"],
        &["baselines", "enable"],
        &["baselines", "disable"],
        &["baselines", "remove"],
        &["keys", "list"],
        &["keys", "generate"],
        &["keys", "csr"],
        &["keys", "self-sign"],
        &["keys", "add"],
        &["keys", "set-primary"],
        &["keys", "set-communications"],
        &["keys", "enable"],
        &["keys", "disable"],
        &["keys", "remove"],
        &["keys", "limit"],
        &["signers", "list"],
        &["signers", "rotate"],
        &["signers", "revoke"],
        &["audit"],
        &["audit", "verify"],
        &["audit", "status"],
        &["export"],
        &["import"],
    ] {
        let help = run(command.iter().copied().chain(["--help"]));
        let text = said(&help);
        let example = format!("Example: claviger {}", command.join(" "));
        assert!(help.status.success() && text.contains(&example), "{command:?}: {text}");
    }
    let text = said(&run(["--help"]));
    assert!(text.contains("Start here: claviger demo"), "{text}");
    let text = said(&run(["--version"]));
    assert!(text.starts_with("claviger "), "{text}");
}
