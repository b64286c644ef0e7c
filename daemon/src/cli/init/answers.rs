//! What only the administrator knows: from flags, or asked at the terminal.

use std::io::Write;
use std::path::{Path, PathBuf};

use claviger_client::files;
use zeroize::Zeroizing;

use crate::cli::{confirm, secret};
use crate::sys::failure::Failure;
use crate::sys::print::note;

/// Longest PIN, in bytes.
const LONGEST_PIN: usize = 1024;

/// Where vendors install their libraries.
const MODULES: [(&str, &str); 8] = [
    ("Thales Luna", "/usr/safenet/lunaclient/lib/libCryptoki2_64.so"),
    ("Entrust nShield", "/opt/nfast/toolkits/pkcs11/libcknfast.so"),
    ("Securosys Primus", "/usr/local/primus/lib/libprimusP11.so"),
    ("Nitrokey NetHSM", "/usr/lib/nitrokey/libnethsm_pkcs11.so"),
    ("YubiHSM 2", "/usr/lib/x86_64-linux-gnu/pkcs11/yubihsm_pkcs11.so"),
    ("AWS CloudHSM", "/opt/cloudhsm/lib/libcloudhsm_pkcs11.so"),
    ("SoftHSM2", "/usr/lib/softhsm/libsofthsm2.so"),
    ("SoftHSM2", "/usr/lib64/pkcs11/libsofthsm2.so"),
];

/// How the guardian's keys are certified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Certificates {
    /// Keys in the HSMs, and certificate requests for your certification authority
    Request,
    /// Keys from outside with self-signed certificates, brought onto all tokens; for laboratories
    Lab,
}

impl Certificates {
    /// Its name on the command line.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Lab => "lab",
        }
    }

    /// Asks at the terminal.
    pub(super) fn ask() -> Result<Self, Failure> {
        if !confirm::can_ask() {
            return Err(
                "say how keys are certified: --certificates request, or, for a laboratory, --certificates lab".into()
            );
        }
        note("Who certifies the guardian's keys?");
        note("  request  your certification authority; the keys are made in the HSMs");
        note("  lab      no authority: the certificates sign themselves; for a laboratory");
        loop {
            match line("request or lab", "request")?.as_str() {
                "request" => return Ok(Self::Request),
                "lab" => return Ok(Self::Lab),
                _ => {}
            }
        }
    }
}

/// One token of the vendor's library.
pub(super) struct Token {
    pub(super) label: String,
    pub(super) pin: Zeroizing<String>,
}

/// The tokens of the service.
pub(super) enum Tokens {
    /// Soft tokens to be made.
    Soft(u16),
    /// Tokens that exist.
    Vendor { module: PathBuf, env: Vec<(String, String)>, tokens: Vec<Token> },
}

impl Tokens {
    /// Takes the flags, and asks for what they do not say.
    pub(super) fn ask(
        soft: Option<u16>,
        module: Option<PathBuf>,
        labels: Vec<String>,
        pin_files: Vec<PathBuf>,
        env: Vec<(String, String)>,
    ) -> Result<Self, Failure> {
        if let Some(soft) = soft {
            return Ok(Self::Soft(soft));
        }
        let can_ask = confirm::can_ask();
        let module = match module {
            Some(module) => module,
            None if can_ask => ask_module()?,
            None => {
                return Err("say which tokens the service has: --module FILE --token LABEL, or --soft-tokens N".into());
            }
        };
        if !module.is_absolute() || !module.is_file() {
            return Err(format!("{} is not the absolute path of a library", module.display()).into());
        }
        let labels = match labels {
            labels if !labels.is_empty() => labels,
            _ if can_ask => ask_labels()?,
            _ => return Err("say which tokens of the library are meant: --token LABEL".into()),
        };
        if pin_files.len() > 1 && pin_files.len() != labels.len() {
            return Err(format!("{} PIN files are for {} tokens", pin_files.len(), labels.len()).into());
        }
        let mut tokens = Vec::with_capacity(labels.len());
        for (at, label) in labels.into_iter().enumerate() {
            let file = pin_files.get(at).or(pin_files.first()).map(PathBuf::as_path);
            let pin = pin(&label, file)?;
            tokens.push(Token { label, pin });
        }
        Ok(Self::Vendor { module, env, tokens })
    }
}

/// Parses `NAME=VALUE`.
pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it like NAME=VALUE".to_owned()),
    }
}

fn ask_module() -> Result<PathBuf, Failure> {
    let found: Vec<_> = MODULES.iter().filter(|(_, path)| Path::new(path).is_file()).collect();
    for (vendor, path) in &found {
        note(&format!("found the library of {vendor}: {path}"));
    }
    let usual = found.first().map_or("", |(_, path)| path);
    Ok(line("Path of the vendor's PKCS#11 library", usual)?.into())
}

fn ask_labels() -> Result<Vec<String>, Failure> {
    let mut labels = vec![line("Label of the token", "")?];
    loop {
        match line("Label of a further token with the same keys (empty: none)", "")? {
            label if label.is_empty() => return Ok(labels),
            label => labels.push(label),
        }
    }
}

fn pin(label: &str, file: Option<&Path>) -> Result<Zeroizing<String>, Failure> {
    let Some(file) = file else { return secret::password(&format!("User PIN of {label}"), "--pin-file", None, false) };
    Ok(files::read_secret_line(file, LONGEST_PIN, "PIN")?)
}

/// Asks for a line; an empty one means `usual`.
fn line(prompt: &str, usual: &str) -> Result<String, Failure> {
    let mut out = std::io::stderr();
    let shown = if usual.is_empty() { String::new() } else { format!(" [{usual}]") };
    write!(out, "{prompt}{shown}: ")?;
    out.flush()?;
    let mut answer = String::new();
    if std::io::stdin().read_line(&mut answer)? == 0 {
        return Err("the input ended".into());
    }
    let answer = answer.trim();
    Ok(if answer.is_empty() { usual } else { answer }.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_flags_say_everything() {
        let ask = |module: Option<&str>, labels: &[&str], pins: &[PathBuf]| {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            Tokens::ask(None, module.map(Into::into), labels, pins.to_vec(), Vec::new())
        };
        let problem = |asked: Result<Tokens, Failure>| asked.err().unwrap().to_string();
        assert!(problem(ask(Some("lib.so"), &["a"], &[])).contains("absolute path"));
        let two = [PathBuf::from("a"), PathBuf::from("b")];
        assert!(problem(ask(Some("/proc/self/exe"), &["a"], &two)).contains("2 PIN files are for 1 tokens"));
        assert!(problem(ask(Some("/proc/self/exe"), &["a"], &two[..1])).contains("No such file"));
        assert!(matches!(Tokens::ask(Some(2), None, Vec::new(), Vec::new(), Vec::new()), Ok(Tokens::Soft(2))));
        assert_eq!(variable("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert!(variable("=b").is_err() && variable("A").is_err());
    }
}
