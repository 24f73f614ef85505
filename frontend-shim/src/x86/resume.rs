//! An instruction that stops in the middle, for the caller to complete an access to a device.
//!
//! It does not stay suspended: the next attempt executes it again from its start, and every access that
//! an earlier attempt has done is taken from a record instead of being done twice. So each access
//! happens once, whatever is mapped or unmapped between two attempts.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::alu::RF;
use super::execute::execute;
use super::{Bus, MAX_INSTRUCTION, Registers, Stop, Unsupported, Vectors, vector};
use crate::hypervisor::{AccessError, FaultAccess, GuestAddress, HostMapping, PAGE_SIZE, VcpuExit};

/// Where linear addresses lead.
pub(crate) trait Memory {
    /// Guest-physical address of a linear one. `None` where the guest's page tables have none, or none
    /// that may be written to: the processor would raise a page fault.
    fn translate(&mut self, linear: u64, write: bool) -> Option<GuestAddress>;

    /// The memory at a guest-physical address, at least up to the end of its page. `None` where there is
    /// none that takes the access: it is a device's then, and leaves the virtual CPU.
    fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>>;
}

/// Memory that an instruction accesses without leaving the virtual CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ram<'a> {
    pub(crate) memory: &'a HostMapping,
    /// Offset in bytes of the address that was asked for.
    pub(crate) offset: u64,
}

/// How far an attempt came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The registers are those after the instruction. Of one with a repeat prefix, this is one
    /// iteration: until it has finished, `rip` stays at the instruction.
    Retired,
    /// As `Retired`, of HLT.
    Halted,
    /// It needs the access that `exit` gives. Complete that, then make the next attempt. The registers
    /// are as before.
    Exit,
    /// The memory there can't be accessed. Once it can, or is gone, make the next attempt. The registers
    /// are as before.
    Fault {
        /// First byte that was refused.
        address: GuestAddress,
        /// Read or write.
        access: FaultAccess,
    },
    /// [`Memory::translate`] refused. Let the guest execute the instruction: it takes a page fault, or
    /// its page tables have changed meanwhile. The registers are as before.
    NotMapped {
        /// First byte.
        linear: u64,
        /// Whether it was to be written.
        write: bool,
    },
}

/// One instruction of a virtual CPU that a hypervisor could not complete. 64-bit mode only.
///
/// Ports and accesses outside of RAM leave the virtual CPU in pieces of at most 8 bytes that do not
/// cross a page, lowest address first. A read-modify-write is atomic in RAM, and a read followed by a
/// write elsewhere.
#[derive(Debug)]
pub(crate) struct PendingInstruction {
    registers: Registers,
    instruction: Instruction,
    execution: Execution,
}

impl PendingInstruction {
    /// Decodes the instruction at `registers.rip`, which `bytes` begin with; more than
    /// [`MAX_INSTRUCTION`] of them are never needed.
    ///
    /// # Errors
    /// [`Unsupported`] where they are no instruction, or not all of one.
    pub(crate) fn new(registers: Registers, bytes: &[u8]) -> Result<Self, Unsupported> {
        let bytes = &bytes[..bytes.len().min(MAX_INSTRUCTION)];
        let instruction = Decoder::with_ip(64, bytes, registers.rip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return Err(Unsupported("no valid instruction"));
        }
        Ok(Self { registers, instruction, execution: Execution::default() })
    }

    /// Whether it needs the vector registers. A caller that reads them only then sets them with
    /// [`set_vectors`](Self::set_vectors) before the first attempt.
    pub(crate) fn uses_vectors(&self) -> bool {
        vector::is_vector(&self.instruction)
    }

    /// Makes the vector registers known.
    pub(crate) fn set_vectors(&mut self, vectors: Vectors) {
        self.registers.vectors = Some(vectors.into());
    }

    /// Executes it, or as much of it as needs no exit. May be called again after every outcome; after
    /// [`Outcome::Retired`] only while [`repeats`](Self::repeats).
    ///
    /// # Errors
    /// [`Unsupported`]; whatever accesses were completed before stay so.
    pub(crate) fn attempt(&mut self, memory: &mut impl Memory) -> Result<Outcome, Unsupported> {
        if !self.repeats() {
            return Err(Unsupported("an instruction that has retired"));
        }
        self.execution.attempt(&mut self.registers, &self.instruction, memory)
    }

    /// The access that the last attempt needs, as an exit for the VMM to complete.
    pub(crate) fn exit(&mut self) -> Option<VcpuExit<'_>> {
        self.execution.exit()
    }

    /// The registers after the last outcome; vector registers only change where it
    /// [uses](Self::uses_vectors) them.
    pub(crate) fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Whether the instruction is still the next one: it has not retired, or has iterations left. With
    /// iterations left, going on here and letting the guest do so are both right.
    pub(crate) fn repeats(&self) -> bool {
        self.registers.rip == self.instruction.ip()
    }
}

/// What is known of the instruction that is under way, if one is.
#[derive(Debug, Default)]
pub(crate) struct Execution {
    /// Accesses that were done, in order.
    done: Vec<Done>,
    /// The access that the caller is completing.
    pending: Option<Done>,
}

/// An access within one page.
#[derive(Debug, Clone, Copy)]
struct Done {
    step: Step,
    /// Where it leaves the virtual CPU; irrelevant for RAM.
    guest: GuestAddress,
    len: usize,
    /// What was read or written.
    data: [u8; 8],
}

/// What an access is, by linear address or port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Read(u64),
    Write(u64),
    /// Atomic, with the old value as its data.
    Modify(u64),
    PortRead(u16),
    PortWrite(u16),
}

impl Execution {
    /// Executes `instruction`, which must be the same as in the last attempt unless that retired.
    ///
    /// # Errors
    /// See [`PendingInstruction::attempt`].
    pub(crate) fn attempt(
        &mut self,
        registers: &mut Registers,
        instruction: &Instruction,
        memory: &mut impl Memory,
    ) -> Result<Outcome, Unsupported> {
        self.done.extend(self.pending.take());
        let mut after = registers.clone();
        after.rip = instruction.next_ip();
        let mut bus = Attempt { memory, execution: self, next: 0 };
        let outcome = match execute(&mut after, instruction, &mut bus) {
            Ok(()) => Outcome::Retired,
            Err(Stop::Halt) => Outcome::Halted,
            Err(Stop::Bus(outcome)) => return Ok(outcome),
            Err(Stop::Unsupported(what)) => return Err(Unsupported(what)),
        };
        after.flags &= !RF;
        *registers = after;
        self.done.clear();
        Ok(outcome)
    }

    /// See [`PendingInstruction::exit`].
    pub(crate) fn exit(&mut self) -> Option<VcpuExit<'_>> {
        let Done { step, guest: address, len, data } = self.pending.as_mut()?;
        let data = &mut data[..*len];
        Some(match *step {
            Step::Read(_) => VcpuExit::MmioRead { address: *address, data },
            Step::Write(_) | Step::Modify(_) => VcpuExit::MmioWrite { address: *address, data },
            Step::PortRead(port) => VcpuExit::PioRead { port, width: data.len(), data },
            Step::PortWrite(port) => VcpuExit::PioWrite { port, width: data.len(), data },
        })
    }
}

/// One attempt at one instruction.
struct Attempt<'a, M> {
    memory: &'a mut M,
    execution: &'a mut Execution,
    /// How many of the accesses done have been used in this attempt.
    next: usize,
}

impl<M: Memory> Attempt<'_, M> {
    fn replaying(&self) -> bool {
        self.next < self.execution.done.len()
    }

    /// The data of an access that an earlier attempt has done.
    fn replay(&mut self, step: Step, len: usize) -> Result<Option<[u8; 8]>, Unsupported> {
        let Some(done) = self.execution.done.get(self.next) else { return Ok(None) };
        if (done.step, done.len) != (step, len) {
            return Err(Unsupported("an instruction that changed between two attempts"));
        }
        self.next += 1;
        Ok(Some(done.data))
    }

    /// Records an access to RAM as done.
    fn record(&mut self, step: Step, part: &[u8]) {
        self.execution.done.push(done(step, GuestAddress(0), part));
        self.next += 1;
    }

    /// Asks the caller for an access.
    fn leave(&mut self, step: Step, guest: GuestAddress, part: &[u8]) -> Stop<Outcome> {
        self.execution.pending = Some(done(step, guest, part));
        Stop::Bus(Outcome::Exit)
    }

    fn translate(&mut self, linear: u64, write: bool) -> Result<GuestAddress, Stop<Outcome>> {
        let refused = Stop::Bus(Outcome::NotMapped { linear, write });
        self.memory.translate(linear, write).ok_or(refused)
    }

    /// Both pages of an access must be mapped before any of it happens.
    fn translate_all(
        &mut self,
        address: u64,
        len: usize,
        write: bool,
    ) -> Result<(), Stop<Outcome>> {
        let last = address.wrapping_add(len as u64 - 1);
        if !self.replaying() && address / PAGE_SIZE != last / PAGE_SIZE {
            self.translate(address, write)?;
            self.translate(last & !(PAGE_SIZE - 1), write)?;
        }
        Ok(())
    }

    fn is_ram(&mut self, address: u64, write: bool) -> Result<bool, Stop<Outcome>> {
        let guest = self.translate(address, write)?;
        Ok(self.memory.ram(guest, write).is_some())
    }

    /// A read-modify-write in RAM, at an aligned address; `None` where it is not RAM.
    fn modify_ram(
        &mut self,
        address: u64,
        len: usize,
        update: &mut impl FnMut(u64) -> u64,
    ) -> Result<Option<u64>, Stop<Outcome>> {
        let guest = self.translate(address, true)?;
        let Some(ram) = self.memory.ram(guest, true) else { return Ok(None) };
        let faulted = |error| fault(error, guest, FaultAccess::Write);
        let mut data = [0; 8];
        ram.memory.read(ram.offset, &mut data[..len]).map_err(faulted)?;
        let mut old = u64::from_le_bytes(data);
        loop {
            let new = update(old);
            let found = ram.memory.compare_exchange(ram.offset, len, old, new).map_err(faulted)?;
            if found == old {
                self.record(Step::Modify(address), &old.to_le_bytes()[..len]);
                return Ok(Some(old));
            }
            old = found;
        }
    }
}

impl<M: Memory> Bus for Attempt<'_, M> {
    type Error = Outcome;

    fn read(&mut self, address: u64, len: usize) -> Result<u64, Stop<Outcome>> {
        let mut data = [0; 8];
        self.read_bytes(address, &mut data[..len])?;
        Ok(u64::from_le_bytes(data))
    }

    fn write(&mut self, address: u64, len: usize, value: u64) -> Result<(), Stop<Outcome>> {
        self.write_bytes(address, &value.to_le_bytes()[..len])
    }

    fn read_bytes(&mut self, address: u64, data: &mut [u8]) -> Result<(), Stop<Outcome>> {
        self.translate_all(address, data.len(), false)?;
        for (linear, range) in pieces(address, data.len()) {
            let (step, part) = (Step::Read(linear), &mut data[range]);
            if let Some(read) = self.replay(step, part.len())? {
                part.copy_from_slice(&read[..part.len()]);
                continue;
            }
            let guest = self.translate(linear, false)?;
            match self.memory.ram(guest, false) {
                Some(ram) => ram
                    .memory
                    .read(ram.offset, part)
                    .map_err(|error| fault(error, guest, FaultAccess::Read))?,
                None => return Err(self.leave(step, guest, part)),
            }
            self.record(step, part);
        }
        Ok(())
    }

    fn write_bytes(&mut self, address: u64, data: &[u8]) -> Result<(), Stop<Outcome>> {
        self.translate_all(address, data.len(), true)?;
        for (linear, range) in pieces(address, data.len()) {
            let (step, part) = (Step::Write(linear), &data[range]);
            if self.replay(step, part.len())?.is_some() {
                continue;
            }
            let guest = self.translate(linear, true)?;
            match self.memory.ram(guest, true) {
                Some(ram) => ram
                    .memory
                    .write(ram.offset, part)
                    .map_err(|error| fault(error, guest, FaultAccess::Write))?,
                None => return Err(self.leave(step, guest, part)),
            }
            self.record(step, part);
        }
        Ok(())
    }

    /// In RAM this is atomic, with or without a LOCK prefix. Elsewhere it is a read followed by a write.
    fn modify(
        &mut self,
        address: u64,
        len: usize,
        locked: bool,
        mut update: impl FnMut(u64) -> u64,
    ) -> Result<u64, Stop<Outcome>> {
        let aligned = address.is_multiple_of(len as u64);
        match self.execution.done.get(self.next).map(|done| done.step) {
            Some(step @ Step::Modify(_)) => {
                if let Some(old) = self.replay(step, len)? {
                    return Ok(u64::from_le_bytes(old));
                }
            }
            Some(_) => {}
            None if aligned => {
                if let Some(old) = self.modify_ram(address, len, &mut update)? {
                    return Ok(old);
                }
            }
            None => {
                self.translate_all(address, len, true)?;
                for (linear, _) in pieces(address, len) {
                    if locked && self.is_ram(linear, true)? {
                        return Err(Stop::Unsupported("a locked access that is not aligned"));
                    }
                }
            }
        }
        let old = self.read(address, len)?;
        self.write(address, len, update(old))?;
        Ok(old)
    }

    fn modify_16(
        &mut self,
        address: u64,
        update: impl FnOnce(u128) -> u128,
    ) -> Result<u128, Stop<Outcome>> {
        if !address.is_multiple_of(16) {
            return Err(Stop::Unsupported("an access of 16 bytes that is not aligned"));
        }
        if !self.replaying() && self.is_ram(address, true)? {
            return Err(Stop::Unsupported("an atomic access of 16 bytes to RAM"));
        }
        let mut data = [0; 16];
        self.read_bytes(address, &mut data)?;
        let old = u128::from_le_bytes(data);
        self.write_bytes(address, &update(old).to_le_bytes())?;
        Ok(old)
    }

    fn port_read(&mut self, port: u16, len: usize) -> Result<u64, Stop<Outcome>> {
        let step = Step::PortRead(port);
        match self.replay(step, len)? {
            Some(read) => Ok(u64::from_le_bytes(read)),
            None => Err(self.leave(step, GuestAddress(0), &[0; 8][..len])),
        }
    }

    fn port_write(&mut self, port: u16, len: usize, value: u64) -> Result<(), Stop<Outcome>> {
        let step = Step::PortWrite(port);
        match self.replay(step, len)? {
            Some(_) => Ok(()),
            None => Err(self.leave(step, GuestAddress(0), &value.to_le_bytes()[..len])),
        }
    }
}

fn done(step: Step, guest: GuestAddress, part: &[u8]) -> Done {
    let mut data = [0; 8];
    data[..part.len()].copy_from_slice(part);
    Done { step, guest, len: part.len(), data }
}

/// Cuts an access at the end of the page, and what is left into 8 bytes each.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let linear = address.wrapping_add(at as u64);
        let to_page_end = usize::try_from(PAGE_SIZE - linear % PAGE_SIZE).unwrap_or(8);
        let range = at..at + (len - at).min(8).min(to_page_end);
        at = range.end;
        (!range.is_empty()).then_some((linear, range))
    })
}

fn fault(error: AccessError, address: GuestAddress, access: FaultAccess) -> Stop<Outcome> {
    match error {
        AccessError::Inaccessible | AccessError::ReadOnly => {
            Stop::Bus(Outcome::Fault { address, access })
        }
        AccessError::OutOfBounds { .. } | AccessError::Misaligned { .. } => {
            Stop::Unsupported("a slot that passes the end of its memory")
        }
    }
}
