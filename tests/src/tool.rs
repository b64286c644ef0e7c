//! Runs other programs.

/// Runs another program until it ends. If it is missing, the panic names the package to install.
///
/// # Panics
/// If the program cannot be started.
pub fn tool(package: &str, command: &mut std::process::Command) -> std::process::Output {
    let name = command.get_program().to_owned();
    command.output().unwrap_or_else(|error| panic!("{}: {error}: apt-get install {package}", name.display()))
}

/// Returns both outputs of a program as text.
#[must_use]
pub fn said(output: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
