//! Export and import: hosts, certificates, restrictions, attestation signers. Private keys stay in the HSMs.

use std::sync::Arc;

use claviger_protocol::attestation::tpm::is_endorsement_key;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use serde_json::{Value, json};

use super::baselines::{check_log, pcr_values};
use super::change::{Change, FAILED, outcome, read};
use super::keys::{judge, on_all_members};
use crate::admin::message::export::{Baseline, Document, Host, KeyCertificate, Signer};
use crate::observe::audit::Peer;
use crate::observe::audit::SUCCESS;
use crate::service::Service;
use crate::store::{self, HostKind, Import, Kind, Merged, State};
use crate::sys::clock::unix_now;

/// Version of the export format.
const VERSION: u32 = 1;

/// A signer that expires sooner than this (seconds) is not imported: its own service is about to renew it.
const SIGNER_REST: i64 = 31 * 24 * 3600;

pub(super) async fn export(service: &Arc<Service>, peer: Peer) -> Result<Value, String> {
    let change = Change::new("export", peer);
    change.requested(service).await?;
    let all = |state: &mut State| Ok((state.hosts()?, state.baselines()?, state.certificates()?, state.signers()?));
    let read = read(service, all).await;
    change.done(service, if read.is_ok() { SUCCESS } else { FAILED }).await;
    let (hosts, baselines, certificates, signers) = read?;
    let host = |h: store::Host| Host {
        name: h.name,
        public_key: BASE64.encode(&h.spki),
        enabled: h.enabled,
        labels: h.labels,
        kind: h.kind,
    };
    let baseline = |b: store::Baseline| Baseline {
        name: b.name,
        pcrs: (&b.values).into(),
        log: b.log.map(|log| BASE64.encode(&log)),
        enabled: b.enabled,
    };
    let certificate = |c: store::Certificate| KeyCertificate {
        kind: c.kind,
        certificate: BASE64.encode(&c.der),
        hsm_key: HEXLOWER.encode(&c.key_id),
        primary: c.is_primary,
        communications: c.is_communications,
        enabled: c.enabled,
        labels: c.labels,
    };
    let signer = |s: store::Signer| Signer {
        certificate: BASE64.encode(&s.der),
        hsm_key: HEXLOWER.encode(&s.key_id),
        current: s.current,
        replaced: s.replaced,
    };
    let document = Document {
        version: VERSION,
        created: unix_now(),
        hosts: hosts.into_iter().map(host).collect(),
        baselines: baselines.into_iter().map(baseline).collect(),
        certificates: certificates.into_iter().map(certificate).collect(),
        signers: signers.into_iter().map(signer).collect(),
    };
    serde_json::to_value(document).map_err(|e| e.to_string())
}

pub(super) async fn import(
    service: &Arc<Service>,
    document: Document,
    dry_run: bool,
    trust_absent: bool,
    loosen: bool,
    peer: Peer,
) -> Result<Value, String> {
    let mut import = Import { loosen, ..read_document(document)? };
    let mut warnings = Vec::new();
    for entry in &import.certificates {
        let named = |error: String| format!("the {} certificate {}: {error}", entry.kind, entry.thumbprint);
        let certificate = Certificate::parse(&entry.der).map_err(|e| named(e.to_string()))?;
        let mut said = judge(&certificate, entry.kind).map_err(named)?;
        said.extend(
            on_all_members(service, entry.kind, &entry.key_id, &certificate, trust_absent).await.map_err(named)?,
        );
        warnings.extend(said.into_iter().map(named));
    }
    let mut adopt = false;
    for signer in &import.signers {
        let certificate = Certificate::parse(&signer.der).map_err(|e| format!("an attestation signer: {e}"))?;
        let held = on_all_members(service, Kind::Signing, &signer.key_id, &certificate, false).await;
        adopt |= signer.current && held.is_ok() && signer.not_after - unix_now() > SIGNER_REST;
        if let Err(error) = held {
            // Only the file itself vouches for this entry.
            warnings.push(format!(
                "the key of the attestation signer {} was not found in these HSMs: {error}. It cannot issue here; whoever \
                 has its key makes health certificates that are trusted here, for as long as those of a signer that was \
                 replaced now",
                signer.thumbprint
            ));
        }
    }
    import.adopt_signer = adopt;
    let (import, now) = (Arc::new(import), unix_now());
    let of = Arc::clone(&import);
    let Merged { changes, skipped } = read(service, move |state| state.plan_import(&of, now)).await?;
    if dry_run || changes.is_empty() {
        return Ok(json!({"changes": changes, "skipped": skipped, "warnings": warnings, "applied": false}));
    }
    let mut change = Change::new("import", peer);
    for text in &changes {
        change.attempt.change = Some(text.clone());
        change.requested(service).await?;
    }
    change.attempt.change = Some(format!("{} changes", changes.len()));
    let made = service.registry.change(move |state| state.import(&import, now, &changes)).await;
    change.done(service, outcome(&made)).await;
    let Merged { changes, skipped } = made.map_err(|e| e.to_string())?;
    Ok(json!({"changes": changes, "skipped": skipped, "warnings": warnings, "applied": true}))
}

/// Parses and validates an export.
fn read_document(document: Document) -> Result<Import, String> {
    if document.version != VERSION {
        return Err(format!("this export is of version {}, and this daemon reads version {VERSION}", document.version));
    }
    let bytes = |base64: &str| BASE64.decode(base64.as_bytes()).map_err(|_| "the export holds bad base64".to_owned());
    let id = |hexadecimal: &str| {
        HEXLOWER_PERMISSIVE.decode(hexadecimal.as_bytes()).map_err(|_| "the export holds a bad key id".to_owned())
    };
    let mut import = Import::default();
    for host in document.hosts {
        let key =
            RsaPublicKey::from_spki_der(&bytes(&host.public_key)?).map_err(|e| format!("host {}: {e}", host.name))?;
        if host.kind == HostKind::EndorsementKey && !is_endorsement_key(&key) {
            return Err(format!("host {}: its key cannot be a TPM's endorsement key", host.name));
        }
        import.hosts.push(store::Host {
            name: host.name,
            spki: key.spki_der().to_vec(),
            spki_sha256: HEXLOWER.encode(&key.spki_sha256()),
            enabled: host.enabled,
            added: document.created,
            labels: host.labels,
            kind: host.kind,
        });
    }
    for baseline in document.baselines {
        let named = |error: String| format!("baseline {}: {error}", baseline.name);
        let log = baseline.log.as_deref().map(bytes).transpose()?;
        log.as_deref().map(check_log).transpose().map_err(named)?;
        import.baselines.push(store::Baseline {
            values: pcr_values(&baseline.pcrs).map_err(named)?,
            log,
            name: baseline.name,
            enabled: baseline.enabled,
            added: document.created,
        });
    }
    let parsed = |base64: &str| {
        Certificate::parse(&bytes(base64)?).map_err(|e| format!("a certificate of the export cannot be used: {e}"))
    };
    for entry in document.certificates {
        let certificate = parsed(&entry.certificate)?;
        import.certificates.push(store::Certificate {
            thumbprint: HEXLOWER.encode(&certificate.thumbprint()),
            kind: entry.kind,
            der: certificate.der().to_vec(),
            key_id: id(&entry.hsm_key)?,
            spki: certificate.key().spki_der().to_vec(),
            is_primary: entry.primary,
            enabled: entry.enabled,
            added: document.created,
            is_communications: entry.communications,
            labels: entry.labels,
        });
    }
    for signer in document.signers {
        let certificate = parsed(&signer.certificate)?;
        import.signers.push(store::Signer {
            thumbprint: HEXLOWER.encode(&certificate.thumbprint()),
            der: certificate.der().to_vec(),
            key_id: id(&signer.hsm_key)?,
            not_before: certificate.not_before(),
            not_after: certificate.not_after(),
            current: signer.current,
            replaced: signer.replaced,
        });
    }
    Ok(import)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize as _;

    use super::*;

    fn read_with(hosts: Value, baselines: Value) -> Result<Import, String> {
        let document = json!({
            "version": VERSION, "created": 1, "hosts": hosts, "baselines": baselines, "certificates": [], "signers": [],
        });
        read_document(Document::deserialize(document).unwrap())
    }

    #[test]
    fn a_log_is_checked_like_that_of_an_added_baseline() {
        let value = "11".repeat(32);
        let read = |log: &[u8]| {
            let pcrs = json!({"0": value, "4": value, "7": value});
            read_with(json!([]), json!([{"name": "base", "pcrs": pcrs, "log": BASE64.encode(log), "enabled": true}]))
        };
        let good = claviger_protocol::tpm::log::short_boot("firmware", "kernel");
        assert_eq!(read(&good).unwrap().baselines[0].log, Some(good));
        assert!(read(b"no log").unwrap_err().starts_with("baseline base: the log cannot be read"));
        let long = vec![0; claviger_protocol::tpm::context::MAX_LOG + 1];
        assert!(read(&long).unwrap_err().starts_with("baseline base: the log is longer"));
    }

    #[test]
    fn an_endorsement_key_is_checked_like_that_of_an_added_host() {
        let read = |modulus: usize, kind: HostKind| {
            let key = RsaPublicKey::from_components(&vec![0xff; modulus], &[1, 0, 1]).unwrap();
            let key = BASE64.encode(key.spki_der());
            read_with(
                json!([{"name": "node", "public_key": key, "enabled": true, "labels": [], "kind": kind}]),
                json!([]),
            )
        };
        assert!(read(256, HostKind::EndorsementKey).is_ok() && read(512, HostKind::HostKey).is_ok());
        assert!(read(512, HostKind::EndorsementKey).unwrap_err().starts_with("host node: its key cannot"));
    }
}
