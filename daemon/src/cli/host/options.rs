//! Options that the host commands share: location of the keys, TPM, service, and explanations of failures.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger_client::agent::client as agent;
use claviger_client::failover::{Services, ServicesError};
use claviger_client::files::{self, FileError};
use claviger_client::host::{HostError, Unwrapped};
use claviger_client::host_files::{Folder, StoreError};
use claviger_client::http::TlsSettings;
use claviger_client::tpm::{self, TpmPlace};
use claviger_protocol::protector::{MAX_PROTECTOR, Protector};
use rustix::fs::OFlags;

use super::defaults;
use crate::sys::failure::Failure;

/// Default folder of host keys, and default folder for hosts that attest with a TPM.
const DIR: &str = "/var/lib/claviger-host";
const VOLATILE_DIR: &str = "/run/claviger-host";

/// Keys never go to standard input, output or error.
pub(super) const FIRST_FD: u32 = 3;

pub(super) const STATUSES: &str =
    "Exit status: 0 done, 1 refused or failed, 2 wrong usage, 75 worth trying again later.";

/// The folder with a host's keys and health certificate.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// Folder of this host's keys and its health certificate [default: /var/lib/claviger-host]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    pub(super) json: bool,
}

impl Place {
    pub(super) fn folder(&self, measured: bool) -> Folder {
        folder(self.dir.clone(), measured)
    }
}

/// The folder of the host's keys: the given one, or the default.
pub(super) fn folder(said: Option<PathBuf>, measured: bool) -> Folder {
    let usual = if measured { VOLATILE_DIR } else { DIR };
    Folder::new(said.unwrap_or_else(|| usual.into()))
}

/// The host's TPM.
#[derive(Clone, Debug, clap::Args)]
pub struct Measured {
    /// Attest with this host's TPM instead of a host key: a device, or the socket of a software TPM [default:
    /// /dev/tpmrm0]. Then --dir has to be on a tmpfs and is /run/claviger-host by default
    #[arg(long, value_name = "DEVICE", num_args = 0..=1, default_missing_value = tpm::DEVICE)]
    pub(super) tpm: Option<PathBuf>,
    /// The event log of the current boot
    #[arg(long, value_name = "FILE", requires = "tpm", default_value = tpm::EVENT_LOG)]
    event_log: PathBuf,
}

impl Measured {
    pub(super) fn place(&self) -> Option<TpmPlace> {
        self.tpm.clone().map(|device| TpmPlace { device, log: self.event_log.clone() })
    }
}

/// The servers and the time limit.
#[derive(Clone, Debug, clap::Args)]
pub struct Service {
    /// URL of the service; repeat the option for further servers, which are tried in this order [default: $CLAVIGER_URL,
    /// or those of /etc/claviger-host/host.toml]
    #[arg(long = "url", value_name = "URL")]
    pub(super) urls: Vec<String>,
    /// TLS settings for servers and for this host.
    #[command(flatten)]
    pub(super) tls: TlsSettings,
    /// Time limit in seconds for the whole command, including all waits and all servers
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(super) timeout: u64,
}

impl Service {
    pub(super) fn of(&self, folder: Folder, measured: &Measured) -> Result<Services, Failure> {
        let (urls, tls) = defaults::complete(&self.urls, &self.tls)?;
        let services = Services::new(folder.clone(), measured.place(), &urls, &tls, Duration::from_secs(self.timeout));
        services.map_err(|error| explain(error, &folder, measured))
    }
}

/// The source of a vault's key.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Source {
    /// URL of the service; repeat the option for further servers, which are tried in this order [default: $CLAVIGER_URL,
    /// or those of /etc/claviger-host/host.toml]
    #[arg(long = "url", value_name = "URL")]
    urls: Vec<String>,
    /// TLS settings for servers and for this host.
    #[command(flatten)]
    tls: TlsSettings,
    /// Time limit in seconds for the whole command, including all waits and all servers
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Use this host's agent at this socket instead; it combines requests of many machines
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["urls", "ca"])]
    agent: Option<PathBuf>,
}

impl Source {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    pub(super) fn releases(&self, place: &Place, measured: &Measured) -> Result<Releases, Failure> {
        if let Some(socket) = &self.agent {
            return Ok(Releases::Agent { socket: socket.clone(), timeout: self.timeout() });
        }
        let (urls, tls) = defaults::complete(&self.urls, &self.tls)?;
        let folder = place.folder(measured.tpm.is_some());
        let services = Services::new(folder.clone(), measured.place(), &urls, &tls, self.timeout());
        let services = Box::new(services.map_err(|error| explain(error, &folder, measured))?);
        Ok(Releases::Service { services, folder, measured: measured.clone() })
    }
}

/// The source of releases.
pub(super) enum Releases {
    /// This process contacts the servers.
    Service { services: Box<Services>, folder: Folder, measured: Measured },
    /// The agent of this host contacts them.
    Agent { socket: PathBuf, timeout: Duration },
}

impl Releases {
    /// Releases a protector: returns both transport keys and the new protector.
    pub(super) async fn release(&mut self, protector: &[u8]) -> Result<Unwrapped, Failure> {
        match self {
            Self::Service { services, folder, measured } => {
                let released = services.unwrap(protector).await;
                Ok(released.map_err(|error| explain(error.into(), folder, measured))?.unwrapped)
            }
            Self::Agent { socket, timeout } => {
                let released = agent::release(socket, protector, *timeout).await;
                released.map_err(|error| match error {
                    error if error.is_temporary() => TryLater(error.to_string()).into(),
                    error => error.into(),
                })
            }
        }
    }
}

/// A failure after which the same command may succeed later.
#[derive(Debug, thiserror::Error)]
#[error("{0}; nobody could serve in time, try again later")]
pub(super) struct TryLater(String);

/// Opens a descriptor a second time, because taking ownership of a raw number would need unsafe code.
pub(super) fn descriptor(option: &str, fd: u32) -> Result<File, Failure> {
    // Without this flag, opening a pipe without a reader would block; with it, this is an error.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let open = OpenOptions::new().write(true).custom_flags(flags).open(format!("/proc/self/fd/{fd}"));
    open.map_err(|e| unfit(option, fd, &e))
}

/// Fails if this process did not get the descriptor from its parent.
pub(super) fn check_given(option: &str, fd: u32) -> Result<(), Failure> {
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).map(drop).map_err(|error| unfit(option, fd, &error))
}

fn unfit(option: &str, fd: u32, error: &std::io::Error) -> Failure {
    format!("--{option} {fd} cannot be written to: {error}; give a pipe that is read, or --key-file").into()
}

pub(super) fn read_protector(path: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = files::read(path, MAX_PROTECTOR)?.to_vec();
    Protector::parse(&bytes).map_err(|e| format!("{}: {}", path.display(), e.message))?;
    Ok(bytes)
}

/// Adds a remedy to the error.
pub(super) fn explain(error: ServicesError, folder: &Folder, measured: &Measured) -> Failure {
    match error {
        error if error.is_temporary() => TryLater(error.to_string()).into(),
        ServicesError::Host(HostError::Attestation { status: 403, reply, retry_after }) if measured.tpm.is_some() => {
            let how = match reply.name.as_str() {
                "UnauthorizedErrorReply" => {
                    "register this host where the service runs, by what claviger host ek writes"
                }
                _ => "where the service runs, claviger hosts check NAME says what differs",
            };
            format!("{}; {how}", HostError::Attestation { status: 403, reply, retry_after }).into()
        }
        ServicesError::Host(HostError::Attestation { status: 403, reply, retry_after }) => {
            let public = folder.public_key_file();
            let error = HostError::Attestation { status: 403, reply, retry_after };
            let how = format!("claviger hosts add NAME --public-key {}", public.display());
            format!(
                "{error}; where the service runs, claviger hosts list shows registered and disabled hosts; a host that is to be \
                 trusted is registered there: {how}"
            )
            .into()
        }
        ServicesError::Store(error @ StoreError::File(FileError::Io { .. })) => {
            format!("{error}; this host's files have to be readable and writable for this command").into()
        }
        error => error.into(),
    }
}
