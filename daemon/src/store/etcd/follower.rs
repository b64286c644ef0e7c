//! A task that keeps the contents in memory up to date with etcd: it reads the whole state, then the changes.
//!
//! ```text
//!                  connected, loaded
//!   lost(reason) ───────────────────► following ──┐ events; every [`BEAT`] a majority confirms the head
//!     ▲    ▲                              │  ▲    │
//!     │    └── no endpoint answers        │  └────┘
//!     └── watch cancelled, compacted or behind; no answer: the next endpoint is tried at once, and all is read again
//! ```
//!
//! While the connection is lost, the contents stay as they are; [`Followed::fresh`] limits their age.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use claviger_process::lock::{lock, unpoisoned};
use etcd_client::{Client, EventType, WatchResponse};
use tokio::time::{MissedTickBehavior, interval};

use super::batch::Head;
use super::calls::{self, CallError, HeadAt, Loaded};
use super::layout::{self, Layout};
use super::settings::{EtcdSettings, Unreachable, reason};
use crate::store::contents::Contents;

/// Interval at which a majority of etcd is asked whether the contents are current.
const BEAT: Duration = Duration::from_millis(250);
/// Time limit of that answer before another endpoint is tried.
const BEAT_ANSWER: Duration = Duration::from_millis(750);
/// Number of beats after which events that a majority has, but the watch has not delivered, count as lost.
const LATE: u32 = 2;
/// Pause after no endpoint has answered.
const PAUSE: Duration = Duration::from_millis(200);

/// The data that the task and the callers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: EtcdSettings,
    pub(super) layout: Layout,
    followed: Mutex<Followed>,
    /// Notifies about every change of `followed`.
    moved: Condvar,
    /// Notifies about new contents, and about each confirmation that they are the newest.
    pub(super) changed: tokio::sync::watch::Sender<()>,
}

/// The known state of etcd.
pub(super) struct Followed {
    /// `None` until they were read for the first time.
    pub(super) contents: Option<Arc<Contents>>,
    /// The last change in them.
    pub(super) head: HeadAt,
    /// etcd's revision at which they were read or last changed.
    pub(super) revision: i64,
    /// A time at which the contents were current, confirmed by a majority.
    pub(super) fresh: Option<Instant>,
    pub(super) link: Link,
    /// When the connection was lost, or the first attempt to connect.
    pub(super) lost: Instant,
}

/// State of the connection.
#[derive(Clone)]
pub(super) enum Link {
    Following { client: Box<Client>, endpoint: String },
    Lost(Unreachable),
}

impl std::fmt::Debug for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followed").field("head", &self.head).field("revision", &self.revision).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(settings: EtcdSettings) -> Self {
        let nowhere = Unreachable { endpoint: settings.endpoints.join(", "), problem: "not connected yet".to_owned() };
        Self {
            layout: Layout::new(&settings.prefix),
            settings,
            followed: Mutex::new(Followed {
                contents: None,
                head: HeadAt::default(),
                revision: 0,
                fresh: None,
                link: Link::Lost(nowhere),
                lost: Instant::now(),
            }),
            moved: Condvar::new(),
            changed: tokio::sync::watch::Sender::new(()),
        }
    }

    pub(super) fn followed(&self) -> MutexGuard<'_, Followed> {
        lock(&self.followed)
    }

    /// Waits until `found` returns a value, or until the deadline.
    pub(super) fn wait<T>(&self, deadline: Instant, mut found: impl FnMut(&Followed) -> Option<T>) -> Option<T> {
        let mut followed = self.followed();
        loop {
            if let Some(value) = found(&followed) {
                return Some(value);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            followed = unpoisoned(self.moved.wait_timeout(followed, left)).0;
        }
    }

    fn update<T>(&self, change: impl FnOnce(&mut Followed) -> T) -> T {
        let value = change(&mut self.followed());
        self.moved.notify_all();
        value
    }

    /// Publishes new contents together with what `more` changes: who sees one, sees the other.
    fn publish(&self, contents: Contents, head: HeadAt, revision: i64, more: impl FnOnce(&mut Followed)) {
        self.update(|followed| {
            followed.contents = Some(Arc::new(contents));
            (followed.head, followed.revision) = (head, revision);
            more(followed);
        });
        self.changed.send_replace(());
    }
}

/// Follows etcd while the task runs.
pub(super) async fn follow(shared: Arc<Shared>) {
    let endpoints = &shared.settings.endpoints;
    let mut failed = 0;
    for endpoint in endpoints.iter().cycle() {
        let mut was_following = false;
        let problem = session(&shared, endpoint, &mut was_following).await;
        if was_following {
            tracing::warn!(endpoint, problem, "etcd is lost; trying the next endpoint");
        }
        shared.update(|followed| {
            if was_following {
                followed.lost = Instant::now();
            }
            followed.link = Link::Lost(Unreachable { endpoint: endpoint.clone(), problem });
        });
        failed = if was_following { 0 } else { failed + 1 };
        if failed >= endpoints.len() {
            failed = 0;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Why following ended.
enum Ended {
    /// The state must be read again.
    Again,
    Lost(String),
}

impl From<CallError> for Ended {
    fn from(error: CallError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// Follows one endpoint until it is lost. Returns the reason.
async fn session(shared: &Shared, endpoint: &str, was_following: &mut bool) -> String {
    let client = match shared.settings.connect(endpoint).await {
        Ok(client) => client,
        Err(error) => return error.problem,
    };
    loop {
        match reading(shared, &client, endpoint, was_following).await {
            Ended::Again => {}
            Ended::Lost(problem) => return problem,
        }
    }
}

/// Reads the whole state, and then follows its changes.
async fn reading(shared: &Shared, client: &Client, endpoint: &str, was_following: &mut bool) -> Ended {
    let asked = Instant::now();
    let Loaded { contents, head, revision } = match calls::load(client, &shared.layout).await {
        Ok(loaded) => loaded,
        Err(error) => return error.into(),
    };
    let mut stream = match calls::watch(client, &shared.layout, revision).await {
        Ok(stream) => stream,
        Err(error) => return error.into(),
    };
    *was_following = true;
    shared.publish(contents, head, revision, |followed| {
        followed.fresh = Some(asked);
        followed.link = Link::Following { client: Box::new(client.clone()), endpoint: endpoint.to_owned() };
    });
    let mut beats = interval(BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut late = 0;
    loop {
        let beat = async {
            beats.tick().await;
            (Instant::now(), tokio::time::timeout(BEAT_ANSWER, calls::read_head(client, &shared.layout)).await)
        };
        tokio::pin!(beat);
        // Process events while the beat is in progress; the beat must not be cancelled by them.
        let (asked, confirmed) = loop {
            tokio::select! {
                message = stream.message() => {
                    let ended = match message {
                        Ok(Some(response)) => take(shared, &response),
                        Ok(None) => Some(Ended::Lost("the watch has ended".to_owned())),
                        Err(error) => Some(Ended::Lost(reason(&error))),
                    };
                    if let Some(ended) = ended {
                        return ended;
                    }
                }
                confirmed = &mut beat => break confirmed,
            }
        };
        let newest = match confirmed {
            Ok(Ok(head)) => head.at,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::Lost(format!("no answer in {} ms", BEAT_ANSWER.as_millis())),
        };
        let is_newest = shared.update(|followed| {
            let is_newest = followed.head.at >= newest;
            if is_newest {
                followed.fresh = Some(asked);
            }
            is_newest
        });
        if is_newest {
            shared.changed.send_replace(());
        }
        late = if is_newest { 0 } else { late + 1 };
        if late > LATE {
            return Ended::Again;
        }
    }
}

/// Applies the events of a watch.
fn take(shared: &Shared, response: &WatchResponse) -> Option<Ended> {
    if response.canceled() || response.compact_revision() > 0 {
        tracing::info!(reason = response.cancel_reason(), "etcd has cancelled the watch; the state is read again");
        return Some(Ended::Again);
    }
    if response.events().is_empty() {
        return None;
    }
    let (known, mut head, mut revision) = {
        let followed = shared.followed();
        (followed.contents.clone()?, followed.head.clone(), followed.revision)
    };
    // An event may repair a record that cannot be read.
    if !known.is_whole() {
        return Some(Ended::Again);
    }
    let mut contents = Contents::clone(&known);
    for event in response.events() {
        let Some(pair) = event.kv() else { continue };
        revision = revision.max(pair.mod_revision());
        let value = (event.event_type() == EventType::Put).then(|| pair.value());
        if pair.key() == shared.layout.head().as_bytes() {
            // Without a valid head, nothing is known.
            let Some(found) = value.and_then(|value| layout::decode::<Head>(value).ok()) else {
                return Some(Ended::Again);
            };
            if found.journal.is_some() {
                return Some(Ended::Again);
            }
            head = HeadAt { at: pair.mod_revision(), head: Some(found) };
        } else if let Some(key) = shared.layout.strip(pair.key())
            && layout::take(&mut contents, key, value).is_err()
        {
            return Some(Ended::Again);
        }
    }
    shared.publish(contents, head, revision, |_| {});
    None
}
