//! A guest whose RAM the backend can't map: every transfer is a message to QEMU.

use std::io::Write;

use super::{direct, iommu, vfio};
use crate::Result;
use crate::edu::{self, Edu};
use crate::pci::Function;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::report::Report;
use crate::vfio::Device;

/// Runs every check of a guest without an IOMMU.
///
/// # Errors
/// There is nothing to check: the function is missing.
pub(crate) fn run_direct(report: &mut Report<impl Write>) -> Result<()> {
    let function = &Function::find(edu::ID.0, edu::ID.1)?;
    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE | BUS_MASTER, true)?;
    let edu = &Edu { bar: function.map_bar(0)? };
    report.check("message-dma", || direct::dma(edu))?;
    report.check("message-dma-bus-master", || direct::dma_without_bus_master(function, edu))?;
    Ok(())
}

/// Runs every check of a guest with an IOMMU.
///
/// # Errors
/// There is nothing to check: the function is missing or vfio does not give it out.
pub(crate) fn run_vfio(report: &mut Report<impl Write>, rounds: u32) -> Result<()> {
    let function = &Function::find(edu::ID.0, edu::ID.1)?;
    let device = &Device::open(function)?;
    let edu = &Edu { bar: device.map_bar(0)? };
    device.set_command(BUS_MASTER, true)?;
    report.check("message-iommu-dma", || vfio::dma_through_iommu(device, edu))?;
    report.check("message-iommu-unmap", || vfio::dma_after_unmap(device, edu))?;
    report.check("message-iommu-unmapped", || iommu::check_unmapped(device, edu))?;
    report.check("message-iommu-read-only", || iommu::check_read_only(device, edu))?;
    report.check("message-iommu-churn", || iommu::check_churn(device, edu, rounds))?;
    report.check("message-iommu-race", || iommu::check_race(device, edu, rounds))?;
    report.check("message-iommu-msi", || vfio::msi_after_dma(device, edu))?;
    Ok(())
}
