//! The state in etcd, shared by several nodes.
//!
//! A task follows etcd and keeps the contents in memory ([`follower`]). A change is decided on these contents and
//! written on condition that no other change was made since ([`calls::commit`]). Otherwise it is decided again on the
//! new contents. If the connection is lost during a write, it is first determined whether the change was made.

mod batch;
mod board;
mod calls;
mod follower;
mod layout;
mod probe;
mod settings;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use etcd_client::Client;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::backend::{Condition, Decision, Store};
use super::baselines::reservation_of_nodes;
use super::contents::Contents;
use super::error::StateError;
pub use board::{Board, BoardError, Entry, Lease};
use calls::{CallError, HeadAt, Outcome};
use follower::{Link, Shared};
pub use probe::{EndpointAnswer, probe};
pub use settings::EtcdSettings;

/// Time limit for a change, including all attempts.
const CHANGE: Duration = Duration::from_secs(10);
/// How long a change waits for another endpoint after the connection was lost. Later changes are refused at once.
const GRACE: Duration = Duration::from_secs(2);
/// Shortest time for which a change that was made waits until this node has read it back.
const READ_BACK: Duration = Duration::from_secs(2);
/// Time limit for an operation of several calls, such as writing a large change.
const LARGE: Duration = Duration::from_secs(60);

/// The state in etcd. Its own thread follows etcd until the last copy is dropped.
#[derive(Clone, Debug)]
pub(super) struct Etcd {
    shared: Arc<Shared>,
    runtime: Handle,
    /// Dropping it ends the thread.
    stop: Arc<oneshot::Sender<()>>,
}

impl Etcd {
    /// Connects to etcd and reads the state.
    ///
    /// # Errors
    /// [`StateError::Unavailable`] if no endpoint answers in this time.
    pub(super) fn open(settings: EtcdSettings, patience: Duration) -> Result<Self, StateError> {
        let unavailable = |error: std::io::Error| StateError::Unavailable { reason: error.to_string() };
        let shared = Arc::new(Shared::new(settings));
        let (stop, mut stopped) = oneshot::channel::<()>();
        let runtime = Builder::new_current_thread().enable_all().build().map_err(unavailable)?;
        let handle = runtime.handle().clone();
        let following = Arc::clone(&shared);
        let thread = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = follower::follow(following) => {}
                    _ = &mut stopped => {}
                }
            });
        };
        std::thread::Builder::new().name("etcd".to_owned()).spawn(thread).map_err(unavailable)?;
        let store = Self { shared, runtime: handle, stop: Arc::new(stop) };
        let loaded = store.shared.wait(Instant::now() + patience, |followed| followed.contents.as_ref().map(drop));
        match loaded {
            Some(()) => Ok(store),
            None => Err(store.lost()),
        }
    }

    /// Values that nodes tell each other, through the same connection.
    pub(super) fn board(&self) -> Board {
        Board::new(Arc::clone(&self.shared), Arc::clone(&self.stop))
    }

    /// The state of the connection to etcd.
    pub(super) fn condition(&self) -> Condition {
        let followed = self.shared.followed();
        Condition {
            link: match &followed.link {
                Link::Following { endpoint, .. } => Ok(endpoint.clone()),
                Link::Lost(reason) => Err(reason.to_string()),
            },
            age: followed.fresh.map_or(Duration::MAX, |fresh| fresh.elapsed()),
            revision: followed.revision,
        }
    }

    fn lost(&self) -> StateError {
        let reason = match &self.shared.followed().link {
            Link::Lost(reason) => reason.to_string(),
            Link::Following { endpoint, .. } => format!("{endpoint}: the state has not been read yet"),
        };
        StateError::Unavailable { reason }
    }

    /// Returns the connection. If it was just lost, waits for a new one until `GRACE` after the loss.
    fn client(&self) -> Result<Client, StateError> {
        let until = self.shared.followed().lost + GRACE;
        let found = self.shared.wait(until, |followed| match &followed.link {
            Link::Following { client, .. } => Some(Client::clone(client)),
            Link::Lost(_) => None,
        });
        found.ok_or_else(|| self.lost())
    }

    /// Runs a call on the thread of the connections, and waits for it.
    fn call<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, CallError>> + Send + 'static,
    ) -> Result<T, CallError> {
        let (answer, answered) = sync_channel(1);
        self.runtime.spawn(async move {
            let _ = answer.send(call.await);
        });
        answered.recv_timeout(LARGE).unwrap_or_else(|error| {
            Err(CallError::Failed(match error {
                RecvTimeoutError::Timeout => "no answer".to_owned(),
                RecvTimeoutError::Disconnected => "the connection was closed".to_owned(),
            }))
        })
    }

    /// The contents that include the change whose head was written at `at`, and their head.
    fn contents_since(&self, at: i64, deadline: Instant) -> Option<(Arc<Contents>, HeadAt)> {
        self.shared.wait(deadline, |followed| {
            let contents = followed.contents.as_ref().filter(|_| followed.head.at >= at)?;
            Some((Arc::clone(contents), followed.head.clone()))
        })
    }

    fn read_head(&self, client: &Client) -> Result<HeadAt, CallError> {
        let (client, shared) = (client.clone(), Arc::clone(&self.shared));
        self.call(async move { calls::read_head(&client, &shared.layout).await })
    }

    /// Deletes what a change that was not made has left.
    fn discard_journal(&self, change: String) {
        let Ok(client) = self.client() else { return };
        let shared = Arc::clone(&self.shared);
        let _ = self.call(async move {
            calls::discard_journal(&client, &shared.layout, &change).await;
            Ok(())
        });
    }

    /// After a lost connection, finds out whether a change was made, and otherwise makes sure that it will not be made
    /// later.
    fn was_made(&self, change: &str, before: &HeadAt, deadline: Instant) -> Option<Outcome> {
        while Instant::now() < deadline {
            // The follower searches for an endpoint that answers.
            let Some((client, newest)) = self.client().ok().and_then(|client| {
                let newest = self.read_head(&client).ok()?;
                Some((client, newest))
            }) else {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            match &newest.head {
                Some(head) if head.has(change) => return Some(Outcome::Made(newest.at)),
                // Another change was made instead, and this change is not among the ones before it.
                Some(head) if newest.at != before.at => {
                    let reaches_back = before.head.as_ref().is_none_or(|before| head.has(&before.change));
                    return reaches_back.then_some(Outcome::Conflict);
                }
                _ => {}
            }
            let (shared, before, id) = (Arc::clone(&self.shared), before.clone(), new_id()?);
            let fenced =
                async move { calls::fence(&client, &shared.layout, &before, &id, &shared.settings.node).await };
            if let Ok(Outcome::Made(_)) = self.call(fenced) {
                return Some(Outcome::Conflict);
            }
        }
        None
    }
}

fn new_id() -> Option<String> {
    let mut id = [0; 12];
    SystemRandom::new().fill(&mut id).ok()?;
    Some(HEXLOWER.encode(&id))
}

impl Store for Etcd {
    fn contents(&self) -> Result<Arc<Contents>, StateError> {
        let contents = self.shared.followed().contents.clone();
        contents.ok_or_else(|| self.lost())
    }

    fn change(&mut self, decide: Decision<'_>) -> Result<(), StateError> {
        let (start, deadline) = (Instant::now(), Instant::now() + CHANGE);
        let no_randomness = || StateError::Unavailable { reason: "the system has no randomness".to_owned() };
        while Instant::now() < deadline {
            let (client, shared) = (self.client()?, Arc::clone(&self.shared));
            let newest = match self.read_head(&client) {
                Ok(newest) => newest,
                // The follower may not have noticed yet that its endpoint is lost.
                Err(_) if start.elapsed() < GRACE => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                Err(error) => return Err(StateError::Unavailable { reason: error.to_string() }),
            };
            if newest.has_journal() {
                let cleared =
                    async move { calls::clear_journal(&client, &shared.layout, &newest, &shared.settings.node).await };
                // If another node was faster, the head shows it.
                let _ = self.call(cleared);
                continue;
            }
            let Some((contents, before)) = self.contents_since(newest.at, deadline) else { break };
            // Another node has made a large change since.
            if before.has_journal() {
                continue;
            }
            let mut after = Contents::clone(&contents);
            decide(&mut after)?;
            let delta = after.delta_since(&contents);
            if delta.is_empty() {
                return Ok(());
            }
            let writes = layout::writes_of(&delta).map_err(|error| StateError::Invalid(error.to_string()))?;
            let change = new_id().ok_or_else(no_randomness)?;
            let (of, since) = (change.clone(), before.clone());
            let made = self.call(async move {
                calls::commit(&client, &shared.layout, &since, &of, &shared.settings.node, writes).await
            });
            let outcome = match made {
                Ok(outcome) => Some(outcome),
                Err(CallError::Refused(reason)) => return Err(StateError::Refused { reason }),
                Err(error) => {
                    tracing::warn!(%error, "the reply to a change was lost; checking whether the change was made");
                    let outcome = self.was_made(&change, &before, deadline);
                    if outcome == Some(Outcome::Conflict) {
                        self.discard_journal(change);
                    }
                    outcome
                }
            };
            match outcome {
                Some(Outcome::Made(at)) => {
                    // When the caller learns that the change is made, this node must already use it.
                    let until = deadline.max(Instant::now() + READ_BACK);
                    return self.contents_since(at, until).map(drop).ok_or(StateError::NotSeen);
                }
                Some(Outcome::Conflict) => {}
                None => return Err(StateError::Unknown),
            }
        }
        Err(StateError::Unavailable { reason: "no change could be made in ten seconds; try again".to_owned() })
    }

    fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError> {
        let (client, shared, name) = (self.client()?, Arc::clone(&self.shared), name.to_owned());
        let log = self.call(async move { calls::log(&client, &shared.layout, &name, added).await });
        log.map_err(|error| StateError::Unavailable { reason: error.to_string() })
    }

    fn reservation(&self) -> i64 {
        reservation_of_nodes(self.shared.settings.max_staleness)
    }

    fn condition(&self) -> Option<Condition> {
        Some(Self::condition(self))
    }

    fn confirmed(&self) -> Option<Instant> {
        self.shared.followed().fresh
    }

    fn another(&self) -> Option<Box<dyn Store>> {
        Some(Box::new(self.clone()))
    }

    fn changes(&self) -> Option<tokio::sync::watch::Receiver<()>> {
        Some(self.shared.changed.subscribe())
    }
}
