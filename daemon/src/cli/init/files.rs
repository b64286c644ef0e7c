//! The files of a new service: configuration, PINs, state folder; readable for the daemon's user.

use std::fs::{self, DirBuilder, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use claviger_client::files::{self, Existing, FileError};
use claviger_hsm::set_env;

use super::answers::Tokens;
use crate::cli::place;
use crate::config::{Config, Hsm, PinSource, Tls, TokenName};
use crate::lab;
use crate::sys::failure::Failure;
use crate::sys::print::say;
use crate::sys::{ownership, process};

/// The user of the package.
const USER: &str = "claviger";
const USUAL_STATE: &str = "/var/lib/claviger";
const USUAL_SOCKETS: &str = "/run/claviger";
const UNIT: &str = "/usr/lib/systemd/system/claviger.service";

/// Who runs the daemon.
pub(super) enum Owner {
    /// The user who runs this command.
    This,
    /// Another user, for whom root makes the files.
    Other { uid: u32, gid: u32 },
}

impl Owner {
    pub(super) fn of(user: Option<&str>) -> Result<Self, Failure> {
        let is_root = rustix::process::geteuid().is_root();
        match (user, process::user_ids(user.unwrap_or(USER))) {
            (Some(user), _) if !is_root => Err(format!("only root makes files for the user {user}").into()),
            (Some(user), None) => Err(format!("there is no user {user}").into()),
            (_, Some((uid, gid))) if is_root => Ok(Self::Other { uid, gid }),
            _ => Ok(Self::This),
        }
    }

    /// Lets the daemon read a file, and nobody but root write it.
    fn lets_read(&self, path: &Path) -> Result<(), Failure> {
        self.shares(path, 0o640)
    }

    /// Lets the daemon enter a folder, and nobody but root write to it.
    fn lets_enter(&self, path: &Path) -> Result<(), Failure> {
        self.shares(path, 0o750)
    }

    fn shares(&self, path: &Path, mode: u32) -> Result<(), Failure> {
        if let Self::Other { gid, .. } = self {
            chown(path, Some(0), Some(*gid)).map_err(FileError::of(path))?;
            fs::set_permissions(path, Permissions::from_mode(mode)).map_err(FileError::of(path))?;
        }
        Ok(())
    }

    /// Gives the daemon a folder with everything in it.
    fn owns(&self, path: &Path) -> Result<(), Failure> {
        let Self::Other { uid, gid } = self else { return Ok(()) };
        Ok(ownership::give(path, *uid, *gid).map_err(FileError::of(path))?)
    }
}

/// What the flags say beside the tokens.
pub(super) struct Settings {
    pub(super) state: PathBuf,
    pub(super) sockets: Option<PathBuf>,
    pub(super) listen: Option<SocketAddr>,
    pub(super) metrics: SocketAddr,
    /// Certificate and key.
    pub(super) tls: Option<(PathBuf, PathBuf)>,
}

/// Writes PINs and configuration; the configuration comes last, so that an interrupted run starts over.
pub(super) fn write(file: &Path, settings: Settings, tokens: Tokens, owner: &Owner) -> Result<(), Failure> {
    let folder = files::folder(file);
    make_folder(folder, |folder| owner.lets_enter(folder))?;
    let state = std::path::absolute(&settings.state)?;
    make_folder(&state, |state| owner.owns(state))?;
    let mut config = Config::default();
    let (env, members) = match tokens {
        Tokens::Soft(count) => {
            let folder = state.join("soft-tokens");
            if folder.exists() {
                // Without a configuration that names them, they are of a run that did not end.
                fs::remove_dir_all(&folder).map_err(FileError::of(&folder))?;
            }
            let made = lab::soft_tokens(&folder, count.into())?;
            owner.owns(&folder)?;
            say!("made      {count} soft tokens in {}", folder.display());
            made
        }
        Tokens::Vendor { module, env, tokens } => {
            let pins = folder.join("pins");
            make_folder(&pins, |pins| owner.lets_enter(pins))?;
            let mut members = Vec::with_capacity(tokens.len());
            for (at, token) in tokens.into_iter().enumerate() {
                let name = lab::member_name(at);
                let pin_file = pins.join(format!("{name}.pin"));
                files::write(&pin_file, token.pin.as_bytes(), Existing::Replace)?;
                owner.lets_read(&pin_file)?;
                say!("written   {}", pin_file.display());
                members.push(Hsm::new(name, module.clone(), TokenName::Label(token.label), PinSource::File(pin_file)));
            }
            (env.into_iter().collect(), members)
        }
    };
    set_env(&env);
    config.env = env;
    config.hsm = members;
    let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
    let usual = if settings.tls.is_some() { any(443) } else { config.server.listen };
    config.server.listen = settings.listen.unwrap_or(usual);
    config.server.metrics = settings.metrics;
    config.server.sockets = match settings.sockets {
        Some(sockets) => Some(std::path::absolute(sockets)?),
        None => (state == Path::new(USUAL_STATE)).then(|| USUAL_SOCKETS.into()),
    };
    config.server.state = state;
    for (group, setting) in
        [("claviger-admin", &mut config.server.admin_group), ("claviger-review", &mut config.server.review_group)]
    {
        // Of a service in its usual place only: elsewhere the groups could not enter the folder of the sockets.
        if config.server.sockets.as_deref() == Some(Path::new(USUAL_SOCKETS)) && process::group_id(group).is_ok() {
            *setting = Some(group.to_owned());
        }
    }
    if let Some((certificate, key)) = settings.tls {
        config.server.tls = Some(Tls::new(std::path::absolute(certificate)?, std::path::absolute(key)?));
    }
    let text = format!(
        "# Written by claviger init. Every setting that is not here has its default; see claviger.toml(5).\n\n{}",
        toml::to_string(&changed(&config)?)?
    );
    files::write(file, text.as_bytes(), Existing::Keep)?;
    owner.lets_read(file)?;
    say!("written   {}: {} tokens", file.display(), config.hsm.len());
    Ok(())
}

/// The settings that differ from their defaults, and the members.
fn changed(config: &Config) -> Result<toml::Table, toml::ser::Error> {
    let mut settings = toml::Table::try_from(config)?;
    let defaults = toml::Table::try_from(Config::default())?;
    remove_equal(&mut settings, &defaults);
    Ok(settings)
}

fn remove_equal(table: &mut toml::Table, defaults: &toml::Table) {
    table.retain(|name, value| match (value, defaults.get(name)) {
        (toml::Value::Table(inner), Some(toml::Value::Table(defaults))) => {
            remove_equal(inner, defaults);
            !inner.is_empty()
        }
        (value, default) => default != Some(value),
    });
}

/// Makes a folder. One that exists stays as it is.
fn make_folder(path: &Path, made: impl Fn(&Path) -> Result<(), Failure>) -> Result<(), Failure> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(FileError::of(path))?;
    made(path)
}

/// The command that starts the daemon: with systemd if its unit is installed and the configuration is in its place.
pub(super) fn start_command(file: &Path) -> String {
    if file == Path::new(place::CONFIGURATION) && Path::new(UNIT).exists() {
        "systemctl enable --now claviger".to_owned()
    } else {
        format!("claviger serve --config {}", file.display())
    }
}

/// A command with the option that names the configuration, where it is needed.
pub(super) fn with_config(command: &str, file: &Path) -> String {
    if file == Path::new(place::CONFIGURATION) {
        command.to_owned()
    } else {
        format!("{command} --config {}", file.display())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_from_the_defaults_is_written() {
        let mut config = Config::default();
        config.server.metrics = SocketAddr::from(([127, 0, 0, 1], 1));
        config.env.insert("A".to_owned(), "b".to_owned());
        let text = toml::to_string(&changed(&config).unwrap()).unwrap();
        assert_eq!(text, "[env]\nA = \"b\"\n\n[server]\nmetrics = \"127.0.0.1:1\"\n");
    }
}
