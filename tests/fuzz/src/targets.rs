//! One module for each target, with its allowance and its function.

use std::time::Duration;

use claviger_protocol::xml;

use crate::Allowance;

/// For XML: a node of the tree takes some 70 bytes and can be as short as one byte of input.
const XML: Allowance = Allowance { base: 1 << 20, per_byte: 256, time: Duration::from_secs(2) };
/// For input that is parsed into a structure of about its own size.
const FLAT: Allowance = Allowance { base: 1 << 20, per_byte: 64, time: Duration::from_secs(2) };
/// For TPM structures: no length field in the input makes them larger.
const TPM: Allowance = Allowance { base: 1 << 20, per_byte: 4, time: Duration::from_secs(2) };

/// A request for one release, and the reply and the error that hosts parse.
pub mod request {
    use claviger_protocol::error::Refusal;
    use claviger_protocol::request::{RollRequest, RollResponse};

    use super::{Allowance, XML};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = XML;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        let _ = RollRequest::peek_health_certificate(input);
        if let Ok(request) = RollRequest::parse(input) {
            let written = request.to_xml();
            let again = RollRequest::parse(&written).expect("what is written can be read");
            assert_eq!(again.ingress_protector, request.ingress_protector);
            assert_eq!(again.health_certificate, request.health_certificate);
            assert_eq!(again.algorithms, request.algorithms);
            let certificate = Some(request.health_certificate).filter(|der| !der.is_empty());
            assert_eq!(RollRequest::peek_health_certificate(&written), certificate);
        }
        if let Ok(response) = RollResponse::parse(input) {
            assert_eq!(RollResponse::parse(&response.to_xml()), Ok(response));
        }
        if let Ok(refusal) = Refusal::parse(input) {
            let _ = Refusal::parse(&refusal.to_xml()).expect("what is written can be read");
        }
    }
}

/// A request for several releases, and its reply.
pub mod batch {
    use claviger_protocol::batch::{BatchRequest, parse_results, to_xml};

    use super::{Allowance, XML};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = XML;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        if let Ok(request) = BatchRequest::parse(input) {
            let again = BatchRequest::parse(&request.to_xml()).expect("what is written can be read");
            assert_eq!(again.ingress_protectors, request.ingress_protectors);
            assert_eq!(again.health_certificate, request.health_certificate);
            assert_eq!(again.algorithms, request.algorithms);
        }
        if let Ok(results) = parse_results(input) {
            let again = parse_results(&to_xml(&results)).expect("what is written can be read");
            assert_eq!(again.len(), results.len());
        }
    }
}

/// A protector: structure, signatures, chain of wrappings.
pub mod protector {
    use std::sync::LazyLock;

    use claviger_protocol::describe::describe;
    use claviger_protocol::protector::{Protector, transport_key};
    use claviger_protocol::verify::{KnownCertificates, verify};

    use super::{Allowance, XML};

    /// Maximum cost, including the cached certificates.
    pub const ALLOWANCE: Allowance = Allowance { base: 8 << 20, ..XML };

    /// Certificates of earlier inputs.
    static KNOWN: LazyLock<KnownCertificates> = LazyLock::new(|| KnownCertificates::new(64));

    /// Verifies the protector with and without cached certificates: the result must be the same.
    pub fn run(input: &[u8]) {
        let _ = transport_key(input);
        let described = describe(input);
        let Ok(protector) = Protector::parse(input) else {
            assert!(described.verdict.is_err(), "what cannot be read is not described as right");
            return;
        };
        let fresh = verify(protector.clone(), &KnownCertificates::default()).map(|verified| verified.owner);
        let remembered = verify(protector, &KNOWN).map(|verified| verified.owner);
        assert_eq!(fresh.is_ok(), remembered.is_ok(), "what is remembered changes no verdict");
        assert_eq!(fresh.ok(), remembered.ok());
    }
}

/// The check before the XML parser, and the canonical form.
pub mod canonical {
    use claviger_protocol::c14n;

    use super::{Allowance, XML, xml};

    /// Maximum cost. The canonical form has its own limit, which does not depend on the input's length.
    pub const ALLOWANCE: Allowance = Allowance { base: 8 << 20, ..XML };

    /// Checks that the canonical form of a canonical form is the same, and that its length is limited.
    pub fn run(input: &[u8]) {
        let Ok(text) = xml::decode(input) else { return };
        let Ok(document) = xml::parse(&text) else { return };
        let Ok(canonical) = c14n::document(&document) else { return };
        // The limit is checked once for each element, and one element adds at most its own length.
        assert!(canonical.len() <= c14n::MAX_OCTETS + 8 * input.len() + 1024, "the canonical form is bounded");
        // A carriage return is written as a character reference, which stays a reference.
        let again = xml::decode(canonical.as_bytes()).expect("it is UTF-8");
        // The canonical form repeats declarations where they are used, so it may exceed the parser's limits.
        let Ok(document) = xml::parse(&again) else { return };
        assert_eq!(c14n::document(&document).as_ref(), Ok(&canonical));
    }
}

/// An X.509 certificate in DER and PEM, and the checks of a health certificate.
pub mod certificate {
    use claviger_protocol::certificate::Certificate;
    use claviger_protocol::health;

    use super::{Allowance, FLAT};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = FLAT;

    /// Parses the input, writes it as PEM and parses that.
    pub fn run(input: &[u8]) {
        let Ok(certificate) = Certificate::parse(input).or_else(|_| Certificate::from_file(input)) else { return };
        let pem = certificate.to_pem();
        let again = Certificate::from_pem(&pem).expect("what is written can be read");
        assert_eq!(again.der(), certificate.der());
        assert_eq!(again.thumbprint(), certificate.thumbprint());
        let self_signed = certificate.verify_signed_by(certificate.key()).is_ok();
        let now = certificate.not_before();
        let healthy = health::check(certificate.der(), std::slice::from_ref(&certificate), now).is_ok();
        assert!(self_signed || !healthy, "what is not signed by a signer is no health certificate");
        assert!(health::check(certificate.der(), &[], now).is_err(), "without a signer nothing is");
    }
}

/// A guardian's metadata document, as tenants parse it.
pub mod metadata {
    use claviger_protocol::metadata::Metadata;

    use super::{Allowance, XML};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = Allowance { base: 8 << 20, ..XML };

    /// Parses the document and checks its signatures.
    pub fn run(input: &[u8]) {
        let _ = Metadata::parse(input);
    }
}

/// Every format of a public key (RSA1 blob, SubjectPublicKeyInfo, certificate, PEM), and private keys in PKCS#8.
pub mod public_key {
    use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};

    use super::{Allowance, FLAT};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = FLAT;

    /// Parses a key, writes it in all formats and parses those.
    pub fn run(input: &[u8]) {
        let any = RsaPublicKey::from_any(input);
        let file = RsaPublicKey::from_file(input);
        // A file that contains a PEM marker is treated as PEM.
        let pem = input.windows(5).any(|part| part == b"-----");
        assert!(any.is_err() || file.is_ok() || pem, "a file may hold whatever hosts send");
        // A modulus may contain these bytes too.
        let pem = pem || file.as_ref().is_ok_and(|key| key.spki_der().windows(5).any(|part| part == b"-----"));
        if let Ok(key) = file
            && !pem
        {
            for form in [&key.to_bcrypt_blob()[..], key.spki_der(), key.to_pem().as_bytes()] {
                let again = RsaPublicKey::from_file(form).expect("what is written can be read");
                assert_eq!(again.spki_der(), key.spki_der());
            }
            let spki = RsaPublicKey::from_spki_der(key.spki_der()).expect("what is written can be read");
            assert_eq!((spki.modulus(), spki.exponent()), (key.modulus(), key.exponent()));
        }
        let _ = RsaPrivateKey::from_pkcs8_der(input);
        if let Ok(text) = std::str::from_utf8(input) {
            let _ = RsaPrivateKey::from_pkcs8_pem(text);
        }
    }
}

/// A host's request for a health certificate in both modes, and what hosts parse: the replies, the description of the
/// service, the error.
pub mod attestation {
    use claviger_protocol::attestation::tpm::{TpmRequest, first_request, parse_continue_reply, second_request};
    use claviger_protocol::attestation::{
        HostKeyRequest, ServiceInfoReply, host_key_request, parse_error_reply, parse_health_certificate_reply,
    };

    use super::{Allowance, FLAT};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = FLAT;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        if let Ok(request) = HostKeyRequest::parse(input) {
            let written = host_key_request(
                request.session_id,
                &request.requested,
                &request.host_key_octets,
                &request.identity_key_octets,
                &request.signature,
            );
            let again = HostKeyRequest::parse(&written).expect("what is written can be read");
            assert_eq!(again.signed_octets(), request.signed_octets());
            assert_eq!(again.verify_signature().is_ok(), request.verify_signature().is_ok());
        }
        if let Ok(request) = TpmRequest::parse(input) {
            let TpmRequest { session_id, requested, endorsement_key, context, identity_key } = &request;
            let ek = endorsement_key.spki_der();
            let written = match identity_key {
                Some((_, sent)) => second_request(*session_id, requested, ek, sent, context),
                None => first_request(*session_id, requested, ek, context),
            };
            assert_eq!(TpmRequest::parse(&written).expect("what is written can be read"), request);
        }
        let _ = parse_continue_reply(input);
        let _ = parse_health_certificate_reply(input);
        let _ = ServiceInfoReply::parse(input);
        let _ = parse_error_reply(input);
    }
}

/// Input files of administrators: certificates, keys and bundles in PEM, DER, BER and PKCS#7.
pub mod input {
    use claviger_protocol::ber::Element;
    use claviger_protocol::input;

    use super::{Allowance, FLAT};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = FLAT;

    /// Parses the file as every kind of input.
    pub fn run(input: &[u8]) {
        let certificates = input::certificates(input);
        if let Ok(entries) = &certificates {
            let begun = input.windows(BEGIN.len()).filter(|part| part == &BEGIN).count();
            assert!(entries.len() >= begun.max(1), "each BEGIN line is a certificate, or the file is refused");
        }
        match (input::certificate(input), &certificates) {
            (Ok(certificate), Ok(entries)) => {
                assert_eq!(entries.len(), 1);
                assert_eq!(certificate.der(), entries[0].der);
            }
            (Ok(_), Err(_)) => panic!("one certificate, and no certificates"),
            (Err(error), _) => assert!(!error.to_string().is_empty()),
        }
        let _ = input::public_key(input);
        let _ = input::private_key(input);
        let _ = input::rsa_private_key(input);
        if let Ok(der) = Element::parse(input).and_then(|element| element.to_der()) {
            let again = Element::parse(&der).and_then(|element| element.to_der()).expect("DER is BER");
            assert_eq!(*again, *der, "the DER of DER is itself");
        }
    }

    const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
}

/// A PKCS#12 file. The password of the seeds is "fuzz".
pub mod pfx {
    use claviger::cli::pfx::open;

    use std::time::Duration;

    use super::{Allowance, FLAT};

    /// Maximum cost. The file sets the number of hash iterations of its password, within a limit.
    pub const ALLOWANCE: Allowance = Allowance { time: Duration::from_secs(20), ..FLAT };

    /// Opens the file.
    pub fn run(input: &[u8]) {
        if let Ok((key, certificate)) = open(input, "fuzz") {
            assert_eq!(key.public().spki_der(), certificate.key().spki_der(), "the certificate is the key's");
        }
    }
}

/// The daemon's configuration file.
pub mod config {
    use std::path::Path;

    use claviger::config::Config;

    use super::{Allowance, FLAT};

    /// Maximum cost: a table with one key takes a few hundred bytes.
    pub const ALLOWANCE: Allowance = Allowance { per_byte: 1024, ..FLAT };

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        let Ok(text) = std::str::from_utf8(input) else { return };
        let path = Path::new("/etc/claviger/claviger.toml");
        match Config::parse(text, path) {
            Ok(config) => {
                let written = config.to_toml().expect("what was read can be written");
                assert_eq!(Config::parse(&written, path).expect("and read again"), config);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// The envelope of TPM attestation, and the structures in it.
pub mod tpm_context {
    use claviger_protocol::tpm::context::{Context, Kind, write};
    use claviger_protocol::tpm::evidence::Evidence;
    use claviger_protocol::tpm::public::AttestationKey;

    use super::{Allowance, TPM};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = TPM;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        let Ok(context) = Context::parse(input) else { return };
        if let Ok(evidence) = Evidence::of(&context) {
            let written = evidence.to_context();
            let again = Context::parse(&written).expect("what is written can be read");
            assert_eq!(Evidence::of(&again), Ok(evidence));
        }
        if let Ok([public]) = context.exactly([Kind::AkPublic]) {
            assert_eq!(write(&[(Kind::AkPublic, public)]), input);
            let _ = AttestationKey::parse(public);
        }
    }
}

/// An event log, and its replay.
pub mod tpm_log {
    use claviger_protocol::tpm::log::{Bank, Log};

    use super::{Allowance, TPM};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = TPM;

    /// Replays every bank and describes every event.
    pub fn run(input: &[u8]) {
        let Ok(log) = Log::parse(input) else { return };
        let replayed = log.replay();
        let bank = log.replay_bank(Bank::Sha256).expect("every log has that bank");
        assert!(replayed.iter().all(|(pcr, value)| bank[pcr] == value));
        let _ = (log.replay_bank(Bank::Sha1), log.replay_bank(Bank::Sha384));
        for event in log.events() {
            assert!(event.describe().chars().all(|character| character.is_ascii_graphic() || character == ' '));
        }
        let _ = log.first_extension(7).map(|event| event.is_secure_boot_on());
    }
}

/// The public areas of an attestation key and of an endorsement key.
pub mod tpm_public {
    use claviger_protocol::tpm::public::{AttestationKey, endorsement_key};
    use claviger_protocol::tpm::signature::Signature;

    use super::{Allowance, FLAT};

    /// Maximum cost, including the preparation of a key for its library.
    pub const ALLOWANCE: Allowance = FLAT;

    /// Parses a key and verifies with it.
    pub fn run(input: &[u8]) {
        if let Ok(key) = AttestationKey::parse(input) {
            assert!(!key.verifies(b"", &Signature::Rsassa(&[0; 256])));
            assert!(!key.verifies(b"", &Signature::Ecdsa([0; 64])));
        }
        let _ = endorsement_key(input);
    }
}

/// A TPM quote.
pub mod tpm_quote {
    use claviger_protocol::tpm::pcr::PcrSet;
    use claviger_protocol::tpm::quote::Quote;

    use super::{Allowance, TPM};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = TPM;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        if let Ok(quote) = Quote::parse(input) {
            let written = quote.to_bytes();
            assert_eq!(Quote::parse(&written), Ok(quote));
        }
        if let Ok(set) = PcrSet::from_selection(input) {
            assert_eq!(set.to_selection(), input);
        }
    }
}

/// A signature of a TPM.
pub mod tpm_signature {
    use claviger_protocol::tpm::signature::Signature;

    use super::{Allowance, TPM};

    /// Maximum cost.
    pub const ALLOWANCE: Allowance = TPM;

    /// Parses the input, writes the result and parses it again.
    pub fn run(input: &[u8]) {
        if let Ok(signature) = Signature::parse(input) {
            let written = signature.to_bytes();
            assert_eq!(Signature::parse(&written), Ok(signature));
        }
    }
}
