//! A guest without an IOMMU: bus addresses are guest-physical addresses, and the checks reach the
//! functions through sysfs. No driver is bound but the one that shows the interrupts.

use std::io::Write;

use super::uio::{self, Uio};
use super::{decode, identity, shared_memory};
use crate::edu::{self, Edu, register};
use crate::memory::{DmaPage, PAGE_SIZE};
use crate::mmio::Mapping;
use crate::pci::command::{BUS_MASTER, MEMORY_SPACE};
use crate::pci::{Capability, Function};
use crate::report::Report;
use crate::{Result, ensure};

/// `ivshmem`'s vendor and device id.
pub(crate) const IVSHMEM_ID: (u64, u64) = (0x1af4, 0x1110);

/// What this boot leaves in the liveness register; the next one must not find it.
pub(crate) const LEFT_BEHIND: u32 = 0x0bad_cafe;

/// Runs every check of this kind of guest.
///
/// # Errors
/// There is nothing to check: a function is missing.
pub(crate) fn run(report: &mut Report<impl Write>, nonce: &str) -> Result<()> {
    let function = &Function::find(edu::ID.0, edu::ID.1)?;
    let ivshmem = &Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    report.check("edu-identity", || identity::check(function, &identity::EDU))?;
    report.check("edu-capabilities", || {
        let wanted = [Capability::PciExpress, Capability::Msi, Capability::PowerManagement];
        identity::check_capabilities(function, &wanted)
    })?;
    report.check("ivshmem-identity", || identity::check(ivshmem, &identity::IVSHMEM))?;
    report.check("ivshmem-capabilities", || {
        let wanted = [Capability::PciExpress, Capability::PowerManagement];
        identity::check_capabilities(ivshmem, &wanted)
    })?;

    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE | BUS_MASTER, true)?;
    let edu = &Edu { bar: function.map_bar(0)? };
    report.check("edu-registers", || registers(edu))?;
    report.check("edu-factorial", || factorial(edu))?;
    report.check("edu-access-width", || access_width(edu))?;
    report.check("edu-dma", || dma(edu))?;
    report.check("edu-dma-bus-master", || dma_without_bus_master(function, edu))?;
    report.check("edu-decode", || decode::check_edu(function, edu))?;

    ivshmem.set_attribute("enable", "1")?;
    ivshmem.set_command(MEMORY_SPACE, true)?;
    let memory = &ivshmem.map_bar(2)?;
    report.check("ivshmem-from-host", || from_host(memory, nonce))?;
    report.check("ivshmem-decode", || decode::check_shared_memory(ivshmem, memory))?;
    shared_memory::fill(
        memory,
        shared_memory::guest_half(memory),
        &shared_memory::guest_line(nonce),
    );

    match Uio::bind(function) {
        Ok(mut driver) => {
            report.check("uio-intx", || uio::check(&mut driver, edu))?;
            report.check("uio-intx-level", || uio::check_level(&mut driver, edu))?;
            report.check("uio-intx-disable", || uio::check_disable(&mut driver, edu))?;
        }
        Err(error) => report.check("uio-intx", || Err(error))?,
    }
    // The driver took them away when it was unbound.
    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE | BUS_MASTER, true)?;

    report.check("edu-flr", || function_level_reset(function, edu))?;
    edu.write(register::LIVENESS, LEFT_BEHIND);
    Ok(())
}

pub(super) fn registers(edu: &Edu) -> Result<String> {
    let id = edu.read(register::IDENTIFICATION);
    ensure!(id == edu::IDENTIFICATION_VALUE, "identification {id:#010x}");
    for value in [0, 1, 0x1234_5678, 0x8000_0000, u32::MAX] {
        let read = edu.liveness_of(value);
        ensure!(read == !value, "liveness of {value:#010x} reads {read:#010x}");
    }
    Ok(format!("identification {id:#010x}"))
}

fn factorial(edu: &Edu) -> Result<String> {
    for (of, expected) in [(5, 120), (10, 3_628_800), (12, 479_001_600)] {
        let computed = edu.factorial(of)?;
        ensure!(computed == expected, "{of}! is {computed}");
    }
    Ok("5! 10! 12!".into())
}

/// Below 0x80 the function takes accesses of 4 bytes and no others.
fn access_width(edu: &Edu) -> Result<String> {
    let kept = edu.liveness_of(0x1111_2222);
    edu.bar.write(register::LIVENESS, 0x33_u8);
    edu.bar.write(register::LIVENESS, 0x3333_u16);
    edu.bar.write(register::IDENTIFICATION, 0x3333_3333_3333_3333_u64);
    let read = edu.read(register::LIVENESS);
    ensure!(read == kept, "liveness went from {kept:#x} to {read:#x}");
    Ok("1, 2 and 8 bytes have no effect".into())
}

pub(super) fn dma(edu: &Edu) -> Result<String> {
    let sent: Vec<u8> = (0..PAGE_SIZE).map(|n| (n * 7 + n / 256).to_le_bytes()[0]).collect();
    let source = DmaPage::filled_with(0)?;
    source.store(&sent);
    let target = DmaPage::filled_with(0xee)?;
    let (from, to) = (source.physical_address()?, target.physical_address()?);

    edu.dma_from_ram(from, PAGE_SIZE as u64)?;
    // One byte less than all, to see that the transfer keeps to its length.
    edu.dma_to_ram(to, PAGE_SIZE as u64 - 1)?;
    ensure!(source.physical_address()? == from, "the kernel moved the source page");
    ensure!(target.physical_address()? == to, "the kernel moved the target page");

    let received = target.contents();
    let (last, rest) = received.split_last().ok_or("a page is not empty")?;
    ensure!(rest == &sent[..PAGE_SIZE - 1], "what came back is not what went out");
    ensure!(*last == 0xee, "the transfer wrote past its end");
    Ok(format!("4096 bytes from {from:#x}, 4095 to {to:#x}"))
}

/// With Bus Master Enable clear the function neither reads nor writes memory.
pub(super) fn dma_without_bus_master(function: &Function, edu: &Edu) -> Result<String> {
    const PUBLIC: u8 = 0x11;
    const SECRET: u8 = 0x22;
    const UNTOUCHED: u8 = 0x33;
    let public = DmaPage::filled_with(PUBLIC)?;
    let secret = DmaPage::filled_with(SECRET)?;
    let target = DmaPage::filled_with(UNTOUCHED)?;
    let len = PAGE_SIZE as u64;
    edu.dma_from_ram(public.physical_address()?, len)?;

    function.set_command(BUS_MASTER, false)?;
    let written = edu.dma_to_ram(target.physical_address()?, len);
    let read = edu.dma_from_ram(secret.physical_address()?, len);
    function.set_command(BUS_MASTER, true)?;
    written?;
    read?;
    let contents = target.contents();
    ensure!(contents.iter().all(|&byte| byte == UNTOUCHED), "memory was written");

    // What the refused read left in the buffer is the function's own business, but not the secret.
    edu.dma_to_ram(target.physical_address()?, len)?;
    let contents = target.contents();
    ensure!(!contents.contains(&SECRET), "memory was read");

    edu.dma_from_ram(secret.physical_address()?, len)?;
    edu.dma_to_ram(target.physical_address()?, len)?;
    let contents = target.contents();
    ensure!(contents.iter().all(|&byte| byte == SECRET), "DMA does not work again");
    Ok("no write, no read, works again after".into())
}

fn from_host(memory: &Mapping, nonce: &str) -> Result<String> {
    shared_memory::compare(memory, 0, memory.len(), &shared_memory::host_line(nonce))
}

fn function_level_reset(function: &Function, edu: &Edu) -> Result<String> {
    function.set_attribute("reset_method", "flr")?;
    edu.write(register::LIVENESS, 0x600d_f00d);
    edu.write(register::INTERRUPT_RAISE, 1);
    function.set_attribute("reset", "1")?;
    let liveness = edu.read(register::LIVENESS);
    ensure!(liveness == 0, "liveness reads {liveness:#x} after the reset");
    let interrupts = edu.read(register::INTERRUPT_STATUS);
    ensure!(interrupts == 0, "interrupt status {interrupts:#x} after the reset");
    registers(edu)
}
