//! A real PCI function, which the kernel's VFIO gives to this process.
//!
//! It is no [`Device`](super::Device): it has registers of its own, and no model of ours knows better.
//! [`VfioFunction`] keeps what the kernel leaves to its user: which interrupts are enabled, which bits
//! of configuration space a VM may see, what decodes at this moment.
//!
//! The kernel is behind [`VfioDevice`] and [`Iommu`](crate::dma::Iommu), so that everything but the
//! ioctls themselves is tested without hardware.

mod address;
mod config_policy;
mod device;
#[cfg(test)]
pub(crate) mod fake;
mod function;
mod interrupts;
mod ioctl;
mod kernel;
mod map_bars;
mod msix_table;
mod open_error;
mod placed;

#[cfg(test)]
mod tests;

pub use address::{NoPciAddress, PciAddress};
pub use config_policy::{ConfigPolicy, Layout, MessageEnables, MsixTablePlace};
pub use device::{
    Description, IrqCommand, IrqDescription, RegionDescription, VfioDevice, VfioIrq, VfioRegion,
};
pub use function::{Completion, VfioFunction};
pub use interrupts::{IrqRequest, VfioIrqError};
pub use map_bars::{MapBars, NoMapBars};
pub use open_error::OpenError;

use std::ffi::OsStr;
use std::fs::read_link;
use std::path::{Path, PathBuf};

use crate::config::{ConfigError, DeviceSpec};
use crate::dma::DmaTable;

/// The kernel's own limit for one container, and what the protocol announces (`dma_entry_limit` of
/// vfio_iommu_type1).
const MAX_WINDOWS: usize = 65535;
/// Where the kernel lists PCI functions.
const SYSFS: &str = "/sys/bus/pci/devices";

/// What an operator calls it.
pub const NAME: &str = "passthrough";

/// Opens the device that `spec` describes: `host=BDF[,map=auto|always|never]`.
///
/// # Errors
/// [`ConfigError`] that names the parameter and says what to do.
pub fn create(spec: DeviceSpec) -> Result<(VfioFunction, MapBars), ConfigError> {
    let mut parameters = spec.parameters;
    let host = parameters.take_string("host").ok_or(ConfigError::Missing("host"))?;
    let address =
        host.parse::<PciAddress>().map_err(|error| ConfigError::invalid("host", error))?;
    let map = match parameters.take_string("map") {
        Some(map) => map.parse().map_err(|error| ConfigError::invalid("map", error))?,
        None => MapBars::default(),
    };
    parameters.finish()?;
    let function = open(address).map_err(|error| ConfigError::invalid("host", error))?;
    Ok((function, map))
}

/// Opens a device and takes it over.
///
/// # Errors
/// [`OpenError`], which says what to do.
pub fn open(address: PciAddress) -> Result<VfioFunction, OpenError> {
    let group = iommu_group(Path::new(SYSFS), address)?;
    let (device, description, iommu) = kernel::open(address, &group)?;
    let dma = DmaTable::behind(Box::new(iommu), MAX_WINDOWS);
    VfioFunction::new(Box::new(device), description, dma)
        .map_err(|errno| OpenError::Step { what: "taking the device over", errno })
}

/// The number of the IOMMU group of a function that is ready to be passed through.
fn iommu_group(sysfs: &Path, address: PciAddress) -> Result<String, OpenError> {
    let function = sysfs.join(address.to_string());
    if !function.exists() {
        return Err(OpenError::NoDevice(address));
    }
    // Before the driver: vfio-pci refuses what has no group, so binding it would not help.
    let group = link_name(&function.join("iommu_group")).ok_or(OpenError::NoGroup(address))?;
    let driver = link_name(&function.join("driver"));
    // Vendors have variants of the driver, such as mlx5_vfio_pci.
    if !driver.as_ref().is_some_and(|driver| driver.replace('_', "-").contains("vfio-pci")) {
        return Err(OpenError::NotBound { address, driver });
    }
    Ok(group)
}

/// The last part of what a symbolic link points to.
fn link_name(link: &Path) -> Option<String> {
    let target: PathBuf = read_link(link).ok()?;
    target.file_name().and_then(OsStr::to_str).map(str::to_owned)
}
