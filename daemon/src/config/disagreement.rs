//! Settings that have to agree with each other, such as two ways to name a token.

use std::fmt;

/// Settings of one section that contradict each other. The types of the configuration have no value for them.
#[derive(Debug)]
pub(super) struct Disagreement {
    /// The setting that is named in the error.
    pub(super) key: &'static str,
    pub(super) problem: String,
    pub(super) advice: String,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.key, self.problem, self.advice)
    }
}

/// Returns the value of the one setting that is set, if exactly one of two settings is.
pub(super) fn one_of<T>(
    (first, one): (&'static str, Option<T>),
    (second, other): (&'static str, Option<T>),
    is_empty: impl Fn(&T) -> bool,
) -> Result<T, Disagreement> {
    let wrong = |key, problem: String| {
        Err(Disagreement { key, problem, advice: format!("set exactly one of `{first}` and `{second}`") })
    };
    match (one, other) {
        (Some(value), _) if is_empty(&value) => wrong(first, "is empty".to_owned()),
        (_, Some(value)) if is_empty(&value) => wrong(second, "is empty".to_owned()),
        (Some(value), None) | (None, Some(value)) => Ok(value),
        (Some(_), Some(_)) => wrong(second, format!("`{first}` is set, too")),
        (None, None) => wrong(first, format!("neither `{first}` nor `{second}` is set")),
    }
}
