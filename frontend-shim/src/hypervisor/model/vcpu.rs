//! The fetch, decode, execute loop.

use iced_x86::{Decoder, DecoderOptions, Instruction, Register};

use super::bus::{Access, Bus, Completed, Interruption, Stop, Target};
use super::slots::{SlotReader, Snapshot};
use crate::hypervisor::memory::AccessError;
use crate::hypervisor::{
    FaultAccess, GuestAddress, HypervisorError, MemoryFault, PAGE_SIZE, Vcpu, VcpuEntry, VcpuExit,
};
use crate::x86::{Registers, execute};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;

/// Instructions between two returns to the caller: nobody can send the model a signal, so it gives the
/// caller a chance to stop a guest that never exits.
const QUANTUM: u32 = 1 << 20;

/// A virtual CPU of the model.
pub(super) struct ModelVcpu {
    id: u32,
    registers: Registers,
    slots: SlotReader,
    decoded: DecodeCache,
    completed: Completed,
    /// The access that the caller is completing.
    pending: Option<Access>,
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
            completed: Completed::default(),
            pending: None,
            halted: false,
        }
    }

    /// Executes one instruction, or as much of it as needs no exit.
    fn step(&mut self) -> Result<(), Stop> {
        let snapshot = self.slots.enter();
        let instruction = self.decoded.get(self.registers.rip, &snapshot)?;
        let mut registers = self.registers.clone();
        registers.rip = instruction.next_ip();
        let mut bus = Bus::new(&snapshot, &self.completed);
        let result = execute(&mut registers, &instruction, &mut bus);
        if matches!(result, Ok(()) | Err(Stop::Halt)) {
            self.registers = registers;
            self.completed.clear();
        }
        result
    }

    fn unsupported(&mut self, reason: &'static str) -> HypervisorError {
        let rip = self.registers.rip;
        let snapshot = self.slots.enter();
        let bytes = fetch(rip, &snapshot).map_or(Vec::new(), |(bytes, len)| bytes[..len].to_vec());
        HypervisorError::UnsupportedInstruction { vcpu: self.id, rip, bytes, reason }
    }
}

impl Vcpu for ModelVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError> {
        if let Some(access) = self.pending.take() {
            self.completed.push(access);
        }
        if self.halted {
            return Ok(VcpuExit::Halted);
        }
        for _ in 0..QUANTUM {
            match self.step() {
                Ok(()) => {}
                Err(Stop::Bus(Interruption::Exit(access))) => {
                    return Ok(exit(self.pending.insert(access)));
                }
                Err(Stop::Bus(Interruption::Fault(fault))) => {
                    return Ok(VcpuExit::MemoryFault(fault));
                }
                Err(Stop::Halt) => {
                    self.halted = true;
                    return Ok(VcpuExit::Halted);
                }
                Err(Stop::Unsupported(reason)) => return Err(self.unsupported(reason)),
            }
        }
        Ok(VcpuExit::Interrupted)
    }
}

fn exit(access: &mut Access) -> VcpuExit<'_> {
    let data = &mut access.data[..access.len];
    match (access.target, access.write) {
        (Target::Memory(address), false) => {
            VcpuExit::MmioRead { address: GuestAddress(address), data }
        }
        (Target::Memory(address), true) => {
            VcpuExit::MmioWrite { address: GuestAddress(address), data }
        }
        (Target::Port(port), false) => VcpuExit::PioRead { port, width: data.len(), data },
        (Target::Port(port), true) => VcpuExit::PioWrite { port, width: data.len(), data },
    }
}

/// Decoded instructions by address. Guests of the model don't modify code that they have executed.
struct DecodeCache {
    entries: Box<[Instruction]>,
}

impl DecodeCache {
    const SIZE: usize = 4096;

    fn new() -> DecodeCache {
        DecodeCache { entries: vec![Instruction::default(); Self::SIZE].into_boxed_slice() }
    }

    fn get(&mut self, rip: u64, snapshot: &Snapshot<'_>) -> Result<Instruction, Stop> {
        let index = usize::try_from(rip % Self::SIZE as u64).unwrap_or(0);
        let entry = &mut self.entries[index];
        // An entry that was never filled has no length.
        if entry.ip() != rip || entry.is_invalid() {
            let (bytes, len) = fetch(rip, snapshot)?;
            let mut decoder = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE);
            *entry = decoder.decode();
        }
        if entry.is_invalid() {
            return Err(Stop::Unsupported("no valid instruction"));
        }
        Ok(*entry)
    }
}

/// The bytes at `rip`, as far as the slot goes.
fn fetch(rip: u64, snapshot: &Snapshot<'_>) -> Result<([u8; MAX_INSTRUCTION], usize), Stop> {
    const OUTSIDE: Stop = Stop::Unsupported("instruction fetch outside of memory slots");
    let slot = snapshot.table().find(rip).ok_or(OUTSIDE)?;
    let offset = rip - slot.guest;
    let len = usize::try_from(slot.len - offset).unwrap_or(usize::MAX).min(MAX_INSTRUCTION);
    let mut bytes = [0; MAX_INSTRUCTION];
    match slot.memory.read(slot.offset + offset, &mut bytes[..len]) {
        Ok(()) => Ok((bytes, len)),
        Err(AccessError::Inaccessible) => {
            let page = GuestAddress(rip & !(PAGE_SIZE - 1));
            let fault = MemoryFault::reported(page, PAGE_SIZE, Some(FaultAccess::Execute));
            Err(Stop::Bus(Interruption::Fault(fault)))
        }
        Err(_) => Err(OUTSIDE),
    }
}
