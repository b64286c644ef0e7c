//! The guardian's keys and certificates, made through the running daemon.

use std::path::{Path, PathBuf};

use claviger_client::files::{self, Existing};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::certificate::build::DistinguishedName;
use claviger_protocol::rsa_key::RsaPrivateKey;
use data_encoding::BASE64;
use serde_json::Value;
use zeroize::Zeroizing;

use super::answers::Certificates;
use crate::admin::{self, Command, Secret};
use crate::cli::progress;
use crate::cli::table::text;
use crate::cli::target::warn;
use crate::lab;
use crate::store::Kind;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// What the keys are made with.
pub(super) struct Steps<'a> {
    pub(super) file: &'a Path,
    /// The command that continues.
    pub(super) again: &'a str,
    pub(super) how: Option<Certificates>,
    pub(super) subject: &'a str,
    pub(super) bits: u32,
    pub(super) socket: PathBuf,
}

impl Steps<'_> {
    /// Whether the daemon runs.
    pub(super) fn runs(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    /// Makes the keys that are missing. Returns whether the service has both kinds.
    pub(super) async fn make(&self) -> Result<bool, Failure> {
        let mut complete = true;
        for kind in [Kind::Signing, Kind::Encryption] {
            complete &= self.make_kind(kind).await?;
        }
        Ok(complete)
    }

    async fn make_kind(&self, kind: Kind) -> Result<bool, Failure> {
        let listed = self.ask(&Command::ListKeys).await?;
        let is_it = |row: &&Value| row["kind"] == kind.as_str() && row["primary"] == true;
        if let Some(row) = listed.as_array().and_then(|rows| rows.iter().find(is_it)) {
            say!("kept      {kind} certificate {}", text(row, "thumbprint"));
            return Ok(true);
        }
        // A request that was made before says how keys are certified.
        let (request, certificate) = (self.beside(kind, "csr"), self.beside(kind, "pem"));
        if certificate.exists() {
            return self.add(kind, &certificate).await.map(|()| true);
        }
        if request.exists() {
            self.wait_for(&request, &certificate);
            return Ok(false);
        }
        let how = match self.how {
            Some(how) => how,
            None => Certificates::ask()?,
        };
        let mut name = DistinguishedName::parse(self.subject)?;
        name.common_name.push_str(&format!(" {kind}"));
        match how {
            Certificates::Lab => self.certify_oneself(kind, &name.common_name).await.map(|()| true),
            Certificates::Request => {
                let generate = Command::GenerateKey { kind, bits: self.bits, name: None, member: None };
                let made = progress::during("an HSM searches for primes", self.ask(&generate)).await?;
                let hsm_key = text(&made, "hsm_key");
                let of = Command::RequestCertificate {
                    hsm_key: hsm_key.clone(),
                    subject: name.to_string(),
                    dns_names: Vec::new(),
                };
                let pem = text(&self.ask(&of).await?, "pem");
                files::write(&request, pem.as_bytes(), Existing::Keep)?;
                say!("made      {kind} key {hsm_key}");
                self.wait_for(&request, &certificate);
                Ok(false)
            }
        }
    }

    /// A key from outside: several tokens of a laboratory have no other way to the same key.
    async fn certify_oneself(&self, kind: Kind, name: &str) -> Result<(), Failure> {
        let key = RsaPrivateKey::generate(self.bits)?;
        let certificate = lab::self_signed(name, &key)?;
        let private_key = Secret::new(Zeroizing::new(BASE64.encode(key.to_pkcs8_der())));
        let thumbprint = self.add_key(kind, &certificate, Some(private_key)).await?;
        say!("added     {kind} certificate {thumbprint}, self-signed: for laboratories");
        Ok(())
    }

    /// The certificate that the authority issued.
    async fn add(&self, kind: Kind, file: &Path) -> Result<(), Failure> {
        let certificate = files::read_certificate(file)?;
        let added = self.add_key(kind, &certificate, None).await;
        say!("added     {kind} certificate {}", added.map_err(|error| format!("{}: {error}", file.display()))?);
        Ok(())
    }

    /// Adds the primary certificate of a kind. Returns its thumbprint.
    async fn add_key(
        &self,
        kind: Kind,
        certificate: &Certificate,
        private_key: Option<Secret>,
    ) -> Result<String, Failure> {
        let add = Command::AddKey {
            kind,
            certificate: BASE64.encode(certificate.der()),
            hsm_key: None,
            private_key,
            primary: true,
            trust_absent: false,
            labels: None,
        };
        let added = self.ask(&add).await?;
        warn(&added);
        Ok(text(&added, "thumbprint"))
    }

    fn wait_for(&self, request: &Path, certificate: &Path) {
        say!("next      have your authority certify {}", request.display());
        say!("          and put the certificate into {}, then run again: {}", certificate.display(), self.again);
    }

    /// A file beside the configuration: `signing.csr`, `encryption.pem` …
    fn beside(&self, kind: Kind, end: &str) -> PathBuf {
        files::folder(self.file).join(format!("{kind}.{end}"))
    }

    async fn ask(&self, command: &Command) -> Result<Value, Failure> {
        Ok(admin::call(&self.socket, command).await?)
    }
}
