//! Reads lines from the administrators' socket, up to a maximum length.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};
use zeroize::Zeroizing;

/// Input from the client.
pub(super) enum Line {
    /// A line without its line break, which the last line may lack. It may contain a private key.
    Whole(Zeroizing<Vec<u8>>),
    /// More bytes than allowed.
    TooLong,
    /// End of the input.
    End,
}

/// Reads a line of less than `limit` bytes.
pub(super) async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), limit: usize) -> io::Result<Line> {
    let mut line = Zeroizing::new(Vec::new());
    loop {
        let octets = reader.fill_buf().await?;
        if octets.is_empty() {
            return Ok(if line.is_empty() { Line::End } else { Line::Whole(line) });
        }
        let end = octets.iter().position(|octet| *octet == b'\n');
        let taken = end.unwrap_or(octets.len());
        if line.len() + taken >= limit {
            return Ok(Line::TooLong);
        }
        if line.capacity() - line.len() < taken {
            // Copy explicitly: a vector that grows by itself leaves a copy behind.
            let mut wider = Zeroizing::new(Vec::with_capacity(2 * (line.len() + taken)));
            wider.extend_from_slice(&line);
            line = wider;
        }
        line.extend_from_slice(&octets[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Line::Whole(line));
        }
    }
}
