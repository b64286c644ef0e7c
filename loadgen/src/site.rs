//! The participants of a run: a tenant, hosts, and the admin socket of the daemon if it runs on this machine.
//!
//! ```text
//! --lab DIR             made by `claviger demo`:
//!   DIR/claviger.toml     names the daemon's sockets and metrics address
//!   DIR/host/             as --host: a registered host
//!   DIR/tenant/           as --tenant
//!   DIR/loadgen/          stored for the next run: keys of hosts, protectors of machines
//!
//! --tenant DIR          owner-{signing,encryption}.{key,crt}.pem, made by `claviger guardian new`
//! --host DIR            hostkey.pem, made by `claviger host new-key`; identitykey.pem, if there is one
//! --socket FILE         admin.sock of a daemon on this machine
//! --cache DIR           data for the next run; by default the folder `loadgen` in the tenant's folder
//! ```

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger_protocol::certificate::Certificate;
use claviger_protocol::input;
use claviger_protocol::owner::Owner;
use claviger_protocol::pem;
use claviger_protocol::rsa_key::RsaPrivateKey;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Failure;
use crate::host;

/// Longest time for an administrator's command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// The keys and machines of a run.
#[derive(Clone, Debug)]
pub struct Site {
    tenant: PathBuf,
    host: Option<PathBuf>,
    socket: Option<PathBuf>,
    cache: PathBuf,
    metrics: Option<String>,
}

/// The part of a daemon's configuration that is read here.
#[derive(Deserialize)]
struct Config {
    server: Server,
}

#[derive(Deserialize)]
struct Server {
    state: Option<PathBuf>,
    sockets: Option<PathBuf>,
    metrics: Option<SocketAddr>,
}

impl Site {
    /// Uses the lab in this folder.
    ///
    /// # Errors
    /// There is no lab, or its configuration cannot be read.
    pub fn lab(dir: &Path) -> Result<Self, Failure> {
        let file = dir.join("claviger.toml");
        if !file.is_file() {
            let dir = dir.display();
            return Err(format!(
                "{dir} holds no lab; make one with: claviger demo --dir {dir}; for another service, use --tenant"
            )
            .into());
        }
        let bytes = read(&file)?;
        let text = pem::text(&bytes).map_err(|error| format!("{}: {error}", file.display()))?;
        let Config { server } = toml::from_str(text).map_err(|error| format!("{}: {error}", file.display()))?;
        let sockets = server.sockets.or(server.state).unwrap_or_else(|| PathBuf::from("/var/lib/claviger"));
        Ok(Self {
            tenant: dir.join("tenant"),
            host: Some(dir.join("host")),
            // A relative path is relative to the folder of the configuration, as in the daemon.
            socket: Some(dir.join(sockets).join("admin.sock")),
            cache: dir.join("loadgen"),
            metrics: server.metrics.map(|address| format!("http://{address}")),
        })
    }

    /// Uses any other service: the folder of a tenant, and the other paths if given.
    #[must_use]
    pub fn of(tenant: &Path, host: Option<&Path>, socket: Option<&Path>, cache: Option<&Path>) -> Self {
        Self {
            tenant: tenant.to_owned(),
            host: host.map(Path::to_owned),
            socket: socket.map(Path::to_owned),
            cache: cache.map_or_else(|| tenant.join("loadgen"), Path::to_owned),
            metrics: None,
        }
    }

    /// The cache folder of this program.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The metrics address of the daemon, if its configuration is known.
    #[must_use]
    pub fn metrics(&self) -> Option<&str> {
        self.metrics.as_deref()
    }

    /// Reads the keys of the registered host, if there is one: the host key, and the identity key if it exists.
    ///
    /// # Errors
    /// A file is missing, or has other content.
    pub fn host_keys(&self) -> Result<Option<(RsaPrivateKey, Option<RsaPrivateKey>)>, Failure> {
        let Some(dir) = &self.host else { return Ok(None) };
        let identity = dir.join("identitykey.pem");
        let identity = identity.exists().then(|| key(&identity)).transpose()?;
        Ok(Some((key(&dir.join("hostkey.pem"))?, identity)))
    }

    /// Reads the keys of the tenant.
    ///
    /// # Errors
    /// A file is missing, or has other content.
    pub fn owner(&self) -> Result<Owner, Failure> {
        let certificate = |file: &str| {
            let path = self.tenant.join(file);
            let certificate = Certificate::from_file(&read(&path)?);
            certificate.map_err(|error| Failure::from(format!("{}: {error}", path.display())))
        };
        Ok(Owner {
            signing_key: key(&self.tenant.join("owner-signing.key.pem"))?,
            signing_certificate: certificate("owner-signing.crt.pem")?,
            encryption_key: key(&self.tenant.join("owner-encryption.key.pem"))?,
            encryption_certificate: certificate("owner-encryption.crt.pem")?,
        })
    }

    /// `true` if there is an admin socket, so that hosts can be registered and the state of the HSMs can be read.
    #[must_use]
    pub(crate) fn has_socket(&self) -> bool {
        self.socket.is_some()
    }

    /// Connects to the admin socket of the daemon.
    ///
    /// # Errors
    /// The path is unknown, or no daemon listens there.
    pub fn admin(&self) -> Result<Admin, Failure> {
        let socket = self.socket.as_ref().ok_or("the daemon's admin.sock is not known; say where with --socket")?;
        Admin::connect(socket)
    }

    /// The process id of the daemon, if it runs on this machine.
    pub async fn daemon(&self) -> Option<i32> {
        tokio::net::UnixStream::connect(self.socket.as_ref()?).await.ok()?.peer_cred().ok()?.pid()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn key(path: &Path) -> Result<RsaPrivateKey, Failure> {
    input::rsa_private_key(&read(path)?).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// A connection to the daemon's admin socket: JSON objects on lines. Blocks.
pub struct Admin {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Admin {
    fn connect(path: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            format!("{}: {error}; does the daemon run there, and on this machine?", path.display())
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(COMMAND_TIMEOUT)).map_err(failed)?;
        Ok(Self { stream: BufReader::new(stream), path: path.to_owned() })
    }

    fn call(&mut self, request: &Value) -> Result<Value, Failure> {
        let exchange = |stream: &mut BufReader<UnixStream>| {
            stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
            let mut line = String::new();
            stream.read_line(&mut line)?;
            Ok::<_, std::io::Error>(line)
        };
        let line = exchange(&mut self.stream).map_err(|error| format!("{}: {error}", self.path.display()))?;
        let mut answer: Value = serde_json::from_str(&line)
            .map_err(|_| format!("{}: the daemon ended the conversation; its log may say why", self.path.display()))?;
        match answer["error"].as_str() {
            Some(error) => Err(format!("the daemon refuses {}: {error}", request["command"]).into()),
            None => Ok(answer["ok"].take()),
        }
    }

    /// Lists the registered hosts: name, and SHA-256 of the key's SubjectPublicKeyInfo in hex.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn hosts(&mut self) -> Result<Vec<(String, String)>, Failure> {
        let answer = self.call(&json!({"command": "hosts.list"}))?;
        let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
        Ok(answer.as_array().into_iter().flatten().map(|row| (text(row, "name"), text(row, "key"))).collect())
    }

    /// Registers a host.
    ///
    /// # Errors
    /// The daemon refuses or does not answer.
    pub fn add_host(&mut self, name: &str, public_key: &[u8]) -> Result<(), Failure> {
        let key = data_encoding::BASE64.encode(public_key);
        self.call(&json!({"command": "hosts.add", "name": name, "public_key": key})).map(drop)
    }

    /// Registers a host by the endorsement key of its TPM.
    ///
    /// # Errors
    /// The daemon refuses or does not answer.
    pub(crate) fn add_tpm_host(&mut self, name: &str, endorsement_key: &[u8]) -> Result<(), Failure> {
        let key = data_encoding::BASE64.encode(endorsement_key);
        self.call(&json!({"command": "hosts.add-tpm", "name": name, "public_key": key})).map(drop)
    }

    /// Adds the boot of the hosts with software TPMs as the baseline [`host::BASELINE`].
    ///
    /// # Errors
    /// The daemon refuses or does not answer.
    pub(crate) fn accept_boot(&mut self) -> Result<(), Failure> {
        let (name, pcrs) = (host::BASELINE, json!(host::boot_pcrs()?));
        let known = self.call(&json!({"command": "baselines.list"}))?;
        match known.as_array().into_iter().flatten().find(|row| row["name"] == name) {
            Some(row) if row["pcrs"] == pcrs && row["enabled"] == true => return Ok(()),
            Some(_) => drop(self.call(&json!({"command": "baselines.remove", "name": name}))?),
            None => {}
        }
        self.call(&json!({"command": "baselines.add", "name": name, "pcrs": pcrs})).map(drop)
    }

    /// Removes a host.
    ///
    /// # Errors
    /// The daemon refuses or does not answer.
    pub fn remove_host(&mut self, name: &str) -> Result<(), Failure> {
        self.call(&json!({"command": "hosts.remove", "name": name})).map(drop)
    }

    /// Reads the state of the HSMs.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn hsms(&mut self) -> Result<Vec<Hsm>, Failure> {
        let answer = self.call(&json!({"command": "hsm.list"}))?;
        serde_json::from_value(answer).map_err(|error| format!("the daemon's list of HSMs: {error}").into())
    }
}

/// A member of the cluster, with the fields that are used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Hsm {
    /// The name in the daemon's configuration.
    pub name: String,
    /// The token: `label "…"` or `serial "…"`.
    #[serde(default)]
    pub token: String,
    /// `up`, or the reason why the member is not up.
    pub state: String,
    /// Number of calls that wait for a session.
    pub waiting: usize,
    /// The sessions of the member.
    pub sessions: Sessions,
}

/// The sessions of a member.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Sessions {
    /// Number of sessions that may be open.
    pub wanted: usize,
    /// Number of sessions that are busy now.
    pub busy: usize,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_says_where_its_sockets_and_metrics_are() {
        let folder = tempfile::tempdir().unwrap();
        let site = |text: &str| {
            std::fs::write(folder.path().join("claviger.toml"), text).unwrap();
            Site::lab(folder.path()).unwrap()
        };
        let plain = site("[server]\nstate = \"state\"\nmetrics = \"127.0.0.1:9464\"\n[[hsm]]\nname = \"a\"\n");
        assert_eq!(plain.socket.as_deref(), Some(folder.path().join("state/admin.sock").as_path()));
        assert_eq!(plain.metrics(), Some("http://127.0.0.1:9464"));
        let moved = site("[server]\nstate = \"state\"\nsockets = \"/run/claviger\"\n");
        assert_eq!(moved.socket.as_deref(), Some(Path::new("/run/claviger/admin.sock")));
        let message = Site::lab(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(message.contains("claviger demo --dir /nowhere") && message.contains("--tenant"), "{message}");
    }

    #[test]
    fn a_tenant_alone_has_a_cache_and_neither_host_nor_socket() {
        let site = Site::of(Path::new("/acme"), None, None, None);
        assert_eq!(site.cache(), Path::new("/acme/loadgen"));
        assert!(site.host_keys().unwrap().is_none() && !site.has_socket());
        assert!(site.admin().err().unwrap().to_string().contains("--socket"));
        let message = site.owner().err().unwrap().to_string();
        assert!(message.contains("/acme/owner-signing.key.pem"), "{message}");
    }
}
