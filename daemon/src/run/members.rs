//! The members of the cluster, as the configuration describes them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use claviger_hsm::{CallTimeouts, Cluster, HsmError, MemberConfig, Pin, TokenRef, WorkerProgram};

use crate::admission;
use crate::config::{Config, Hsm, PinError, TokenName};
use crate::observe::metrics;

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A PIN cannot be read.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The members cannot form a cluster.
    #[error("the HSMs: {0}")]
    Hsm(#[from] HsmError),
    /// No configured module exists.
    #[error("the module {} of the HSM {hsm} does not exist, nor does that of any other HSM; install the vendor's package, or correct `module`", module.display())]
    NoModule {
        /// The first member.
        hsm: String,
        /// Its library.
        module: PathBuf,
    },
}

/// The cluster of the configured members, of which none has been started.
///
/// A member whose module is missing is tried again later, like a token that is away; but when all are missing the configuration is
/// wrong, or the vendor's package is not installed.
///
/// # Errors
/// A PIN that cannot be read, unfit names, no module at all.
pub fn load_cluster(config: &Config, mut worker: WorkerProgram) -> Result<Cluster, ClusterError> {
    // One vendor's library has no business with another one's PIN.
    worker.hidden.extend(config.hsm.iter().filter_map(|hsm| hsm.pin.variable().map(str::to_owned)));
    if let Some(first) = config.hsm.first()
        && !config.hsm.iter().any(|hsm| hsm.module.exists())
    {
        return Err(ClusterError::NoModule { hsm: first.name.clone(), module: first.module.clone() });
    }
    // Before the first call to a token, which is to be counted.
    metrics::install();
    let queue = member_queue(config);
    let members = config.hsm.iter().map(|hsm| member(&config.env, hsm, queue)).collect::<Result<_, _>>()?;
    let timeouts = CallTimeouts { watchdog: config.release.watchdog() };
    Ok(Cluster::new(members, timeouts, worker, Arc::new(metrics::hsm))?)
}

/// How many calls may wait at one member.
///
/// The waiting room is in front of the releases; what runs must always find a place, on any one member, and so must what else
/// there is to sign.
#[must_use]
pub fn member_queue(config: &Config) -> usize {
    4 * admission::concurrency(config, config.hsm.iter().map(|hsm| hsm.sessions).sum()) + 256
}

/// A member as the configuration describes it, with its PIN.
///
/// # Errors
/// A PIN that cannot be read.
pub fn member(env: &BTreeMap<String, String>, hsm: &Hsm, queue: usize) -> Result<MemberConfig, PinError> {
    Ok(MemberConfig {
        name: hsm.name.clone(),
        module: hsm.module.clone(),
        token: match &hsm.token {
            TokenName::Serial(serial) => TokenRef::Serial(serial.clone()),
            TokenName::Label(label) => TokenRef::Label(label.clone()),
        },
        pin: Pin::new(hsm.read_pin()?.to_string()),
        env: env.iter().chain(&hsm.env).map(|(name, value)| (name.clone(), value.clone())).collect(),
        priority: hsm.priority,
        weight: hsm.weight,
        sessions: hsm.sessions,
        queue,
    })
}
