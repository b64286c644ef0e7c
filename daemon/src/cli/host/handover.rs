//! Passes secrets to another program through pipes, which are kernel memory, and never through a file.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use claviger_client::vault::secrets::{SecretError, Secrets, check_name};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::sys::failure::Failure;

/// A secret and its destination descriptor: `NAME=FD`.
#[derive(Clone, Debug)]
pub struct Give {
    pub(super) name: String,
    pub(super) fd: u32,
}

/// Parses `NAME=FD` from the command line.
pub(super) fn parse_give(text: &str) -> Result<Give, String> {
    let (name, fd) = text.split_once('=').ok_or("write it like state-key=3")?;
    check_name(name).map_err(|error| error.to_string())?;
    match fd.parse() {
        Ok(fd) if fd >= super::options::FIRST_FD => Ok(Give { name: name.to_owned(), fd }),
        _ => Err("a descriptor is a number from 3 on".to_owned()),
    }
}

/// Writes each secret to its descriptor.
pub(super) fn give(secrets: &Secrets, wanted: &[Give], files: Vec<File>) -> Result<(), Failure> {
    for (wanted, mut file) in wanted.iter().zip(files) {
        let written = file.write_all(secrets.get(&wanted.name)?);
        written.map_err(|e| format!("the secret {} could not be handed over: {e}; run it again", wanted.name))?;
    }
    Ok(())
}

/// A pipe that contains this secret and is inherited by the next program. No secret is larger than a pipe's buffer.
pub(super) fn inherited_pipe(secret: &[u8]) -> io::Result<PipeReader> {
    let (reader, mut writer) = io::pipe()?;
    writer.write_all(secret)?;
    fcntl_setfd(&reader, FdFlags::empty())?;
    Ok(reader)
}

/// A program to run. Each `{NAME}` in its arguments is a placeholder for a descriptor number.
#[derive(Debug)]
pub(super) struct Template<'a>(pub(super) &'a [OsString]);

impl Template<'_> {
    /// The secrets that the arguments name.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.fill(|name| {
            names.push(name.to_owned());
            String::new()
        });
        names.sort();
        names.dedup();
        names
    }

    /// Replaces each placeholder by the result of `number`.
    pub(super) fn fill(&self, mut number: impl FnMut(&str) -> String) -> Vec<OsString> {
        self.0.iter().map(|argument| fill(argument.as_bytes(), &mut number)).collect()
    }
}

fn fill(mut rest: &[u8], number: &mut impl FnMut(&str) -> String) -> OsString {
    let mut out = Vec::new();
    while let Some(open) = rest.iter().position(|byte| *byte == b'{') {
        let (before, from) = rest.split_at(open);
        out.extend_from_slice(before);
        let close = from.iter().position(|byte| *byte == b'}');
        let name = close.and_then(|close| std::str::from_utf8(&from[1..close]).ok());
        match (close, name) {
            (Some(close), Some(name)) if check_name(name).is_ok() => {
                out.extend_from_slice(number(name).as_bytes());
                rest = &from[close + 1..];
            }
            // These braces belong to the program's own arguments.
            _ => {
                out.push(b'{');
                rest = &from[1..];
            }
        }
    }
    out.extend_from_slice(rest);
    OsString::from_vec(out)
}

/// Creates pipes for the secrets that the arguments name, and fills in their numbers.
pub(super) fn fill_with_pipes(
    template: &Template<'_>,
    secrets: &Secrets,
) -> Result<(Vec<OsString>, Vec<PipeReader>), Failure> {
    let names = template.names();
    let mut pipes = Vec::with_capacity(names.len());
    for name in &names {
        let pipe = inherited_pipe(secrets.get(name)?);
        pipes.push(pipe.map_err(|e| format!("the secret {name} could not be handed over: {e}"))?);
    }
    let number = |name: &str| {
        let at = names.iter().position(|known| known == name).unwrap_or_default();
        pipes[at].as_raw_fd().to_string()
    };
    let arguments = template.fill(number);
    Ok((arguments, pipes))
}

/// Fails if the vault lacks a required secret.
pub(super) fn has_all(secrets: &Secrets, names: &[String]) -> Result<(), SecretError> {
    names.iter().try_for_each(|name| secrets.get(name).map(|_| ()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn names_in_braces_become_numbers_and_other_braces_stay() {
        let arguments = ["--key", "fd={state-key},x={disk}", "{}", "{No}", "{", "a{b", "{{disk}}"].map(OsString::from);
        let template = Template(&arguments);
        assert_eq!(template.names(), ["disk", "state-key"]);
        let filled = template.fill(|name| name.len().to_string());
        assert_eq!(filled, ["--key", "fd=9,x=4", "{}", "{No}", "{", "a{b", "{4}"].map(OsString::from));
    }

    #[test]
    fn a_pipe_holds_the_longest_secret_without_a_reader() {
        let longest = vec![7; claviger_client::vault::secrets::MAX_VALUE];
        let mut reader = inherited_pipe(&longest).unwrap();
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, longest);
    }

    #[test]
    fn a_secret_goes_to_a_descriptor_from_3_on() {
        let given = parse_give("state-key=3").unwrap();
        assert_eq!((given.name.as_str(), given.fd), ("state-key", 3));
        for wrong in ["state-key", "state-key=2", "state-key=x", "=3", "A=3"] {
            assert!(parse_give(wrong).is_err(), "{wrong}");
        }
    }
}
