//! The folder of a laboratory, read from outside: its tenant, its host, and the socket of the daemon that serves it.
//!
//! ```text
//! DIR/claviger.toml     says where the daemon's state is, and so its admin.sock
//! DIR/host/             hostkey.pem, identitykey.pem: a host that is registered already
//! DIR/tenant/           owner-{signing,encryption}.{key,crt}.pem
//! DIR/loadgen/          what this program keeps for the next run: keys of hosts, protectors of machines
//! ```

use std::io::{BufRead, BufReader, Write};
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

/// How long a command of an administrator may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A laboratory's folder.
#[derive(Clone, Debug)]
pub struct Lab {
    dir: PathBuf,
}

impl Lab {
    /// The laboratory in this folder.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let lab = Self { dir: dir.to_owned() };
        if !lab.config_file().is_file() {
            let dir = dir.display();
            return Err(format!("{dir} holds no lab; make one with: claviger demo --dir {dir}").into());
        }
        Ok(lab)
    }

    fn config_file(&self) -> PathBuf {
        self.dir.join("claviger.toml")
    }

    /// Where this program keeps things.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.dir.join("loadgen")
    }

    fn read(&self, file: &str) -> Result<Vec<u8>, Failure> {
        let path = self.dir.join(file);
        std::fs::read(&path).map_err(|error| format!("{}: {error}; is this the lab's folder?", path.display()).into())
    }

    fn key(&self, file: &str) -> Result<RsaPrivateKey, Failure> {
        let key = input::rsa_private_key(&self.read(file)?);
        key.map_err(|error| format!("{}: {error}", self.dir.join(file).display()).into())
    }

    /// The keys of the host that comes with the lab: host key, identity key.
    ///
    /// # Errors
    /// Files that are missing or hold something else.
    pub fn host_keys(&self) -> Result<(RsaPrivateKey, RsaPrivateKey), Failure> {
        Ok((self.key("host/hostkey.pem")?, self.key("host/identitykey.pem")?))
    }

    /// The tenant.
    ///
    /// # Errors
    /// Files that are missing or hold something else.
    pub fn owner(&self) -> Result<Owner, Failure> {
        let certificate = |file: &str| {
            let certificate = Certificate::from_file(&self.read(file)?);
            certificate.map_err(|error| Failure::from(format!("{}: {error}", self.dir.join(file).display())))
        };
        Ok(Owner {
            signing_key: self.key("tenant/owner-signing.key.pem")?,
            signing_certificate: certificate("tenant/owner-signing.crt.pem")?,
            encryption_key: self.key("tenant/owner-encryption.key.pem")?,
            encryption_certificate: certificate("tenant/owner-encryption.crt.pem")?,
        })
    }

    /// The administrators' socket of the daemon that serves the lab.
    ///
    /// # Errors
    /// When the configuration does not say where, or nobody is there.
    pub fn admin(&self) -> Result<Admin, Failure> {
        Admin::connect(&self.socket()?)
    }

    /// The process id of the daemon that serves the lab, when it runs on this machine.
    pub async fn daemon(&self) -> Option<i32> {
        tokio::net::UnixStream::connect(self.socket().ok()?).await.ok()?.peer_cred().ok()?.pid()
    }

    fn socket(&self) -> Result<PathBuf, Failure> {
        #[derive(Deserialize)]
        struct Config {
            server: Server,
        }
        #[derive(Deserialize)]
        struct Server {
            state: PathBuf,
        }
        let file = self.config_file();
        let bytes = self.read("claviger.toml")?;
        let text = pem::text(&bytes).map_err(|error| format!("{}: {error}", file.display()))?;
        let config: Config = toml::from_str(text).map_err(|error| format!("{}: {error}", file.display()))?;
        // A path that is not absolute counts from the configuration's folder, as for the daemon.
        Ok(self.dir.join(config.server.state).join("admin.sock"))
    }
}

/// A conversation with a daemon, as its administrator: JSON objects on lines. Blocks.
pub struct Admin {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Admin {
    fn connect(path: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            format!("{}: {error}; does the daemon run on this lab, and on this machine?", path.display())
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

    /// The registered hosts: name, and SHA-256 of the key's SubjectPublicKeyInfo in hex.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn hosts(&mut self) -> Result<Vec<(String, String)>, Failure> {
        let answer = self.call(&json!({"command": "hosts.list"}))?;
        let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
        Ok(answer.as_array().into_iter().flatten().map(|row| (text(row, "name"), text(row, "key"))).collect())
    }

    /// Registers a host.
    ///
    /// # Errors
    /// When the daemon refuses or does not answer.
    pub fn add_host(&mut self, name: &str, public_key: &[u8]) -> Result<(), Failure> {
        let key = data_encoding::BASE64.encode(public_key);
        self.call(&json!({"command": "hosts.add", "name": name, "public_key": key})).map(drop)
    }

    /// Removes a host.
    ///
    /// # Errors
    /// When the daemon refuses or does not answer.
    pub fn remove_host(&mut self, name: &str) -> Result<(), Failure> {
        self.call(&json!({"command": "hosts.remove", "name": name})).map(drop)
    }

    /// How the HSMs are now.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn hsms(&mut self) -> Result<Vec<Hsm>, Failure> {
        let answer = self.call(&json!({"command": "hsm.list"}))?;
        serde_json::from_value(answer).map_err(|error| format!("the daemon's list of HSMs: {error}").into())
    }
}

/// A member of the cluster, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub struct Hsm {
    /// `up`, or why not.
    pub state: String,
    /// Calls that wait for a session.
    pub waiting: usize,
    /// Its sessions.
    pub sessions: Sessions,
}

/// The sessions of a member.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Sessions {
    /// How many may be open.
    pub wanted: usize,
    /// How many work now.
    pub busy: usize,
}
