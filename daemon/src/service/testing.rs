//! A service for unit tests and benches.

use std::path::Path;
use std::sync::Arc;
#[cfg(test)]
use std::sync::OnceLock;
use std::time::Duration;

use claviger_hsm::{CallTimeouts, Cluster, MemberConfig, Pin, TokenRef, WorkerProgram};
#[cfg(test)]
use claviger_protocol::rsa_key::RsaPrivateKey;
#[cfg(test)]
use serde_json::Value;

use super::Service;
use crate::config::{Config, Hsm, PinSource, TokenName};
#[cfg(test)]
use crate::observe::audit;

/// The key of all unit tests, because generating one is slow.
#[cfg(test)]
pub(crate) fn key() -> &'static RsaPrivateKey {
    static KEY: OnceLock<RsaPrivateKey> = OnceLock::new();
    KEY.get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
}

/// A certificate of that key (DER); each call returns a different one.
#[cfg(test)]
pub(crate) fn certificate() -> Vec<u8> {
    let template = claviger_protocol::health::signer_template(key().public(), 1, 2).unwrap();
    template.to_be_signed().unwrap().sign_with(key()).unwrap()
}

/// A service with its own folder and the default settings.
#[cfg(test)]
pub(crate) fn service() -> (tempfile::TempDir, Arc<Service>) {
    let folder = tempfile::tempdir().unwrap();
    let service = service_in(folder.path(), |_| {});
    (folder, service)
}

/// A service whose only member, `gone`, is never started, so it has no HSM.
pub(crate) fn service_in(folder: &Path, configure: impl FnOnce(&mut Config)) -> Arc<Service> {
    let mut config = Config::default();
    config.server.state = folder.join("state");
    configure(&mut config);
    let module = crate::lab::softhsm().unwrap();
    let member = MemberConfig {
        name: "gone".to_owned(),
        module: module.clone(),
        token: TokenRef::Label("gone".to_owned()),
        pin: Pin::new("1234".to_owned()),
        env: config.env.clone(),
        priority: 0,
        weight: 1,
        sessions: 1,
        queue: 1,
    };
    config.hsm.push(Hsm {
        name: member.name.clone(),
        module,
        token: TokenName::Label("gone".to_owned()),
        pin: PinSource::Env("NO_PIN".to_owned()),
        priority: 0,
        weight: 1,
        sessions: 1,
        env: member.env.clone(),
    });
    let timeouts = CallTimeouts { watchdog: Duration::from_secs(1) };
    let cluster = Cluster::new(vec![member], timeouts, WorkerProgram::this_executable(), Arc::new(|_, _| {})).unwrap();
    Arc::new(Service::open(config, cluster).unwrap())
}

/// The lines of its audit trail, without the trail's own lines.
#[cfg(test)]
pub(crate) fn trail(service: &Service) -> Vec<Value> {
    let text = std::fs::read_to_string(service.config.load().server.audit_file()).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| ![audit::TRAIL_EVENT, audit::checkpoint::EVENT].map(Value::from).contains(&line["event"]))
        .collect()
}
