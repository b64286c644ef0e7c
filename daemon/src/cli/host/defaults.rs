//! The service that a host asks, if the command line does not say it: `CLAVIGER_URL` and `CLAVIGER_CA`, then the file
//! `/etc/claviger-host/host.toml`.

use std::path::{Path, PathBuf};

use claviger_client::files::{self, FileError};
use claviger_client::http::TlsSettings;
use serde::Deserialize;

use crate::cli::place::{path_variable, variable};
use crate::sys::failure::Failure;

/// The file of the packaged host client.
const FILE: &str = "/etc/claviger-host/host.toml";
/// Environment variable with the path of another file.
const FILE_VARIABLE: &str = "CLAVIGER_HOST_CONFIG";
/// Environment variable with the URLs of the service, separated by spaces.
const URL_VARIABLE: &str = "CLAVIGER_URL";
/// Environment variable with the file of trusted authorities.
const CA_VARIABLE: &str = "CLAVIGER_CA";
/// Largest file, in bytes.
const LIMIT: usize = 64 * 1024;

/// `host.toml`. Relative paths are relative to its folder.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HostFile {
    /// URLs of the servers, in the order in which they are tried.
    urls: Vec<String>,
    ca: Option<PathBuf>,
    system_ca: bool,
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
}

impl HostFile {
    fn load() -> Result<Self, Failure> {
        let said = path_variable(FILE_VARIABLE);
        let path = said.clone().unwrap_or_else(|| FILE.into());
        match files::read_text(&path, LIMIT) {
            Ok(text) => Self::parse(&text, &path),
            // Only the usual place may be empty.
            Err(FileError::Io { source, .. }) if said.is_none() && source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Failure> {
        let mut file: Self = toml::from_str(text).map_err(|error| format!("{}: {error}", path.display()))?;
        let folder = files::folder(path);
        for path in [&mut file.ca, &mut file.client_certificate, &mut file.client_key].into_iter().flatten() {
            *path = folder.join(&*path);
        }
        Ok(file)
    }
}

/// Completes what the command line says of the servers. Each of URLs, authorities and certificate is taken as a whole from
/// the first place that has it.
///
/// # Errors
/// The file is invalid, or no place says a URL.
pub(super) fn complete(urls: &[String], tls: &TlsSettings) -> Result<(Vec<String>, TlsSettings), Failure> {
    let said = variable(URL_VARIABLE).and_then(|urls| urls.into_string().ok());
    let said = said.map(|urls| urls.split_whitespace().map(str::to_owned).collect());
    fill(urls, tls, said.unwrap_or_default(), path_variable(CA_VARIABLE), HostFile::load()?)
}

fn fill(
    urls: &[String],
    tls: &TlsSettings,
    urls_variable: Vec<String>,
    ca_variable: Option<PathBuf>,
    file: HostFile,
) -> Result<(Vec<String>, TlsSettings), Failure> {
    let urls = [urls.to_vec(), urls_variable, file.urls].into_iter().find(|urls| !urls.is_empty());
    let urls = urls.ok_or_else(|| format!("say whom to ask: --url URL, or {URL_VARIABLE}, or `urls` in {FILE}"))?;
    let mut tls = tls.clone();
    if !urls.iter().any(|url| url.starts_with("https:")) {
        // Files that are not needed need not exist.
        return Ok((urls, tls));
    }
    if tls.ca.is_none() && !tls.system_ca {
        (tls.ca, tls.system_ca) = match ca_variable {
            Some(ca) => (Some(ca), false),
            None => (file.ca, file.system_ca),
        };
    }
    if tls.client_certificate.is_none() {
        (tls.client_certificate, tls.client_key) = (file.client_certificate, file.client_key);
    }
    Ok((urls, tls))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &str = "urls = [\"https://file\"]\nca = \"ca.pem\"\nclient_certificate = \"c\"\nclient_key = \"/k\"\n";

    fn file() -> HostFile {
        HostFile::parse(TEXT, Path::new("/etc/claviger-host/host.toml")).unwrap()
    }

    #[test]
    fn the_command_line_comes_before_the_environment_and_that_before_the_file() {
        let (none, some) = (TlsSettings::default(), |name: &str| Some(PathBuf::from(name)));
        let (urls, tls) = fill(&[], &none, Vec::new(), None, file()).unwrap();
        assert_eq!((urls, &tls.ca), (vec!["https://file".to_owned()], &some("/etc/claviger-host/ca.pem")));
        assert_eq!((tls.client_certificate, tls.client_key), (some("/etc/claviger-host/c"), some("/k")));
        let (urls, tls) = fill(&[], &none, vec!["https://variable".to_owned()], some("ca"), file()).unwrap();
        assert_eq!((urls, tls.ca), (vec!["https://variable".to_owned()], some("ca")));
        let given = TlsSettings { system_ca: true, ..TlsSettings::default() };
        let (urls, tls) =
            fill(&["https://option".to_owned()], &given, vec!["x".to_owned()], some("ca"), file()).unwrap();
        assert_eq!((urls, tls.ca), (vec!["https://option".to_owned()], None));
    }

    #[test]
    fn plain_http_needs_no_files_and_no_url_is_an_error() {
        let none = TlsSettings::default();
        let (_, tls) = fill(&["http://option".to_owned()], &none, Vec::new(), Some("ca".into()), file()).unwrap();
        assert_eq!(tls, none);
        let error = fill(&[], &none, Vec::new(), None, HostFile::default()).unwrap_err().to_string();
        assert!(error.contains("--url") && error.contains("CLAVIGER_URL") && error.contains("host.toml"), "{error}");
        assert!(HostFile::parse("url = \"x\"", Path::new("/x")).is_err());
    }
}
