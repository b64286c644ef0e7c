//! An operation on its way to a token: encoded once, sent to as many members as it takes.

use std::fmt;
use std::sync::Arc;

use cryptoki::error::RvError;
use zeroize::Zeroizing;

use crate::code::Function;
use crate::error::HsmError;
use crate::identity::KeyRef;
use crate::keys::{Oaep, SignScheme};
use crate::link::{MAX_REQUEST, Request, encode};
use crate::operation::Operation;

/// Says whether a result is right, without the token: a key's own signature over what it came with, a signature verified
/// with the public key. Called on a runtime thread: it has to be quick.
pub type Check = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Bytes of the longest ciphertext that any token is asked about: that of a key of 16384 bits.
const LONGEST_CIPHERTEXT: usize = 2048;

/// What a worker is asked to do. Not `Debug`, like its result: neither belongs into a log.
pub(crate) struct Job {
    pub(crate) operation: Operation,
    /// The private key that does the work.
    pub(crate) key: Option<KeyRef>,
    check: Option<Check>,
    /// The request, encoded. May hold a PIN or a private key.
    pub(crate) request: Zeroizing<Vec<u8>>,
}

impl Job {
    pub(crate) fn new(request: &Request<'_>) -> Result<Self, HsmError> {
        let bytes = encode(request)?;
        // A frame that is cut would be held against the worker.
        if bytes.len() > MAX_REQUEST {
            return Err(HsmError::new(Function::Other, RvError::DataLenRange));
        }
        Ok(Job { operation: request.operation(), key: None, check: None, request: bytes })
    }

    pub(crate) fn decrypt(key: &KeyRef, oaep: Oaep, ciphertext: &[u8], check: Option<Check>) -> Result<Self, HsmError> {
        if ciphertext.len() > LONGEST_CIPHERTEXT {
            return Err(HsmError::new(Function::Decrypt, RvError::EncryptedDataLenRange));
        }
        let request = Request::Decrypt { id: &key.id.0, public: key.public, oaep, ciphertext };
        Ok(Job { key: Some(key.clone()), check, ..Job::new(&request)? })
    }

    pub(crate) fn sign(
        key: &KeyRef,
        scheme: SignScheme,
        digest: &[u8],
        check: Option<Check>,
    ) -> Result<Self, HsmError> {
        let request = Request::Sign { id: &key.id.0, public: key.public, scheme, digest };
        Ok(Job { key: Some(key.clone()), check, ..Job::new(&request)? })
    }

    /// Whether these bytes can be the result, as far as the operation's own check says.
    pub(crate) fn accepts(&self, bytes: &[u8]) -> bool {
        self.check.as_ref().is_none_or(|check| check(bytes))
    }
}

/// An operation whose right result is known. When an answer is wrong, a known-answer test on the same token decides whether the
/// member or the caller is to blame; and a member that was down serves again when it passes them.
#[derive(Clone)]
pub struct KnownAnswerTest(pub(crate) Arc<Job>);

impl KnownAnswerTest {
    /// A ciphertext and its plaintext.
    ///
    /// # Errors
    /// When the ciphertext is too long for any key.
    pub fn decrypt(
        key: &KeyRef,
        oaep: Oaep,
        ciphertext: &[u8],
        plaintext: Zeroizing<Vec<u8>>,
    ) -> Result<Self, HsmError> {
        let check: Check = Arc::new(move |found| found == plaintext.as_slice());
        Ok(KnownAnswerTest(Arc::new(Job::decrypt(key, oaep, ciphertext, Some(check))?)))
    }

    /// A digest, and how to tell a right signature of it.
    ///
    /// # Errors
    /// When the digest is too long.
    pub fn sign(key: &KeyRef, scheme: SignScheme, digest: &[u8], check: Check) -> Result<Self, HsmError> {
        Ok(KnownAnswerTest(Arc::new(Job::sign(key, scheme, digest, Some(check))?)))
    }
}

impl fmt::Debug for KnownAnswerTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownAnswerTest")
            .field("operation", &self.0.operation)
            .field("key", &self.0.key)
            .finish_non_exhaustive()
    }
}

/// The known-answer test for an operation like `job`: with its key if there is one, or else with the first key.
pub(crate) fn known_for<'a>(known: &'a [KnownAnswerTest], job: &Job) -> Option<&'a Job> {
    let alike = || known.iter().map(|known| &*known.0).filter(|known| known.operation == job.operation);
    alike().find(|known| known.key == job.key).or_else(|| alike().next())
}

/// The known-answer tests that every member has to pass: the first decryption and the first signature.
pub(crate) fn must_pass(known: &[KnownAnswerTest]) -> impl Iterator<Item = &Job> {
    [Operation::Decrypt, Operation::Sign]
        .into_iter()
        .filter_map(|operation| known.iter().map(|known| &*known.0).find(|known| known.operation == operation))
}
