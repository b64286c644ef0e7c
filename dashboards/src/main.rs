//! Writes the generated files to their places in the repository: table of metrics → dashboards, rules, reference.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let root = claviger_dashboards::root();
    for file in claviger_dashboards::files() {
        let path = root.join(file.path);
        if std::fs::read_to_string(&path).is_ok_and(|text| text == file.text) {
            println!("unchanged  {}", file.path);
            continue;
        }
        if let Err(error) = std::fs::write(&path, &file.text) {
            eprintln!("{}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("written    {}", file.path);
    }
    ExitCode::SUCCESS
}
