//! `claviger host vm …`: the vault of a virtual machine, one file with its protector and its secrets. The format, and why a machine
//! is never lost, is in docs/vault.md; how a machine starts with it is in docs/linux.md.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use claviger_client::files::{self, Existing};
use claviger_client::host::Unwrapped;
use claviger_client::vault::file::{self, LockedVault};
use claviger_client::vault::format::{MAX_VAULT, Vault};
use claviger_client::vault::secrets::{MAX_VALUE, Secrets, check_name};
use claviger_client::vault::seen::Seen;
use claviger_protocol::describe::describe;
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

/// Where a host keeps which generation of each vault it has seen. Not below /run: it has to outlive a boot.
const SEEN_DIR: &str = "/var/lib/claviger-host/vaults";

/// The secret that every vault is made with: what the state of the machine's virtual TPM is encrypted with, as 64 hexadecimal
/// digits. swtpm reads them as its key, and libvirt as its passphrase.
const STATE_KEY: &str = "state-key";
/// Bytes of it, before they are digits.
const STATE_KEY_BYTES: usize = 32;

/// `claviger host vm …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make the vault of a new machine from its protector, and its virtual TPM if wanted
    #[command(after_help = format!(
        "Example: claviger host vm create --protector web-1.xml --vault web-1.vault --url https://hgs.example --ca hgs-ca.pem\n\
        The vault has a fresh secret {STATE_KEY}, for the virtual TPM. It is sealed with a fresh key that the service releases;\n\
        with --key FILE it is sealed with the protector's own key, and nobody is asked. Afterwards the vault is all that the\n\
        machine needs: keep it and its backups, and the protector and the key can go.\n{STATUSES}"))]
    Create {
        /// What it asks with.
        #[command(flatten)]
        online: Online,
        /// The owner's protector, made by claviger protector new
        #[arg(long, value_name = "FILE")]
        protector: PathBuf,
        /// The vault to write; one that is there is not written over
        #[arg(long, value_name = "FILE")]
        vault: PathBuf,
        /// The protector's transport key: nobody is asked for a release then
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Make the state of a virtual TPM with an endorsement certificate in this folder, which must not be there; needs swtpm_setup
        #[arg(long, value_name = "DIR")]
        tpm_state: Option<PathBuf>,
        /// The configuration of swtpm_setup, which names the authority of the certificate [default: that of swtpm_setup]
        #[arg(long, value_name = "FILE", requires = "tpm_state")]
        tpm_setup: Option<PathBuf>,
    },
    /// Open a vault for a start: get its secrets, and move it to a fresh key
    #[command(after_help = format!(
        "Example: claviger host vm open web-1.vault --url https://hgs.example --ca hgs-ca.pem -- \\\n    \
        swtpm socket --tpm2 --tpmstate dir=web-1.tpm --key fd={{state-key}},mode=aes-256-cbc --ctrl type=unixio,path=web-1.sock\n\
        The command replaces this process. Each {{NAME}} in its arguments becomes the number of a pipe with the secret NAME.\n\
        With --give NAME=FD the secret goes to a descriptor that the caller gave.\n\
        The vault that is sealed with the fresh key is on the disk before a secret is given out.\n{STATUSES}"))]
    #[command(group = clap::ArgGroup::new("to").required(true).multiple(true).args(["give", "command"]))]
    Open {
        /// What it asks with.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// Write the secret NAME to the file descriptor FD, 3 or higher: a pipe's; may be repeated
        #[arg(long, value_name = "NAME=FD", value_parser = parse_give)]
        give: Vec<Give>,
        /// Take a vault that is older than one that this host has seen: one that was restored from a backup
        #[arg(long)]
        accept_older: bool,
        /// The program to start with the secrets
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Show what a vault says without its key
    #[command(after_help = "Example: claviger host vm show web-1.vault\n\
        The names of its secrets are sealed, too; claviger host vm recover tells them to the owner.")]
    Show {
        /// The vault
        vault: PathBuf,
        /// Print JSON for machines
        #[arg(long)]
        json: bool,
    },
    /// Move a vault to a fresh key, or to another protector of its owner, without a start
    #[command(after_help = format!(
        "Example: claviger host vm rekey web-1.vault --protector web-1.new.xml --url https://hgs.example --ca hgs-ca.pem\n\
        With --protector the service has to release both: the vault's protector and the new one. The owner makes it, for\n\
        instance with claviger protector revoke.\n{STATUSES}"))]
    Rekey {
        /// What it asks with.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// The protector that takes over [default: the fresh one of the release]
        #[arg(long, value_name = "FILE")]
        protector: Option<PathBuf>,
        /// Take a vault that is older than one that this host has seen
        #[arg(long)]
        accept_older: bool,
    },
    /// Put one more secret into a vault, such as the key of a disk
    #[command(after_help = format!(
        "Example: claviger host vm add-secret web-1.vault disk-key --random 64 --url https://hgs.example --ca hgs-ca.pem\n\
        The vault moves to a fresh key, as in a start.\n{STATUSES}"))]
    #[command(group = clap::ArgGroup::new("value").required(true).args(["from", "random"]))]
    AddSecret {
        /// What it asks with.
        #[command(flatten)]
        online: Online,
        /// The vault
        vault: PathBuf,
        /// The secret's name: a-z, 0-9, '.', '_' and '-'
        name: String,
        /// A file or pipe with the secret, for its owner alone (0600); all of its bytes are the secret
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Make it of so many random bytes
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1..=2048))]
        random: Option<u16>,
        /// Write the random bytes as hexadecimal digits, for programs that want text
        #[arg(long, requires = "random")]
        hex: bool,
        /// Replace a secret of that name; the old one is lost
        #[arg(long)]
        replace: bool,
        /// Take a vault that is older than one that this host has seen
        #[arg(long)]
        accept_older: bool,
    },
    /// For the owner: open a vault without the service, get its secrets, or seal it for another protector
    #[command(
        after_help = "Example: claviger host vm recover web-1.vault --owner acme --give state-key=3 3>state-key\n\
        It asks nobody and changes nothing. Without --give it tells the names of the secrets. With --protector, --key and --out it\n\
        writes a vault for that protector: for another guardian, when the service or its keys are lost."
    )]
    Recover {
        /// The vault, or a backup of it
        vault: PathBuf,
        /// Folder of the owner's own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// Write the secret NAME to the file descriptor FD, 3 or higher; may be repeated
        #[arg(long, value_name = "NAME=FD", value_parser = parse_give)]
        give: Vec<Give>,
        /// The protector to seal it for
        #[arg(long, value_name = "FILE", requires_all = ["key", "out"])]
        protector: Option<PathBuf>,
        /// The transport key of --protector
        #[arg(long, value_name = "FILE", requires = "protector")]
        key: Option<PathBuf>,
        /// The vault to write; one that is there is not written over
        #[arg(long, value_name = "FILE", requires = "protector")]
        out: Option<PathBuf>,
        /// Print JSON for machines
        #[arg(long)]
        json: bool,
    },
}

/// What a command that needs a release asks with.
#[derive(Debug, clap::Args)]
pub struct Online {
    /// Where the keys are kept.
    #[command(flatten)]
    place: Place,
    /// What it attests with.
    #[command(flatten)]
    measured: Measured,
    /// Who is asked.
    #[command(flatten)]
    source: Source,
    /// Folder where this host keeps which generation of each vault it has seen
    #[arg(long, value_name = "DIR", default_value = SEEN_DIR)]
    seen: PathBuf,
}

impl Online {
    fn releases(&self) -> Result<Releases, Failure> {
        self.source.releases(&self.place, &self.measured)
    }

    /// The vault, locked; refused where this host has seen a newer one.
    fn lock(&self, vault: &Path, accept_older: bool) -> Result<(LockedVault, Seen), Failure> {
        let seen = Seen::new(&self.seen);
        let locked = LockedVault::lock(vault, self.source.timeout())?;
        if !accept_older {
            seen.check(locked.vault()).map_err(|e| format!("{}: {e}", vault.display()))?;
        }
        Ok((locked, seen))
    }

    /// The vault's present keys and protector, from the service.
    async fn unlock(&self, vault: &Path, accept_older: bool) -> Result<(LockedVault, Seen, Unwrapped), Failure> {
        let mut releases = self.releases()?;
        let (locked, seen) = self.lock(vault, accept_older)?;
        let released = releases.release(&locked.vault().protector).await?;
        Ok((locked, seen, released))
    }
}

impl Command {
    /// The descriptors that secrets go to, in the order of the command line.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = u32> {
        let give = match self {
            Self::Open { give, .. } | Self::Recover { give, .. } => &give[..],
            _ => &[],
        };
        give.iter().map(|give| give.fd)
    }
}

/// Runs `claviger host vm …`. `given` are the descriptors of [`Command::descriptors`], open.
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
        Command::Recover { vault, owner, give, protector, key, out, json } => {
            let target = protector.zip(key).zip(out).map(|((protector, key), out)| Target { protector, key, out });
            recover(&vault, &owner, &give, given, target.as_ref(), json)
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
    let made = Vault::create(&protector, &key, &secrets)?;
    // The vault comes last: a machine that has one is whole.
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
    // The standard output is the program's.
    note(&format!("{} is open, generation {}", vault.display(), next.generation));
    let (arguments, pipes) = fill_with_pipes(&template, &secrets)?;
    drop(secrets);
    // The pipes stay open until the program has taken this process over.
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
        say!("vault       {}", HEXLOWER.encode(&vault.id));
        say!("generation  {}", vault.generation);
        say!("protector   SHA-256 {}", HEXLOWER.encode(vault.protector_digest()));
        render::show(&description, &render::Opened::NotTried);
    }
    Ok(())
}

/// Where a recovered vault goes.
struct Target {
    protector: PathBuf,
    key: PathBuf,
    out: PathBuf,
}

fn recover(
    path: &Path,
    owner: &Path,
    wanted: &[Give],
    given: Vec<File>,
    target: Option<&Target>,
    json: bool,
) -> Result<(), Failure> {
    let owner = own_guardian::load(owner)?;
    let vault = Vault::parse(&files::read(path, MAX_VAULT)?).map_err(|e| format!("{}: {e}", path.display()))?;
    let key = owner.open(&vault.protector);
    let key = key.map_err(|e| format!("{}: {e}; is --owner the right folder?", path.display()))?;
    let secrets = vault.open(&key).map_err(|e| format!("{}: {e}", path.display()))?;
    let names: Vec<_> = wanted.iter().map(|give| give.name.clone()).collect();
    has_all(&secrets, &names)?;
    let mut sealed = None;
    if let Some(target) = target {
        let file = files::read(&target.protector, MAX_PROTECTOR)?;
        let key = key_of(&file, &target.protector, &target.key)?;
        let next = vault.successor(&file, &key, &secrets)?;
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

/// The transport key in `file`, if it is that of the protector.
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
