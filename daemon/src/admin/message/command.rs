//! What an administrator can ask of a running daemon: requests as they stand on the socket.

use serde::{Deserialize, Serialize};

use super::baselines::Pcrs;
use super::export::Document;
use super::secret::Secret;
use crate::store::{Kind, Labels};

/// A request to a running daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", deny_unknown_fields)]
pub enum Command {
    /// Registers a host.
    #[serde(rename = "hosts.add")]
    AddHost {
        /// Its name.
        name: String,
        /// Its public key as it stood in the file: SPKI, certificate or RSA1 blob, DER or PEM; base64.
        public_key: String,
        /// What is said of it.
        #[serde(default)]
        labels: Labels,
    },
    /// Registers a host by the endorsement key of its TPM.
    #[serde(rename = "hosts.add-tpm")]
    AddTpmHost {
        /// Its name.
        name: String,
        /// The endorsement key's certificate, and those that lead from it to a root of its maker: DER, base64.
        #[serde(default)]
        certificates: Vec<String>,
        /// Instead of them the bare key, which the administrator vouches for: SubjectPublicKeyInfo in DER, base64.
        #[serde(default)]
        public_key: Option<String>,
        /// What is said of it.
        #[serde(default)]
        labels: Labels,
    },
    /// What the policies say of what a host proved last.
    #[serde(rename = "hosts.check")]
    CheckHost {
        /// Its name.
        name: String,
    },
    /// All baselines.
    #[serde(rename = "baselines.list")]
    ListBaselines,
    /// One baseline, with what was measured.
    #[serde(rename = "baselines.show")]
    ShowBaseline {
        /// Its name.
        name: String,
    },
    /// Takes a baseline from what a host proved last.
    #[serde(rename = "baselines.capture")]
    CaptureBaseline {
        /// Its name.
        name: String,
        /// The host's name.
        host: String,
        /// When the host proved what is to be captured, seconds since 1970; refused if it attested again since.
        #[serde(default)]
        at: Option<i64>,
        /// PCRs besides 0, 2, 4 and 7.
        #[serde(default)]
        pcrs: Vec<usize>,
        /// Takes PCRs that were not quoted from the event log.
        #[serde(default)]
        from_log: bool,
    },
    /// Adds a baseline.
    #[serde(rename = "baselines.add")]
    AddBaseline {
        /// Its name.
        name: String,
        /// Its values.
        pcrs: Pcrs,
        /// The event log behind them, base64.
        #[serde(default)]
        log: Option<String>,
    },
    /// Enables a baseline, or disables it, which stops its hosts at once.
    #[serde(rename = "baselines.enable")]
    EnableBaseline {
        /// Its name.
        name: String,
        /// Which of the two.
        enabled: bool,
    },
    /// Removes a baseline, which stops its hosts at once.
    #[serde(rename = "baselines.remove")]
    RemoveBaseline {
        /// Its name.
        name: String,
    },
    /// Removes a host, which stops its releases at once.
    #[serde(rename = "hosts.remove")]
    RemoveHost {
        /// Its name.
        name: String,
    },
    /// Lets a host attest and have keys, or stops both at once.
    #[serde(rename = "hosts.enable")]
    EnableHost {
        /// Its name.
        name: String,
        /// Which of the two.
        enabled: bool,
    },
    /// Gives a host labels.
    #[serde(rename = "hosts.label")]
    LabelHost {
        /// Its name.
        name: String,
        /// Those that it is to have besides its own.
        #[serde(default)]
        add: Labels,
        /// Those that it is to have no more.
        #[serde(default)]
        remove: Labels,
    },
    /// All registered hosts.
    #[serde(rename = "hosts.list")]
    ListHosts,
    /// All key-protection certificates.
    #[serde(rename = "keys.list")]
    ListKeys,
    /// Makes an RSA key pair in an HSM.
    #[serde(rename = "keys.generate")]
    GenerateKey {
        /// What certificates of it are for.
        kind: Kind,
        /// The length of its modulus.
        bits: u32,
        /// Its name on the token, for people.
        #[serde(default)]
        name: Option<String>,
        /// The member to make it in; without one, every member has to show it afterwards.
        #[serde(default)]
        member: Option<String>,
    },
    /// A certificate request, signed in the HSM.
    #[serde(rename = "keys.csr")]
    RequestCertificate {
        /// CKA_ID, hexadecimal.
        hsm_key: String,
        /// The common name that is asked for.
        subject: String,
    },
    /// A certificate that the key itself signs, in the HSM.
    #[serde(rename = "keys.self-sign")]
    SelfSign {
        /// CKA_ID, hexadecimal.
        hsm_key: String,
        /// Its common name.
        subject: String,
        /// How long it is valid.
        days: u32,
    },
    /// Adds a certificate whose key is on all members, or comes with it.
    #[serde(rename = "keys.add")]
    AddKey {
        /// What it is for.
        kind: Kind,
        /// PEM or DER as it stood in the file; base64.
        certificate: String,
        /// CKA_ID of its key, hexadecimal; without it, the key is looked for.
        #[serde(default)]
        hsm_key: Option<String>,
        /// Its private key, PKCS#8 in DER, base64: it is brought onto every member.
        #[serde(default)]
        private_key: Option<Secret>,
        /// Whether it becomes the primary one of its kind.
        #[serde(default)]
        primary: bool,
        /// Whether members that cannot be asked now are taken to have the key.
        #[serde(default)]
        trust_absent: bool,
    },
    /// Makes a certificate the primary one of its kind.
    #[serde(rename = "keys.set-primary")]
    SetPrimary {
        /// Its thumbprint, or enough of its beginning.
        certificate: String,
        /// Its kind, where it is there for both.
        #[serde(default)]
        kind: Option<Kind>,
    },
    /// Chooses the certificate that signs the metadata document.
    #[serde(rename = "keys.set-communications")]
    SetCommunications {
        /// Its thumbprint, or enough of its beginning; `None`: the primary signing one.
        #[serde(default)]
        certificate: Option<String>,
    },
    /// Serves protectors that name a certificate, or refuses them.
    #[serde(rename = "keys.enable")]
    EnableKey {
        /// Its thumbprint, or enough of its beginning.
        certificate: String,
        /// Its kind, where it is there for both.
        #[serde(default)]
        kind: Option<Kind>,
        /// Which of the two.
        enabled: bool,
    },
    /// Removes a certificate.
    #[serde(rename = "keys.remove")]
    RemoveKey {
        /// Its thumbprint, or enough of its beginning.
        certificate: String,
        /// Its kind, where it is there for both.
        #[serde(default)]
        kind: Option<Kind>,
        /// Also when releases used it not long ago.
        #[serde(default)]
        force: bool,
    },
    /// Limits the key of a certificate to hosts of some labels.
    #[serde(rename = "keys.limit")]
    LimitKey {
        /// Its thumbprint, or enough of its beginning.
        certificate: String,
        /// Its kind, where it is there for both.
        #[serde(default)]
        kind: Option<Kind>,
        /// A host needs all of them; none: every host.
        labels: Labels,
    },
    /// The attestation signers: the current one, those that are still trusted, those that were revoked.
    #[serde(rename = "signers.list")]
    ListSigners,
    /// Makes a new attestation signer.
    #[serde(rename = "signers.rotate")]
    RotateSigner,
    /// Refuses the health certificates of an attestation signer.
    #[serde(rename = "signers.revoke")]
    RevokeSigner {
        /// Its thumbprint, or enough of its beginning.
        certificate: String,
        /// Also when no new one can be made in its place.
        #[serde(default)]
        force: bool,
    },
    /// How the HSMs are.
    #[serde(rename = "hsm.list")]
    ListHsms,
    /// Lets a member finish what it has and gives it nothing new.
    #[serde(rename = "hsm.drain")]
    DrainHsm {
        /// Its name.
        name: String,
    },
    /// Takes a drained member back into service.
    #[serde(rename = "hsm.resume")]
    ResumeHsm {
        /// Its name.
        name: String,
    },
    /// Has every member use every registered key, and says what is wrong.
    #[serde(rename = "doctor")]
    Doctor,
    /// Has a member do operations whose right result is known.
    #[serde(rename = "hsm.probe")]
    ProbeHsm {
        /// Its name.
        name: String,
    },
    /// How far the audit trail has come.
    #[serde(rename = "audit.status")]
    AuditStatus,
    /// Hosts, certificates, limits and attestation signers.
    #[serde(rename = "export")]
    Export,
    /// Takes in what an export gave.
    #[serde(rename = "import")]
    Import {
        /// The export.
        document: Box<Document>,
        /// Only says what would change.
        dry_run: bool,
        /// Whether members that cannot be asked now are taken to have the keys.
        #[serde(default)]
        trust_absent: bool,
        /// Whether hosts that are here get the labels of the export.
        #[serde(default)]
        loosen: bool,
    },
}
