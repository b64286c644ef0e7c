//! Asks every endpoint separately, for `claviger doctor`.

use tokio::runtime::Builder;
use tokio::task::JoinSet;

use super::calls;
use super::layout::Layout;
use super::settings::EtcdSettings;

/// What an endpoint answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointAnswer {
    /// Its URL.
    pub endpoint: String,
    /// Its version, or why it cannot be used.
    pub version: Result<String, String>,
}

/// Asks every endpoint for the last change, which needs the consent of a majority, and for its version. Blocks for some
/// seconds at most.
///
/// # Errors
/// The system gives no resources for a connection.
pub fn probe(settings: &EtcdSettings) -> std::io::Result<Vec<EndpointAnswer>> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut answers = runtime.block_on(async {
        let mut asked = JoinSet::new();
        for (at, endpoint) in settings.endpoints.iter().enumerate() {
            let (settings, endpoint) = (settings.clone(), endpoint.clone());
            asked.spawn(async move {
                let version = ask(&settings, &endpoint).await;
                (at, EndpointAnswer { endpoint, version })
            });
        }
        asked.join_all().await
    });
    answers.sort_by_key(|(at, _)| *at);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

async fn ask(settings: &EtcdSettings, endpoint: &str) -> Result<String, String> {
    let client = settings.connect(endpoint).await.map_err(|error| error.problem)?;
    let layout = Layout::new(&settings.prefix);
    calls::read_head(&client, &layout).await.map_err(|error| error.to_string())?;
    calls::version(&client).await.map_err(|error| error.to_string())
}
