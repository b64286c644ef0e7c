//! The project's targets with the last measured figures.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

/// The direction of improvement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Goal {
    AtMost,
    AtLeast,
}

impl Goal {
    fn sign(self) -> &'static str {
        match self {
            Self::AtMost => "≤",
            Self::AtLeast => "≥",
        }
    }

    fn is_met(self, value: f64, target: f64) -> bool {
        match self {
            Self::AtMost => value <= target,
            Self::AtLeast => value >= target,
        }
    }
}

/// The source of a figure.
enum Source {
    /// A file from `ceiling --json` or `nodes --json`, and a JSON pointer into it.
    Ceiling(&'static str, &'static str),
    /// The same, in mebibytes.
    CeilingMib(&'static str, &'static str),
    /// The growth with this number of members, in a file from `ceiling --hsms`.
    OfLinear(&'static str, u64),
    /// The median time of a criterion bench, in microseconds.
    Micros(&'static str),
    /// How often per second a criterion bench does its work.
    PerSecond(&'static str),
}

struct Target {
    what: &'static str,
    /// The value on 2026-11-22, before the optimisation began, as it was reported.
    before: &'static str,
    goal: Goal,
    target: f64,
    unit: &'static str,
    digits: usize,
    from: Source,
}

const TARGETS: [Target; 16] = [
    Target {
        what: "own cost of a release, in RSA-2048 public operations",
        before: "22",
        goal: Goal::AtMost,
        target: 11.0,
        unit: "",
        digits: 1,
        from: Source::Ceiling("ceiling.json", "/own_cost_in_public_ops"),
    },
    Target {
        what: "efficiency: time in PKCS#11 ÷ that of daemon and workers",
        before: "0.80",
        goal: Goal::AtLeast,
        target: 0.90,
        unit: "",
        digits: 3,
        from: Source::Ceiling("ceiling.json", "/efficiency"),
    },
    Target {
        what: "HSM operations a second ÷ raw, 16 callers",
        before: "0.80",
        goal: Goal::AtLeast,
        target: 0.92,
        unit: "",
        digits: 3,
        from: Source::Ceiling("ceiling.json", "/operations_ratio"),
    },
    Target {
        what: "HSM operations a second ÷ raw, 64 callers",
        before: "0.83",
        goal: Goal::AtLeast,
        target: 0.92,
        unit: "",
        digits: 3,
        from: Source::Ceiling("ceiling-64.json", "/operations_ratio"),
    },
    Target {
        what: "light load: release ÷ (raw decrypt + raw sign), no stock",
        before: "1.3",
        goal: Goal::AtMost,
        target: 0.75,
        unit: "",
        digits: 2,
        from: Source::Ceiling("ceiling.json", "/light/ratio/median"),
    },
    Target {
        what: "the same with stock",
        before: "-",
        goal: Goal::AtMost,
        target: 0.55,
        unit: "",
        digits: 2,
        from: Source::Ceiling("ceiling-stock.json", "/light/ratio/median"),
    },
    Target {
        what: "storm, stock full: HSM operations a release",
        before: "2.0",
        goal: Goal::AtMost,
        target: 1.05,
        unit: "",
        digits: 3,
        from: Source::Ceiling("storm.json", "/full/hsm_operations_per_release/median"),
    },
    Target {
        what: "storm, stock full: time to the last machine ÷ bound",
        before: "2.6",
        goal: Goal::AtMost,
        target: 0.6,
        unit: "",
        digits: 2,
        from: Source::Ceiling("storm.json", "/full/of_bound/median"),
    },
    Target {
        what: "storm, no stock: time to the last machine ÷ bound",
        before: "2.6",
        goal: Goal::AtMost,
        target: 1.1,
        unit: "",
        digits: 2,
        from: Source::Ceiling("storm.json", "/empty/of_bound/median"),
    },
    Target {
        what: "releases over null keys",
        before: "-",
        goal: Goal::AtLeast,
        target: 6000.0,
        unit: " /s",
        digits: 0,
        from: Source::PerSecond("release/null_keys"),
    },
    Target {
        what: "growth over network HSMs at 20 ms, 16 members",
        before: "0.86",
        goal: Goal::AtLeast,
        target: 0.95,
        unit: "",
        digits: 2,
        from: Source::OfLinear("scaling.json", 16),
    },
    Target {
        what: "memory with 10,000 idle connections",
        before: "235-330 MiB",
        goal: Goal::AtMost,
        target: 150.0,
        unit: " MiB",
        digits: 0,
        from: Source::CeilingMib("idle.json", "/resident_bytes"),
    },
    Target {
        what: "p99 beside them ÷ without",
        before: "1.12",
        goal: Goal::AtMost,
        target: 1.0,
        unit: "",
        digits: 2,
        from: Source::Ceiling("idle.json", "/p99_ratio/median"),
    },
    Target {
        what: "a pair of operations outside of PKCS#11, saturated",
        before: "-",
        goal: Goal::AtMost,
        target: 40.0,
        unit: " µs",
        digits: 1,
        from: Source::Micros("hsm/own_cost_of_a_pair"),
    },
    Target {
        what: "start of a node, 10,000 hosts and 500 keys in etcd",
        before: "-",
        goal: Goal::AtMost,
        target: 2.0,
        unit: " s",
        digits: 2,
        from: Source::Ceiling("nodes.json", "/start_seconds"),
    },
    Target {
        what: "its processor time for a change at any node",
        before: "-",
        goal: Goal::AtMost,
        target: 20.0,
        unit: " ms",
        digits: 1,
        from: Source::Ceiling("nodes.json", "/change_ms"),
    },
];

/// All targets, with the values in the files of `figures` and in criterion's folder. Missing measurements are marked.
#[must_use]
pub fn table(figures: &Path, criterion: &Path) -> String {
    let mut text = format!("{:<58} {:>12} {:>12} {:>12}\n", "", "before", "target", "measured");
    for target in &TARGETS {
        let measured = target.from.measured(figures, criterion);
        let number = |value: f64| format!("{value:.*}{}", target.digits, target.unit);
        let (told, verdict) = match measured {
            Some(value) => (number(value), if target.goal.is_met(value, target.target) { "met" } else { "missed" }),
            None => ("-".to_owned(), "not measured"),
        };
        let goal = format!("{} {}", target.goal.sign(), number(target.target));
        let _ = writeln!(text, "{:<58} {:>12} {goal:>12} {told:>12}   {verdict}", target.what, target.before);
    }
    text
}

impl Source {
    fn measured(&self, figures: &Path, criterion: &Path) -> Option<f64> {
        match *self {
            Self::Ceiling(file, pointer) => json(&figures.join(file))?.pointer(pointer)?.as_f64(),
            Self::CeilingMib(file, pointer) => {
                Some(json(&figures.join(file))?.pointer(pointer)?.as_f64()? / 1_048_576.0)
            }
            Self::OfLinear(file, hsms) => {
                let found = json(&figures.join(file))?;
                found["steps"].as_array()?.iter().find(|step| step["hsms"] == hsms)?["of_linear"].as_f64()
            }
            Self::Micros(bench) => Some(nanoseconds(criterion, bench)? / 1e3),
            Self::PerSecond(bench) => Some(1e9 / nanoseconds(criterion, bench)?),
        }
    }
}

/// The median of a bench per element of an iteration.
fn nanoseconds(criterion: &Path, bench: &str) -> Option<f64> {
    let folder = criterion.join(bench).join("new");
    let elements = json(&folder.join("benchmark.json"))?["throughput"]["Elements"].as_f64().unwrap_or(1.0);
    Some(json(&folder.join("estimates.json"))?["median"]["point_estimate"].as_f64()? / elements)
}

fn json(file: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_met_missed_or_not_measured() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = folder.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        write("ceiling.json", r#"{"own_cost_in_public_ops": 10.94, "efficiency": 0.899}"#);
        write("scaling.json", r#"{"steps": [{"hsms": 1, "of_linear": 1.0}, {"hsms": 16, "of_linear": 0.951}]}"#);
        write("idle.json", r#"{"resident_bytes": 104857600.0}"#);
        write("criterion/release/null_keys/new/benchmark.json", r#"{"throughput": {"Elements": 100}}"#);
        write("criterion/release/null_keys/new/estimates.json", r#"{"median": {"point_estimate": 20000000.0}}"#);
        write("criterion/hsm/own_cost_of_a_pair/new/benchmark.json", r#"{"throughput": null}"#);
        write("criterion/hsm/own_cost_of_a_pair/new/estimates.json", r#"{"median": {"point_estimate": 41000.0}}"#);
        let text = table(folder.path(), &folder.path().join("criterion"));
        let ends = |what: &str, end: &str| {
            let line = text.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("no {what}: {text}"));
            assert!(line.ends_with(end), "{line}");
        };
        ends("own cost of a release", "≤ 11.0         10.9   met");
        ends("efficiency", "≥ 0.900        0.899   missed");
        ends("growth", "0.95   met");
        ends("memory", "≤ 150 MiB      100 MiB   met");
        ends("releases over null keys", "5000 /s   missed");
        ends("a pair of operations", "41.0 µs   missed");
        ends("storm, stock full: time", "-   not measured");
    }
}
