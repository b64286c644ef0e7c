//! Finds the series and labels that a PromQL expression uses. The expression may contain Grafana variables. This is not
//! a parser: `promtool` and Prometheus check the syntax, and this module only finds names.

/// A selector in an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// The name of the series.
    pub name: String,
    /// The label matchers as written: name, operator, value without quotes.
    pub matchers: Vec<(String, String, String)>,
    /// The range in square brackets, if there is one.
    pub range: Option<String>,
    /// The function that takes the selector as its first argument.
    pub function: Option<String>,
}

/// The names that an expression uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// The selectors.
    pub selectors: Vec<Selector>,
    /// The labels by which the expression groups, matches or joins.
    pub grouping: Vec<String>,
}

const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const WORDS: [&str; 20] = [
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "inf",
    "nan",
    "sum",
    "min",
    "max",
    "avg",
    "count",
    "group",
    "stddev",
    "stdvar",
    "topk",
    "bottomk",
    "quantile",
    "count_values",
    "atan2",
];

/// Finds the names in an expression.
#[must_use]
pub fn uses(expression: &str) -> Uses {
    let mut reader = Reader { rest: expression };
    let mut uses = Uses::default();
    // The word directly before the last opening bracket, if nothing has followed it.
    let mut function = None;
    loop {
        reader.space();
        let Some(next) = reader.rest.chars().next() else { return uses };
        match next {
            '"' => {
                reader.string();
            }
            '$' => reader.variable(),
            '[' => {
                reader.until(']');
            }
            // A number, with an optional unit or exponent.
            '0'..='9' | '.' => {
                reader.take(|c| c.is_ascii_alphanumeric() || c == '.');
            }
            c if starts_name(c) => {
                let name = reader.take(continues_name);
                reader.space();
                let lower = name.to_ascii_lowercase();
                if GROUPING.contains(&&*lower) {
                    if reader.rest.starts_with('(') {
                        let labels = reader.until(')');
                        uses.grouping
                            .extend(labels.split(',').map(str::trim).filter(|l| !l.is_empty()).map(String::from));
                    }
                } else if reader.rest.starts_with('(') {
                    reader.skip();
                    function = Some(name.to_owned());
                    continue;
                } else if !WORDS.contains(&&*lower) {
                    let matchers = if reader.rest.starts_with('{') { reader.matchers() } else { Vec::new() };
                    reader.space();
                    let range = reader.rest.starts_with('[').then(|| reader.until(']').to_owned());
                    uses.selectors.push(Selector { name: name.to_owned(), matchers, range, function: function.take() });
                }
            }
            _ => reader.skip(),
        }
        function = None;
    }
}

fn starts_name(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || c == ':'
}

fn continues_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn skip(&mut self) {
        let mut chars = self.rest.chars();
        chars.next();
        self.rest = chars.as_str();
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, belongs: fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    /// The text up to the closing bracket.
    fn until(&mut self, closing: char) -> &'a str {
        self.skip();
        let (taken, rest) = self.rest.split_once(closing).unwrap_or((self.rest, ""));
        self.rest = rest;
        taken
    }

    fn string(&mut self) -> &'a str {
        self.skip();
        let mut escaped = false;
        let end = self.rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let (taken, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        self.skip();
        taken
    }

    fn variable(&mut self) {
        self.skip();
        if self.rest.starts_with('{') {
            self.until('}');
        } else {
            self.take(continues_name);
        }
    }

    fn matchers(&mut self) -> Vec<(String, String, String)> {
        self.skip();
        let mut found = Vec::new();
        loop {
            self.space();
            let Some(next) = self.rest.chars().next() else { return found };
            if starts_name(next) {
                let label = self.take(continues_name);
                self.space();
                let operator = self.take(|c| "=!~".contains(c));
                self.space();
                found.push((label.to_owned(), operator.to_owned(), self.string().to_owned()));
            } else {
                self.skip();
                if next == '}' {
                    return found;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_words_are_not() {
        let expression = r#"sum by (hsm, le) (rate(a_total{job=~"$job", x!="}\""}[$__rate_interval]))
            / on (job) group_left ()
            (1.5e3 * b:c:d offset 5m > bool ${ceiling:raw}) or vector(0) and up == 0"#;
        let uses = uses(expression);
        let names: Vec<_> = uses.selectors.iter().map(|s| &*s.name).collect();
        assert_eq!(names, ["a_total", "b:c:d", "up"]);
        let first = &uses.selectors[0];
        assert_eq!(first.matchers[0], ("job".into(), "=~".into(), "$job".into()));
        assert_eq!(first.matchers[1].0, "x");
        assert_eq!(first.range.as_deref(), Some("$__rate_interval"));
        assert_eq!(first.function.as_deref(), Some("rate"));
        assert_eq!(uses.selectors[1].function, None);
        assert_eq!(uses.grouping, ["hsm", "le", "job"]);
    }

    #[test]
    fn what_never_ends_ends() {
        for broken in ["a{", "a{b", "a{b=", "a{b=\"", "by (", "a[", "$", "${", "\""] {
            let _ = uses(broken);
        }
    }
}
