//! What packages contain beside a program: completions for shells and manual pages, generated from its command line.

use std::io;
use std::path::Path;

pub use clap_complete::Shell;
pub use clap_mangen::roff;

use crate::output;

/// Prints the completion script for a shell.
pub fn completions(mut command: clap::Command, shell: Shell) {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    output::bytes(&script);
}

/// Writes what a package contains: a manual page for the program and for each of its commands into `folder`/man, and
/// completions for the usual shells into `folder`/completions.
///
/// # Errors
/// A file cannot be written.
pub fn write_all(mut command: clap::Command, folder: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    // The completions add the command `help` to it, at each level.
    let described = without_help(command.clone());
    let completions = folder.join("completions");
    std::fs::create_dir_all(&completions)?;
    for (shell, file) in
        [(Shell::Bash, name.clone()), (Shell::Zsh, format!("_{name}")), (Shell::Fish, format!("{name}.fish"))]
    {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, &name, &mut script);
        std::fs::write(completions.join(file), script)?;
    }
    let pages = folder.join("man");
    std::fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(described, pages)
}

/// Leaves out the commands `help` at each level: their pages would say what those of the commands say.
fn without_help(command: clap::Command) -> clap::Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_command_gets_a_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        let sub = clap::Command::new("list").about("Show them").after_help("Example: tool list");
        let sub = sub.subcommand(clap::Command::new("all"));
        let hidden = clap::Command::new("inner").hide(true);
        write_all(clap::Command::new("tool").subcommands([sub, hidden]), folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join("man/tool-list.1")).unwrap();
        assert!(page.contains("Show them") && page.contains("Example: tool list"), "{page}");
        assert!(folder.path().join("man/tool-list-all.1").exists());
        for absent in ["tool-inner.1", "tool-help.1", "tool-list-help.1", "tool-list-help-all.1"] {
            assert!(!folder.path().join("man").join(absent).exists(), "{absent}");
        }
        for file in ["tool", "_tool", "tool.fish"] {
            assert!(std::fs::read_to_string(folder.path().join("completions").join(file)).unwrap().contains("list"));
        }
    }
}
