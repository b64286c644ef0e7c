//! A lab: tokens, keys, a host and a tenant in a directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use claviger::config::Config;
use claviger::lab::MODULE_VARIABLE;
use claviger_client::host::Host;
use claviger_client::http::Client;
use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::payload::Payload;
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::RsaPrivateKey;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::claviger;
use crate::daemon::Daemon;
use crate::paths::METADATA;
use crate::wait::{block, until};

/// Name of the host in every lab.
pub const HOST: &str = claviger::lab::HOST_NAME;

/// Contents of a new lab.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of soft tokens.
    pub hsms: usize,
    /// Number of virtual machines.
    pub vms: usize,
    /// Length of the guardian's keys in bits.
    pub bits: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { hsms: 1, vms: 1, bits: 2048 }
    }
}

/// Soft tokens, a registered host and a tenant. The directory is removed when this is dropped.
pub struct Lab {
    folder: TempDir,
}

/// Algorithms that the host requests in this harness.
pub const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};

impl Lab {
    /// Creates a lab without starting a daemon. Its time limits allow for slow machines.
    ///
    /// # Panics
    /// If the lab's own checks fail.
    #[must_use]
    pub fn make(options: Options) -> Self {
        Self::make_with(options, None)
    }

    /// Creates a lab on tokens of another `module` than SoftHSM2's usual one.
    ///
    /// # Panics
    /// If the lab's own checks fail.
    #[must_use]
    pub fn make_with(options: Options, module: Option<&Path>) -> Self {
        let lab = Self::folder();
        let mut demo = lab.demo(options);
        demo.envs(module.map(|module| (MODULE_VARIABLE, module)));
        let made = demo.arg("--exit").output().unwrap();
        let said = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
        assert!(made.status.success(), "no lab:\n{}\n{}", said(&made.stdout), said(&made.stderr));
        lab.configure(|config| {
            config.release.deadline_ms = 60_000;
            config.release.stock_mib = 0;
        });
        lab
    }

    /// Creates a lab that `claviger demo` serves, and waits until its checks have passed.
    ///
    /// # Panics
    /// If a check fails.
    #[must_use]
    pub fn start(options: Options) -> (Daemon, Self) {
        let lab = Self::folder();
        let daemon = Daemon::start(&mut lab.demo(options));
        daemon.process.line(|line| (line.starts_with("all ") && line.ends_with(" checks passed")).then_some(()));
        (daemon, lab)
    }

    /// Creates an empty directory for a lab.
    ///
    /// # Panics
    /// If the directory cannot be created.
    #[must_use]
    pub fn folder() -> Self {
        Self { folder: tempfile::Builder::new().prefix("claviger-").tempdir().unwrap() }
    }

    /// Returns the command `claviger demo` for this directory, on ports that the kernel chooses.
    #[must_use]
    pub fn demo(&self, options: Options) -> Command {
        let mut command = Command::new(claviger());
        command.args(["demo", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--dir"]).arg(self.path());
        command.args(["--hsms", &options.hsms.to_string(), "--vms", &options.vms.to_string()]);
        command.args(["--rsa", &options.bits.to_string()]);
        command
    }

    /// Serves the lab with `claviger serve`.
    #[must_use]
    pub fn serve(&self) -> Daemon {
        Daemon::serve(&self.config_file())
    }

    /// Serves the lab by TLS, with a certificate that signed itself.
    ///
    /// # Panics
    /// When there is no `openssl`.
    #[must_use]
    pub fn serve_tls(&self) -> Daemon {
        let [certificate, key] = ["tls.pem", "tls.key"].map(|name| self.file(name));
        let mut command = std::process::Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
        command.args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]);
        let made = command.arg("-out").arg(&certificate).arg("-keyout").arg(&key).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        self.configure(|config| config.server.tls = Some(claviger::config::Tls::new(&certificate, key)));
        Daemon { ca: Some(certificate), ..self.serve() }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the path of a file in the lab.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Returns the path of the configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.file("claviger.toml")
    }

    /// Returns the path of the administrators' socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file("state/admin.sock")
    }

    /// Reads the configuration.
    ///
    /// # Panics
    /// If the configuration cannot be read.
    #[must_use]
    pub fn config(&self) -> Config {
        Config::load(&self.config_file()).unwrap()
    }

    /// Changes the configuration.
    ///
    /// # Panics
    /// If the configuration cannot be read or written.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        std::fs::write(self.config_file(), config.to_toml().unwrap()).unwrap();
    }

    /// Returns the decisions and changes in the audit trail. Events that the trail only counts are returned as one line
    /// each, with event, host and outcome. They reach the trail about a second after the answer, or when the daemon stops.
    ///
    /// # Panics
    /// If a line is not JSON.
    #[must_use]
    pub fn audit(&self) -> Vec<Value> {
        let mut decisions = Vec::new();
        for line in self.trail() {
            match line["event"].as_str().unwrap() {
                "trail" | "checkpoint" => {}
                "refusals" | "repeats" => {
                    // The trail does not record which request had which outcome.
                    let mut requests = line["requests"].as_array().unwrap().iter();
                    for (outcome, count) in line["outcomes"].as_object().unwrap() {
                        let event = if outcome.ends_with("Exception") { "release" } else { "attest" };
                        for _ in 0..count.as_u64().unwrap() {
                            decisions.push(json!({
                                "event": event, "host": line["host"], "outcome": outcome, "time": line["time"],
                                "request": requests.next().unwrap_or(&line["request"]),
                            }));
                        }
                    }
                }
                _ => decisions.push(line),
            }
        }
        decisions
    }

    /// Returns all lines of the audit trail unchanged.
    ///
    /// # Panics
    /// If a line is not JSON.
    #[must_use]
    pub fn trail(&self) -> Vec<Value> {
        let trail = std::fs::read_to_string(self.file("state/audit.jsonl")).unwrap();
        trail.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    /// Returns the registered host.
    #[must_use]
    pub fn host(&self, client: Client) -> Host {
        Host::new(client, self.key("host/hostkey.pem"), self.identity())
    }

    /// Returns the registered host's identity key.
    #[must_use]
    pub fn identity(&self) -> Arc<RsaPrivateKey> {
        Arc::new(self.key("host/identitykey.pem"))
    }

    /// Returns a private key of the lab.
    ///
    /// # Panics
    /// If the file is missing or contains no key.
    #[must_use]
    pub fn key(&self, file: &str) -> RsaPrivateKey {
        RsaPrivateKey::from_pkcs8_pem(&std::fs::read_to_string(self.file(file)).unwrap()).unwrap()
    }

    /// Returns the tenant.
    ///
    /// # Panics
    /// If a file is missing.
    #[must_use]
    pub fn owner(&self) -> Owner {
        let certificate = |file| Certificate::from_pem(&std::fs::read_to_string(self.file(file)).unwrap()).unwrap();
        Owner {
            signing_key: self.key("tenant/owner-signing.key.pem"),
            signing_certificate: certificate("tenant/owner-signing.crt.pem"),
            encryption_key: self.key("tenant/owner-encryption.key.pem"),
            encryption_certificate: certificate("tenant/owner-encryption.crt.pem"),
        }
    }

    /// Returns the protector of the first virtual machine.
    ///
    /// # Panics
    /// If the file is missing.
    #[must_use]
    pub fn protector(&self) -> Vec<u8> {
        std::fs::read(self.file("tenant/vm-0001.protector.xml")).unwrap()
    }

    /// Returns the protectors of all virtual machines.
    ///
    /// # Panics
    /// If one cannot be read.
    #[must_use]
    pub fn protectors(&self) -> Vec<Vec<u8>> {
        let files = (1..).map(|number| self.file(&format!("tenant/vm-{number:04}.protector.xml")));
        files.take_while(|file| file.exists()).map(|file| std::fs::read(file).unwrap()).collect()
    }
}

/// Fetches and checks the service's metadata.
///
/// # Panics
/// If the metadata is invalid.
pub async fn metadata(client: &Client) -> Metadata {
    let reply = client.get(METADATA).await.unwrap();
    assert_eq!(reply.status, 200);
    Metadata::parse(&reply.body).unwrap()
}

/// Returns the body of a release request.
#[must_use]
pub fn roll_request(health: &[u8], protector: &[u8]) -> Vec<u8> {
    let (ingress_protector, health_certificate) = (protector.to_vec(), health.to_vec());
    RollRequest { ingress_protector, health_certificate, algorithms: ALGORITHMS }.to_xml()
}

/// Waits until the service has a signer, and returns a health certificate for the host.
///
/// # Panics
/// If the service issues none.
pub fn until_attested(host: &Host) -> Vec<u8> {
    until("a health certificate", || block(host.attest()).ok())
}

/// Decrypts an answer to [`roll_request`]: returns the keys and the egress protector.
///
/// # Errors
/// Returns a sentence that describes what is wrong with the answer.
pub fn open_release(body: &[u8], identity: &RsaPrivateKey) -> Result<(Payload, Vec<u8>), String> {
    let response = RollResponse::parse(body).map_err(|e| e.to_string())?;
    let transfer =
        identity.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key).map_err(|e| e.to_string())?;
    let keys = response.keys.open(&transfer, ALGORITHMS.wrapping, ALGORITHMS.transport).map_err(|e| e.to_string())?;
    Ok((keys, response.egress_protector))
}
