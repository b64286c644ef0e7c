//! An operation on its way to a token. It is encoded once and may be sent to several members.

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

/// Checks a result without the token. A signature is verified with the public key; a decrypted key is checked with its own
/// signature over the data that it came with. The check runs on a runtime thread, so it must be quick.
pub type Check = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Maximum length in bytes of a ciphertext sent to a token: that of a key of 16384 bits.
const LONGEST_CIPHERTEXT: usize = 2048;

/// A private key, and a way to use it: what an operation needs of a token.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Need {
    pub(crate) key: KeyRef,
    scheme: Scheme,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Scheme {
    Decrypt(Oaep),
    Sign(SignScheme),
}

/// A request to a worker. It has no `Debug`, like its result: neither may reach a log.
pub(crate) struct Job {
    pub(crate) operation: Operation,
    /// `None` if the operation uses no private key.
    pub(crate) need: Option<Need>,
    check: Option<Check>,
    /// The encoded request. It may contain a PIN or a private key.
    pub(crate) request: Zeroizing<Vec<u8>>,
}

impl Job {
    pub(crate) fn new(request: &Request<'_>) -> Result<Self, HsmError> {
        let bytes = encode(request)?;
        // A truncated frame would be counted as a fault of the worker.
        if bytes.len() > MAX_REQUEST {
            return Err(HsmError::new(Function::Other, RvError::DataLenRange));
        }
        Ok(Job { operation: request.operation(), need: None, check: None, request: bytes })
    }

    pub(crate) fn decrypt(key: &KeyRef, oaep: Oaep, ciphertext: &[u8], check: Option<Check>) -> Result<Self, HsmError> {
        if ciphertext.len() > LONGEST_CIPHERTEXT {
            return Err(HsmError::new(Function::Decrypt, RvError::EncryptedDataLenRange));
        }
        let request = Request::Decrypt { id: &key.id.0, public: key.public, oaep, ciphertext };
        Ok(Job { need: Some(Need { key: key.clone(), scheme: Scheme::Decrypt(oaep) }), check, ..Job::new(&request)? })
    }

    pub(crate) fn sign(
        key: &KeyRef,
        scheme: SignScheme,
        digest: &[u8],
        check: Option<Check>,
    ) -> Result<Self, HsmError> {
        let request = Request::Sign { id: &key.id.0, public: key.public, scheme, digest };
        Ok(Job { need: Some(Need { key: key.clone(), scheme: Scheme::Sign(scheme) }), check, ..Job::new(&request)? })
    }

    /// The private key that the operation uses.
    pub(crate) fn key(&self) -> Option<&KeyRef> {
        self.need.as_ref().map(|need| &need.key)
    }

    /// Returns true if the operation's own check accepts these bytes as its result.
    pub(crate) fn accepts(&self, bytes: &[u8]) -> bool {
        self.check.as_ref().is_none_or(|check| check(bytes))
    }
}

/// An operation whose right result is known. When a result is wrong, a known-answer test on the same token decides between
/// member and caller. A member that was down serves again once it passes the tests.
#[derive(Clone)]
pub struct KnownAnswerTest(pub(crate) Arc<Job>);

impl KnownAnswerTest {
    /// Tests a decryption: a ciphertext and its plaintext.
    ///
    /// # Errors
    /// Returns an error if the ciphertext is too long for any key.
    pub fn decrypt(
        key: &KeyRef,
        oaep: Oaep,
        ciphertext: &[u8],
        plaintext: Zeroizing<Vec<u8>>,
    ) -> Result<Self, HsmError> {
        let check: Check = Arc::new(move |found| found == plaintext.as_slice());
        Ok(KnownAnswerTest(Arc::new(Job::decrypt(key, oaep, ciphertext, Some(check))?)))
    }

    /// Tests a signature: a digest, and a check that accepts only right signatures of it.
    ///
    /// # Errors
    /// Returns an error if the digest is too long.
    pub fn sign(key: &KeyRef, scheme: SignScheme, digest: &[u8], check: Check) -> Result<Self, HsmError> {
        Ok(KnownAnswerTest(Arc::new(Job::sign(key, scheme, digest, Some(check))?)))
    }
}

impl fmt::Debug for KnownAnswerTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownAnswerTest")
            .field("operation", &self.0.operation)
            .field("need", &self.0.need)
            .finish_non_exhaustive()
    }
}

/// Known-answer tests that decide who is at fault for a result of a job.
#[derive(Clone)]
pub(crate) struct Exam {
    /// Test with the job's key. `None` if it is already known that the key does not work.
    pub(crate) key: Option<Arc<Job>>,
    /// Test of the operation that every member must pass. `None` if that is the test with the job's key.
    pub(crate) token: Option<Arc<Job>>,
}

impl Exam {
    /// Returns the exam for a result that may be due to the input, the key or the token; `None` if there is no test of the
    /// operation.
    pub(crate) fn of(known: &[KnownAnswerTest], job: &Job) -> Option<Exam> {
        let (key, token) = (known_for(known, job)?, first(known, job.operation));
        let token = token.filter(|token| !Arc::ptr_eq(token, key));
        Some(Exam { key: Some(Arc::clone(key)), token: token.cloned() })
    }

    /// Returns the exam for a wrong result that no input can cause.
    pub(crate) fn of_wrong_result(known: &[KnownAnswerTest], job: &Job) -> Exam {
        Exam { key: None, token: first(known, job.operation).filter(|test| test.key() != job.key()).cloned() }
    }

    /// Returns true if both are made of the same tests.
    pub(crate) fn is(&self, other: &Exam) -> bool {
        let same = |one: &Option<Arc<Job>>, other: &Option<Arc<Job>>| match (one, other) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        same(&self.key, &other.key) && same(&self.token, &other.token)
    }
}

/// Returns the known-answer test for an operation like `job`: with the same key in the same way if there is one, else with
/// the same key, else the first one.
fn known_for<'a>(known: &'a [KnownAnswerTest], job: &Job) -> Option<&'a Arc<Job>> {
    let alike = || known.iter().map(|known| &known.0).filter(|known| known.operation == job.operation);
    let of_need = alike().find(|known| known.need == job.need);
    of_need.or_else(|| alike().find(|known| known.key() == job.key())).or_else(|| alike().next())
}

/// Returns the tests that every member must pass: the first decryption and the first signature.
pub(crate) fn must_pass(known: &[KnownAnswerTest]) -> impl Iterator<Item = &Arc<Job>> {
    [Operation::Decrypt, Operation::Sign].into_iter().filter_map(|operation| first(known, operation))
}

fn first(known: &[KnownAnswerTest], operation: Operation) -> Option<&Arc<Job>> {
    known.iter().map(|known| &known.0).find(|known| known.operation == operation)
}
