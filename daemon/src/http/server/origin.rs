//! The facts about its connection that a request can use.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use super::activity::{Activity, Cut, Reading};
use super::ration::{Account, Charged};

/// The address of the client. [`run`](super::run) adds it to the extensions of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// The connection of a request. [`run`](super::run) adds it to the extensions of every request. Work for the request
/// holds this value until it is done, even if the client no longer waits.
#[derive(Clone, Debug)]
pub struct Origin(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    number: u64,
    activity: Arc<Activity>,
    account: Arc<Account>,
    _work: Option<OwnedSemaphorePermit>,
}

/// Interval for checking whether a client has closed its side.
const LOOK_FOR_CLOSE: Duration = Duration::from_millis(100);

impl Origin {
    pub(super) fn new(
        number: u64,
        activity: Arc<Activity>,
        account: Arc<Account>,
        work: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self(Arc::new(Connection { number, activity, account, _work: work }))
    }

    /// Records the result of a request: `true` if it proved a host, `false` if it was refused and its sender was not
    /// proved to be a host.
    pub fn judge(&self, proved: bool) {
        let account = &self.0.account;
        if proved {
            account.prove();
            self.0.activity.dismiss(false);
        } else {
            account.doubt();
        }
    }

    /// Whether the last recorded result proved a host.
    #[must_use]
    pub fn is_proved(&self) -> bool {
        self.0.account.is_proved()
    }

    /// Discards further input, so that the client can read its reply.
    pub fn dismiss(&self) {
        self.0.activity.dismiss(true);
    }

    /// Cuts the connection when it is called, because its client does not read an answer that takes memory.
    pub fn cutter(&self) -> impl Fn() + Send + Sync + use<> {
        let activity = self.0.activity.clone();
        move || activity.cut(Cut::Unread)
    }

    /// Charges the processor time of `work` to the connection's address until a host proves itself.
    pub fn charged<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        Charged::new(Box::pin(work), Arc::clone(&self.0.account))
    }

    /// Whether the client of an HTTP/1.1 connection has closed its side. It may still read a reply, but most clients
    /// that close do not. HTTP/2 has no such state: there, requests end with the connection.
    #[must_use]
    pub fn client_has_closed(&self) -> bool {
        !self.0.activity.is_http2() && self.0.activity.client_has_closed()
    }

    /// Completes when the client of an HTTP/1.1 connection has closed its side.
    pub async fn client_closes(&self) {
        if self.0.activity.is_http2() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK_FOR_CLOSE).await;
            if self.client_has_closed() {
                return;
            }
        }
    }

    /// How long the connection has had to wait for its turns, and still has to: time that counts in no limit of its client.
    #[must_use]
    pub fn waits(&self) -> Duration {
        self.0.account.waits()
    }

    /// A number that is unique among open connections.
    #[must_use]
    pub fn connection(&self) -> u64 {
        self.0.number
    }

    /// Marks the request's body as being read while the returned value lives: the service waits for the client, and the
    /// connection may be closed to make room.
    #[must_use]
    pub fn reading(&self) -> impl Drop + Send + use<> {
        Reading::new(self.0.activity.clone())
    }
}
