//! A virtual CPU: messages become exits.
//!
//! The hypervisor says which page an instruction could not access, but neither executes the instruction
//! nor tells its operands. An access to memory that is in no slot is therefore completed here: the
//! instruction is executed in software, stops at each such access for the VMM to complete it, and its
//! registers are given back to the hypervisor.

use std::io;
use std::sync::Arc;

use super::hypercalls::{CallError, CallErrorKind, Partition, Processor};
use super::message::{Code, Intercept, MemoryIntercept, MessageError};
use super::policy::GuestFrame;
use super::regions::{Moment, Regions, Resolution, View};
use crate::fault::Unlocated;
use crate::hypervisor::{
    FaultAccess, GuestAddress, HypervisorError, MemoryFault, PAGE_SIZE, Vcpu, VcpuExit,
};
use crate::x86::{MAX_INSTRUCTION, Memory, Outcome, PendingInstruction, Ram, Registers};

/// How often in a row the guest may execute an instruction again because its page tables refused an
/// access that the processor got as far as making. Another virtual CPU that changes them meanwhile
/// explains a few.
const REFUSAL_LIMIT: u32 = 64;

/// KVM's number for an instruction that was not executed, which [`VcpuExit::InternalError`] carries.
const EMULATION_FAILED: u32 = 1;

pub(super) struct MshvVcpu<P: Partition> {
    id: u32,
    // Declared before `regions`, so that it is closed while the memory of the slots still exists.
    processor: P::Processor,
    regions: Arc<Regions<P>>,
    /// The instruction that is being completed.
    pending: Option<Pending>,
    /// Instructions in a row that were not completed because of the guest's page tables.
    refusals: u32,
}

struct Pending {
    instruction: PendingInstruction,
    code: Code,
    /// The access that the hypervisor has translated already.
    known: Option<Translation>,
    /// Whether this instruction, or this iteration of it, left the virtual CPU.
    exited: bool,
}

/// A page that the guest's page tables map, for one kind of access.
#[derive(Debug, Clone, Copy)]
struct Translation {
    linear_page: u64,
    guest_page: u64,
    access: FaultAccess,
}

/// What ends [`Vcpu::run`].
enum Stop {
    /// The access that the pending instruction needs.
    Access,
    Exit(VcpuExit<'static>),
}

impl<P: Partition> MshvVcpu<P> {
    pub(super) fn new(id: u32, processor: P::Processor, regions: Arc<Regions<P>>) -> Self {
        MshvVcpu { id, processor, regions, pending: None, refusals: 0 }
    }

    /// Goes on until something has happened; `None` if it was nothing of the caller's concern.
    fn step(&mut self) -> Result<Option<Stop>, HypervisorError> {
        if let Some(pending) = self.pending.take() {
            return self.complete(pending);
        }
        let entered = self.regions.now();
        let message = match self.processor.run() {
            Ok(message) => message,
            Err(CallError { kind: CallErrorKind::Interrupted, .. }) => {
                return Ok(Some(Stop::Exit(VcpuExit::Interrupted)));
            }
            Err(error) => return Err(error.into()),
        };
        let exit = match message.decode().map_err(malformed)? {
            Intercept::Memory(intercept) => return self.memory(intercept, entered),
            Intercept::Port(code) => {
                self.begin(&code, None)?;
                return Ok(None);
            }
            Intercept::None => VcpuExit::Interrupted,
            Intercept::Halt => VcpuExit::Halted,
            Intercept::UnrecoverableException => VcpuExit::Shutdown,
            Intercept::InvalidRegister(kind) => VcpuExit::FailEntry { reason: kind.into(), cpu: 0 },
            Intercept::Conversion(address) => {
                let fault = match address {
                    Some(address) => reported(address, None),
                    None => MemoryFault::unknown(Unlocated::NotTried),
                };
                VcpuExit::MemoryFault(MemoryFault { private: true, ..fault })
            }
            Intercept::Other(reason) => VcpuExit::Unexpected { reason },
        };
        Ok(Some(Stop::Exit(exit)))
    }

    /// An access that the hypervisor did not let through.
    fn memory(
        &mut self,
        intercept: MemoryIntercept,
        entered: Moment,
    ) -> Result<Option<Stop>, HypervisorError> {
        let MemoryIntercept { gva, access, ref code, .. } = intercept;
        let address = match (intercept.gpa, gva) {
            (Some(address), _) => Some(address),
            (None, Some(gva)) => self.processor.translate(gva, access)?,
            (None, None) => None,
        };
        let Some(address) = address else {
            let why = gva.map_or(Unlocated::NotTried, Unlocated::NotMapped);
            return Ok(Some(Stop::Exit(VcpuExit::MemoryFault(MemoryFault::unknown(why)))));
        };
        let found = self.regions.find(address.0);
        match found.filter(|found| access != FaultAccess::Write || found.is_writable()) {
            Some(found) => {
                let frame = GuestFrame::of(address.0);
                Ok(match self.regions.resolve(&found, frame, entered)? {
                    Resolution::Mapped | Resolution::Changed => None,
                    Resolution::Suspended => {
                        Some(Stop::Exit(VcpuExit::MemoryFault(reported(address, Some(access)))))
                    }
                })
            }
            None if access == FaultAccess::Execute => {
                let rip = Some(code.rip);
                let exit = VcpuExit::InternalError { suberror: EMULATION_FAILED, rip };
                Ok(Some(Stop::Exit(exit)))
            }
            None => {
                let known = gva.map(|gva| Translation {
                    linear_page: page(gva),
                    guest_page: page(address.0),
                    access,
                });
                self.begin(code, known)?;
                Ok(None)
            }
        }
    }

    /// Takes over the instruction that was intercepted.
    fn begin(&mut self, code: &Code, known: Option<Translation>) -> Result<(), HypervisorError> {
        let mut code = code.clone();
        if !code.long_mode {
            return Err(self.unsupported(&code, "code that is not 64-bit"));
        }
        let registers = Registers { rip: code.rip, ..self.processor.registers()? };
        let instruction = match PendingInstruction::new(registers.clone(), code.bytes()) {
            Ok(instruction) => instruction,
            Err(_) => {
                let (bytes, len) = self.fetch(code.rip)?;
                code.set_bytes(&bytes[..len]);
                PendingInstruction::new(registers, code.bytes())
                    .map_err(|error| self.unsupported(&code, error.0))?
            }
        };
        self.pending = Some(Pending { instruction, code, known, exited: false });
        Ok(())
    }

    /// Goes on with an instruction that was taken over.
    fn complete(&mut self, mut pending: Pending) -> Result<Option<Stop>, HypervisorError> {
        match self.attempt(&mut pending)? {
            Outcome::Retired => {
                self.retire(pending)?;
                Ok(None)
            }
            Outcome::Halted => {
                self.retire(pending)?;
                Ok(Some(Stop::Exit(VcpuExit::Halted)))
            }
            Outcome::Exit => {
                pending.exited = true;
                self.pending = Some(pending);
                Ok(Some(Stop::Access))
            }
            Outcome::Fault { address, access } => {
                self.pending = Some(pending);
                Ok(Some(Stop::Exit(VcpuExit::MemoryFault(reported(address, Some(access))))))
            }
            Outcome::NotMapped { .. } => {
                self.refusals += 1;
                if self.refusals <= REFUSAL_LIMIT {
                    return Ok(None);
                }
                let rip = Some(pending.instruction.registers().rip);
                let exit = VcpuExit::InternalError { suberror: EMULATION_FAILED, rip };
                Ok(Some(Stop::Exit(exit)))
            }
        }
    }

    fn attempt(&self, pending: &mut Pending) -> Result<Outcome, HypervisorError> {
        let mut memory = GuestMemory {
            processor: &self.processor,
            view: self.regions.view(),
            known: pending.known,
            failed: None,
        };
        let outcome = pending.instruction.attempt(&mut memory);
        if let Some(error) = memory.failed {
            return Err(error.into());
        }
        outcome.map_err(|error| self.unsupported(&pending.code, error.0))
    }

    /// Gives the registers back. An iteration of a repeated instruction that left the virtual CPU is
    /// likely to be followed by another one that does: that one begins here.
    fn retire(&mut self, pending: Pending) -> Result<(), HypervisorError> {
        self.refusals = 0;
        self.processor.set_registers(pending.instruction.registers())?;
        if pending.exited && pending.instruction.repeats() {
            self.pending = Some(Pending { exited: false, ..pending });
        }
        Ok(())
    }

    fn unsupported(&self, code: &Code, reason: &'static str) -> HypervisorError {
        let bytes = code.bytes().to_vec();
        HypervisorError::UnsupportedInstruction { vcpu: self.id, rip: code.rip, bytes, reason }
    }

    /// The bytes at `rip`, as far as they are in RAM: reading a device's memory could have effects.
    fn fetch(&self, rip: u64) -> Result<([u8; MAX_INSTRUCTION], usize), HypervisorError> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let mut len = 0;
        while len < bytes.len() {
            let linear = rip.wrapping_add(len as u64);
            let to_page_end = usize::try_from(PAGE_SIZE - linear % PAGE_SIZE).unwrap_or(usize::MAX);
            let end = bytes.len().min(len.saturating_add(to_page_end));
            let address = self.processor.translate(linear, FaultAccess::Execute)?;
            let view = self.regions.view();
            let ram = address.and_then(|address| view.ram(address, false));
            match ram.filter(|ram| !ram.memory.is_of_device()) {
                Some(Ram { memory, offset })
                    if memory.read(offset, &mut bytes[len..end]).is_ok() =>
                {
                    len = end;
                }
                _ => break,
            }
        }
        Ok((bytes, len))
    }
}

impl<P: Partition> Vcpu for MshvVcpu<P> {
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError> {
        loop {
            match self.step()? {
                None => {}
                Some(Stop::Exit(exit)) => return Ok(exit),
                Some(Stop::Access) => break,
            }
        }
        let pending = self.pending.as_mut().expect("an access belongs to an instruction");
        Ok(pending.instruction.exit().expect("the instruction has stopped at an access"))
    }
}

/// What an instruction that is executed here sees of the machine.
struct GuestMemory<'a, Q> {
    processor: &'a Q,
    view: View<'a>,
    known: Option<Translation>,
    /// A hypercall that failed: the instruction can't be completed.
    failed: Option<CallError>,
}

impl<Q: Processor> Memory for GuestMemory<'_, Q> {
    fn translate(&mut self, linear: u64, write: bool) -> Option<GuestAddress> {
        let access = if write { FaultAccess::Write } else { FaultAccess::Read };
        if let Some(known) = self.known
            && known.linear_page == page(linear)
            && known.access == access
        {
            return Some(GuestAddress(known.guest_page | (linear % PAGE_SIZE)));
        }
        match self.processor.translate(linear, access) {
            Ok(address) => address,
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }

    fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>> {
        self.view.ram(address, write)
    }
}

fn page(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

fn reported(address: GuestAddress, access: Option<FaultAccess>) -> MemoryFault {
    MemoryFault::reported(GuestAddress(page(address.0)), PAGE_SIZE, access)
}

fn malformed(error: MessageError) -> HypervisorError {
    let source = io::Error::new(io::ErrorKind::InvalidData, error);
    HypervisorError::Call { call: "MSHV_RUN_VP", source }
}
