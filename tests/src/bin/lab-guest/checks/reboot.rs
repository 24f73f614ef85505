//! A guest that restarts, by its own will and by the host's, with the backend's functions attached
//! all the time. Which boot this one is stands in the shared memory.

use std::io::Write;

use super::direct::{self, IVSHMEM_ID};
use crate::edu::{self, Edu, register};
use crate::mmio::Mapping;
use crate::pci::command::{BUS_MASTER, INTERRUPT_DISABLE, MEMORY_SPACE};
use crate::pci::{COMMAND, Capability, Function, STATUS, status};
use crate::report::Report;
use crate::requests::Requests;
use crate::{Result, ensure};

/// What the guest does when the checks of a boot are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    PowerOff,
    /// Restarts itself.
    Reboot,
    /// The host has been asked to reset the machine.
    AwaitReset,
}

/// Tells a count from what the shared memory held before.
const MARK: u64 = 0x6261_726b_6565_7000;

/// Runs one boot, and reports when it is the last or when something is wrong.
///
/// # Errors
/// There is nothing to check: a function is missing.
pub(crate) fn run(report: &mut Report<impl Write>, restarts: u32) -> Result<Next> {
    let function = &Function::find(edu::ID.0, edu::ID.1)?;
    let ivshmem = &Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    ivshmem.set_attribute("enable", "1")?;
    ivshmem.set_command(MEMORY_SPACE, true)?;
    let memory = &ivshmem.map_bar(2)?;
    let before = restarts_before(memory);

    let at_power_on = found_at_power_on(function);
    let works = works(function).map(|_| ());
    let is_last = before >= u64::from(restarts);
    if is_last || at_power_on.is_err() {
        report.check("reboot-power-on", || {
            at_power_on.map_err(|error| format!("after {before} restarts: {error}"))?;
            Ok(format!("{before} restarts"))
        })?;
    }
    if is_last || works.is_err() {
        report.check("reboot-works", || {
            works.map_err(|error| format!("after {before} restarts: {error}"))?;
            Ok(format!("{before} restarts"))
        })?;
        return Ok(Next::PowerOff);
    }

    leave_dirty(function)?;
    memory.write(0, MARK);
    memory.write(8, before + 1);
    if before.is_multiple_of(2) {
        return Ok(Next::Reboot);
    }
    Requests::open()?.ask("reset")?;
    Ok(Next::AwaitReset)
}

fn restarts_before(memory: &Mapping) -> u64 {
    if memory.read::<u64>(0) == MARK { memory.read(8) } else { 0 }
}

/// The firmware switches decode on and assigns BARs; all else is as it was at power-on.
fn found_at_power_on(function: &Function) -> Result<()> {
    let command = function.read_u16(COMMAND)?;
    ensure!(command & (BUS_MASTER | INTERRUPT_DISABLE) == 0, "Command reads {command:#06x}");
    let seen = function.read_u16(STATUS)?;
    ensure!(seen & status::INTERRUPT == 0, "Status reads {seen:#06x}");
    let msi = function.read_u16(function.capability(Capability::Msi)? + 2)?;
    ensure!(msi & 1 == 0, "MSI is enabled");
    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE, true)?;
    edu::expect_power_on(&Edu { bar: function.map_bar(0)? })
}

fn works(function: &Function) -> Result<String> {
    function.set_attribute("enable", "1")?;
    function.set_command(MEMORY_SPACE | BUS_MASTER, true)?;
    let edu = &Edu { bar: function.map_bar(0)? };
    direct::registers(edu)?;
    direct::dma(edu)
}

/// Leaves something in every part of the function, an asserted interrupt line included.
fn leave_dirty(function: &Function) -> Result<()> {
    let edu = &Edu { bar: function.map_bar(0)? };
    edu.write(register::LIVENESS, direct::LEFT_BEHIND);
    edu.write(register::FACTORIAL, 3);
    edu.write(register::INTERRUPT_RAISE, 0x77);
    let msi = function.capability(Capability::Msi)? + 2;
    function.write_u16(msi, function.read_u16(msi)? | 1)?;
    function.set_command(INTERRUPT_DISABLE, true)
}
