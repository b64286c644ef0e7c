//! The host and port of a server, and how to connect to it.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use claviger_process::lock::lock;
use rustix::io::Errno;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::Instant;

use crate::race::{delay, order, race};

/// For this long, an address that did not answer is tried after all other addresses of its name.
const TROUBLE: Duration = Duration::from_secs(30);

/// A resource that this machine or this process has used up. The server is not the cause.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Lack {
    /// Open files. Every connection needs one.
    Files,
    /// Local ports for connections to this server, or memory for sockets.
    Ports,
}

/// Reasons why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name lookup failed.
    #[error("{0}")]
    Lookup(#[source] io::Error),
    /// The name has no address.
    #[error("the name has no address")]
    NoAddress,
    /// Every address failed. Holds each address with its error.
    #[error("{}", Reasons(.0))]
    Refused(Vec<(SocketAddr, io::Error)>),
    /// The connection was made, but its socket options could not be set.
    #[error("{0}")]
    Setup(#[source] io::Error),
}

/// Shows the errors of all addresses. With only one address, the address itself is left out.
struct Reasons<'a>(&'a [(SocketAddr, io::Error)]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, error)] = self.0 {
            return write!(f, "{error}");
        }
        for (at, (address, error)) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {error}", address.ip())?;
        }
        Ok(())
    }
}

impl ConnectError {
    /// The local resource that ran out, if that is why the connection failed.
    #[must_use]
    pub fn lack(&self) -> Option<Lack> {
        match self {
            Self::Lookup(error) | Self::Setup(error) => lack_of_files(error),
            Self::NoAddress => None,
            Self::Refused(all) => {
                // The error "not available" also means that this machine does not support the address family. So it
                // means a lack of ports only if every address has this error.
                let no_port = |(_, error): &(_, io::Error)| Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL);
                let files = all.iter().find_map(|(_, error)| lack_of_files(error));
                files.or_else(|| (!all.is_empty() && all.iter().all(no_port)).then_some(Lack::Ports))
            }
        }
    }
}

/// Checks whether the process can still open a file. A resolver that cannot open its own files reports the name as
/// unknown.
fn out_of_files() -> Option<io::Error> {
    File::open("/dev/null").err().filter(|error| lack_of_files(error).is_some())
}

fn lack_of_files(error: &io::Error) -> Option<Lack> {
    match Errno::from_io_error(error)? {
        Errno::MFILE | Errno::NFILE => Some(Lack::Files),
        Errno::NOBUFS | Errno::NOMEM => Some(Lack::Ports),
        _ => None,
    }
}

/// The host of a server (a name or an address) and its port. Remembers which addresses failed recently.
#[derive(Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    trouble: Mutex<HashMap<SocketAddr, Instant>>,
}

impl Endpoint {
    /// Makes an endpoint. An IPv6 address is given without brackets.
    #[must_use]
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port, trouble: Mutex::new(HashMap::new()) }
    }

    /// Connects to the fastest address of the name, as in RFC 8305. `time` is the caller's limit. It decides how soon
    /// the next address is tried; the caller enforces the limit itself.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(&self, time: Duration) -> Result<TcpStream, ConnectError> {
        // An address needs no lookup, which would cost a file and a thread.
        let resolved = match self.host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::from((address, self.port))],
            Err(_) => match lookup_host((self.host.as_str(), self.port)).await {
                Ok(addresses) => addresses.collect(),
                Err(error) => return Err(ConnectError::Lookup(out_of_files().unwrap_or(error))),
            },
        };
        self.connect_to(&resolved, time).await
    }

    async fn connect_to(&self, resolved: &[SocketAddr], time: Duration) -> Result<TcpStream, ConnectError> {
        if resolved.is_empty() {
            return Err(ConnectError::NoAddress);
        }
        let addresses = {
            let now = Instant::now();
            let mut trouble = lock(&self.trouble);
            trouble.retain(|_, since| now.duration_since(*since) < TROUBLE);
            order(resolved, |address| trouble.contains_key(&address))
        };
        let won = race(&addresses, delay(time, addresses.len()), TcpStream::connect).await;
        let won = won.map_err(ConnectError::Refused)?;
        {
            let now = Instant::now();
            let mut trouble = lock(&self.trouble);
            trouble.remove(&won.address);
            trouble.extend(won.passed.into_iter().map(|address| (address, now)));
        }
        won.stream.set_nodelay(true).map_err(ConnectError::Setup)?;
        Ok(won.stream)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket};
    use tokio::time::timeout;

    /// An address that drops packets: a listener whose backlog is full. It drops them until this value is dropped.
    struct Dead {
        address: SocketAddr,
        _listener: TcpListener,
        _pending: Vec<TcpStream>,
    }

    async fn dead() -> Dead {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut pending = Vec::new();
        loop {
            match timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
                Ok(connected) => pending.push(connected.unwrap()),
                Err(_) => return Dead { address, _listener: listener, _pending: pending },
            }
        }
    }

    #[tokio::test]
    async fn the_second_address_serves_when_the_first_swallows_packets() {
        let dead = dead().await;
        let serving = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let served = serving.local_addr().unwrap();
        let endpoint = Endpoint::new("unused", 0);
        let addresses = [dead.address, served];
        let connect = || endpoint.connect_to(&addresses, Duration::from_secs(60));
        // The kernel alone would try the first address for minutes.
        let stream = timeout(Duration::from_secs(30), connect()).await.unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), served);
        // The next connection tries the dead address last, so it does not wait for it.
        assert!(endpoint.trouble.lock().unwrap().contains_key(&dead.address));
        let stream = timeout(Duration::from_secs(30), connect()).await.unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), served);
    }

    #[tokio::test]
    async fn all_reasons_are_told() {
        let closed = |address: [u8; 4]| {
            let listener = std::net::TcpListener::bind((IpAddr::from(address), 0)).unwrap();
            listener.local_addr().unwrap()
        };
        let (one, two) = (closed([127, 0, 0, 1]), closed([127, 0, 0, 2]));
        let endpoint = Endpoint::new("unused", 0);
        let error = endpoint.connect_to(&[one, two], Duration::from_secs(10)).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("127.0.0.1: ") && text.contains("; 127.0.0.2: ") && text.contains("refused"), "{text}");
        let error = Endpoint::new("127.0.0.1", one.port()).connect(Duration::from_secs(10)).await.unwrap_err();
        assert!(error.to_string().starts_with("Connection refused"), "{error}");
        assert_eq!(error.lack(), None);
    }

    #[test]
    fn what_this_side_lacks_is_not_the_servers_fault() {
        let os = |errno: Errno| io::Error::from(errno);
        let at = SocketAddr::from(([192, 0, 2, 1], 80));
        let refused = |all: Vec<Errno>| ConnectError::Refused(all.into_iter().map(|e| (at, os(e))).collect());
        assert_eq!(refused(vec![Errno::MFILE]).lack(), Some(Lack::Files));
        assert_eq!(refused(vec![Errno::CONNREFUSED, Errno::NFILE]).lack(), Some(Lack::Files));
        assert_eq!(refused(vec![Errno::ADDRNOTAVAIL]).lack(), Some(Lack::Ports));
        assert_eq!(refused(vec![Errno::NOBUFS]).lack(), Some(Lack::Ports));
        assert_eq!(refused(vec![Errno::ADDRNOTAVAIL, Errno::CONNREFUSED]).lack(), None, "no IPv6, and nothing listens");
        assert_eq!(refused(vec![Errno::TIMEDOUT]).lack(), None);
        assert_eq!(ConnectError::Lookup(os(Errno::MFILE)).lack(), Some(Lack::Files));
        assert_eq!(ConnectError::NoAddress.lack(), None);
    }
}
