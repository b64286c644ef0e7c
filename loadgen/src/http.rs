//! Settings of the HTTP client for the load generator, and the error codes of its failures.
//!
//! The load generator uses the same client as hosts and tenants, [`claviger_client::http`]. Its connection pool never
//! makes a request wait, so the measured time has no hidden parts.

use std::time::Duration;

use claviger_client::Lack;
use rustix::process::{Resource, getrlimit};

pub use claviger_client::http::{Client, ClientError, Deadlines, Reply, TlsSettings};

/// Largest reply in bytes: a batch of 256 items, with spare room.
const REPLY_LIMIT: usize = 64 * 1024 * 1024;

/// Makes a client that limits every request to `timeout` in total, because this is the time that is measured. It keeps
/// all connections, because as many requests may be in flight. Blocks on files.
///
/// # Errors
/// [`ClientError`]: the URL or a file of `tls` is unusable.
pub fn client(url: &str, tls: &TlsSettings, timeout: Duration) -> Result<Client, ClientError> {
    let client = Client::with_tls(url, tls)?;
    Ok(client.with_deadlines(Deadlines::together(timeout)).reading(REPLY_LIMIT).keeping(usize::MAX))
}

/// The code under which a request without a reply is counted.
#[must_use]
pub(crate) fn error_code(error: &ClientError) -> &'static str {
    match error {
        ClientError::Timeout { .. } => "Timeout",
        ClientError::Broken { .. } | ClientError::TooLarge { .. } => "BrokenConnection",
        error => error.lack().map_or("NoConnection", lack_code),
    }
}

/// The error code for a local resource that ran out.
pub(crate) fn lack_code(lack: Lack) -> &'static str {
    match lack {
        Lack::Files => "OutOfFiles",
        Lack::Ports => "OutOfPorts",
    }
}

/// A sentence that names the resource and says what to do.
pub(crate) fn lack_text(lack: Lack) -> String {
    match lack {
        Lack::Files => {
            let limit = getrlimit(Resource::Nofile).current.map_or("no limit".to_owned(), |limit| limit.to_string());
            format!("the load generator has no more open files (its limit is {limit}); raise it with ulimit -n")
        }
        Lack::Ports => "the load generator's machine has no more local ports or socket memory for connections to this \
             server; widen net.ipv4.ip_local_port_range, ask from several machines, or lower --in-flight"
            .to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn errors_are_counted_by_what_went_wrong() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", nobody.local_addr().unwrap());
        let ask = async |timeout| {
            let client = client(&url, &TlsSettings::default(), timeout).unwrap();
            error_code(&client.get("/").await.unwrap_err())
        };
        assert_eq!(ask(Duration::from_millis(50)).await, "Timeout", "it listens and never answers");
        drop(nobody);
        assert_eq!(ask(Duration::from_secs(10)).await, "NoConnection");
    }
}
