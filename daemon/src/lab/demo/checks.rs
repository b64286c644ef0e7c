//! Checks the results of the demonstration and prints them with times.

use std::sync::Arc;
use std::time::Instant;

use claviger_client::host::{Host, HostError};
use claviger_protocol::owner::Owner;
use claviger_protocol::payload::ApiVersion;

use crate::sys::print::say;

/// Counts passed and failed checks.
#[derive(Default)]
pub(super) struct Checks {
    pub(super) passed: usize,
    pub(super) failed: usize,
}

impl Checks {
    pub(super) fn check(&mut self, right: bool, what: &str, begun: Instant) {
        if right {
            self.passed += 1;
            say!("{what}{}", took(begun));
        } else {
            self.failed += 1;
            say!("{what}: WRONG{}", took(begun));
        }
    }

    /// Checks that a step was refused with the expected error.
    pub(super) fn refused<T>(&mut self, result: Result<T, HostError>, expected: &str, what: &str, begun: Instant) {
        let said = match &result {
            Ok(_) => "granted".to_owned(),
            Err(HostError::Attestation { status, reply, .. }) => format!("{status} {}", reply.name),
            Err(HostError::Release { status, refusal }) => format!("{status} {}", refusal.code.as_str()),
            Err(other) => other.to_string(),
        };
        self.check(said == expected, &format!("refuse     {what}: {said}"), begun);
    }
}

/// Starts a virtual machine, and starts it again with the new protector.
pub(super) async fn release(
    checks: &mut Checks,
    host: &Host,
    health: &[u8],
    owner: &Arc<Owner>,
    name: &str,
    protector: &[u8],
) {
    let mut protector = protector.to_vec();
    for (api, step) in [(ApiVersion::V2, "release    "), (ApiVersion::V1, "next start ")] {
        let begun = Instant::now();
        let result = host.roll(api, health, &protector).await;
        let answered = begun.elapsed();
        let at = Instant::now().checked_sub(answered).unwrap_or(begun);
        let unwrapped = match result {
            Ok(unwrapped) => unwrapped,
            Err(error) => return checks.check(false, &format!("{step}{name}: {error}"), at),
        };
        // The owner can check that both keys belong to its protectors.
        let opener = owner.clone();
        let (ingress, egress) = (protector, unwrapped.egress_protector.clone());
        let opened = tokio::task::spawn_blocking(move || (opener.open(&ingress), opener.open(&egress))).await;
        let right = match opened {
            Ok((Ok(ingress), Ok(egress))) => *ingress == *unwrapped.keys.ingress && *egress == *unwrapped.keys.egress,
            _ => false,
        };
        let text = format!(
            "{step}{name}: both keys are the owner's [{}, {:.1} ms]",
            api.as_str(),
            answered.as_secs_f64() * 1e3
        );
        checks.check(right, &text, begun);
        protector = unwrapped.egress_protector;
    }
}

pub(super) fn took(begun: Instant) -> String {
    format!("  ({:.1} ms)", begun.elapsed().as_secs_f64() * 1e3)
}
