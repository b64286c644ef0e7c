//! What a member is asked to do, and operations whose right result is known.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::error::HsmError;
use crate::identity::KeyRef;
use crate::key_table::TokenKey;
use crate::keys::{NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme};

/// Says whether a result is right, without the token: a key's own signature over what it came with, a signature verified
/// with the public key. Called on a session's thread: it has to be quick.
pub type Check = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// What a session is asked to do. Not `Debug`, like its answer: neither belongs into a log.
pub(crate) enum Request {
    Decrypt {
        key: KeyRef,
        oaep: Oaep,
        ciphertext: Vec<u8>,
        check: Option<Check>,
    },
    Sign {
        key: KeyRef,
        scheme: SignScheme,
        digest: Vec<u8>,
        check: Option<Check>,
    },
    Random(usize),
    Probe,
    /// The private keys: what the session knows, or after a `search` of the token.
    Keys {
        search: bool,
    },
    Generate(NewKey),
    Import(NewKey, RsaPrivateParts),
}

impl Request {
    pub(crate) fn op(&self) -> &'static str {
        match self {
            Request::Decrypt { .. } => "decrypt",
            Request::Sign { .. } => "sign",
            Request::Random(_) => "random",
            Request::Probe => "probe",
            Request::Keys { .. } => "keys",
            Request::Generate(_) => "generate",
            Request::Import(..) => "import",
        }
    }

    /// The private key that does the work.
    pub(crate) fn key(&self) -> Option<&KeyRef> {
        match self {
            Request::Decrypt { key, .. } | Request::Sign { key, .. } => Some(key),
            _ => None,
        }
    }

    /// Whether `octets` can be its result, as far as its own check says.
    pub(crate) fn accepts(&self, octets: &[u8]) -> bool {
        match self {
            Request::Decrypt { check: Some(check), .. } | Request::Sign { check: Some(check), .. } => check(octets),
            _ => true,
        }
    }

    /// Whether doing it twice does no harm.
    pub(crate) fn may_repeat(&self) -> bool {
        !matches!(self, Request::Generate(_) | Request::Import(..))
    }
}

/// What comes back.
pub(crate) enum Answer {
    Octets(Zeroizing<Vec<u8>>),
    Keys(Vec<TokenKey>),
    Public(RsaPublic),
    Done,
}

/// An operation whose right result is known. When an answer is wrong, one of these, done on the same session, decides
/// whether the member or the caller is to blame; and a member that was closed opens when it does them right.
#[derive(Clone)]
pub struct KnownGood(pub(crate) Arc<Request>);

impl KnownGood {
    /// A ciphertext and what is in it.
    #[must_use]
    pub fn decrypt(key: KeyRef, oaep: Oaep, ciphertext: Vec<u8>, plaintext: Zeroizing<Vec<u8>>) -> Self {
        let check: Check = Arc::new(move |found| found == plaintext.as_slice());
        KnownGood(Arc::new(Request::Decrypt { key, oaep, ciphertext, check: Some(check) }))
    }

    /// A digest, and how to tell a right signature of it.
    #[must_use]
    pub fn sign(key: KeyRef, scheme: SignScheme, digest: Vec<u8>, check: Check) -> Self {
        KnownGood(Arc::new(Request::Sign { key, scheme, digest, check: Some(check) }))
    }
}

impl fmt::Debug for KnownGood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownGood").field("op", &self.0.op()).field("key", &self.0.key()).finish_non_exhaustive()
    }
}

/// The known-good operations for an operation like `request`: with its key if there is one, or else with the first key.
pub(crate) fn known_for<'a>(known: &'a [KnownGood], request: &Request) -> Option<&'a Request> {
    let alike = || known.iter().map(|known| &*known.0).filter(|known| known.op() == request.op());
    alike().find(|known| known.key() == request.key()).or_else(|| alike().next())
}

/// The known-good operation of a kind that every member has to be able to do.
pub(crate) fn first_known<'a>(known: &'a [KnownGood], op: &str) -> Option<&'a Request> {
    known.iter().map(|known| &*known.0).find(|known| known.op() == op)
}

/// What became of a request at one member.
pub(crate) enum Outcome {
    /// A token was asked.
    Ran(Result<Answer, HsmError>),
    /// No token was asked, so asking another one costs nothing twice.
    NotRun(HsmError),
}
