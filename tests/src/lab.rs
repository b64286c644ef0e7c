//! A laboratory in a folder of its own.

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

/// The name of the host that a lab comes with.
pub const HOST: &str = claviger::lab::HOST_NAME;

/// What a new lab has.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Soft tokens.
    pub hsms: usize,
    /// Virtual machines.
    pub vms: usize,
    /// Length of the guardian's keys.
    pub bits: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { hsms: 1, vms: 1, bits: 2048 }
    }
}

/// Soft tokens, a registered host and a tenant. The folder goes with the value.
pub struct Lab {
    folder: TempDir,
}

/// What a host asks for in this harness.
pub const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};

impl Lab {
    /// A lab that nobody serves yet. Its releases have all the time of a slow machine, and each makes its own two operations of
    /// the HSMs: nothing is made ahead.
    ///
    /// # Panics
    /// When its own checks do not pass.
    #[must_use]
    pub fn make(options: Options) -> Self {
        Self::make_with(options, None)
    }

    /// The same on tokens of another `module` than SoftHSM2's usual one.
    ///
    /// # Panics
    /// When its own checks do not pass.
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

    /// A lab that `claviger demo` serves; its checks have passed.
    ///
    /// # Panics
    /// When they have not.
    #[must_use]
    pub fn start(options: Options) -> (Daemon, Self) {
        let lab = Self::folder();
        let daemon = Daemon::start(&mut lab.demo(options));
        daemon.process.line(|line| (line.starts_with("all ") && line.ends_with(" checks passed")).then_some(()));
        (daemon, lab)
    }

    /// A folder where no lab is yet.
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn folder() -> Self {
        Self { folder: tempfile::Builder::new().prefix("claviger-").tempdir().unwrap() }
    }

    /// `claviger demo` in this folder, on ports that the kernel chooses.
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

    /// A file of the lab.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Its configuration.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.file("claviger.toml")
    }

    /// The administrators' socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file("state/admin.sock")
    }

    /// Its configuration.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn config(&self) -> Config {
        Config::load(&self.config_file()).unwrap()
    }

    /// Changes the configuration.
    ///
    /// # Panics
    /// When it cannot be read or written.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        std::fs::write(self.config_file(), config.to_toml().unwrap()).unwrap();
    }

    /// The decisions and changes of the audit trail. What is only counted there is a line here, too, with its event, host and
    /// outcome; it is in the trail about a second after it was answered, and when the daemon has stopped.
    ///
    /// # Panics
    /// When a line is not JSON.
    #[must_use]
    pub fn audit(&self) -> Vec<Value> {
        let mut decisions = Vec::new();
        for line in self.trail() {
            match line["event"].as_str().unwrap() {
                "trail" | "checkpoint" => {}
                "refusals" | "repeats" => {
                    // Which request had which outcome is not told.
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

    /// All lines of the audit trail, as they are.
    ///
    /// # Panics
    /// When one is not JSON.
    #[must_use]
    pub fn trail(&self) -> Vec<Value> {
        let trail = std::fs::read_to_string(self.file("state/audit.jsonl")).unwrap();
        trail.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    /// The registered host.
    #[must_use]
    pub fn host(&self, client: Client) -> Host {
        Host::new(client, self.key("host/hostkey.pem"), self.identity())
    }

    /// The registered host's identity key.
    #[must_use]
    pub fn identity(&self) -> Arc<RsaPrivateKey> {
        Arc::new(self.key("host/identitykey.pem"))
    }

    /// A private key of the lab.
    ///
    /// # Panics
    /// When the file is not there or no key.
    #[must_use]
    pub fn key(&self, file: &str) -> RsaPrivateKey {
        RsaPrivateKey::from_pkcs8_pem(&std::fs::read_to_string(self.file(file)).unwrap()).unwrap()
    }

    /// The tenant.
    ///
    /// # Panics
    /// When a file is missing.
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

    /// The protector of the first virtual machine.
    ///
    /// # Panics
    /// When it is missing.
    #[must_use]
    pub fn protector(&self) -> Vec<u8> {
        std::fs::read(self.file("tenant/vm-0001.protector.xml")).unwrap()
    }

    /// The protectors of all virtual machines.
    ///
    /// # Panics
    /// When one cannot be read.
    #[must_use]
    pub fn protectors(&self) -> Vec<Vec<u8>> {
        let files = (1..).map(|number| self.file(&format!("tenant/vm-{number:04}.protector.xml")));
        files.take_while(|file| file.exists()).map(|file| std::fs::read(file).unwrap()).collect()
    }
}

/// The service's metadata, checked.
///
/// # Panics
/// When it is not right.
pub async fn metadata(client: &Client) -> Metadata {
    let reply = client.get(METADATA).await.unwrap();
    assert_eq!(reply.status, 200);
    Metadata::parse(&reply.body).unwrap()
}

/// The body of a release request.
#[must_use]
pub fn roll_request(health: &[u8], protector: &[u8]) -> Vec<u8> {
    let (ingress_protector, health_certificate) = (protector.to_vec(), health.to_vec());
    RollRequest { ingress_protector, health_certificate, algorithms: ALGORITHMS }.to_xml()
}

/// The host's health certificate, as soon as the service has a signer for it.
///
/// # Panics
/// When it gets none.
pub fn until_attested(host: &Host) -> Vec<u8> {
    until("a health certificate", || block(host.attest()).ok())
}

/// The keys of an answer to [`roll_request`], and the egress protector; says what is wrong otherwise.
///
/// # Errors
/// A sentence.
pub fn open_release(body: &[u8], identity: &RsaPrivateKey) -> Result<(Payload, Vec<u8>), String> {
    let response = RollResponse::parse(body).map_err(|e| e.to_string())?;
    let transfer =
        identity.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key).map_err(|e| e.to_string())?;
    let keys = response.keys.open(&transfer, ALGORITHMS.wrapping, ALGORITHMS.transport).map_err(|e| e.to_string())?;
    Ok((keys, response.egress_protector))
}
