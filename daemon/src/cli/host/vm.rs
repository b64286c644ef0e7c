//! `claviger host vm …`: the vault of a virtual machine, one file with its protector and its secrets. docs/vault.md
//! describes the format and why a machine is never lost; docs/linux.md describes the start of a machine.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use claviger_client::files::{self, Existing};
use claviger_client::host::Unwrapped;
use claviger_client::vault::file::{self, LockedVault};
use claviger_client::vault::format::{MAX_VAULT, Vault, check_machine};
use claviger_client::vault::secrets::{MAX_VALUE, Secrets, check_name};
use claviger_client::vault::seen::Seen;
use claviger_protocol::describe::describe;
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::{MAX_PROTECTOR, Protector, TRANSPORT_KEY_LEN, TransportKey, transport_key};
use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::handover::{Give, Template, fill_with_pipes, give, has_all, parse_give};
use super::options::{Measured, Place, Releases, STATUSES, Source, read_protector};
use super::vtpm;
use crate::cli::tenant::{own_guardian, render};
use crate::sys::failure::Failure;
use crate::sys::print::{note, say};

/// Folder in which a host records the newest generation of each vault. Not below /run, because the records must survive
/// a reboot.
const SEEN_DIR: &str = "/var/lib/claviger-host/vaults";

/// The secret that every new vault contains: 64 hexadecimal digits that encrypt the state of the machine's virtual TPM.
/// swtpm uses them as its key, libvirt as its passphrase.
const STATE_KEY: &str = "state-key";
/// Length of this secret in bytes, before the hexadecimal encoding.
const STATE_KEY_BYTES: usize = 32;

/// `claviger host vm …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Create the vault of a new machine from its protector, and optionally its virtual TPM
    #[command(after_help = format!(
        "Example: claviger host vm create --protector web-1.xml --vault web-1.vault --url https://hgs.example --ca hgs-ca.pem\n\
        The vault has a fresh secret {STATE_KEY}, for the virtual TPM. It is sealed with a fresh key that the service releases;\n\
        with --key FILE it is sealed with the protector's own key, and nobody is asked. Afterwards the vault is all that the\n\
        machine needs: keep it and its backups, and the protector and the key can go.\n{STATUSES}"))]
    Create {
        /// Options for a release.
        #[command(flatten)]
        online: Online,
        /// The owner's protector, from claviger protector new
        #[arg(long, value_name = "FILE")]
        protector: PathBuf,
        /// File for the vault; an existing file is not overwritten
        #[arg(long, value_name = "FILE")]
        vault: PathBuf,
        /// The protector's transport key; then no release is needed
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Also create a virtual TPM with an endorsement certificate: its state goes to this folder, which must not
        /// exist; needs swtpm_setup
        #[arg(long, value_name = "DIR")]
        tpm_state: Option<PathBuf>,
        /// Configuration of swtpm_setup, which names the authority of the certificate [default: the one of swtpm_setup]
        #[arg(long, value_name = "FILE", requires = "tpm_state")]
        tpm_setup: Option<PathBuf>,
    },
    /// Open a vault to start a machine: get its secrets, and seal it with a fresh key
    #[command(after_help = format!(
        "Example: claviger host vm open web-1.vault --url https://hgs.example --ca hgs-ca.pem -- \\\n    \
        swtpm socket --tpm2 --tpmstate dir=web-1.tpm --key fd={{state-key}},mode=aes-256-cbc --ctrl type=unixio,path=web-1.sock\n\
        The command replaces this process. Each {{NAME}} in its arguments becomes the number of a pipe with the secret NAME.\n\
        With --give NAME=FD the secret goes to a descriptor that the caller gave.\n\
        The vault that is sealed with the fresh key is on the disk before a secret is given out.\n{STATUSES}"))]
    #[command(group = clap::ArgGroup::new("to").required(true).multiple(true).args(["give", "command"]))]
    Open {
        /// Options for a release.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// Write the secret NAME to file descriptor FD, 3 or higher, usually a pipe; may be repeated
        #[arg(long, value_name = "NAME=FD", value_parser = parse_give)]
        give: Vec<Give>,
        /// Accept a vault that is older than this host's record of it, for example from a backup
        #[arg(long)]
        accept_older: bool,
        /// The program to start with the secrets
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Show the parts of a vault that need no key
    #[command(after_help = "Example: claviger host vm show web-1.vault\n\
        The names of its secrets are sealed, too; claviger host vm recover tells them to the owner.")]
    Show {
        /// The vault
        vault: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Seal a vault with a fresh key, or for another protector of its owner, without starting the machine
    #[command(after_help = format!(
        "Example: claviger host vm rekey web-1.vault --protector web-1.new.xml --url https://hgs.example --ca hgs-ca.pem\n\
        With --protector the service has to release both: the vault's protector and the new one. The owner makes it, for\n\
        instance with claviger protector revoke.\n{STATUSES}"))]
    Rekey {
        /// Options for a release.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// The new protector [default: the one that the release returns]
        #[arg(long, value_name = "FILE")]
        protector: Option<PathBuf>,
        /// Accept a vault that is older than this host's record of it
        #[arg(long)]
        accept_older: bool,
    },
    /// Add a secret to a vault, for example the key of a disk
    #[command(after_help = format!(
        "Example: claviger host vm add-secret web-1.vault disk-key --random 64 --url https://hgs.example --ca hgs-ca.pem\n\
        The vault moves to a fresh key, as in a start.\n{STATUSES}"))]
    #[command(group = clap::ArgGroup::new("value").required(true).args(["from", "random"]))]
    AddSecret {
        /// Options for a release.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// The secret's name: a-z, 0-9, '.', '_' and '-'
        name: String,
        /// File or pipe with the secret, readable for its owner only (0600); all of its bytes are the secret
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Generate this many random bytes
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1..=2048))]
        random: Option<u16>,
        /// Store the random bytes as hexadecimal digits, for programs that need text
        #[arg(long, requires = "random")]
        hex: bool,
        /// Replace an existing secret of this name; its old value is lost
        #[arg(long)]
        replace: bool,
        /// Accept a vault that is older than this host's record of it
        #[arg(long)]
        accept_older: bool,
    },
    /// For the owner: open a vault without the service to get its secrets, or to seal it for another protector
    #[command(
        after_help = "Example: claviger host vm recover web-1.vault --owner acme --give state-key=3 3>state-key\n\
        It asks nobody and changes nothing. Without --give it tells the names of the secrets. With --protector, --key and --out it\n\
        writes a vault for that protector: for another guardian, when the service or its keys are lost. With --also it brings\n\
        two copies together again that were both opened."
    )]
    Recover {
        /// The vault, or a backup of it
        vault: PathBuf,
        /// Another copy of the vault: secrets that only this copy has are taken, too
        #[arg(long, value_name = "VAULT")]
        also: Option<PathBuf>,
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// Write the secret NAME to file descriptor FD, 3 or higher; may be repeated
        #[arg(long, value_name = "NAME=FD", value_parser = parse_give)]
        give: Vec<Give>,
        /// The protector for the new vault
        #[arg(long, value_name = "FILE", requires_all = ["key", "out"])]
        protector: Option<PathBuf>,
        /// The transport key of --protector
        #[arg(long, value_name = "FILE", requires = "protector")]
        key: Option<PathBuf>,
        /// File for the new vault; an existing file is not overwritten
        #[arg(long, value_name = "FILE", requires = "protector")]
        out: Option<PathBuf>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
}

/// Options of commands that need a release.
#[derive(Debug, clap::Args)]
pub struct Online {
    /// Location of the keys.
    #[command(flatten)]
    place: Place,
    /// TPM settings.
    #[command(flatten)]
    measured: Measured,
    /// The source of the release.
    #[command(flatten)]
    source: Source,
    /// Folder in which this host records the newest generation of each vault
    #[arg(long, value_name = "DIR", default_value = SEEN_DIR)]
    seen: PathBuf,
    /// Name of the machine. The vault of another machine is refused [default: the vault's file name without .vault]
    #[arg(long, value_name = "NAME")]
    machine: Option<String>,
}

impl Online {
    fn releases(&self) -> Result<Releases, Failure> {
        self.source.releases(&self.place, &self.measured)
    }

    /// The name of the machine: the given one, or that of the vault's file.
    fn machine(&self, vault: &Path) -> Result<String, Failure> {
        if let Some(name) = &self.machine {
            check_machine(name)?;
            return Ok(name.clone());
        }
        let file = vault.file_name().unwrap_or_default().to_string_lossy();
        let name = file.strip_suffix(".vault").unwrap_or(&file);
        check_machine(name).map_err(|e| format!("{}: {e}; use --machine NAME", vault.display()))?;
        Ok(name.to_owned())
    }

    /// Locks the vault. Fails if it is that of another machine, or if this host has seen a newer generation.
    fn lock(&self, vault: &Path, accept_older: bool) -> Result<(LockedVault, Seen), Failure> {
        let seen = Seen::new(&self.seen);
        let locked = LockedVault::lock(vault, self.source.timeout())?;
        let (machine, wanted) = (&locked.vault().machine, self.machine(vault)?);
        if *machine != wanted {
            return Err(format!(
                "{}: it is the vault of the machine {machine}, not of {wanted}. Has it been put in the wrong place? If {machine} is to \
                 start, use --machine {machine}",
                vault.display()
            )
            .into());
        }
        if !accept_older {
            seen.check(locked.vault()).map_err(|e| format!("{}: {e}", vault.display()))?;
        }
        Ok((locked, seen))
    }

    /// Requests the vault's current keys and protector.
    async fn unlock(&self, vault: &Path, accept_older: bool) -> Result<(LockedVault, Seen, Unwrapped), Failure> {
        let mut releases = self.releases()?;
        let (locked, seen) = self.lock(vault, accept_older)?;
        let released = releases.release(&locked.vault().protector).await?;
        Ok((locked, seen, released))
    }
}

impl Command {
    /// The descriptors for secrets, in the order of the command line.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = u32> {
        let give = match self {
            Self::Open { give, .. } | Self::Recover { give, .. } => &give[..],
            _ => &[],
        };
        give.iter().map(|give| give.fd)
    }
}

/// Runs `claviger host vm …`. `given` are the open descriptors of [`Command::descriptors`].
pub(super) async fn run(command: Command, given: Vec<File>) -> Result<(), Failure> {
    match command {
        Command::Create { online, protector, vault, key, tpm_state, tpm_setup } => {
            let tpm = tpm_state.map(|folder| vtpm::NewState { folder, setup: tpm_setup });
            create(&online, &protector, &vault, key.as_deref(), tpm.as_ref()).await
        }
        Command::Open { online, vault, give, accept_older, command } => {
            open(&online, &vault, &give, given, accept_older, &command).await
        }
        Command::Show { vault, json } => show(&vault, json),
        Command::Rekey { online, vault, protector, accept_older } => {
            rekey(&online, &vault, protector.as_deref(), accept_older).await
        }
        Command::AddSecret { online, vault, name, from, random, hex, replace, accept_older } => {
            check_name(&name)?;
            let value = match (from, random) {
                (Some(file), _) => files::read_secret(&file, MAX_VALUE)?,
                (None, Some(bytes)) if hex => random_hex(bytes.into())?,
                (None, Some(bytes)) => random_bytes(bytes.into())?,
                (None, None) => return Err("say what the secret is: --from FILE or --random BYTES".into()),
            };
            let (locked, seen, released) = online.unlock(&vault, accept_older).await?;
            let (next, _) = locked.exchange(&released, &seen, |secrets| secrets.add(&name, value, replace))?;
            report(&online, &vault, &next, &format!("has the secret {name} now"));
            Ok(())
        }
        Command::Recover { vault, also, owner, give, protector, key, out, json } => {
            let target = protector.zip(key).zip(out).map(|((protector, key), out)| Target { protector, key, out });
            recover(&vault, also.as_deref(), &owner, &give, given, target.as_ref(), json)
        }
    }
}

async fn create(
    online: &Online,
    protector: &Path,
    vault: &Path,
    key: Option<&Path>,
    tpm: Option<&vtpm::NewState>,
) -> Result<(), Failure> {
    files::must_be_new(vault)?;
    let machine = online.machine(vault)?;
    tpm.map_or(Ok(()), vtpm::NewState::check)?;
    let file = read_protector(protector)?;
    let (protector, key) = match key {
        Some(key) => {
            let key = key_of(&file, protector, key)?;
            (file, key)
        }
        None => {
            let released = online.releases()?.release(&file).await?;
            (released.egress_protector, released.keys.egress)
        }
    };
    let mut secrets = Secrets::default();
    secrets.add(STATE_KEY, random_hex(STATE_KEY_BYTES)?, false)?;
    let made = Vault::create(&machine, &protector, &key, &secrets)?;
    // Write the vault last, so that a machine with a vault is complete.
    if let Some(tpm) = tpm {
        tpm.make(secrets.get(STATE_KEY)?)?;
    }
    let kept = file::create(vault, &made).map_err(Failure::from);
    let kept = kept.and_then(|()| Ok(Seen::new(&online.seen).keep(&made)?));
    if let (Err(_), Some(tpm)) = (&kept, tpm)
        && !vault.exists()
    {
        tpm.remove();
    }
    kept?;
    report(online, vault, &made, "is made");
    Ok(())
}

async fn open(
    online: &Online,
    vault: &Path,
    wanted: &[Give],
    given: Vec<File>,
    accept_older: bool,
    command: &[OsString],
) -> Result<(), Failure> {
    let template = Template(command);
    let mut names = template.names();
    names.extend(wanted.iter().map(|give| give.name.clone()));
    let (locked, seen, released) = online.unlock(vault, accept_older).await?;
    let (next, secrets) = locked.exchange(&released, &seen, |secrets| has_all(secrets, &names))?;
    drop(released);
    give(&secrets, wanted, given)?;
    if command.is_empty() {
        report(online, vault, &next, "is open");
        return Ok(());
    }
    // Standard output belongs to the program.
    note(&format!("{} is open, generation {}", vault.display(), next.generation));
    let (arguments, pipes) = fill_with_pipes(&template, &secrets)?;
    drop(secrets);
    // Keep the pipes open until the program has replaced this process.
    let failed = Program::new(&arguments[0]).args(&arguments[1..]).exec();
    drop(pipes);
    Err(format!("{} cannot be started: {failed}; the vault is open for the next try", arguments[0].display()).into())
}

async fn rekey(online: &Online, vault: &Path, protector: Option<&Path>, accept_older: bool) -> Result<(), Failure> {
    let next = match protector {
        None => {
            let (locked, seen, released) = online.unlock(vault, accept_older).await?;
            locked.exchange(&released, &seen, |_| Ok(()))?.0
        }
        Some(protector) => {
            let file = read_protector(protector)?;
            let (locked, seen, old) = online.unlock(vault, accept_older).await?;
            let new = online.releases()?.release(&file).await?;
            locked.move_to(&old, &new, &seen)?
        }
    };
    report(online, vault, &next, "has a fresh key");
    Ok(())
}

fn report(online: &Online, path: &Path, vault: &Vault, what: &str) {
    if online.place.json {
        say!("{:#}", about(path, vault));
    } else {
        say!("{} {what}, generation {}", path.display(), vault.generation);
    }
}

fn about(path: &Path, vault: &Vault) -> Value {
    json!({
        "vault": path.display().to_string(),
        "id": HEXLOWER.encode(&vault.id),
        "machine": vault.machine,
        "generation": vault.generation,
        "protector_sha256": HEXLOWER.encode(vault.protector_digest()),
    })
}

fn show(path: &Path, json: bool) -> Result<(), Failure> {
    let vault = file::read(path)?;
    let description = describe(&vault.protector);
    if json {
        let mut shown = about(path, &vault);
        shown["protector"] = render::to_json(&description, &render::Opened::NotTried);
        say!("{shown:#}");
    } else {
        say!("machine     {}", vault.machine);
        say!("vault       {}", HEXLOWER.encode(&vault.id));
        say!("generation  {}", vault.generation);
        say!("protector   SHA-256 {}", HEXLOWER.encode(vault.protector_digest()));
        render::show(&description, &render::Opened::NotTried);
    }
    Ok(())
}

/// The destination of a recovered vault.
struct Target {
    protector: PathBuf,
    key: PathBuf,
    out: PathBuf,
}

fn recover(
    path: &Path,
    also: Option<&Path>,
    owner: &Path,
    wanted: &[Give],
    given: Vec<File>,
    target: Option<&Target>,
    json: bool,
) -> Result<(), Failure> {
    let owner = own_guardian::load(owner)?;
    let (vault, mut secrets) = open_as_owner(path, &owner)?;
    let mut newest = vault.generation;
    if let Some(also) = also {
        let (other, more) = open_as_owner(also, &owner)?;
        if other.id != vault.id {
            let text = format!("{} is the vault of the machine {}, and no copy of", also.display(), other.machine);
            return Err(format!("{text} {}", path.display()).into());
        }
        newest = newest.max(other.generation);
        for name in secrets.merge(&more)? {
            note(&format!("both have a secret {name}, and not the same; that of {} is taken", path.display()));
        }
    }
    let names: Vec<_> = wanted.iter().map(|give| give.name.clone()).collect();
    has_all(&secrets, &names)?;
    let mut sealed = None;
    if let Some(target) = target {
        let file = files::read(&target.protector, MAX_PROTECTOR)?;
        let key = key_of(&file, &target.protector, &target.key)?;
        let next = vault.successor_beyond(newest, &file, &key, &secrets)?;
        files::write(&target.out, &next.to_bytes(), Existing::Keep)?;
        sealed = Some((&target.out, next));
    }
    give(&secrets, wanted, given)?;
    if json {
        let mut shown = about(path, &vault);
        shown["secrets"] = secrets.names().collect::<Vec<_>>().into();
        shown["sealed"] = sealed.map(|(out, next)| about(out, &next)).into();
        say!("{shown:#}");
    } else {
        say!("{} opens, generation {}; its secrets:", path.display(), vault.generation);
        secrets.names().for_each(|name| say!("  {name}"));
        if let Some((out, next)) = sealed {
            say!("wrote {}, generation {}", out.display(), next.generation);
        }
    }
    Ok(())
}

fn open_as_owner(path: &Path, owner: &Owner) -> Result<(Vault, Secrets), Failure> {
    let vault = Vault::parse(&files::read(path, MAX_VAULT)?).map_err(|e| format!("{}: {e}", path.display()))?;
    let key = owner.open(&vault.protector);
    let key = key.map_err(|e| format!("{}: {e}; is --owner the right folder?", path.display()))?;
    let secrets = vault.open(&key).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok((vault, secrets))
}

/// Reads the transport key in `file` and checks that it belongs to the protector.
fn key_of(protector: &[u8], name: &Path, file: &Path) -> Result<TransportKey, Failure> {
    let bytes = files::read_secret(file, TRANSPORT_KEY_LEN)?;
    let key = transport_key(&bytes).ok_or_else(|| {
        format!("{}: a transport key has {TRANSPORT_KEY_LEN} bytes; claviger protector open writes it", file.display())
    })?;
    let parsed = Protector::parse(protector).map_err(|e| format!("{}: {}", name.display(), e.message))?;
    if !parsed.transport_key_signature.verify(&key, &parsed.signed_octets) {
        return Err(format!("{} is not the key of {}", file.display(), name.display()).into());
    }
    Ok(key)
}

fn random_bytes(length: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut bytes = Zeroizing::new(vec![0; length]);
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system has no randomness")?;
    Ok(bytes)
}

fn random_hex(length: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let bytes = random_bytes(length)?;
    let mut digits = Zeroizing::new(vec![0; 2 * length]);
    HEXLOWER.encode_mut(&bytes, &mut digits);
    Ok(digits)
}
