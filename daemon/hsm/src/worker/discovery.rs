//! Discovery of a member's token among the tokens in the module's slots.
//!
//! A label is not unique: a partition may be created twice, a token may be cloned, a card may be left in a second reader.
//! The daemon cannot know which of several tokens is meant, and a PIN tried on the wrong token brings that token nearer to
//! its lock. So no token is chosen.

use std::path::Path;

use crate::config::TokenRef;
use crate::error::{Failure, HsmError};
use crate::worker::ffi::TokenFacts;

/// Returns the only initialised token that matches.
///
/// # Errors
/// [`HsmError::NoSuchToken`] if none matches; [`HsmError::SeveralTokens`] with their serial numbers.
pub(crate) fn choose<S: Copy>(
    wanted: &TokenRef,
    seen: &[(S, TokenFacts)],
    module: &Path,
) -> Result<(S, TokenFacts), Failure> {
    let meant = |facts: &TokenFacts| match wanted {
        TokenRef::Label(label) => facts.label == *label,
        TokenRef::Serial(serial) => facts.serial == *serial,
    };
    let found: Vec<_> = seen.iter().filter(|(_, facts)| facts.initialized && meant(facts)).collect();
    match found.as_slice() {
        [(slot, facts)] => Ok((*slot, facts.clone())),
        [] => Err(Failure::new(HsmError::NoSuchToken, format!("{wanted} in {}", module.display()))),
        several => {
            let serials: Vec<_> = several.iter().map(|(_, facts)| facts.serial.as_str()).collect();
            Err(Failure::new(
                HsmError::SeveralTokens,
                format!("{wanted} in {}, serials {}", module.display(), serials.join(", ")),
            ))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pin_tries::PinTries;

    fn token(label: &str, serial: &str) -> TokenFacts {
        TokenFacts {
            label: label.to_owned(),
            serial: serial.to_owned(),
            initialized: true,
            user_pin_set: true,
            pin_tries: PinTries::Full,
        }
    }

    fn chosen(wanted: &TokenRef, seen: &[(u32, TokenFacts)]) -> Result<u32, String> {
        choose(wanted, seen, Path::new("/lib/x.so")).map(|(slot, _)| slot).map_err(|error| error.to_string())
    }

    #[test]
    fn one_token_is_found_by_label_or_serial() {
        let blank = TokenFacts { initialized: false, ..token("a", "9") };
        let seen = [(1, token("a", "1")), (2, token("b", "2")), (3, blank)];
        assert_eq!(
            chosen(&TokenRef::Label("a".to_owned()), &seen),
            Ok(1),
            "a blank token of that label does not count"
        );
        assert_eq!(chosen(&TokenRef::Serial("2".to_owned()), &seen), Ok(2));
        let error = chosen(&TokenRef::Label("c".to_owned()), &seen).unwrap_err();
        assert_eq!(error, "the token is not in any slot of the module: label \"c\" in /lib/x.so");
    }

    #[test]
    fn several_tokens_are_none() {
        let seen = [(1, token("a", "1")), (2, token("b", "2")), (3, token("a", "3"))];
        let error = chosen(&TokenRef::Label("a".to_owned()), &seen).unwrap_err();
        assert!(error.contains("several tokens of that label") && error.ends_with("serials 1, 3"), "{error}");
        assert_eq!(chosen(&TokenRef::Serial("3".to_owned()), &seen), Ok(3));
        let twice = [(1, token("a", "1")), (2, token("b", "1"))];
        let error = chosen(&TokenRef::Serial("1".to_owned()), &twice).unwrap_err();
        assert!(error.contains("several tokens"), "{error}");
    }
}
