//! Parser of control files.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptoki_sys::*;

use crate::deeds::Deed;
use crate::exports::NAMES;

/// Names that may be used instead of numbers.
const CODES: [(&str, CK_RV); 26] = [
    ("CKR_HOST_MEMORY", CKR_HOST_MEMORY),
    ("CKR_GENERAL_ERROR", CKR_GENERAL_ERROR),
    ("CKR_FUNCTION_FAILED", CKR_FUNCTION_FAILED),
    ("CKR_ARGUMENTS_BAD", CKR_ARGUMENTS_BAD),
    ("CKR_DEVICE_ERROR", CKR_DEVICE_ERROR),
    ("CKR_DEVICE_MEMORY", CKR_DEVICE_MEMORY),
    ("CKR_DEVICE_REMOVED", CKR_DEVICE_REMOVED),
    ("CKR_ENCRYPTED_DATA_INVALID", CKR_ENCRYPTED_DATA_INVALID),
    ("CKR_FUNCTION_CANCELED", CKR_FUNCTION_CANCELED),
    ("CKR_KEY_FUNCTION_NOT_PERMITTED", CKR_KEY_FUNCTION_NOT_PERMITTED),
    ("CKR_KEY_HANDLE_INVALID", CKR_KEY_HANDLE_INVALID),
    ("CKR_MECHANISM_INVALID", CKR_MECHANISM_INVALID),
    ("CKR_OBJECT_HANDLE_INVALID", CKR_OBJECT_HANDLE_INVALID),
    ("CKR_OPERATION_ACTIVE", CKR_OPERATION_ACTIVE),
    ("CKR_OPERATION_NOT_INITIALIZED", CKR_OPERATION_NOT_INITIALIZED),
    ("CKR_PIN_EXPIRED", CKR_PIN_EXPIRED),
    ("CKR_PIN_INCORRECT", CKR_PIN_INCORRECT),
    ("CKR_PIN_LOCKED", CKR_PIN_LOCKED),
    ("CKR_SESSION_CLOSED", CKR_SESSION_CLOSED),
    ("CKR_SESSION_COUNT", CKR_SESSION_COUNT),
    ("CKR_SESSION_HANDLE_INVALID", CKR_SESSION_HANDLE_INVALID),
    ("CKR_TOKEN_NOT_PRESENT", CKR_TOKEN_NOT_PRESENT),
    ("CKR_TOKEN_NOT_RECOGNIZED", CKR_TOKEN_NOT_RECOGNIZED),
    ("CKR_USER_ALREADY_LOGGED_IN", CKR_USER_ALREADY_LOGGED_IN),
    ("CKR_USER_NOT_LOGGED_IN", CKR_USER_NOT_LOGGED_IN),
    ("CKR_CRYPTOKI_NOT_INITIALIZED", CKR_CRYPTOKI_NOT_INITIALIZED),
];

/// Contents of one control file. The default is that of a missing file: no faults.
#[derive(Default, Debug)]
pub(crate) struct Faults {
    pub(crate) rules: Vec<Rule>,
    pub(crate) throttle: Option<Throttle>,
    pub(crate) stale: Vec<Stale>,
    pub(crate) absent: Option<Absent>,
    pub(crate) max_sessions: Option<u64>,
    pub(crate) advertise_sessions: Option<CK_ULONG>,
    /// Flags for the remaining tries of the user PIN in `C_GetTokenInfo`.
    pub(crate) pin_flags: CK_FLAGS,
    pub(crate) no_slots: bool,
    /// Return code of a dead module.
    pub(crate) dead: Option<CK_RV>,
}

/// A line about calls.
#[derive(Debug)]
pub(crate) struct Rule {
    /// `None` for all calls.
    calls: Option<Vec<&'static str>>,
    every: u64,
    times: u64,
    pub(crate) delay: Duration,
    pub(crate) hang: bool,
    pub(crate) deed: Option<Deed>,
    pub(crate) corrupt: bool,
    pub(crate) rv: Option<CK_RV>,
    met: AtomicU64,
    applied: AtomicU64,
}

/// Limit of concurrent calls of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Throttle {
    pub(crate) limit: u64,
    pub(crate) rv: CK_RV,
}

/// A token that is absent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absent {
    /// `None` for the code that fits the call.
    pub(crate) rv: Option<CK_RV>,
}

/// Items that become invalid when the file appears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stale {
    Sessions,
    OneSession,
    Login,
    Objects,
}

impl Rule {
    fn new(calls: Option<Vec<&'static str>>) -> Self {
        Self {
            calls,
            every: 1,
            times: u64::MAX,
            delay: Duration::ZERO,
            hang: false,
            deed: None,
            corrupt: false,
            rv: None,
            met: AtomicU64::new(0),
            applied: AtomicU64::new(0),
        }
    }

    /// Returns true if the line applies to this call, and counts the call. `has_result` tells if there is a result to
    /// corrupt.
    pub(crate) fn applies(&self, name: &str, has_result: bool) -> bool {
        let about = match &self.calls {
            Some(calls) => calls.contains(&name),
            None => !matches!(name, "C_Initialize" | "C_Finalize"),
        };
        if !about || (self.corrupt && !has_result) {
            return false;
        }
        let met = self.met.fetch_add(1, Ordering::Relaxed) + 1;
        met.is_multiple_of(self.every) && self.applied.fetch_add(1, Ordering::Relaxed) < self.times
    }
}

/// Checks the lines of a control file: the module's or a token's.
///
/// # Errors
/// Returns a sentence that contains the invalid line.
pub fn check(text: &str, of_module: bool) -> Result<(), String> {
    Faults::parse(text, of_module).map(drop)
}

impl Faults {
    pub(crate) fn parse(text: &str, of_module: bool) -> Result<Self, String> {
        let mut faults = Self::default();
        for line in text.lines() {
            faults.line(line, of_module).map_err(|error| format!("{error} in {line:?}"))?;
        }
        Ok(faults)
    }

    fn line(&mut self, line: &str, of_module: bool) -> Result<(), String> {
        let mut words = Words::split(line)?;
        let Some((subject, value)) = words.subject() else { return Ok(()) };
        let module_only = ["no_slots", "initialize", "dead"].contains(&subject);
        let token_only = !module_only && !["call", "throttle"].contains(&subject);
        if (of_module && token_only) || (!of_module && module_only) {
            return Err(format!("{subject:?} does not belong into this file"));
        }
        match (subject, value) {
            ("call", Some("*")) => self.rules.push(words.rule(None)?),
            ("call", Some(calls)) => {
                let names: Result<Vec<_>, _> = calls.split(',').map(name).collect();
                self.rules.push(words.rule(Some(names?))?);
            }
            ("initialize", None) => self.rules.push(words.rule(Some(vec!["C_Initialize"]))?),
            ("pin", Some(how)) => {
                let rv = match how {
                    "incorrect" => CKR_PIN_INCORRECT,
                    "locked" => CKR_PIN_LOCKED,
                    "expired" => CKR_PIN_EXPIRED,
                    _ => return Err("unknown".to_owned()),
                };
                let rule = Rule { rv: Some(rv), ..Rule::new(Some(vec!["C_Login"])) };
                self.rules.push(words.complete(rule)?);
            }
            ("throttle", Some(limit)) => {
                let rv = words.code()?.unwrap_or(CKR_FUNCTION_FAILED);
                self.throttle = Some(Throttle { limit: number(limit)?, rv });
            }
            ("stale", Some(what)) => self.stale.push(match what {
                "sessions" => Stale::Sessions,
                "one-session" => Stale::OneSession,
                "login" => Stale::Login,
                "objects" => Stale::Objects,
                _ => return Err("unknown".to_owned()),
            }),
            ("absent", None) => self.absent = Some(Absent { rv: words.code()? }),
            ("max_sessions", Some(limit)) => self.max_sessions = Some(number(limit)?),
            ("advertise_sessions", Some(limit)) => self.advertise_sessions = Some(number(limit)?),
            ("pin_tries", Some(left)) => {
                self.pin_flags = match left {
                    "low" => CKF_USER_PIN_COUNT_LOW,
                    "final" => CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY,
                    "locked" => CKF_USER_PIN_LOCKED,
                    _ => return Err("unknown".to_owned()),
                }
            }
            ("no_slots", None) => self.no_slots = true,
            ("dead", None) => self.dead = Some(words.code()?.unwrap_or(CKR_DEVICE_REMOVED)),
            _ => return Err("unknown".to_owned()),
        }
        words.end()
    }
}

/// The words of a line. The first word is the subject of the line.
struct Words<'a>(Vec<(&'a str, Option<&'a str>)>);

impl<'a> Words<'a> {
    fn split(line: &'a str) -> Result<Self, String> {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<_> = line
            .split_whitespace()
            .map(|word| match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word, None),
            })
            .collect();
        for (at, (key, _)) in words.iter().enumerate() {
            if words[..at].iter().any(|(earlier, _)| earlier == key) {
                return Err(format!("{key:?} twice"));
            }
        }
        Ok(Self(words))
    }

    fn subject(&mut self) -> Option<(&'a str, Option<&'a str>)> {
        if self.0.is_empty() { None } else { Some(self.0.remove(0)) }
    }

    fn take(&mut self, key: &str) -> Option<Option<&'a str>> {
        let at = self.0.iter().position(|(name, _)| *name == key)?;
        Some(self.0.remove(at).1)
    }

    fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(_)) => Err(format!("{key:?} takes no value")),
        }
    }

    fn number(&mut self, key: &str) -> Result<Option<u64>, String> {
        self.take(key).map(|value| number(value.unwrap_or_default())).transpose()
    }

    fn code(&mut self) -> Result<Option<CK_RV>, String> {
        let Some(value) = self.take("rv") else { return Ok(None) };
        let value = value.unwrap_or_default();
        match CODES.iter().find(|(name, _)| *name == value) {
            Some((_, code)) => Ok(Some(*code)),
            None => number(value).map(Some),
        }
    }

    fn deed(&mut self) -> Result<Option<Deed>, String> {
        let Some(value) = self.take("deed") else { return Ok(None) };
        let value = value.unwrap_or_default();
        Deed::named(value).map(Some).ok_or_else(|| format!("{value:?} is no deed"))
    }

    fn rule(&mut self, calls: Option<Vec<&'static str>>) -> Result<Rule, String> {
        let mut rule = Rule::new(calls);
        rule.delay = Duration::from_millis(self.number("delay_ms")?.unwrap_or(0));
        rule.hang = self.flag("hang")?;
        rule.deed = self.deed()?;
        rule.corrupt = self.flag("corrupt")?;
        rule.rv = self.code()?;
        if rule.delay.is_zero() && !rule.hang && rule.deed.is_none() && !rule.corrupt && rule.rv.is_none() {
            return Err("no rv, delay_ms, hang, deed or corrupt".to_owned());
        }
        self.complete(rule)
    }

    fn complete(&mut self, mut rule: Rule) -> Result<Rule, String> {
        rule.every = self.number("every")?.unwrap_or(1).max(1);
        rule.times = self.number("times")?.unwrap_or(u64::MAX);
        Ok(rule)
    }

    fn end(self) -> Result<(), String> {
        match self.0.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!("{key:?} is out of place")),
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is no number"))
}

fn name(call: &str) -> Result<&'static str, String> {
    NAMES.iter().find(|name| **name == call).copied().ok_or_else(|| format!("there is no {call:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let text = "# a comment\n\ncall=C_Decrypt,C_Sign rv=0x30 every=20 times=2\ncall=* delay_ms=200 # slow\n\
                    call=C_Decrypt hang rv=CKR_GENERAL_ERROR\ncall=C_Sign corrupt\npin=locked\nthrottle=8\n\
                    absent\nmax_sessions=2\nadvertise_sessions=0\npin_tries=locked\nstale=objects\nstale=login\n";
        let faults = Faults::parse(text, false).unwrap_or_else(|error| panic!("{error}"));
        let [twentieth, slow, stuck, wrong, pin] = &faults.rules[..] else { panic!("{faults:?}") };
        assert_eq!((twentieth.rv, twentieth.every, twentieth.times), (Some(0x30), 20, 2));
        assert_eq!((slow.delay, slow.rv), (Duration::from_millis(200), None));
        assert!(stuck.hang && stuck.rv == Some(CKR_GENERAL_ERROR));
        assert!(wrong.corrupt && pin.rv == Some(CKR_PIN_LOCKED));
        assert_eq!(faults.stale, [Stale::Objects, Stale::Login]);
        assert_eq!((faults.max_sessions, faults.advertise_sessions), (Some(2), Some(0)));
        assert_eq!(faults.pin_flags, CKF_USER_PIN_LOCKED);
        assert!(faults.throttle.is_some_and(|t| t.limit == 8 && t.rv == CKR_FUNCTION_FAILED));
        let faults = Faults::parse("dead\nno_slots\ninitialize rv=5\n", true).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((faults.dead, faults.no_slots, faults.rules.len()), (Some(CKR_DEVICE_REMOVED), true, 1));
    }

    #[test]
    fn deeds_are_understood() {
        for (name, deed) in [
            ("abort", Deed::Abort),
            ("exit", Deed::Exit),
            ("segv", Deed::Segv),
            ("heap", Deed::Heap),
            ("handlers", Deed::Handlers),
            ("close", Deed::Close),
            ("reconnect", Deed::Reconnect),
            ("print", Deed::Print),
            ("leak", Deed::Leak),
            ("deadlock", Deed::Deadlock),
        ] {
            let line = format!("call=C_Decrypt deed={name} every=3 rv=0x30");
            let faults = Faults::parse(&line, false).unwrap_or_else(|error| panic!("{error}"));
            let [rule] = &faults.rules[..] else { panic!("{faults:?}") };
            assert_eq!((rule.deed, rule.every, rule.rv), (Some(deed), 3, Some(0x30)));
        }
        let faults = Faults::parse("initialize deed=deadlock", true).unwrap_or_else(|error| panic!("{error}"));
        assert!(faults.rules[0].applies("C_Initialize", false));
        assert_eq!(faults.rules[0].deed, Some(Deed::Deadlock));
        let faults = Faults::parse("call=C_Decrypt hang", false).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(faults.rules[0].deed, None);
    }

    #[test]
    fn mistakes_are_told() {
        for line in [
            "call=C_Decrypt deed",
            "call=C_Decrypt deed=good",
            "call=C_Decrypt deed=abort deed=exit",
            "pin=locked deed=abort",
            "throttle=2 deed=abort",
            "deed=abort",
            "call=C_Decript rv=1",
            "call=C_Decrypt",
            "call rv=1",
            "call=C_Sign rv=CKR_NO_SUCH",
            "call=C_Sign hang=1",
            "call=C_Sign rv=1 rv=2",
            "call=C_Sign rv=1 tims=2",
            "stale=everything",
            "stale",
            "dead",
            "pin=wrong",
            "pin_tries=many",
            "max_sessions=many",
            "rv=1",
        ] {
            assert!(check(line, false).is_err(), "{line}");
        }
        for line in ["absent", "stale=login", "pin=locked", "max_sessions=1"] {
            assert!(check(line, true).is_err(), "{line}");
        }
    }

    #[test]
    fn calls_are_counted() {
        let faults = Faults::parse("call=C_Sign rv=1 every=3 times=2", false).unwrap_or_else(|error| panic!("{error}"));
        let rule = &faults.rules[0];
        let applied: Vec<bool> = (0..10).map(|_| rule.applies("C_Sign", true)).collect();
        assert_eq!(applied, [false, false, true, false, false, true, false, false, false, false]);
        assert!(!rule.applies("C_Decrypt", true));
    }
}
