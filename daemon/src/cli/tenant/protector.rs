//! `claviger protector …`: the owner's operations on protectors.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use claviger_client::files::{self, Existing};
use claviger_process::output;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::describe::{Description, describe};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::{Owner, OwnerError};
use claviger_protocol::protector::MAX_PROTECTOR;
use serde_json::json;

use super::own_guardian;
use super::pinning::{Guardians, Trust, read_metadata};
use super::render::{self, Opened};
use crate::cli::table::plain;
use crate::sys::failure::Failure;
use crate::sys::print::say;
use crate::sys::process;

/// `claviger protector …`
#[derive(Debug, clap::Subcommand)]
pub enum Protector {
    /// Create a protector of a fresh transport key for yourself and your guardians
    #[command(after_help = "Example: claviger protector new --owner acme --guardian hgs --out vm.xml --key vm.key\n\
        The key file holds 32 octets that protect the virtual machine's secrets. The protector opens to the same key,\n\
        so the key file may be destroyed once it has been used.")]
    New {
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// An imported guardian that gets access; may be repeated
        #[arg(long, value_name = "NAME", required = true)]
        guardian: Vec<String>,
        /// The folder of imported guardians.
        #[command(flatten)]
        guardians: Guardians,
        /// File for the protector
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// File for the transport key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Show the content of a protector and which signatures are valid, even if the protector is invalid
    #[command(after_help = "Example: claviger protector show vm.xml\n\
        The exit status is 0 whatever it shows; claviger protector verify judges.")]
    Show {
        /// The protector
        file: PathBuf,
        /// Folder of your own guardian: also verifies the transport-key signature
        #[arg(long, value_name = "DIR")]
        owner: Option<PathBuf>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Give another guardian access; the transport key and the other wrappings stay the same
    #[command(
        after_help = "Example: claviger protector grant vm.xml --owner acme --guardian other-site --out vm-2.xml"
    )]
    Grant {
        /// The protector
        file: PathBuf,
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// An imported guardian
        #[arg(long, value_name = "NAME", required_unless_present = "metadata", conflicts_with = "metadata")]
        guardian: Option<String>,
        /// A guardian's metadata document, instead of an imported guardian; needs --pin or --trust-unpinned
        #[arg(long, value_name = "FILE")]
        metadata: Option<PathBuf>,
        /// How the document is trusted.
        #[command(flatten)]
        trust: Trust,
        /// The folder of imported guardians.
        #[command(flatten)]
        guardians: Guardians,
        /// File for the new protector
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Revoke a guardian: the others get a fresh transport key
    #[command(
        after_help = "Example: claviger protector revoke vm.xml --owner acme --guardian hgs --out new.xml --key new\n\
        Who had the old key still has it: the guardian, and every host that got it there, can open the old protector\n\
        and what the old key protects. So get the old key (claviger protector open), protect the virtual machine's\n\
        secrets with the new key instead, and then destroy the old ones with all their copies.\n\
        With a wrapping go those that it let in, and those with a key of its own."
    )]
    Revoke {
        /// The protector
        file: PathBuf,
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// An imported guardian; may be repeated
        #[arg(long, value_name = "NAME", required_unless_present = "wrapping")]
        guardian: Vec<String>,
        /// Id of a wrapping, as claviger protector show prints it; may be repeated
        #[arg(long, value_name = "ID")]
        wrapping: Vec<u32>,
        /// The folder of imported guardians.
        #[command(flatten)]
        guardians: Guardians,
        /// File for the new protector
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// File for the new transport key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Decrypt the transport key of a protector
    #[command(after_help = "Example: claviger protector open vm.xml --owner acme --out vm.key\n\
        All signatures are checked first. The key is 32 octets, not text.")]
    Open {
        /// The protector
        file: PathBuf,
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: PathBuf,
        /// File for the transport key
        #[arg(long, value_name = "FILE", required_unless_present = "stdout")]
        out: Option<PathBuf>,
        /// Write the transport key to standard output
        #[arg(long, conflicts_with = "out")]
        stdout: bool,
    },
    /// Verify all signatures of a protector: exit status 0 or 1
    #[command(after_help = "Example: claviger protector verify vm.xml --owner acme\n\
        A protector proves itself only as far as its owner's certificate is trusted. With --owner it has to be yours,\n\
        and the transport-key signature is checked, which nobody else can.")]
    Verify {
        /// The protector
        file: PathBuf,
        /// Folder of your own guardian
        #[arg(long, value_name = "DIR")]
        owner: Option<PathBuf>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
}

/// Runs `claviger protector …`.
///
/// # Errors
/// The problem and its remedy.
pub fn run(command: Protector) -> Result<ExitCode, Failure> {
    process::no_core_dumps()?;
    execute(command).map_err(|failure| plain(&failure.to_string()).into())
}

fn execute(command: Protector) -> Result<ExitCode, Failure> {
    match command {
        Protector::New { owner, guardian, guardians, out, key, json } => {
            writable(&[&out, &key])?;
            let owner = own_guardian::load(&owner)?;
            let metadata = guardian.iter().map(|name| guardians.load(name)).collect::<Result<Vec<_>, _>>()?;
            for (at, one) in metadata.iter().enumerate() {
                let twice = metadata[..at].iter().any(|other| other.encryption_key == one.encryption_key);
                if twice || one.encryption_key == *owner.encryption_key.public() {
                    let name = &guardian[at];
                    return Err(format!("{name} has the key of another one that is let in; leave it out").into());
                }
            }
            let (file, transport_key) = owner.create(&metadata).map_err(|error| explain(&out, error))?;
            files::write_both((&key, &transport_key[..]), (&out, &file))?;
            wrote(&file, json, &[("protector", &out), ("transport key, secret", &key)]);
        }
        Protector::Show { file, owner, json } => {
            let octets = read(&file)?;
            let opened = match owner {
                Some(dir) => try_to_open(&own_guardian::load(&dir)?, &octets),
                None => Opened::NotTried,
            };
            let description = describe(&octets);
            if json {
                say!("{:#}", render::to_json(&description, &opened))
            } else {
                render::show(&description, &opened)
            }
        }
        Protector::Grant { file, owner, guardian, metadata, trust, guardians, out, json } => {
            writable(&[&out])?;
            let octets = read(&file)?;
            let owner = own_guardian::load(&owner)?;
            let guardian = newcomer(guardian.as_deref(), metadata.as_deref(), &trust, &guardians)?;
            if has(&describe(&octets), &guardian) {
                return Err(format!("{} has a wrapping for that guardian already", file.display()).into());
            }
            let granted = owner.grant(&octets, &guardian).map_err(|error| explain(&file, error))?;
            files::write(&out, &granted, Existing::Keep)?;
            wrote(&granted, json, &[("protector", &out)]);
        }
        Protector::Revoke { file, owner, guardian, wrapping, guardians, out, key, json } => {
            writable(&[&out, &key])?;
            revoke(&file, &owner, &guardian, &wrapping, &guardians, (&out, &key), json)?;
        }
        Protector::Open { file, owner, out, stdout: _ } => {
            writable(out.as_deref().as_slice())?;
            let owner = own_guardian::load(&owner)?;
            let key = owner.open(&read(&file)?).map_err(|error| explain(&file, error))?;
            match out {
                Some(out) => {
                    files::write(&out, &key[..], Existing::Keep)?;
                    say!("wrote {} (transport key, secret)", out.display());
                }
                None => {
                    // Unbuffered: a buffer would leave a copy of the key in memory.
                    output::write_all(rustix::stdio::stdout(), &key[..])?;
                }
            }
        }
        Protector::Verify { file, owner, json } => return verify(&file, owner.as_deref(), json),
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    Ok(files::read(file, MAX_PROTECTOR)?.to_vec())
}

/// Fails if an output file exists, before anything is created.
fn writable(files: &[&Path]) -> Result<(), Failure> {
    if let [one, other] = files
        && one == other
    {
        return Err("the protector and the transport key need two files".into());
    }
    Ok(files.iter().try_for_each(|file| files::must_be_new(file))?)
}

/// Prints which files were written, and the content of the protector.
fn wrote(protector: &[u8], json: bool, written: &[(&str, &Path)]) {
    let description = describe(protector);
    if json {
        say!("{:#}", render::to_json(&description, &Opened::NotTried));
        return;
    }
    for (what, file) in written {
        say!("wrote {} ({what})", file.display());
    }
    for wrapping in &description.wrappings {
        let subject = wrapping.signing.as_ref().map(render::certificate_for_people).unwrap_or_default();
        let role = if wrapping.is_owner() { "owner" } else { "guardian" };
        say!("  wrapping {}: {role}, {subject}", wrapping.id.unwrap_or_default());
    }
}

fn explain(file: &Path, error: OwnerError) -> Failure {
    let hint = match &error {
        OwnerError::Protector(_) => "; claviger protector show tells more",
        OwnerError::NotOurs | OwnerError::NotOwner => "; is --owner the right folder?",
        OwnerError::Decrypt => "; it was made by somebody who did not have its key: do not use it",
        OwnerError::NoSuchGuardian => "; claviger protector show tells who has one",
        OwnerError::Full => "; revoke one that is not needed any more, or make another protector for the others",
        OwnerError::Sign | OwnerError::OwnerStays => "",
    };
    format!("{}: {error}{hint}", file.display()).into()
}

/// The guardian that gets access.
fn newcomer(
    name: Option<&str>,
    document: Option<&Path>,
    trust: &Trust,
    guardians: &Guardians,
) -> Result<Metadata, Failure> {
    let metadata = match (name, document) {
        (Some(name), _) => guardians.load(name)?,
        (None, Some(file)) => read_metadata(file)?.1,
        (None, None) => return Err("say which guardian: --guardian NAME or --metadata FILE".into()),
    };
    // An imported guardian was verified at its import. If a pin is given, it must match as well.
    if name.is_none() || trust.pin.is_some() {
        trust.judge(&metadata)?;
    }
    Ok(metadata)
}

fn has(description: &Description, guardian: &Metadata) -> bool {
    let theirs = |certificate: &Certificate| *certificate.key() == guardian.encryption_key;
    description.wrappings.iter().any(|wrapping| wrapping.encryption.as_ref().is_ok_and(theirs))
}

fn revoke(
    file: &Path,
    owner: &Path,
    names: &[String],
    ids: &[u32],
    guardians: &Guardians,
    (out, key): (&Path, &Path),
    json: bool,
) -> Result<(), Failure> {
    let octets = read(file)?;
    let owner = own_guardian::load(owner)?;
    let mut chosen = Vec::new();
    for name in names {
        let metadata = guardians.load(name)?;
        let signing = super::pinning::signing_certificate(&metadata)?;
        chosen.push((name, signing.key().clone(), metadata.encryption_key));
    }
    // Check each guardian separately. Otherwise a guardian without a wrapping would go unnoticed among several.
    let description = describe(&octets);
    let missing = ids.iter().find(|id| !description.wrappings.iter().any(|w| w.id == Some(**id)));
    if let (Ok(()), Some(id)) = (&description.verdict, missing) {
        return Err(
            format!("{}: no wrapping has the Id {id}; claviger protector show tells them", file.display()).into()
        );
    }
    for (name, signing, encryption) in &chosen {
        let theirs = description.wrappings.iter().any(|w| {
            w.signing.as_ref().is_ok_and(|c| c.key() == signing)
                || w.encryption.as_ref().is_ok_and(|c| c.key() == encryption)
        });
        if description.verdict.is_ok() && !theirs {
            return Err(format!(
                "{}: no wrapping is for {name}; claviger protector show tells who has one",
                file.display()
            )
            .into());
        }
    }
    let revoked = owner.revoke(&octets, |id, party| {
        let theirs = |(_, signing, encryption): &(_, _, _)| {
            party.signing.key() == signing || party.encryption.key() == encryption
        };
        ids.contains(&id) || chosen.iter().any(theirs)
    });
    let revoked = revoked.map_err(|error| explain(file, error))?;
    files::write_both((key, &revoked.key[..]), (out, &revoked.file))?;
    if !json {
        let gone: Vec<String> = revoked.gone.iter().map(u32::to_string).collect();
        say!("left out: wrapping {}", gone.join(", "));
    }
    wrote(&revoked.file, json, &[("protector", out), ("new transport key, secret", key)]);
    if !json {
        say!(
            "what the old key protects still opens to those who had it: protect it anew with the new key, and then \
             destroy {}",
            file.display()
        );
    }
    Ok(())
}

fn try_to_open(owner: &Owner, octets: &[u8]) -> Opened {
    match owner.open(octets) {
        Ok(_) => Opened::Holds,
        Err(OwnerError::NotOurs) => Opened::NotOurs,
        Err(error) => Opened::Failed(plain(&error.to_string())),
    }
}

fn verify(file: &Path, owner: Option<&Path>, json: bool) -> Result<ExitCode, Failure> {
    let octets = read(file)?;
    let description = describe(&octets);
    let owner = owner.map(own_guardian::load).transpose()?;
    let opened = owner.as_ref().map_or(Opened::NotTried, |owner| try_to_open(owner, &octets));
    let problem = match (&description.verdict, &opened, &owner) {
        (Err(refusal), ..) => Some(plain(&refusal.to_string())),
        (_, Opened::Failed(why), _) => Some(why.clone()),
        (_, Opened::NotOurs, _) => Some(OwnerError::NotOurs.to_string()),
        (.., Some(owner)) if !is_owner_of(owner, &description) => Some(OwnerError::NotOwner.to_string()),
        _ => None,
    };
    match (&problem, json) {
        (_, true) => {
            let mut said = render::to_json(&description, &opened);
            said["valid"] = problem.is_none().into();
            if description.verdict.is_ok() {
                said["problem"] = json!(problem.as_ref().map(|message| json!({ "message": message })));
            }
            say!("{said:#}");
        }
        (Some(why), false) => {
            return Err(format!("{}: {why}; claviger protector show tells more", file.display()).into());
        }
        (None, false) if owner.is_some() => say!("all signatures hold, and the protector is yours"),
        (None, false) => {
            say!("all signatures hold but the transport key's, which only its parties can check (--owner)")
        }
    }
    Ok(if problem.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_owner_of(owner: &Owner, description: &Description) -> bool {
    let own = owner.signing_key.public();
    description.wrappings.iter().any(|w| w.is_owner() && w.signing.as_ref().is_ok_and(|c| c.key() == own))
}
