//! Tests of `claviger demo` and of the lab that it creates.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Lab, METADATA, Options, claviger, metadata, run, said};

/// Runs `claviger demo --exit` in this lab's directory.
fn demo(lab: &Lab, options: Options) -> Output {
    lab.demo(options).arg("--exit").output().unwrap()
}

#[test]
fn a_lab_is_made_and_used_again_and_what_is_wrong_in_it_is_found() {
    let lab = Lab::folder();
    let options = Options { hsms: 2, vms: 2, ..Options::default() };
    let first = demo(&lab, options);
    let text = said(&first);
    assert!(first.status.success(), "{text}");
    for expected in [
        "made in",
        "2 soft tokens",
        "listening on http://127.0.0.1:",
        "metrics on http://127.0.0.1:",
        "tenant     2 protectors",
        "attest     demo-host proved its key",
        "release    vm-0001: both keys are the owner's [v2.0",
        "next start vm-0001: both keys are the owner's [v1.0",
        "release    vm-0002: both keys are the owner's",
        "refuse     a host that is not registered: 403 UnauthorizedErrorReply",
        "refuse     vm-0001's protector with one bit changed: 400 InvalidProtectorException",
        "all 7 checks passed",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let protector = lab.protector();
    // Run again with more machines: the same lab gets more protectors.
    let second = demo(&lab, Options { vms: 3, ..options });
    let text = said(&second);
    assert!(second.status.success(), "{text}");
    assert!(
        text.contains("found in") && text.contains("2 soft tokens") && text.contains("all 9 checks passed"),
        "{text}"
    );
    assert_eq!(lab.protector(), protector);

    // A changed character in a signature: the check of that machine fails, and the others continue.
    let file = lab.file("tenant/vm-0002.protector.xml");
    let mut octets = std::fs::read(&file).unwrap();
    let tag = b"<SignatureValue>";
    let at = octets.windows(tag.len()).rposition(|w| w == tag).unwrap() + tag.len() + 10;
    octets[at] = if octets[at] == b'A' { b'B' } else { b'A' };
    std::fs::write(&file, octets).unwrap();
    let third = demo(&lab, Options { vms: 3, ..options });
    let text = said(&third);
    assert!(!third.status.success(), "{text}");
    assert!(text.contains("vm-0002: release refused with 400 InvalidProtectorException"), "{text}");
    assert!(text.contains("WRONG") && text.contains("1 of 8 checks FAILED"), "{text}");
    assert!(text.contains("release    vm-0003: both keys are the owner's"), "{text}");
}

#[test]
fn in_tpm_mode_a_boot_is_accepted_and_another_one_is_refused() {
    let lab = Lab::folder();
    let played =
        || lab.demo(Options { vms: 1, ..Options::default() }).args(["--attest", "tpm", "--exit"]).output().unwrap();
    // A lab that was used before is used again.
    for _ in 0..2 {
        let output = played();
        let text = said(&output);
        assert!(output.status.success(), "{text}");
        for expected in [
            "boot       tpm-host has a TPM in software",
            "refuse     a host that is not registered: 403 UnauthorizedErrorReply",
            "register   tpm-host by its endorsement key",
            "refuse     a boot that nobody accepted: 403 PolicyEvaluationErrorReply",
            "accept     that boot as baseline demo",
            "attest     tpm-host proved its boot and holds a health certificate",
            "release    vm-0001: both keys are the owner's [v2.0",
            "refuse     vm-0001, while baseline demo is disabled: 403 HealthCertificateException",
            "refuse     the same host after another kernel was measured: 403 PolicyEvaluationErrorReply",
            "differs    PCR 4 + EV_IPL kernel 1.0-rootkit",
            "all 10 checks passed",
        ] {
            assert!(text.contains(expected), "no {expected:?} in\n{text}");
        }
    }
}

#[tokio::test]
async fn one_token_and_one_machine_are_served_and_served_again() {
    let (daemon, lab) = Lab::start(Options { hsms: 1, vms: 1, ..Options::default() });
    let before = metadata(&daemon.client()).await;
    // No other daemon can use the state meanwhile.
    let other = run(["serve".as_ref(), "--config".as_ref(), lab.config_file().as_os_str()]);
    let text = said(&other);
    assert!(!other.status.success(), "{text}");
    assert!(text.contains("another claviger runs here") && text.contains("stop it first"), "{text}");
    assert_eq!(daemon.client().get(METADATA).await.unwrap().status, 200);
    assert!(daemon.stop().success());

    let daemon = lab.serve();
    let after = metadata(&daemon.client()).await;
    assert_eq!(after.guardian.signing_certificate, before.guardian.signing_certificate);
    assert_eq!(after.guardian.encryption_certificate, before.guardian.encryption_certificate);
    assert_eq!(after.communications_certificate.der(), before.communications_certificate.der());
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    let released = host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    let owner = lab.owner();
    assert!(*owner.open(&lab.protector()).unwrap() == *released.keys.ingress);
    assert!(*owner.open(&released.egress_protector).unwrap() == *released.keys.egress);
    assert!(daemon.stop().success());
}

#[test]
fn what_stands_in_the_way_is_said() {
    // A directory with other contents stays unchanged.
    let lab = Lab::folder();
    std::fs::write(lab.file("precious"), "x").unwrap();
    let refused = demo(&lab, Options::default());
    let text = said(&refused);
    assert!(
        !refused.status.success() && text.contains("is not empty and holds no lab; choose another --dir"),
        "{text}"
    );
    assert_eq!(std::fs::read_dir(lab.path()).unwrap().count(), 1);

    // A lab whose module is missing.
    let lab = Lab::make(Options::default());
    lab.configure(|config| config.hsm[0].module = lab.file("no-such-module.so"));
    let refused = run(["serve".as_ref(), "--config".as_ref(), lab.config_file().as_os_str()]);
    let text = said(&refused);
    assert!(!refused.status.success() && text.contains("no-such-module.so"), "{text}");

    // Options out of range, and a missing configuration.
    for arguments in [&["demo", "--hsms", "0"][..], &["demo", "--vms", "0"]] {
        let output = Command::new(claviger()).args(arguments).current_dir(lab.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
    let output = run(["serve", "--config", "/nowhere/claviger.toml"]);
    let text = said(&output);
    assert!(!output.status.success() && text.contains("/nowhere/claviger.toml"), "{text}");
}

/// A lab's configuration names a library that is loaded, so other users must not be able to change it.
#[test]
fn a_folder_that_others_may_write_is_refused() {
    let lab = Lab::make(Options::default());
    let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let refused = |expected: &str| {
        let output = demo(&lab, Options::default());
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected) && text.contains("choose a --dir"), "{expected:?} in {text}");
    };
    for (path, mode) in [(lab.path().to_owned(), 0o700), (lab.config_file(), 0o600)] {
        for open in [0o1777, 0o707, 0o770] {
            chmod(&path, open);
            refused("can be changed by others");
        }
        chmod(&path, mode);
    }
    let parent = tempfile::tempdir().unwrap();
    chmod(parent.path(), 0o777);
    let inside = parent.path().join("lab");
    let output = run(["demo".as_ref(), "--exit".as_ref(), "--dir".as_ref(), inside.as_os_str()]);
    assert!(said(&output).contains("can be changed by others") && !inside.exists(), "{}", said(&output));

    // A directory of another user, or a file of another user in ours; only root can create either.
    if rustix::process::geteuid().is_root() {
        for path in [lab.path().to_owned(), lab.config_file(), lab.file("tokens")] {
            std::os::unix::fs::chown(&path, Some(54321), None).unwrap();
            refused("belongs to the user with id 54321");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
    }
    let output = demo(&lab, Options::default());
    assert!(output.status.success(), "{}", said(&output));
}

/// Simulates a machine without SoftHSM2: a mount namespace hides the usual paths. If this user may not create one, the case
/// is skipped.
#[test]
fn a_missing_softhsm_is_said() {
    let usual = ["/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib/aarch64-linux-gnu/softhsm"];
    let may = Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|output| output.status.success());
    if !may {
        return;
    }
    let lab = Lab::folder();
    let hide: String = usual.iter().map(|p| format!("[ ! -d {p} ] || mount -t tmpfs none {p} || exit 99; ")).collect();
    let script = format!("{hide} exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(claviger()).args(["demo", "--exit", "--dir"]).arg(lab.path());
    let output = command.env_remove("CLAVIGER_SOFTHSM2").output().unwrap();
    let text = said(&output);
    if output.status.code() == Some(99) {
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("SoftHSM2 was not found") && text.contains("apt-get install softhsm2"), "{text}");
}
