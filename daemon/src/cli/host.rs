//! `claviger host …`: commands of a guarded host. docs/host.md describes its files and the order in which they are
//! written.

mod agent;
mod defaults;
mod handover;
mod options;
mod vm;
mod vtpm;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use claviger_client::files::{self, Existing};
use claviger_client::tpm::{self, TpmPlace};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::payload::Payload;
use claviger_protocol::protector::TRANSPORT_KEY_LEN;
use data_encoding::HEXLOWER;
use serde_json::json;
use zeroize::Zeroizing;

use super::table::date;
use super::target::rsa_bits;
use crate::sys::failure::Failure;
use crate::sys::print::say;

use options::{
    FIRST_FD, Measured, Place, STATUSES, Service, TryLater, check_given, descriptor, explain, read_protector,
};

/// `EX_TEMPFAIL` of sysexits.h.
const TRY_LATER: u8 = 75;
/// `claviger host …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Create this host's keys, and the file for its registration
    #[command(after_help = "Example: claviger host new-key --dir /var/lib/claviger-host\n\
        Then, where the service runs: claviger hosts add NAME --public-key hostkey.pub.pem")]
    NewKey {
        /// Location of the keys.
        #[command(flatten)]
        place: Place,
        /// Size of the keys
        #[arg(long, default_value_t = 3072, value_parser = rsa_bits)]
        bits: u32,
    },
    /// Write the file that registers this host in TPM mode: the endorsement key's certificate, or the bare key
    #[command(after_help = "Example: claviger host ek --out node-18.ek.pem\n\
        Then, where the service runs: claviger hosts add NAME --ek-certificate node-18.ek.pem, or, for a bare\n\
        key: claviger hosts add NAME --ek-public node-18.ek.pem --trust-ek")]
    Ek {
        /// The TPM: a device, or the socket of a software TPM
        #[arg(long, value_name = "DEVICE", default_value = tpm::DEVICE)]
        tpm: PathBuf,
        /// File to write, PEM; an existing file is not overwritten
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Attest this host, and store the health certificate
    #[command(after_help = format!("Example: claviger host attest --url https://hgs.example --ca hgs-ca.pem\n\
        With --tpm the host proves what it booted, where the service is in TPM mode.\n\
        A certificate that is kept and still good is not asked for again.\n{STATUSES}"))]
    Attest {
        /// Location of the keys.
        #[command(flatten)]
        place: Place,
        /// TPM settings.
        #[command(flatten)]
        measured: Measured,
        /// The service.
        #[command(flatten)]
        service: Service,
        /// Attest even if the stored certificate is still valid
        #[arg(long)]
        fresh: bool,
    },
    /// Exchange a virtual machine's protector for its keys and a new protector
    #[command(after_help = format!(
        "Example: claviger host unwrap --protector vm.xml --egress vm.next.xml --fd 3 --url http://hgs.example:8080\n\
        The keys are that of --protector, 32 bytes, then that of --egress, 32 bytes; with --ingress-fd and --egress-fd each \
        on its own. Seal the machine's secrets with the second one, then rename --egress over --protector and sync the \
        folder; until then the first one has to open them.\n\
        {STATUSES}"))]
    #[command(group = clap::ArgGroup::new("keys").required(true).args(["fd", "key_file", "ingress_fd"]))]
    Unwrap {
        /// Location of the keys.
        #[command(flatten)]
        place: Place,
        /// TPM settings.
        #[command(flatten)]
        measured: Measured,
        /// The service.
        #[command(flatten)]
        service: Service,
        /// The machine's protector; this file is not changed
        #[arg(long, value_name = "FILE")]
        protector: PathBuf,
        /// File for the new protector; replaced atomically
        #[arg(long, value_name = "FILE")]
        egress: PathBuf,
        /// File descriptor for both keys, 3 or higher; usually a pipe
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(i64::from(FIRST_FD)..))]
        fd: Option<u32>,
        /// File for both keys, readable for its owner only; preferably on a tmpfs
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// File descriptor for the key of --protector only
        #[arg(long, value_name = "N", requires = "egress_fd",
            value_parser = clap::value_parser!(u32).range(i64::from(FIRST_FD)..))]
        ingress_fd: Option<u32>,
        /// File descriptor for the key of --egress only
        #[arg(long, value_name = "N", requires = "ingress_fd",
            value_parser = clap::value_parser!(u32).range(i64::from(FIRST_FD)..))]
        egress_fd: Option<u32>,
        /// Format of the keys: raw, 32 bytes each; or hex, 64 digits and a line feed each
        #[arg(long, value_name = "FORMAT", default_value = "raw")]
        format: KeyFormat,
    },
    /// Create, open, show and change vaults: one file with the protector and secrets of a virtual machine
    #[command(subcommand, after_help = "Example: claviger host vm show /var/lib/claviger-host/web-1.vault")]
    Vm(vm::Command),
    /// Keep the health certificate fresh, and request releases for all machines of this host
    #[command(
        after_help = "Example: claviger host agent --socket /run/claviger-host/agent.sock --url https://hgs.example --ca hgs-ca.pem\n\
        Then: claviger host vm open web-1.vault --agent /run/claviger-host/agent.sock -- COMMAND\n\
        Releases of machines that start together go to the service in one request."
    )]
    Agent(agent::Agent),
}

/// The output format of a transport key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum KeyFormat {
    /// Raw bytes.
    Raw,
    /// Lower-case hexadecimal digits and a line feed.
    Hex,
}

/// The exit status for a failure.
#[must_use]
pub fn status(failure: &Failure) -> ExitCode {
    if failure.is::<TryLater>() { ExitCode::from(TRY_LATER) } else { ExitCode::FAILURE }
}

/// The destination of the keys.
#[derive(Debug)]
enum KeyTarget {
    /// A descriptor for both keys, one after the other; opened before the request.
    Open(File),
    /// A file for both keys, one after the other.
    File(PathBuf),
    /// A descriptor for each key; opened before the request.
    Each { ingress: File, egress: File },
}

/// A command with its open descriptors.
#[derive(Debug)]
pub struct Prepared {
    command: Command,
    keys: Option<KeyTarget>,
    /// Descriptors for secrets of a vault, in the order of the command line.
    given: Vec<File>,
}

/// Opens the descriptors for keys. Call it before the process opens other files.
///
/// # Errors
/// A descriptor was not passed to this process, or is not writable.
pub fn prepare(command: Command) -> Result<Prepared, Failure> {
    let keys = match &command {
        Command::Unwrap { fd: Some(fd), .. } => Some(KeyTarget::Open(descriptor("fd", *fd)?)),
        Command::Unwrap { key_file: Some(file), .. } => Some(KeyTarget::File(file.clone())),
        Command::Unwrap { ingress_fd: Some(ingress), egress_fd: Some(egress), .. } => {
            if ingress == egress {
                return Err("--ingress-fd and --egress-fd have to be different; --fd N takes both keys".into());
            }
            // Check both before opening one: opening uses the lowest free number, which may be the other descriptor's.
            check_given("ingress-fd", *ingress)?;
            check_given("egress-fd", *egress)?;
            let (ingress, egress) = (descriptor("ingress-fd", *ingress)?, descriptor("egress-fd", *egress)?);
            Some(KeyTarget::Each { ingress, egress })
        }
        _ => None,
    };
    let given = match &command {
        Command::Vm(command) => command.descriptors().map(|fd| descriptor("give", fd)).collect::<Result<_, _>>()?,
        _ => Vec::new(),
    };
    Ok(Prepared { command, keys, given })
}

/// Runs `claviger host …`.
///
/// # Errors
/// The problem and its remedy; `TryLater` if the same command may succeed later.
pub async fn run(prepared: Prepared) -> Result<(), Failure> {
    match prepared.command {
        Command::NewKey { place, bits } => new_key(&place, bits),
        Command::Ek { tpm, out, json } => ek(tpm, &out, json),
        Command::Attest { place, measured, service, fresh } => attest(&place, &measured, &service, fresh).await,
        Command::Unwrap { place, measured, service, protector, egress, format, .. } => {
            let keys = prepared
                .keys
                .ok_or("say where the keys go: --fd N, --key-file FILE, or --ingress-fd N and --egress-fd N")?;
            unwrap(&place, &measured, &service, &protector, &egress, (keys, format)).await
        }
        Command::Agent(options) => agent::run(options).await,
        Command::Vm(command) => vm::run(command, prepared.given).await,
    }
}

fn new_key(place: &Place, bits: u32) -> Result<(), Failure> {
    let (key, public) = place.folder(false).make_keys(bits)?;
    let digest = HEXLOWER.encode(&key.public().spki_sha256());
    let public = public.display().to_string();
    if place.json {
        say!("{:#}", json!({"key": digest, "public_key": public}));
    } else {
        say!("made host key {digest}");
        say!("register it where the service runs: claviger hosts add NAME --public-key {public}");
    }
    Ok(())
}

/// Writes the endorsement key of this host's TPM, for its registration.
fn ek(device: PathBuf, out: &Path, json: bool) -> Result<(), Failure> {
    files::must_be_new(out)?;
    let endorsement = tpm::endorsement(&TpmPlace { device, log: tpm::EVENT_LOG.into() })?;
    let certificate = endorsement.certificate.as_deref().map(Certificate::parse).transpose()?;
    let pem = certificate.as_ref().map_or_else(|| endorsement.key.to_pem(), Certificate::to_pem);
    files::write(out, pem.as_bytes(), Existing::Keep)?;
    let (key, file) = (HEXLOWER.encode(&endorsement.key.spki_sha256()), out.display().to_string());
    if json {
        say!("{:#}", json!({"key": key, "file": file, "certificate": certificate.is_some()}));
    } else if certificate.is_some() {
        say!("wrote the certificate of endorsement key {key}");
        say!("register it where the service runs: claviger hosts add NAME --ek-certificate {file}");
    } else {
        say!("wrote endorsement key {key}: this TPM has no certificate for it");
        say!("register it where the service runs: claviger hosts add NAME --ek-public {file} --trust-ek");
    }
    Ok(())
}

async fn attest(place: &Place, measured: &Measured, service: &Service, fresh: bool) -> Result<(), Failure> {
    let folder = place.folder(measured.tpm.is_some());
    let mut services = service.of(folder.clone(), measured)?;
    let health = if fresh { services.attest().await } else { services.health().await };
    let health = health.map_err(|error| explain(error, &folder, measured))?;
    let name = health.certificate.common_name().unwrap_or("this host");
    let until = health.certificate.not_after();
    if place.json {
        let file = folder.health_file().display().to_string();
        let report = json!({"host": name, "certificate": file, "not_after": until, "issued_by": health.issued_by});
        say!("{report:#}");
    } else {
        let from = health.issued_by.map_or_else(|| "kept".to_owned(), |server| format!("from {server}"));
        say!("{name} holds a health certificate until {} ({from})", date(until));
    }
    Ok(())
}

/// The new protector is on the disk before its key is given out, and the old protector is never changed. So the key of
/// the machine's secrets can be recovered after an interruption at any point.
async fn unwrap(
    place: &Place,
    measured: &Measured,
    service: &Service,
    protector: &Path,
    egress: &Path,
    (keys, format): (KeyTarget, KeyFormat),
) -> Result<(), Failure> {
    let folder = place.folder(measured.tpm.is_some());
    let clash = match &keys {
        KeyTarget::File(file) => [protector, egress].into_iter().any(|other| files::same_file(file, other)),
        KeyTarget::Open(_) | KeyTarget::Each { .. } => false,
    };
    if clash || files::same_file(protector, egress) {
        return Err(
            "--protector, --egress and --key-file have to be different files: the old protector is needed until \
            the machine's secrets are sealed with the new key"
                .into(),
        );
    }
    let file = read_protector(protector)?;
    let mut services = service.of(folder.clone(), measured)?;
    let released = services.unwrap(&file).await.map_err(|error| explain(error.into(), &folder, measured))?;
    files::write(egress, &released.unwrapped.egress_protector, Existing::Replace)?;
    hand_over(&released.unwrapped.keys, keys, format)?;
    let (server, api) = (released.server, released.api.as_str());
    if place.json {
        let report = json!({
            "server": server,
            "api": api,
            "attested": released.attested,
            "egress": egress.display().to_string(),
            "max_offline_unwraps": released.unwrapped.keys.max_offline_unwraps,
        });
        say!("{report:#}");
    } else {
        say!("{} unwrapped by {server} [{api}]; the fresh protector is {}", protector.display(), egress.display());
    }
    Ok(())
}

fn hand_over(keys: &Payload, target: KeyTarget, format: KeyFormat) -> Result<(), Failure> {
    let both = || Zeroizing::new([&written(&keys.ingress, format)[..], &written(&keys.egress, format)[..]].concat());
    match target {
        KeyTarget::Open(file) => write_out(file, &both()),
        KeyTarget::File(path) => Ok(files::write(&path, &both(), Existing::Replace)?),
        KeyTarget::Each { ingress, egress } => {
            write_out(ingress, &written(&keys.ingress, format))?;
            write_out(egress, &written(&keys.egress, format))
        }
    }
}

/// Encodes a key in the output format.
fn written(key: &[u8; TRANSPORT_KEY_LEN], format: KeyFormat) -> Zeroizing<Vec<u8>> {
    // Reserve enough memory: a growing vector would leave copies of the key behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * TRANSPORT_KEY_LEN + 1));
    match format {
        KeyFormat::Raw => bytes.extend_from_slice(key),
        KeyFormat::Hex => {
            bytes.resize(2 * TRANSPORT_KEY_LEN, 0);
            HEXLOWER.encode_mut(key, &mut bytes);
            bytes.push(b'\n');
        }
    }
    bytes
}

fn write_out(mut file: File, bytes: &[u8]) -> Result<(), Failure> {
    // A file, unlike a pipe, may report a full disk only later.
    let written = file.write_all(bytes).and_then(|()| match file.metadata()?.is_file() {
        true => file.sync_all(),
        false => Ok(()),
    });
    written.map_err(|e| format!("the keys could not be handed over: {e}; run it again").into())
}
