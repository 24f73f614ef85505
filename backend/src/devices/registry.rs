use super::{Device, Edu, Ivshmem};
use crate::config::{ConfigError, DeviceSpec};

type Constructor = fn(&mut crate::config::Parameters) -> Result<Box<dyn Device>, ConfigError>;

/// Every device by name, sorted.
const DEVICES: [(&str, Constructor); 2] = [
    ("edu", |parameters| Ok(Box::new(Edu::from_parameters(parameters)?))),
    ("ivshmem", |parameters| Ok(Box::new(Ivshmem::from_parameters(parameters)?))),
];

/// Creates the device that `spec` describes.
///
/// # Errors
/// [`ConfigError`] that names the device or parameter and the reason.
pub fn create(spec: DeviceSpec) -> Result<Box<dyn Device>, ConfigError> {
    let Some((_, constructor)) = DEVICES.iter().find(|(name, _)| *name == spec.name) else {
        let mut known = DEVICES.map(|(name, _)| name).join(", ");
        if cfg!(feature = "passthrough") {
            // It is made elsewhere: it has no model.
            known.push_str(", passthrough");
        }
        return Err(ConfigError::UnknownDevice { name: spec.name, known });
    };
    let mut parameters = spec.parameters;
    let device = constructor(&mut parameters)?;
    parameters.finish()?;
    Ok(device)
}
