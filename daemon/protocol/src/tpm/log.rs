//! The TCG2 (crypto-agile) event log: the measurements of firmware and boot loader, in order (TCG PC Client Platform
//! Firmware Profile, section 10).
//!
//! An event's type and data prove nothing. The digests are proven only if their replay gives the PCR values of a quote.
//! Data is proven only if its digest equals the event's digest.

use std::sync::LazyLock;

use ring::digest;

use super::pcr::{COUNT, PcrValues};
use super::reader::Reader;
use super::{Malformed, algorithm};
use crate::hash::sha256;

/// Event types (section 10.4.1 of the same document).
mod kind {
    pub(super) const NO_ACTION: u32 = 3;
    pub(super) const SEPARATOR: u32 = 4;
    pub(super) const ACTION: u32 = 5;
    pub(super) const EVENT_TAG: u32 = 6;
    pub(super) const IPL: u32 = 13;
    pub(super) const EFI_VARIABLE_DRIVER_CONFIG: u32 = 0x8000_0001;
    pub(super) const EFI_VARIABLE_BOOT: u32 = 0x8000_0002;
    pub(super) const EFI_ACTION: u32 = 0x8000_0007;
    pub(super) const EFI_VARIABLE_BOOT2: u32 = 0x8000_000c;
    pub(super) const EFI_HCRTM: u32 = 0x8000_0010;
    pub(super) const EFI_VARIABLE_AUTHORITY: u32 = 0x8000_00e0;
}

/// Prefix of the header event's data.
const SPEC_ID: &[u8; 16] = b"Spec ID Event03\0";
/// Prefix of the data of a startup locality event.
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";
/// Bytes of the digest in the header event, always SHA-1.
const HEADER_DIGEST: usize = 20;
/// Most digest algorithms of a log.
const MAX_ALGORITHMS: u32 = 16;
/// Longest digest of an unknown algorithm.
const MAX_DIGEST: u16 = 64;
/// Startup locality of PCR 0 if something was measured before the CRTM.
const HCRTM_LOCALITY: u8 = 4;

/// GUID of UEFI's global variables, 8be4df61-93ca-11d2-aa0d-00e098032b8c, in its byte order in memory.
const GLOBAL_VARIABLE: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];

/// Digest of `UEFI_VARIABLE_DATA` for the variable SecureBoot with data 01: the event of a firmware with Secure Boot
/// on.
static SECURE_BOOT_ON: LazyLock<[u8; 32]> =
    LazyLock::new(|| sha256(&variable_data(&GLOBAL_VARIABLE, "SecureBoot", &[1])));

/// A PCR bank that can be replayed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Bank {
    /// SHA-1.
    Sha1,
    /// SHA-256, the only one that attestation uses.
    Sha256,
    /// SHA-384.
    Sha384,
}

impl Bank {
    fn of(algorithm: u16) -> Option<Self> {
        match algorithm {
            algorithm::SHA1 => Some(Self::Sha1),
            algorithm::SHA256 => Some(Self::Sha256),
            algorithm::SHA384 => Some(Self::Sha384),
            _ => None,
        }
    }

    fn digest(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
        }
    }
}

/// One event. It was measured into a PCR if [`Event::extends`] is true; otherwise it is a note in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event<'a> {
    /// The PCR.
    pub pcr: u32,
    /// The event's type, as the log says.
    pub kind: u32,
    /// The measured data, or a description of it.
    pub data: &'a [u8],
    sha1: Option<&'a [u8]>,
    sha256: Option<&'a [u8]>,
    sha384: Option<&'a [u8]>,
}

impl<'a> Event<'a> {
    /// The event's digest in this bank.
    #[must_use]
    pub fn digest(&self, bank: Bank) -> Option<&'a [u8]> {
        match bank {
            Bank::Sha1 => self.sha1,
            Bank::Sha256 => self.sha256,
            Bank::Sha384 => self.sha384,
        }
    }

    /// Whether the event extended its PCR.
    #[must_use]
    pub fn extends(&self) -> bool {
        self.kind != kind::NO_ACTION
    }

    /// Whether the event's SHA-256 digest is the digest of its data. Then the data is proven if the digest is.
    #[must_use]
    pub fn proves_data(&self) -> bool {
        self.sha256.is_some_and(|digest| sha256(self.data) == digest)
    }

    /// Whether the event's digest is the measurement of "Secure Boot is on". Type and data are ignored.
    #[must_use]
    pub fn is_secure_boot_on(&self) -> bool {
        self.sha256 == Some(&*SECURE_BOOT_ON)
    }

    /// The startup locality of PCR 0, if the event states it.
    fn startup_locality(&self) -> Option<u8> {
        if self.extends() || self.pcr != 0 {
            return None;
        }
        match self.data.strip_prefix(STARTUP_LOCALITY)? {
            [locality] => Some(*locality),
            _ => None,
        }
    }

    /// A short description for administrators: the event's type and, if the format is known, its data. Printable
    /// characters only.
    #[must_use]
    pub fn describe(&self) -> String {
        let name = kind_name(self.kind);
        let detail = match self.kind {
            kind::EFI_VARIABLE_DRIVER_CONFIG
            | kind::EFI_VARIABLE_BOOT
            | kind::EFI_VARIABLE_BOOT2
            | kind::EFI_VARIABLE_AUTHORITY => variable_name(self.data),
            kind::ACTION | kind::EFI_ACTION => Some(self.data.to_vec()),
            kind::IPL => Some(narrowed(self.data)),
            kind::EVENT_TAG => self.data.get(8..).map(narrowed),
            _ => None,
        };
        let detail: String = detail
            .iter()
            .flat_map(|bytes| String::from_utf8_lossy(bytes).chars().collect::<Vec<_>>())
            .filter(|character| character.is_ascii_graphic() || *character == ' ')
            .take(80)
            .collect();
        // For image and IPL events, the digest by definition does not cover the data, so their text is never proven.
        // For separators and actions, the digest covers the data; an event with another digest has another type.
        let is_provable = !detail.is_empty() || matches!(self.kind, kind::SEPARATOR | kind::ACTION | kind::EFI_ACTION);
        let doubt = if is_provable && !self.proves_data() { " (as the log says)" } else { "" };
        let space = if detail.is_empty() { "" } else { " " };
        format!("{name}{space}{detail}{doubt}")
    }
}

/// A well-formed log with SHA-256 digests. Nothing in it is proven yet.
#[derive(Clone, Debug)]
pub struct Log<'a> {
    algorithms: Algorithms,
    /// The events after the header.
    events: &'a [u8],
}

/// The digest algorithms of a log and their lengths.
#[derive(Clone, Copy, Debug, Default)]
struct Algorithms {
    entries: [(u16, u16); MAX_ALGORITHMS as usize],
    count: usize,
}

impl Algorithms {
    fn iter(&self) -> impl Iterator<Item = &(u16, u16)> {
        self.entries.iter().take(self.count)
    }
}

impl<'a> Log<'a> {
    /// Parses a log. Only the bytes are kept: a hostile log costs one pass over it and no memory.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let algorithms = header(&mut reader)?;
        let events = reader.rest();
        while !reader.is_empty() {
            event(&mut reader, &algorithms)?;
        }
        Ok(Self { algorithms, events })
    }

    /// The events after the header, in order.
    pub fn events(&self) -> impl Iterator<Item = Event<'a>> {
        let algorithms = self.algorithms;
        let mut reader = Reader::new(self.events);
        // `parse` has already read all events without an error.
        std::iter::from_fn(move || event(&mut reader, &algorithms).ok())
    }

    /// The first event that extended this PCR.
    #[must_use]
    pub fn first_extension(&self, pcr: u32) -> Option<Event<'a>> {
        self.events().find(|event| event.pcr == pcr && event.extends())
    }

    /// Replays the events: the resulting PCR values in the SHA-256 bank.
    #[must_use]
    pub fn replay(&self) -> PcrValues {
        let mut values = PcrValues::default();
        for (pcr, value) in self.replay_bank(Bank::Sha256).into_iter().flatten().enumerate() {
            if let Ok(value) = value.try_into() {
                values.set(pcr, value);
            }
        }
        values
    }

    /// Replays the events in a bank: the resulting PCR values, starting with PCR 0. `None`: the log has no digests of
    /// that bank.
    #[must_use]
    pub fn replay_bank(&self, bank: Bank) -> Option<Vec<Vec<u8>>> {
        self.algorithms.iter().find(|(algorithm, _)| Bank::of(*algorithm) == Some(bank))?;
        let mut values = vec![vec![0; bank.digest().output_len()]; COUNT];
        let mut extended = [false; COUNT];
        let start_pcr_0 = |values: &mut Vec<Vec<u8>>, locality: u8| {
            if let Some(last) = values.first_mut().and_then(|value| value.last_mut()) {
                *last = locality;
            }
        };
        for event in self.events() {
            if !extended[0] {
                if let Some(locality) = event.startup_locality() {
                    start_pcr_0(&mut values, locality);
                } else if event.kind == kind::EFI_HCRTM && event.pcr == 0 {
                    start_pcr_0(&mut values, HCRTM_LOCALITY);
                }
            }
            if !event.extends() {
                continue;
            }
            // Both values exist: `parse` checked all events.
            let pcr = event.pcr as usize;
            let (Some(value), Some(digest)) = (values.get_mut(pcr), event.digest(bank)) else { continue };
            let mut context = digest::Context::new(bank.digest());
            context.update(value);
            context.update(digest);
            value.copy_from_slice(context.finish().as_ref());
            extended[pcr] = true;
        }
        Some(values)
    }
}

/// Writes a log with SHA-256 digests, for software TPMs and demonstrations.
#[derive(Clone, Debug)]
pub struct LogWriter(Vec<u8>);

impl LogWriter {
    /// A log without events.
    #[must_use]
    pub fn new() -> Self {
        let mut header = SPEC_ID.to_vec();
        // Platform class, version 2.0, size of UINTN, one algorithm and its length, no vendor information.
        header.extend_from_slice(&[0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0]);
        let mut log = [[0; 4], kind::NO_ACTION.to_le_bytes()].concat();
        log.extend_from_slice(&[0; HEADER_DIGEST]);
        log.extend_from_slice(&(header.len() as u32).to_le_bytes());
        log.extend_from_slice(&header);
        Self(log)
    }

    /// Adds an event of this type. Its data is the measured data.
    #[must_use]
    pub fn measured(mut self, pcr: u32, kind: u32, data: &[u8]) -> Self {
        for field in [pcr, kind, 1] {
            self.0.extend_from_slice(&field.to_le_bytes());
        }
        self.0.extend_from_slice(&algorithm::SHA256.to_le_bytes());
        self.0.extend_from_slice(&sha256(data));
        self.0.extend_from_slice(&(data.len() as u32).to_le_bytes());
        self.0.extend_from_slice(data);
        self
    }

    /// Returns the log.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

impl Default for LogWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// A log of a short boot with Secure Boot on: firmware, boot loader, kernel.
#[must_use]
pub fn short_boot(firmware: &str, kernel: &str) -> Vec<u8> {
    const CRTM_VERSION: u32 = 8;
    let secure_boot = variable_data(&GLOBAL_VARIABLE, "SecureBoot", &[1]);
    let log = LogWriter::new().measured(0, CRTM_VERSION, firmware.as_bytes()).measured(
        7,
        kind::EFI_VARIABLE_DRIVER_CONFIG,
        &secure_boot,
    );
    let log = (0..8).fold(log, |log, pcr| log.measured(pcr, kind::SEPARATOR, &[0; 4]));
    log.measured(4, kind::EFI_ACTION, b"Calling EFI Application from Boot Option")
        .measured(4, kind::IPL, kernel.as_bytes())
        .finish()
}

/// Reads the header event, which lists the digest algorithms of the log.
fn header(reader: &mut Reader<'_>) -> Result<Algorithms, Malformed> {
    if reader.u32_le()? != 0 || reader.u32_le()? != kind::NO_ACTION {
        return Err(Malformed("the log's first event is not a header"));
    }
    reader.take(HEADER_DIGEST)?;
    let length = reader.u32_le()?;
    let mut data = Reader::new(reader.take_u32(length)?);
    if data.take(SPEC_ID.len())? != SPEC_ID {
        return Err(Malformed("the log is not of the crypto-agile kind"));
    }
    data.take(8)?; // platform class, versions, size of UINTN
    let count = data.u32_le()?;
    if !(1..=MAX_ALGORITHMS).contains(&count) {
        return Err(Malformed("the log has no digest algorithm, or more than 16"));
    }
    let mut algorithms = Algorithms::default();
    for _ in 0..count {
        let (algorithm, length) = (data.u16_le()?, data.u16_le()?);
        let expected = match algorithm {
            algorithm::SHA1 => 20..=20,
            algorithm::SHA256 | algorithm::SM3_256 => 32..=32,
            algorithm::SHA384 => 48..=48,
            algorithm::SHA512 => 64..=64,
            _ => 1..=MAX_DIGEST,
        };
        if !expected.contains(&length) {
            return Err(Malformed("a digest algorithm has a wrong length"));
        }
        if algorithms.iter().any(|(other, _)| *other == algorithm) {
            return Err(Malformed("the log's header names a digest algorithm twice"));
        }
        if let Some(entry) = algorithms.entries.get_mut(algorithms.count) {
            *entry = (algorithm, length);
            algorithms.count += 1;
        }
    }
    let vendor = data.u8()?;
    data.take(usize::from(vendor))?;
    data.finish()?;
    if !algorithms.iter().any(|(algorithm, _)| *algorithm == algorithm::SHA256) {
        return Err(Malformed("the log has no SHA-256 digests"));
    }
    Ok(algorithms)
}

/// Reads one event after the header.
fn event<'a>(reader: &mut Reader<'a>, algorithms: &Algorithms) -> Result<Event<'a>, Malformed> {
    let (pcr, kind) = (reader.u32_le()?, reader.u32_le()?);
    if kind != kind::NO_ACTION && pcr as usize >= COUNT {
        return Err(Malformed("an event extends a PCR that does not exist"));
    }
    if reader.u32_le()? as usize != algorithms.count {
        return Err(Malformed("an event does not have one digest for each algorithm"));
    }
    let mut event = Event { pcr, kind, data: &[], sha1: None, sha256: None, sha384: None };
    let mut seen = 0_u32;
    for _ in 0..algorithms.count {
        let algorithm = reader.u16_le()?;
        let entry = algorithms.iter().enumerate().find(|(_, (other, _))| *other == algorithm);
        let (index, (_, length)) = entry.ok_or(Malformed("an event has a digest that the header does not name"))?;
        if seen >> index & 1 == 1 {
            return Err(Malformed("an event has a digest twice"));
        }
        seen |= 1 << index;
        let digest = reader.take(usize::from(*length))?;
        match Bank::of(algorithm) {
            Some(Bank::Sha1) => event.sha1 = Some(digest),
            Some(Bank::Sha256) => event.sha256 = Some(digest),
            Some(Bank::Sha384) => event.sha384 = Some(digest),
            None => {}
        }
    }
    let length = reader.u32_le()?;
    event.data = reader.take_u32(length)?;
    Ok(event)
}

/// `UEFI_VARIABLE_DATA`: the structure that firmware measures for a variable.
fn variable_data(guid: &[u8; 16], name: &str, data: &[u8]) -> Vec<u8> {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let lengths = [name.len() as u64 / 2, data.len() as u64];
    [&guid[..], &lengths.map(u64::to_le_bytes).concat(), &name, data].concat()
}

/// The name in `UEFI_VARIABLE_DATA`.
fn variable_name(data: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader::new(data);
    reader.take(GLOBAL_VARIABLE.len()).ok()?;
    let characters = usize::try_from(reader.u64_le().ok()?).ok()?;
    reader.u64_le().ok()?;
    reader.take(characters.checked_mul(2)?).ok().map(narrowed)
}

/// Converts text with one or two bytes per character to one byte per character.
fn narrowed(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|byte| *byte != 0).collect()
}

/// The name of an event type in the TCG profile.
fn kind_name(kind: u32) -> &'static str {
    match kind {
        0 => "EV_PREBOOT_CERT",
        1 => "EV_POST_CODE",
        kind::NO_ACTION => "EV_NO_ACTION",
        kind::SEPARATOR => "EV_SEPARATOR",
        kind::ACTION => "EV_ACTION",
        kind::EVENT_TAG => "EV_EVENT_TAG",
        7 => "EV_S_CRTM_CONTENTS",
        8 => "EV_S_CRTM_VERSION",
        9 => "EV_CPU_MICROCODE",
        10 => "EV_PLATFORM_CONFIG_FLAGS",
        11 => "EV_TABLE_OF_DEVICES",
        12 => "EV_COMPACT_HASH",
        kind::IPL => "EV_IPL",
        14 => "EV_IPL_PARTITION_DATA",
        15 => "EV_NONHOST_CODE",
        16 => "EV_NONHOST_CONFIG",
        17 => "EV_NONHOST_INFO",
        18 => "EV_OMIT_BOOT_DEVICE_EVENTS",
        kind::EFI_VARIABLE_DRIVER_CONFIG => "EV_EFI_VARIABLE_DRIVER_CONFIG",
        kind::EFI_VARIABLE_BOOT => "EV_EFI_VARIABLE_BOOT",
        0x8000_0003 => "EV_EFI_BOOT_SERVICES_APPLICATION",
        0x8000_0004 => "EV_EFI_BOOT_SERVICES_DRIVER",
        0x8000_0005 => "EV_EFI_RUNTIME_SERVICES_DRIVER",
        0x8000_0006 => "EV_EFI_GPT_EVENT",
        kind::EFI_ACTION => "EV_EFI_ACTION",
        0x8000_0008 => "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        0x8000_0009 => "EV_EFI_HANDOFF_TABLES",
        0x8000_000a => "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000_000b => "EV_EFI_HANDOFF_TABLES2",
        kind::EFI_VARIABLE_BOOT2 => "EV_EFI_VARIABLE_BOOT2",
        kind::EFI_HCRTM => "EV_EFI_HCRTM_EVENT",
        kind::EFI_VARIABLE_AUTHORITY => "EV_EFI_VARIABLE_AUTHORITY",
        0x8000_00e1 => "EV_EFI_SPDM_FIRMWARE_BLOB",
        0x8000_00e2 => "EV_EFI_SPDM_FIRMWARE_CONFIG",
        _ => "an event of unknown type",
    }
}
