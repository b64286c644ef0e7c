//! What the commands of a host have in common: where its keys are, what it attests with, whom it asks, and what to say when that
//! fails.

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

use crate::sys::failure::Failure;

/// Where hosts keep their keys, and where those do that attest by their TPM.
const DIR: &str = "/var/lib/claviger-host";
const VOLATILE_DIR: &str = "/run/claviger-host";

/// Standard input, output and error are no places for keys.
pub(super) const FIRST_FD: u32 = 3;

pub(super) const STATUSES: &str =
    "Exit status: 0 done, 1 refused or failed, 2 wrong usage, 75 worth trying again later.";

/// Where a host keeps its keys and its health certificate.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// Folder of this host's keys and its health certificate [default: /var/lib/claviger-host]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON for machines
    #[arg(long)]
    pub(super) json: bool,
}

impl Place {
    pub(super) fn folder(&self, measured: bool) -> Folder {
        folder(self.dir.clone(), measured)
    }
}

/// The folder of the host's keys: the one that is said, or else the usual one.
pub(super) fn folder(said: Option<PathBuf>, measured: bool) -> Folder {
    let usual = if measured { VOLATILE_DIR } else { DIR };
    Folder::new(said.unwrap_or_else(|| usual.into()))
}

/// The host's TPM.
#[derive(Clone, Debug, clap::Args)]
pub struct Measured {
    /// Attest by this host's TPM instead of a host key: a device, or the socket of a TPM in software [default: /dev/tpmrm0].
    /// --dir has to be on a tmpfs then, and is /run/claviger-host by default
    #[arg(long, value_name = "DEVICE", num_args = 0..=1, default_missing_value = tpm::DEVICE)]
    pub(super) tpm: Option<PathBuf>,
    /// The event log of this boot
    #[arg(long, value_name = "FILE", requires = "tpm", default_value = tpm::EVENT_LOG)]
    event_log: PathBuf,
}

impl Measured {
    pub(super) fn place(&self) -> Option<TpmPlace> {
        self.tpm.clone().map(|device| TpmPlace { device, log: self.event_log.clone() })
    }
}

/// The servers, and how long they may take.
#[derive(Clone, Debug, clap::Args)]
pub struct Service {
    /// The service's URL; again for each further one, in the order in which they are to be tried
    #[arg(long = "url", value_name = "URL", required = true)]
    pub(super) urls: Vec<String>,
    /// How they prove themselves, and this host to them.
    #[command(flatten)]
    pub(super) tls: TlsSettings,
    /// Seconds for all of it, with every wait and every server
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(super) timeout: u64,
}

impl Service {
    pub(super) fn of(&self, folder: Folder, measured: &Measured) -> Result<Services, ServicesError> {
        Services::new(folder, measured.place(), &self.urls, &self.tls, Duration::from_secs(self.timeout))
    }
}

/// Who releases the key of a vault.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Source {
    /// The service's URL; again for each further one, in the order in which they are to be tried
    #[arg(long = "url", value_name = "URL")]
    urls: Vec<String>,
    /// How the servers prove themselves, and this host to them.
    #[command(flatten)]
    tls: TlsSettings,
    /// Seconds for all of it, with every wait and every server
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Ask the agent of this host behind this socket instead, which asks for many machines at once
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
        if self.urls.is_empty() {
            return Err("say whom to ask: --url URL, or --agent SOCKET".into());
        }
        let folder = place.folder(measured.tpm.is_some());
        let services = Services::new(folder.clone(), measured.place(), &self.urls, &self.tls, self.timeout());
        let services = Box::new(services.map_err(|error| explain(error, &folder, measured))?);
        Ok(Releases::Service { services, folder, measured: measured.clone() })
    }
}

/// Where releases come from.
pub(super) enum Releases {
    /// The servers, asked by this process.
    Service { services: Box<Services>, folder: Folder, measured: Measured },
    /// The agent of this host.
    Agent { socket: PathBuf, timeout: Duration },
}

impl Releases {
    /// Both transport keys of a protector, and the fresh protector.
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

/// Why a command failed that may succeed later.
#[derive(Debug, thiserror::Error)]
#[error("{0}; nobody could serve in time, try again later")]
pub(super) struct TryLater(String);

/// Opens the descriptor once more: taking it over by its number alone would take unsafe code.
pub(super) fn descriptor(option: &str, fd: u32) -> Result<File, Failure> {
    // Opening a pipe that has no reader would block; with this flag it is an error.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let open = OpenOptions::new().write(true).custom_flags(flags).open(format!("/proc/self/fd/{fd}"));
    open.map_err(|e| unfit(option, fd, &e))
}

/// Fails for a descriptor that this process was not given.
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

/// The error with what to do about it.
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
            format!("{error}; if this host is to be trusted, register it where the service runs: {how}").into()
        }
        ServicesError::Store(error @ StoreError::File(FileError::Io { .. })) => {
            format!("{error}; this host's files have to be readable and writable for this command").into()
        }
        error => error.into(),
    }
}
