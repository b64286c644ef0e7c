//! The messages on the agent's socket: one request and its reply, then the connection ends. Numbers are little-endian.
//!
//! ```text
//! request   u32 milliseconds that the client waits, u32 length, the protector
//! reply     u8 0: granted    32 bytes ingress key, 32 bytes egress key, u32 offline unwraps, u32 length, the egress protector
//!           u8 1: refused    u32 length, a sentence in UTF-8
//!           u8 2: later      the same; the same request may succeed later
//! ```

use std::io;
use std::time::Duration;

use claviger_protocol::payload::Payload;
use claviger_protocol::protector::{MAX_PROTECTOR, TRANSPORT_KEY_LEN, TransportKey};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::host::Unwrapped;

/// Longest text of a refusal, in bytes.
const MAX_TEXT: usize = 4096;

const GRANTED: u8 = 0;
const REFUSED: u8 = 1;
const LATER: u8 = 2;

/// The time limit of a step inside another one with this limit. It ends a little earlier, so that its reason still arrives.
#[must_use]
pub fn shorter(limit: Duration) -> Duration {
    limit - Duration::from_secs(1).min(limit / 4)
}

/// Why an agent refuses a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The problem and its remedy.
    pub text: String,
    /// Whether the same request may succeed later.
    pub temporary: bool,
}

/// The reply of an agent.
pub type Reply = Result<Unwrapped, Refused>;

/// A request to an agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Time that the client waits for the reply.
    pub patience: Duration,
    /// The protector to release, not validated.
    pub protector: Vec<u8>,
}

/// Sends a request.
///
/// # Errors
/// The error of the socket.
pub async fn write_request(to: &mut (impl AsyncWrite + Unpin), patience: Duration, protector: &[u8]) -> io::Result<()> {
    to.write_u32_le(u32::try_from(patience.as_millis()).unwrap_or(u32::MAX)).await?;
    to.write_u32_le(protector.len() as u32).await?;
    to.write_all(protector).await
}

/// Reads a request.
///
/// # Errors
/// The error of the socket; [`io::ErrorKind::InvalidData`] if the protector is too long.
pub async fn read_request(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Request> {
    let patience = Duration::from_millis(from.read_u32_le().await?.into());
    Ok(Request { patience, protector: read_bytes(from, MAX_PROTECTOR).await? })
}

/// Sends a reply.
///
/// # Errors
/// The error of the socket.
pub async fn write_reply(to: &mut (impl AsyncWrite + Unpin), reply: &Reply) -> io::Result<()> {
    // Written in one piece, from memory that is wiped.
    let mut out = Zeroizing::new(Vec::with_capacity(2 * TRANSPORT_KEY_LEN + 16 + MAX_TEXT.max(MAX_PROTECTOR)));
    match reply {
        Ok(unwrapped) => {
            out.push(GRANTED);
            out.extend_from_slice(&unwrapped.keys.ingress[..]);
            out.extend_from_slice(&unwrapped.keys.egress[..]);
            out.extend_from_slice(&unwrapped.keys.max_offline_unwraps.to_le_bytes());
            out.extend_from_slice(&(unwrapped.egress_protector.len() as u32).to_le_bytes());
            out.extend_from_slice(&unwrapped.egress_protector);
        }
        Err(refused) => {
            let end = refused.text.floor_char_boundary(MAX_TEXT);
            out.push(if refused.temporary { LATER } else { REFUSED });
            out.extend_from_slice(&(end as u32).to_le_bytes());
            out.extend_from_slice(&refused.text.as_bytes()[..end]);
        }
    }
    to.write_all(&out).await?;
    to.flush().await
}

/// Reads a reply.
///
/// # Errors
/// The error of the socket; [`io::ErrorKind::InvalidData`] if the reply is invalid.
pub(crate) async fn read_reply(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Reply> {
    let kind = from.read_u8().await?;
    match kind {
        GRANTED => {
            let (ingress, egress) = (read_key(from).await?, read_key(from).await?);
            let max_offline_unwraps = from.read_u32_le().await?;
            let egress_protector = read_bytes(from, MAX_PROTECTOR).await?;
            Ok(Ok(Unwrapped { keys: Payload { ingress, egress, max_offline_unwraps }, egress_protector }))
        }
        REFUSED | LATER => {
            let text = String::from_utf8(read_bytes(from, MAX_TEXT).await?);
            let text = text.map_err(|_| io::ErrorKind::InvalidData)?;
            Ok(Err(Refused { text, temporary: kind == LATER }))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn read_key(from: &mut (impl AsyncRead + Unpin)) -> io::Result<TransportKey> {
    let mut key = TransportKey::default();
    from.read_exact(&mut key[..]).await?;
    Ok(key)
}

async fn read_bytes(from: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let length = from.read_u32_le().await? as usize;
    if !(1..=limit).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use claviger_protocol::protector::transport_key;

    async fn carried(reply: Reply) -> Reply {
        let mut bytes = Vec::new();
        write_reply(&mut bytes, &reply).await.unwrap();
        for length in 0..bytes.len().min(100) {
            assert!(read_reply(&mut &bytes[..length]).await.is_err(), "{length}");
        }
        read_reply(&mut &bytes[..]).await.unwrap()
    }

    #[tokio::test]
    async fn requests_and_replies_arrive_as_they_were_sent() {
        let mut bytes = Vec::new();
        let patience = Duration::from_millis(2500);
        write_request(&mut bytes, patience, b"<Protector/>").await.unwrap();
        let request = Request { patience, protector: b"<Protector/>".to_vec() };
        assert_eq!(read_request(&mut &bytes[..]).await.unwrap(), request);
        let key = |byte| transport_key(&[byte; 32]).unwrap();
        let keys = Payload { ingress: key(1), egress: key(2), max_offline_unwraps: 3 };
        let got = carried(Ok(Unwrapped { keys, egress_protector: b"<Next/>".to_vec() })).await.ok().unwrap();
        assert_eq!((*got.keys.ingress, *got.keys.egress, got.keys.max_offline_unwraps), ([1; 32], [2; 32], 3));
        assert_eq!(got.egress_protector, b"<Next/>");
        for temporary in [true, false] {
            let refused = Refused { text: "no".to_owned(), temporary };
            assert_eq!(carried(Err(refused.clone())).await.err().unwrap(), refused);
        }
        let long = Refused { text: "ä".repeat(MAX_TEXT), temporary: true };
        assert_eq!(carried(Err(long)).await.err().unwrap().text.len(), MAX_TEXT);
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused_before_it_is_read() {
        let huge = [[0; 4], (MAX_PROTECTOR as u32 + 1).to_le_bytes()].concat();
        assert_eq!(read_request(&mut &huge[..]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read_reply(&mut &[9][..]).await.is_err());
    }
}
