//! What an operator writes: device specifications as in QEMU's `-device`.

mod device_spec;

#[cfg(test)]
mod tests;

pub use device_spec::{DeviceSpec, Parameters};

use thiserror::Error;

/// What is wrong with a device specification; one line for the operator.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// No device has this name.
    #[error("unknown device '{name}' (known: {known})")]
    UnknownDevice {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The specification does not start with a name.
    #[error("device name is missing")]
    NoName,
    /// A parameter without `=`.
    #[error("parameter '{0}' is not of the form key=value")]
    NotKeyValue(String),
    /// A parameter given twice.
    #[error("parameter '{0}' is given twice")]
    Duplicate(String),
    /// A parameter that the device does not have.
    #[error("unknown parameter '{0}'")]
    UnknownParameter(String),
    /// A parameter that the device needs.
    #[error("parameter '{0}' is missing")]
    Missing(&'static str),
    /// A value that can't be used.
    #[error("parameter '{parameter}': {reason}")]
    Invalid {
        /// Whose value.
        parameter: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl ConfigError {
    /// An unusable value.
    pub fn invalid(parameter: &'static str, reason: impl ToString) -> Self {
        Self::Invalid { parameter, reason: reason.to_string() }
    }
}
