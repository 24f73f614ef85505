//! A guest with an IOMMU: its own vfio-pci owns `edu`, takes the interrupts on eventfds and says
//! which memory the function may reach.

use std::io::Write;

use super::direct::IVSHMEM_ID;
use super::{identity, iommu, shared_memory};
use crate::edu::{self, Edu, register};
use crate::memory::{DmaPage, PAGE_SIZE};
use crate::mmio::Mapping;
use crate::pci::Function;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::report::Report;
use crate::vfio::{Device, Enabled, Interrupt};
use crate::{Result, ensure};

/// Bus addresses within the 28 bits that the function drives, unlike any physical address in use.
const FIRST_IOVA: u64 = 0x0800_0000;
const SECOND_IOVA: u64 = 0x0900_0000;

/// Runs every check of this kind of guest.
///
/// # Errors
/// There is nothing to check: a function is missing or vfio does not give it out.
pub(crate) fn run(report: &mut Report<impl Write>, nonce: &str, rounds: u32) -> Result<()> {
    let function = &Function::find(edu::ID.0, edu::ID.1)?;
    let ivshmem = &Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    report.check("second-client-served", || second_client(function))?;
    ivshmem.set_attribute("enable", "1")?;
    ivshmem.set_command(MEMORY_SPACE, true)?;
    let memory = &ivshmem.map_bar(2)?;
    report.check("ivshmem-persists", || persists(memory, nonce))?;

    let opened = Device::open(function)?;
    let device = &opened;
    let mapped = Edu { bar: device.map_bar(0)? };
    let edu = &mapped;
    device.set_command(BUS_MASTER, true)?;
    report.check("intx", || intx(device, edu))?;
    report.check("intx-level", || intx_is_a_level(device, edu))?;
    report.check("msi", || msi(device, edu))?;
    report.check("msi-after-dma", || msi_after_dma(device, edu))?;
    report.check("msi-bus-master", || msi_without_bus_master(device, edu))?;
    report.check("iommu-dma", || dma_through_iommu(device, edu))?;
    report.check("iommu-unmap", || dma_after_unmap(device, edu))?;
    report.check("iommu-unmapped", || iommu::check_unmapped(device, edu))?;
    report.check("iommu-read-only", || iommu::check_read_only(device, edu))?;
    report.check("iommu-unmap-many", || iommu::check_unmap_many(device, edu))?;
    report.check("iommu-remap", || iommu::check_remap(device, edu, rounds))?;
    report.check("iommu-churn", || iommu::check_churn(device, edu, rounds))?;
    report.check("iommu-race", || iommu::check_race(device, edu, rounds))?;
    // The kernel keeps a device open while a BAR of it is mapped.
    drop(mapped);
    report.check("iommu-close", || iommu::check_close(opened, function))?;
    Ok(())
}

/// The client before this one left the function dirty.
fn second_client(function: &Function) -> Result<String> {
    identity::check(function, &identity::EDU)?;
    function.set_attribute("enable", "1")?;
    let edu = Edu { bar: function.map_bar(0)? };
    let liveness = edu.read(register::LIVENESS);
    ensure!(liveness == 0, "liveness reads {liveness:#x}, left by the client before");
    let id = edu.read(register::IDENTIFICATION);
    ensure!(id == edu::IDENTIFICATION_VALUE, "identification {id:#010x}");
    drop(edu);
    // As vfio-pci expects to find it.
    function.set_attribute("enable", "0")?;
    Ok("found in its reset state".into())
}

fn persists(memory: &Mapping, nonce: &str) -> Result<String> {
    let half = shared_memory::guest_half(memory);
    shared_memory::compare(memory, 0, half, &shared_memory::host_line(nonce))?;
    shared_memory::compare(memory, half, half, &shared_memory::guest_line(nonce))
}

fn intx(device: &Device, edu: &Edu) -> Result<String> {
    let arrivals = enable(device, edu, Interrupt::Intx)?;
    for value in [0x1, 0x8000_0000] {
        edu.write(register::INTERRUPT_RAISE, value);
        arrivals.wait().map_err(|error| format!("raising {value:#x}: {error}"))?;
        acknowledge(edu, value)?;
        arrivals.unmask()?;
    }
    arrivals.expect_none()?;
    Ok("two interrupts, none after the acknowledgement".into())
}

/// INTx stays asserted until it is acknowledged: unmasking it before makes it arrive again.
fn intx_is_a_level(device: &Device, edu: &Edu) -> Result<String> {
    let arrivals = enable(device, edu, Interrupt::Intx)?;
    edu.write(register::INTERRUPT_RAISE, 0x2);
    for round in 0..3 {
        arrivals.wait().map_err(|error| format!("round {round}: {error}"))?;
        arrivals.unmask()?;
    }
    arrivals.wait()?;
    acknowledge(edu, 0x2)?;
    arrivals.unmask()?;
    arrivals.expect_none()?;
    Ok("arrives again until acknowledged".into())
}

fn msi(device: &Device, edu: &Edu) -> Result<String> {
    let arrivals = enable(device, edu, Interrupt::Msi)?;
    for value in [0x1, 0x8000_0000] {
        edu.write(register::INTERRUPT_RAISE, value);
        let count = arrivals.wait().map_err(|error| format!("raising {value:#x}: {error}"))?;
        ensure!(count == 1, "{count} interrupts for one message");
        acknowledge(edu, value)?;
    }
    Ok("two messages".into())
}

/// A message must not overtake the data it announces.
pub(super) fn msi_after_dma(device: &Device, edu: &Edu) -> Result<String> {
    const DMA_DONE: u32 = 0x100;
    let page = DmaPage::filled_with(0x44)?;
    let arrivals = enable(device, edu, Interrupt::Msi)?;
    device.map_dma(&page, FIRST_IOVA)?;
    edu.dma_from_ram(FIRST_IOVA, PAGE_SIZE as u64)?;
    page.store(&[0; PAGE_SIZE]);
    edu.start_dma_to_ram(FIRST_IOVA, PAGE_SIZE as u64);
    arrivals.wait()?;
    let contents = page.contents();
    device.unmap_dma(FIRST_IOVA)?;
    ensure!(contents.iter().all(|&byte| byte == 0x44), "the data is not there yet");
    acknowledge(edu, DMA_DONE)?;
    Ok("the data came first".into())
}

/// A message is a memory write: with Bus Master Enable clear there is none.
fn msi_without_bus_master(device: &Device, edu: &Edu) -> Result<String> {
    let arrivals = enable(device, edu, Interrupt::Msi)?;
    device.set_command(BUS_MASTER, false)?;
    edu.write(register::INTERRUPT_RAISE, 0x4);
    let absent = arrivals.expect_none();
    let acknowledged = acknowledge(edu, 0x4);
    device.set_command(BUS_MASTER, true)?;
    absent?;
    acknowledged?;

    edu.write(register::INTERRUPT_RAISE, 0x8);
    let count = arrivals.wait()?;
    ensure!(count == 1, "{count} interrupts for one message");
    acknowledge(edu, 0x8)?;
    arrivals.expect_none()?;
    Ok("no message, works again after".into())
}

pub(super) fn dma_through_iommu(device: &Device, edu: &Edu) -> Result<String> {
    let sent: Vec<u8> = (0..PAGE_SIZE).map(|n| (n * 5 + n / 256).to_le_bytes()[0]).collect();
    let source = DmaPage::filled_with(0)?;
    source.store(&sent);
    let target = DmaPage::filled_with(0xee)?;
    device.map_dma(&source, FIRST_IOVA)?;
    device.map_dma(&target, SECOND_IOVA)?;
    edu.dma_from_ram(FIRST_IOVA, PAGE_SIZE as u64)?;
    edu.dma_to_ram(SECOND_IOVA, PAGE_SIZE as u64)?;
    let received = target.contents();
    device.unmap_dma(FIRST_IOVA)?;
    device.unmap_dma(SECOND_IOVA)?;
    ensure!(received == sent, "what came back is not what went out");
    Ok(format!("4096 bytes from {FIRST_IOVA:#x} to {SECOND_IOVA:#x}"))
}

/// Memory that the IOMMU took away is out of reach, even at an address that worked before.
pub(super) fn dma_after_unmap(device: &Device, edu: &Edu) -> Result<String> {
    let page = DmaPage::filled_with(0x55)?;
    device.map_dma(&page, FIRST_IOVA)?;
    edu.dma_from_ram(FIRST_IOVA, PAGE_SIZE as u64)?;
    device.unmap_dma(FIRST_IOVA)?;
    page.store(&[0x66; PAGE_SIZE]);
    edu.dma_to_ram(FIRST_IOVA, PAGE_SIZE as u64)?;
    let contents = page.contents();
    ensure!(contents.iter().all(|&byte| byte == 0x66), "memory was written after the unmap");
    Ok("no write".into())
}

/// Enables an interrupt of which nothing is left pending by a check that failed.
fn enable<'a>(device: &'a Device, edu: &Edu, interrupt: Interrupt) -> Result<Enabled<'a>> {
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    device.enable(interrupt)
}

/// Checks that exactly `value` is pending, and acknowledges it.
fn acknowledge(edu: &Edu, value: u32) -> Result<()> {
    let pending = edu.read(register::INTERRUPT_STATUS);
    ensure!(pending == value, "interrupt status {pending:#x}, not {value:#x}");
    edu.write(register::INTERRUPT_ACKNOWLEDGE, value);
    let pending = edu.read(register::INTERRUPT_STATUS);
    ensure!(pending == 0, "interrupt status {pending:#x} after the acknowledgement");
    Ok(())
}
