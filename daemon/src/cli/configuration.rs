//! `claviger config …`: the configuration file.

use std::path::PathBuf;

use claviger_process::manual::roff::{Roff, bold, italic, roman};

use super::place;
use crate::config::{Config, reference};
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger config …`
#[derive(Debug, clap::Subcommand)]
pub enum Configuration {
    /// Check the configuration file; the HSMs and other files are not looked at
    #[command(after_help = "Example: claviger config check --config new.toml\n\
        Exit status: 0 the daemon would accept the file, 1 it would not. claviger doctor checks everything else.")]
    Check {
        /// The file [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print the configuration with every default, as the daemon reads it
    #[command(after_help = "Example: claviger config show")]
    Show {
        /// The file [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Print the reference of all settings: units, bounds, defaults; Markdown
    #[command(after_help = "Example: claviger config reference | less")]
    Reference,
    /// Print the JSON Schema of the configuration file, for editors
    #[command(after_help = "Example: claviger config schema >claviger.schema.json")]
    Schema,
}

/// Runs `claviger config …`.
///
/// # Errors
/// The problem and its remedy.
pub fn run(command: Configuration) -> Result<(), Failure> {
    match command {
        Configuration::Check { config } => {
            let file = place::configuration(config);
            let config = Config::load(&file)?;
            say!("{} is valid: {} HSMs", file.display(), config.hsm.len());
        }
        Configuration::Show { config, json } => {
            let config = Config::load(&place::configuration(config))?;
            if json {
                say!("{:#}", serde_json::to_value(&config)?);
            } else {
                say!("{}", config.to_toml()?.trim_end());
            }
        }
        Configuration::Reference => say!("{}", reference::markdown().trim_end()),
        Configuration::Schema => say!("{:#}", reference::schema()),
    }
    Ok(())
}

/// The manual page `claviger.toml(5)`.
#[must_use]
pub fn manual_page() -> String {
    let mut page = Roff::new();
    page.control("TH", ["claviger.toml", "5", "", env!("CLAVIGER_VERSION")]);
    page.control("SH", ["NAME"]);
    page.text([roman("claviger.toml - configuration of the key-release daemon claviger(1)")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(reference::introduction().replace('`', ""))]);
    for section in reference::sections() {
        let title = if section.header.is_empty() { "TOP LEVEL".to_owned() } else { section.header };
        page.control("SH", [title.as_str()]);
        page.text([roman(section.about.replace('`', ""))]);
        for setting in &section.settings {
            page.control("TP", []);
            page.text([bold(setting.name.clone()), roman(" = "), italic(setting.value())]);
            page.text([roman(setting.meaning.replace('`', ""))]);
        }
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("claviger"), roman("(1)")]);
    page.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_page_has_every_setting() {
        let page = manual_page();
        for section in reference::sections() {
            for setting in &section.settings {
                let name = setting.name.replace('-', "\\-");
                assert!(page.contains(&name), "{name} is not in\n{page}");
            }
        }
    }
}
