//! HTTP/1.1 on a blocking socket, for requests that no well-behaved client sends.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use tokio::net::TcpSocket;

use crate::wait::{PATIENCE, block};

/// An HTTP answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header fields in the order received, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// Returns the first header field of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Returns true if the server announces that it closes the connection.
    #[must_use]
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    /// Returns the body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Reason why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Silence {
    /// The connection ended before the first byte.
    Closed,
    /// The connection ended within an answer, or the bytes received are not an answer. Contains these bytes.
    Torn(String),
    /// Nothing arrived within the time limit.
    Nothing,
}

/// One TCP connection.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    /// Connects to an address.
    ///
    /// # Errors
    /// Returns the operating system's error.
    pub fn open(address: SocketAddr) -> std::io::Result<Self> {
        Self::over(TcpStream::connect(address)?)
    }

    /// Connects from an address of this machine; all of 127.0.0.0/8 belong to it.
    ///
    /// # Errors
    /// Returns the operating system's error.
    pub fn open_from(source: Ipv4Addr, address: SocketAddr) -> std::io::Result<Self> {
        let stream = block(async {
            let socket = TcpSocket::new_v4()?;
            socket.bind((source, 0).into())?;
            socket.connect(address).await?.into_std()
        })?;
        stream.set_nonblocking(false)?;
        Self::over(stream)
    }

    fn over(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, read: Vec::new() })
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// Returns the operating system's error.
    pub fn send(&mut self, octets: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(octets)
    }

    /// Reads one answer, which must have a Content-Length.
    ///
    /// # Errors
    /// See [`Silence`].
    pub fn answer(&mut self) -> Result<Answer, Silence> {
        read_answer(&mut self.stream, &mut self.read)
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// See [`Silence`].
    pub fn exchange(&mut self, request: &[u8]) -> Result<Answer, Silence> {
        // On a closed connection the send may fail, but an earlier answer can still be read.
        let _ = self.send(request);
        self.answer()
    }
}

/// Reads one answer from a stream. `read` holds the bytes that were read and do not belong to an answer yet.
///
/// # Errors
/// See [`Silence`].
pub(crate) fn read_answer(stream: &mut impl Read, read: &mut Vec<u8>) -> Result<Answer, Silence> {
    loop {
        if let Some((answer, used)) = parse(read).map_err(Silence::Torn)? {
            read.drain(..used);
            return Ok(answer);
        }
        let mut bytes = [0; 16 * 1024];
        match stream.read(&mut bytes) {
            Ok(0) => return Err(end(read, "the end")),
            Ok(count) => read.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) && read.is_empty() => {
                return Err(Silence::Nothing);
            }
            Err(error) => return Err(end(read, &error.to_string())),
        }
    }
}

fn end(read: &[u8], why: &str) -> Silence {
    if read.is_empty() {
        return Silence::Closed;
    }
    Silence::Torn(format!("{why} after {}", String::from_utf8_lossy(read)))
}

/// Parses an answer; `None` while it is incomplete.
fn parse(octets: &[u8]) -> Result<Option<(Answer, usize)>, String> {
    let Some(end) = octets.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&octets[..end]).map_err(|e| e.to_string())?;
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| format!("no status line: {first}"))?;
    let field = |line: &str| line.split_once(':').map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()));
    let headers = lines.map(field).collect::<Option<Vec<_>>>().ok_or_else(|| format!("no fields: {head}"))?;
    let length = headers.iter().find(|(name, _)| name == "content-length").and_then(|(_, value)| value.parse().ok());
    let length: usize = length.ok_or_else(|| format!("no length: {head}"))?;
    let begin = end + 4;
    let Some(body) = octets.get(begin..begin + length) else { return Ok(None) };
    Ok(Some((Answer { status, headers, body: body.to_vec() }, begin + length)))
}

/// Returns the header of a request with a body of `length` bytes.
#[must_use]
pub fn post_head(path: &str, media_type: &str, length: usize) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n")
        .into_bytes()
}

/// Returns a request with a body.
#[must_use]
pub fn post(path: &str, media_type: &str, body: &[u8]) -> Vec<u8> {
    [post_head(path, media_type, body.len()), body.to_vec()].concat()
}

/// Returns a request without a body.
#[must_use]
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").into_bytes()
}
