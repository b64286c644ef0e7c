//! Copies of the trail's lines for a syslog daemon or the journal, beside the file. The file is the trail: a copy that cannot be
//! sent is dropped and counted in the log, and keeps no release waiting.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use claviger_hsm::standstill;
use claviger_process::throttle::Throttle;

/// Facility `authpriv` (10) and severity `notice` (5) of syslog(3), and the name of the sender.
const HEADER: &[u8] = b"<85>claviger-audit: ";

/// A socket to which each line goes as one message.
#[derive(Debug)]
pub(super) struct Sink {
    path: PathBuf,
    socket: Option<UnixDatagram>,
    lost: u64,
    told: Throttle,
}

impl Sink {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, socket: None, lost: 0, told: Throttle::new() }
    }

    /// Sends lines that are in the file. Never waits for the reader.
    pub(super) fn send(&mut self, lines: &[u8]) {
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let message = [HEADER, line].concat();
            // A reader that was restarted has another socket at the same path.
            let sent = self.try_send(&message).or_else(|_| {
                self.socket = None;
                self.try_send(&message)
            });
            if let Err(error) = sent {
                self.lost += 1;
                if self.told.due(standstill::now()).is_some() {
                    let (socket, lost) = (self.path.display(), self.lost);
                    tracing::warn!(%socket, lost, %error, "lines of the audit trail were not copied to syslog; the file has them");
                }
            }
        }
    }

    fn try_send(&mut self, message: &[u8]) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                let socket = UnixDatagram::unbound()?;
                socket.set_nonblocking(true)?;
                socket.connect(&self.path)?;
                self.socket.insert(socket)
            }
        };
        socket.send(message).map(drop)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_message_and_a_reader_may_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut sink = Sink::new(path.clone());
        sink.send(b"{\"n\":1}\n");
        assert_eq!(sink.lost, 1, "nobody reads yet");
        let receive = |reader: &UnixDatagram| {
            let mut message = [0; 256];
            let length = reader.recv(&mut message).unwrap();
            String::from_utf8(message[..length].to_vec()).unwrap()
        };
        for _ in 0..2 {
            let reader = UnixDatagram::bind(&path).unwrap();
            sink.send(b"\n{\"n\":2}\n{\"n\":3}\n");
            assert_eq!(receive(&reader), "<85>claviger-audit: {\"n\":2}");
            assert_eq!(receive(&reader), "<85>claviger-audit: {\"n\":3}");
            drop(reader);
            std::fs::remove_file(&path).unwrap();
        }
        assert_eq!(sink.lost, 1);
    }
}
