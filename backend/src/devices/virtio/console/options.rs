use std::path::{Path, PathBuf};

use crate::config::{ConfigError, Parameters};

/// Where the host reaches a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Options {
    /// `socket=PATH`: it listens there; one client at a time.
    Socket(PathBuf),
    /// `pty=PATH`: a symbolic link there leads to a pseudoterminal.
    Pty(PathBuf),
}

impl Options {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Socket(path) | Self::Pty(path) => path,
        }
    }

    /// Takes them.
    ///
    /// # Errors
    /// [`ConfigError`] unless there is exactly one path.
    pub(super) fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let socket = parameters.take_string("socket");
        match (socket, parameters.take_string("pty")) {
            (Some(path), None) => Ok(Self::Socket(path.into())),
            (None, Some(path)) => Ok(Self::Pty(path.into())),
            (Some(_), Some(_)) => Err(ConfigError::invalid("pty", "there is socket already")),
            (None, None) => Err(ConfigError::invalid("socket", "missing, and so is pty")),
        }
    }
}
