//! Tests of the project's own clients with TLS: their certificates, the authorities they trust, and their messages for
//! wrong settings.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger::config::{Clients, Tls};
use claviger_tests::authority::{Authority, Pair};
use claviger_tests::{Daemon, Lab, Options, Process, claviger, loadgen, said};
use serde_json::Value;

/// A lab served over TLS with a certificate for 127.0.0.1 only. Its files are in the lab's directory.
struct Site {
    lab: Lab,
    authority: Authority,
    daemon: Daemon,
}

impl Site {
    /// Serves the lab; with `required`, clients must show a certificate.
    fn serve(required: bool) -> Self {
        let lab = Lab::make(Options::default());
        let authority = Authority::new(lab.path(), "ca");
        let (certificate, key) = authority.issue("server", "/CN=server", "IP:127.0.0.1");
        lab.configure(|config| {
            config.server.tls = Some(Tls {
                clients: if required { Clients::Required(authority.certificate_file()) } else { Clients::NotAsked },
                ..Tls::new(certificate, key)
            });
        });
        let daemon = lab.serve();
        Self { lab, authority, daemon }
    }

    /// Runs `claviger host attest` with these URLs and further arguments. It may take a minute; an exit status of 1 comes
    /// earlier.
    fn attest(&self, urls: &[&str], more: &[&str]) -> Output {
        let mut command = Command::new(claviger());
        command.args(["host", "attest", "--fresh", "--dir"]).arg(self.lab.file("host"));
        command.args(urls.iter().flat_map(|url| ["--url", url])).args(more).output().unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Returns the arguments with which a client shows a certificate.
fn showing(pair: &Pair) -> [&str; 4] {
    ["--client-certificate", text(&pair.0), "--client-key", text(&pair.1)]
}

/// Checks that a wrong setting is named at once, without retries until the time limit.
fn is_wrong(output: &Output, words: &str) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(words), "no {words:?} in: {said}");
}

fn works(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

#[test]
fn hosts_tenants_and_the_load_generator_show_their_certificates() {
    let site = Site::serve(true);
    let (url, ca) = (&*site.daemon.url, site.authority.certificate_file());
    let own = site.authority.issue("own", "/CN=node-1", "DNS:node-1");
    let shown = [&["--ca", text(&ca)][..], &showing(&own)].concat();
    works(&site.attest(&[url], &shown));

    let guardians = site.lab.file("guardians");
    let import = |name: &str, more: &[&str]| {
        let mut command = Command::new(claviger());
        command.args(["guardian", "import", name, "--url", url, "--trust-unpinned", "--guardians"]).arg(&guardians);
        command.args(more).output().unwrap()
    };
    works(&import("hgs", &shown));
    assert!(fs::read(guardians.join("hgs.xml")).unwrap().starts_with(b"<"));
    is_wrong(&import("none", &["--ca", text(&ca)]), "requires a certificate of its clients");
    is_wrong(&import("none", &[]), "use --ca FILE or --system-ca");
    assert!(!guardians.join("none.xml").exists());

    let load = |more: &[&str]| {
        let mut command = Command::new(loadgen());
        command.args(["run", "--url", url, "--vms", "4", "--profile", "1s@10", "--warmup", "0s", "--max-lag", "1m"]);
        command.args(["--json", "-", "--verify", "all", "--lab"]).arg(site.lab.path()).args(more).output().unwrap()
    };
    let output = load(&shown);
    works(&output);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["achieved"], 10, "{report:#}");
    is_wrong(&load(&["--ca", text(&ca)]), "requires a certificate of its clients");
    assert!(site.daemon.stop().success());
}

#[test]
fn a_wrong_setting_is_named_at_once() {
    let site = Site::serve(true);
    let (url, ca) = (&*site.daemon.url, site.authority.certificate_file());
    let own = site.authority.issue("own", "/CN=node-1", "DNS:node-1");
    let shown = [&["--ca", text(&ca)][..], &showing(&own)].concat();
    let other = Authority::new(site.lab.path(), "other");
    let foreign = other.issue("foreign", "/CN=node-1", "DNS:node-1");

    let other_ca = other.certificate_file();
    let wrong_ca = [&["--ca", text(&other_ca)][..], &showing(&own)].concat();
    is_wrong(&site.attest(&[url], &wrong_ca), "none that --ca or --system-ca vouches for");
    let other_name = url.replace("127.0.0.1", "localhost");
    is_wrong(&site.attest(&[&other_name], &shown), "its certificate is for another name");
    let plain = url.replace("https://", "http://");
    is_wrong(&site.attest(&[&plain], &[]), "speaks TLS there: write https:// in the URL");
    let encrypted = site.daemon.metrics_url.replace("http://", "https://");
    is_wrong(&site.attest(&[&encrypted], &shown), "does not answer in TLS");
    is_wrong(&site.attest(&[url], &["--ca", text(&ca)]), "requires a certificate of its clients");
    let unknown = [&["--ca", text(&ca)][..], &showing(&foreign)].concat();
    is_wrong(&site.attest(&[url], &unknown), "does not accept this client's certificate (UnknownCA)");
    let mixed = ["--ca", text(&ca), "--client-certificate", text(&own.0), "--client-key", text(&foreign.1)];
    is_wrong(&site.attest(&[url], &mixed), "the key is not that of the certificate");
    // The other server is used nevertheless.
    works(&site.attest(&[&plain, &other_name, url], &shown));
    // Temporary failures are retried until the time limit, and this is what the caller is told.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let closed = format!("https://{nobody}");
    let output = site.attest(&[&closed, &other_name], &[&shown[..], &["--timeout", "2"]].concat());
    assert_eq!(output.status.code(), Some(75), "{}", said(&output));
    assert!(said(&output).contains("no connection to"), "{}", said(&output));
    assert!(site.daemon.stop().success());
}

#[test]
fn the_systems_authorities_are_trusted_where_that_is_said() {
    let site = Site::serve(false);
    let ca = site.authority.certificate_file();
    let attest = |store: &Path, more: &[&str]| {
        let mut command = Command::new(claviger());
        command.args(["host", "attest", "--fresh", "--url", &site.daemon.url, "--dir"]).arg(site.lab.file("host"));
        // The system's authorities, for programs that use them.
        command.env("SSL_CERT_FILE", store).env_remove("SSL_CERT_DIR");
        command.args(more).output().unwrap()
    };
    works(&attest(&ca, &["--system-ca"]));
    is_wrong(&attest(&ca, &[]), "use --ca FILE or --system-ca");
    let other = Authority::new(site.lab.path(), "other").certificate_file();
    is_wrong(&attest(&other, &["--system-ca"]), "none that --ca or --system-ca vouches for");
    works(&attest(&other, &["--system-ca", "--ca", text(&ca)]));
    let empty = site.lab.file("empty.pem");
    fs::write(&empty, "").unwrap();
    is_wrong(&attest(&empty, &["--system-ca"]), "no certificate authorities that can be used");
    assert!(site.daemon.stop().success());
}

/// Starts OpenSSL's server, which supports one TLS version and requires a client certificate.
fn openssl_server(site: &Site, version: &str) -> (Process, SocketAddr) {
    let mut command = Command::new("openssl");
    command.args(["s_server", "-accept", "127.0.0.1:0", "-www", version, "-Verify", "2", "-verify_return_error"]);
    command.arg("-CAfile").arg(site.authority.certificate_file());
    command.arg("-cert").arg(site.lab.file("server.pem")).arg("-key").arg(site.lab.file("server.key"));
    let server = Process::start(&mut command);
    let address = server.line(|line| line.strip_prefix("ACCEPT ")?.trim().parse().ok());
    (server, address)
}

#[test]
fn other_servers_that_require_a_certificate_are_understood_in_each_version() {
    let site = Site::serve(false);
    let ca = site.authority.certificate_file();
    for (version, words) in
        [("-tls1_3", "requires a certificate of its clients"), ("-tls1_2", "requires a client certificate")]
    {
        let (server, address) = openssl_server(&site, version);
        is_wrong(&site.attest(&[&format!("https://{address}")], &["--ca", text(&ca)]), words);
        drop(server);
    }
    assert!(site.daemon.stop().success());
}

/// Runs `claviger host unwrap` in a shell; `script` sets its descriptors.
struct Unwrap<'a> {
    lab: &'a Lab,
    url: &'a str,
}

impl Unwrap<'_> {
    fn egress(&self) -> PathBuf {
        self.lab.file("next.xml")
    }

    fn run(&self, script: &str, more: &[&str]) -> Output {
        let mut shell = Command::new("sh");
        shell.current_dir(self.lab.path()).args(["-c", &format!("\"$@\" {script}"), "sh"]).arg(claviger());
        shell.args(["host", "unwrap", "--url", self.url, "--dir"]).arg(self.lab.file("host"));
        shell.arg("--protector").arg(self.lab.file("tenant/vm-0001.protector.xml"));
        shell.arg("--egress").arg(self.egress()).args(more).output().unwrap()
    }

    /// Returns both keys, as the machine's owner computes them.
    fn keys(&self) -> [Vec<u8>; 2] {
        let owner = self.lab.owner();
        let egress = fs::read(self.egress()).unwrap();
        [owner.open(&self.lab.protector()).unwrap().to_vec(), owner.open(&egress).unwrap().to_vec()]
    }
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).chain(["\n".to_owned()]).collect()
}

#[test]
fn each_key_goes_where_it_is_told_and_in_the_form_that_is_told() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let unwrap = Unwrap { lab: &lab, url: &daemon.url };
    let found = |name: &str| fs::read(lab.file(name)).unwrap();

    works(&unwrap.run("7>ingress 5>egress", &["--ingress-fd", "7", "--egress-fd", "5"]));
    let [ingress, egress] = unwrap.keys();
    assert!(found("ingress") == ingress && found("egress") == egress);

    works(&unwrap.run("3>ingress 4>egress", &["--ingress-fd", "3", "--egress-fd", "4", "--format", "hex"]));
    let [ingress, egress] = unwrap.keys();
    assert!(found("ingress") == hex(&ingress).as_bytes() && found("egress") == hex(&egress).as_bytes());

    works(&unwrap.run("3>both", &["--fd", "3", "--format", "hex"]));
    assert!(found("both") == unwrap.keys().map(|key| hex(&key)).concat().as_bytes());
    works(&unwrap.run("", &["--key-file", "file", "--format", "hex"]));
    assert!(found("file") == unwrap.keys().map(|key| hex(&key)).concat().as_bytes());

    let before = fs::read(unwrap.egress()).unwrap();
    // One number twice, and a number that is not open: opening the other one must not create it.
    is_wrong(&unwrap.run("3>both", &["--ingress-fd", "3", "--egress-fd", "3"]), "have to be different");
    let missing = unwrap.run("4>ingress 3>&-", &["--ingress-fd", "4", "--egress-fd", "3"]);
    is_wrong(&missing, "--egress-fd 3 cannot be written to");
    for incomplete in [&["--ingress-fd", "3"][..], &["--egress-fd", "3"], &["--ingress-fd", "3", "--egress-fd", "1"]] {
        let output = unwrap.run("3>both", incomplete);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
    assert_eq!(fs::read(unwrap.egress()).unwrap(), before, "nobody was asked");
    assert!(daemon.stop().success());
}
