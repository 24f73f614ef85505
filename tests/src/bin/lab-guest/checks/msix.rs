//! MSI-X of the `ivshmem` function that has doorbells, through vfio-pci: the function rings its own.

use std::io::Write;

use super::direct::IVSHMEM_ID;
use crate::mmio::Mapping;
use crate::pci::command::BUS_MASTER;
use crate::pci::{Capability, Function};
use crate::report::Report;
use crate::vfio::{Device, Enabled, Interrupt};
use crate::{Result, ensure};

/// How many vectors the function was given.
const VECTORS: usize = 4;

/// Registers of BAR0 (QEMU's docs/specs/ivshmem-spec.rst).
mod register {
    pub(super) const IV_POSITION: u64 = 0x08;
    pub(super) const DOORBELL: u64 = 0x0c;
}

/// Bits of MSI-X Message Control (PCI Express Base Specification, 7.7.2.2).
const TABLE_SIZE: u16 = 0x7ff;
const FUNCTION_MASK: u16 = 1 << 14;

/// The function and where its table lies.
struct Doorbells<'a> {
    function: &'a Function,
    device: &'a Device,
    /// The BAR that holds the table and the pending bits.
    table_bar: Mapping,
    table: usize,
    pending: usize,
    control: u64,
}

/// Runs every check of this kind of guest.
///
/// # Errors
/// There is nothing to check: the function is missing or vfio does not give it out.
pub(crate) fn run(report: &mut Report<impl Write>, rounds: u32) -> Result<()> {
    let function = &Function::find(IVSHMEM_ID.0, IVSHMEM_ID.1)?;
    report.check("msix-capability", || capability(function))?;
    let device = &Device::open(function)?;
    device.set_command(BUS_MASTER, true)?;
    let doorbells = &Doorbells::find(function, device)?;
    report.check("msix-vectors", || vectors(doorbells, rounds))?;
    report.check("msix-fewer-vectors", || fewer_vectors(doorbells))?;
    report.check("msix-vector-mask", || vector_mask(doorbells))?;
    report.check("msix-function-mask", || function_mask(doorbells))?;
    report.check("msix-bus-master", || bus_master(doorbells))?;
    Ok(())
}

impl<'a> Doorbells<'a> {
    fn find(function: &'a Function, device: &'a Device) -> Result<Self> {
        let capability = function.capability(Capability::MsiX)?;
        let (bar, table) = place(function, capability + 4)?;
        let (pending_bar, pending) = place(function, capability + 8)?;
        ensure!(bar == pending_bar, "table in BAR{bar}, pending bits in BAR{pending_bar}");
        let table_bar = device.map_bar(bar)?;
        Ok(Self { function, device, table_bar, table, pending, control: capability + 2 })
    }

    /// Rings the function's own doorbell.
    fn ring(&self, vector: usize) -> Result<()> {
        let position = self.device.read_bar(0, register::IV_POSITION)?;
        ensure!(position <= 0xffff, "IVPosition reads {position:#x}");
        self.device.write_bar(0, register::DOORBELL, position << 16 | u32::try_from(vector)?)
    }

    fn mask_vector(&self, vector: usize, masked: bool) {
        self.table_bar.write(self.table + vector * 16 + 12, u32::from(masked));
    }

    fn mask_function(&self, masked: bool) -> Result<()> {
        let before = self.function.read_u16(self.control)?;
        let after = if masked { before | FUNCTION_MASK } else { before & !FUNCTION_MASK };
        self.function.write_u16(self.control, after)?;
        let seen = self.function.read_u16(self.control)?;
        ensure!(seen == after, "Message Control reads {seen:#06x} after {after:#06x}");
        Ok(())
    }

    fn pending_bits(&self) -> u64 {
        self.table_bar.read(self.pending)
    }
}

/// Enables every vector and rings its doorbell, which arrives, perhaps more than once.
///
/// # Errors
/// One does not, or the kernel refuses.
pub(crate) fn every_vector_arrives(function: &Function, device: &Device) -> Result<()> {
    let doorbells = Doorbells::find(function, device)?;
    let arrivals = device.enable_vectors(Interrupt::Msix, VECTORS)?;
    for _ in 0..8 {
        for vector in 0..VECTORS {
            doorbells.ring(vector)?;
            arrivals.wait_on(vector).map_err(|error| format!("vector {vector}: {error}"))?;
        }
    }
    Ok(())
}

/// Which BAR and where in it.
fn place(function: &Function, at: u64) -> Result<(u32, usize)> {
    let place = function.read_u32(at)?;
    Ok((place & 7, usize::try_from(place & !7)?))
}

fn capability(function: &Function) -> Result<String> {
    let capability = function.capability(Capability::MsiX)?;
    let control = function.read_u16(capability + 2)?;
    let vectors = usize::from(control & TABLE_SIZE) + 1;
    ensure!(vectors == VECTORS, "{vectors} vectors, not {VECTORS}");
    ensure!(control & !TABLE_SIZE == 0, "Message Control {control:#06x} before it is used");
    let ((bar, table), (_, pending)) =
        (place(function, capability + 4)?, place(function, capability + 8)?);
    let len = function.bar(usize::try_from(bar)?)?.ok_or("the table's BAR is missing")?.len;
    let end = table.max(pending) as u64 + 8;
    ensure!(end <= len, "BAR{bar} ends at {len:#x}, before the table or the pending bits");
    Ok(format!("{vectors} vectors, BAR{bar}: table at {table:#x}, pending bits at {pending:#x}"))
}

/// Every doorbell comes out of its own vector, once.
fn vectors(doorbells: &Doorbells<'_>, rounds: u32) -> Result<String> {
    let enabled = enable(doorbells, VECTORS)?;
    for round in 0..rounds {
        for vector in 0..VECTORS {
            doorbells.ring(vector)?;
            expect_one(&enabled, vector).map_err(|error| format!("round {round}: {error}"))?;
            for other in (0..VECTORS).filter(|&other| other != vector) {
                ensure!(!enabled.has_arrived(other)?, "doorbell {vector} rang vector {other}");
            }
        }
    }
    enabled.expect_none()?;
    Ok(format!("{rounds} rounds of {VECTORS} vectors"))
}

/// A vector that the driver did not enable does not arrive, and the others do.
fn fewer_vectors(doorbells: &Doorbells<'_>) -> Result<String> {
    for count in [1, 3, 2, VECTORS] {
        let enabled = enable(doorbells, count)?;
        for vector in count..VECTORS {
            doorbells.ring(vector)?;
        }
        // No doorbell at all.
        doorbells.ring(VECTORS)?;
        doorbells.ring(0xff)?;
        enabled.expect_none()?;
        for vector in 0..count {
            doorbells.ring(vector)?;
            expect_one(&enabled, vector)?;
        }
    }
    Ok("1, 3, 2 and 4 vectors".into())
}

/// A masked vector is held back until it is unmasked, then it arrives once.
fn vector_mask(doorbells: &Doorbells<'_>) -> Result<String> {
    let enabled = enable(doorbells, VECTORS)?;
    let mut pending = Vec::new();
    for vector in 0..VECTORS {
        doorbells.mask_vector(vector, true);
        doorbells.ring(vector)?;
        doorbells.ring(vector)?;
        enabled.expect_none()?;
        // For the log: QEMU's vfio-user client keeps pending bits of its own and shows the backend's.
        pending.push(format!("{:#x}", doorbells.pending_bits()));
        let other = (vector + 1) % VECTORS;
        doorbells.ring(other)?;
        expect_one(&enabled, other)?;
        doorbells.mask_vector(vector, false);
        expect_one(&enabled, vector).map_err(|error| format!("after the unmask: {error}"))?;
    }
    enabled.expect_none()?;
    Ok(format!("{VECTORS} vectors, pending bits {}", pending.join(" ")))
}

/// The same for the function as a whole.
fn function_mask(doorbells: &Doorbells<'_>) -> Result<String> {
    let enabled = enable(doorbells, VECTORS)?;
    doorbells.mask_function(true)?;
    doorbells.ring(1)?;
    doorbells.ring(2)?;
    enabled.expect_none()?;
    let pending = doorbells.pending_bits();
    doorbells.mask_function(false)?;
    expect_one(&enabled, 1)?;
    expect_one(&enabled, 2)?;
    enabled.expect_none()?;
    Ok(format!("2 vectors held back, pending bits {pending:#x}"))
}

/// A message is a memory write: with Bus Master Enable clear there is none.
fn bus_master(doorbells: &Doorbells<'_>) -> Result<String> {
    let enabled = enable(doorbells, VECTORS)?;
    doorbells.device.set_command(BUS_MASTER, false)?;
    let absent = doorbells.ring(0).and_then(|()| enabled.expect_none());
    doorbells.device.set_command(BUS_MASTER, true)?;
    absent?;
    doorbells.ring(1)?;
    expect_one(&enabled, 1)?;
    Ok("no message, works again after".into())
}

/// A doorbell of a vector that is masked or not enabled is pending, and the vector arrives as soon as a
/// driver can have it: that is over when this returns.
fn enable<'a>(doorbells: &Doorbells<'a>, count: usize) -> Result<Enabled<'a>> {
    let enabled = doorbells.device.enable_vectors(Interrupt::Msix, count)?;
    enabled.settle()?;
    Ok(enabled)
}

fn expect_one(enabled: &Enabled<'_>, vector: usize) -> Result<()> {
    let count = enabled.wait_on(vector).map_err(|error| format!("vector {vector}: {error}"))?;
    ensure!(count == 1, "vector {vector}: {count} interrupts for one doorbell");
    Ok(())
}
