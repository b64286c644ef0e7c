//! Converts rows to records and back.

use std::path::Path;

use rusqlite::types::{FromSql, Type};
use rusqlite::{Connection, Row, Transaction, params};

use super::super::baselines::{check_values, values_from_text, values_to_text};
use super::super::contents::{Contents, Delta};
use super::super::error::StateError;
use super::super::labels::Labels;
use super::super::records::{
    Baseline, Certificate, Host, HostKind, KeptBaseline, KeptLog, Kind, RemovedBaseline, RevokedSigner, Signer,
};
use super::super::table::Table;

/// Reads all tables at one point in time. An unreadable table does not affect the others.
///
/// # Errors
/// The transaction cannot be started.
pub(super) fn read(connection: &Connection, path: &Path) -> rusqlite::Result<Contents> {
    // Unless a transaction is already open.
    let _at_one_time = connection.is_autocommit().then(|| connection.unchecked_transaction()).transpose()?;
    Ok(Contents {
        hosts: table(
            connection,
            path,
            "hosts",
            "SELECT rowid, name, spki, spki_sha256, enabled, added, labels, kind FROM hosts",
            |row| host(row).map(|host| (host.name.to_ascii_lowercase(), host)),
        ),
        baselines: table(
            connection,
            path,
            "baselines",
            "SELECT rowid, name, pcrs, log IS NOT NULL, enabled, added FROM baselines",
            |row| baseline(row).map(|kept| (kept.baseline.name.to_ascii_lowercase(), kept)),
        ),
        removed_baselines: table(
            connection,
            path,
            "removed_baselines",
            "SELECT rowid, name, pcrs, added, removed, reserved_until FROM removed_baselines",
            |row| removed_baseline(row).map(|removed| (removed.name.to_ascii_lowercase(), removed)),
        ),
        certificates: table(
            connection,
            path,
            "certificates",
            "SELECT rowid, thumbprint, kind, der, key_id, spki, is_primary, enabled, added, is_communications
             FROM certificates",
            |row| certificate(row).map(|of| ((of.kind, of.thumbprint.clone()), of)),
        ),
        limits: table(connection, path, "limits", "SELECT rowid, spki, labels FROM limits", |row| {
            Ok((row.get(1)?, parsed(row, 2)?))
        }),
        signers: table(
            connection,
            path,
            "attestation_signers",
            "SELECT rowid, thumbprint, der, key_id, not_before, not_after, current, replaced FROM attestation_signers",
            |row| signer(row).map(|signer| (signer.thumbprint.clone(), signer)),
        ),
        revoked: table(
            connection,
            path,
            "revoked_signers",
            "SELECT rowid, thumbprint, spki_sha256, not_after, revoked FROM revoked_signers",
            |row| {
                let thumbprint: String = row.get(1)?;
                let (spki_sha256, not_after, revoked) = (row.get(2)?, row.get(3)?, row.get(4)?);
                Ok((thumbprint.clone(), RevokedSigner { thumbprint, spki_sha256, not_after, revoked }))
            },
        ),
    })
}

/// Reads a table whose first column is the row's number.
fn table<K: Ord + Clone, T>(
    connection: &Connection,
    path: &Path,
    name: &'static str,
    sql: &str,
    record: fn(&Row<'_>) -> rusqlite::Result<(K, T)>,
) -> Table<K, T> {
    let load = || {
        let mut table = Table::default();
        let mut statement = connection.prepare_cached(sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (key, value) = record(row)?;
            table.load(key, row.get(0)?, value);
        }
        Ok(table)
    };
    load()
        .unwrap_or_else(|error: rusqlite::Error| Table::unreadable(name, path.display().to_string(), error.to_string()))
}

fn host(row: &Row<'_>) -> rusqlite::Result<Host> {
    Ok(Host {
        name: row.get(1)?,
        spki: row.get(2)?,
        spki_sha256: row.get(3)?,
        enabled: row.get(4)?,
        added: row.get(5)?,
        labels: parsed(row, 6)?,
        kind: match row.get_ref(7)?.as_str()? {
            "endorsement-key" => HostKind::EndorsementKey,
            _ => HostKind::HostKey,
        },
    })
}

fn baseline(row: &Row<'_>) -> rusqlite::Result<KeptBaseline> {
    let pcrs: String = row.get(2)?;
    // A baseline without values would match every host.
    let values = values_from_text(&pcrs)
        .and_then(|values| check_values(&values).map(|()| values))
        .map_err(|error| invalid(2, error))?;
    let log = if row.get(3)? { KeptLog::Stored } else { KeptLog::Absent };
    let baseline = Baseline { name: row.get(1)?, values, log: None, enabled: row.get(4)?, added: row.get(5)? };
    Ok(KeptBaseline { baseline, log })
}

fn removed_baseline(row: &Row<'_>) -> rusqlite::Result<RemovedBaseline> {
    let pcrs: String = row.get(2)?;
    let values = values_from_text(&pcrs).map_err(|error| invalid(2, error))?;
    let (added, removed, reserved_until) = (row.get(3)?, row.get(4)?, row.get(5)?);
    Ok(RemovedBaseline { name: row.get(1)?, values, added, removed, reserved_until })
}

fn certificate(row: &Row<'_>) -> rusqlite::Result<Certificate> {
    let kind: Kind = parsed(row, 2)?;
    Ok(Certificate {
        thumbprint: row.get(1)?,
        kind,
        der: row.get(3)?,
        key_id: row.get(4)?,
        spki: row.get(5)?,
        is_primary: row.get(6)?,
        enabled: row.get(7)?,
        added: row.get(8)?,
        is_communications: row.get(9)?,
        labels: Labels::default(),
    })
}

fn signer(row: &Row<'_>) -> rusqlite::Result<Signer> {
    Ok(Signer {
        thumbprint: row.get(1)?,
        der: row.get(2)?,
        key_id: row.get(3)?,
        not_before: row.get(4)?,
        not_after: row.get(5)?,
        current: row.get(6)?,
        replaced: row.get(7)?,
    })
}

/// Parses the text of the column at `index`.
fn parsed<T: std::str::FromStr<Err = StateError>>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    String::column_result(row.get_ref(index)?)
        .map_err(rusqlite::Error::from)?
        .parse()
        .map_err(|error| invalid(index, error))
}

fn invalid(index: usize, error: StateError) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error))
}

/// Writes a difference. Rows with a new value are deleted first: the unique indexes are checked row by row, but only
/// the result has to satisfy them.
pub(super) fn write(transaction: &Transaction<'_>, delta: &Delta) -> rusqlite::Result<()> {
    let Delta { hosts, baselines, removed_baselines, certificates, limits, signers, revoked } = delta;

    let mut delete = transaction.prepare_cached("DELETE FROM hosts WHERE name = ?1")?;
    for name in hosts.removed.iter().chain(hosts.put.iter().map(|(name, _)| name)) {
        delete.execute([name])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO hosts (rowid, name, spki, spki_sha256, enabled, added, labels, kind)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    for (_, row) in &hosts.put {
        let of = &*row.value;
        let (labels, kind) = (of.labels.to_string(), of.kind.as_str());
        insert.execute(params![row.order, of.name, of.spki, of.spki_sha256, of.enabled, of.added, labels, kind])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM baselines WHERE name = ?1")?;
    // The log of a stored baseline is only in the table.
    let is_whole = |kept: &KeptBaseline| kept.log != KeptLog::Stored;
    let rewritten = baselines.put.iter().filter(|(_, row)| is_whole(&row.value)).map(|(name, _)| name);
    for name in baselines.removed.iter().chain(rewritten) {
        delete.execute([name])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO baselines (rowid, name, pcrs, log, enabled, added) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut update = transaction.prepare_cached("UPDATE baselines SET pcrs = ?2, enabled = ?3 WHERE name = ?1")?;
    for (_, row) in &baselines.put {
        let of = &row.value.baseline;
        let pcrs = values_to_text(&of.values);
        let log = match &row.value.log {
            KeptLog::Stored => {
                update.execute(params![of.name, pcrs, of.enabled])?;
                continue;
            }
            KeptLog::New(log) => Some(&**log),
            KeptLog::Absent => None,
        };
        insert.execute(params![row.order, of.name, pcrs, log, of.enabled, of.added])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM removed_baselines WHERE name = ?1")?;
    for name in removed_baselines.removed.iter().chain(removed_baselines.put.iter().map(|(name, _)| name)) {
        delete.execute([name])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO removed_baselines (rowid, name, pcrs, added, removed, reserved_until)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    for (_, row) in &removed_baselines.put {
        let of = &*row.value;
        let pcrs = values_to_text(&of.values);
        insert.execute(params![row.order, of.name, pcrs, of.added, of.removed, of.reserved_until])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM certificates WHERE kind = ?1 AND thumbprint = ?2")?;
    for (kind, thumbprint) in certificates.removed.iter().chain(certificates.put.iter().map(|(key, _)| key)) {
        delete.execute([kind.as_str(), thumbprint])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO certificates
         (rowid, thumbprint, kind, der, key_id, spki, is_primary, enabled, added, is_communications)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?;
    for ((kind, thumbprint), row) in &certificates.put {
        let (kind, of) = (kind.as_str(), &*row.value);
        let (primary, communications) = (of.is_primary, of.is_communications);
        insert.execute(params![
            row.order,
            thumbprint,
            kind,
            of.der,
            of.key_id,
            of.spki,
            primary,
            of.enabled,
            of.added,
            communications
        ])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM limits WHERE spki = ?1")?;
    for spki in limits.removed.iter().chain(limits.put.iter().map(|(spki, _)| spki)) {
        delete.execute([spki])?;
    }
    let mut insert = transaction.prepare_cached("INSERT INTO limits (rowid, spki, labels) VALUES (?1, ?2, ?3)")?;
    for (spki, row) in &limits.put {
        insert.execute(params![row.order, spki, row.value.to_string()])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM attestation_signers WHERE thumbprint = ?1")?;
    for thumbprint in signers.removed.iter().chain(signers.put.iter().map(|(thumbprint, _)| thumbprint)) {
        delete.execute([thumbprint])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO attestation_signers (rowid, thumbprint, der, key_id, not_before, not_after, current, replaced)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    for (thumbprint, row) in &signers.put {
        let of = &*row.value;
        let validity = (of.not_before, of.not_after);
        insert.execute(params![
            row.order,
            thumbprint,
            of.der,
            of.key_id,
            validity.0,
            validity.1,
            of.current,
            of.replaced
        ])?;
    }

    let mut delete = transaction.prepare_cached("DELETE FROM revoked_signers WHERE thumbprint = ?1")?;
    for thumbprint in revoked.removed.iter().chain(revoked.put.iter().map(|(thumbprint, _)| thumbprint)) {
        delete.execute([thumbprint])?;
    }
    let mut insert = transaction.prepare_cached(
        "INSERT INTO revoked_signers (rowid, thumbprint, spki_sha256, not_after, revoked) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?;
    for (thumbprint, row) in &revoked.put {
        let of = &*row.value;
        insert.execute(params![row.order, thumbprint, of.spki_sha256, of.not_after, of.revoked])?;
    }
    Ok(())
}
