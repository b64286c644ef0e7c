//! The requests that administrators send to a running daemon, in their form on the socket.

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
        /// Name of the host.
        name: String,
        /// Public key exactly as in the file: SPKI, certificate or RSA1 blob, DER or PEM; base64.
        public_key: String,
        /// Labels of the host.
        #[serde(default)]
        labels: Labels,
        /// Whether a host that is registered already with this key is no error.
        #[serde(default)]
        if_absent: bool,
    },
    /// Registers a host by its TPM's endorsement key.
    #[serde(rename = "hosts.add-tpm")]
    AddTpmHost {
        /// Name of the host.
        name: String,
        /// The endorsement key's certificate and its chain to a root of the TPM vendor: DER, base64.
        #[serde(default)]
        certificates: Vec<String>,
        /// Instead of certificates: the bare key, for which the administrator vouches; SubjectPublicKeyInfo in DER,
        /// base64.
        #[serde(default)]
        public_key: Option<String>,
        /// Labels of the host.
        #[serde(default)]
        labels: Labels,
        /// Whether a host that is registered already with this key is no error.
        #[serde(default)]
        if_absent: bool,
    },
    /// Evaluates the policies for a host's last evidence.
    #[serde(rename = "hosts.check")]
    CheckHost {
        /// Name of the host.
        name: String,
    },
    /// Lists all baselines.
    #[serde(rename = "baselines.list")]
    ListBaselines,
    /// Shows one baseline with its measured events.
    #[serde(rename = "baselines.show")]
    ShowBaseline {
        /// Name of the baseline.
        name: String,
    },
    /// Creates a baseline from a host's last evidence.
    #[serde(rename = "baselines.capture")]
    CaptureBaseline {
        /// Name of the baseline.
        name: String,
        /// Name of the host.
        host: String,
        /// Time of the evidence to capture, seconds since 1970. Refused if the host has attested again since then.
        #[serde(default)]
        at: Option<i64>,
        /// PCRs in addition to 0, 2, 4 and 7.
        #[serde(default)]
        pcrs: Vec<usize>,
        /// Whether values of PCRs that were not quoted are taken from the event log.
        #[serde(default)]
        from_log: bool,
    },
    /// Adds a baseline.
    #[serde(rename = "baselines.add")]
    AddBaseline {
        /// Name of the baseline.
        name: String,
        /// The PCR values.
        pcrs: Pcrs,
        /// The event log that belongs to the values, base64.
        #[serde(default)]
        log: Option<String>,
    },
    /// Enables or disables a baseline. Disabling rejects its hosts at once.
    #[serde(rename = "baselines.enable")]
    EnableBaseline {
        /// Name of the baseline.
        name: String,
        /// Whether to enable or to disable it.
        enabled: bool,
    },
    /// Removes a baseline, which rejects its hosts at once.
    #[serde(rename = "baselines.remove")]
    RemoveBaseline {
        /// Name of the baseline.
        name: String,
    },
    /// Removes a host, which rejects its requests at once.
    #[serde(rename = "hosts.remove")]
    RemoveHost {
        /// Name of the host.
        name: String,
    },
    /// Enables or disables a host. Disabling rejects its attestations and releases at once.
    #[serde(rename = "hosts.enable")]
    EnableHost {
        /// Name of the host.
        name: String,
        /// Whether to enable or to disable it.
        enabled: bool,
    },
    /// Adds and removes labels of a host.
    #[serde(rename = "hosts.label")]
    LabelHost {
        /// Name of the host.
        name: String,
        /// Labels to add.
        #[serde(default)]
        add: Labels,
        /// Labels to remove.
        #[serde(default)]
        remove: Labels,
    },
    /// Lists all registered hosts.
    #[serde(rename = "hosts.list")]
    ListHosts,
    /// Lists all key-protection certificates.
    #[serde(rename = "keys.list")]
    ListKeys,
    /// Generates an RSA key pair in an HSM.
    #[serde(rename = "keys.generate")]
    GenerateKey {
        /// Purpose of the key's certificates.
        kind: Kind,
        /// Bits of the modulus.
        bits: u32,
        /// Label of the key on the token, for people.
        #[serde(default)]
        name: Option<String>,
        /// The member that generates the key. `None`: all members must have the key afterwards.
        #[serde(default)]
        member: Option<String>,
    },
    /// Writes a certificate request; an HSM signs it with the key.
    #[serde(rename = "keys.csr")]
    RequestCertificate {
        /// CKA_ID, hexadecimal.
        hsm_key: String,
        /// Common name in the request, or a distinguished name like `CN=…,O=…`.
        subject: String,
        /// DNS names in the request's subjectAltName.
        #[serde(default)]
        dns_names: Vec<String>,
    },
    /// Writes a self-signed certificate; an HSM signs it with the key.
    #[serde(rename = "keys.self-sign")]
    SelfSign {
        /// CKA_ID, hexadecimal.
        hsm_key: String,
        /// Common name of the certificate.
        subject: String,
        /// Validity in days.
        days: u32,
    },
    /// Adds a certificate. Its key is on all members, or is sent along.
    #[serde(rename = "keys.add")]
    AddKey {
        /// Purpose of the certificate.
        kind: Kind,
        /// PEM or DER exactly as in the file; base64.
        certificate: String,
        /// CKA_ID of its key, hexadecimal. `None`: the daemon searches for the key.
        #[serde(default)]
        hsm_key: Option<String>,
        /// Its private key, PKCS#8 in DER, base64, which is imported into every member.
        #[serde(default)]
        private_key: Option<Secret>,
        /// Whether it becomes the primary certificate of its kind.
        #[serde(default)]
        primary: bool,
        /// Whether members that cannot be asked now are assumed to have the key.
        #[serde(default)]
        trust_absent: bool,
        /// Restricts the key to hosts with all of these labels, from its first moment on. `None`: a restriction that the
        /// key has already stays.
        #[serde(default)]
        labels: Option<Labels>,
    },
    /// Lists the RSA private keys on the tokens of all members, and what each is used for.
    #[serde(rename = "keys.on-tokens")]
    ListTokenKeys,
    /// Destroys a key on the tokens of all members. Refused for a key that a certificate or an attestation signer needs.
    #[serde(rename = "keys.destroy")]
    DestroyKey {
        /// CKA_ID, hexadecimal.
        hsm_key: String,
        /// Only on this member.
        #[serde(default)]
        member: Option<String>,
    },
    /// Makes a certificate the primary certificate of its kind.
    #[serde(rename = "keys.set-primary")]
    SetPrimary {
        /// Thumbprint of the certificate, or an unambiguous prefix.
        certificate: String,
        /// Kind of the certificate, if it exists for both kinds.
        #[serde(default)]
        kind: Option<Kind>,
    },
    /// Selects the certificate that signs the metadata document.
    #[serde(rename = "keys.set-communications")]
    SetCommunications {
        /// Thumbprint of the certificate, or an unambiguous prefix; `None`: the primary signing certificate.
        #[serde(default)]
        certificate: Option<String>,
    },
    /// Enables or disables a certificate: protectors that name it are served or refused.
    #[serde(rename = "keys.enable")]
    EnableKey {
        /// Thumbprint of the certificate, or an unambiguous prefix.
        certificate: String,
        /// Kind of the certificate, if it exists for both kinds.
        #[serde(default)]
        kind: Option<Kind>,
        /// Whether to enable or to disable it.
        enabled: bool,
    },
    /// Removes a certificate.
    #[serde(rename = "keys.remove")]
    RemoveKey {
        /// Thumbprint of the certificate, or an unambiguous prefix.
        certificate: String,
        /// Kind of the certificate, if it exists for both kinds.
        #[serde(default)]
        kind: Option<Kind>,
        /// Whether to remove it even if releases used its key recently.
        #[serde(default)]
        force: bool,
    },
    /// Restricts the key of a certificate to hosts with certain labels.
    #[serde(rename = "keys.limit")]
    LimitKey {
        /// Thumbprint of the certificate, or an unambiguous prefix.
        certificate: String,
        /// Kind of the certificate, if it exists for both kinds.
        #[serde(default)]
        kind: Option<Kind>,
        /// The labels, all of which a host needs. Empty: no restriction.
        labels: Labels,
    },
    /// Lists the attestation signers: the current one, those that are still trusted, and revoked ones.
    #[serde(rename = "signers.list")]
    ListSigners,
    /// Creates a new attestation signer.
    #[serde(rename = "signers.rotate")]
    RotateSigner,
    /// Rejects the health certificates of an attestation signer.
    #[serde(rename = "signers.revoke")]
    RevokeSigner {
        /// Thumbprint of the signer, or an unambiguous prefix.
        certificate: String,
        /// Whether to revoke it even if no new signer can be created.
        #[serde(default)]
        force: bool,
    },
    /// Lists the members with their states.
    #[serde(rename = "hsm.list")]
    ListHsms,
    /// Drains a member: it gets no new calls and finishes the calls in progress.
    #[serde(rename = "hsm.drain")]
    DrainHsm {
        /// Name of the member.
        name: String,
        /// Whether to drain it even if no other member serves.
        #[serde(default)]
        force: bool,
    },
    /// Returns a drained member to service.
    #[serde(rename = "hsm.resume")]
    ResumeHsm {
        /// Name of the member.
        name: String,
    },
    /// Reads the configuration again.
    #[serde(rename = "reload")]
    Reload,
    /// Tests every registered key on every member and reports problems.
    #[serde(rename = "doctor")]
    Doctor,
    /// Runs the known-answer tests on a member.
    #[serde(rename = "hsm.probe")]
    ProbeHsm {
        /// Name of the member.
        name: String,
    },
    /// Lists the nodes that share the state.
    #[serde(rename = "nodes.list")]
    ListNodes,
    /// Deletes the record of a node that does not run.
    #[serde(rename = "nodes.forget")]
    ForgetNode {
        /// Name of the node.
        name: String,
    },
    /// Shows the position of the audit trail.
    #[serde(rename = "audit.status")]
    AuditStatus,
    /// Exports hosts, certificates, restrictions and attestation signers.
    #[serde(rename = "export")]
    Export,
    /// Imports an export.
    #[serde(rename = "import")]
    Import {
        /// The export.
        document: Box<Document>,
        /// Whether to only report the changes.
        dry_run: bool,
        /// Whether members that cannot be asked now are assumed to have the keys.
        #[serde(default)]
        trust_absent: bool,
        /// Whether registered hosts also get the labels in the export.
        #[serde(default)]
        loosen: bool,
    },
}
