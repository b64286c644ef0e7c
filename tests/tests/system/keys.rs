//! Tests of administrators' work with keys and certificates: generated in the HSM and certified elsewhere, imported,
//! rotated, limited, and transferred to another service.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use claviger_client::host::Host;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::protector::Protector;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Administrator, Daemon, HOST, Lab, Options, metadata, run, said, tool, until};
use data_encoding::HEXLOWER;
use serde_json::Value;

/// Returns the primary certificate's thumbprint.
fn primary(administrator: &Administrator<'_>, kind: &str) -> String {
    let keys = administrator.json(&["keys", "list"]);
    let found = keys.as_array().unwrap().iter().find(|key| key["kind"] == kind && key["primary"] == true);
    found.unwrap()["thumbprint"].as_str().unwrap().to_owned()
}

fn of(administrator: &Administrator<'_>, thumbprint: &str) -> Value {
    let keys = administrator.json(&["keys", "list"]);
    keys.as_array().unwrap().iter().find(|key| key["thumbprint"] == thumbprint).cloned().unwrap()
}

fn openssl(arguments: &[&str]) -> String {
    let output = tool("openssl", Command::new("openssl").args(arguments));
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    said(&output)
}

/// Writes a file that only its owner may read.
fn write(lab: &Lab, name: &str, text: &str) -> PathBuf {
    let path = lab.file(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Creates a temporary CA; returns its key and certificate.
fn authority(lab: &Lab) -> (PathBuf, PathBuf) {
    let (key, certificate) = (lab.file("ca.key"), lab.file("ca.pem"));
    let subject = ["-subj", "/CN=throw-away CA"];
    let out = ["-keyout", text(&key), "-out", text(&certificate)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"][..], &subject, &out].concat());
    (key, certificate)
}

/// Generates a key in the HSM, has the CA certify its request, and adds the certificate; returns the thumbprint.
fn certified(administrator: &Administrator<'_>, kind: &str, ca: &(PathBuf, PathBuf)) -> String {
    let lab = administrator.0;
    let made = administrator.json(&["keys", "generate", "--kind", kind, "--bits", "2048"]);
    let id = made["hsm_key"].as_str().unwrap();
    let (request, certificate) = (lab.file(&format!("{kind}.csr")), lab.file(&format!("{kind}.pem")));
    let written = administrator.run(&["keys", "csr", "--hsm-key", id, "--subject", kind, "--out", text(&request)]);
    assert!(written.status.success(), "{}", said(&written));
    let shown = openssl(&["req", "-verify", "-noout", "-text", "-in", text(&request)]);
    assert!(shown.contains("self-signature verify OK"), "{shown}");
    assert!(shown.contains("Digital Signature, Data Encipherment"), "{shown}");
    assert!(shown.contains("TLS Web Server Authentication"), "{shown}");
    let by = ["-CA", text(&ca.1), "-CAkey", text(&ca.0), "-CAcreateserial", "-copy_extensions", "copyall"];
    let files = ["-in", text(&request), "-out", text(&certificate)];
    openssl(&[&["x509", "-req", "-days", "30"][..], &by, &files].concat());
    let added = administrator.json(&["keys", "add", "--kind", kind, "--certificate", text(&certificate)]);
    assert_eq!((&added["hsm_key"], &added["primary"]), (&made["hsm_key"], &Value::Bool(false)), "{added}");
    assert_eq!(added["warnings"], serde_json::json!([]));
    added["thumbprint"].as_str().unwrap().to_owned()
}

async fn released(host: &Host, health: &[u8], protector: &[u8]) {
    host.roll(ApiVersion::V2, health, protector).await.unwrap();
}

async fn refused(host: &Host, health: &[u8], protector: &[u8], with: &str) {
    let error = host.roll(ApiVersion::V2, health, protector).await.err().unwrap().to_string();
    assert!(error.contains(with), "{error}");
}

fn own_protector(lab: &Lab, guardian: &Metadata) -> Vec<u8> {
    lab.owner().create(std::slice::from_ref(guardian)).unwrap().0
}

fn thumbprint(certificate: &[u8]) -> String {
    HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, certificate).as_ref())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_made_in_the_hsm_take_over_and_the_old_ones_go_on_serving() {
    let (daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let (client, old) = (daemon.client(), lab.protector());
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    let ca = authority(&lab);
    let before = [primary(&administrator, "signing"), primary(&administrator, "encryption")];
    let [signing, encryption] = ["signing", "encryption"].map(|kind| certified(&administrator, kind, &ca));

    // Added certificates serve; the metadata document changes with the primary ones.
    let guardian = metadata(&client).await.guardian;
    assert_eq!(thumbprint(&guardian.signing_certificate), before[0]);
    assert_eq!(guardian.other_signing_certificates.iter().map(|c| thumbprint(c)).collect::<Vec<_>>(), [&*signing]);
    for certificate in [&signing, &encryption] {
        assert_eq!(administrator.json(&["keys", "set-primary", &certificate[..8]])["primary"], true);
    }
    let document = metadata(&client).await;
    assert_eq!(thumbprint(&document.guardian.signing_certificate), signing);
    assert_eq!(thumbprint(&document.guardian.encryption_certificate), encryption);
    assert_eq!(thumbprint(document.communications_certificate.der()), signing);
    let new = own_protector(&lab, &document);
    for protector in [&new, &old] {
        released(&host, &health, protector).await;
    }

    // Another certificate signs the document, until the default is restored.
    administrator.json(&["keys", "set-communications", &before[0]]);
    assert_eq!(thumbprint(metadata(&client).await.communications_certificate.der()), before[0]);
    assert!(administrator.fault(&["keys", "disable", &before[0]]).contains("communications certificate"));
    administrator.json(&["keys", "set-communications", "--default"]);
    assert_eq!(thumbprint(metadata(&client).await.communications_certificate.der()), signing);

    // A disabled certificate does not serve; once enabled, it serves again.
    let disabled = administrator.json(&["keys", "disable", &before[1]]);
    assert!(disabled["warnings"][0].as_str().unwrap().contains("releases of the last 30 days"), "{disabled}");
    refused(&host, &health, &old, "400 InvalidWrappingException").await;
    released(&host, &health, &new).await;
    administrator.json(&["keys", "enable", &before[1]]);
    released(&host, &health, &old).await;

    // A certificate that releases use needs a flag for removal, and a primary one cannot be removed.
    assert!(of(&administrator, &before[1])["releases"].as_u64().unwrap() >= 2);
    assert!(administrator.fault(&["keys", "remove", &before[1]]).contains("--force"));
    assert!(administrator.fault(&["keys", "remove", &encryption, "--force"]).contains("is the primary"));
    let gone = administrator.json(&["keys", "remove", &before[1], "--force"]);
    assert!(gone["warnings"][0].as_str().unwrap().contains("releases"), "{gone}");
    refused(&host, &health, &old, "400 InvalidWrappingException").await;
    released(&host, &health, &new).await;

    // Refused input, and the reasons.
    let list = administrator.json(&["keys", "list"]);
    let signing_key = of(&administrator, &signing)["hsm_key"].as_str().unwrap().to_owned();
    let certificate = lab.file("signing.pem");
    let strange = lab.file("strange.pem");
    let subject = ["-subj", "/CN=x", "-keyout", "/dev/null", "-out", text(&strange)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes"][..], &subject].concat());
    let usage = lab.file("usage.pem");
    let with = ["-addext", "keyUsage=digitalSignature,dataEncipherment"];
    let subject = ["-subj", "/CN=x", "-keyout", "/dev/null", "-out", text(&usage)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes"][..], &with, &subject].concat());
    let weak = lab.file("weak.pem");
    let subject = ["-subj", "/CN=x", "-keyout", "/dev/null", "-out", text(&weak)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:1024", "-nodes"][..], &with, &subject].concat());
    let elliptic = lab.file("elliptic.pem");
    let subject = ["-subj", "/CN=x", "-keyout", "/dev/null", "-out", text(&elliptic)];
    let curve = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    openssl(&[&curve[..], &with, &subject].concat());
    for (kind, file, more, expected) in [
        ("signing", &strange, &[][..], "lacks the key usage digitalSignature"),
        ("encryption", &strange, &[], "lacks the key usage dataEncipherment"),
        ("signing", &usage, &[], "no HSM that answers has the certificate's key"),
        ("signing", &usage, &["--hsm-key", &signing_key], "has another key of that id"),
        ("signing", &usage, &["--hsm-key", "00ff"], "shows no such key"),
        ("signing", &weak, &[], "1024"),
        ("signing", &elliptic, &[], "RSA"),
        ("signing", &certificate, &[], "is there already"),
        // The key may only sign.
        ("encryption", &certificate, &[], "does not decrypt"),
    ] {
        let fault =
            administrator.fault(&[&["keys", "add", "--kind", kind, "--certificate", text(file)], more].concat());
        assert!(fault.contains(expected), "{file:?} as {kind}: {fault}");
    }
    assert_eq!(administrator.json(&["keys", "list"]), list);
    let shown = said(&administrator.run(&["keys", "list"]));
    assert!(shown.starts_with("KIND") && shown.contains(&signing) && shown.contains("RELEASES"), "{shown}");
    assert!(daemon.stop().success());

    // The trail records each change and its author.
    let trail = lab.audit();
    let done = |event: &str, certificate: &str| {
        let of = |line: &&Value| {
            line["event"] == event && line["outcome"] == "success" && line["certificate"] == certificate
        };
        trail.iter().filter(of).filter(|line| line["by"]["uid"].is_u64()).count()
    };
    assert_eq!((done("keys.add", &signing), done("keys.set-primary", &encryption)), (1, 1));
    assert_eq!((done("keys.disable", &before[1]), done("keys.remove", &before[1])), (1, 1));
    let generated = trail.iter().filter(|line| line["event"] == "keys.generate" && line["outcome"] == "success");
    assert!(generated.clone().count() == 2 && generated.clone().all(|line| line["hsm"] == "hsm-a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pfx_goes_onto_every_member_and_a_key_of_one_member_alone_does_not_serve() {
    let (daemon, lab) = Lab::start(Options { hsms: 2, ..Options::default() });
    let administrator = Administrator(&lab);
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    let (key, certificate) = (lab.file("own.key"), lab.file("own.pem"));
    let with = ["-addext", "keyUsage=digitalSignature,dataEncipherment", "-addext", "extendedKeyUsage=serverAuth"];
    let subject = ["-subj", "/CN=own", "-keyout", text(&key), "-out", text(&certificate)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes"][..], &with, &subject].concat());
    let password = write(&lab, "password", "correct horse\n");
    let wrong = write(&lab, "wrong", "battery staple\n");
    let pass = format!("file:{}", text(&password));
    // As OpenSSL 3 writes it, and as older programs do: RC2 with 40 bits, if this OpenSSL still supports it.
    let rc2 = tool("openssl", Command::new("openssl").args(["list", "-providers", "-provider", "legacy"]));
    let old: &[&str] = if rc2.status.success() {
        &["-legacy"]
    } else {
        &["-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1"]
    };
    let mut thumbprints = Vec::new();
    for (name, kind, cipher) in [("new.pfx", "signing", &[][..]), ("old.pfx", "encryption", old)] {
        let pfx = lab.file(name);
        let files = ["-inkey", text(&key), "-in", text(&certificate), "-out", text(&pfx), "-passout", &pass];
        openssl(&[&["pkcs12", "-export"][..], cipher, &files].concat());
        let add = ["keys", "add", "--kind", kind, "--pfx", text(&pfx), "--primary", "--password-file"];
        let fault = administrator.fault(&[&add[..], &[text(&wrong)]].concat());
        assert!(fault.contains(name) && fault.contains("password"), "{fault}");
        let added = administrator.json(&[&add[..], &[text(&password)]].concat());
        assert_eq!(added["primary"], true);
        thumbprints.push(added["thumbprint"].as_str().unwrap().to_owned());
    }
    let protector = own_protector(&lab, &metadata(&daemon.client()).await);
    // Each member serves alone.
    for (drained, other) in [("hsm-a", "hsm-b"), ("hsm-b", "hsm-a")] {
        administrator.json(&["hsm", "drain", drained]);
        released(&host, &health, &protector).await;
        administrator.json(&["hsm", "resume", drained]);
        until("the member is back", || {
            let members = administrator.json(&["hsm", "list"]);
            members.as_array().unwrap().iter().all(|m| m["name"] != drained || m["state"] == "up").then_some(())
        });
        assert_ne!(drained, other);
    }

    // Soft tokens do not replicate: a key stays on the token that generated it, and cannot serve.
    let made = administrator.json(&["keys", "generate", "--kind", "signing", "--member", "hsm-b", "--bits", "2048"]);
    assert_eq!((&made["member"], &made["lacking"]), (&"hsm-b".into(), &serde_json::json!(["hsm-a"])));
    let id = made["hsm_key"].as_str().unwrap();
    let own = lab.file("self.pem");
    let signed = administrator.run(&["keys", "self-sign", "--hsm-key", id, "--subject", "lab", "--out", text(&own)]);
    assert!(signed.status.success() && said(&signed).contains("self-signed"), "{}", said(&signed));
    openssl(&["verify", "-CAfile", text(&own), text(&own)]);
    let fault =
        administrator.fault(&["keys", "add", "--kind", "signing", "--certificate", text(&own), "--hsm-key", id]);
    assert!(fault.contains("not on every member: hsm-a shows no such key"), "{fault}");
    let fault = administrator.fault(&["keys", "generate", "--kind", "signing", "--bits", "2048"]);
    assert!(fault.contains("not all members show it") && fault.contains("--member"), "{fault}");
    assert_eq!(administrator.json(&["keys", "list"]).as_array().unwrap().len(), 4);
    assert!(daemon.stop().success());
    // The password is not in any record.
    assert!(!format!("{:?}", lab.audit()).contains("horse"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_key_is_for_hosts_of_its_labels() {
    let (daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let (ours, other) = (lab.host(daemon.client()), RsaPrivateKey::generate(2048).unwrap());
    let file = write(&lab, "other.pem", &other.public().to_pem());
    let add = ["hosts", "add", "other", "--public-key", text(&file), "--label", "tenant=other", "--label", "gpu"];
    assert_eq!(administrator.json(&add)["labels"], serde_json::json!(["gpu", "tenant=other"]));
    let other = Host::new(daemon.client(), other, lab.identity());
    let (health, others) = (ours.attest().await.unwrap(), other.attest().await.unwrap());
    let protector = lab.protector();
    let encryption = primary(&administrator, "encryption");
    released(&ours, &health, &protector).await;
    released(&other, &others, &protector).await;

    let limit = administrator.run(&["keys", "limit", &encryption, "--label", "tenant=acme", "--label", "site"]);
    assert!(said(&limit).contains("hosts with site tenant=acme"), "{}", said(&limit));
    for (host, health) in [(&ours, &health), (&other, &others)] {
        refused(host, health, &protector, "400 InvalidWrappingException").await;
    }
    administrator.json(&["hosts", "label", HOST, "tenant=acme"]);
    refused(&ours, &health, &protector, "limited to other hosts").await;
    administrator.json(&["hosts", "label", HOST, "site"]);
    released(&ours, &health, &protector).await;
    refused(&other, &others, &protector, "limited to other hosts").await;
    // The health certificate stays the same: labels are looked up, not certified.
    administrator.json(&["hosts", "unlabel", HOST, "site"]);
    refused(&ours, &health, &protector, "400 InvalidWrappingException").await;
    administrator.json(&["keys", "limit", &encryption, "--none"]);
    released(&other, &others, &protector).await;

    // A disabled host gets nothing, with or without a health certificate.
    administrator.json(&["hosts", "disable", "other"]);
    refused(&other, &others, &protector, "403 HealthCertificateException").await;
    assert!(other.attest().await.is_err());
    administrator.json(&["hosts", "enable", "other"]);
    released(&other, &others, &protector).await;
    let listed = administrator.json(&["hosts", "list"]);
    let of = |name: &str| listed.as_array().unwrap().iter().find(|host| host["name"] == name).unwrap();
    assert!(of("other")["last_release"].is_i64() && of("other")["last_attestation"].is_i64(), "{listed}");
    assert_eq!(of(HOST)["labels"], serde_json::json!(["tenant=acme"]));
    assert!(administrator.fault(&["hosts", "label", HOST, "a b"]).contains("is no label"));
    assert!(daemon.stop().success());
    let trail = lab.audit();
    let changes: Vec<_> = trail.iter().filter(|line| line["event"] == "hosts.label").collect();
    assert!(changes.len() == 6 && changes[0]["change"] == "+tenant=acme", "{changes:?}");

    // A host may be allowed to start machines offline.
    lab.configure(|config| config.release.max_offline_unwraps = 7);
    let daemon = lab.serve();
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    let unwrapped = host.roll(ApiVersion::V2, &health, &protector).await.unwrap();
    assert_eq!(unwrapped.keys.max_offline_unwraps, 7);
    let egress = String::from_utf8(unwrapped.egress_protector.clone()).unwrap();
    assert!(egress.contains("MaxOfflineUnwraps=\"7\""), "{egress}");
    assert!(Protector::parse(&unwrapped.egress_protector).is_ok());
    // The earlier counts are kept.
    let listed = administrator.json(&["hosts", "list"]);
    assert!(listed.as_array().unwrap().iter().all(|host| host["last_release"].is_i64()), "{listed}");
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_service_is_another_on_the_same_tokens_becomes() {
    let (daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let encryption = primary(&administrator, "encryption");
    administrator.json(&["hosts", "label", HOST, "tenant=acme"]);
    administrator.json(&["keys", "limit", &encryption, "--label", "tenant=acme"]);
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let passphrase = write(&lab, "passphrase", "correct horse battery staple\n");
    let short = write(&lab, "short", "short\n");
    let export = lab.file("export.age");
    let file = ["export", text(&export), "--passphrase-file"];
    assert!(administrator.fault(&[&file[..], &[text(&short)]].concat()).contains("at least 12"));
    let written = administrator.json(&[&file[..], &[text(&passphrase)]].concat());
    assert_eq!((&written["hosts"], &written["certificates"], &written["signers"]), (&1.into(), &2.into(), &1.into()));
    let sealed = std::fs::read(&export).unwrap();
    assert!(
        sealed.starts_with(b"age-encryption.org/v1\n-> scrypt") && !sealed.windows(9).any(|w| w == HOST.as_bytes())
    );
    assert!(administrator.fault(&[&file[..], &[text(&passphrase)]].concat()).contains("there already"));
    // Encrypted for a key pair of age's own tool.
    let identity = write(
        &lab,
        "identity",
        "# public key: age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj\n\
         AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX\n",
    );
    let recipient = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
    let to_key = lab.file("export.key.age");
    administrator.json(&["export", text(&to_key), "--recipient", recipient]);
    let import = ["import", text(&to_key), "--identity", text(&identity), "--yes"];
    let nothing = administrator.json(&import);
    assert_eq!(nothing["changes"], serde_json::json!([]), "what is there already is no change");
    assert!(daemon.stop().success());

    // Another state on the same tokens: an empty service.
    let config = lab.file("second.toml");
    let mut second = lab.config();
    second.server.state = lab.file("second");
    std::fs::write(&config, second.to_toml().unwrap()).unwrap();
    let daemon = Daemon::serve(&config);
    let ask = |arguments: &[&str]| {
        let output = run(arguments.iter().copied().chain(["--json", "--config", text(&config)]));
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(ask(&["hosts", "list"]), serde_json::json!([]));
    let import = ["import", text(&export), "--passphrase-file", text(&passphrase)];
    let planned = ask(&[&import[..], &["--dry-run"]].concat());
    assert_eq!((planned["applied"].clone(), ask(&["hosts", "list"])), (false.into(), serde_json::json!([])));
    let silent = run(import.iter().copied().chain(["--config", text(&config)]));
    assert!(!silent.status.success() && said(&silent).contains("--yes"), "{}", said(&silent));
    let bad = ["import", text(&export), "--passphrase-file", text(&short), "--yes", "--config", text(&config)];
    assert!(said(&run(bad)).contains("cannot be decrypted"));
    let done = ask(&[&import[..], &["--yes"]].concat());
    assert_eq!((&done["applied"], &done["changes"]), (&true.into(), &planned["changes"]));

    // The same keys, limits and signer: a health certificate of the first service is valid here.
    let host = lab.host(daemon.client());
    released(&host, &health, &lab.protector()).await;
    let health = host.attest().await.unwrap();
    released(&host, &health, &lab.protector()).await;
    assert_eq!(ask(&["hosts", "list"])[0]["labels"], serde_json::json!(["tenant=acme"]));
    ask(&["hosts", "unlabel", HOST, "tenant=acme"]);
    refused(&host, &health, &lab.protector(), "limited to other hosts").await;
    assert!(daemon.stop().success());
    let trail = std::fs::read_to_string(lab.file("second/audit.jsonl")).unwrap();
    assert_eq!(trail.matches(r#""event":"import""#).count(), done["changes"].as_array().unwrap().len() + 1);
}

#[test]
fn a_member_that_does_not_answer_is_nobodys_proof() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let faulty = lab.behind_faulty();
    faulty.set("hsm-b", &["absent rv=CKR_DEVICE_REMOVED"]);
    let daemon = lab.serve();
    let administrator = Administrator(&lab);
    let (key, certificate, pfx) = (lab.file("own.key"), lab.file("own.pem"), lab.file("own.pfx"));
    let with = ["-addext", "keyUsage=digitalSignature", "-addext", "extendedKeyUsage=serverAuth"];
    let subject = ["-subj", "/CN=own", "-keyout", text(&key), "-out", text(&certificate)];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes"][..], &with, &subject].concat());
    let password = write(&lab, "password", "correct horse\n");
    let pass = format!("file:{}", text(&password));
    let files = ["-inkey", text(&key), "-in", text(&certificate), "-out", text(&pfx), "-passout", &pass];
    openssl(&[&["pkcs12", "-export"][..], &files].concat());

    let add = ["keys", "add", "--kind", "signing", "--pfx", text(&pfx), "--password-file", text(&password)];
    let fault = administrator.fault(&add);
    assert!(fault.contains("brought to no member: hsm-b is"), "{fault}");
    let added = administrator.json(&[&add[..], &["--trust-absent"]].concat());
    assert!(added["warnings"][0].as_str().unwrap().starts_with("not checked: hsm-b"), "{added}");
    // Only the certificate is removed; hsm-a has its key now.
    administrator.json(&["keys", "remove", added["thumbprint"].as_str().unwrap()]);
    let add = ["keys", "add", "--kind", "signing", "--certificate", text(&certificate)];
    let fault = administrator.fault(&add);
    assert!(fault.contains("cannot be found out: hsm-b"), "{fault}");

    // The member returns, without the key.
    faulty.clear("hsm-b");
    until("hsm-b comes up", || {
        let members = administrator.json(&["hsm", "list"]);
        (members[1]["state"] == "up").then_some(())
    });
    let fault = administrator.fault(&[&add[..], &["--trust-absent"]].concat());
    assert!(fault.contains("not on every member: hsm-b shows no such key"), "{fault}");
    // A repeated import continues where the first one stopped.
    let add = ["keys", "add", "--kind", "signing", "--pfx", text(&pfx), "--password-file", text(&password)];
    assert_eq!(administrator.json(&add)["warnings"], serde_json::json!([]));
    assert!(daemon.stop().success());
}

/// Creates a key and its self-signed signing certificate with OpenSSL.
fn of_openssl(lab: &Lab, name: &str) -> (PathBuf, PathBuf) {
    let (key, certificate) = (lab.file(&format!("{name}.key")), lab.file(&format!("{name}.pem")));
    let extensions = ["-addext", "keyUsage=digitalSignature", "-addext", "extendedKeyUsage=serverAuth"];
    let subject = format!("/CN={name}");
    let out = ["-keyout", text(&key), "-out", text(&certificate), "-subj", &subject];
    openssl(&[&["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "90"][..], &out, &extensions].concat());
    (key, certificate)
}

/// Imports a private key into the lab's only token with another program, while the daemon runs.
fn written_by_another_program(lab: &Lab, key: &Path, attributes: &[&str]) {
    let der = lab.file("key.der");
    openssl(&["pkey", "-in", text(key), "-outform", "DER", "-out", text(&der)]);
    let pin = std::fs::read_to_string(lab.file("pins/hsm-a.pin")).unwrap();
    let mut command = Command::new("pkcs11-tool");
    command.env("SOFTHSM2_CONF", lab.file("softhsm2.conf")).arg("--module").arg(&lab.config().hsm[0].module);
    command.args(["--token-label", "claviger-a", "--login", "--pin", pin.trim(), "--type", "privkey", "--usage-sign"]);
    let written = tool("opensc", command.arg("--write-object").arg(&der).args(attributes));
    assert!(written.status.success(), "{}", said(&written));
}

/// `CKA_ID` is not unique: the public key decides, even if other programs made the keys, and after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_programs_are_told_apart_by_their_public_keys() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let administrator = Administrator(&lab);
    let add = |certificate: &Path, more: &[&str]| {
        administrator.run(&[&["keys", "add", "--kind", "signing", "--certificate", text(certificate)], more].concat())
    };
    // The certificate comes before its key, so that the sessions have searched in vain.
    let (one_key, one) = of_openssl(&lab, "one");
    let refused = said(&add(&one, &[]));
    assert!(refused.contains("no HSM that answers has the certificate's key"), "{refused}");
    // Two keys with one id, the second made after the first was found.
    let (two_key, two) = of_openssl(&lab, "two");
    for (key, certificate, more) in [(&one_key, &one, &[][..]), (&two_key, &two, &["--primary"][..])] {
        written_by_another_program(&lab, key, &["--id", "05"]);
        let added = add(certificate, more);
        assert!(added.status.success(), "{}", said(&added));
    }
    assert!(of(&administrator, &primary(&administrator, "signing"))["subject"] == "two");
    // An ambiguous id cannot name a key for a request.
    let refused = said(&administrator.run(&["keys", "csr", "--hsm-key", "05", "--subject", "x"]));
    assert!(refused.contains("several keys have the CKA_ID 05"), "{refused}");
    // The key with that id does not belong to this certificate.
    let (_, three) = of_openssl(&lab, "three");
    let refused = said(&add(&three, &["--hsm-key", "05"]));
    assert!(refused.contains("hsm-a has another key of that id"), "{refused}");
    // A key without an id is reported as such.
    let (four_key, four) = of_openssl(&lab, "four");
    written_by_another_program(&lab, &four_key, &["--label", "forgotten"]);
    let refused = said(&add(&four, &[]));
    assert!(refused.contains("label \"forgotten\"") && refused.contains("without a CKA_ID"), "{refused}");
    // A key that requires a login for every operation.
    let (five_key, five) = of_openssl(&lab, "five");
    written_by_another_program(&lab, &five_key, &["--id", "07", "--always-auth"]);
    let added = add(&five, &["--primary"]);
    assert!(added.status.success(), "{}", said(&added));
    assert_eq!(metadata(&daemon.client()).await.guardian.signing_certificate, certificate_der(&five));
    let made = administrator.run(&["keys", "set-primary", &thumbprint(&certificate_der(&two))]);
    assert!(made.status.success(), "{}", said(&made));
    assert!(daemon.stop().success());
    // After several restarts, for any order in which the token lists the keys.
    for _ in 0..3 {
        let (another, _) = of_openssl(&lab, "another");
        written_by_another_program(&lab, &another, &["--id", "05"]);
        let daemon = lab.serve();
        daemon.until_ready_is(200).await;
        assert_eq!(daemon.metrics().await.sum("claviger_hsm_wrong_answers_total", &[]), Some(0.0));
        assert!(daemon.stop().success());
    }
}

fn certificate_der(file: &Path) -> Vec<u8> {
    Certificate::from_file(&std::fs::read(file).unwrap()).unwrap().der().to_vec()
}
