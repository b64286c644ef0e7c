//! The tables, and the migration of older files.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::super::error::StateError;

/// Each step migrates the schema from the version of its index to the next one. Existing steps are never changed.
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
    // Restrictions of certificates and labels of hosts, separated by spaces. The communications certificate signs the
    // metadata document; without one, the primary signing certificate does.
    "
    ALTER TABLE hosts ADD COLUMN labels TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN labels TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN is_communications INTEGER NOT NULL DEFAULT 0
        CHECK (NOT is_communications OR (enabled AND kind = 'signing'));
    CREATE UNIQUE INDEX one_communications ON certificates (is_communications) WHERE is_communications;
",
    // Restrictions of keys, by public key: a restriction outlives the certificates of its key.
    "
    CREATE TABLE limits (
        spki BLOB NOT NULL UNIQUE,
        labels TEXT NOT NULL
    ) STRICT;
    INSERT INTO limits (spki, labels) SELECT spki, max(labels) FROM certificates WHERE labels <> '' GROUP BY spki;
    ALTER TABLE certificates DROP COLUMN labels;
",
    // Revoked attestation signers. They are kept, so that an import does not add them again. The key is also recorded,
    // because all certificates of a revoked key are rejected.
    "
    CREATE TABLE revoked_signers (
        thumbprint TEXT NOT NULL UNIQUE,
        spki_sha256 TEXT NOT NULL,
        not_after INTEGER NOT NULL,
        revoked INTEGER NOT NULL
    ) STRICT;
",
    // The kind of a host's key: a host key, or the endorsement key of its TPM, which TPM mode requires. And baselines:
    // accepted PCR values, with the event log from which they were taken.
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
    // Names of removed baselines, which are reserved for a time.
    "
    CREATE TABLE removed_baselines (
        name TEXT NOT NULL UNIQUE COLLATE NOCASE,
        pcrs TEXT NOT NULL,
        added INTEGER NOT NULL,
        removed INTEGER NOT NULL,
        reserved_until INTEGER NOT NULL
    ) STRICT;
",
];

pub(super) fn migrate(connection: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), StateError> {
    let database = |source| StateError::Database { path: path.to_owned(), source };
    // Read the version inside the transaction: two daemons may start on a new file at the same time.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(database)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(database)?;
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    if !(0..=known).contains(&found) {
        return Err(StateError::TooNew { path: path.to_owned(), found, known });
    }
    if found == known {
        // Write nothing: other daemons would notice a change.
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
