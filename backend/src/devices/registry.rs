use std::path::Path;

use super::ivshmem::Groups;
use super::vhost_user::Bridge;
use super::virtio::pci::{CoreBacking, VirtioFunction};
use super::virtio::{Core, models};
use super::{Device, Edu, Ivshmem};
use crate::config::{ConfigError, DeviceSpec, Parameters};
use crate::dma::DmaGuard;
use crate::pci::Decoding;

/// Makes devices by name, and knows which of them belong together.
#[derive(Debug, Default)]
pub struct Registry {
    ivshmem: Groups,
}

/// What an operator may say about a function whatever its device is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `decode=strict|always`: whether the function waits to be enabled by its Command register.
    pub decode: Decoding,
    /// `romfile=FILE`: the expansion ROM.
    pub rom: Option<Vec<u8>>,
}

type Constructor = fn(&mut Parameters, &mut Registry) -> Result<Box<dyn Device>, ConfigError>;

/// Every device by name, sorted.
const DEVICES: &[(&str, Constructor)] = &[
    ("edu", |parameters, _| Ok(Box::new(Edu::from_parameters(parameters)?))),
    ("ivshmem", |parameters, registry| {
        Ok(Box::new(Ivshmem::from_parameters(parameters, &mut registry.ivshmem)?))
    }),
    #[cfg(feature = "failpoints")]
    ("test-crash", |_, _| Ok(Box::new(super::TestCrash::default()))),
    ("vhost-user", |parameters, _| {
        let bridge = Bridge::from_parameters(parameters)?;
        Ok(Box::new(VirtioFunction::new(Box::new(bridge))?))
    }),
];

/// The largest ROM that is taken, in bytes: what a 24-bit ROM address register can size.
const MAX_ROM: u64 = 16 << 20;

impl Registry {
    /// Creates the device that `spec` describes.
    ///
    /// # Errors
    /// [`ConfigError`] that names the device or parameter and the reason.
    pub fn create(&mut self, spec: DeviceSpec) -> Result<(Box<dyn Device>, Options), ConfigError> {
        let own = DEVICES.iter().find(|(name, _)| *name == spec.name);
        let own = own.map(|(_, constructor)| Made::By(*constructor));
        let virtio = || models::constructor(&spec.name).map(Made::OfCore);
        let Some(made) = own.or_else(virtio) else {
            let own = DEVICES.iter().map(|(name, _)| *name);
            let mut known = own.chain(models::NAMES).collect::<Vec<_>>().join(", ");
            if cfg!(feature = "passthrough") {
                // It is made elsewhere: it has no model.
                known.push_str(", passthrough");
            }
            return Err(ConfigError::UnknownDevice { name: spec.name, known });
        };
        let mut parameters = spec.parameters;
        let options = Options::from_parameters(&mut parameters)?;
        let device = match made {
            Made::By(constructor) => constructor(&mut parameters, self)?,
            Made::OfCore(constructor) => virtio_function(constructor(&mut parameters)?)?,
        };
        parameters.finish()?;
        Ok((device, options))
    }
}

/// How a device comes to be.
enum Made {
    By(Constructor),
    /// It is a virtio device, and gets a function.
    OfCore(models::Constructor<DmaGuard>),
}

/// A virtio device whose queues this process serves, over PCI.
fn virtio_function(core: Box<dyn Core<DmaGuard>>) -> Result<Box<dyn Device>, ConfigError> {
    let backing = CoreBacking::new(core).map_err(|errno| ConfigError::invalid("queues", errno))?;
    Ok(Box::new(VirtioFunction::new(Box::new(backing))?))
}

impl Options {
    fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        let decode = match parameters.take_string("decode").as_deref() {
            None | Some("strict") => Decoding::Strict,
            Some("always") => Decoding::Always,
            Some(other) => {
                let reason = format!("'{other}' is neither strict nor always");
                return Err(ConfigError::invalid("decode", reason));
            }
        };
        let rom =
            parameters.take_string("romfile").map(|path| rom(Path::new(&path))).transpose()?;
        Ok(Self { decode, rom })
    }
}

fn rom(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let invalid = |reason: &dyn std::fmt::Display| {
        ConfigError::invalid("romfile", format!("{}: {reason}", path.display()))
    };
    let length = std::fs::metadata(path).map_err(|error| invalid(&error))?.len();
    if !(1..=MAX_ROM).contains(&length) {
        return Err(invalid(&format!("{length} bytes, not 1 to {MAX_ROM}")));
    }
    std::fs::read(path).map_err(|error| invalid(&error))
}
