//! Prints the targets with the last figures, and the last figures of the criterion benches.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use claviger_bench::targets;
use claviger_process::{arguments, output};
use serde_json::Value;

/// Prints the targets with the last measured figures, and the last figures of the criterion benches
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo bench -p claviger-bench && cargo run -p claviger-bench --bin table")]
struct Arguments {
    /// Folder with criterion's results
    #[arg(long, value_name = "DIR", default_value = "target/criterion")]
    results: PathBuf,
    /// Folder with the figures of `ceiling --json`
    #[arg(long, value_name = "DIR", default_value = "target/figures")]
    figures: PathBuf,
}

fn main() -> ExitCode {
    let Arguments { results: folder, figures } = match arguments::parse() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    output::line(&targets::table(&figures, &folder));
    let mut rows = Vec::new();
    collect(&folder, &mut rows);
    if rows.is_empty() {
        output::note(&format!(
            "table: no results in {}; measure first: cargo bench -p claviger-bench",
            folder.display()
        ));
        return ExitCode::FAILURE;
    }
    rows.sort();
    output::line(&format!("{:<34} {:>12} {:>26}", "", "median", "95 % of the medians in"));
    for (name, figures) in rows {
        output::line(&format!("{name:<34} {figures}"));
    }
    output::exit_status("table", ExitCode::SUCCESS, 1)
}

/// Every folder with results of a run is named `new`.
fn collect(folder: &Path, rows: &mut Vec<(String, String)>) {
    if folder.file_name().is_some_and(|name| name == "new") {
        rows.extend(row(folder));
        return;
    }
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            collect(&entry.path(), rows);
        }
    }
}

fn row(folder: &Path) -> Option<(String, String)> {
    let json = |file| serde_json::from_slice::<Value>(&std::fs::read(folder.join(file)).ok()?).ok();
    let (benchmark, estimates) = (json("benchmark.json")?, json("estimates.json")?);
    let median = &estimates["median"];
    let interval = &median["confidence_interval"];
    let elements = benchmark["throughput"]["Elements"].as_f64().filter(|count| *count > 1.0);
    let each = |nanoseconds: &Value| Some(nanoseconds.as_f64()? / elements.unwrap_or(1.0) / 1e3);
    let (from, to) = (each(&interval["lower_bound"])?, each(&interval["upper_bound"])?);
    let name = benchmark["full_id"].as_str()?;
    let note = if elements.is_some() { ", each" } else { "" };
    let range = format!("{from:.2} to {to:.2} µs");
    Some((format!("{name}{note}"), format!("{:>9.2} µs {range:>26}", each(&median["point_estimate"])?)))
}
