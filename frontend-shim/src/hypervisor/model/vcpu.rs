//! The fetch, decode, execute loop.

use iced_x86::{Decoder, DecoderOptions, Instruction, Register};

use super::slots::{SlotReader, Snapshot};
use crate::hypervisor::memory::AccessError;
use crate::hypervisor::{
    FaultAccess, GuestAddress, HypervisorError, MemoryFault, PAGE_SIZE, SlotAccess, Vcpu,
    VcpuEntry, VcpuExit,
};
use crate::x86::{Execution, MAX_INSTRUCTION, Memory, Outcome, Ram, Registers, Unsupported};

/// Instructions between two returns to the caller: nobody can send the model a signal, so it gives the
/// caller a chance to stop a guest that never exits.
const QUANTUM: u32 = 1 << 20;

/// A virtual CPU of the model.
pub(super) struct ModelVcpu {
    id: u32,
    registers: Registers,
    slots: SlotReader,
    decoded: DecodeCache,
    execution: Execution,
    halted: bool,
}

impl ModelVcpu {
    pub(super) fn new(id: u32, entry: &VcpuEntry, slots: SlotReader) -> ModelVcpu {
        let mut registers = Registers::new(entry.rip);
        for (register, value) in [(Register::RSP, entry.rsp), (Register::RDI, entry.rdi)] {
            registers.set(register, value).expect("both are general-purpose registers");
        }
        ModelVcpu {
            id,
            registers,
            slots,
            decoded: DecodeCache::new(),
            execution: Execution::default(),
            halted: false,
        }
    }

    /// Executes one instruction, or as much of it as needs no exit.
    fn step(&mut self) -> Result<Outcome, Unsupported> {
        let mut snapshot = self.slots.enter();
        match self.decoded.get(self.registers.rip, &snapshot)? {
            Ok(instruction) => {
                self.execution.attempt(&mut self.registers, &instruction, &mut snapshot)
            }
            Err(fault) => Ok(fault),
        }
    }

    fn unsupported(&mut self, reason: &'static str) -> HypervisorError {
        let rip = self.registers.rip;
        let snapshot = self.slots.enter();
        let bytes = match fetch(rip, &snapshot) {
            Ok(Ok((bytes, len))) => bytes[..len].to_vec(),
            _ => Vec::new(),
        };
        HypervisorError::UnsupportedInstruction { vcpu: self.id, rip, bytes, reason }
    }
}

impl Vcpu for ModelVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError> {
        if self.halted {
            return Ok(VcpuExit::Halted);
        }
        for _ in 0..QUANTUM {
            match self.step() {
                Ok(Outcome::Retired) => {}
                Ok(Outcome::Exit) => {
                    return Ok(self
                        .execution
                        .exit()
                        .expect("an attempt left an access to complete"));
                }
                Ok(Outcome::Fault { address, access }) => {
                    let page = GuestAddress(address.0 & !(PAGE_SIZE - 1));
                    let fault = MemoryFault::reported(page, PAGE_SIZE, Some(access));
                    return Ok(VcpuExit::MemoryFault(fault));
                }
                Ok(Outcome::Halted) => {
                    self.halted = true;
                    return Ok(VcpuExit::Halted);
                }
                Ok(Outcome::NotMapped { .. }) => {
                    return Err(self.unsupported("page fault"));
                }
                Err(Unsupported(reason)) => return Err(self.unsupported(reason)),
            }
        }
        Ok(VcpuExit::Interrupted)
    }
}

/// Linear addresses are guest-physical ones.
impl Memory for Snapshot<'_> {
    fn translate(&mut self, linear: u64, _write: bool) -> Option<GuestAddress> {
        Some(GuestAddress(linear))
    }

    fn ram(&self, GuestAddress(address): GuestAddress, write: bool) -> Option<Ram<'_>> {
        let slot = self.table().find(address)?;
        if write && slot.access != SlotAccess::ReadWrite {
            return None;
        }
        Some(Ram { memory: &slot.memory, offset: slot.offset + (address - slot.guest) })
    }
}

/// Decoded instructions by address. Guests of the model don't modify code that they have executed.
struct DecodeCache {
    entries: Box<[Instruction]>,
}

/// What a fetch yields, or the fault that it takes.
type Fetched<T> = Result<Result<T, Outcome>, Unsupported>;

impl DecodeCache {
    const SIZE: usize = 4096;

    fn new() -> DecodeCache {
        DecodeCache { entries: vec![Instruction::default(); Self::SIZE].into_boxed_slice() }
    }

    fn get(&mut self, rip: u64, snapshot: &Snapshot<'_>) -> Fetched<Instruction> {
        let index = usize::try_from(rip % Self::SIZE as u64).unwrap_or(0);
        let entry = &mut self.entries[index];
        // An entry that was never filled has no length.
        if entry.ip() != rip || entry.is_invalid() {
            let (bytes, len) = match fetch(rip, snapshot)? {
                Ok(fetched) => fetched,
                Err(fault) => return Ok(Err(fault)),
            };
            let mut decoder = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE);
            *entry = decoder.decode();
        }
        if entry.is_invalid() {
            return Err(Unsupported("no valid instruction"));
        }
        Ok(Ok(*entry))
    }
}

/// The bytes at `rip`, as far as the slot goes.
fn fetch(rip: u64, snapshot: &Snapshot<'_>) -> Fetched<([u8; MAX_INSTRUCTION], usize)> {
    const OUTSIDE: Unsupported = Unsupported("instruction fetch outside of memory slots");
    let slot = snapshot.table().find(rip).ok_or(OUTSIDE)?;
    let offset = rip - slot.guest;
    let len = usize::try_from(slot.len - offset).unwrap_or(usize::MAX).min(MAX_INSTRUCTION);
    let mut bytes = [0; MAX_INSTRUCTION];
    match slot.memory.read(slot.offset + offset, &mut bytes[..len]) {
        Ok(()) => Ok(Ok((bytes, len))),
        Err(AccessError::Inaccessible) => {
            Ok(Err(Outcome::Fault { address: GuestAddress(rip), access: FaultAccess::Execute }))
        }
        Err(_) => Err(OUTSIDE),
    }
}
