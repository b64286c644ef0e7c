//! TPMs for tests: swtpm with a boot of its own, and a TPM in software whose evidence a test can change.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use claviger_protocol::attestation::tpm::{first_request, parse_continue_reply, second_request};
use claviger_protocol::attestation::{ReceivedError, ResultType, parse_error_reply, parse_health_certificate_reply};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::tpm::context::{self, Context, Kind};
use claviger_protocol::tpm::credential::Protected;
use claviger_protocol::tpm::evidence::{Evidence, qualifying_data};
use claviger_protocol::tpm::log::{Bank, Log};
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};
use claviger_protocol::tpm::software::SoftwareTpm;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::process::Process;
use crate::tool::{said, tool};
use crate::wait::{block, until};
use crate::wire;

/// Path of TPM attestation.
pub const TPM_ATTEST: &str = "/Attestation/v2.0/attest";

/// Returns the event log of a recorded boot.
#[must_use]
pub fn boot_log(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/protocol/tests/tpm").join(name).with_extension("bin")
}

/// A running swtpm. Its directory is removed when this is dropped.
pub struct Swtpm {
    folder: TempDir,
    process: Process,
}

impl Swtpm {
    /// Starts a new TPM. With `by_maker` it has an endorsement key with a certificate; otherwise it has neither.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(by_maker: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("claviger-tpm-").tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["state", "ca", "roots"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        if by_maker {
            manufacture(folder.path());
        }
        let process = Self::process(folder.path());
        let tpm = Self { folder, process };
        until("a TPM that answers", || UnixStream::connect(tpm.socket()).ok().map(drop));
        tpm
    }

    fn process(folder: &Path) -> Process {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"]);
        command.args(["--tpmstate", &format!("dir={}", path("state"))]);
        command.args(["--server", &format!("type=unixio,path={}", path("tpm"))]);
        command.args(["--ctrl", &format!("type=unixio,path={}", path("tpm.ctrl"))]);
        Process::start(&mut command)
    }

    /// Resets the TPM as for a new boot: all PCRs have their values before the firmware runs.
    ///
    /// # Panics
    /// If it does not start again.
    pub fn reset(&mut self) {
        self.process.terminate();
        self.process.wait();
        let _ = std::fs::remove_file(self.socket());
        self.process = Self::process(self.folder.path());
        until("a TPM that answers", || UnixStream::connect(self.socket()).ok().map(drop));
    }

    /// Returns the path of its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file("tpm")
    }

    /// Returns the directory with the roots of its maker.
    #[must_use]
    pub fn roots(&self) -> PathBuf {
        self.file("roots")
    }

    /// Returns the path of a file in its directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a program of tpm2-tools on this TPM, in its directory.
    ///
    /// # Panics
    /// If the program cannot be started or fails.
    pub fn tool<S: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = S>) -> Output {
        let mut command = Command::new(name);
        command.args(arguments).current_dir(self.folder.path());
        command.env("TPM2TOOLS_TCTI", format!("swtpm:path={}", self.socket().display()));
        let output = tool("tpm2-tools", &mut command);
        assert!(output.status.success(), "{name}: {}", said(&output));
        output
    }

    /// Extends the PCRs with the measurements of a recorded boot.
    ///
    /// # Panics
    /// If the log cannot be read.
    pub fn boot(&self, name: &str) {
        let bytes = std::fs::read(boot_log(name)).unwrap();
        let log = Log::parse(&bytes).unwrap();
        let events: Vec<_> = log.events().filter(|event| event.extends()).collect();
        let digests = events.iter().map(|event| {
            format!("{}:sha256={}", event.pcr, data_encoding::HEXLOWER.encode(event.digest(Bank::Sha256).unwrap()))
        });
        let digests: Vec<_> = digests.collect();
        digests.chunks(8).for_each(|some| drop(self.tool("tpm2_pcrextend", some)));
    }
}

/// Configures swtpm's tools to play a maker of TPMs whose authority is in `folder/ca`; gives swtpm_setup's configuration.
///
/// # Panics
/// When a file cannot be written.
#[must_use]
pub fn maker(folder: &Path) -> PathBuf {
    std::fs::create_dir_all(folder.join("ca")).unwrap();
    let path = |name: &str| folder.join(name).display().to_string();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write("localca.options", "--platform-manufacturer Claviger\n--platform-version 1\n--platform-model test\n".into());
    write(
        "localca.conf",
        format!(
            "statedir = {ca}\nsigningkey = {ca}/signkey.pem\nissuercert = {ca}/issuercert.pem\ncertserial = {ca}/serial\n",
            ca = path("ca")
        ),
    );
    write(
        "setup.conf",
        format!(
            "create_certs_tool=/usr/bin/swtpm_localca\ncreate_certs_tool_config={}\ncreate_certs_tool_options={}\n\
             active_pcr_banks = sha256\n",
            path("localca.conf"),
            path("localca.options")
        ),
    );
    folder.join("setup.conf")
}

/// Has swtpm's tools play the maker of a TPM.
fn manufacture(folder: &Path) {
    let path = |name: &str| folder.join(name).display().to_string();
    let setup = maker(folder);
    let mut command = Command::new("swtpm_setup");
    command.args(["--tpm2", "--create-ek-cert", "--overwrite", "--config"]).arg(setup);
    command.args(["--tpmstate", &format!("dir://{}", path("state"))]);
    let made = tool("swtpm-tools", &mut command);
    assert!(made.status.success(), "{}", said(&made));
    std::fs::copy(folder.join("ca/swtpm-localca-rootca-cert.pem"), folder.join("roots/root.pem")).unwrap();
    std::fs::copy(folder.join("ca/issuercert.pem"), folder.join("roots/issuer.pem")).unwrap();
}

/// Returns the values of these PCRs after a replay of the log.
///
/// # Panics
/// If the log cannot be read.
#[must_use]
pub fn replayed(log: &[u8], set: PcrSet) -> PcrValues {
    let all = Log::parse(log).unwrap().replay();
    let mut some = PcrValues::default();
    set.iter().for_each(|pcr| assert!(some.set(pcr, *all.get(pcr).unwrap())));
    some
}

/// A host with a TPM in software, whose evidence a test can change.
pub struct SoftwareHost {
    /// The TPM, with the PCRs of its boot.
    pub tpm: SoftwareTpm,
    /// The event log.
    pub log: Vec<u8>,
    /// The identity key.
    pub identity: RsaPrivateKey,
    /// The session id of its requests.
    pub session: [u8; 16],
}

/// The contents of a host's step 2, which a test may change before sending.
pub struct Second {
    /// The session id.
    pub session: [u8; 16],
    /// The endorsement key (Content 4).
    pub endorsement_key: Vec<u8>,
    /// The identity key (Content 1).
    pub identity_key: Vec<u8>,
    /// The requested results.
    pub requested: Vec<ResultType>,
    /// The State, as the service sent it in step 1.
    pub state: Vec<u8>,
    /// `TPMS_ATTEST` of the quote.
    pub quote: Vec<u8>,
    /// `TPMT_SIGNATURE` of the quote.
    pub signature: Vec<u8>,
    /// The PCR values.
    pub pcr_values: Vec<u8>,
    /// The event log.
    pub log: Vec<u8>,
}

impl Second {
    /// Encodes the Context.
    #[must_use]
    pub fn context(&self) -> Vec<u8> {
        Evidence {
            state: &self.state,
            quote: &self.quote,
            signature: &self.signature,
            pcr_values: &self.pcr_values,
            log: &self.log,
        }
        .to_context()
    }

    /// Sends step 2.
    ///
    /// # Errors
    /// Returns the error reply.
    ///
    /// # Panics
    /// If the answer violates the protocol.
    pub fn send(&self, daemon: &Daemon) -> Result<Vec<Certificate>, ReceivedError> {
        self.send_context(daemon, &self.context())
    }

    /// Sends step 2 with another Context.
    ///
    /// # Errors
    /// Returns the error reply.
    ///
    /// # Panics
    /// If the answer violates the protocol.
    pub fn send_context(&self, daemon: &Daemon, context: &[u8]) -> Result<Vec<Certificate>, ReceivedError> {
        let Self { session, requested, endorsement_key, identity_key, .. } = self;
        let body = post(daemon, second_request(*session, requested, endorsement_key, identity_key, context))?;
        let content = parse_health_certificate_reply(&body).unwrap();
        Ok(content.iter().map(|(_, der)| Certificate::parse(der).unwrap()).collect())
    }
}

/// Posts an attestation request and returns the body of the answer.
///
/// # Errors
/// Returns the error reply.
///
/// # Panics
/// If the answer violates the protocol.
pub fn post(daemon: &Daemon, request: Vec<u8>) -> Result<Vec<u8>, ReceivedError> {
    let reply = block(daemon.client().post(TPM_ATTEST, "application/json", request.clone())).unwrap();
    wire::note(TPM_ATTEST, &request, &reply);
    if reply.status == 200 {
        return Ok(reply.body.to_vec());
    }
    let error = parse_error_reply(&reply.body).unwrap();
    let expected = match error.name.as_str() {
        "PayloadErrorReply" => 400,
        "OperationModeErrorReply" => 409,
        "UnavailableErrorReply" => 503,
        _ => 403,
    };
    assert_eq!(reply.status, expected, "{error:?}");
    Err(error)
}

impl SoftwareHost {
    /// Creates a host that booted this recorded boot, with its own keys.
    ///
    /// # Panics
    /// If the log cannot be read.
    #[must_use]
    pub fn new(boot: &str) -> Self {
        let log = std::fs::read(boot_log(boot)).unwrap();
        let mut tpm = SoftwareTpm::new(RsaPrivateKey::generate(2048).unwrap()).unwrap();
        tpm.pcrs = replayed(&log, PcrSet::ALWAYS);
        Self { tpm, log, identity: RsaPrivateKey::generate(2048).unwrap(), session: [7; 16] }
    }

    /// Returns its endorsement key as it is sent.
    #[must_use]
    pub fn endorsement_key(&self) -> Vec<u8> {
        self.tpm.endorsement_key().public().spki_der().to_vec()
    }

    /// Sends step 1 with this Context; returns the Context of the answer.
    ///
    /// # Errors
    /// Returns the error reply.
    ///
    /// # Panics
    /// If the answer violates the protocol.
    pub fn first(&self, daemon: &Daemon, context: &[u8]) -> Result<Vec<u8>, ReceivedError> {
        let wanted = [ResultType::EncryptionCertificate];
        let body = post(daemon, first_request(self.session, &wanted, &self.endorsement_key(), context))?;
        Ok(parse_continue_reply(&body).unwrap())
    }

    /// Performs a valid step 1; returns the contents of the valid step 2.
    ///
    /// # Errors
    /// Returns the error reply to step 1.
    ///
    /// # Panics
    /// If the answer is wrong.
    pub fn begin(&mut self, daemon: &Daemon) -> Result<Second, ReceivedError> {
        let received = self.first(daemon, &context::write(&[(Kind::AkPublic, self.tpm.ak_public())]))?;
        let received = Context::parse(&received).unwrap();
        let kinds = [Kind::State, Kind::IdObject, Kind::EncryptedSecret, Kind::PcrSelection];
        let [state, id_object, secret, selection] = received.exactly(kinds).unwrap();
        let protected = Protected { id_object: id_object.to_vec(), encrypted_secret: secret.to_vec() };
        let credential = self.tpm.activate(&protected).unwrap();
        // PCRs that were never extended are zero; the others have the values of this boot.
        let set = PcrSet::from_selection(selection).unwrap();
        let all = replayed(&self.log, set);
        for pcr in set.iter().filter(|pcr| self.tpm.pcrs.get(*pcr).is_none()).collect::<Vec<_>>() {
            self.tpm.pcrs.set(pcr, *all.get(pcr).unwrap());
        }
        let identity_key = self.identity.public().spki_der().to_vec();
        let data = qualifying_data(&credential, &self.session, &identity_key);
        let (quote, signature) = self.tpm.quote(&data).unwrap();
        Ok(Second {
            session: self.session,
            endorsement_key: self.endorsement_key(),
            identity_key,
            requested: vec![ResultType::EncryptionCertificate],
            state: state.to_vec(),
            quote,
            signature,
            pcr_values: self.tpm.pcrs.to_bytes(),
            log: self.log.clone(),
        })
    }
}
