//! `claviger demo`: runs a lab, then plays the steps of a tenant and a guarded host, and prints the checks with their
//! times.

mod checks;
mod tpm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_client::host::Host;
use claviger_client::http::Client;
use claviger_hsm::Cluster;
use claviger_protocol::error::Code;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::rsa_key::RsaPrivateKey;

use self::checks::{Checks, release, took};
use crate::config::AttestMode;
use crate::lab::{HOST_NAME, Lab};
use crate::run::daemon::Daemon;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// Time limit for the daemon to get ready; it has to generate the attestation signer's key.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Path of a service's metadata document.
pub(crate) const METADATA: &str = "/KeyProtection/service/metadata/2014-07/metadata.xml";

/// Runs the lab and plays the demonstration. Returns the running daemon, and whether all checks passed.
///
/// # Errors
/// The lab cannot be run, or a step could not be played.
pub async fn run(lab: &Lab, cluster: Cluster, vms: usize, begun: Instant) -> Result<(Daemon, bool), Failure> {
    lab.fill(&cluster).await?;
    let members = lab.config.hsm.len();
    let made = if lab.is_fresh() { "made" } else { "found" };
    say!(
        "lab        {made} in {}: {members} soft tokens, all holding the same keys{}",
        lab.dir().display(),
        took(begun)
    );
    let daemon = Daemon::start(lab.config.clone(), cluster).await?;
    say!("listening on {}", daemon.url());
    say!("metrics on http://{}", daemon.metrics_address);
    match play(lab, &daemon, vms).await {
        Ok(passed) => Ok((daemon, passed)),
        Err(failure) => {
            daemon.stop().await;
            Err(failure)
        }
    }
}

async fn play(lab: &Lab, daemon: &Daemon, vms: usize) -> Result<bool, Failure> {
    let url = daemon.url();
    let client = Client::new(&url)?;
    wait_until_ready(daemon).await?;
    say!("");

    // Steps of the tenant.
    let begun = Instant::now();
    let metadata = Metadata::parse(&client.get(METADATA).await?.body)?;
    let owner = Arc::new(lab.owner()?);
    let protectors = lab.protectors(vms, &owner, &metadata)?;
    say!("tenant     {vms} protectors for this guardian in {}/tenant{}", lab.dir().display(), took(begun));

    // Steps of the host.
    let mut checks = Checks::default();
    match lab.config.attest.mode {
        AttestMode::HostKey => play_host_key(&mut checks, lab, &url, client, &owner, &protectors).await?,
        AttestMode::Tpm => tpm::play(&mut checks, lab, daemon, &owner, &protectors).await?,
    }
    say!("");
    let Checks { passed, failed } = checks;
    if failed == 0 {
        say!("all {passed} checks passed");
    } else {
        say!("{failed} of {} checks FAILED", passed + failed);
    }
    Ok(failed == 0)
}

/// The lab's host attests with its key and starts its machines; other hosts are refused.
async fn play_host_key(
    checks: &mut Checks,
    lab: &Lab,
    url: &str,
    client: Client,
    owner: &Arc<Owner>,
    protectors: &[(String, Vec<u8>)],
) -> Result<(), Failure> {
    let keys = lab.host_keys()?;
    let host = Host::new(client, keys.host, keys.identity.clone());
    let begun = Instant::now();
    let health = host.attest().await?;
    checks.check(true, &format!("attest     {HOST_NAME} proved its key and holds a health certificate"), begun);
    for (name, protector) in protectors {
        release(checks, &host, &health, owner, name, protector).await;
    }

    // Requests that must be refused.
    let stranger = tokio::task::spawn_blocking(|| RsaPrivateKey::generate(2048)).await??;
    let unregistered = Host::new(Client::new(url)?, stranger, keys.identity);
    let begun = Instant::now();
    let refused = unregistered.attest().await;
    checks.refused(refused, "403 UnauthorizedErrorReply", "a host that is not registered", begun);
    if let Some((name, protector)) = protectors.first() {
        let begun = Instant::now();
        let expected = format!("400 {}", Code::InvalidProtector.as_str());
        let refused = host.roll(ApiVersion::V2, &health, &tampered(protector)).await;
        checks.refused(refused, &expected, &format!("{name}'s protector with one bit changed"), begun);
    }
    Ok(())
}

/// A protector with one changed bit in its first certificate.
fn tampered(protector: &[u8]) -> Vec<u8> {
    let mut copy = protector.to_vec();
    let tag = b"<SigningCertificate>";
    let at = copy.windows(tag.len()).position(|w| w == tag).map_or(0, |at| at + tag.len() + 40);
    if let Some(octet) = copy.get_mut(at) {
        *octet = if *octet == b'A' { b'B' } else { b'A' };
    }
    copy
}

async fn wait_until_ready(daemon: &Daemon) -> Result<(), Failure> {
    let client = Client::new(&format!("http://{}", daemon.metrics_address))?;
    let begun = Instant::now();
    loop {
        let reply = client.get("/ready").await?;
        let signer = daemon.service.registry.signers().current().is_some();
        if reply.status == 200 && signer {
            return Ok(());
        }
        if begun.elapsed() > READY_WITHIN {
            return Err(format!("the daemon is not ready: {}", String::from_utf8_lossy(&reply.body).trim()).into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
