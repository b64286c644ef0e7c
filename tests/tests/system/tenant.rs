//! Tests of `claviger guardian` and `claviger protector`, checked with a service and with independent programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger_client::host::HostError;
use claviger_protocol::error::Code;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Lab, METADATA, Options, claviger, said, tool};
use serde_json::Value;
use tempfile::TempDir;

const PAGE: &str = include_str!("../../../docs/tenant.md");

/// A tenant's directory, in which its commands run.
struct Tenant(TempDir);

impl Tenant {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }

    /// Runs a command line, given without the program's name.
    fn run(&self, line: &str) -> Output {
        Command::new(claviger()).args(line.split_whitespace()).current_dir(self.0.path()).output().unwrap()
    }

    fn done(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", said(&output));
        said(&output)
    }

    fn json(&self, line: &str) -> Value {
        let output = self.run(line);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", said(&output)))
    }

    /// Checks that a command ends with status 1 and prints all of `expected`.
    fn refused(&self, line: &str, expected: &[&str]) {
        let output = self.run(line);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{line}: {text}");
        assert!(output.stdout.is_empty() || line.contains("import"), "{line}: {text}");
        for part in expected {
            assert!(text.contains(part), "{line}: no {part:?} in {text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    }

    /// Runs the script of the documentation page, as a tenant does.
    fn recipe(&self, pin: &str) -> Output {
        let (_, script) = PAGE.split_once("```sh\nset -eu\n").unwrap();
        let (script, _) = script.split_once("```").unwrap();
        let mut command = Command::new("sh");
        let output = command.arg("-c").arg(script).env("PIN", pin).current_dir(self.0.path()).output().unwrap();
        let missing = said(&output).contains("not found");
        assert!(!missing, "{}: apt-get install openssl libxml2-utils xmlsec1", said(&output));
        output
    }

    /// Changes one character after the first `tag` of a file.
    fn change(&self, from: &str, to: &str, tag: &str) {
        let mut octets = self.read(from);
        let at = octets.windows(tag.len()).position(|w| w == tag.as_bytes()).unwrap() + tag.len() + 60;
        octets[at] = if octets[at] == b'A' { b'B' } else { b'A' };
        fs::write(self.file(to), octets).unwrap();
    }
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).unwrap().permissions().mode() & 0o777
}

fn shown(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[tokio::test]
async fn the_whole_life_of_a_tenant() {
    let (daemon, lab) = Lab::start(Options::default());
    let tenant = Tenant::new();
    tenant.done("guardian new acme --bits 2048");
    let url = &daemon.url;

    // A guardian is accepted only with a pinned thumbprint.
    tenant.refused(&format!("guardian import hgs --url {url}"), &["not believed yet", "--pin "]);
    let wrong = "0".repeat(64);
    tenant.refused(&format!("guardian import hgs --url {url} --pin {wrong}"), &["not the pinned one"]);
    assert!(!tenant.file("guardians").exists());
    // The operator's own list shows the thumbprint; OpenSSL prints it with colons.
    let listed = tenant.json(&format!("keys list --json --config {}", lab.config_file().display()));
    let signing = listed.as_array().unwrap().iter().find(|key| key["kind"] == "signing").unwrap();
    let pin = shown(&signing["thumbprint"]).to_owned();
    let imported = tenant.json(&format!("guardian import hgs --url {url} --pin {pin} --json"));
    assert_eq!((shown(&imported["signing"]["thumbprint"]), &imported["pinned"]), (pin.as_str(), &Value::Bool(true)));
    fs::write(tenant.file("metadata.xml"), daemon.client().get(METADATA).await.unwrap().body).unwrap();
    assert_eq!(tenant.read("guardians/hgs.xml"), tenant.read("metadata.xml"));
    tenant.done(&format!("guardian verify metadata.xml --pin {}", pin.to_uppercase()));
    assert_eq!(tenant.json("guardian list --json")[0]["name"], "hgs");
    assert!(tenant.done("guardian list").contains(&pin));

    // A protector, and its key through the service.
    tenant.done("protector new --owner acme --guardian hgs --out vm.xml --key vm.key");
    assert_eq!((mode(&tenant.file("vm.key")), tenant.read("vm.key").len()), (0o600, 32));
    tenant.done("protector verify vm.xml --owner acme");
    tenant.done("protector open vm.xml --owner acme --out again.key");
    assert_eq!(tenant.read("again.key"), tenant.read("vm.key"));
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    let released = host.roll(ApiVersion::V2, &health, &tenant.read("vm.xml")).await.unwrap();
    assert!(released.keys.ingress[..] == tenant.read("vm.key"));
    fs::write(tenant.file("egress.xml"), &released.egress_protector).unwrap();
    let opened = tenant.run("protector open egress.xml --owner acme --stdout");
    assert!(opened.status.success() && released.keys.egress[..] == opened.stdout);
    tenant.done("protector verify egress.xml --owner acme");
    // The protector contains the same certificates, so the script works with the service's protector too.
    for protector in ["vm.xml", "egress.xml"] {
        fs::copy(tenant.file(protector), tenant.file("kept.xml")).unwrap();
        fs::copy(tenant.file("kept.xml"), tenant.file("vm.xml")).unwrap();
        let _ = fs::remove_file(tenant.file("transport.key"));
        let checked = tenant.recipe(&pin);
        assert!(checked.status.success(), "{protector}: {}", said(&checked));
        let opened = tenant.run("protector open vm.xml --owner acme --stdout");
        assert_eq!(tenant.read("transport.key"), opened.stdout);
    }
    let checked = tenant.recipe(&wrong);
    assert!(!checked.status.success() && said(&checked).contains("not the pinned certificate"), "{}", said(&checked));

    // Another guardian is added, by a document that claviger wrote; it decrypts the same key.
    tenant.done("guardian new other --bits 2048");
    tenant.done("guardian export other --out other.xml");
    let other = tenant.json("guardian import other other.xml --trust-unpinned --json");
    assert_eq!(other["pinned"], false);
    tenant.refused("protector grant egress.xml --owner acme --metadata other.xml --out no.xml", &["--pin"]);
    let line = "protector grant egress.xml --owner acme --out granted.xml --metadata other.xml --pin";
    tenant.done(&format!("{line} {}", shown(&other["signing"]["thumbprint"])));
    tenant.done("protector open granted.xml --owner other --out other.key");
    assert!(tenant.read("other.key") == released.keys.egress[..]);
    let released = host.roll(ApiVersion::V1, &health, &tenant.read("granted.xml")).await.unwrap();
    assert!(tenant.read("other.key") == released.keys.ingress[..]);
    tenant.refused("protector grant granted.xml --owner acme --guardian hgs --out no.xml", &["already"]);
    tenant.refused("protector grant granted.xml --owner other --guardian hgs --out no.xml", &["already"]);

    // The service is removed: it refuses, and the others have a new key.
    tenant.refused("protector revoke granted.xml --owner other --guardian hgs --out no.xml --key no.key", &["--owner"]);
    let text =
        tenant.done("protector revoke granted.xml --owner acme --guardian hgs --out revoked.xml --key revoked.key");
    assert!(text.contains("left out: wrapping 2") && text.contains("protect it anew"), "{text}");
    tenant.done("protector verify revoked.xml --owner acme");
    tenant.done("protector open revoked.xml --owner other --out third.key");
    assert_eq!(tenant.read("third.key"), tenant.read("revoked.key"));
    assert_ne!(tenant.read("revoked.key"), tenant.read("other.key"));
    match host.roll(ApiVersion::V2, &health, &tenant.read("revoked.xml")).await {
        Err(HostError::Release { status: 400, refusal }) => assert_eq!(refusal.code, Code::InvalidWrapping),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("released"),
    }
    let lost = "protector revoke revoked.xml --owner acme --out no.xml --key no.key";
    tenant.refused(&format!("{lost} --guardian hgs"), &["no wrapping is for hgs"]);
    tenant.refused(&format!("{lost} --wrapping 7"), &["no wrapping has the Id 7"]);
    tenant.refused(&format!("{lost} --wrapping 1"), &["cannot be revoked"]);
    for name in ["no.xml", "no.key"] {
        assert!(!tenant.file(name).exists());
    }
    // A lab's tenant is an ordinary owner.
    let theirs = lab.file("tenant");
    tenant.done(&format!("protector verify {0}/vm-0001.protector.xml --owner {0}", theirs.display()));
    assert!(daemon.stop().success());
}

#[test]
fn what_is_wrong_is_said_and_shown() {
    let tenant = Tenant::new();
    for name in ["acme", "other"] {
        tenant.done(&format!("guardian new {name} --bits 2048"));
        assert_eq!(mode(&tenant.file(name)), 0o700);
        for part in ["signing", "encryption"] {
            let key = tenant.file(&format!("{name}/owner-{part}.key.pem"));
            assert_eq!(mode(&key), 0o600);
            let checked = tool("openssl", Command::new("openssl").args(["pkey", "-check", "-noout", "-in"]).arg(&key));
            assert!(checked.status.success(), "{}", said(&checked));
        }
    }
    let before = tenant.read("acme/owner-signing.key.pem");
    tenant.refused("guardian new acme --bits 2048", &["acme is there already", "choose another folder"]);
    assert_eq!(tenant.read("acme/owner-signing.key.pem"), before);
    tenant.refused("guardian new no/where --bits 2048", &["make the folder"]);
    assert_eq!(tenant.run("guardian new small --bits 1024").status.code(), Some(2));
    let certificates = tenant.done("guardian export other --certificates");
    assert_eq!(certificates.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(!certificates.contains("PRIVATE"));

    tenant.done("guardian export other --out metadata.xml");
    let pin = tenant.json("guardian import other metadata.xml --trust-unpinned --json");
    let pin = shown(&pin["signing"]["thumbprint"]).to_owned();
    tenant.refused("guardian import other metadata.xml --trust-unpinned", &["is there already"]);
    tenant.refused("guardian import ../x metadata.xml --trust-unpinned", &["a guardian's name"]);
    tenant.change("metadata.xml", "changed.xml", "<EncryptionCertificate>");
    let line = format!("guardian verify changed.xml --pin {pin}");
    tenant.refused(&line, &["changed.xml: "]);
    assert_eq!(tenant.json(&format!("{line} --json"))["valid"], false);
    fs::write(tenant.file("large.xml"), vec![b' '; 2_000_000]).unwrap();
    tenant.refused(&format!("guardian verify large.xml --pin {pin}"), &["larger than"]);
    tenant.refused(&format!("guardian verify none.xml --pin {pin}"), &["none.xml: No such file"]);
    assert_eq!(tenant.run("guardian verify metadata.xml --pin 00").status.code(), Some(2));
}

#[test]
fn protectors_that_are_not_right_are_shown_all_the_same() {
    let tenant = Tenant::new();
    for name in ["acme", "other"] {
        tenant.done(&format!("guardian new {name} --bits 2048"));
    }
    tenant.done("guardian export other --out metadata.xml");
    let pin = tenant.json("guardian import other metadata.xml --trust-unpinned --json");
    let pin = shown(&pin["signing"]["thumbprint"]).to_owned();
    let make = "protector new --owner acme --guardian other --out vm.xml --key vm.key";
    tenant.done(make);
    tenant.refused(make, &["vm.xml is there already"]);
    tenant.refused("protector new --owner acme --guardian no --out a --key b", &["no guardian no", "guardian import"]);
    tenant.refused("protector new --owner no --guardian other --out a --key b", &["claviger guardian new"]);
    tenant.refused("protector new --owner acme --guardian other --out a --key a", &["two files"]);
    tenant.refused("protector new --owner acme --guardian other --out no/a --key b", &["no/a: "]);
    assert!(!tenant.file("b").exists(), "a key without its protector");
    tenant.refused("protector verify vm.xml --owner other", &["does not own the protector"]);
    tenant.done("guardian new third --bits 2048");
    tenant.refused("protector open vm.xml --owner third --out a", &["no wrapping", "--owner"]);
    assert!(tenant.recipe(&pin).status.success());

    // Changes one character in one place after another: the place is reported, and every program refuses.
    fs::copy(tenant.file("vm.xml"), tenant.file("right.xml")).unwrap();
    for tag in
        ["<SigningCertificate>", "<EncryptionCertificate>", "<CipherValue>", "<GuardianSignature WrappingId=\"1\">"]
    {
        tenant.change("right.xml", "vm.xml", tag);
        let told = tenant.json("protector show vm.xml --json --owner acme");
        assert_eq!(told["valid"], false, "{tag}");
        let shown = tenant.done("protector show vm.xml");
        assert!(shown.contains("NOT VALID"), "{tag}: {shown}");
        tenant.refused("protector verify vm.xml --owner acme", &["protector show tells more"]);
        tenant.refused("protector open vm.xml --owner acme --out a", &["protector show tells more"]);
        let checked = tenant.recipe(&pin);
        assert!(!checked.status.success(), "{tag}: {}", said(&checked));
    }
    // Only a party that can decrypt sees this fault: the transport key's own signature.
    let right = String::from_utf8(tenant.read("right.xml")).unwrap();
    let (head, tail) = right.split_once("hmac-sha256\"><SignatureValue>").unwrap();
    let other = if tail.starts_with('A') { "B" } else { "A" };
    fs::write(tenant.file("vm.xml"), format!("{head}hmac-sha256\"><SignatureValue>{other}{}", &tail[1..])).unwrap();
    tenant.done("protector verify vm.xml");
    tenant.refused("protector verify vm.xml --owner acme", &["signature is wrong"]);
    assert_eq!(tenant.json("protector verify vm.xml --owner acme --json")["valid"], false);
    let told = tenant.json("protector show vm.xml --owner acme --json");
    assert_eq!((&told["valid"], &told["transport_key_signature"]["state"]), (&Value::Bool(false), &"wrong".into()));
    assert!(tenant.done("protector show vm.xml --owner acme").contains("DOES NOT HOLD"));
    for (name, octets) in [("empty", &b""[..]), ("text", b"hello"), ("binary", &[0xff; 100]), ("root", b"<Protector/>")]
    {
        fs::write(tenant.file(name), octets).unwrap();
        assert!(tenant.done(&format!("protector show {name}")).contains("NOT VALID"));
        assert_eq!(tenant.json(&format!("protector verify {name} --json"))["valid"], false);
        tenant.refused(&format!("protector verify {name}"), &["InvalidProtectorException"]);
    }

    // Keys that other users may read, or that do not match the certificate, are refused.
    let key = tenant.file("acme/owner-encryption.key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    tenant.refused("protector open right.xml --owner acme --out a", &["others may read", "chmod 600"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::copy(tenant.file("other/owner-encryption.crt.pem"), tenant.file("acme/owner-encryption.crt.pem")).unwrap();
    tenant.refused("protector open right.xml --owner acme --out a", &["is not the certificate of"]);
    fs::write(&key, "nonsense").unwrap();
    tenant.refused("protector open right.xml --owner acme --out a", &["owner-encryption.key.pem: "]);
    assert!(!tenant.file("a").exists());
}

#[test]
fn every_command_has_help_with_an_example() {
    let tenant = Tenant::new();
    for line in [
        "guardian",
        "guardian new",
        "guardian export",
        "guardian import",
        "guardian list",
        "guardian verify",
        "protector",
        "protector new",
        "protector show",
        "protector grant",
        "protector revoke",
        "protector open",
        "protector verify",
    ] {
        let help = tenant.done(&format!("{line} --help"));
        assert!(help.contains(&format!("Example: claviger {}", line.split(' ').next().unwrap())), "{help}");
    }
}
