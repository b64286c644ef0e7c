//! `claviger export` and `claviger import`: transfer the encrypted state of a service to another daemon.

use std::io::Write;
use std::path::{Path, PathBuf};

use age::secrecy::SecretString;
use claviger_client::files::{self, Existing};
use claviger_protocol::pem;
use serde_json::Value;
use zeroize::Zeroizing;

use super::target::{Target, ask, print, warn};
use super::{confirm, secret};
use crate::admin::{Command, Document};
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// Largest export, in bytes: the size limit of the administrators' socket.
const LARGEST: usize = crate::admin::REQUEST_LIMIT;

/// Minimum length of a passphrase in characters, because an export can be attacked offline.
const FEWEST: usize = 12;

/// `claviger export …`
#[derive(Debug, clap::Args)]
pub struct Export {
    /// File to write; an existing file is not overwritten
    file: PathBuf,
    /// Encrypt to this age recipient (age1…) instead of with a passphrase; anyone who knows the recipient can write
    /// such a file
    #[arg(long, value_name = "RECIPIENT", conflicts_with = "passphrase_file")]
    recipient: Option<String>,
    /// File with the passphrase; default, without --recipient: prompt
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// The daemon to contact.
    #[command(flatten)]
    target: Target,
}

/// `claviger import …`
#[derive(Debug, clap::Args)]
pub struct Import {
    /// File from claviger export
    file: PathBuf,
    /// Only show the changes
    #[arg(long)]
    dry_run: bool,
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
    /// File with the age identity of the export's recipient; this does not prove who wrote the export
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    identity: Option<PathBuf>,
    /// File with the passphrase; default, without --identity: prompt
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Assume that members which do not answer now have the keys
    #[arg(long)]
    trust_absent: bool,
    /// Replace the labels of hosts that are already registered by those in the file; this may give these hosts access to
    /// more keys
    #[arg(long)]
    loosen: bool,
    /// The daemon to contact.
    #[command(flatten)]
    target: Target,
}

/// Runs `claviger export`.
///
/// # Errors
/// The problem and its remedy.
pub async fn export(command: Export) -> Result<(), Failure> {
    let Export { file, recipient, passphrase_file, target } = command;
    files::must_be_new(&file)?;
    let recipient: Box<dyn age::Recipient> = match recipient {
        Some(recipient) => Box::new(
            recipient.parse::<age::x25519::Recipient>().map_err(|error| format!("--recipient {recipient}: {error}"))?,
        ),
        None => {
            let passphrase = passphrase("Passphrase for the export", passphrase_file.as_deref(), true)?;
            if passphrase.chars().count() < FEWEST {
                return Err(format!("the passphrase needs at least {FEWEST} characters").into());
            }
            Box::new(age::scrypt::Recipient::new(SecretString::from(passphrase.as_str())))
        }
    };
    let document = ask(&target, &Command::Export).await?;
    let plain = Zeroizing::new(serde_json::to_vec(&document)?);
    let sealed = seal(&*recipient, &plain)?;
    files::write(&file, &sealed, Existing::Keep)?;
    let count = |what: &str| document[what].as_array().map_or(0, Vec::len);
    let reply = serde_json::json!({
        "file": file, "hosts": count("hosts"), "baselines": count("baselines"), "certificates": count("certificates"),
        "signers": count("signers"),
    });
    print(&target, &reply, || {
        say!(
            "{}: {} hosts, {} baselines, {} certificates, {} attestation signers, encrypted; the private keys stay in the \
             HSMs",
            file.display(),
            reply["hosts"],
            reply["baselines"],
            reply["certificates"],
            reply["signers"]
        );
    });
    Ok(())
}

/// Runs `claviger import`.
///
/// # Errors
/// The problem and its remedy.
pub async fn import(command: Import) -> Result<(), Failure> {
    let Import { file, dry_run, yes, identity, passphrase_file, trust_absent, loosen, target } = command;
    if !dry_run && !yes && !confirm::can_ask() {
        return Err("there is no terminal to ask at; use --dry-run to see what would change, or --yes".into());
    }
    let sealed = files::read(&file, LARGEST)?;
    if let Some(problem) = no_export(&sealed) {
        return Err(format!("{}: {problem}", file.display()).into());
    }
    let of_file = |error: age::DecryptError| format!("{}: cannot be decrypted: {}", file.display(), cause(&error));
    let plain = Zeroizing::new(match identity {
        Some(path) => age::decrypt(&read_identity(&path)?, &sealed).map_err(of_file)?,
        None => {
            let passphrase = passphrase("Passphrase of the export", passphrase_file.as_deref(), false)?;
            let identity = age::scrypt::Identity::new(SecretString::from(passphrase.as_str()));
            age::decrypt(&identity, &sealed).map_err(of_file)?
        }
    });
    let json = pem::text(&plain).map_err(|error| format!("{}: its content: {error}", file.display()))?;
    let read = || {
        let document = serde_json::from_str::<Document>(json);
        document.map_err(|e| format!("{}: its content is no export of this version: {e}", file.display()))
    };
    let command =
        |dry_run| Ok::<_, Failure>(Command::Import { document: Box::new(read()?), dry_run, trust_absent, loosen });
    let planned = ask(&target, &command(true)?).await?;
    warn(&planned);
    if !target.json {
        show(&planned);
    }
    let nothing = planned["changes"].as_array().is_none_or(Vec::is_empty);
    if dry_run || nothing {
        print(&target, &planned, || say!("{}", if nothing { "nothing to change" } else { "nothing was changed" }));
        return Ok(());
    }
    if !yes && !confirm::agreed("Change this?")? {
        return Err("nothing was changed".into());
    }
    let reply = ask(&target, &command(false)?).await?;
    print(&target, &reply, || say!("done: {} changes", reply["changes"].as_array().map_or(0, Vec::len)));
    Ok(())
}

/// Identifies a file that cannot be an export.
fn no_export(sealed: &[u8]) -> Option<&'static str> {
    if sealed.starts_with(b"age-encryption.org/v1\n") {
        return None;
    }
    let text = pem::text(sealed).unwrap_or_default().trim_start();
    Some(if sealed.is_empty() {
        "it is empty; copy it again"
    } else if text.starts_with("-----BEGIN AGE ENCRYPTED FILE") {
        "it is in age's text form (armored), and the binary form is needed; run: age -d FILE | age -p -o NEW"
    } else if text.starts_with('{') {
        "it is not encrypted, so nothing says who wrote or changed it; encrypt it: age -p -o NEW FILE"
    } else if text.starts_with("age-encryption.org") {
        "it was changed on its way, as mail programs and text editors do; copy it again, as a binary file"
    } else {
        "it is not what claviger export writes (an age file); is it the right file?"
    })
}

/// Describes why age cannot decrypt.
fn cause(error: &age::DecryptError) -> String {
    use age::DecryptError::{DecryptionFailed, ExcessiveWork, InvalidMac, KeyDecryptionFailed, NoMatchingKeys};
    match error {
        DecryptionFailed | KeyDecryptionFailed => {
            "the passphrase is not the one that it was encrypted under".to_owned()
        }
        NoMatchingKeys => {
            "it was encrypted in another way: for a recipient (--identity FILE), for another one than this \
                           identity, or under a passphrase (without --identity)"
                .to_owned()
        }
        InvalidMac => "it is damaged, or was changed by somebody; copy it again".to_owned(),
        ExcessiveWork { .. } => format!("{error}; it was not made by claviger export"),
        error => format!("{error}; the file is damaged, copy it again"),
    }
}

fn show(planned: &Value) {
    for change in planned["changes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        say!("{change}");
    }
    for skipped in planned["skipped"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        say!("not changed: {skipped}");
    }
}

fn passphrase(prompt: &str, file: Option<&Path>, twice: bool) -> Result<Zeroizing<String>, Failure> {
    secret::password(prompt, "--passphrase-file", file, twice)
}

fn seal(recipient: &dyn age::Recipient, plain: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut sealed = Vec::with_capacity(plain.len() + 1024);
    let mut writer = age::Encryptor::with_recipients(std::iter::once(recipient))?.wrap_output(&mut sealed)?;
    writer.write_all(plain)?;
    writer.finish()?;
    Ok(sealed)
}

/// Reads the age identity from a file with comments.
fn read_identity(path: &Path) -> Result<age::x25519::Identity, Failure> {
    let text = files::read_secret_text(path, 64 * 1024)?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err(format!("{}: one age identity (AGE-SECRET-KEY-1…) is needed", path.display()).into());
    };
    line.parse().map_err(|error| format!("{}: {error}", path.display()).into())
}
