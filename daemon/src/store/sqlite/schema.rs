//! The tables, and how older files come to have them.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::super::error::StateError;

/// Each step brings the schema from the version of its index to the next one. Steps are never changed, only added.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE hosts (
        name TEXT NOT NULL UNIQUE COLLATE NOCASE,
        spki BLOB NOT NULL UNIQUE,
        spki_sha256 TEXT NOT NULL,
        enabled INTEGER NOT NULL DEFAULT 1,
        added INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE certificates (
        thumbprint TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('signing', 'encryption')),
        der BLOB NOT NULL,
        key_id BLOB NOT NULL,
        spki BLOB NOT NULL,
        is_primary INTEGER NOT NULL DEFAULT 0,
        enabled INTEGER NOT NULL DEFAULT 1,
        added INTEGER NOT NULL,
        UNIQUE (kind, thumbprint),
        CHECK (enabled OR NOT is_primary)
    ) STRICT;
    CREATE UNIQUE INDEX one_primary ON certificates (kind) WHERE is_primary;
    CREATE TABLE attestation_signers (
        thumbprint TEXT NOT NULL UNIQUE,
        der BLOB NOT NULL,
        key_id BLOB NOT NULL,
        not_before INTEGER NOT NULL,
        not_after INTEGER NOT NULL,
        current INTEGER NOT NULL,
        replaced INTEGER,
        CHECK (current = (replaced IS NULL))
    ) STRICT;
    CREATE UNIQUE INDEX one_current ON attestation_signers (current) WHERE current;
",
    // What certificates are limited to, and what hosts are; a space between two labels. The communications certificate
    // signs the metadata document; without one the primary signing certificate does.
    "
    ALTER TABLE hosts ADD COLUMN labels TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN labels TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN is_communications INTEGER NOT NULL DEFAULT 0
        CHECK (NOT is_communications OR (enabled AND kind = 'signing'));
    CREATE UNIQUE INDEX one_communications ON certificates (is_communications) WHERE is_communications;
",
    // What keys are limited to, by their public keys: a limit outlives the certificates of its key.
    "
    CREATE TABLE limits (
        spki BLOB NOT NULL UNIQUE,
        labels TEXT NOT NULL
    ) STRICT;
    INSERT INTO limits (spki, labels) SELECT spki, max(labels) FROM certificates WHERE labels <> '' GROUP BY spki;
    ALTER TABLE certificates DROP COLUMN labels;
",
    // Attestation signers that were revoked. They stay here: an import must not bring them back. By the key, too: what it
    // signs is refused whatever certificate it has.
    "
    CREATE TABLE revoked_signers (
        thumbprint TEXT NOT NULL UNIQUE,
        spki_sha256 TEXT NOT NULL,
        not_after INTEGER NOT NULL,
        revoked INTEGER NOT NULL
    ) STRICT;
",
    // What a host's key is: its own, or the endorsement key of its TPM, which alone counts in TPM mode. And what hosts may
    // have booted: PCR values, with the event log that they were taken from.
    "
    ALTER TABLE hosts ADD COLUMN kind TEXT NOT NULL DEFAULT 'host-key' CHECK (kind IN ('host-key', 'endorsement-key'));
    CREATE TABLE baselines (
        name TEXT NOT NULL UNIQUE COLLATE NOCASE,
        pcrs TEXT NOT NULL,
        log BLOB,
        enabled INTEGER NOT NULL DEFAULT 1,
        added INTEGER NOT NULL
    ) STRICT;
",
];

pub(super) fn migrate(connection: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), StateError> {
    let database = |source| StateError::Database { path: path.to_owned(), source };
    // The version is read inside the transaction: two daemons may start on a new file at the same time.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(database)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(database)?;
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    if !(0..=known).contains(&found) {
        return Err(StateError::TooNew { path: path.to_owned(), found, known });
    }
    if found == known {
        // Nothing is written: the other daemons would take it for a change.
        return Ok(());
    }
    for (version, step) in (0..).zip(migrations) {
        if version >= found {
            transaction.execute_batch(step).map_err(database)?;
        }
    }
    transaction.pragma_update(None, "user_version", known).map_err(database)?;
    transaction.commit().map_err(database)
}
