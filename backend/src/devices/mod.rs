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
mod saved;
#[cfg(any(test, feature = "failpoints"))]
mod test_crash;
mod timer;
mod transfers;
pub mod vhost_user;
pub mod virtio;

#[cfg(test)]
mod tests;

pub use context::Context;
pub use edu::Edu;
pub use ivshmem::Ivshmem;
pub use registry::{Options, Registry};
pub use saved::{RestoreError, Saved};
#[cfg(any(test, feature = "failpoints"))]
pub use test_crash::TestCrash;
pub use transfers::{MemoryMessage, Payload, Step, Ticket, Transfer, TransferResult, Transfers};

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::irq::EventFd;
use crate::pci::{BarIndex, Effects, FunctionSpec};

/// A device behind one PCI function.
pub trait Device: Send {
    /// What the function is: ids, BARs and capabilities. Asked once.
    fn spec(&self) -> FunctionSpec;

    /// What logs call the function. Told once, before anything else happens.
    fn set_name(&mut self, _name: &str) {}

    /// Whether the device shows the files of guest memory to somebody else
    /// ([`Context::windows`]). Asked once.
    fn needs_window_files(&self) -> bool {
        false
    }

    /// Memory that the VMM may map in place of a BAR, if it has any. The pages of an MSI-X table or
    /// pending bit array in it stay trapped.
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

    /// A transfer that [`Context::start_dma`] began is over. Resetting the device forgets transfers;
    /// they are not told then.
    fn dma_done(&mut self, _id: u64, _result: TransferResult, _context: &mut Context<'_>) {}

    /// Eventfds that wake the device, by the index that [`woken`](Self::woken) gets. Asked once; at
    /// most [`MAX_WAKES`].
    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// One of the eventfds was signalled, once or several times.
    fn woken(&mut self, _index: usize, _context: &mut Context<'_>) {}

    /// Writes to a BAR that a VMM may turn into signals of eventfds by itself (ioeventfds).
    /// [`bar_write`](Self::bar_write) must do the same for a write that is forwarded.
    fn doorbells(&self, _bar: BarIndex) -> Vec<Doorbell> {
        Vec::new()
    }

    /// The function changed: decode, bus mastering, interrupt enables or power. Resets are told
    /// through [`reset`](Self::reset) alone.
    fn effects_applied(&mut self, _effects: &Effects, _context: &mut Context<'_>) {}

    /// What the client set up changed: windows of guest memory, eventfds of interrupts, the MSI-X
    /// table, or the capability's enable and mask. Not told while the function is stopped, but when
    /// it goes on.
    fn rewired(&mut self, _context: &mut Context<'_>) {}

    /// The operator wants the device to look at its surroundings anew: the size of an image, for
    /// instance.
    ///
    /// # Errors
    /// What is wrong with them, in one line. The device goes on as before.
    fn reload(&mut self, _context: &mut Context<'_>) -> Result<(), String> {
        Ok(())
    }

    /// Finish or abandon all work of threads of the device's own that touches guest memory. When
    /// this returns, nothing is in flight; the client's windows may go away. Transfers are not meant,
    /// and devices that work only inside an access have nothing to do.
    fn quiesce(&mut self) {}

    /// Back to the state of power-on. The function's registers are reset already.
    fn reset(&mut self);

    /// Descriptors of its own that a client may have, in an order of its choice: doorbells, memory
    /// behind BARs. They are held for a successor in another process. Asked before a client comes.
    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Takes over what a predecessor [kept](Self::kept), in place of its own: the same devices with
    /// the same parameters keep the same descriptors. Called before anything else happens.
    ///
    /// # Errors
    /// When they are not what they should be. The device is then of no use.
    fn adopt(&mut self, _kept: Vec<OwnedFd>) -> io::Result<()> {
        Ok(())
    }

    /// The device's state as data, if it can move to another process.
    fn saved(&mut self) -> Option<&mut dyn Saved> {
        None
    }
}

/// The most eventfds that may wake one device.
pub const MAX_WAKES: usize = 1024;

/// Memory behind a BAR: the whole BAR, from an offset in a file on.
#[derive(Clone, Copy, Debug)]
pub struct BarMapping<'a> {
    /// The file to map shared.
    pub file: BorrowedFd<'a>,
    /// Where the BAR starts in it, in bytes; page aligned.
    pub offset: u64,
}

/// A write that stands for the signal of an eventfd.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Where in the BAR, in bytes.
    pub offset: u64,
    /// The width of the write in bytes: 1, 2, 4 or 8.
    pub width: u8,
    /// The value that rings it; any with `None`.
    pub value: Option<u64>,
    /// What is signalled.
    pub eventfd: Arc<EventFd>,
}
