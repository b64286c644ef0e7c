//! Connections on which one request was answered and which are idle since then.

use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned};

use crate::attackers::{h2_get, hello};
use crate::raw::{get, read_answer};
use crate::wait::PATIENCE;

/// The protocol of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/1.1 over TLS.
    Https1,
    /// HTTP/2.
    Http2,
    /// HTTP/2 over TLS.
    Https2,
}

impl Speaks {
    /// All protocols; those with TLS last.
    pub const ALL: [Self; 4] = [Self::Http1, Self::Http2, Self::Https1, Self::Https2];

    /// Returns true for a protocol over TLS.
    #[must_use]
    pub fn is_encrypted(self) -> bool {
        matches!(self, Self::Https1 | Self::Https2)
    }

    fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Https2)
    }
}

impl fmt::Display for Speaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http1 => "HTTP/1.1",
            Self::Https1 => "HTTP/1.1 over TLS",
            Self::Http2 => "HTTP/2",
            Self::Https2 => "HTTP/2 over TLS",
        })
    }
}

/// Opens idle connections. Only the socket of each connection is kept, so that nearly all memory is the server's.
pub struct Opener {
    address: SocketAddr,
    speaks: Speaks,
    tls: Arc<ClientConfig>,
}

impl Opener {
    /// Opens connections to `address`. The server's certificate is not checked.
    ///
    /// # Panics
    /// Never: the TLS versions are the default ones.
    #[must_use]
    pub fn new(address: SocketAddr, speaks: Speaks) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider));
        let config = config.with_safe_default_protocol_versions().unwrap().dangerous();
        let mut config = config.with_custom_certificate_verifier(Arc::new(Anybody(provider))).with_no_client_auth();
        config.alpn_protocols = vec![if speaks.is_http2() { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        Self { address, speaks, tls: Arc::new(config) }
    }

    /// Opens one connection, and requests `path` on it.
    ///
    /// # Panics
    /// If there is no answer.
    #[must_use]
    pub fn open(&self, path: &str) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        if self.speaks.is_encrypted() {
            let name = ServerName::IpAddress(self.address.ip().into());
            let mut stream = StreamOwned::new(ClientConnection::new(Arc::clone(&self.tls), name).unwrap(), stream);
            self.exchange(&mut stream, path);
            stream.sock
        } else {
            let mut stream = stream;
            self.exchange(&mut stream, path);
            stream
        }
    }

    fn exchange(&self, stream: &mut (impl Read + Write), path: &str) {
        if self.speaks.is_http2() {
            stream.write_all(&[hello(), h2_get(1, path)].concat()).unwrap();
            read_stream_to_its_end(stream);
        } else {
            stream.write_all(&get(path)).unwrap();
            let answer = read_answer(stream, &mut Vec::new()).unwrap();
            assert!(answer.status == 200 && !answer.closes(), "{} {}", answer.status, answer.text());
        }
    }
}

/// Reads frames up to the end of stream 1.
fn read_stream_to_its_end(stream: &mut impl Read) {
    let mut head = [0; 9];
    loop {
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        stream.read_exact(&mut vec![0; length]).unwrap();
        let (ends, number) = (head[4] & 1 > 0, u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
        if number == 1 && ends {
            return;
        }
    }
}

/// Accepts any certificate, because these tests do not test certificates.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
