//! Selects the running daemon and the configuration file that a command is about.
//!
//! `--socket`, then `--config`, then `CLAVIGER_SOCKET`, then `CLAVIGER_CONFIG`, then the places where the package puts them.
//! The socket comes before the configuration: administrators of a group may use the socket without being able to read
//! the configuration.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::sys::failure::Failure;

/// The administrators' socket of the packaged service.
pub const SOCKET: &str = "/run/claviger/admin.sock";
/// The configuration of the packaged service.
pub const CONFIGURATION: &str = "/etc/claviger/claviger.toml";
/// Environment variable with the path of the administrators' socket.
pub const SOCKET_VARIABLE: &str = "CLAVIGER_SOCKET";
/// Environment variable with the path of the configuration.
pub const CONFIGURATION_VARIABLE: &str = "CLAVIGER_CONFIG";

/// How the daemon is found.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Socket(PathBuf),
    Configuration(PathBuf),
}

/// What the command line and the environment say.
#[derive(Default)]
struct Said {
    socket: Option<PathBuf>,
    config: Option<PathBuf>,
    socket_variable: Option<PathBuf>,
    config_variable: Option<PathBuf>,
}

impl Said {
    fn place(self, exists: impl Fn(&Path) -> bool) -> Option<Place> {
        let said = self.socket.map(Place::Socket).or(self.config.map(Place::Configuration));
        let variable = || self.socket_variable.map(Place::Socket).or(self.config_variable.map(Place::Configuration));
        let there = |path: &str| exists(Path::new(path)).then(|| PathBuf::from(path));
        said.or_else(variable)
            .or_else(|| there(SOCKET).map(Place::Socket))
            .or_else(|| there(CONFIGURATION).map(Place::Configuration))
    }
}

/// The path of the administrators' socket of the daemon that is meant.
///
/// # Errors
/// The configuration is invalid, or nothing says where the daemon is.
pub(super) fn socket(socket: Option<&Path>, config: Option<&Path>) -> Result<PathBuf, Failure> {
    let said = Said {
        socket: socket.map(Path::to_owned),
        config: config.map(Path::to_owned),
        socket_variable: path_variable(SOCKET_VARIABLE),
        config_variable: path_variable(CONFIGURATION_VARIABLE),
    };
    // A folder that this user may not enter hides its files.
    match said.place(|path| path.symlink_metadata().is_ok()) {
        Some(Place::Socket(socket)) => Ok(socket),
        Some(Place::Configuration(file)) => Ok(Config::load(&file)?.server.admin_socket()),
        None => Err(format!(
            "no daemon is found: neither {SOCKET} nor {CONFIGURATION} can be seen by this user; start the service, or say \
             which daemon is meant: --socket PATH or --config FILE"
        )
        .into()),
    }
}

/// The configuration file that is meant: the given one, that of the environment, or that of the package.
#[must_use]
pub fn configuration(given: Option<PathBuf>) -> PathBuf {
    given.or_else(|| path_variable(CONFIGURATION_VARIABLE)).unwrap_or_else(|| CONFIGURATION.into())
}

/// The value of an environment variable. An empty value counts as not set.
pub(super) fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// An environment variable with a path.
pub(super) fn path_variable(name: &str) -> Option<PathBuf> {
    variable(name).map(PathBuf::from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_comes_before_the_environment_and_a_socket_before_a_configuration() {
        let path = |name: &str| Some(PathBuf::from(name));
        let all =
            || Said { socket: path("s"), config: path("c"), socket_variable: path("S"), config_variable: path("C") };
        let socket = |path: &str| Some(Place::Socket(path.into()));
        let configuration = |path: &str| Some(Place::Configuration(path.into()));
        assert_eq!(all().place(|_| true), socket("s"));
        assert_eq!(Said { socket: None, ..all() }.place(|_| true), configuration("c"));
        let environment = || Said { socket: None, config: None, ..all() };
        assert_eq!(environment().place(|_| true), socket("S"));
        assert_eq!(Said { socket_variable: None, ..environment() }.place(|_| true), configuration("C"));
        assert_eq!(Said::default().place(|_| true), socket(SOCKET));
        assert_eq!(Said::default().place(|path| path == Path::new(CONFIGURATION)), configuration(CONFIGURATION));
        assert_eq!(Said::default().place(|_| false), None);
    }
}
