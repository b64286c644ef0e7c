//! What a request knows of its connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use super::activity::{Activity, Reading};
use super::ration::{Account, Charged};

/// The address at the other end of a connection. [`run`](super::run) puts it into every request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// The connection that a request came on. [`run`](super::run) puts it into every request's extensions; what works on a request holds it
/// until the work is done, also when the client does not wait for that.
#[derive(Clone, Debug)]
pub struct Origin(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    number: u64,
    activity: Arc<Activity>,
    account: Arc<Account>,
    _work: Option<OwnedSemaphorePermit>,
}

/// How soon to look again whether a client has closed its side.
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

    /// Notes what a request on the connection came to: a host proved itself by it (`true`), or it was refused, and its sender
    /// did not prove to be a host (`false`).
    pub fn judge(&self, proved: bool) {
        let account = &self.0.account;
        if proved {
            account.prove();
            self.0.activity.dismiss(false);
        } else {
            account.doubt();
        }
    }

    /// Whether the last word on the connection was that a host proved itself.
    #[must_use]
    pub fn is_proved(&self) -> bool {
        self.0.account.is_proved()
    }

    /// Says that what the client still sends is not worth reading, so that it gets to read its answer.
    pub fn dismiss(&self) {
        self.0.activity.dismiss(true);
    }

    /// The same work, whose processor time is charged to the connection's address until a host proves itself.
    pub fn charged<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        Charged::new(work, Arc::clone(&self.0.account))
    }

    /// Whether the client of a connection of HTTP/1.1 has closed its side. It may still read an answer; most that close do
    /// not. HTTP/2 has no such state: there the requests end with the connection.
    #[must_use]
    pub fn client_has_closed(&self) -> bool {
        !self.0.activity.is_http2() && self.0.activity.client_has_closed()
    }

    /// Ends when the client of a connection of HTTP/1.1 has closed its side.
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

    /// A number that no other open connection has.
    #[must_use]
    pub fn connection(&self) -> u64 {
        self.0.number
    }

    /// Says that the request's body is being read, for as long as the value lives: meanwhile the service waits for the
    /// client, and the connection may be closed to make room.
    #[must_use]
    pub fn reading(&self) -> impl Drop + Send + use<> {
        Reading::new(self.0.activity.clone())
    }
}
