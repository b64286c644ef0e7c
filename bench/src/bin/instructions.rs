//! Compares the last counts with the accepted ones.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use claviger_bench::instructions::baseline::{Baseline, Comparison, Tools};
use claviger_bench::instructions::counts;
use claviger_process::{arguments, output};

/// Prints the instructions of each part of a release in the last count, and the change since the accepted count. Fails
/// if a part has grown by more than 3 %
#[derive(Debug, Parser)]
#[command(after_help = "Example: make bench-instructions\n\ndocs/bench.md says what the figures mean.")]
struct Arguments {
    /// Folder with gungraun's counts
    #[arg(long, value_name = "DIR", default_value = "target/gungraun/claviger-instructions")]
    results: PathBuf,
    /// File with the accepted counts
    #[arg(long, value_name = "FILE", default_value = "bench/instructions/baseline.json")]
    baseline: PathBuf,
    /// Accept the counts: write them to the baseline
    #[arg(long)]
    accept: bool,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = match arguments::parse::<Arguments>() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    let status = match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            output::note(&format!("instructions: {error}"));
            ExitCode::FAILURE
        }
    };
    output::exit_status("instructions", status, 1)
}

fn run(arguments: &Arguments) -> Result<bool, String> {
    let instructions = counts::read(&arguments.results).map_err(|error| error.to_string())?;
    let here = Baseline { tools: Tools::here(), instructions };
    let text = serde_json::to_string_pretty(&here).map_err(|error| error.to_string())? + "\n";
    let file = &arguments.baseline;
    let compared = match read(file) {
        Ok(baseline) => Some(Comparison::new(&baseline, &here.instructions, &here.tools)),
        // The first baseline.
        Err(_) if arguments.accept => None,
        Err(error) => return Err(error),
    };
    if arguments.json {
        output::bytes(text.as_bytes());
    } else if let Some(compared) = &compared {
        output::bytes(compared.to_string().as_bytes());
    }
    if !arguments.accept {
        return Ok(compared.is_some_and(|compared| compared.passes()));
    }
    output::write_file(file, text.as_bytes()).map_err(|error| format!("{}: {error}", file.display()))?;
    output::note(&format!("accepted in {}", file.display()));
    Ok(true)
}

fn read(file: &Path) -> Result<Baseline, String> {
    let text = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", file.display()))
}
