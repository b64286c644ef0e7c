//! Writes the generated files into the repository: dashboards, rules and the metric reference. With `--runbook-url URL`, prints
//! the rules with the address of a runbook instead.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use claviger_process::output;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => write_all(),
        ["--runbook-url", url] => {
            output::line(claviger_dashboards::rules(url).trim_end());
            output::exit_status("dashboards", ExitCode::SUCCESS, 1)
        }
        _ => {
            output::note("usage: dashboards [--runbook-url URL]");
            ExitCode::from(2)
        }
    }
}

fn write_all() -> ExitCode {
    let root = claviger_dashboards::root();
    for file in claviger_dashboards::files() {
        let path = root.join(file.path);
        if std::fs::read_to_string(&path).is_ok_and(|text| text == file.text) {
            output::line(&format!("unchanged  {}", file.path));
            continue;
        }
        if let Err(error) = output::write_file(&path, file.text.as_bytes()) {
            output::note(&format!("dashboards: {}: {error}", path.display()));
            return ExitCode::FAILURE;
        }
        output::line(&format!("written    {}", file.path));
    }
    output::exit_status("dashboards", ExitCode::SUCCESS, 1)
}
