//! Requests of administrators to read the configuration again. They go to the task that also follows `SIGHUP`, so that two
//! reloads never run at the same time.

use std::sync::Mutex;

use claviger_process::lock::lock;
use tokio::sync::{mpsc, oneshot};

/// Most requests that wait; each waits for the one before.
const WAITING: usize = 16;

/// Where the result of a reload goes: the settings that need a restart, or why nothing was changed.
pub(crate) type Reply = oneshot::Sender<Result<Vec<String>, String>>;

/// The way from administrators to the task that reloads.
#[derive(Debug)]
pub struct Reloads {
    sender: mpsc::Sender<Reply>,
    receiver: Mutex<Option<mpsc::Receiver<Reply>>>,
}

impl Default for Reloads {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self { sender, receiver: Mutex::new(Some(receiver)) }
    }
}

impl Reloads {
    /// Waits for a reload.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn ask(&self) -> Result<Vec<String>, String> {
        if lock(&self.receiver).is_some() {
            return Err("this daemon does not follow its configuration file: it is a demonstration".to_owned());
        }
        let (reply, result) = oneshot::channel();
        let ended = || "the daemon stops".to_owned();
        self.sender.send(reply).await.map_err(|_| ended())?;
        result.await.map_err(|_| ended())?
    }

    /// The requests, for the one task that reloads. Later calls return a channel that gets none.
    #[must_use]
    pub fn requests(&self) -> mpsc::Receiver<Reply> {
        lock(&self.receiver).take().unwrap_or_else(|| mpsc::channel(1).1)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn an_administrator_hears_what_came_of_it() {
        let reloads = Arc::new(Reloads::default());
        assert!(reloads.ask().await.unwrap_err().contains("demonstration"));
        let mut requests = reloads.requests();
        let asking = tokio::spawn({
            let reloads = reloads.clone();
            async move { reloads.ask().await }
        });
        requests.recv().await.unwrap().send(Ok(vec!["server.listen".to_owned()])).unwrap();
        assert_eq!(asking.await.unwrap().unwrap(), ["server.listen"]);
        drop(requests);
        assert!(reloads.ask().await.unwrap_err().contains("stops"));
    }
}
