//! What the adapter needs of the hypervisor. `vm.rs` has it from `/dev/mshv`; tests have it from a model of
//! the rules.

use std::fmt;
use std::io;

use super::message::Message;
use super::policy::MapPlan;
use crate::hypervisor::{FaultAccess, GuestAddress, SlotAccess, VcpuEntry};
use crate::x86::Registers;

/// A partition: guest-physical address space and virtual processors.
pub(super) trait Partition: fmt::Debug + Send + Sync + 'static {
    type Processor: Processor;

    /// Maps pages of this process into the guest: all of `plan`, or nothing.
    ///
    /// Whether pages that are mapped already, to the same or to other host pages, are an error is up to
    /// the hypervisor: the adapter never asks for that.
    fn map_gpa(&self, plan: MapPlan, access: SlotAccess) -> Result<(), CallError>;

    /// Removes exactly what an earlier [`map_gpa`](Self::map_gpa) mapped. When it returns, no virtual
    /// processor accesses those pages any more.
    fn unmap_gpa(&self, plan: MapPlan) -> Result<(), CallError>;

    /// Creates virtual processor `index`, as after a reset.
    fn create_processor(&self, index: u32) -> Result<Self::Processor, CallError>;
}

/// A virtual processor.
pub(super) trait Processor: Send {
    /// Runs guest code until the hypervisor has a message.
    fn run(&mut self) -> Result<Message, CallError>;

    /// Registers of the guest, as far as instructions are completed with them.
    fn registers(&self) -> Result<Registers, CallError>;

    fn set_registers(&mut self, registers: &Registers) -> Result<(), CallError>;

    /// Enters 64-bit mode at `entry`.
    fn enter_long_mode(&mut self, entry: &VcpuEntry) -> Result<(), CallError>;

    /// Where the guest's page tables have a linear address; `None` if they refuse the access.
    fn translate(&self, gva: u64, access: FaultAccess) -> Result<Option<GuestAddress>, CallError>;
}

/// A call that failed.
#[derive(Debug)]
pub(super) struct CallError {
    /// Name of the ioctl or hypercall.
    pub(super) call: &'static str,
    pub(super) kind: CallErrorKind,
}

#[derive(Debug)]
pub(super) enum CallErrorKind {
    /// Some of the guest pages are mapped already.
    Mapped,
    /// Nothing is mapped there.
    NotMapped,
    /// The host pages can't be accessed.
    NoBacking,
    /// A signal; try again.
    Interrupted,
    Other(io::Error),
}

impl From<CallErrorKind> for io::Error {
    fn from(kind: CallErrorKind) -> io::Error {
        use rustix::io::Errno;
        match kind {
            CallErrorKind::Mapped => Errno::EXIST.into(),
            CallErrorKind::NotMapped => Errno::NOENT.into(),
            CallErrorKind::NoBacking => Errno::FAULT.into(),
            CallErrorKind::Interrupted => Errno::INTR.into(),
            CallErrorKind::Other(error) => error,
        }
    }
}

impl From<CallError> for crate::hypervisor::HypervisorError {
    fn from(CallError { call, kind }: CallError) -> Self {
        crate::hypervisor::HypervisorError::Call { call, source: kind.into() }
    }
}
