//! Devices: what sits behind a function's BARs.
//!
//! A device says what it is as data, answers accesses to its BARs, and reaches the guest through a
//! [`Context`]: memory through the bus-master gate, interrupts through the function's enables. It
//! never sees an access that its function does not claim, nor anything of the wire.

mod context;
mod edu;
mod ivshmem;
#[cfg(feature = "passthrough")]
pub mod passthrough;
mod registry;

#[cfg(test)]
mod tests;

pub use context::Context;
pub use edu::Edu;
pub use ivshmem::Ivshmem;
pub use registry::create;

use std::os::fd::BorrowedFd;

use crate::pci::{BarIndex, Effects, FunctionSpec};

/// A device behind one PCI function.
pub trait Device: Send {
    /// What the function is: ids, BARs and capabilities. Asked once.
    fn spec(&self) -> FunctionSpec;

    /// Memory that the VMM may map in place of a BAR, if it has any.
    ///
    /// The BAR must still answer [`bar_read`](Self::bar_read) and [`bar_write`](Self::bar_write)
    /// from the same memory: an access may be forwarded while its memory slot is away.
    fn mapping(&self, _bar: BarIndex) -> Option<BarMapping<'_>> {
        None
    }

    /// A read of `data.len()` bytes at `offset` in a BAR that decodes. The range lies in the BAR;
    /// width and alignment are the guest's choice. `data` holds all ones, which is also the answer
    /// to whatever the device does not define.
    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8], context: &mut Context<'_>);

    /// A write, under the same conditions.
    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>);

    /// The function changed: decode, bus mastering, interrupt enables or power. Resets are told
    /// through [`reset`](Self::reset) alone.
    fn effects_applied(&mut self, _effects: &Effects, _context: &mut Context<'_>) {}

    /// Finish or abandon all work that touches guest memory. When this returns, nothing is in
    /// flight; the client's windows may go away. Devices that work only inside an access have
    /// nothing to do.
    fn quiesce(&mut self) {}

    /// Back to the state of power-on. The function's registers are reset already.
    fn reset(&mut self);
}

/// Memory behind a BAR: the whole BAR, from an offset in a file on.
#[derive(Clone, Copy, Debug)]
pub struct BarMapping<'a> {
    /// The file to map shared.
    pub file: BorrowedFd<'a>,
    /// Where the BAR starts in it, in bytes; page aligned.
    pub offset: u64,
}
