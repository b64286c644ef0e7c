//! What nodes tell each other, next to the state: small values that no registry snapshot depends on. Some disappear with
//! the lease of the node that wrote them.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};
use tokio::sync::oneshot;

use super::calls::{CallError, end_of, in_time};
use super::follower::{Link, Shared};

/// Reads and writes values below the prefix. Copies share the connection.
#[derive(Clone, Debug)]
pub struct Board {
    shared: Arc<Shared>,
    /// The thread of the connection runs while a copy of this exists.
    _running: Arc<oneshot::Sender<()>>,
}

/// Why a value cannot be read or written. A write may have been made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BoardError {
    /// There is no connection.
    #[error("etcd cannot be reached: {0}")]
    Unreachable(String),
    /// A call failed.
    #[error("etcd: {0}")]
    Call(String),
    /// A value cannot be read.
    #[error("{key} in etcd cannot be read: {problem}")]
    BadValue {
        /// The key without the prefix.
        key: String,
        /// The cause.
        problem: String,
    },
}

/// A value and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key without the prefix.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// Changes with each write.
    pub revision: i64,
}

/// A lease: values that are written with it disappear when it is not renewed in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease(i64);

impl From<CallError> for BoardError {
    fn from(error: CallError) -> Self {
        Self::Call(error.to_string())
    }
}

impl Board {
    pub(super) fn new(shared: Arc<Shared>, running: Arc<oneshot::Sender<()>>) -> Self {
        Self { shared, _running: running }
    }

    /// etcd's revision of the last change of the state that this node has.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.shared.followed().head.at
    }

    fn client(&self) -> Result<Client, BoardError> {
        match &self.shared.followed().link {
            Link::Following { client, .. } => Ok(Client::clone(client)),
            Link::Lost(reason) => Err(BoardError::Unreachable(reason.to_string())),
        }
    }

    fn key(&self, key: &str) -> String {
        self.shared.layout.key(key)
    }

    fn entry(&self, pair: &etcd_client::KeyValue) -> Option<Entry> {
        let key = self.shared.layout.strip(pair.key())?.to_owned();
        Some(Entry { key, value: pair.value().to_vec(), revision: pair.mod_revision() })
    }

    /// The value of a key.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, BoardError> {
        let found = in_time(self.client()?.kv_client().get(self.key(key), None)).await?;
        Ok(found.kvs().first().and_then(|pair| self.entry(pair)))
    }

    /// All values of a folder, whose name ends with `/`.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn list(&self, folder: &str) -> Result<Vec<Entry>, BoardError> {
        let folder = self.key(folder);
        let options = GetOptions::new().with_range(end_of(&folder));
        let found = in_time(self.client()?.kv_client().get(folder, Some(options))).await?;
        Ok(found.kvs().iter().filter_map(|pair| self.entry(pair)).collect())
    }

    /// Writes a value, with or without a lease.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn put(&self, key: &str, value: String, lease: Option<Lease>) -> Result<(), BoardError> {
        let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
        in_time(self.client()?.kv_client().put(self.key(key), value, options)).await?;
        Ok(())
    }

    /// Writes a value if nobody has written the key since `revision` (0: if the key does not exist). Returns whether it
    /// was written.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn put_if(
        &self,
        key: &str,
        value: String,
        revision: i64,
        lease: Option<Lease>,
    ) -> Result<bool, BoardError> {
        let key = self.key(key);
        let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
        let condition = Compare::mod_revision(key.clone(), CompareOp::Equal, revision);
        let transaction = Txn::new().when([condition]).and_then([TxnOp::put(key, value, options)]);
        Ok(in_time(self.client()?.kv_client().txn(transaction)).await?.succeeded())
    }

    /// Deletes a key.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn delete(&self, key: &str) -> Result<(), BoardError> {
        in_time(self.client()?.kv_client().delete(self.key(key), None)).await?;
        Ok(())
    }

    /// Deletes a key if it has this value.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn delete_if(&self, key: &str, value: &str) -> Result<(), BoardError> {
        let key = self.key(key);
        let condition = Compare::value(key.clone(), CompareOp::Equal, value);
        let transaction = Txn::new().when([condition]).and_then([TxnOp::delete(key, None)]);
        in_time(self.client()?.kv_client().txn(transaction)).await?;
        Ok(())
    }

    /// Writes a key if it does not exist, with a new lease that ends when it is not renewed for this time. `None`: the key
    /// exists.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn claim(&self, key: &str, value: String, time: Duration) -> Result<Option<Lease>, BoardError> {
        let lease = self.lease(time).await?;
        if self.put_if(key, value, 0, Some(lease)).await? {
            return Ok(Some(lease));
        }
        self.release(lease).await?;
        Ok(None)
    }

    /// Begins a lease that ends when it is not renewed for this time.
    async fn lease(&self, time: Duration) -> Result<Lease, BoardError> {
        let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        Ok(Lease(in_time(self.client()?.lease_client().grant(seconds, None)).await?.id()))
    }

    /// Renews a lease. Returns whether it had not ended.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn renew(&self, lease: Lease) -> Result<bool, BoardError> {
        let mut client = self.client()?.lease_client();
        let renewed = async {
            match client.keep_alive(lease.0).await {
                Ok(_) => Ok(true),
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(error) => Err(error),
            }
        };
        Ok(in_time(renewed).await?)
    }

    /// Ends a lease, and deletes what was written with it.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub async fn release(&self, lease: Lease) -> Result<(), BoardError> {
        in_time(self.client()?.lease_client().revoke(lease.0)).await?;
        Ok(())
    }
}
