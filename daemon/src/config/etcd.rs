//! `[etcd]`: the state of several nodes is kept in etcd instead of the state folder.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::disagreement::Disagreement;

/// `[etcd]`: where the shared state is, and how long a node serves without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "EtcdSection", into = "EtcdSection")]
#[schemars(with = "EtcdSection")]
pub struct Etcd {
    /// Base URLs of etcd's members, at least one. All of them are of the kind that `link` says.
    pub endpoints: Vec<String>,
    /// Prefix of all keys; begins and ends with `/`.
    pub prefix: String,
    /// How connections are protected.
    pub link: Link,
    /// The user, and the file with the password, where etcd asks for them.
    pub login: Option<(String, PathBuf)>,
    /// How long the node serves with a state that etcd does not confirm, in milliseconds.
    pub max_staleness_ms: u64,
}

/// How connections to etcd are protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Not at all, because all endpoints are on this machine.
    Loopback,
    /// By TLS.
    Tls {
        /// CA certificates for etcd's members (PEM).
        ca: PathBuf,
        /// This node's certificate and private key (PEM), where etcd asks for them.
        identity: Option<(PathBuf, PathBuf)>,
    },
}

impl Etcd {
    /// [`Etcd::max_staleness_ms`] as a duration.
    #[must_use]
    pub fn max_staleness(&self) -> Duration {
        Duration::from_millis(self.max_staleness_ms)
    }

    /// Certificates.
    #[must_use]
    pub fn public_files(&self) -> Vec<&PathBuf> {
        match &self.link {
            Link::Loopback => Vec::new(),
            Link::Tls { ca, identity } => {
                std::iter::once(ca).chain(identity.iter().map(|(certificate, _)| certificate)).collect()
            }
        }
    }

    /// Files that other users must not be able to read: the private key, and the password.
    #[must_use]
    pub fn secret_files(&self) -> Vec<&PathBuf> {
        let key = match &self.link {
            Link::Tls { identity: Some((_, key)), .. } => Some(key),
            Link::Tls { identity: None, .. } | Link::Loopback => None,
        };
        key.into_iter().chain(self.login.as_ref().map(|(_, file)| file)).collect()
    }

    pub(super) fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        let mut paths: Vec<&mut PathBuf> = self.login.iter_mut().map(|(_, file)| file).collect();
        if let Link::Tls { ca, identity } = &mut self.link {
            paths.push(ca);
            if let Some((certificate, key)) = identity {
                paths.extend([certificate, key]);
            }
        }
        paths
    }
}

/// The state that several nodes share.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EtcdSection {
    /// URLs of etcd's members: `https://HOST:PORT`, or `http://…` if all of them are on loopback.
    endpoints: Vec<String>,
    /// Prefix of all keys. Several services may share one etcd under different prefixes. Default: `/claviger/`.
    #[serde(default = "usual_prefix")]
    prefix: String,
    /// CA certificates for etcd's members, PEM; needed with `https`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca: Option<PathBuf>,
    /// This node's client certificate, PEM. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate: Option<PathBuf>,
    /// The private key of `certificate`, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<PathBuf>,
    /// Name of the user in etcd. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    /// File with the user's password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    password_file: Option<PathBuf>,
    /// Milliseconds for which the node serves with its last state while etcd does not confirm it, 1,000 to
    /// 86,400,000. Then it refuses releases and attestations with 503 until it has read the state again. Default:
    /// 300,000.
    #[serde(default = "usual_staleness")]
    max_staleness_ms: u64,
}

fn usual_prefix() -> String {
    "/claviger/".to_owned()
}

fn usual_staleness() -> u64 {
    300_000
}

/// What an endpoint says of the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Plain,
    Tls,
}

/// Judges one URL.
///
/// # Errors
/// The problem and its remedy.
fn scheme_of(endpoint: &str) -> Result<Scheme, (String, &'static str)> {
    let wanted = "use https://HOST:PORT";
    let (scheme, authority) = match endpoint.split_once("://") {
        Some(("https", rest)) => (Scheme::Tls, rest),
        Some(("http", rest)) => (Scheme::Plain, rest),
        _ => return Err((format!("{endpoint:?} is no URL of etcd"), wanted)),
    };
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let whole = authority.rsplit_once(':').filter(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        !host.is_empty()
            && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte))
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    let Some((host, _)) = whole else {
        return Err((format!("{endpoint:?} has no host and port"), wanted));
    };
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    if scheme == Scheme::Plain && host != "localhost" && !ip.is_ok_and(|ip| ip.is_loopback()) {
        let advice = "use https: whoever reads or changes this connection decides who gets keys";
        return Err((format!("{endpoint:?} is neither encrypted nor on this machine"), advice));
    }
    Ok(scheme)
}

/// The value of two settings that need each other.
fn pair<T, U>(
    (first, one): (&'static str, Option<T>),
    (second, other): (&'static str, Option<U>),
) -> Result<Option<(T, U)>, Disagreement> {
    let alone = |key: &'static str, missing: &str| {
        Err(Disagreement { key, problem: format!("`{missing}` is not set"), advice: "set both, or neither".to_owned() })
    };
    match (one, other) {
        (None, None) => Ok(None),
        (Some(one), Some(other)) => Ok(Some((one, other))),
        (Some(_), None) => alone(first, second),
        (None, Some(_)) => alone(second, first),
    }
}

impl TryFrom<EtcdSection> for Etcd {
    type Error = Disagreement;

    fn try_from(section: EtcdSection) -> Result<Self, Disagreement> {
        let EtcdSection { endpoints, prefix, ca, certificate, key, user, password_file, max_staleness_ms } = section;
        let wrong = |key, problem: String, advice: &str| Disagreement { key, problem, advice: advice.to_owned() };
        if endpoints.is_empty() {
            return Err(wrong("endpoints", "is empty".to_owned(), "name the URLs of etcd's members"));
        }
        let schemes = endpoints.iter().map(|endpoint| scheme_of(endpoint)).collect::<Result<Vec<_>, _>>();
        let schemes = schemes.map_err(|(problem, advice)| wrong("endpoints", problem, advice))?;
        if schemes.iter().any(|scheme| *scheme != schemes[0]) {
            return Err(wrong("endpoints", "some are http and some https".to_owned(), "use https for all"));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/.-_".contains(&byte);
        if !(prefix.starts_with('/') && prefix.ends_with('/') && prefix.len() <= 256 && prefix.bytes().all(plain)) {
            let advice = "begin and end it with '/', and use letters, digits, '.', '-' and '_' between";
            return Err(wrong("prefix", format!("{prefix:?} is no prefix of keys"), advice));
        }
        if !(1_000..=86_400_000).contains(&max_staleness_ms) {
            let problem = format!("{max_staleness_ms} is out of bounds");
            return Err(wrong("max_staleness_ms", problem, "use a number from 1000 to 86400000"));
        }
        let identity = pair(("certificate", certificate), ("key", key))?;
        let login = pair(("user", user), ("password_file", password_file))?;
        let link = match (schemes[0], ca, identity) {
            (Scheme::Tls, Some(ca), identity) => Link::Tls { ca, identity },
            (Scheme::Tls, None, _) => {
                let advice = "name the file with the authority of etcd's certificates";
                return Err(wrong("ca", "is not set, and the endpoints use TLS".to_owned(), advice));
            }
            (Scheme::Plain, None, None) => Link::Loopback,
            (Scheme::Plain, ca, _) => {
                let key = if ca.is_some() { "ca" } else { "certificate" };
                return Err(wrong(key, "the endpoints do not use TLS".to_owned(), "use https, or leave this out"));
            }
        };
        let endpoints = endpoints.into_iter().map(|endpoint| endpoint.trim_end_matches('/').to_owned()).collect();
        Ok(Self { endpoints, prefix, link, login, max_staleness_ms })
    }
}

impl From<Etcd> for EtcdSection {
    fn from(etcd: Etcd) -> Self {
        let Etcd { endpoints, prefix, link, login, max_staleness_ms } = etcd;
        let (ca, identity) = match link {
            Link::Loopback => (None, None),
            Link::Tls { ca, identity } => (Some(ca), identity),
        };
        let (certificate, key) = identity.unzip();
        let (user, password_file) = login.unzip();
        Self { endpoints, prefix, ca, certificate, key, user, password_file, max_staleness_ms }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Config;
    use super::*;
    use std::path::Path;

    fn parse(etcd: &str) -> Result<Config, String> {
        let text = format!("[etcd]\n{etcd}\n[[hsm]]\nname = \"a\"\nmodule = \"m\"\ntoken = \"t\"\npin_file = \"p\"\n");
        Config::parse(&text, Path::new("/lab/claviger.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_whole_section_is_read_and_written() {
        let config = parse(
            "endpoints = [\"https://etcd-1:2379/\", \"https://[fd00::1]:2379\"]\nprefix = \"/hgs/\"\nca = \"ca.pem\"\n\
             certificate = \"node.pem\"\nkey = \"node.key\"\nuser = \"claviger\"\npassword_file = \"password\"\n\
             max_staleness_ms = 5000",
        )
        .unwrap();
        let etcd = config.etcd.clone().unwrap();
        assert_eq!(etcd.endpoints, ["https://etcd-1:2379", "https://[fd00::1]:2379"]);
        assert_eq!((&*etcd.prefix, etcd.max_staleness()), ("/hgs/", Duration::from_secs(5)));
        let identity = Some(("/lab/node.pem".into(), "/lab/node.key".into()));
        assert_eq!(etcd.link, Link::Tls { ca: "/lab/ca.pem".into(), identity });
        assert_eq!(etcd.login, Some(("claviger".to_owned(), "/lab/password".into())));
        assert_eq!(etcd.secret_files(), [Path::new("/lab/node.key"), Path::new("/lab/password")]);
        let again = Config::parse(&config.to_toml().unwrap(), Path::new("/lab/claviger.toml")).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn the_defaults_are_a_prefix_and_five_minutes() {
        let etcd = parse("endpoints = [\"http://127.0.0.1:2379\", \"http://localhost:2379\"]").unwrap().etcd.unwrap();
        assert_eq!((&*etcd.prefix, etcd.max_staleness_ms, etcd.link), ("/claviger/", 300_000, Link::Loopback));
        assert!(parse("").is_err(), "a section without endpoints");
        assert!(Config::default().etcd.is_none());
    }

    #[test]
    fn settings_that_contradict_each_other_are_named() {
        let https = "endpoints = [\"https://e:1\"]\nca = \"ca.pem\"\n";
        for (section, expected) in [
            ("endpoints = []".to_owned(), "etcd.endpoints: is empty"),
            ("endpoints = [\"etcd-1:2379\"]".to_owned(), "etcd.endpoints: \"etcd-1:2379\" is no URL"),
            ("endpoints = [\"https://etcd-1\"]".to_owned(), "etcd.endpoints: \"https://etcd-1\" has no host and port"),
            ("endpoints = [\"https://e:1/path\"]".to_owned(), "has no host and port"),
            ("endpoints = [\"http://10.0.0.1:2379\"]".to_owned(), "neither encrypted nor on this machine; use https"),
            ("endpoints = [\"http://127.0.0.1:1\", \"https://e:1\"]".to_owned(), "some are http and some https"),
            ("endpoints = [\"http://127.0.0.1:1\"]\nca = \"x\"".to_owned(), "etcd.ca: the endpoints do not use TLS"),
            ("endpoints = [\"https://e:1\"]".to_owned(), "etcd.ca: is not set, and the endpoints use TLS"),
            (format!("{https}prefix = \"claviger\""), "etcd.prefix: \"claviger\" is no prefix"),
            (format!("{https}certificate = \"x\""), "/lab/claviger.toml:4: etcd.certificate: `key` is not set"),
            (format!("{https}key = \"x\""), "etcd.key: `certificate` is not set"),
            (format!("{https}user = \"x\""), "etcd.user: `password_file` is not set; set both"),
            (format!("{https}max_staleness_ms = 0"), "etcd.max_staleness_ms: 0 is out of bounds"),
        ] {
            let said = parse(&section).unwrap_err();
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
}
