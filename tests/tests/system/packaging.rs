//! What is packaged for containers: objects of Kubernetes by its own schemas, and a configuration that the daemon accepts.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger::config::Config;
use claviger_tests::{said, tool};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Checks a folder of objects.
fn check(folder: &Path) -> Output {
    let mut command = Command::new("python3");
    tool("python3-yaml, python3-jsonschema", command.arg(root().join("tests/interop/kubernetes.py")).arg(folder))
}

#[test]
fn the_objects_of_kubernetes_are_valid_and_fit_together() {
    let folder = root().join("daemon/packaging/kubernetes");
    let checked = check(&folder);
    assert!(checked.status.success(), "{}", said(&checked));
    for object in ["StatefulSet claviger", "StatefulSet etcd", "PodDisruptionBudget claviger", "NetworkPolicy etcd"] {
        assert!(said(&checked).contains(object), "{object}: {}", said(&checked));
    }
    // The check finds a misspelt field, and a reference to nothing.
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let file = copy.path().join("claviger.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    for (from, to, expected) in [
        ("maxUnavailable:", "maxUnavailible:", "maxUnavailible"),
        ("serviceName: claviger-nodes", "serviceName: claviger-node", "there is no service claviger-node"),
        ("targetPort: metrics", "targetPort: metric", "no pod has the port metric"),
    ] {
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        let checked = check(copy.path());
        assert!(
            checked.status.code() == Some(1) && said(&checked).contains(expected),
            "{expected}: {}",
            said(&checked)
        );
    }
}

#[test]
fn the_configuration_for_kubernetes_is_one_that_the_daemon_takes() {
    let config = Config::load(&root().join("daemon/packaging/kubernetes/claviger.toml")).unwrap();
    let etcd = config.etcd.unwrap();
    assert_eq!(etcd.endpoints.len(), 3);
    // Every file of the configuration is in a folder that the pod mounts.
    let pod = std::fs::read_to_string(root().join("daemon/packaging/kubernetes/claviger.yaml")).unwrap();
    let tls = config.server.tls.unwrap();
    let pins = config.hsm.iter().filter_map(|hsm| hsm.pin.file());
    let files = etcd.secret_files().into_iter().chain(etcd.public_files()).map(PathBuf::as_path);
    for file in files.chain(pins).chain([&*tls.certificate, &*tls.key, &*config.server.state]) {
        let folder = file.parent().unwrap().display().to_string();
        assert!(pod.contains(&format!("mountPath: {folder}\n")), "{}", file.display());
    }
}
