//! What is packaged: Debian packages that are installed, upgraded and removed, and for containers the objects of Kubernetes, by its
//! own schemas, and a configuration that the daemon accepts.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger::config::Config;
use claviger_tests::{claviger, said, sandbox, tool};

use super::pages::{ON_FAILURE, root, script_after};

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

/// Makes the Debian packages of the program, the service and a host with `cargo deb`, of the program that the tests run.
fn packages(folder: &Path, revision: &str) {
    let built = folder.join("release");
    std::fs::create_dir_all(built.join("sbom")).unwrap();
    if !built.join("claviger").exists() {
        std::fs::copy(claviger(), built.join("claviger")).unwrap();
        // `make deb` fills it.
        std::fs::write(built.join("sbom/claviger.cdx.json"), "{}").unwrap();
        let manual = built.join("manual/claviger");
        assert!(Command::new(claviger()).arg("manual").arg(&manual).status().unwrap().success());
        let pages = std::fs::read_dir(manual.join("man")).unwrap().map(|page| page.unwrap().path());
        assert!(Command::new("gzip").arg("-9n").args(pages).status().unwrap().success());
    }
    for variant in [None, Some("server"), Some("host")] {
        let mut command = Command::new("cargo");
        command.args([
            "deb",
            "--locked",
            "--offline",
            "--no-build",
            "--fast",
            "-p",
            "claviger",
            "--deb-revision",
            revision,
        ]);
        command.args(variant.map(|variant| format!("--variant={variant}"))).arg("--output").arg(folder);
        let made = command.current_dir(root()).env("CARGO_TARGET_DIR", folder).output().unwrap();
        assert!(made.status.success(), "install cargo-deb, or see: {}", said(&made));
    }
}

#[test]
fn the_packages_lead_to_a_release_and_are_upgraded_removed_and_purged() {
    if !sandbox::is_possible() {
        return;
    }
    // Below the folder of the build, which the sandbox sees.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    packages(folder.path(), "1");
    packages(folder.path(), "2");
    let first = script_after("docs/install.md", "## 2. The service");
    let script = format!(
        r#"
export DEBIAN_FRONTEND=noninteractive
mkdir /tmp/debs /tmp/work
cp {debian}/*.deb /tmp/debs
pushd /tmp/debs
dpkg -i claviger_*-1_*.deb claviger-server_*-1_*.deb claviger-host_*-1_*.deb
popd
test ! -e /usr/share/man/man1/claviger-help.1.gz
zcat /usr/share/man/man1/claviger-init.1.gz | grep -q 'TH claviger-init'
for place in $(sed -n 's/^Documentation=//p' /usr/lib/systemd/system/claviger*.service); do
  case $place in
  man:*) page=${{place#man:}} section=${{place##*(}} && zcat "/usr/share/man/man${{section%)}}/${{page%(*}}.${{section%)}}.gz" >/dev/null ;;
  file://*) test -s "${{place#file://}}" ;;
  *) exit 8 ;;
  esac
done
stat -c 'folder %n %U:%G %a' /etc/claviger /var/lib/claviger /etc/claviger-host /var/lib/claviger-host
cd /tmp/work
{first}
pid=$(cat /run/claviger.pid)
echo '# changed here' >>/etc/logrotate.d/claviger
dpkg -i /tmp/debs/claviger_*-2_*.deb /tmp/debs/claviger-server_*-2_*.deb /tmp/debs/claviger-host_*-2_*.deb
kill -0 "$pid"
grep -q 'changed here' /etc/logrotate.d/claviger
curl --fail --silent http://127.0.0.1:9464/ready
claviger hosts list
systemctl stop claviger
systemctl start claviger
claviger host unwrap --protector vm.next.xml --egress vm.last.xml --key-file vm.next.keys --url http://127.0.0.1:8080
systemctl stop claviger
# The program is needed by the others.
if dpkg -r claviger; then exit 9; fi
dpkg -r claviger-server claviger-host
test ! -e /usr/lib/systemd/system/claviger.service
test -e /etc/logrotate.d/claviger
dpkg -P claviger-server claviger-host claviger
test ! -e /etc/logrotate.d/claviger
test ! -e /usr/bin/claviger
ls /etc/claviger/claviger.toml /var/lib/claviger/audit.jsonl /var/lib/claviger-host/hostkey.pem
dpkg -l | grep claviger | grep -v loadgen || echo nothing is left
"#,
        debian = folder.path().display()
    );
    let ran = sandbox::run(&format!("{ON_FAILURE}{script}"));
    let said = said(&ran);
    assert!(ran.status.success(), "{said}");
    for expected in [
        "folder /etc/claviger root:claviger 750",
        "folder /var/lib/claviger claviger:claviger 750",
        "folder /etc/claviger-host root:root 755",
        "folder /var/lib/claviger-host root:root 700",
        "ready     keys are released",
        "were kept; remove them by hand",
        "nothing is left",
    ] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
}

#[test]
fn the_packages_ask_for_the_version_that_is_built_and_enable_nothing() {
    let manifest: toml::Table = std::fs::read_to_string(root().join("daemon/Cargo.toml")).unwrap().parse().unwrap();
    let workspace: toml::Table = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let version = workspace["workspace"]["package"]["version"].as_str().unwrap();
    let changelog = std::fs::read_to_string(root().join("daemon/packaging/debian/changelog")).unwrap();
    assert!(changelog.starts_with(&format!("claviger ({version}-1)")), "{changelog}");
    for (name, package) in manifest["package"]["metadata"]["deb"]["variants"].as_table().unwrap() {
        let depends = package["depends"].as_str().unwrap();
        assert!(depends.contains(&format!("claviger (>= {version})")), "{name}: {depends}");
        for setting in ["enable", "start", "restart-after-upgrade", "stop-on-upgrade"] {
            assert_eq!(package["systemd-units"][setting].as_bool(), Some(false), "{name}: {setting}");
        }
    }
}
