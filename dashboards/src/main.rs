//! Writes the generated files into the repository: dashboards, rules and the metric reference.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use claviger_process::output;

fn main() -> ExitCode {
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
