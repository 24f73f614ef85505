//! Functions behind the guest's IOMMU: mappings, messages and vectors that come and go while the workers
//! that know them are killed.

use std::io::Write;

use super::super::direct::IVSHMEM_ID;
use super::super::{iommu, msix};
use super::kernel;
use super::kills::Kills;
use crate::edu::{self, Edu, register};
use crate::pci::Function;
use crate::pci::command::BUS_MASTER;
use crate::report::Report;
use crate::vfio::{Device, Interrupt};
use crate::{Result, ensure};

/// Rounds of each check between two looks at whether there were kills enough.
const ROUNDS: u32 = 3;
/// As many transfers as leave time for mappings beside them.
const TRANSFERS: u32 = 400;

pub(super) fn run_all(report: &mut Report<impl Write>) -> Result<()> {
    kernel::look_for_hung_tasks();
    let function = Function::find(edu::ID.0, edu::ID.1)?;
    let device = &Device::open(&function)?;
    device.set_command(BUS_MASTER, true)?;
    let edu = &Edu { bar: device.map_bar(0)? };
    report.check("mapped-dma", || {
        let rounds = Kills::begin("edu")?.during(|_| {
            iommu::check_remap(device, edu, ROUNDS)?;
            iommu::check_unmap_many(device, edu)?;
            iommu::check_read_only(device, edu)?;
            iommu::check_unmapped(device, edu)?;
            Ok(())
        })?;
        Ok(format!("{rounds} rounds"))
    })?;
    report.check("mapped-churn", || {
        let rounds = Kills::begin("edu")?.during(|_| {
            iommu::check_churn(device, edu, TRANSFERS)?;
            iommu::check_race(device, edu, ROUNDS)?;
            Ok(())
        })?;
        Ok(format!("{rounds} rounds"))
    })?;
    report.check("mapped-msi", || {
        let rounds = Kills::begin("edu")?.during(|_| messages(device, edu))?;
        Ok(format!("{rounds} rounds"))
    })?;
    let function = Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    let device = &Device::open(&function)?;
    device.set_command(BUS_MASTER, true)?;
    report.check("mapped-vectors", || {
        let rounds =
            Kills::begin("doorbell")?.during(|_| msix::every_vector_arrives(&function, device))?;
        Ok(format!("{rounds} rounds"))
    })?;
    report.check("kernel-quiet", || kernel::is_quiet(&[]))?;
    Ok(())
}

/// No message is lost. One too many may arrive of a worker that was killed after it had sent it.
fn messages(device: &Device, edu: &Edu) -> Result<()> {
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    for _ in 0..ROUNDS {
        let arrivals = device.enable(Interrupt::Msi)?;
        for bit in 0..32 {
            edu.write(register::INTERRUPT_RAISE, 1 << bit);
            arrivals.wait().map_err(|error| format!("bit {bit}: {error}"))?;
            let raised = edu.read(register::INTERRUPT_STATUS);
            ensure!(raised == 1 << bit, "{raised:#x} is raised, not bit {bit}");
            edu.write(register::INTERRUPT_ACKNOWLEDGE, 1 << bit);
        }
    }
    Ok(())
}
