//! Reads a configuration file, and writes one.

use std::path::{Path, PathBuf};

use claviger_client::files::{self, FileError};
use serde::Deserialize;

use super::bounds;
use super::error::ConfigError;
use super::etcd::{Etcd, EtcdSection};
use super::fault::{Fault, in_etcd, in_hsm, in_tls};
use super::hsm::{Hsm, HsmSection};
use super::line::from_toml;
use super::pin::PinSource;
use super::schema::Config;
use super::tls::{Tls, TlsSection};

/// Largest configuration file, in bytes.
const CONFIG_LIMIT: usize = 1024 * 1024;

impl Config {
    /// Reads, resolves and validates a configuration file. Blocks on the file.
    ///
    /// # Errors
    /// [`ConfigError`] names file, line and setting, and says what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read_text(path, CONFIG_LIMIT).map_err(|error| {
            let (problem, advice) = match error {
                FileError::Io { source, .. } => {
                    (format!("the configuration cannot be read: {source}"), "check the path and who may read it")
                }
                FileError::Text { source, .. } => {
                    (format!("the configuration is {}", source.problem()), source.advice())
                }
                _ => (format!("the configuration is larger than {CONFIG_LIMIT} bytes"), "is it the right file?"),
            };
            ConfigError { file: path.to_owned(), line: None, setting: None, problem, advice: advice.to_owned() }
        })?;
        Self::parse(&text, path)
    }

    /// Like [`Config::load`], for a text that was already read; `path` gives the folder for relative paths, and the
    /// name for errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| match disagreement(text) {
            Some(fault) => fault.locate(text, path),
            None => from_toml(&error, text, path),
        })?;
        // Make the path absolute now: if the daemon changes its working directory later, the paths must not change.
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        config.resolve(absolute.parent().unwrap_or(Path::new("/")));
        bounds::check(&config).map_err(|fault| fault.locate(text, path))?;
        Ok(config)
    }

    /// The configuration as a TOML document. If its paths are absolute, [`Config::load`] gives an equal
    /// configuration.
    ///
    /// # Errors
    /// A value cannot be written as TOML, for example a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    fn resolve(&mut self, folder: &Path) {
        let absolute = |path: &mut PathBuf| *path = folder.join(&*path);
        absolute(&mut self.server.state);
        if let Some(tls) = &mut self.server.tls {
            absolute(&mut tls.certificate);
            absolute(&mut tls.key);
            tls.clients.authorities_mut().map(absolute);
        }
        self.server.sockets.as_mut().map(absolute);
        self.attest.vendor_roots.as_mut().map(absolute);
        self.etcd.iter_mut().flat_map(Etcd::paths_mut).for_each(absolute);
        self.audit.syslog.as_mut().map(absolute);
        for hsm in &mut self.hsm {
            absolute(&mut hsm.module);
            if let PinSource::File(path) = &mut hsm.pin {
                absolute(path);
            }
        }
    }
}

/// The sections in which settings must agree with each other, as they are written in the file.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Outline {
    server: ServerOutline,
    hsm: Vec<HsmSection>,
    etcd: Option<EtcdSection>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ServerOutline {
    tls: Option<TlsSection>,
}

/// Finds the settings of a refused file that contradict each other. The parser's error only names their section.
fn disagreement(text: &str) -> Option<Fault> {
    let Outline { server, hsm, etcd } = toml::from_str(text).ok()?;
    let tls = server.tls.and_then(|section| Some(Fault::of(Tls::try_from(section).err()?, in_tls)));
    let mut members = hsm.into_iter().enumerate();
    let member = |(index, section): (usize, HsmSection)| {
        Some(Fault::of(Hsm::try_from(section).err()?, |key| in_hsm(index, key)))
    };
    let etcd = etcd.and_then(|section| Some(Fault::of(Etcd::try_from(section).err()?, in_etcd)));
    tls.or(etcd).or_else(|| members.find_map(member))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::super::{Clients, Release, TokenName};
    use super::*;

    const LAB: &str = r#"
[env]
SOFTHSM2_CONF = "/lab/softhsm2.conf"

[server]
listen = "127.0.0.1:0"
state = "state"

[server.tls]
certificate = "tls.pem"
key = "/keys/tls.key"

[[hsm]]
name = "hsm-a"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "claviger-a"
pin_file = "a.pin"

[[hsm]]
name = "hsm-b"
module = "libhsm.so"
serial = "0815"
pin_env = "PIN_B"
priority = 1
weight = 3
sessions = 2
env = { HSM_CONF = "b.conf" }

[audit]
sync = true
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/lab/claviger.toml"))
    }

    fn refusal(from: &str, to: &str) -> String {
        assert!(LAB.contains(from), "{from}");
        parse(&LAB.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn reads_settings_defaults_and_relative_paths() {
        let config = parse(LAB).unwrap();
        assert_eq!(config.env["SOFTHSM2_CONF"], "/lab/softhsm2.conf");
        assert_eq!(config.server.state, Path::new("/lab/state"));
        assert_eq!(config.server.metrics, SocketAddr::from(([127, 0, 0, 1], 9464)));
        assert_eq!(config.server.idle_timeout(), Duration::from_secs(75));
        assert_eq!(config.server.tls.as_ref().unwrap().certificate, Path::new("/lab/tls.pem"));
        assert_eq!(config.server.tls.as_ref().unwrap().key, Path::new("/keys/tls.key"));
        let [a, b] = config.hsm.as_slice() else { panic!("two members") };
        assert_eq!((a.priority, a.weight, a.sessions), (0, 1, 8));
        assert_eq!(a.token, TokenName::Label("claviger-a".to_owned()));
        assert_eq!(a.pin, PinSource::File("/lab/a.pin".into()));
        assert_eq!(b.token, TokenName::Serial("0815".to_owned()));
        assert_eq!(b.module, Path::new("/lab/libhsm.so"));
        assert_eq!((b.priority, b.weight, b.sessions), (1, 3, 2));
        assert_eq!(b.env["HSM_CONF"], "b.conf");
        let release = Release { deadline_ms: 5000, batch: 16, queue: 4096, ..Release::default() };
        assert_eq!(config.release, release);
        assert!(config.audit.sync);
    }

    #[test]
    fn what_it_writes_it_reads_again() {
        let mut config = parse(LAB).unwrap();
        let ca = || "/keys/ca.pem".into();
        for clients in [Clients::NotAsked, Clients::Asked(ca()), Clients::Required(ca()), Clients::Hosts(ca())] {
            config.server.tls.as_mut().unwrap().clients = clients;
            assert_eq!(parse(&config.to_toml().unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn refusals_name_file_line_setting_and_remedy() {
        for (from, to, expected) in [
            ("sync = true", "synk = true", "/lab/claviger.toml:30: audit.synk: unknown field `synk`"),
            ("priority = 1", "priority = -1", "/lab/claviger.toml:24: hsm[2].priority: invalid value"),
            ("weight = 3", "weight = 0", "/lab/claviger.toml:25: hsm[2].weight: 0 is out of bounds; use a number"),
            ("sessions = 2", "sessions = 5000", "/lab/claviger.toml:26: hsm[2].sessions: 5000"),
            ("\"hsm-b\"", "\"HSM-A\"", "/lab/claviger.toml:20: hsm[2].name: \"HSM-A\" is the name of another HSM"),
            ("\"hsm-b\"", "\"hsm b\"", "/lab/claviger.toml:20: hsm[2].name: \"hsm b\" is not a name"),
            ("pin_env = \"PIN_B\"", "", "hsm[2].pin_file: neither `pin_file` nor `pin_env` is set; set exactly one"),
            ("pin_env", "token = \"x\"\npin_env", "/lab/claviger.toml:22: hsm[2].serial: `token` is set, too"),
            ("\"0815\"", "\"\"", "/lab/claviger.toml:22: hsm[2].serial: is empty"),
            ("127.0.0.1:0", "localhost:80", "/lab/claviger.toml:6: server.listen: "),
            ("127.0.0.1:0", "127.0.0.1:9464", "server.metrics: 127.0.0.1:9464 is the address of server.listen, too"),
            ("state =", "header_timeout_ms = 0\nstate =", "/lab/claviger.toml:7: server.header_timeout_ms: 0 is out"),
            ("state =", "body_memory_mib = 63\nstate =", "/lab/claviger.toml:7: server.body_memory_mib: 63 is out"),
            ("state =", "body_rate = -1\nstate =", "/lab/claviger.toml:7: server.body_rate: invalid"),
            ("SOFTHSM2_CONF", "\"A=B\"", "/lab/claviger.toml:3: env.A=B: \"A=B\" cannot be an environment variable"),
            ("[audit]", "[release]\nhost_burst = 0\n[audit]", "/lab/claviger.toml:30: release.host_burst: 0 is out"),
            ("[audit]", "[release]\nhost_rate = -1\n[audit]", "/lab/claviger.toml:30: release.host_rate: invalid"),
            (
                "key = \"/keys/tls.key\"",
                "key = \"/keys/tls.key\"\nclient_required = true",
                "/lab/claviger.toml:12: server.tls.client_required: clients are to show certificates, and nothing says whose",
            ),
            (
                "key = \"/keys/tls.key\"",
                "key = \"/keys/tls.key\"\nclient_ca = \"ca\"\nclient_is_host = true",
                "/lab/claviger.toml:13: server.tls.client_is_host: clients are bound to hosts by their certificates",
            ),
            ("\"a.pin\"", "\"\"", "/lab/claviger.toml:17: hsm[1].pin_file: is empty; set exactly one of"),
            ("\"PIN_B\"", "\"A=B\"", "/lab/claviger.toml:23: hsm[2].pin_env: \"A=B\" cannot be an environment"),
            ("[audit]", "[log]\nformat = \"xml\"\n[audit]", "log.format"),
            ("[audit]", "[release]\nconcurrency = 100001\n[audit]", "release.concurrency: 100001 is out of bounds"),
            ("[audit]", "[release]\nqueue = 0\n[audit]", "release.queue: 0 is out of bounds"),
            ("[audit]", "[audit", "/lab/claviger.toml:29: "),
            ("module = \"libhsm.so\"\n", "", "missing field `module`; add it"),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(expected), "{message}\nlacks\n{expected}");
        }
        let message = parse("[server]\n").unwrap_err().to_string();
        assert!(message.contains("there is no HSM; add an [[hsm]] section"), "{message}");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("claviger.toml");
        let dos = format!("\u{feff}{}", LAB.replace('\n', "\r\n"));
        std::fs::write(&file, &dos).unwrap();
        assert_eq!(Config::load(&file).unwrap().hsm.len(), 2);
        std::fs::write(&file, dos.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
        let message = Config::load(&file).unwrap_err().to_string();
        assert!(message.contains("the configuration is text in UTF-16") && message.contains("iconv"), "{message}");
        let message = Config::load(Path::new("/nowhere/claviger.toml")).unwrap_err().to_string();
        assert!(message.starts_with("/nowhere/claviger.toml: the configuration cannot be read"), "{message}");
    }
}
