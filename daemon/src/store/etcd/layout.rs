//! Keys and values in etcd. `docs/nodes.md` describes them; values are JSON with a format version.

use data_encoding::HEXLOWER_PERMISSIVE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::baselines::{check_baseline_name, check_values, values_from_text, values_to_text};
use super::super::contents::{Contents, Delta};
use super::super::error::StateError;
use super::super::labels::Labels;
use super::super::records::{
    Baseline, Certificate, Host, HostKind, KeptBaseline, KeptLog, Kind, RemovedBaseline, RevokedSigner, Signer,
    sha256_hex,
};
use super::super::table::{Changes, Row, Table};

/// The format version that this program writes, and the newest that it reads.
const VERSION: u32 = 1;

/// Folder of the records below the prefix, including the version of the key layout.
const STATE: &str = "v1/state/";

/// The keys below a prefix.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    prefix: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Write {
    /// A key without the prefix, and its new value.
    Put(String, Value),
    /// A key without the prefix, which is deleted.
    Delete(String),
}

/// A value that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub(super) struct BadValue {
    /// Name of the table.
    pub(super) table: &'static str,
    pub(super) key: String,
    pub(super) problem: String,
}

impl Layout {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// Adds the prefix to a key.
    pub(super) fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The folder of all records and the head, which nodes watch.
    pub(super) fn state(&self) -> String {
        self.key(STATE)
    }

    /// The key of the last change: every change writes it, on condition that it has not changed since the decision.
    pub(super) fn head(&self) -> String {
        format!("{}head", self.state())
    }

    /// The folder for parts of changes that are too large for one transaction.
    pub(super) fn journal(&self) -> String {
        self.key("v1/journal/")
    }

    /// The folder for the parts of one change.
    pub(super) fn parts(&self, change: &str) -> String {
        format!("{}{change}/", self.journal())
    }

    /// The key of one part.
    pub(super) fn part(&self, change: &str, number: usize) -> String {
        format!("{}{number:06}", self.parts(change))
    }

    /// The log of a baseline. It may be large, so it is outside of the watched folder.
    pub(super) fn log(&self, name: &str) -> String {
        self.key(&log_key(name))
    }

    /// Removes the prefix.
    pub(super) fn strip<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(key).ok()?.strip_prefix(&*self.prefix)
    }
}

fn log_key(name: &str) -> String {
    format!("v1/baseline-logs/{}", name.to_ascii_lowercase())
}

/// A stored value.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored<T> {
    v: u32,
    /// Each new record of a kind gets a larger number.
    order: i64,
    record: T,
}

/// Parses a value of any kind.
///
/// # Errors
/// The problem.
pub(super) fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let version: Version = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    if version.v != VERSION {
        return Err(format!("it has version {}, and this program knows version {VERSION}", version.v));
    }
    serde_json::from_slice(value).map_err(|error| error.to_string())
}

/// A kind of records in etcd.
trait Record: Sized {
    type Key: Ord + Clone;
    type Value: Clone;
    type Json: Serialize + DeserializeOwned;
    /// The folder below `v1/state/`, also the name of the table.
    const FOLDER: &'static str;

    fn name(key: &Self::Key) -> String;
    fn to_json(key: &Self::Key, value: &Self::Value) -> Self::Json;
    /// # Errors
    /// The problem.
    fn from_json(json: Self::Json) -> Result<(Self::Key, Self::Value), String>;
    fn table(contents: &mut Contents) -> &mut Table<Self::Key, Self::Value>;
}

/// Bytes as base64.
mod base64 {
    use std::borrow::Cow;

    use data_encoding::BASE64;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&BASE64.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = Cow::<'de, str>::deserialize(from)?;
        BASE64.decode(text.as_bytes()).map_err(D::Error::custom)
    }
}

struct Hosts;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostJson {
    name: String,
    kind: HostKind,
    #[serde(with = "base64")]
    spki: Vec<u8>,
    enabled: bool,
    added: i64,
    labels: Labels,
}

impl Record for Hosts {
    type Key = String;
    type Value = Host;
    type Json = HostJson;
    const FOLDER: &'static str = "hosts";

    fn name(key: &String) -> String {
        key.clone()
    }

    fn to_json(_: &String, host: &Host) -> HostJson {
        let Host { name, kind, spki, spki_sha256: _, enabled, added, labels } = host.clone();
        HostJson { name, kind, spki, enabled, added, labels }
    }

    fn from_json(json: HostJson) -> Result<(String, Host), String> {
        let HostJson { name, kind, spki, enabled, added, labels } = json;
        let spki_sha256 = sha256_hex(&spki);
        Ok((name.to_ascii_lowercase(), Host { name, kind, spki, spki_sha256, enabled, added, labels }))
    }

    fn table(contents: &mut Contents) -> &mut Table<String, Host> {
        &mut contents.hosts
    }
}

struct Baselines;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BaselineJson {
    name: String,
    /// Format: `0=<hexadecimal> 4=…`.
    pcrs: String,
    has_log: bool,
    enabled: bool,
    added: i64,
}

impl Record for Baselines {
    type Key = String;
    type Value = KeptBaseline;
    type Json = BaselineJson;
    const FOLDER: &'static str = "baselines";

    fn name(key: &String) -> String {
        key.clone()
    }

    fn to_json(_: &String, kept: &KeptBaseline) -> BaselineJson {
        let of = &kept.baseline;
        BaselineJson {
            name: of.name.clone(),
            pcrs: values_to_text(&of.values),
            has_log: kept.log != KeptLog::Absent,
            enabled: of.enabled,
            added: of.added,
        }
    }

    fn from_json(json: BaselineJson) -> Result<(String, KeptBaseline), String> {
        let text = |error: StateError| error.to_string();
        let values = values_from_text(&json.pcrs).map_err(text)?;
        check_baseline_name(&json.name).and_then(|()| check_values(&values)).map_err(text)?;
        let log = if json.has_log { KeptLog::Stored } else { KeptLog::Absent };
        let baseline = Baseline { name: json.name, values, log: None, enabled: json.enabled, added: json.added };
        Ok((baseline.name.to_ascii_lowercase(), KeptBaseline { baseline, log }))
    }

    fn table(contents: &mut Contents) -> &mut Table<String, KeptBaseline> {
        &mut contents.baselines
    }
}

struct RemovedBaselines;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemovedBaselineJson {
    name: String,
    /// Format: `0=<hexadecimal> 4=…`.
    pcrs: String,
    added: i64,
    removed: i64,
    reserved_until: i64,
}

impl Record for RemovedBaselines {
    type Key = String;
    type Value = RemovedBaseline;
    type Json = RemovedBaselineJson;
    const FOLDER: &'static str = "removed-baselines";

    fn name(key: &String) -> String {
        key.clone()
    }

    fn to_json(_: &String, of: &RemovedBaseline) -> RemovedBaselineJson {
        let RemovedBaseline { name, values, added, removed, reserved_until } = of.clone();
        RemovedBaselineJson { name, pcrs: values_to_text(&values), added, removed, reserved_until }
    }

    fn from_json(json: RemovedBaselineJson) -> Result<(String, RemovedBaseline), String> {
        let RemovedBaselineJson { name, pcrs, added, removed, reserved_until } = json;
        let values = values_from_text(&pcrs).map_err(|error| error.to_string())?;
        Ok((name.to_ascii_lowercase(), RemovedBaseline { name, values, added, removed, reserved_until }))
    }

    fn table(contents: &mut Contents) -> &mut Table<String, RemovedBaseline> {
        &mut contents.removed_baselines
    }
}

struct Certificates;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CertificateJson {
    kind: Kind,
    #[serde(with = "base64")]
    der: Vec<u8>,
    /// CKA_ID, hexadecimal.
    key_id: String,
    #[serde(with = "base64")]
    spki: Vec<u8>,
    primary: bool,
    communications: bool,
    enabled: bool,
    added: i64,
}

fn key_id(hexadecimal: &str) -> Result<Vec<u8>, String> {
    HEXLOWER_PERMISSIVE.decode(hexadecimal.as_bytes()).map_err(|error| format!("key_id: {error}"))
}

fn hexadecimal(bytes: &[u8]) -> String {
    HEXLOWER_PERMISSIVE.encode(bytes)
}

impl Record for Certificates {
    type Key = (Kind, String);
    type Value = Certificate;
    type Json = CertificateJson;
    const FOLDER: &'static str = "certificates";

    fn name((kind, thumbprint): &(Kind, String)) -> String {
        format!("{kind}/{thumbprint}")
    }

    fn to_json(_: &(Kind, String), of: &Certificate) -> CertificateJson {
        CertificateJson {
            kind: of.kind,
            der: of.der.clone(),
            key_id: hexadecimal(&of.key_id),
            spki: of.spki.clone(),
            primary: of.is_primary,
            communications: of.is_communications,
            enabled: of.enabled,
            added: of.added,
        }
    }

    fn from_json(json: CertificateJson) -> Result<((Kind, String), Certificate), String> {
        let of = Certificate {
            thumbprint: sha256_hex(&json.der),
            kind: json.kind,
            der: json.der,
            key_id: key_id(&json.key_id)?,
            spki: json.spki,
            is_primary: json.primary,
            enabled: json.enabled,
            added: json.added,
            is_communications: json.communications,
            labels: Labels::default(),
        };
        Ok(((of.kind, of.thumbprint.clone()), of))
    }

    fn table(contents: &mut Contents) -> &mut Table<(Kind, String), Certificate> {
        &mut contents.certificates
    }
}

struct Limits;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitJson {
    #[serde(with = "base64")]
    spki: Vec<u8>,
    labels: Labels,
}

impl Record for Limits {
    type Key = Vec<u8>;
    type Value = Labels;
    type Json = LimitJson;
    const FOLDER: &'static str = "limits";

    fn name(spki: &Vec<u8>) -> String {
        sha256_hex(spki)
    }

    fn to_json(spki: &Vec<u8>, labels: &Labels) -> LimitJson {
        LimitJson { spki: spki.clone(), labels: labels.clone() }
    }

    fn from_json(json: LimitJson) -> Result<(Vec<u8>, Labels), String> {
        Ok((json.spki, json.labels))
    }

    fn table(contents: &mut Contents) -> &mut Table<Vec<u8>, Labels> {
        &mut contents.limits
    }
}

struct Signers;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignerJson {
    #[serde(with = "base64")]
    der: Vec<u8>,
    /// CKA_ID, hexadecimal.
    key_id: String,
    not_before: i64,
    not_after: i64,
    /// Absent for the current one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaced: Option<i64>,
}

impl Record for Signers {
    type Key = String;
    type Value = Signer;
    type Json = SignerJson;
    const FOLDER: &'static str = "signers";

    fn name(key: &String) -> String {
        key.clone()
    }

    fn to_json(_: &String, of: &Signer) -> SignerJson {
        let (not_before, not_after, replaced) = (of.not_before, of.not_after, of.replaced);
        SignerJson { der: of.der.clone(), key_id: hexadecimal(&of.key_id), not_before, not_after, replaced }
    }

    fn from_json(json: SignerJson) -> Result<(String, Signer), String> {
        let of = Signer {
            thumbprint: sha256_hex(&json.der),
            der: json.der,
            key_id: key_id(&json.key_id)?,
            not_before: json.not_before,
            not_after: json.not_after,
            current: json.replaced.is_none(),
            replaced: json.replaced,
        };
        Ok((of.thumbprint.clone(), of))
    }

    fn table(contents: &mut Contents) -> &mut Table<String, Signer> {
        &mut contents.signers
    }
}

struct Revoked;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RevokedJson {
    thumbprint: String,
    spki_sha256: String,
    not_after: i64,
    revoked: i64,
}

impl Record for Revoked {
    type Key = String;
    type Value = RevokedSigner;
    type Json = RevokedJson;
    const FOLDER: &'static str = "revoked-signers";

    fn name(key: &String) -> String {
        key.clone()
    }

    fn to_json(_: &String, of: &RevokedSigner) -> RevokedJson {
        let RevokedSigner { thumbprint, spki_sha256, not_after, revoked } = of.clone();
        RevokedJson { thumbprint, spki_sha256, not_after, revoked }
    }

    fn from_json(json: RevokedJson) -> Result<(String, RevokedSigner), String> {
        let RevokedJson { thumbprint, spki_sha256, not_after, revoked } = json;
        Ok((thumbprint.clone(), RevokedSigner { thumbprint, spki_sha256, not_after, revoked }))
    }

    fn table(contents: &mut Contents) -> &mut Table<String, RevokedSigner> {
        &mut contents.revoked
    }
}

fn key_of<R: Record>(key: &R::Key) -> String {
    format!("{STATE}{}/{}", R::FOLDER, R::name(key))
}

fn writes<R: Record>(changes: &Changes<R::Key, R::Value>, to: &mut Vec<Write>) -> serde_json::Result<()> {
    to.extend(changes.removed.iter().map(|key| Write::Delete(key_of::<R>(key))));
    for (key, Row { order, value }) in &changes.put {
        let stored = Stored { v: VERSION, order: *order, record: R::to_json(key, value) };
        to.push(Write::Put(key_of::<R>(key), serde_json::to_value(stored)?));
    }
    Ok(())
}

/// The log of a baseline.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogJson {
    v: u32,
    /// When its baseline was added. A later baseline with the same name is another one.
    pub(super) added: i64,
    #[serde(with = "base64")]
    pub(super) log: Vec<u8>,
}

/// The writes for a difference.
///
/// # Errors
/// A record cannot be written as JSON.
pub(super) fn writes_of(delta: &Delta) -> serde_json::Result<Vec<Write>> {
    let mut all = Vec::new();
    writes::<Hosts>(&delta.hosts, &mut all)?;
    writes::<Baselines>(&delta.baselines, &mut all)?;
    writes::<RemovedBaselines>(&delta.removed_baselines, &mut all)?;
    writes::<Certificates>(&delta.certificates, &mut all)?;
    writes::<Limits>(&delta.limits, &mut all)?;
    writes::<Signers>(&delta.signers, &mut all)?;
    writes::<Revoked>(&delta.revoked, &mut all)?;
    all.extend(delta.baselines.removed.iter().map(|name| Write::Delete(log_key(name))));
    for (name, row) in &delta.baselines.put {
        match &row.value.log {
            KeptLog::New(log) => {
                let log = LogJson { v: VERSION, added: row.value.baseline.added, log: log.to_vec() };
                all.push(Write::Put(log_key(name), serde_json::to_value(log)?));
            }
            // Delete the log of an earlier baseline with this name.
            KeptLog::Absent => all.push(Write::Delete(log_key(name))),
            KeptLog::Stored => {}
        }
    }
    Ok(all)
}

/// Loads a record from etcd into the contents, or removes it. `key` is without the prefix; unknown keys are ignored.
///
/// # Errors
/// [`BadValue`].
pub(super) fn take(contents: &mut Contents, key: &str, value: Option<&[u8]>) -> Result<(), BadValue> {
    let Some((folder, name)) = key.strip_prefix(STATE).and_then(|key| key.split_once('/')) else { return Ok(()) };
    match folder {
        Hosts::FOLDER => take_record::<Hosts>(contents, key, name, value),
        Baselines::FOLDER => take_record::<Baselines>(contents, key, name, value),
        RemovedBaselines::FOLDER => take_record::<RemovedBaselines>(contents, key, name, value),
        Certificates::FOLDER => take_record::<Certificates>(contents, key, name, value),
        Limits::FOLDER => take_record::<Limits>(contents, key, name, value),
        Signers::FOLDER => take_record::<Signers>(contents, key, name, value),
        Revoked::FOLDER => take_record::<Revoked>(contents, key, name, value),
        _ => Ok(()),
    }
}

fn take_record<R: Record>(
    contents: &mut Contents,
    key: &str,
    name: &str,
    value: Option<&[u8]>,
) -> Result<(), BadValue> {
    let bad = |problem: String| BadValue { table: R::FOLDER, key: key.to_owned(), problem };
    let table = R::table(contents);
    let Some(value) = value else {
        table.unload(|key| R::name(key) == name);
        return Ok(());
    };
    let stored: Stored<R::Json> = decode(value).map_err(bad)?;
    let (key_inside, record) = R::from_json(stored.record).map_err(bad)?;
    // A record under a wrong key could not be changed.
    if R::name(&key_inside) != name {
        return Err(bad(format!("the record inside belongs under {}", key_of::<R>(&key_inside))));
    }
    table.load(key_inside, stored.order, record);
    Ok(())
}

/// Marks the table of an invalid value as unreadable.
pub(super) fn mark_unreadable(contents: &mut Contents, bad: &BadValue) {
    fn mark<R: Record>(contents: &mut Contents, bad: &BadValue) {
        *R::table(contents) = Table::unreadable(R::FOLDER, format!("etcd (key {})", bad.key), bad.problem.clone());
    }
    match bad.table {
        Hosts::FOLDER => mark::<Hosts>(contents, bad),
        Baselines::FOLDER => mark::<Baselines>(contents, bad),
        RemovedBaselines::FOLDER => mark::<RemovedBaselines>(contents, bad),
        Certificates::FOLDER => mark::<Certificates>(contents, bad),
        Limits::FOLDER => mark::<Limits>(contents, bad),
        Signers::FOLDER => mark::<Signers>(contents, bad),
        _ => mark::<Revoked>(contents, bad),
    }
}
