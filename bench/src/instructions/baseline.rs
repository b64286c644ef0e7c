//! The accepted counts, and their difference from the last counts.

use std::fmt::{self, Write};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::counts::Counts;

/// A part fails if it has grown by more than this, in percent of the accepted count.
pub const TOLERANCE_PERCENT: u64 = 3;

/// Tools that influence the counts. Counts with other tools cannot be compared.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tools {
    /// Version of the Rust compiler.
    pub rustc: String,
    /// Version of valgrind, which also decides which processor the code sees.
    pub valgrind: String,
    /// The version of the C library.
    pub libc: String,
    /// The version of the C compiler, which compiles the cryptographic libraries.
    pub cc: String,
    /// Model of the processor. The C library and the cryptographic libraries select code by its features, most of which
    /// valgrind hides.
    pub processor: String,
}

impl Tools {
    /// The tools of this machine.
    #[must_use]
    pub fn here() -> Self {
        Self {
            rustc: says("rustc", "--version"),
            valgrind: says("valgrind", "--version"),
            libc: version(&says("ldd", "--version")),
            cc: version(&says("cc", "--version")),
            processor: processor(),
        }
    }

    fn differences<'t>(&'t self, other: &'t Self) -> impl Iterator<Item = (&'t str, &'t str)> {
        let pairs = [
            (&self.rustc, &other.rustc),
            (&self.valgrind, &other.valgrind),
            (&self.libc, &other.libc),
            (&self.cc, &other.cc),
            (&self.processor, &other.processor),
        ];
        pairs.into_iter().filter(|(one, two)| one != two).map(|(one, two)| (one.as_str(), two.as_str()))
    }
}

/// Vendor, family and model of the first processor, by the kernel's numbers, because names differ between clouds.
fn processor() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |field: &str| {
        let line = told.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == field));
        line.and_then(|line| line.split(':').nth(1)).map_or("none", str::trim).to_owned()
    };
    [of("vendor_id"), of("cpu family"), of("model")].join(" ")
}

/// The first line of a program's version output.
fn says(program: &str, question: &str) -> String {
    let output = Command::new(program).arg(question).output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("none").to_owned()
}

/// The last word, which is the version; the names of distributions' builds do not matter.
fn version(line: &str) -> String {
    line.split_whitespace().next_back().unwrap_or("none").to_owned()
}

/// The accepted counts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Baseline {
    /// The tools of these counts.
    pub tools: Tools,
    /// Instructions, by part.
    pub instructions: Counts,
}

/// A part in the baseline and in the last counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Counted both times.
    Both {
        /// The accepted count.
        before: u64,
        /// The last count.
        now: u64,
    },
    /// Only in the last counts.
    New(u64),
    /// Only in the baseline.
    Gone(u64),
}

impl Change {
    /// Relative growth of a part; negative if it shrank.
    #[must_use]
    pub fn growth(self) -> Option<f64> {
        match self {
            Self::Both { before, now } if before > 0 => Some(now as f64 / before as f64 - 1.0),
            _ => None,
        }
    }

    /// Whether the change needs no acceptance.
    #[must_use]
    pub fn is_within_tolerance(self) -> bool {
        // Computed in whole numbers, so that a change of exactly the tolerance is within it.
        let share = |count: u64, percent: u64| u128::from(count) * u128::from(percent);
        matches!(self, Self::Both { before, now } if share(now, 100) <= share(before, 100 + TOLERANCE_PERCENT))
    }
}

/// The comparison of counts with the accepted ones.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// By part.
    pub changes: Vec<(String, Change)>,
    /// Tools that differ: the baseline's, and this machine's.
    pub other_tools: Vec<(String, String)>,
}

impl Comparison {
    /// Compares `counts`, made with `tools`.
    #[must_use]
    pub fn new(baseline: &Baseline, counts: &Counts, tools: &Tools) -> Self {
        let before = |part| baseline.instructions.get(part).copied();
        let both = counts.iter().map(|(part, now)| {
            (part.clone(), before(part).map_or(Change::New(*now), |before| Change::Both { before, now: *now }))
        });
        let gone = baseline.instructions.iter().filter(|(part, _)| !counts.contains_key(*part));
        let mut changes: Vec<_> = both.chain(gone.map(|(part, count)| (part.clone(), Change::Gone(*count)))).collect();
        changes.sort_by(|one, two| one.0.cmp(&two.0));
        let other_tools = baseline.tools.differences(tools);
        let other_tools = other_tools.map(|(one, two)| (one.to_owned(), two.to_owned())).collect();
        Self { changes, other_tools }
    }

    /// Whether no change needs acceptance. Counts with other tools than the baseline's are not judged.
    #[must_use]
    pub fn passes(&self) -> bool {
        !self.other_tools.is_empty() || self.changes.iter().all(|(_, change)| change.is_within_tolerance())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<40} {:>14} {:>14} {:>9}", "instructions", "accepted", "now", "change")?;
        for (part, change) in &self.changes {
            let (before, now, told) = match *change {
                Change::Both { before, now } => (grouped(before), grouped(now), percent(*change)),
                Change::New(now) => (String::new(), grouped(now), "new".to_owned()),
                Change::Gone(before) => (grouped(before), String::new(), "gone".to_owned()),
            };
            let mark = if change.is_within_tolerance() { "" } else { "  to be accepted" };
            writeln!(f, "{part:<40} {before:>14} {now:>14} {told:>9}{mark}")?;
        }
        if !self.other_tools.is_empty() {
            writeln!(f, "\nNOT JUDGED: the baseline was counted with other tools than this machine has.")?;
            for (one, two) in &self.other_tools {
                writeln!(f, "  {one}; here: {two}")?;
            }
        } else if !self.passes() {
            writeln!(
                f,
                "\nA part grew by more than {:.0} %, is new or is gone. Make it cheaper again, or accept the counts: \
                 make bench-instructions-accept, and commit bench/instructions/baseline.json.",
                TOLERANCE_PERCENT
            )?;
        } else if self
            .changes
            .iter()
            .any(|(_, change)| change.growth().is_some_and(|growth| growth < -(TOLERANCE_PERCENT as f64) / 100.0))
        {
            writeln!(f, "\nA part shrank. Accept it, so that it stays that way: make bench-instructions-accept")?;
        }
        Ok(())
    }
}

fn percent(change: Change) -> String {
    change.growth().map_or_else(String::new, |growth| format!("{:+.2} %", growth * 100.0))
}

/// Formats like 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        let _ = text.write_char(digit);
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tools(rustc: &str) -> Tools {
        Tools {
            rustc: rustc.to_owned(),
            valgrind: "v".to_owned(),
            libc: "l".to_owned(),
            cc: "c".to_owned(),
            processor: "p".to_owned(),
        }
    }

    fn counts(counts: &[(&str, u64)]) -> Counts {
        counts.iter().map(|(part, count)| ((*part).to_owned(), *count)).collect()
    }

    fn compared(before: &[(&str, u64)], now: &[(&str, u64)], rustc: &str) -> Comparison {
        let baseline = Baseline { tools: tools("1.95"), instructions: counts(before) };
        Comparison::new(&baseline, &counts(now), &tools(rustc))
    }

    #[test]
    fn only_growth_beyond_the_tolerance_has_to_be_accepted() {
        let before = [("a", 1000), ("b", 2000)];
        for (now, passes) in [
            (&[("a", 1000), ("b", 2000)][..], true),
            (&[("a", 1030), ("b", 2000)], true),
            (&[("a", 1031), ("b", 2000)], false),
            (&[("a", 10), ("b", 20)], true),
            (&[("a", 1000)], false),
            (&[("a", 1000), ("b", 2000), ("c", 1)], false),
        ] {
            let found = compared(&before, now, "1.95");
            assert_eq!(found.passes(), passes, "{now:?}");
            assert_eq!(found.to_string().contains("to be accepted"), !passes, "{found}");
        }
    }

    #[test]
    fn counts_by_other_tools_are_shown_and_not_judged() {
        let found = compared(&[("a", 1000)], &[("a", 9000)], "1.96");
        assert!(found.passes());
        let text = found.to_string();
        assert!(text.contains("+800.00 %") && text.contains("NOT JUDGED") && text.contains("1.96"), "{text}");
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"].map(str::to_owned));
    }
}
