//! Tests of TPM attestation: real daemons, swtpm with recorded boots, tpm2-tools as an independent host, and dishonest
//! hosts.

use std::path::Path;
use std::process::{Command, Output};

use claviger::config::AttestMode;
use claviger_protocol::attestation::tpm::{first_request, parse_continue_reply, second_request};
use claviger_protocol::attestation::{OperationMode, ReceivedError, ResultType, ServiceInfoReply};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::SYSTEM_HEALTH_AUTHENTICATION;
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_protocol::tpm::context::{self, Context, Kind};
use claviger_protocol::tpm::log::Log;
use claviger_protocol::tpm::pcr::PcrSet;
use claviger_protocol::tpm::policy::Policy;
use claviger_tests::tpm::{SoftwareHost, Swtpm, TPM_ATTEST, boot_log, post, replayed};
use claviger_tests::{Administrator, Daemon, Lab, Options, block, claviger, said, tool, until, wire};
use data_encoding::{BASE64, HEXLOWER};
use ring::{digest, hmac};
use serde_json::{Value, json};

/// Serves a lab in TPM mode.
fn serve(roots: Option<&Path>) -> (Daemon, Lab) {
    let lab = Lab::make(Options::default());
    lab.configure(|config| {
        config.attest.mode = AttestMode::Tpm;
        config.attest.vendor_roots = roots.map(Path::to_owned);
    });
    let daemon = lab.serve();
    // The attestation signer is created in the background.
    block(daemon.until_ready_is(200));
    (daemon, lab)
}

/// Registers a host by its endorsement key, without a certificate.
fn register(lab: &Lab, name: &str, key: &RsaPublicKey) -> Value {
    let file = lab.file(&format!("{name}.ek.pem"));
    std::fs::write(&file, key.to_pem()).unwrap();
    Administrator(lab).json(&["hosts", "add", name, "--ek-public", file.to_str().unwrap(), "--trust-ek"])
}

/// Adds the baseline of a recorded boot.
fn accept(lab: &Lab, name: &str, boot: &str, pcrs: &[usize]) {
    let log = std::fs::read(boot_log(boot)).unwrap();
    let values = replayed(&log, pcrs.iter().copied().collect());
    let given: Vec<_> = values.iter().map(|(pcr, value)| format!("{pcr}={}", HEXLOWER.encode(value))).collect();
    let mut arguments = vec!["baselines", "add", name];
    given.iter().for_each(|value| arguments.extend(["--pcr", value]));
    Administrator(lab).json(&arguments);
}

#[track_caller]
fn is(result: Result<impl Sized, ReceivedError>, name: &str, retryable: bool) -> ReceivedError {
    let error = result.err().unwrap_or_else(|| panic!("granted instead of {name}"));
    assert_eq!((error.name.as_str(), error.retryable), (name, retryable), "{error:?}");
    error
}

/// Returns the policies that a refusal names.
fn failed(error: &ReceivedError) -> Vec<Policy> {
    assert!(error.reasons.iter().all(|reason| !reason.result));
    let guid = |reason: &str| Policy::from_guid(&BASE64.decode(reason.as_bytes()).unwrap()).unwrap();
    error.reasons.iter().map(|reason| guid(&reason.reason)).collect()
}

/// A host with this TPM, for `claviger host …`. Its files are on a tmpfs.
struct Measured<'a> {
    tpm: &'a Swtpm,
    dir: tempfile::TempDir,
    log: &'a str,
    url: &'a str,
}

impl<'a> Measured<'a> {
    fn new(tpm: &'a Swtpm, log: &'a str, url: &'a str) -> Self {
        Self { tpm, dir: tempfile::tempdir_in("/dev/shm").unwrap(), log, url }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(claviger());
        command.arg("host").args(arguments).arg("--dir").arg(self.dir.path());
        command.arg("--tpm").arg(self.tpm.socket()).arg("--event-log").arg(boot_log(self.log));
        command.args(["--url", self.url]).output().unwrap()
    }

    fn attest(&self) -> Output {
        self.run(&["attest", "--fresh"])
    }
}

#[track_caller]
fn refused(output: &Output, why: &str) {
    let text = said(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(why), "{text}");
}

#[track_caller]
fn granted(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

#[test]
fn a_measured_host_gets_keys_while_its_baseline_is_enabled() {
    let mut tpm = Swtpm::start(true);
    tpm.boot("ovmf-sb-uki");
    let (daemon, lab) = serve(Some(&tpm.roots()));
    let administrator = Administrator(&lab);
    let info = ServiceInfoReply::parse(&block(daemon.client().get("/Attestation/getinfo")).unwrap().body).unwrap();
    assert_eq!(info.operation_mode, OperationMode::Tpm as u8);

    // Registration by the certificate of the TPM's maker.
    let ek = tpm.file("ek.pem");
    let mut command = Command::new(claviger());
    let made =
        command.args(["host", "ek", "--json", "--tpm"]).arg(tpm.socket()).arg("--out").arg(&ek).output().unwrap();
    granted(&made);
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(made["certificate"], true);
    let host = Measured::new(&tpm, "ovmf-sb-uki", &daemon.url);
    refused(&host.attest(), "UnauthorizedErrorReply");
    let added = administrator.json(&["hosts", "add", "node", "--ek-certificate", ek.to_str().unwrap()]);
    assert_eq!((&added["key"], &added["kind"]), (&made["key"], &json!("endorsement-key")));
    let again = administrator.fault(&["hosts", "add", "other", "--ek-certificate", ek.to_str().unwrap()]);
    assert!(again.contains("registered already, as host \"node\""), "{again}");

    // The host's boot must be accepted first.
    let nothing = administrator.fault(&["hosts", "check", "node"]);
    assert!(nothing.contains("has not proved by its TPM"), "{nothing}");
    refused(&host.attest(), "policies fail: SecureBootSettings");
    let checked = administrator.json(&["hosts", "check", "node"]);
    assert_eq!((&checked["healthy"], &checked["baselines"]), (&json!(false), &json!([])));
    let unquoted =
        administrator.fault(&["baselines", "capture", "fleet-1", "--host", "node", "--pcr", "9", "--pcr", "11"]);
    assert!(unquoted.contains("did not quote PCR 9") && unquoted.contains("--from-log"), "{unquoted}");
    let captured = administrator.json(&[
        "baselines",
        "capture",
        "fleet-1",
        "--host",
        "node",
        "--pcr",
        "9",
        "--pcr",
        "11",
        "--from-log",
    ]);
    let pcrs: Vec<_> = captured["pcrs"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(pcrs, ["0", "11", "2", "4", "7", "9"]);
    granted(&host.attest());
    let checked = administrator.json(&["hosts", "check", "node"]);
    assert_eq!((&checked["healthy"], &checked["baseline"]), (&json!(true), &json!("fleet-1")));
    let text = said(&administrator.run(&["hosts", "check", "node"]));
    assert!(text.contains("would be healthy, by baseline fleet-1"), "{text}");

    let health = std::fs::read_to_string(host.dir.path().join("health.pem")).unwrap();
    let health = Certificate::from_pem(&health).unwrap();
    assert_eq!((health.common_name(), health.organizational_unit()), (Some("node"), Some("fleet-1")));
    assert_eq!(health.subject_serial_number(), made["key"].as_str());
    assert!(health.has_extended_key_usage(SYSTEM_HEALTH_AUTHENTICATION));

    // Keys are released while the baseline is enabled.
    let (egress, keys) = (lab.file("next.xml"), lab.file("keys"));
    let protector = lab.file("tenant/vm-0001.protector.xml");
    let unwrap = |host: &Measured<'_>| {
        let files = [&protector, &egress, &keys].map(|path| path.to_str().unwrap());
        host.run(&["unwrap", "--json", "--protector", files[0], "--egress", files[1], "--key-file", files[2]])
    };
    granted(&unwrap(&host));
    administrator.json(&["baselines", "disable", "fleet-1"]);
    refused(&unwrap(&host), "policies fail: SecureBootSettings");
    let checked = administrator.json(&["hosts", "check", "node"]);
    // PCRs 9 and 11 are no longer compared.
    let differs: Vec<_> = checked["baselines"][0]["differs"].as_array().unwrap().iter().collect();
    assert!(differs.iter().all(|pcr| pcr["quoted"].is_null() && pcr["events"] == json!([])), "{differs:?}");
    assert_eq!(differs.iter().map(|pcr| &pcr["pcr"]).collect::<Vec<_>>(), [9, 11]);
    assert_eq!((&checked["healthy"], &checked["baselines"][0]["enabled"]), (&json!(false), &json!(false)));
    administrator.json(&["baselines", "enable", "fleet-1"]);
    granted(&unwrap(&host));
    let shown = administrator.json(&["baselines", "show", "fleet-1"]);
    let events = shown["events"].as_array().unwrap();
    assert!(events.iter().any(|event| event["event"] == "EV_EFI_VARIABLE_DRIVER_CONFIG SecureBoot"), "{events:?}");

    // An extension of a PCR that need not match the log: the host is refused, with the reason that its log proves nothing.
    tpm.tool("tpm2_pcrextend", [format!("9:sha256={}", "11".repeat(32))]);
    refused(&host.attest(), "policies fail: SecureBootSettings");
    let text = said(&administrator.run(&["hosts", "check", "node"]));
    assert!(text.contains("the event log does not give this value"), "{text}");
    let checked = administrator.json(&["hosts", "check", "node"]);
    let differs = &checked["baselines"][0]["differs"];
    assert_eq!((&differs[0]["pcr"], &differs[0]["log_agrees"], differs.get(1)), (&json!(9), &json!(false), None));
    // An extension of a PCR that must match the log: the log is refused.
    tpm.tool("tpm2_pcrextend", [format!("4:sha256={}", "11".repeat(32))]);
    refused(&host.attest(), "TcgLogValidationErrorReply");
    // Another boot: `hosts check` reports the differences to the baseline.
    drop(host);
    tpm.reset();
    tpm.boot("ovmf-sb-direct-kernel");
    let host = Measured::new(&tpm, "ovmf-sb-direct-kernel", &daemon.url);
    refused(&host.attest(), "policies fail: SecureBootSettings");
    let text = said(&administrator.run(&["hosts", "check", "node"]));
    assert!(text.contains("FAILS SecureBootSettings: no enabled baseline has its values"), "{text}");
    assert!(text.contains("- ") && text.contains("EV_EFI_VARIABLE_AUTHORITY db"), "{text}");
    // `capture` takes exactly the evidence that was checked.
    let checked = administrator.json(&["hosts", "check", "node"]);
    let at = checked["at"].as_i64().unwrap();
    assert!(text.contains(&format!("claviger baselines capture NAME --host node --at {at}")), "{text}");
    let capture =
        |at: i64| ["baselines", "capture", "fleet-2", "--host", "node", "--at", &at.to_string()].map(str::to_owned);
    let earlier = capture(at - 1);
    let earlier = administrator.fault(&earlier.each_ref().map(String::as_str));
    assert!(earlier.contains(&format!("is of {at}, not of {}", at - 1)), "{earlier}");
    administrator.json(&capture(at).each_ref().map(String::as_str));
    granted(&host.attest());
    administrator.json(&["baselines", "remove", "fleet-2"]);
    refused(&unwrap(&host), "policies fail: SecureBootSettings");
    // A new baseline under an old name is a different baseline.
    granted_after_the_same_name(&administrator, &host, &unwrap);

    // The records in the trail.
    administrator.json(&["hosts", "remove", "node"]);
    refused(&host.attest(), "UnauthorizedErrorReply");
    assert!(daemon.stop().success());
    let trail = lab.audit();
    let attested: Vec<_> = trail.iter().filter(|line| line["event"] == "attest" && line["host"] == "node").collect();
    let success = attested.iter().find(|line| line["outcome"] == "success").unwrap();
    assert_eq!((&success["baseline"], &success["key"]), (&json!("fleet-1"), &made["key"]));
    let unhealthy = attested.iter().find(|line| line["outcome"] == "PolicyEvaluationErrorReply").unwrap();
    assert_eq!(unhealthy["failed_policies"], json!(["SecureBootSettings"]));
    let released = trail.iter().find(|line| line["event"] == "release" && line["host"] == "node").unwrap();
    assert_eq!(released["baseline"], "fleet-1");
    let captured = trail.iter().find(|line| line["event"] == "baselines.capture").unwrap();
    assert_eq!(captured["baseline"], "fleet-1");
    let change = captured["change"].as_str().unwrap();
    assert!(change.starts_with("from host node, ") && change.contains("PCRs 0 2 4 7 9 11, SHA-256 of"), "{change}");
}

/// A health certificate names a baseline. If that baseline was removed, a new one with the same name does not make it
/// valid.
fn granted_after_the_same_name(
    administrator: &Administrator<'_>,
    host: &Measured<'_>,
    unwrap: &dyn Fn(&Measured<'_>) -> Output,
) {
    // The new baseline must not be added in the second in which the certificate was issued.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    administrator.json(&["baselines", "capture", "fleet-2", "--host", "node"]);
    let unwrapped = unwrap(host);
    granted(&unwrapped);
    assert!(said(&unwrapped).contains("\"attested\": true"), "{}", said(&unwrapped));
    let health = std::fs::read_to_string(host.dir.path().join("health.pem")).unwrap();
    assert_eq!(Certificate::from_pem(&health).unwrap().organizational_unit(), Some("fleet-2"));
}

#[test]
fn tpm2_tools_alone_attest() {
    let tpm = Swtpm::start(false);
    tpm.boot("ovmf-sb-uki");
    let (daemon, lab) = serve(None);
    accept(&lab, "base", "ovmf-sb-uki", &[0, 2, 4, 7, 9]);
    tpm.tool("tpm2_createek", ["-Q", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pem", "-f", "pem"]);
    let ek = RsaPublicKey::from_file(&std::fs::read(tpm.file("ek.pem")).unwrap()).unwrap();
    register(&lab, "tools", &ek);
    let identity = RsaPrivateKey::generate(2048).unwrap();
    for (kind, scheme) in [("rsa", "rsassa"), ("ecc", "ecdsa")] {
        let session = [3; 16];
        let wanted = [ResultType::SigningCertificate, ResultType::EncryptionCertificate];
        tpm.tool("tpm2_flushcontext", ["-t"]);
        let ak = ["-Q", "-C", "ek.ctx", "-c", "ak.ctx", "-G", kind, "-g", "sha256", "-s", scheme];
        tpm.tool("tpm2_createak", ak.into_iter().chain(["-u", "ak.public", "-f", "tpmt", "-n", "ak.name"]));
        let public = std::fs::read(tpm.file("ak.public")).unwrap();
        let first = first_request(session, &wanted, ek.spki_der(), &context::write(&[(Kind::AkPublic, &public)]));
        let received = parse_continue_reply(&post(&daemon, first).unwrap()).unwrap();
        let received = Context::parse(&received).unwrap();
        let kinds = [Kind::State, Kind::IdObject, Kind::EncryptedSecret, Kind::PcrSelection];
        let [state, id_object, secret, selection] = received.exactly(kinds).unwrap();
        assert_eq!(PcrSet::from_selection(selection).unwrap().iter().collect::<Vec<_>>(), [0, 2, 4, 7, 9]);

        // The file format of tpm2_activatecredential.
        let mut file = vec![0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1];
        for part in [id_object, secret] {
            file.extend_from_slice(&(part.len() as u16).to_be_bytes());
            file.extend_from_slice(part);
        }
        std::fs::write(tpm.file("credential"), file).unwrap();
        tpm.tool("tpm2_flushcontext", ["-t"]);
        tpm.tool("tpm2_startauthsession", ["-Q", "--policy-session", "-S", "session"]);
        tpm.tool("tpm2_policysecret", ["-Q", "-S", "session", "-c", "e"]);
        let activate =
            ["-Q", "-c", "ak.ctx", "-C", "ek.ctx", "-i", "credential", "-o", "secret", "-P", "session:session"];
        tpm.tool("tpm2_activatecredential", activate);
        tpm.tool("tpm2_flushcontext", ["session"]);
        let credential = std::fs::read(tpm.file("secret")).unwrap();

        let sent = identity.public().spki_der();
        let sent_digest = digest::digest(&digest::SHA256, sent);
        let message = [&b"claviger-tpm-1\0"[..], &session, sent_digest.as_ref()].concat();
        let nonce = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &credential), &message);
        let nonce = HEXLOWER.encode(nonce.as_ref());
        let quote = ["-Q", "-c", "ak.ctx", "-l", "sha256:0,2,4,7,9", "-q", &nonce, "-g", "sha256"];
        tpm.tool("tpm2_flushcontext", ["-t"]);
        tpm.tool("tpm2_quote", quote.into_iter().chain(["-m", "quote", "-s", "signature", "-f", "tss"]));
        tpm.tool("tpm2_pcrread", ["-Q", "sha256:0,2,4,7,9", "-o", "pcrs"]);
        let read = |name: &str| std::fs::read(tpm.file(name)).unwrap();
        let context = context::write(&[
            (Kind::Log, &std::fs::read(boot_log("ovmf-sb-uki")).unwrap()),
            (Kind::PcrValues, &read("pcrs")),
            (Kind::State, state),
            (Kind::Signature, &read("signature")),
            (Kind::Quote, &read("quote")),
        ]);
        let second = second_request(session, &wanted, ek.spki_der(), sent, &context);
        let body: Value = serde_json::from_slice(&post(&daemon, second).unwrap()).unwrap();
        let kinds: Vec<_> = body["Content"].as_array().unwrap().iter().map(|item| item["m_Item1"].clone()).collect();
        assert_eq!(kinds, [2, 1]);
        let der = BASE64.decode(body["Content"][1]["m_Item2"].as_str().unwrap().as_bytes()).unwrap();
        let certificate = Certificate::parse(&der).unwrap();
        assert_eq!((certificate.common_name(), certificate.organizational_unit()), (Some("tools"), Some("base")));
        assert_eq!(certificate.key(), identity.public());
    }
    wire::validate(&["AttestationRequest", "TpmReplyContinue", "HealthCertificateReply"]);
    assert!(daemon.stop().success());
}

#[test]
fn who_proves_something_else_gets_nothing() {
    let (daemon, lab) = serve(None);
    let daemon = &daemon;
    accept(&lab, "base", "ovmf-sb-uki", &[0, 4, 7]);
    let mut host = SoftwareHost::new("ovmf-sb-uki");
    let mut other = SoftwareHost::new("ovmf-sb-uki");
    is(host.begin(daemon), "UnauthorizedErrorReply", false);
    register(&lab, "one", host.tpm.endorsement_key().public());
    register(&lab, "two", other.tpm.endorsement_key().public());

    // Valid requests, once for each State; several may be open.
    let [first, second] = [(); 2].map(|()| host.begin(daemon).unwrap());
    let certificates = second.send(daemon).unwrap();
    assert_eq!(certificates[0].key(), host.identity.public());
    is(second.send(daemon), "RtpmErrorReply", true);
    first.send(daemon).unwrap();

    // Another session, identity key, endorsement key or attestation key.
    let mut changed = host.begin(daemon).unwrap();
    changed.session = [8; 16];
    is(changed.send(daemon), "RtpmErrorReply", true);
    let mut changed = host.begin(daemon).unwrap();
    changed.identity_key = other.identity.public().spki_der().to_vec();
    is(changed.send(daemon), "UnauthorizedErrorReply", false);
    // The same key in another encoding is a different value.
    changed.identity_key = host.identity.public().to_bcrypt_blob();
    is(changed.send(daemon), "UnauthorizedErrorReply", false);
    let mut changed = host.begin(daemon).unwrap();
    changed.endorsement_key = other.endorsement_key();
    is(changed.send(daemon), "RtpmErrorReply", true);
    let mut changed = host.begin(daemon).unwrap();
    changed.signature = other.tpm.sign(&changed.quote).unwrap();
    is(changed.send(daemon), "UnauthorizedErrorReply", false);
    let theirs = other.begin(daemon).unwrap();
    (changed.quote, changed.signature) = (theirs.quote.clone(), theirs.signature.clone());
    is(changed.send(daemon), "UnauthorizedErrorReply", false);
    // A State with the evidence of another State of the same host.
    let mut changed = host.begin(daemon).unwrap();
    changed.state = host.begin(daemon).unwrap().state;
    is(changed.send(daemon), "UnauthorizedErrorReply", false);

    // Invalid States.
    for state in [&b""[..], b"x", &[0; 4096]] {
        let mut changed = host.begin(daemon).unwrap();
        changed.state = state.to_vec();
        is(changed.send(daemon), "RtpmErrorReply", true);
    }
    let mut changed = host.begin(daemon).unwrap();
    changed.state = vec![0; 4097];
    is(changed.send(daemon), "RtpmErrorReply", false);

    // PCRs that were not requested, wrong values, another bank.
    host.tpm.pcrs.set(9, [9; 32]);
    is(host.begin(daemon).unwrap().send(daemon), "RtpmErrorReply", false);
    host.tpm.pcrs.remove(9);
    let mut changed = host.begin(daemon).unwrap();
    changed.pcr_values[5] ^= 1;
    is(changed.send(daemon), "RtpmErrorReply", false);
    let mut changed = host.begin(daemon).unwrap();
    let at = changed.quote.windows(6).position(|part| part == [0, 0, 0, 1, 0, 0x0b]).unwrap();
    changed.quote[at + 5] = 0x04;
    changed.signature = host.tpm.sign(&changed.quote).unwrap();
    is(changed.send(daemon), "RtpmErrorReply", false);

    // Logs: of another boot, truncated, extended, empty.
    let with_log = |host: &mut SoftwareHost, change: &dyn Fn(&mut Vec<u8>)| {
        let mut changed = host.begin(daemon).unwrap();
        change(&mut changed.log);
        changed.send(daemon)
    };
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let absurd: [Damage<'_>; 6] = [
        &|log| *log = std::fs::read(boot_log("ovmf-nosb")).unwrap(),
        &|log| log.truncate(log.len() - 1),
        &|log| log.push(0),
        &|log| log.truncate(100),
        &|log| *log = vec![0xff; 512 * 1024],
        &|log| {
            // The first event of PCR 7 claims that it extends nothing.
            let at = log.windows(8).position(|part| part == [7, 0, 0, 0, 1, 0, 0, 0x80]).unwrap();
            log[at + 4..at + 8].copy_from_slice(&[3, 0, 0, 0]);
        },
    ];
    for change in absurd {
        is(with_log(&mut host, change), "TcgLogValidationErrorReply", false);
    }
    is(with_log(&mut host, &|log| log.clear()), "RtpmErrorReply", false);
    // A changed event type proves nothing else.
    let relabelled = with_log(&mut host, &|log| {
        let at = log.windows(8).position(|part| part == [7, 0, 0, 0, 1, 0, 0, 0x80]).unwrap();
        log[at + 4..at + 8].copy_from_slice(&[4, 0, 0, 0]);
    });
    relabelled.unwrap();

    // Policies: all failed policies are reported, in their order.
    host.tpm.restart_count = 1;
    let error = is(host.begin(daemon).unwrap().send(daemon), "PolicyEvaluationErrorReply", false);
    assert_eq!(failed(&error), [Policy::FullBoot]);
    let mut insecure = SoftwareHost::new("ovmf-nosb");
    register(&lab, "three", insecure.tpm.endorsement_key().public());
    insecure.tpm.restart_count = 2;
    let error = is(insecure.begin(daemon).unwrap().send(daemon), "PolicyEvaluationErrorReply", false);
    assert_eq!(failed(&error), Policy::ALL);
    accept(&lab, "insecure", "ovmf-nosb", &[0, 4, 7]);
    insecure.tpm.restart_count = 0;
    let error = is(insecure.begin(daemon).unwrap().send(daemon), "PolicyEvaluationErrorReply", false);
    assert_eq!(failed(&error), [Policy::SecureBootEnabled]);

    // A host that is disabled between the two steps.
    host.tpm.restart_count = 0;
    let begun = host.begin(daemon).unwrap();
    Administrator(&lab).json(&["hosts", "disable", "one"]);
    is(begun.send(daemon), "UnauthorizedErrorReply", false);
    is(host.begin(daemon), "UnauthorizedErrorReply", false);
    Administrator(&lab).json(&["hosts", "enable", "one"]);
    begun.send(daemon).unwrap();
    let refusals = ["Unauthorized", "Rtpm", "TcgLogValidation", "PolicyEvaluation"];
    wire::validate(&refusals.map(|name| format!("{name}ErrorReply")).each_ref().map(String::as_str));
}

#[test]
fn contexts_of_another_form_are_refused() {
    let (daemon, lab) = serve(None);
    let daemon = &daemon;
    accept(&lab, "base", "ovmf-sb-uki", &[0, 4, 7]);
    let mut host = SoftwareHost::new("ovmf-sb-uki");
    register(&lab, "one", host.tpm.endorsement_key().public());
    let ak = host.tpm.ak_public().to_vec();
    let good = context::write(&[(Kind::AkPublic, &ak)]);
    host.first(daemon, &good).unwrap();
    let mut windows = good.clone();
    windows[4..8].copy_from_slice(&1_u32.to_le_bytes());
    let mut unknown = context::write(&[(Kind::AkPublic, &ak), (Kind::Quote, b"")]);
    let at = unknown.len() - 8;
    unknown[at] = 11;
    for wrong in [
        windows,
        unknown,
        Vec::new(),
        good[..good.len() - 1].to_vec(),
        context::write(&[]),
        context::write(&[(Kind::AkPublic, &ak), (Kind::AkPublic, &ak)]),
        context::write(&[(Kind::AkPublic, &ak), (Kind::Log, b"x")]),
        context::write(&[(Kind::AkPublic, &ak[1..])]),
        context::write(&[(Kind::AkPublic, b"")]),
        context::write(&[(Kind::AkPublic, &[0; 1025])]),
    ] {
        is(host.first(daemon, &wrong), "RtpmErrorReply", false);
    }
    let second = host.begin(daemon).unwrap();
    let context = second.context();
    let mut windows = context.clone();
    windows[4..8].copy_from_slice(&1_u32.to_le_bytes());
    is(second.send_context(daemon, &windows), "RtpmErrorReply", false);
    let mut with_ak = context::write(&[
        (Kind::State, &second.state),
        (Kind::AkPublic, &ak),
        (Kind::Quote, &second.quote),
        (Kind::Signature, &second.signature),
        (Kind::PcrValues, &second.pcr_values),
        (Kind::Log, &second.log),
    ]);
    is(second.send_context(daemon, &with_ak), "RtpmErrorReply", false);
    with_ak.truncate(0);
    is(second.send_context(daemon, &with_ak), "RtpmErrorReply", false);
    is(second.send_context(daemon, &context::write(&[(Kind::State, &second.state)])), "RtpmErrorReply", false);
    // None of these requests used up the State.
    second.send(daemon).unwrap();

    // Payload is checked before authorization, and authorization before the Context.
    let stranger = SoftwareHost::new("ovmf-sb-uki");
    is(stranger.first(daemon, b""), "UnauthorizedErrorReply", false);
    let request = |value: Value| post(daemon, serde_json::to_vec(&value).unwrap());
    is(request(json!({})), "PayloadErrorReply", false);
    // The other endpoints of this mode.
    let status = |path: &str, body: &str| {
        let reply = block(daemon.client().post(path, "application/json", body.to_owned())).unwrap();
        (reply.status.as_u16(), serde_json::from_slice::<Value>(&reply.body).unwrap())
    };
    let name = |reply: &Value| reply["__type"].as_str().unwrap().split(':').next().unwrap().to_owned();
    let (code, reply) = status("/Attestation/v1.0/attest", "{}");
    assert_eq!((code, name(&reply).as_str()), (400, "PayloadErrorReply"));
    wire::validate(&["PayloadErrorReply", "RtpmErrorReply", "TpmReplyContinue"]);
    for path in ["/Attestation/v2.0/hostkeyattest", "/Attestation/v1.0/domainattest"] {
        let (code, reply) = status(path, "{}");
        assert_eq!((code, name(&reply).as_str()), (409, "OperationModeErrorReply"));
        assert_eq!((&reply["Retryable"], &reply["ExpectedOperationMode"]), (&json!(true), &json!(1)));
    }
}

#[test]
fn hosts_of_one_mode_get_nothing_in_the_other() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let administrator = Administrator(&lab);
    // A daemon in host-key mode.
    let reply = block(daemon.client().post(TPM_ATTEST, "application/json", "{}")).unwrap();
    assert_eq!(reply.status, 409);
    let demo = lab.host(daemon.client());
    let health = claviger_tests::until_attested(&demo);
    use claviger_protocol::payload::ApiVersion::V2;
    block(demo.roll(V2, &health, &lab.protector())).unwrap();
    // A host key whose length is that of an endorsement key.
    let mut software = SoftwareHost::new("ovmf-sb-uki");
    let file = lab.file("software.pub.pem");
    std::fs::write(&file, software.tpm.endorsement_key().public().to_pem()).unwrap();
    administrator.json(&["hosts", "add", "software", "--public-key", file.to_str().unwrap()]);
    accept(&lab, "base", "ovmf-sb-uki", &[0, 4, 7]);

    lab.configure(|config| config.attest.mode = AttestMode::Tpm);
    daemon.process.hang_up();
    until("the other mode", || {
        let info = block(daemon.client().get("/Attestation/getinfo")).unwrap();
        (ServiceInfoReply::parse(&info.body).unwrap().operation_mode == OperationMode::Tpm as u8).then_some(())
    });
    // A certificate of host-key mode is no longer accepted, and a host key is not an endorsement key.
    let refused = block(demo.roll(V2, &health, &lab.protector())).err().unwrap().to_string();
    assert!(refused.contains("HealthCertificateException"), "{refused}");
    is(software.begin(&daemon), "UnauthorizedErrorReply", false);
    let again = administrator.fault(&["hosts", "add", "tpm", "--ek-public", file.to_str().unwrap(), "--trust-ek"]);
    assert!(again.contains("registered already, as host \"software\""), "{again}");
    administrator.json(&["hosts", "remove", "software"]);
    administrator.json(&["hosts", "add", "software", "--ek-public", file.to_str().unwrap(), "--trust-ek"]);
    software.begin(&daemon).unwrap().send(&daemon).unwrap();

    lab.configure(|config| config.attest.mode = AttestMode::HostKey);
    daemon.process.hang_up();
    until("the first mode", || block(demo.roll(V2, &health, &lab.protector())).ok());
    assert!(daemon.stop().success());
}

#[test]
fn an_endorsement_key_needs_a_maker_or_an_administrator_who_vouches_for_it() {
    let tpm = Swtpm::start(true);
    let (daemon, lab) = serve(None);
    let administrator = Administrator(&lab);
    let ek = tpm.file("ek.pem");
    let mut command = Command::new(claviger());
    granted(&command.args(["host", "ek", "--tpm"]).arg(tpm.socket()).arg("--out").arg(&ek).output().unwrap());
    let add = |file: &Path| administrator.fault(&["hosts", "add", "node", "--ek-certificate", file.to_str().unwrap()]);
    let text = add(&ek);
    assert!(text.contains("attest.vendor_roots names no folder"), "{text}");
    let reload = |roots: &Path| {
        lab.configure(|config| config.attest.vendor_roots = Some(roots.to_owned()));
        daemon.process.hang_up();
    };
    // The roots of another maker.
    let other = Swtpm::start(true);
    reload(&other.roots());
    until("other roots", || add(&ek).contains("vouches for this endorsement key").then_some(()));
    // A certificate of the same root for another purpose.
    let made = tool(
        "openssl",
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null", "-out"])
            .arg(lab.file("no-ek.pem")),
    );
    assert!(made.status.success(), "{}", said(&made));
    let text = add(&lab.file("no-ek.pem"));
    assert!(text.contains("lacks the extended key usage 2.23.133.8.1"), "{text}");
    // With an explicit option a key without a certificate is accepted; an impossible key is refused.
    let long = lab.file("long.pem");
    std::fs::write(&long, RsaPrivateKey::generate(3072).unwrap().public().to_pem()).unwrap();
    let bare =
        |file: &Path| ["hosts", "add", "node", "--trust-ek", "--ek-public", file.to_str().unwrap()].map(String::from);
    let run = |arguments: [String; 6]| administrator.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let text = said(&run(bare(&long)));
    assert!(text.contains("2048 bits"), "{text}");
    let output = administrator.run(&["hosts", "add", "node", "--ek-public", ek.to_str().unwrap()]);
    assert!(!output.status.success() && said(&output).contains("--trust-ek"), "{}", said(&output));
    reload(&tpm.roots());
    until("its own roots", || {
        let added = administrator.run(&["hosts", "add", "node", "--ek-certificate", ek.to_str().unwrap()]);
        added.status.success().then_some(())
    });
    assert!(daemon.stop().success());
}

#[test]
fn what_cannot_be_a_baseline_is_refused() {
    let (daemon, lab) = serve(None);
    let administrator = Administrator(&lab);
    let zero = "0".repeat(64);
    let value = |pcr: usize| format!("{pcr}={zero}");
    let add = |values: &[String]| {
        let mut arguments = vec!["baselines", "add", "b"];
        values.iter().for_each(|value| arguments.extend(["--pcr", value]));
        administrator.run(&arguments)
    };
    let says = |output: &Output, why: &str| {
        assert!(!output.status.success() && said(output).contains(why), "{}", said(output));
    };
    says(&add(&[value(0), value(4)]), "PCR 7 is missing");
    says(&add(&[value(0), value(4), value(24)]), "a PCR of 0 to 23");
    says(&add(&[value(0), value(4), "7=00".to_owned()]), "not 64 hexadecimal digits");
    says(&add(&[value(0), value(0), value(7)]), "given twice");
    granted(&add(&[value(0), value(4), value(7)]));
    says(&add(&[value(0), value(4), value(7)]), "there already");
    let text = said(&administrator.run(&["baselines", "list"]));
    assert!(text.contains("0 4 7"), "{text}");
    says(&administrator.run(&["baselines", "enable", "c"]), "there is no baseline");
    says(&administrator.run(&["baselines", "capture", "c", "--host", "nobody"]), "no host");
    // The log and the values need not match, but the log must be valid.
    let bad = lab.file("bad.log");
    std::fs::write(&bad, "no log").unwrap();
    let output = administrator.run(&[
        "baselines",
        "add",
        "d",
        "--pcr",
        &value(0),
        "--pcr",
        &value(4),
        "--pcr",
        &value(7),
        "--log",
        bad.to_str().unwrap(),
    ]);
    says(&output, "the log cannot be read");
    assert!(Log::parse(&std::fs::read(boot_log("ovmf-nosb")).unwrap()).is_ok());
    assert!(daemon.stop().success());
}
