//! Attestation by TPM: structures from tpm2-tools and swtpm, recorded boots, and damaged copies of both.
//! `tests/tpm/make-vectors` creates the files.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::time::{Duration, Instant};

use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_protocol::tpm::compare::{Differences, differences};
use claviger_protocol::tpm::context::{self, Context, Kind};
use claviger_protocol::tpm::credential::{self, Protected};
use claviger_protocol::tpm::evidence::{self, Evidence, EvidenceError, qualifying_data};
use claviger_protocol::tpm::log::{Bank, Log, LogWriter, short_boot};
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};
use claviger_protocol::tpm::policy::{Baseline, Policy, judge, selection};
use claviger_protocol::tpm::public::{self, AttestationKey};
use claviger_protocol::tpm::quote::Quote;
use claviger_protocol::tpm::signature::Signature;
use claviger_protocol::tpm::software::SoftwareTpm;
use claviger_protocol::tpm::state::State;
use data_encoding::HEXUPPER;
use zeroize::Zeroizing;

const SESSION: [u8; 16] = [9; 16];
const IDENTITY_KEY: &[u8] = b"the identity key as sent";
const BOOTS: [&str; 3] = ["ovmf-nosb", "ovmf-sb-direct-kernel", "ovmf-sb-uki"];

fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tpm").join(name)).unwrap()
}

/// The log of a recorded boot.
fn boot(name: &str) -> Vec<u8> {
    file(&format!("{name}.bin"))
}

/// The PCR values of the TPM after that boot.
fn recorded(name: &str) -> PcrValues {
    let text = String::from_utf8(file(&format!("{name}.pcrs"))).unwrap();
    let mut values = PcrValues::default();
    for line in text.lines() {
        let (pcr, value) = line.strip_prefix("PCR").unwrap().split_once(' ').unwrap();
        let value = HEXUPPER.decode(value.as_bytes()).unwrap();
        assert!(values.set(pcr.parse().unwrap(), value.try_into().unwrap()));
    }
    values
}

/// The values of the selected PCRs.
fn some(values: &PcrValues, set: PcrSet) -> PcrValues {
    let mut some = PcrValues::default();
    set.iter().for_each(|pcr| assert!(some.set(pcr, *values.get(pcr).unwrap())));
    some
}

// --- Structures of a TPM ---

#[test]
fn an_attestation_key_has_the_name_that_its_tpm_gives_it() {
    for kind in ["rsa", "ecc"] {
        let key = AttestationKey::parse(&file(&format!("ak-{kind}.public"))).unwrap();
        assert_eq!(key.name()[..], file(&format!("ak-{kind}.name")));
    }
}

#[test]
fn a_quote_is_read_as_its_tpm_wrote_it() {
    let nonce: Vec<u8> = (0..32).collect();
    let set: PcrSet = [0, 2, 4, 7, 9, 11].into_iter().collect();
    for kind in ["rsa", "ecc"] {
        let key = AttestationKey::parse(&file(&format!("ak-{kind}.public"))).unwrap();
        let (bytes, signature) = (file(&format!("{kind}.quote")), file(&format!("{kind}.signature")));
        let parsed = Signature::parse(&signature).unwrap();
        assert_eq!(parsed.to_bytes(), signature);
        assert!(key.verifies(&bytes, &parsed));
        let quote = Quote::parse(&bytes).unwrap();
        assert_eq!(quote.extra_data, nonce);
        assert_eq!(quote.selection, set.to_selection());
        assert_eq!(quote.digest, some(&recorded("ovmf-sb-uki"), set).digest());
        assert_eq!((quote.restart_count, quote.reset_count), (0, 1));
        // A signature by another key, and one with another scheme.
        let other = if kind == "rsa" { "ecc" } else { "rsa" };
        let other = file(&format!("{other}.signature"));
        assert!(!key.verifies(&bytes, &Signature::parse(&other).unwrap()));
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(!key.verifies(&changed, &parsed), "byte {at}");
        }
        for length in 0..bytes.len() {
            assert!(Quote::parse(&bytes[..length]).is_err());
        }
        for length in 0..signature.len() {
            assert!(Signature::parse(&signature[..length]).is_err());
        }
        assert!(Quote::parse(&[&bytes[..], &[0]].concat()).is_err());
        assert!(Signature::parse(&[&signature[..], &[0]].concat()).is_err());
    }
    // A selection with several banks is parsed, but does not match.
    let bytes = file("banks.quote");
    let quote = Quote::parse(&bytes).unwrap();
    assert_eq!(quote.selection[..4], [0, 0, 0, 2]);
    assert_ne!(quote.selection, set.to_selection());
}

#[test]
fn numbers_of_a_signature_may_lack_their_zeros() {
    let short = [&[0, 0x18, 0, 0x0b, 0, 2, 1, 2, 0, 32][..], &[7; 32]].concat();
    let Signature::Ecdsa(both) = Signature::parse(&short).unwrap() else { panic!() };
    assert_eq!(both, [&[0; 30][..], &[1, 2], &[7; 32]].concat()[..]);
    let long = [&[0, 0x18, 0, 0x0b, 0, 33][..], &[0; 33], &[0, 32], &[7; 32]].concat();
    assert!(Signature::parse(&long).is_err());
}

#[test]
fn only_restricted_signing_keys_of_the_accepted_kinds_are_attestation_keys() {
    let (rsa, ecc) = (file("ak-rsa.public"), file("ak-ecc.public"));
    let refused = |good: &[u8], at: usize, value: u8| {
        let mut changed = good.to_vec();
        assert_ne!(changed[at], value, "byte {at} is that already");
        changed[at] = value;
        assert!(AttestationKey::parse(&changed).is_err(), "byte {at} as {value:#x}");
    };
    for good in [&rsa, &ecc] {
        refused(good, 1, 0x08); // a keyed hash
        refused(good, 3, 0x04); // name algorithm SHA-1
        refused(good, 5, 0x04); // not restricted
        refused(good, 5, 0x07); // decrypts, too
        refused(good, 5, 0x01); // does not sign
        refused(good, 7, 0x70); // not fixedTPM
        refused(good, 7, 0x62); // not fixedParent
        refused(good, 7, 0x52); // not of the TPM's making
        refused(good, 11, 0x06); // symmetric AES
        for length in 0..good.len() {
            assert!(AttestationKey::parse(&good[..length]).is_err());
        }
        assert!(AttestationKey::parse(&[&good[..], &[0]].concat()).is_err());
    }
    refused(&rsa, 13, 0x16); // RSAPSS
    refused(&rsa, 15, 0x04); // with SHA-1
    refused(&rsa, 16, 0x04); // of 1024 bits
    refused(&rsa, 16, 0x0c); // a modulus of another length
    refused(&rsa, 21, 0x03); // exponent 3
    refused(&rsa, 24, 0x00); // a modulus of fewer bits
    refused(&rsa, 279, rsa[279] & 0xfe); // an even one
    let mut written = rsa.clone();
    written[18..22].copy_from_slice(&65537_u32.to_be_bytes());
    assert!(AttestationKey::parse(&written).is_err(), "65537 is written as 0");
    refused(&ecc, 13, 0x1a); // SM2
    refused(&ecc, 15, 0x0c); // with SHA-384
    refused(&ecc, 17, 0x04); // P-384
    refused(&ecc, 19, 0x20); // a key derivation
    refused(&ecc, 87, ecc[87] ^ 1); // not on the curve

    // The policy and the other attribute bits are not restricted.
    let with_policy = [&ecc[..8], &[0, 32], &[7; 32], &ecc[10..]].concat();
    assert!(AttestationKey::parse(&with_policy).is_ok());
}

#[test]
fn the_endorsement_key_of_a_tpm_is_read() {
    let public = file("ek.public");
    assert_eq!(public::endorsement_template()[..58], public[..58]);
    let key = public::endorsement_key(&public).unwrap();
    assert_eq!(key.modulus(), &public[58..]);
    assert!(public::endorsement_key(&public[..313]).is_err());
    assert!(public::endorsement_key(&[&public[..], &[0]].concat()).is_err());
    assert!(public::endorsement_key(&file("ak-rsa.public")).is_err());
}

/// The two parts of a file from `tpm2_makecredential`.
fn credential_file() -> Protected {
    let bytes = file("credential");
    let (id_object, rest) = bytes[10..].split_at(usize::from(u16::from_be_bytes([bytes[8], bytes[9]])));
    Protected { id_object: id_object.to_vec(), encrypted_secret: rest[2..].to_vec() }
}

#[test]
fn a_credential_of_tpm2_tools_is_recovered() {
    let key = RsaPrivateKey::from_pkcs8_der(&file("ek.pkcs8")).unwrap();
    let name: [u8; 34] = file("ak-rsa.name").try_into().unwrap();
    let made = credential_file();
    assert_eq!(&*credential::activate(&key, &name, &made).unwrap(), b"claviger credential of 32 bytes!");

    let other_name: [u8; 34] = file("ak-ecc.name").try_into().unwrap();
    assert!(credential::activate(&key, &other_name, &made).is_err());
    assert!(credential::activate(&RsaPrivateKey::generate(2048).unwrap(), &name, &made).is_err());
    for at in 0..made.id_object.len() {
        let mut changed = made.clone();
        changed.id_object[at] ^= 1;
        assert!(credential::activate(&key, &name, &changed).is_err(), "byte {at}");
    }
}

#[test]
fn a_credential_of_ours_has_the_form_of_tpm2_tools() {
    let key = RsaPrivateKey::from_pkcs8_der(&file("ek.pkcs8")).unwrap();
    let name: [u8; 34] = file("ak-rsa.name").try_into().unwrap();
    let secret = credential::fresh().unwrap();
    let ours = credential::protect(key.public(), &name, &secret).unwrap();
    let theirs = credential_file();
    assert_eq!(ours.id_object.len(), theirs.id_object.len());
    assert_eq!(ours.encrypted_secret.len(), theirs.encrypted_secret.len());
    assert_eq!(credential::activate(&key, &name, &ours).unwrap(), secret);
    assert_ne!(credential::protect(key.public(), &name, &secret).unwrap(), ours);
}

// --- Logs ---

/// Writes well-formed and malformed logs.
#[derive(Clone)]
struct Writer {
    bytes: Vec<u8>,
    algorithms: Vec<(u16, u16)>,
}

const SHA256: (u16, u16) = (0x0b, 32);
const NO_ACTION: u32 = 3;
const SEPARATOR: u32 = 4;
const HCRTM: u32 = 0x8000_0010;

impl Writer {
    fn new(algorithms: &[(u16, u16)]) -> Self {
        let mut data = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02".to_vec();
        data.extend_from_slice(&(algorithms.len() as u32).to_le_bytes());
        for (algorithm, length) in algorithms {
            data.extend_from_slice(&algorithm.to_le_bytes());
            data.extend_from_slice(&length.to_le_bytes());
        }
        data.push(0);
        let mut bytes = [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20]].concat();
        bytes.extend_from_slice(&(data.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&data);
        Self { bytes, algorithms: algorithms.to_vec() }
    }

    /// Adds an event whose digest bytes are all `digest`.
    fn event(mut self, pcr: u32, kind: u32, digest: u8, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(&pcr.to_le_bytes());
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(&(self.algorithms.len() as u32).to_le_bytes());
        for (algorithm, length) in &self.algorithms {
            self.bytes.extend_from_slice(&algorithm.to_le_bytes());
            self.bytes.extend(std::iter::repeat_n(digest, usize::from(*length)));
        }
        self.bytes.extend_from_slice(&(data.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(data);
        self
    }

    fn pcr_0(&self) -> [u8; 32] {
        *Log::parse(&self.bytes).unwrap().replay().get(0).unwrap()
    }
}

fn extend(value: [u8; 32], digest: [u8; 32]) -> [u8; 32] {
    let both = [value, digest].concat();
    ring::digest::digest(&ring::digest::SHA256, &both).as_ref().try_into().unwrap()
}

/// The start value of PCR 0 for a locality.
fn started_at(locality: u8) -> [u8; 32] {
    let mut value = [0; 32];
    value[31] = locality;
    value
}

#[test]
fn recorded_boots_replay_to_the_values_that_their_tpms_had() {
    for name in BOOTS {
        let bytes = boot(name);
        let log = Log::parse(&bytes).unwrap();
        let replayed = log.replay();
        for (pcr, value) in recorded(name).iter() {
            assert_eq!(replayed.get(pcr), Some(value), "{name}, PCR {pcr}");
        }
        assert_eq!(log.replay_bank(Bank::Sha1), None);
        let on = log.first_extension(7).unwrap().is_secure_boot_on();
        assert_eq!(on, name != "ovmf-nosb", "{name}");
    }
}

#[test]
fn every_bank_of_a_log_is_replayed() {
    let log = Writer::new(&[(0x04, 20), SHA256, (0x0c, 48), (0x1234, 7)]);
    let log = log.event(5, SEPARATOR, 1, b"").event(5, SEPARATOR, 2, b"");
    let log = Log::parse(&log.bytes).unwrap();
    for (bank, algorithm) in [
        (Bank::Sha1, &ring::digest::SHA1_FOR_LEGACY_USE_ONLY),
        (Bank::Sha256, &ring::digest::SHA256),
        (Bank::Sha384, &ring::digest::SHA384),
    ] {
        let length = algorithm.output_len();
        let mut value = vec![0; length];
        for digest in [1, 2] {
            let both = [&value[..], &vec![digest; length]].concat();
            value = ring::digest::digest(algorithm, &both).as_ref().to_vec();
        }
        let replayed = log.replay_bank(bank).unwrap();
        assert_eq!(replayed[5], value, "{bank:?}");
        assert_eq!(replayed[6], vec![0; length]);
        assert_eq!(log.events().next().unwrap().digest(bank).unwrap(), vec![1; length]);
    }
}

#[test]
fn pcr_0_starts_where_the_log_says() {
    let new = || Writer::new(&[SHA256]);
    let locality = |at: u8| [b"StartupLocality\0", &[at][..]].concat();
    let one = |start: u8| extend(started_at(start), [1; 32]);
    assert_eq!(new().pcr_0(), [0; 32]);
    assert_eq!(new().event(0, SEPARATOR, 1, b"").pcr_0(), one(0));
    assert_eq!(new().event(0, NO_ACTION, 0, &locality(3)).event(0, SEPARATOR, 1, b"").pcr_0(), one(3));
    assert_eq!(new().event(0, NO_ACTION, 0, &locality(3)).pcr_0(), started_at(3));
    // An event after the first extension of PCR 0 is too late. The first extension of another PCR does not matter.
    assert_eq!(new().event(0, SEPARATOR, 1, b"").event(0, NO_ACTION, 0, &locality(3)).pcr_0(), one(0));
    let after_another = new().event(7, SEPARATOR, 1, b"").event(0, NO_ACTION, 0, &locality(3));
    assert_eq!(after_another.event(0, SEPARATOR, 1, b"").pcr_0(), one(3));
    // Ignored: an event of another PCR, one without 17 bytes, one that extends.
    assert_eq!(new().event(1, NO_ACTION, 0, &locality(3)).event(0, SEPARATOR, 1, b"").pcr_0(), one(0));
    let long = [&locality(3)[..], &[0]].concat();
    for data in [&long[..], &locality(3)[..16], b""] {
        assert_eq!(new().event(0, NO_ACTION, 0, data).event(0, SEPARATOR, 1, b"").pcr_0(), one(0));
    }
    assert_eq!(new().event(0, SEPARATOR, 1, &locality(3)).pcr_0(), one(0));
    // A measurement before the CRTM implies locality 4 and is the first extension of PCR 0.
    assert_eq!(new().event(0, HCRTM, 1, b"HCRTM").pcr_0(), one(4));
    assert_eq!(new().event(0, NO_ACTION, 0, &locality(3)).event(0, HCRTM, 1, b"").pcr_0(), one(4));
    assert_eq!(new().event(0, HCRTM, 1, b"").event(0, HCRTM, 1, b"").pcr_0(), extend(one(4), [1; 32]));
    assert_eq!(new().event(0, SEPARATOR, 1, b"").event(0, HCRTM, 1, b"").pcr_0(), extend(one(0), [1; 32]));
    assert_eq!(new().event(1, HCRTM, 1, b"").event(0, SEPARATOR, 1, b"").pcr_0(), one(0));
}

#[test]
fn a_log_that_is_written_here_is_one() {
    assert_eq!(LogWriter::new().finish(), Writer::new(&[SHA256]).bytes);
    let bytes = short_boot("firmware 1", "kernel 1");
    let log = Log::parse(&bytes).unwrap();
    assert!(log.events().all(|event| event.proves_data()));
    assert!(log.first_extension(7).unwrap().is_secure_boot_on());
    let differs = |other: &[u8]| {
        let (one, other) = (log.replay(), Log::parse(other).unwrap().replay());
        (0..24).filter(|pcr| one.get(*pcr) != other.get(*pcr)).collect::<Vec<_>>()
    };
    assert_eq!(differs(&short_boot("firmware 1", "kernel 2")), [4]);
    assert_eq!(differs(&short_boot("firmware 2", "kernel 1")), [0]);
}

#[test]
fn what_is_not_exactly_a_log_is_refused() {
    let refused = |bytes: &[u8], why: &str| {
        let error = Log::parse(bytes).unwrap_err().to_string();
        assert!(error.contains(why), "{error:?} does not say {why:?}");
    };
    let good = Writer::new(&[SHA256]).event(0, SEPARATOR, 1, b"data");
    assert!(Log::parse(&good.bytes).is_ok());
    assert!(Log::parse(&Writer::new(&[SHA256]).bytes).is_ok(), "a log without events");
    let header = Writer::new(&[SHA256]).bytes.len();
    for length in (0..good.bytes.len()).filter(|length| *length != header) {
        refused(&good.bytes[..length], "it ends in the middle");
    }
    refused(&[&good.bytes[..], &[0]].concat(), "it ends in the middle");
    let changed = |at: usize, value: u8| {
        let mut changed = good.bytes.clone();
        changed[at] = value;
        changed
    };
    refused(&changed(0, 1), "header");
    refused(&changed(4, 4), "header");
    refused(&changed(46, b'2'), "crypto-agile");
    refused(&changed(28, 0xff), "it ends in the middle");
    refused(&changed(56, 0), "no digest algorithm");
    refused(&changed(59, 0xff), "more than 16");
    refused(&changed(60, 0x04), "wrong length");
    refused(&changed(62, 31), "wrong length");
    refused(&changed(header, 24), "PCR that does not exist");
    refused(&changed(header + 3, 0x80), "PCR that does not exist");
    refused(&changed(header + 8, 0), "one digest for each");
    refused(&changed(header + 8, 2), "one digest for each");
    refused(&changed(header + 11, 0xff), "one digest for each");
    refused(&changed(header + 12, 0x04), "does not name");
    refused(&changed(header + 12 + 2 + 32 + 3, 0x7f), "it ends in the middle");
    refused(&Writer::new(&[(0x04, 20)]).bytes, "no SHA-256");
    refused(&Writer::new(&[SHA256, SHA256]).bytes, "twice");
    refused(&Writer::new(&[SHA256, (0x99, 0)]).bytes, "wrong length");
    refused(&Writer::new(&[SHA256, (0x99, 65)]).bytes, "wrong length");
    refused(&[SHA256; 17].iter().fold(Writer::new(&[SHA256; 17]), |log, _| log).bytes, "more than 16");
    // The same digest twice, in place of two different digests.
    let mut twice = Writer::new(&[SHA256, (0x0d, 64)]);
    twice.algorithms = vec![SHA256, SHA256];
    refused(&twice.event(0, SEPARATOR, 1, b"").bytes, "twice");
    // An event that extends nothing may name a PCR that does not exist.
    assert!(Log::parse(&Writer::new(&[SHA256]).event(u32::MAX, NO_ACTION, 0, b"").bytes).is_ok());
    // A log in the older format, and bytes that are no log.
    refused(&[0; 40], "header");
    refused(b"", "it ends in the middle");
}

#[test]
fn events_are_described_in_printable_words() {
    let bytes = boot("ovmf-sb-uki");
    let log = Log::parse(&bytes).unwrap();
    let described: Vec<_> = log.events().map(|event| (event.pcr, event.describe())).collect();
    let has = |pcr: u32, text: &str| described.contains(&(pcr, text.to_owned()));
    assert!(has(7, "EV_EFI_VARIABLE_DRIVER_CONFIG SecureBoot"), "{described:#?}");
    assert!(has(7, "EV_EFI_VARIABLE_AUTHORITY db"), "{described:#?}");
    assert!(has(0, "EV_SEPARATOR"), "{described:#?}");
    // The data of a loaded image is not what was measured, so its text is not shown.
    assert!(has(4, "EV_EFI_BOOT_SERVICES_APPLICATION"), "{described:#?}");
    let hostile = Writer::new(&[SHA256]).event(7, 0x8000_0007, 1, b"\x1b[2J<script>\n").bytes;
    let hostile = Log::parse(&hostile).unwrap().events().next().unwrap().describe();
    assert_eq!(hostile, "EV_EFI_ACTION [2J<script> (as the log says)");
    // An event with a forged type has the wrong digest, with data or without.
    for (kind, name) in [(SEPARATOR, "EV_SEPARATOR"), (5, "EV_ACTION"), (0x8000_0007, "EV_EFI_ACTION")] {
        let relabelled = Writer::new(&[SHA256]).event(4, kind, 1, b"").bytes;
        let described = Log::parse(&relabelled).unwrap().events().next().unwrap().describe();
        assert_eq!(described, format!("{name} (as the log says)"));
    }
}

#[test]
fn what_differs_between_two_boots_is_told_by_events() {
    let (before, after) = (boot("ovmf-sb-direct-kernel"), boot("ovmf-sb-uki"));
    let (before, after) = (Log::parse(&before).unwrap(), Log::parse(&after).unwrap());
    for pcr in 0..24 {
        assert_eq!(differences(pcr, Some(&after), &after), Differences::default());
    }
    assert_eq!(differences(0, Some(&before), &after), Differences::default());
    let secure_boot: Vec<_> =
        differences(7, Some(&before), &after).events.into_iter().map(|of| (of.is_new, of.description)).collect();
    assert_eq!(secure_boot, [(true, "EV_EFI_VARIABLE_AUTHORITY db".to_owned())]);
    let gone = differences(7, Some(&after), &before).events;
    assert!(gone.len() == 1 && !gone[0].is_new, "{gone:?}");
    let all = differences(4, None, &after).events;
    assert!(all.iter().all(|of| of.is_new) && all.len() == 3, "{all:?}");
    // Comparing counts duplicates: two equal events differ from one.
    let once = Writer::new(&[SHA256]).event(4, SEPARATOR, 1, b"");
    let twice = once.clone().event(4, SEPARATOR, 1, b"");
    let (once, twice) = (Log::parse(&once.bytes).unwrap(), Log::parse(&twice.bytes).unwrap());
    assert_eq!(differences(4, Some(&once), &twice).events.len(), 1);
    let long = (0..1000).fold(Writer::new(&[SHA256]), |log, _| log.event(4, SEPARATOR, 1, b""));
    let listed = differences(4, None, &Log::parse(&long.bytes).unwrap());
    assert_eq!((listed.events.len(), listed.omitted), (64, 936));
}

#[test]
fn events_that_are_gone_do_not_hide_new_ones() {
    let before = (0..100).fold(Writer::new(&[SHA256]), |log, _| log.event(4, SEPARATOR, 1, b""));
    let after = Writer::new(&[SHA256]).event(4, SEPARATOR, 2, b"").event(4, SEPARATOR, 3, b"");
    let (before, after) = (Log::parse(&before.bytes).unwrap(), Log::parse(&after.bytes).unwrap());
    let listed = differences(4, Some(&before), &after);
    let is_new: Vec<_> = listed.events.iter().map(|event| event.is_new).collect();
    assert_eq!((&is_new[..3], is_new.len(), listed.omitted), (&[true, true, false][..], 64, 38));
}

// --- Evidence ---

fn tpm(boot: &str) -> SoftwareTpm {
    let key = RsaPrivateKey::from_pkcs8_der(&file("ek.pkcs8")).unwrap();
    let mut tpm = SoftwareTpm::new(key).unwrap();
    tpm.pcrs = some(&recorded(boot), PcrSet::ALWAYS);
    tpm
}

fn state(tpm: &SoftwareTpm) -> State {
    State {
        ends: i64::MAX,
        session_id: SESSION,
        endorsement_key: [0; 32],
        credential: Zeroizing::new([5; 32]),
        selection: PcrSet::ALWAYS,
        ak_public: tpm.ak_public().to_vec(),
    }
}

struct Sent {
    quote: Vec<u8>,
    signature: Vec<u8>,
    pcr_values: Vec<u8>,
    log: Vec<u8>,
}

impl Sent {
    fn new(tpm: &SoftwareTpm, log: &str) -> Self {
        let data = qualifying_data(&[5; 32], &SESSION, IDENTITY_KEY);
        let (quote, signature) = tpm.quote(&data).unwrap();
        Self { quote, signature, pcr_values: tpm.pcrs.to_bytes(), log: boot(log) }
    }

    fn check(&self, state: &State) -> Result<(), EvidenceError> {
        self.check_with(state, IDENTITY_KEY)
    }

    fn check_with(&self, state: &State, identity_key: &[u8]) -> Result<(), EvidenceError> {
        evidence::check(&self.evidence(), state, identity_key).map(drop)
    }

    fn evidence(&self) -> Evidence<'_> {
        Evidence {
            state: b"",
            quote: &self.quote,
            signature: &self.signature,
            pcr_values: &self.pcr_values,
            log: &self.log,
        }
    }
}

#[track_caller]
fn is_quote(result: Result<(), EvidenceError>) {
    assert!(matches!(result, Err(EvidenceError::Quote(_))), "{result:?}");
}

#[track_caller]
fn is_pcrs(result: Result<(), EvidenceError>) {
    assert!(matches!(result, Err(EvidenceError::Pcrs(_))), "{result:?}");
}

#[track_caller]
fn is_log(result: Result<(), EvidenceError>) {
    assert!(matches!(result, Err(EvidenceError::Log(_))), "{result:?}");
}

#[test]
fn the_evidence_of_an_honest_host_holds() {
    for name in BOOTS {
        let tpm = tpm(name);
        let sent = Sent::new(&tpm, name);
        assert_eq!(sent.check(&state(&tpm)), Ok(()));
        let context = sent.evidence().to_context();
        let parsed = Context::parse(&context).unwrap();
        assert_eq!(Evidence::of(&parsed).unwrap(), sent.evidence());
    }
}

#[test]
fn a_quote_for_something_else_proves_nothing() {
    let tpm = tpm("ovmf-sb-uki");
    let state = state(&tpm);
    let sent = Sent::new(&tpm, "ovmf-sb-uki");
    is_quote(sent.check_with(&state, b"another identity key"));
    is_quote(sent.check(&State { session_id: [8; 16], ..state.clone() }));
    is_quote(sent.check(&State { credential: Zeroizing::new([6; 32]), ..state.clone() }));
    is_quote(sent.check(&State { ak_public: file("ak-ecc.public"), ..state.clone() }));
    is_quote(sent.check(&State { ak_public: file("ak-rsa.public"), ..state.clone() }));
    let resigned = |quote: Vec<u8>| Sent {
        signature: tpm.sign(&quote).unwrap(),
        quote,
        pcr_values: sent.pcr_values.clone(),
        log: sent.log.clone(),
    };
    let with = |at: usize, value: u8| {
        let mut quote = sent.quote.clone();
        quote[at] = value;
        resigned(quote)
    };
    assert_eq!(resigned(sent.quote.clone()).check(&state), Ok(()));
    is_quote(with(0, 0).check(&state)); // not of a TPM's making
    is_quote(with(5, 0x17).check(&state)); // another attestation than a quote
    is_quote(with(12, sent.quote[12] ^ 1).check(&state)); // another nonce
    is_quote(resigned([&sent.quote[..], &[0]].concat()).check(&state));
    is_quote(Sent { signature: Vec::new(), ..Sent::new(&tpm, "ovmf-sb-uki") }.check(&state));
}

#[test]
fn other_pcrs_than_asked_for_prove_nothing() {
    let mut tpm = tpm("ovmf-sb-uki");
    let good = state(&tpm);
    let wider: PcrSet = [0, 2, 4, 7, 9].into_iter().collect();
    is_pcrs(Sent::new(&tpm, "ovmf-sb-uki").check(&State { selection: wider, ..good.clone() }));
    let mut other_values = Sent::new(&tpm, "ovmf-sb-uki");
    other_values.pcr_values[40] ^= 1;
    is_pcrs(other_values.check(&good));
    let mut longer = Sent::new(&tpm, "ovmf-sb-uki");
    longer.pcr_values.extend_from_slice(&[0; 32]);
    is_pcrs(longer.check(&good));
    // The PCRs of the quote are checked before the values and the log.
    longer.log.clear();
    is_pcrs(longer.check(&good));
    tpm.pcrs.set(9, [0; 32]);
    is_pcrs(Sent::new(&tpm, "ovmf-sb-uki").check(&good));
}

#[test]
fn a_log_of_another_boot_proves_nothing() {
    let tpm = tpm("ovmf-sb-uki");
    let state = state(&tpm);
    is_log(Sent::new(&tpm, "ovmf-nosb").check(&state));
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut sent = Sent::new(&tpm, "ovmf-sb-uki");
        change(&mut sent.log);
        sent.check(&state)
    };
    // The log has only SHA-256 digests. Its header takes 65 bytes.
    let header = Writer::new(&[SHA256]).bytes.len();
    let appended = |pcr: u32, kind: u32| Writer::new(&[SHA256]).event(pcr, kind, 1, b"").bytes[header..].to_vec();
    for pcr in [0, 2, 4, 7] {
        is_log(with(&|log| log.extend_from_slice(&appended(pcr, SEPARATOR))));
    }
    // Allowed: events that extend nothing, or that extend a PCR outside of the required ones.
    assert_eq!(with(&|log| log.extend_from_slice(&appended(0, NO_ACTION))), Ok(()));
    assert_eq!(with(&|log| log.extend_from_slice(&appended(5, SEPARATOR))), Ok(()));
    is_log(with(&|log| log.truncate(log.len() - 1)));
    is_log(with(&|log| log.truncate(header)));
    is_log(with(&|log| log.push(0)));
    // A measured event that was relabelled as one that extends nothing.
    let bytes = boot("ovmf-sb-uki");
    let at = bytes.windows(4).position(|window| window == 0x8000_0001_u32.to_le_bytes()).unwrap();
    is_log(with(&|log| log[at..at + 4].copy_from_slice(&NO_ACTION.to_le_bytes())));
    // Another event type does not change what is proven.
    assert_eq!(with(&|log| log[at..at + 4].copy_from_slice(&SEPARATOR.to_le_bytes())), Ok(()));
}

// --- Policies ---

fn baseline(name: &str, boot: &str, pcrs: &[usize]) -> Baseline {
    Baseline { name: name.to_owned(), values: some(&recorded(boot), pcrs.iter().copied().collect()) }
}

#[test]
fn policies_judge_what_was_booted() {
    let good = baseline("good", "ovmf-sb-uki", &[0, 4, 7]);
    let judged = |boot_name: &str, restart_count: u32, baselines: &[Baseline]| {
        let bytes = boot(boot_name);
        let verdict = judge(&Log::parse(&bytes).unwrap(), &recorded(boot_name), restart_count, baselines);
        (verdict.failed, verdict.baseline.map(|baseline| baseline.name.clone()))
    };
    use Policy::{FullBoot, SecureBootEnabled, SecureBootSettings};
    assert_eq!(judged("ovmf-sb-uki", 0, std::slice::from_ref(&good)), (vec![], Some("good".to_owned())));
    assert_eq!(judged("ovmf-sb-uki", 1, std::slice::from_ref(&good)), (vec![FullBoot], Some("good".to_owned())));
    assert_eq!(judged("ovmf-sb-uki", 0, &[]), (vec![SecureBootSettings], None));
    let other = judged("ovmf-sb-direct-kernel", 0, std::slice::from_ref(&good));
    assert_eq!(other, (vec![SecureBootSettings], None));
    let all = judged("ovmf-nosb", 7, std::slice::from_ref(&good));
    assert_eq!(all, (vec![SecureBootEnabled, SecureBootSettings, FullBoot], None));
    // With Secure Boot off, the policy fails even if the baseline matches.
    let off = baseline("off", "ovmf-nosb", &[0, 4, 7]);
    assert_eq!(judged("ovmf-nosb", 0, &[off]), (vec![SecureBootEnabled], Some("off".to_owned())));

    // If several baselines match, the first by name is reported.
    let wide = baseline("Wide", "ovmf-sb-uki", &[0, 2, 4, 7, 9, 11]);
    let umlaut = baseline("ä", "ovmf-sb-uki", &[0, 4, 7]);
    let (_, matched) = judged("ovmf-sb-uki", 0, &[umlaut, good.clone(), wide.clone()]);
    assert_eq!(matched.as_deref(), Some("Wide"));
    // A baseline with a value that was not quoted does not match.
    let quoted = some(&recorded("ovmf-sb-uki"), PcrSet::ALWAYS);
    assert!(good.matches(&quoted) && !wide.matches(&quoted));
    assert_eq!(selection([&good]), PcrSet::ALWAYS);
    assert_eq!(selection([&good, &wide]).iter().collect::<Vec<_>>(), [0, 2, 4, 7, 9, 11]);
}

#[test]
fn secure_boot_is_the_first_extension_and_judged_by_its_digest() {
    let bytes = boot("ovmf-sb-uki");
    let genuine = Log::parse(&bytes).unwrap().first_extension(7).unwrap();
    let digest: [u8; 32] = genuine.digest(Bank::Sha256).unwrap().try_into().unwrap();
    // The right data with another digest, and the right event after another one.
    let forged = Writer::new(&[SHA256]).event(7, genuine.kind, 1, genuine.data);
    assert!(!Log::parse(&forged.bytes).unwrap().first_extension(7).unwrap().is_secure_boot_on());
    let mut late = forged.event(7, genuine.kind, 0, genuine.data);
    let at = late.bytes.len() - genuine.data.len() - 4 - 32;
    late.bytes[at..at + 32].copy_from_slice(&digest);
    let log = Log::parse(&late.bytes).unwrap();
    assert!(!log.first_extension(7).unwrap().is_secure_boot_on());
    assert!(log.events().nth(1).unwrap().is_secure_boot_on());
    // Type and data are ignored if the digest is right.
    let mut other = Writer::new(&[SHA256]).event(7, NO_ACTION, 1, b"").event(7, SEPARATOR, 0, b"forged");
    let at = other.bytes.len() - 6 - 4 - 32;
    other.bytes[at..at + 32].copy_from_slice(&digest);
    assert!(Log::parse(&other.bytes).unwrap().first_extension(7).unwrap().is_secure_boot_on());
}

#[test]
fn reasons_travel_as_guids() {
    let guid = |policy: Policy| data_encoding::BASE64.encode(&policy.guid());
    assert_eq!(guid(Policy::SecureBootEnabled), "4Q5Gaupib0GubATiljRQbQ==");
    for policy in Policy::ALL {
        assert_eq!(Policy::from_guid(&policy.guid()), Some(policy));
    }
    assert_eq!(Policy::from_guid(&[0; 16]), None);
}

// --- Damage ---

/// A small deterministic random number generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// Calls `read` with many damaged copies of `good`: changed bytes, fields with extreme values, parts removed,
/// duplicated or exchanged. No call may panic or take long.
fn damage(good: &[u8], rounds: usize, read: impl Fn(&[u8])) {
    let mut numbers = Numbers(good.len() as u64);
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        let mut bytes = good.to_vec();
        for _ in 0..1 + numbers.below(4) {
            let at = numbers.below(bytes.len().max(1)).min(bytes.len());
            let end = (at + 1 + numbers.below(64)).min(bytes.len());
            match numbers.below(6) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << numbers.below(8)),
                1 => bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = 0xff),
                2 => bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = 0),
                3 => bytes.truncate(at),
                4 => drop(bytes.drain(at..end)),
                _ => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy);
                }
            }
        }
        let begun = Instant::now();
        read(&bytes);
        slowest = slowest.max(begun.elapsed());
    }
    // Far above the documented limit, for busy machines.
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

/// Number of damaged copies of each structure. `CLAVIGER_MUTATIONS=N` for more.
fn rounds() -> usize {
    std::env::var("CLAVIGER_MUTATIONS").map_or(5_000, |rounds| rounds.parse().unwrap())
}

#[test]
fn damaged_structures_are_refused_without_a_panic() {
    for name in BOOTS {
        damage(&boot(name), rounds(), |bytes| {
            if let Ok(log) = Log::parse(bytes) {
                assert!(log.replay().get(0).is_some());
                log.events().for_each(|event| drop(event.describe()));
            }
        });
    }
    for kind in ["rsa", "ecc"] {
        damage(&file(&format!("ak-{kind}.public")), rounds(), |bytes| drop(AttestationKey::parse(bytes)));
        damage(&file(&format!("{kind}.quote")), rounds(), |bytes| drop(Quote::parse(bytes)));
        damage(&file(&format!("{kind}.signature")), rounds(), |bytes| drop(Signature::parse(bytes)));
    }
    damage(&PcrSet::ALWAYS.to_selection(), rounds(), |bytes| {
        let _ = PcrSet::from_selection(bytes);
    });
    let tpm = tpm("ovmf-sb-uki");
    let state = state(&tpm);
    let good = Sent::new(&tpm, "ovmf-sb-uki");
    damage(&good.evidence().to_context(), rounds(), |bytes| {
        let Ok(context) = Context::parse(bytes) else { return };
        let Ok(evidence) = Evidence::of(&context) else { return };
        let _ = evidence::check(&evidence, &state, IDENTITY_KEY);
    });
    let first = context::write(&[(Kind::AkPublic, tpm.ak_public())]);
    damage(&first, rounds(), |bytes| {
        let Ok(context) = Context::parse(bytes) else { return };
        if let Ok([public]) = context.exactly([Kind::AkPublic]) {
            drop(AttestationKey::parse(public));
        }
    });
}

#[test]
fn the_largest_log_is_read_in_time() {
    // Logs with as many events as possible: 46 bytes each, and the smallest events of a log with more algorithms.
    for algorithms in [&[SHA256][..], &[SHA256, (0x04, 20), (0x0c, 48), (0x0d, 64)]] {
        let mut log = Writer::new(algorithms);
        let one = Writer::new(algorithms).event(0, SEPARATOR, 1, b"").bytes[log.bytes.len()..].to_vec();
        while log.bytes.len() + one.len() <= context::MAX_LOG {
            log.bytes.extend_from_slice(&one);
        }
        let begun = Instant::now();
        let log = Log::parse(&log.bytes).unwrap();
        assert!(log.replay().get(0).is_some());
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}

#[test]
fn keys_of_an_endorsement_are_judged() {
    use claviger_protocol::attestation::tpm::is_endorsement_key;
    let key = RsaPrivateKey::from_pkcs8_der(&file("ek.pkcs8")).unwrap();
    assert!(is_endorsement_key(key.public()));
    let other = |bits: usize, exponent: &[u8]| {
        let mut modulus = vec![0xff; bits.div_ceil(8)];
        modulus[0] >>= modulus.len() * 8 - bits;
        is_endorsement_key(&RsaPublicKey::from_components(&modulus, exponent).unwrap())
    };
    assert!(other(2048, &[1, 0, 1]));
    assert!(!other(2048, &[1, 0, 3]));
    assert!(!other(2049, &[1, 0, 1]));
    assert!(!other(3072, &[1, 0, 1]));
}

// --- Messages ---

mod messages {
    use claviger_protocol::attestation::tpm::{
        TpmRequest, continue_reply, endorsement_key_of, first_request, parse_continue_reply, second_request,
    };
    use claviger_protocol::attestation::{HostKeyRequest, ResultType};
    use data_encoding::BASE64;
    use serde_json::{Value, json};

    use super::*;

    fn ek() -> RsaPrivateKey {
        RsaPrivateKey::from_pkcs8_der(&file("ek.pkcs8")).unwrap()
    }

    fn step_1() -> Value {
        let context = context::write(&[(Kind::AkPublic, b"ak")]);
        let wanted = [ResultType::EncryptionCertificate, ResultType::SigningCertificate];
        serde_json::from_slice(&first_request(SESSION, &wanted, ek().public().spki_der(), &context)).unwrap()
    }

    fn step_2() -> Value {
        let context = context::write(&[(Kind::State, b"")]);
        let (ek, identity) = (ek(), ek().public().to_bcrypt_blob());
        let wanted = [ResultType::EncryptionCertificate];
        let body = second_request(SESSION, &wanted, ek.public().spki_der(), &identity, &context);
        serde_json::from_slice(&body).unwrap()
    }

    fn parse(body: &Value) -> Result<TpmRequest, String> {
        TpmRequest::parse(&serde_json::to_vec(body).unwrap()).map_err(|e| e.to_string())
    }

    /// Parses `body` after replacing or removing the content of this type.
    fn with(mut body: Value, content_type: u32, octets: Option<&[u8]>) -> Result<TpmRequest, String> {
        let provided = body["ProvidedContent"].as_array_mut().unwrap();
        provided.retain(|tuple| tuple["m_Item1"] != content_type);
        if let Some(octets) = octets {
            provided.push(json!({"m_Item1": content_type, "m_Item2": BASE64.encode(octets)}));
        }
        parse(&body)
    }

    #[test]
    fn both_steps_are_read_as_they_were_written() {
        let first = parse(&step_1()).unwrap();
        assert_eq!(first.session_id, SESSION);
        assert_eq!(first.requested, [ResultType::EncryptionCertificate, ResultType::SigningCertificate]);
        assert_eq!(&first.endorsement_key, ek().public());
        assert_eq!(first.identity_key, None);
        assert_eq!(first.context().unwrap().get(Kind::AkPublic), Some(&b"ak"[..]));

        let second = parse(&step_2()).unwrap();
        let (identity, octets) = second.identity_key.unwrap();
        assert_eq!((&identity, octets), (ek().public(), ek().public().to_bcrypt_blob()));

        let reply = continue_reply(b"context");
        assert_eq!(parse_continue_reply(&reply).unwrap(), b"context");
        let text = String::from_utf8(reply).unwrap();
        assert!(
            text.starts_with(r#"{"__type":"TpmReplyContinue:#Microsoft.Windows.RemoteAttestation.Core","#),
            "{text}"
        );
        assert!(parse_continue_reply(br#"{"__type":"TpmReplyContinue","RtpmActiveContext":""}"#).is_err());
    }

    #[test]
    fn what_lacks_its_content_is_refused() {
        let refused = |result: Result<TpmRequest, String>, why: &str| {
            let error = result.unwrap_err();
            assert!(error.contains(why), "{error:?} does not say {why:?}");
        };
        for body in [step_1(), step_2()] {
            refused(with(body.clone(), 4, None), "lacks 4");
            refused(with(body.clone(), 2, None), "lacks 2");
            refused(with(body.clone(), 4, Some(&ek().public().to_bcrypt_blob())), "neither a certificate nor");
            refused(with(body.clone(), 4, Some(b"")), "EndorsementKeyCertificate");
            let longer = RsaPrivateKey::generate(3072).unwrap();
            refused(with(body.clone(), 4, Some(longer.public().spki_der())), "2048 bits");
            for (requested, why) in
                [(json!([3]), "is not served"), (json!([1, 3]), "is not served"), (json!([]), "empty")]
            {
                let mut body = body.clone();
                body["RequestedContent"] = requested;
                refused(parse(&body), why);
            }
            let mut twice = body.clone();
            let first = twice["ProvidedContent"][0].clone();
            twice["ProvidedContent"].as_array_mut().unwrap().push(first);
            refused(parse(&twice), "twice");
            let mut short = body.clone();
            short["SessionId"] = json!("AAAA");
            refused(parse(&short), "16 octets");
        }
        refused(with(step_2(), 1, None), "lacks 1");
        refused(with(step_2(), 1, Some(b"no key")), "VirtualSecureModeIdentityKey");
        // In step 1 the identity key is not read. The Context is not checked here.
        assert!(with(step_1(), 1, Some(b"no key")).is_ok());
        for context in [&b""[..], b"no context", &context::write(&[(Kind::Log, b"x")])] {
            assert_eq!(with(step_1(), 2, Some(context)).unwrap().identity_key, None);
        }
        // A request of the other mode.
        assert!(HostKeyRequest::parse(&serde_json::to_vec(&step_2()).unwrap()).is_err());
    }

    #[test]
    fn an_endorsement_key_is_the_same_in_its_certificate() {
        use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial};
        let template = Template {
            subject: DistinguishedName::new("an endorsement key"),
            issuer_der: None,
            key: ek().public().clone(),
            serial: random_serial().unwrap(),
            not_before: 0,
            not_after: 1,
            key_usage: Default::default(),
            extended_key_usages: vec!["2.23.133.8.1"],
            ca: Some(false),
            subject_key_id: None,
            authority_key_id: None,
            dns_names: Vec::new(),
        };
        let der = template.to_be_signed().unwrap().sign_with(&ek()).unwrap();
        assert_eq!(&endorsement_key_of(&der).unwrap(), ek().public());
        assert!(endorsement_key_of(&[&der[..], &[0]].concat()).is_err());
    }
}
