//! The etcd calls that the store uses. Each answer has the time limit [`CALL`].

use std::future::Future;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, GetOptions, GetResponse, Txn, TxnOp, WatchOptions, WatchStream,
};

use super::batch::{Head, Part, groups};
use super::layout::{self, Layout, LogJson, Write};
use super::settings::{CALL, reason};
use crate::store::contents::Contents;

/// Records per answer.
const PAGE: i64 = 1_000;
/// Largest answer in bytes: a page of the largest records, or the events of one transaction.
const LONGEST: usize = 128 * 1024 * 1024;

/// gRPC status codes of a call that etcd has refused: INVALID_ARGUMENT and PERMISSION_DENIED.
const REFUSED: [i32; 2] = [3, 7];

/// Why a call failed, for people.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum CallError {
    /// etcd has refused the call, which had no effect. The same call will be refused again.
    #[error("{0}")]
    Refused(String),
    /// The call may have had an effect.
    #[error("{0}")]
    Failed(String),
}

/// The head at one revision.
#[derive(Clone, Debug, Default)]
pub(super) struct HeadAt {
    /// The revision at which it was written; 0: never.
    pub(super) at: i64,
    pub(super) head: Option<Head>,
}

impl HeadAt {
    /// Whether parts of the last change may not be in their places yet.
    pub(super) fn has_journal(&self) -> bool {
        self.head.as_ref().is_some_and(|head| head.journal.is_some())
    }
}

/// The whole state at one revision.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) contents: Contents,
    pub(super) head: HeadAt,
    pub(super) revision: i64,
}

/// The result of a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The change was made; this is the revision of its head.
    Made(i64),
    /// Another change was made before it.
    Conflict,
}

pub(super) async fn in_time<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(match &error {
            etcd_client::Error::GRpcStatus(status) if REFUSED.contains(&i32::from(status.code())) => {
                CallError::Refused(reason(&error))
            }
            _ => CallError::Failed(reason(&error)),
        }),
        Err(_) => Err(CallError::Failed(format!("no answer in {} seconds", CALL.as_secs()))),
    }
}

fn unreadable(what: &str, error: impl std::fmt::Display) -> CallError {
    CallError::Failed(format!("{what} cannot be read: {error}"))
}

fn revision_of(response: &GetResponse) -> i64 {
    response.header().map_or(0, |header| header.revision())
}

fn head_of(response: &GetResponse) -> Result<HeadAt, CallError> {
    let Some(found) = response.kvs().first() else { return Ok(HeadAt::default()) };
    let head = layout::decode(found.value()).map_err(|error| unreadable("the head", error))?;
    Ok(HeadAt { at: found.mod_revision(), head: Some(head) })
}

/// Reads the head with the consent of a majority.
pub(super) async fn read_head(client: &Client, layout: &Layout) -> Result<HeadAt, CallError> {
    head_of(&in_time(client.kv_client().get(layout.head(), None)).await?)
}

/// All key-value pairs of a folder at `revision`, or at the newest one; also returns the revision.
async fn folder(
    client: &Client,
    folder: &str,
    mut revision: Option<i64>,
    mut take: impl FnMut(&[u8], &[u8]),
) -> Result<i64, CallError> {
    let mut kv = client.kv_client().max_decoding_message_size(LONGEST);
    let end = end_of(folder);
    let mut from = folder.as_bytes().to_vec();
    loop {
        let mut options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
        if let Some(revision) = revision {
            options = options.with_revision(revision);
        }
        let page = in_time(kv.get(from.clone(), Some(options))).await?;
        let at = *revision.get_or_insert(revision_of(&page));
        for pair in page.kvs() {
            take(pair.key(), pair.value());
        }
        let Some(last) = page.kvs().last().filter(|_| page.more()) else { return Ok(at) };
        from = [last.key(), b"\0"].concat();
    }
}

/// The first key after a folder, whose name ends with `/`.
pub(super) fn end_of(folder: &str) -> Vec<u8> {
    let mut end = folder.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Reads the whole state, including the parts in the journal that are not in their places yet.
pub(super) async fn load(client: &Client, layout: &Layout) -> Result<Loaded, CallError> {
    let mut contents = Contents::default();
    let mut bad = Vec::new();
    let revision = folder(client, &layout.state(), None, |key, value| {
        if let Some(key) = layout.strip(key) {
            bad.extend(layout::take(&mut contents, key, Some(value)).err());
        }
    })
    .await?;
    let options = GetOptions::new().with_revision(revision);
    let head = head_of(&in_time(client.kv_client().get(layout.head(), Some(options))).await?)?;
    if let Some((change, parts)) = head.head.as_ref().and_then(|head| Some((&head.change, head.journal?))) {
        for write in journal(client, layout, change, parts, Some(revision)).await? {
            let taken = match &write {
                Write::Put(key, value) => layout::take(&mut contents, key, Some(value.to_string().as_bytes())),
                Write::Delete(key) => layout::take(&mut contents, key, None),
            };
            bad.extend(taken.err());
        }
    }
    for bad in &bad {
        layout::mark_unreadable(&mut contents, bad);
    }
    Ok(Loaded { contents, head, revision })
}

/// The writes of a change in the journal.
async fn journal(
    client: &Client,
    layout: &Layout,
    change: &str,
    parts: usize,
    revision: Option<i64>,
) -> Result<Vec<Write>, CallError> {
    let (mut writes, mut found) = (Vec::new(), 0);
    let mut bad = None;
    folder(client, &layout.parts(change), revision, |_, value| match layout::decode::<Part>(value) {
        Ok(part) => {
            writes.extend(part.writes);
            found += 1;
        }
        Err(error) => bad = Some(unreadable("the journal", error)),
    })
    .await?;
    match bad {
        Some(error) => Err(error),
        None if found != parts => Err(CallError::Failed(format!("the journal has {found} of {parts} parts"))),
        None => Ok(writes),
    }
}

fn operation(layout: &Layout, write: Write) -> TxnOp {
    match write {
        Write::Put(key, value) => TxnOp::put(layout.key(&key), value.to_string(), None),
        Write::Delete(key) => TxnOp::delete(layout.key(&key), None),
    }
}

fn unchanged(layout: &Layout, head: &HeadAt) -> Compare {
    Compare::mod_revision(layout.head(), CompareOp::Equal, head.at)
}

fn json(value: &impl serde::Serialize) -> Result<String, CallError> {
    serde_json::to_string(value).map_err(|error| CallError::Failed(error.to_string()))
}

/// Writes a change that was decided on the state of `before`.
///
/// # Errors
/// [`CallError`]: unless etcd has refused it, the change may have been made.
pub(super) async fn commit(
    client: &Client,
    layout: &Layout,
    before: &HeadAt,
    change: &str,
    node: &str,
    writes: Vec<Write>,
) -> Result<Outcome, CallError> {
    // A new head would hide the journal, whose parts may not be in their places yet.
    if before.has_journal() {
        return Ok(Outcome::Conflict);
    }
    let mut groups = groups(writes);
    let journal = (groups.len() > 1).then_some(groups.len());
    let head = Head::next(before.head.as_ref(), change, node, journal);
    if journal.is_none() {
        let operations = groups.pop().unwrap_or_default().into_iter().map(|write| operation(layout, write)).collect();
        let made = replace_head(client, layout, before, &head, Vec::new(), operations).await?;
        return Ok(made.map_or(Outcome::Conflict, Outcome::Made));
    }
    let written = async {
        write_journal(client, layout, change, groups).await?;
        // Another node may have cleared this journal as a leftover. It clears all of it, so the first part stands for all.
        let whole = Compare::version(layout.part(change, 0), CompareOp::Greater, 0);
        replace_head(client, layout, before, &head, vec![whole], Vec::new()).await
    };
    match written.await {
        // The change is made. Its parts are copied to their places now, or before the next change.
        Ok(Some(at)) => {
            let mine = HeadAt { at, head: Some(head) };
            Ok(Outcome::Made(clear_journal(client, layout, &mine, node).await.unwrap_or(at)))
        }
        Ok(None) => {
            discard_journal(client, layout, change).await;
            Ok(Outcome::Conflict)
        }
        Err(error) => {
            if matches!(error, CallError::Refused(_)) {
                discard_journal(client, layout, change).await;
            }
            Err(error)
        }
    }
}

/// Replaces the head `before` if it is still in place and the other conditions hold, together with these operations.
/// Returns the revision of the new head.
async fn replace_head(
    client: &Client,
    layout: &Layout,
    before: &HeadAt,
    head: &Head,
    mut conditions: Vec<Compare>,
    mut operations: Vec<TxnOp>,
) -> Result<Option<i64>, CallError> {
    conditions.push(unchanged(layout, before));
    operations.push(TxnOp::put(layout.head(), json(head)?, None));
    let done = in_time(client.kv_client().txn(Txn::new().when(conditions).and_then(operations))).await?;
    Ok(done.succeeded().then(|| done.header().map_or(before.at, |header| header.revision())))
}

/// Writes the parts of a change to the journal. The first one comes first.
async fn write_journal(
    client: &Client,
    layout: &Layout,
    change: &str,
    groups: Vec<Vec<Write>>,
) -> Result<(), CallError> {
    let mut kv = client.kv_client();
    for (number, writes) in groups.into_iter().enumerate() {
        in_time(kv.put(layout.part(change, number), json(&Part { v: 1, writes })?, None)).await?;
    }
    Ok(())
}

/// Deletes the parts of a change that was not made. If that fails, the next large change deletes them.
pub(super) async fn discard_journal(client: &Client, layout: &Layout, change: &str) {
    let folder = layout.parts(change);
    let options = DeleteOptions::new().with_range(end_of(&folder));
    if let Err(error) = in_time(client.kv_client().delete(folder, Some(options))).await {
        tracing::debug!(%error, "the parts of a change that was not made stay in etcd for now");
    }
}

/// Copies a change from the journal to its place, and returns the resulting revision of the head. Several nodes may do
/// this at the same time.
pub(super) async fn clear_journal(
    client: &Client,
    layout: &Layout,
    head: &HeadAt,
    node: &str,
) -> Result<i64, CallError> {
    let Some((of, parts)) = head.head.as_ref().and_then(|of| Some((of, of.journal?))) else { return Ok(head.at) };
    let mut kv = client.kv_client();
    for writes in groups(journal(client, layout, &of.change, parts, None).await?) {
        let operations: Vec<_> = writes.into_iter().map(|write| operation(layout, write)).collect();
        let done = in_time(kv.txn(Txn::new().when([unchanged(layout, head)]).and_then(operations))).await?;
        if !done.succeeded() {
            return Err(others_turn());
        }
    }
    let cleared = Head { node: node.to_owned(), journal: None, ..of.clone() };
    // This also deletes leftovers of changes that were not made.
    let all = DeleteOptions::new().with_range(end_of(&layout.journal()));
    let delete = TxnOp::delete(layout.journal(), Some(all));
    let done = replace_head(client, layout, head, &cleared, Vec::new(), vec![delete]).await?;
    done.ok_or_else(others_turn)
}

fn others_turn() -> CallError {
    CallError::Failed("another node clears the journal".to_owned())
}

/// Writes a head without a change. Then no change that was decided on `before` and is still in progress can be made.
pub(super) async fn fence(
    client: &Client,
    layout: &Layout,
    before: &HeadAt,
    change: &str,
    node: &str,
) -> Result<Outcome, CallError> {
    commit(client, layout, before, change, node, Vec::new()).await
}

/// The version of the member.
pub(super) async fn version(client: &Client) -> Result<String, CallError> {
    Ok(in_time(client.maintenance_client().status()).await?.version().to_owned())
}

/// The log of the baseline that was added under this name at this time.
pub(super) async fn log(
    client: &Client,
    layout: &Layout,
    name: &str,
    added: i64,
) -> Result<Option<Vec<u8>>, CallError> {
    let found = in_time(client.kv_client().get(layout.log(name), None)).await?;
    let Some(found) = found.kvs().first() else { return Ok(None) };
    let log: LogJson = layout::decode(found.value()).map_err(|error| unreadable("the log", error))?;
    Ok((log.added == added).then_some(log.log))
}

/// Watches the changes after `revision`.
pub(super) async fn watch(client: &Client, layout: &Layout, revision: i64) -> Result<WatchStream, CallError> {
    let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
    let mut watch = client.watch_client().max_decoding_message_size(LONGEST);
    in_time(watch.watch(layout.state(), Some(options))).await
}
