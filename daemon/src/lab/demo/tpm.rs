//! The demonstration in TPM mode: a software TPM boots, its baseline is accepted, and another boot is refused.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_client::host::{Host, HostError, Proof};
use claviger_client::http::Client;
use claviger_client::tpm::{self, TpmPlace};
use claviger_protocol::owner::Owner;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::tpm::log::{Log, LogWriter, short_boot};
use data_encoding::BASE64;
use serde_json::{Value, json};

use super::checks::{Checks, release};
use crate::admin::handlers;
use crate::lab::Lab;
use crate::observe::audit::Peer;
use crate::run::daemon::Daemon;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// Name of the host with this TPM.
const NAME: &str = "tpm-host";
/// Name of the accepted baseline.
const BASELINE: &str = "demo";
/// Time limit for the start of the TPM.
const STARTS_WITHIN: Duration = Duration::from_secs(10);

/// A swtpm process, which ends when the value is dropped.
struct Swtpm(Child);

impl Swtpm {
    /// Starts swtpm with its files in `folder`. Its PCRs are those of a machine that was just switched on.
    fn start(folder: &Path) -> Result<(Self, TpmPlace), Failure> {
        std::fs::create_dir_all(folder)?;
        let place = TpmPlace { device: folder.join("socket"), log: folder.join("event-log") };
        let _ = std::fs::remove_file(&place.device);
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"]);
        command.arg(format!("dir={}", folder.display()));
        command.args(["--server", &format!("type=unixio,path={}", place.device.display())]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| {
            format!("swtpm cannot be started: {error}; it is a TPM in software, in Debian the package swtpm")
        })?;
        let started = Self(child);
        let begun = Instant::now();
        // The file exists a moment before swtpm listens.
        while UnixStream::connect(&place.device).is_err() {
            if begun.elapsed() > STARTS_WITHIN {
                return Err("swtpm does not start".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok((started, place))
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Plays the demonstration.
pub(super) async fn play(
    checks: &mut Checks,
    lab: &Lab,
    daemon: &Daemon,
    owner: &Arc<Owner>,
    protectors: &[(String, Vec<u8>)],
) -> Result<(), Failure> {
    let begun = Instant::now();
    let log = short_boot("firmware 1.0", "kernel 1.0");
    let folder = lab.dir().join("tpm");
    let (booted, measured) = (log.clone(), folder.clone());
    let (swtpm, place) = tokio::task::spawn_blocking(move || {
        let (swtpm, place) = Swtpm::start(&measured)?;
        std::fs::write(&place.log, &booted)?;
        tpm::measure(&place, &Log::parse(&booted)?)?;
        Ok::<_, Failure>((swtpm, place))
    })
    .await??;
    let of = place.clone();
    let endorsement = tokio::task::spawn_blocking(move || tpm::endorsement(&of)).await??;
    checks.check(
        true,
        &format!("boot       {NAME} has a TPM in software, which measured firmware 1.0 and kernel 1.0"),
        begun,
    );

    // An earlier run may have registered the host.
    let _ = administer(daemon, json!({"command": "hosts.remove", "name": NAME})).await;
    let _ = administer(daemon, json!({"command": "baselines.remove", "name": BASELINE})).await;
    let identity = Arc::new(tokio::task::spawn_blocking(|| RsaPrivateKey::generate(2048)).await??);
    let host = Host::new(Client::new(&daemon.url())?, Proof::Tpm(place.clone()), identity);
    let begun = Instant::now();
    checks.refused(host.attest().await, "403 UnauthorizedErrorReply", "a host that is not registered", begun);
    let key = BASE64.encode(endorsement.key.spki_der());
    let begun = Instant::now();
    administer(daemon, json!({"command": "hosts.add-tpm", "name": NAME, "public_key": key})).await?;
    checks.check(true, &format!("register   {NAME} by its endorsement key"), begun);
    let begun = Instant::now();
    let unknown = "403 PolicyEvaluationErrorReply";
    checks.refused(host.attest().await, unknown, "a boot that nobody accepted", begun);
    let begun = Instant::now();
    administer(daemon, json!({"command": "baselines.capture", "name": BASELINE, "host": NAME})).await?;
    checks.check(true, &format!("accept     that boot as baseline {BASELINE}"), begun);
    let begun = Instant::now();
    let health = host.attest().await?;
    checks.check(true, &format!("attest     {NAME} proved its boot and holds a health certificate"), begun);
    for (name, protector) in protectors {
        release(checks, &host, &health, owner, name, protector).await;
    }

    let Some((name, protector)) = protectors.first() else { return Ok(()) };
    let enable = |enabled: bool| json!({"command": "baselines.enable", "name": BASELINE, "enabled": enabled});
    administer(daemon, enable(false)).await?;
    let begun = Instant::now();
    let withdrawn = host.roll(ApiVersion::V2, &health, protector).await;
    let expected = "403 HealthCertificateException";
    checks.refused(withdrawn, expected, &format!("{name}, while baseline {BASELINE} is disabled"), begun);
    administer(daemon, enable(true)).await?;

    // The same machine with a changed boot.
    let begun = Instant::now();
    tokio::task::spawn_blocking(move || {
        let of_kernel = short_boot("firmware 1.0", "kernel 1.0-rootkit");
        let new = Log::parse(&of_kernel)?.events().last().map(|event| (event.pcr, event.kind, event.data.to_vec()));
        let (pcr, kind, data) = new.ok_or("a log without events")?;
        let only_new = LogWriter::new().measured(pcr, kind, &data).finish();
        tpm::measure(&place, &Log::parse(&only_new)?)?;
        let header = LogWriter::new().finish().len();
        std::fs::write(&place.log, [&log, &only_new[header..]].concat())?;
        Ok::<_, Failure>(())
    })
    .await??;
    let changed: Result<Vec<u8>, HostError> = host.attest().await;
    checks.refused(changed, unknown, "the same host after another kernel was measured", begun);
    drop(swtpm);
    let checked = administer(daemon, json!({"command": "hosts.check", "name": NAME})).await?;
    for event in checked["baselines"][0]["differs"][0]["events"].as_array().into_iter().flatten() {
        let (pcr, text) = (&event["pcr"], event["event"].as_str().unwrap_or_default());
        say!("differs    PCR {pcr} {} {text}", if event["is_new"] == true { "+" } else { "-" });
    }
    Ok(())
}

/// Sends an administrator's command.
async fn administer(daemon: &Daemon, command: Value) -> Result<Value, Failure> {
    let uid = rustix::process::geteuid().as_raw();
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    Ok(handlers::handle(daemon.service.clone(), command, Peer { uid, pid: Some(pid) }).await?)
}
