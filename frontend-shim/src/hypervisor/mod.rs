//! Hypervisors as this crate needs them: guest-physical slots that come and go, and, for the reference
//! VMM, virtual CPUs.
//!
//! [`Hypervisor`] is the small half that a foreign VMM implements to embed this crate: it maps and
//! unmaps memory slots. [`Vm`] adds the virtual CPUs, which a foreign VMM keeps to itself.
//! Adapters are here: `kvm` for Linux KVM, `mshv` for Microsoft's hypervisor, and `model`, a software
//! hypervisor that executes the same guest code on machines without any. [`stage2`] models arm64's
//! second translation stage.

#[cfg(feature = "x86")]
pub mod kvm;
pub mod memory;
#[cfg(feature = "x86")]
pub mod model;
#[cfg(feature = "mshv")]
pub mod mshv;
#[cfg(feature = "x86")]
mod slots;
pub mod stage2;
#[cfg(test)]
#[cfg(feature = "x86")]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use crate::address::GuestAddress;
pub use crate::fault::{FaultAccess, FaultPlace, GuestAccess, MemoryFault};
pub use memory::{AccessError, HostMapping, Protection, ReadOnlyWords};

/// Size and alignment of everything a memory slot is made of.
pub const PAGE_SIZE: u64 = 4096;

/// Memory slots of one virtual machine.
///
/// All methods may be called from any thread, also while virtual CPUs run.
pub trait Hypervisor: Send + Sync {
    /// Which hypervisor this is.
    fn kind(&self) -> HypervisorKind;

    /// Maps host memory into the guest. The hypervisor keeps the memory alive for as long as the slot
    /// exists.
    ///
    /// An access that found no slot must not be completed from the memory of one that appears meanwhile:
    /// for memory of a device ([`HostMapping::is_of_device`]), no virtual CPU may be inside the hypervisor
    /// while the slot is added. The guest may still see MMIO exits there for a while after this returns.
    ///
    /// # Errors
    /// [`HypervisorError::Misaligned`], [`HypervisorError::BadRange`], [`HypervisorError::SlotInUse`]
    /// and [`HypervisorError::SlotOverlap`] for a request that can't be right whatever the hypervisor;
    /// [`HypervisorError::TooManySlots`] and [`HypervisorError::Call`] where the hypervisor refuses.
    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError>;

    /// Removes a slot. When this returns, no guest access reaches its memory any more: later ones
    /// exit as MMIO, and none that began earlier is still under way.
    ///
    /// # Errors
    /// [`HypervisorError::NoSuchSlot`] for a slot that is not mapped, [`HypervisorError::Call`] where
    /// the hypervisor refuses; the slot is then still mapped.
    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError>;

    /// Signals `eventfd` for each write of the guest that `write` describes, instead of an exit. Only
    /// writes that would exit as MMIO count.
    ///
    /// # Errors
    /// [`HypervisorError::NotSupported`] from a hypervisor that can't, which costs nothing but exits;
    /// [`HypervisorError::Call`] where it refuses, as for a second one at the same place.
    fn add_ioeventfd(
        &self,
        write: &DoorbellWrite,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        let _ = (write, eventfd);
        Err(HypervisorError::NotSupported { what: "ioeventfds" })
    }

    /// Takes back what [`add_ioeventfd`](Self::add_ioeventfd) did. When this returns, later writes exit
    /// as MMIO, and none that began earlier still signals.
    ///
    /// # Errors
    /// As for [`add_ioeventfd`](Self::add_ioeventfd); the eventfd may still be signalled then.
    fn remove_ioeventfd(
        &self,
        write: &DoorbellWrite,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        let _ = (write, eventfd);
        Err(HypervisorError::NotSupported { what: "ioeventfds" })
    }

    /// Says which message an interrupt number stands for from now on, or that it stands for none.
    ///
    /// # Errors
    /// [`HypervisorError::NotSupported`] from a hypervisor without an interrupt controller,
    /// [`HypervisorError::Call`] where it refuses; the number then stands for what it did.
    fn route_msi(&self, gsi: u32, message: Option<MsiMessage>) -> Result<(), HypervisorError> {
        let _ = (gsi, message);
        Err(HypervisorError::NotSupported { what: "interrupt routes" })
    }

    /// Raises interrupt number `gsi` in the guest whenever `eventfd` is signalled, without the VMM.
    ///
    /// # Errors
    /// As for [`route_msi`](Self::route_msi).
    fn add_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        let _ = (gsi, eventfd);
        Err(HypervisorError::NotSupported { what: "irqfds" })
    }

    /// Takes back what [`add_irqfd`](Self::add_irqfd) did.
    ///
    /// # Errors
    /// As for [`route_msi`](Self::route_msi).
    fn remove_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        let _ = (gsi, eventfd);
        Err(HypervisorError::NotSupported { what: "irqfds" })
    }
}

/// A virtual machine whose virtual CPUs are ours to run.
pub trait Vm: Hypervisor {
    /// Creates virtual CPU `id`, in 64-bit mode and about to execute `entry`.
    ///
    /// # Errors
    /// [`HypervisorError::Call`] where the hypervisor refuses.
    fn create_vcpu(&self, id: u32, entry: &VcpuEntry) -> Result<Box<dyn Vcpu>, HypervisorError>;
}

/// One virtual CPU. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Runs guest code until the guest needs something.
    ///
    /// After [`VcpuExit::MmioRead`] or [`VcpuExit::PioRead`] the caller stores the answer in `data`
    /// before it calls `run` again. After [`VcpuExit::MemoryFault`] the instruction has not retired:
    /// `run` executes it again.
    ///
    /// # Errors
    /// [`HypervisorError::Call`] where the hypervisor fails, and
    /// [`HypervisorError::UnsupportedInstruction`] where an adapter meets code it can't execute. The
    /// virtual CPU can't go on after either.
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError>;
}

/// Where a virtual CPU starts: 64-bit long mode, flat segments, interrupts off, no IDT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuEntry {
    /// Address of the first instruction.
    pub rip: u64,
    /// Initial stack pointer.
    pub rsp: u64,
    /// First argument, as the System V ABI passes it.
    pub rdi: u64,
    /// Guest-physical address of the top level page table (CR3).
    pub page_table_root: GuestAddress,
}

/// Why a virtual CPU stopped.
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// The guest reads `data.len()` bytes where no slot is mapped.
    MmioRead {
        /// Address of the first byte.
        address: GuestAddress,
        /// To be filled in by the caller; little endian.
        data: &'a mut [u8],
    },
    /// The guest writes where no slot is mapped, or where a slot is read-only.
    MmioWrite {
        /// Address of the first byte.
        address: GuestAddress,
        /// What the guest writes; little endian.
        data: &'a [u8],
    },
    /// The guest executes IN or INS.
    PioRead {
        /// I/O port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// To be filled in by the caller, little endian: one access, or with REP INS several to the
        /// same port, one after the other.
        data: &'a mut [u8],
    },
    /// The guest executes OUT or OUTS.
    PioWrite {
        /// I/O port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// What the guest writes, little endian: one access, or with REP OUTS several.
        data: &'a [u8],
    },
    /// A slot is mapped there, but its memory can't be accessed.
    MemoryFault(MemoryFault),
    /// HLT. Nothing here delivers interrupts, so a halted virtual CPU has finished.
    Halted,
    /// Triple fault: a guest without an IDT took an exception.
    Shutdown,
    /// A signal or a transient condition of the host. Run again.
    Interrupted,
    /// The processor refused to enter the guest (VMX, SVM); the guest's state is invalid.
    FailEntry {
        /// The processor's own code (VM-entry failure or VMEXIT reason).
        reason: u64,
        /// Physical CPU it happened on.
        cpu: u32,
    },
    /// The hypervisor gave up; for KVM this includes an instruction its emulator does not know.
    InternalError {
        /// KVM's suberror; 1 is a failed emulation.
        suberror: u32,
        /// Where the guest was, if it could be read.
        rip: Option<u64>,
    },
    /// An exit of a kind that none of our guests can cause.
    Unexpected {
        /// KVM's exit reason, or 0.
        reason: u32,
    },
}

impl fmt::Display for VcpuExit<'_> {
    /// One line for the operator.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VcpuExit::MmioRead { address, data } => {
                write!(f, "read of {} bytes at {address}", data.len())
            }
            VcpuExit::MmioWrite { address, data } => {
                write!(f, "write of {} bytes at {address}", data.len())
            }
            VcpuExit::PioRead { port, data, .. } => {
                write!(f, "read of {} bytes from port {port:#x}", data.len())
            }
            VcpuExit::PioWrite { port, data, .. } => {
                write!(f, "write of {} bytes to port {port:#x}", data.len())
            }
            VcpuExit::MemoryFault(fault) => fault.fmt(f),
            VcpuExit::Halted => f.write_str("halted"),
            VcpuExit::Shutdown => f.write_str("shutdown (triple fault)"),
            VcpuExit::Interrupted => f.write_str("interrupted"),
            VcpuExit::FailEntry { reason, cpu } => write!(
                f,
                "the processor refused to enter the guest (reason {reason:#x} on physical CPU {cpu})"
            ),
            VcpuExit::InternalError { suberror, rip } => {
                write!(f, "the hypervisor gave up (internal error {suberror}")?;
                match rip {
                    Some(rip) => write!(f, " at guest rip {rip:#x})"),
                    None => f.write_str(")"),
                }
            }
            VcpuExit::Unexpected { reason } => {
                write!(f, "exit reason {reason} that no guest of ours causes")
            }
        }
    }
}

/// Writes of a guest that signal an eventfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoorbellWrite {
    /// Guest-physical address of the first byte.
    pub address: GuestAddress,
    /// Length of the write in bytes; `None` for all.
    pub len: Option<DoorbellLen>,
    /// The value that is written; `None` for all. Needs a length.
    pub value: Option<u64>,
}

/// Length of a write that rings a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DoorbellLen {
    /// One byte.
    One = 1,
    /// Two bytes.
    Two = 2,
    /// Four bytes.
    Four = 4,
    /// Eight bytes.
    Eight = 8,
}

/// A message-signalled interrupt, as the guest has programmed it (PCI 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Number of a memory slot, chosen by whoever maps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a slot maps, and where. Addresses, offset and length are multiples of [`PAGE_SIZE`].
#[derive(Debug, Clone)]
pub struct SlotMapping {
    /// Guest-physical address of the first byte.
    pub guest: GuestAddress,
    /// Host memory behind it.
    pub memory: Arc<HostMapping>,
    /// Where in the host memory it begins, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What the guest may do.
    pub access: SlotAccess,
}

impl SlotMapping {
    /// All of `memory` at `guest`, for reads and writes.
    pub fn whole(guest: GuestAddress, memory: &Arc<HostMapping>) -> SlotMapping {
        let (memory, len) = (Arc::clone(memory), memory.len());
        SlotMapping { guest, memory, offset: 0, len, access: SlotAccess::ReadWrite }
    }
}

/// What the guest may do in a slot without an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAccess {
    /// Reads and writes reach the memory.
    ReadWrite,
    /// Reads reach the memory, writes exit as [`VcpuExit::MmioWrite`].
    ReadOnly,
}

/// Which hypervisor is behind a [`Hypervisor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HypervisorKind {
    /// Linux KVM.
    Kvm,
    /// The software hypervisor in [`model`].
    Model,
    /// Microsoft's hypervisor.
    Mshv,
}

impl fmt::Display for HypervisorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HypervisorKind::Kvm => "kvm",
            HypervisorKind::Model => "model",
            HypervisorKind::Mshv => "mshv",
        })
    }
}

/// What can go wrong between us and a hypervisor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// This machine has no hypervisor for us.
    #[error("{reason}")]
    Unavailable {
        /// One line for the operator: what is missing and what to do about it.
        reason: String,
    },
    /// The hypervisor, or its adapter, has no such thing.
    #[error("this hypervisor has no {what}")]
    NotSupported {
        /// What was asked for.
        what: &'static str,
    },
    /// The hypervisor refused a call.
    #[error("{call} failed: {source}")]
    Call {
        /// Name of the ioctl or system call.
        call: &'static str,
        /// Its errno.
        source: io::Error,
    },
    /// An address, offset or length of a slot is not a multiple of the page size.
    #[error("slot {slot}: {what} {value:#x} is not a multiple of 4 KiB")]
    Misaligned {
        /// Slot to be mapped.
        slot: SlotId,
        /// Which value.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// An empty slot, one that passes the end of its memory, or one that wraps around the address space.
    #[error(
        "slot {slot}: {len:#x} bytes at guest {guest} from offset {offset:#x} do not fit their memory of {available:#x} bytes or the address space"
    )]
    BadRange {
        /// Slot to be mapped.
        slot: SlotId,
        /// Its guest-physical address.
        guest: GuestAddress,
        /// Offset in the host memory.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the host memory in bytes.
        available: u64,
    },
    /// The slot is mapped already; slots are moved by unmapping them first.
    #[error("slot {slot} is mapped already")]
    SlotInUse {
        /// The slot.
        slot: SlotId,
    },
    /// Another slot has some of these guest-physical addresses.
    #[error("slot {slot} at guest {guest} overlaps slot {other}")]
    SlotOverlap {
        /// Slot to be mapped.
        slot: SlotId,
        /// Its guest-physical address.
        guest: GuestAddress,
        /// The slot that is there.
        other: SlotId,
    },
    /// The slot is not mapped.
    #[error("slot {slot} is not mapped")]
    NoSuchSlot {
        /// The slot.
        slot: SlotId,
    },
    /// The slot number is beyond what the hypervisor supports.
    #[error("slot {slot} is beyond the {limit} slots of this hypervisor")]
    TooManySlots {
        /// The slot.
        slot: SlotId,
        /// Number of slots supported.
        limit: u32,
    },
    /// An instruction that is executed in software is not known, or could not be fetched.
    #[error("vCPU {vcpu} can't execute the instruction at rip {rip:#x} ({bytes:02x?}): {reason}")]
    UnsupportedInstruction {
        /// Virtual CPU.
        vcpu: u32,
        /// Address of the instruction.
        rip: u64,
        /// Its bytes; empty if they could not be fetched.
        bytes: Vec<u8>,
        /// What is missing.
        reason: &'static str,
    },
}
