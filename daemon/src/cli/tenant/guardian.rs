//! `claviger guardian …`: a tenant's own guardian, and imported guardians of services.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use claviger_client::files::{self, Existing};
use claviger_client::http::{Client, TlsSettings};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::metadata::Metadata;
use serde_json::{Value, json};

use super::own_guardian;
use super::pinning::{Guardians, MAX_METADATA, Thumbprint, Trust, read_metadata, signing_certificate};
use super::render::{certificate_for_people, certificate_json};
use crate::cli::table::plain;
use crate::cli::table::table;
use crate::cli::target::rsa_bits;
use crate::lab::demo::METADATA;
use crate::sys::failure::Failure;
use crate::sys::print::say;
use crate::sys::process;

/// `claviger guardian …`
#[derive(Debug, clap::Subcommand)]
pub enum Guardian {
    /// Create your own guardian: the key pairs that make a tenant the owner of its protectors
    #[command(after_help = "Example: claviger guardian new acme --name 'Acme Ltd'\n\
        The folder gets two RSA key pairs and their self-signed certificates in PEM. Whoever has it can open all\n\
        protectors of this owner, and without it nobody can let guardians in: keep a copy where it is safe.")]
    New {
        /// Folder to create
        dir: PathBuf,
        /// Name of the owner in the certificates
        #[arg(long, value_name = "NAME", default_value = "Claviger tenant", value_parser = owner_name)]
        name: String,
        /// Size of the RSA keys: 2048, 3072 or 4096
        #[arg(long, value_name = "N", default_value_t = 3072, value_parser = rsa_bits)]
        bits: u32,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Write the public part of your own guardian: its metadata document or its certificates
    #[command(after_help = "Example: claviger guardian export acme --out acme.metadata.xml\n\
        Others import it with claviger guardian import; tell them the thumbprint by another way.")]
    Export {
        /// Folder of your own guardian
        dir: PathBuf,
        /// File to write; default: standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Write the two certificates in PEM instead of the metadata document
        #[arg(long)]
        certificates: bool,
    },
    /// Verify a guardian's metadata document and store it under a name
    #[command(after_help = "Example: claviger guardian import hgs --url http://hgs.example:8080 --pin 5f1c…\n\
        Or: claviger guardian import hgs --url https://hgs.example --ca hgs-ca.pem --pin 5f1c…\n\
        Without --pin it says which thumbprint to ask the guardian's operator for.")]
    Import {
        /// Name of the stored guardian: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// The source of the document.
        #[command(flatten)]
        source: Source,
        /// TLS settings for the service.
        #[command(flatten)]
        tls: TlsSettings,
        /// How the document is trusted.
        #[command(flatten)]
        trust: Trust,
        /// The folder of imported guardians.
        #[command(flatten)]
        guardians: Guardians,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Show the imported guardians
    #[command(after_help = "Example: claviger guardian list")]
    List {
        /// The folder of imported guardians.
        #[command(flatten)]
        guardians: Guardians,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Verify that a metadata document is valid and belongs to the pinned guardian: exit status 0 or 1
    #[command(after_help = "Example: claviger guardian verify metadata.xml --pin 5f1c…")]
    Verify {
        /// The source of the document.
        #[command(flatten)]
        source: Source,
        /// TLS settings for the service.
        #[command(flatten)]
        tls: TlsSettings,
        /// SHA-256 thumbprint of the guardian's signing certificate
        #[arg(long, value_name = "THUMBPRINT")]
        pin: Thumbprint,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
}

/// The source of a metadata document.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Source {
    /// The metadata document
    pub file: Option<PathBuf>,
    /// URL of a service that provides the document; the pinned thumbprint protects it, even over plain HTTP
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
}

impl Source {
    async fn read(&self, tls: &TlsSettings) -> Result<(Vec<u8>, Metadata), Failure> {
        match (&self.file, &self.url) {
            (Some(file), _) => read_metadata(file),
            (None, Some(url)) => {
                let reply = Client::with_tls(url, tls)?.get(METADATA).await?;
                if reply.status != 200 {
                    let said = plain(&String::from_utf8_lossy(&reply.body[..reply.body.len().min(500)]));
                    return Err(format!("{url} answered {} instead of its metadata: {said}", reply.status).into());
                }
                if reply.body.len() > MAX_METADATA {
                    return Err(format!("the metadata of {url} is larger than {} octets", MAX_METADATA).into());
                }
                let metadata = Metadata::parse(&reply.body).map_err(|error| format!("{url}: {error}"))?;
                Ok((reply.body.to_vec(), metadata))
            }
            (None, None) => Err("say where the metadata document is: FILE or --url URL".into()),
        }
    }
}

/// X.509 limits common names to 64 characters, and the purpose of the key is appended.
fn owner_name(text: &str) -> Result<String, String> {
    let fits = (1..=50).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    if fits { Ok(text.to_owned()) } else { Err("1 to 50 characters, on one line".to_owned()) }
}

/// Runs `claviger guardian …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn run(command: Guardian) -> Result<ExitCode, Failure> {
    execute(command).await.map_err(|failure| plain(&failure.to_string()).into())
}

async fn execute(command: Guardian) -> Result<ExitCode, Failure> {
    match command {
        Guardian::New { dir, name, bits, json } => new(&dir, &name, bits, json)?,
        Guardian::Export { dir, out, certificates } => export(&dir, out.as_deref(), certificates)?,
        Guardian::Import { name, source, tls, trust, guardians, json } => {
            guardians.must_be_free(&name)?;
            let (document, metadata) = source.read(&tls).await?;
            if !json {
                show(&metadata)?;
            }
            trust.judge(&metadata)?;
            let file = guardians.keep(&name, &document)?;
            if json {
                let mut said = to_json(&metadata)?;
                said["name"] = name.into();
                said["pinned"] = trust.pin.is_some().into();
                say!("{said:#}");
            } else {
                let unpinned = if trust.pin.is_some() { "" } else { "; NOT PINNED" };
                say!("imported as {name} into {}{unpinned}", file.display());
            }
        }
        Guardian::List { guardians, json } => list(&guardians, json)?,
        Guardian::Verify { source, tls, pin, json } => return verify(&source, &tls, pin, json).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn new(dir: &Path, name: &str, bits: u32, json: bool) -> Result<(), Failure> {
    process::no_core_dumps()?;
    let owner = own_guardian::make(dir, name, bits)?;
    if json {
        let (signing, encryption) = (&owner.signing_certificate, &owner.encryption_certificate);
        say!("{:#}", json!({ "signing": certificate_json(signing), "encryption": certificate_json(encryption) }));
    } else {
        say!("made {}: private keys in it, readable by you only", dir.display());
        say!("signing     {}", certificate_for_people(&owner.signing_certificate));
        say!("encryption  {}", certificate_for_people(&owner.encryption_certificate));
    }
    Ok(())
}

fn export(dir: &Path, out: Option<&Path>, certificates: bool) -> Result<(), Failure> {
    process::no_core_dumps()?;
    let owner = own_guardian::load(dir)?;
    let text = if certificates {
        format!("{}{}", owner.signing_certificate.to_pem(), owner.encryption_certificate.to_pem())
    } else {
        String::from_utf8(owner.metadata()?)?
    };
    match out {
        Some(file) => {
            files::write(file, text.as_bytes(), Existing::Keep)?;
            say!("wrote {}; its thumbprint, to be told by another way:", file.display());
            say!("  {}", super::pinning::thumbprint(&owner.signing_certificate));
        }
        None => say!("{}", text.trim_end()),
    }
    Ok(())
}

fn list(guardians: &Guardians, json: bool) -> Result<(), Failure> {
    let row = |name: &String| -> Value {
        let read = guardians.load(name).and_then(|metadata| to_json(&metadata));
        // A guardian that can no longer be read must not hide the others.
        let mut row = read.unwrap_or_else(|failure| json!({ "problem": plain(&failure.to_string()) }));
        row["name"] = name.as_str().into();
        row
    };
    let rows: Vec<Value> = guardians.names()?.iter().map(row).collect();
    if json {
        say!("{:#}", Value::Array(rows));
        return Ok(());
    }
    let flat = |row: &Value| {
        let signing = &row["signing"];
        let subject = if row["problem"].is_null() { &signing["subject"] } else { &row["problem"] };
        json!({ "name": row["name"], "subject": subject, "not_after": signing["not_after"],
            "thumbprint": signing["thumbprint"] })
    };
    let columns =
        [("NAME", "name"), ("EXPIRES", "not_after"), ("SIGNING (SHA-256)", "thumbprint"), ("SUBJECT", "subject")];
    table(&rows.iter().map(flat).collect(), &columns);
    Ok(())
}

async fn verify(source: &Source, tls: &TlsSettings, pin: Thumbprint, json: bool) -> Result<ExitCode, Failure> {
    let trust = Trust { pin: Some(pin), trust_unpinned: false };
    let judged = match source.read(tls).await {
        Ok((_, metadata)) => trust.judge(&metadata).map(|()| metadata),
        Err(failure) => Err(failure),
    };
    match (judged, json) {
        (Ok(metadata), true) => {
            let mut said = to_json(&metadata)?;
            said["valid"] = true.into();
            say!("{said:#}");
        }
        (Ok(metadata), false) => {
            show(&metadata)?;
            say!("all signatures hold, and the signing certificate is the pinned one");
        }
        (Err(failure), true) => {
            say!("{:#}", json!({ "valid": false, "problem": plain(&failure.to_string()) }));
            return Ok(ExitCode::FAILURE);
        }
        (Err(failure), false) => return Err(failure),
    }
    Ok(ExitCode::SUCCESS)
}

/// The certificates of a document, with their purposes.
fn certificates(metadata: &Metadata) -> Result<[(&'static str, Certificate); 3], Failure> {
    Ok([
        ("signing", signing_certificate(metadata)?),
        ("encryption", Certificate::parse(&metadata.guardian.encryption_certificate)?),
        ("communications", metadata.communications_certificate.clone()),
    ])
}

fn show(metadata: &Metadata) -> Result<(), Failure> {
    for (role, certificate) in certificates(metadata)? {
        say!("{role:14}  {}", certificate_for_people(&certificate));
    }
    Ok(())
}

fn to_json(metadata: &Metadata) -> Result<Value, Failure> {
    let mut said = json!({});
    for (role, certificate) in certificates(metadata)? {
        said[role] = certificate_json(&certificate);
    }
    Ok(said)
}
