//! Random bytes from the operating system.

use std::sync::OnceLock;

use ring::error::Unspecified;
use ring::rand::{SecureRandom, SystemRandom};

/// The random source of the operating system.
pub(crate) fn source() -> &'static SystemRandom {
    static SOURCE: OnceLock<SystemRandom> = OnceLock::new();
    SOURCE.get_or_init(SystemRandom::new)
}

/// Returns `N` random bytes.
pub(crate) fn octets<const N: usize>() -> Result<[u8; N], Unspecified> {
    let mut out = [0; N];
    source().fill(&mut out)?;
    Ok(out)
}
