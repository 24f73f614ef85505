//! What an instruction sees of the machine: memory slots, and exits for everything else.
//!
//! An instruction that needs an exit in the middle (the read half of `add [mmio], eax`) stops there and
//! is executed again from its start once the exit is completed. [`Completed`] remembers the exits it
//! already had, so that the second attempt passes them without asking again. Registers and memory slots
//! change only after the last exit of an instruction, which makes the repetition invisible.

use super::slots::Snapshot;
use crate::hypervisor::memory::AccessError;
use crate::hypervisor::slots::Slot;
use crate::hypervisor::{FaultAccess, GuestAddress, MemoryFault, PAGE_SIZE, SlotAccess};
use crate::x86;

/// Why the bus stopped an instruction before its end.
#[derive(Debug)]
pub(super) enum Interruption {
    /// The machine has to complete an access first.
    Exit(Access),
    Fault(MemoryFault),
}

/// How an attempt at an instruction stopped.
pub(super) type Stop = x86::Stop<Interruption>;

/// An access that leaves the virtual CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) target: Target,
    pub(super) write: bool,
    pub(super) len: usize,
    /// Data written, or room for the data read.
    pub(super) data: [u8; 8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Memory(u64),
    Port(u16),
}

/// Exits that the current instruction had, in order, with the data they were completed with.
#[derive(Debug, Default)]
pub(super) struct Completed {
    accesses: Vec<Access>,
}

impl Completed {
    pub(super) fn push(&mut self, access: Access) {
        self.accesses.push(access);
    }

    pub(super) fn clear(&mut self) {
        self.accesses.clear();
    }
}

/// One attempt at one instruction.
pub(super) struct Bus<'a> {
    snapshot: &'a Snapshot<'a>,
    completed: &'a [Access],
}

impl<'a> Bus<'a> {
    pub(super) fn new(snapshot: &'a Snapshot<'a>, completed: &'a Completed) -> Bus<'a> {
        Bus { snapshot, completed: &completed.accesses }
    }

    fn writable_slot(&self, address: u64) -> Option<&'a Slot> {
        self.snapshot.table().find(address).filter(|slot| slot.access == SlotAccess::ReadWrite)
    }

    /// Whether the next completed exit is this access: a slot that appeared in the meantime must not
    /// make the instruction access memory a second time.
    fn was_exit(&self, address: u64, write: bool, len: usize) -> bool {
        self.completed.first().is_some_and(|access| {
            access.target == Target::Memory(address) && access.write == write && access.len == len
        })
    }

    /// The data of an exit that is completed already, or a stop that asks for it.
    fn exit(&mut self, target: Target, write: Option<&[u8]>, len: usize) -> Result<[u8; 8], Stop> {
        let mut wanted = Access { target, write: write.is_some(), len, data: [0; 8] };
        if let Some(data) = write {
            wanted.data[..len].copy_from_slice(data);
        }
        match self.completed {
            [] => Err(Stop::Bus(Interruption::Exit(wanted))),
            [done, rest @ ..] => {
                if (done.target, done.write, done.len) != (target, wanted.write, len) {
                    return Err(Stop::Unsupported(
                        "slots changed within an access that spans pages",
                    ));
                }
                self.completed = rest;
                Ok(done.data)
            }
        }
    }
}

impl x86::Bus for Bus<'_> {
    type Error = Interruption;

    fn read(&mut self, address: u64, len: usize) -> Result<u64, Stop> {
        let mut data = [0; 8];
        for (address, range) in fragments(address, len) {
            let part = &mut data[range];
            match self.snapshot.table().find(address) {
                Some(slot) if !self.was_exit(address, false, part.len()) => {
                    let offset = slot.offset + (address - slot.guest);
                    slot.memory
                        .read(offset, part)
                        .map_err(|error| fault(error, address, FaultAccess::Read))?;
                }
                _ => {
                    let read = self.exit(Target::Memory(address), None, part.len())?;
                    part.copy_from_slice(&read[..part.len()]);
                }
            }
        }
        Ok(u64::from_le_bytes(data))
    }

    fn write(&mut self, address: u64, len: usize, value: u64) -> Result<(), Stop> {
        let data = value.to_le_bytes();
        for (address, range) in fragments(address, len) {
            let part = &data[range];
            match self.writable_slot(address) {
                Some(slot) if !self.was_exit(address, true, part.len()) => {
                    let offset = slot.offset + (address - slot.guest);
                    slot.memory
                        .write(offset, part)
                        .map_err(|error| fault(error, address, FaultAccess::Write))?;
                }
                _ => {
                    self.exit(Target::Memory(address), Some(part), part.len())?;
                }
            }
        }
        Ok(())
    }

    /// In a slot this is atomic, with or without a LOCK prefix. Elsewhere it is a read exit followed by a
    /// write exit.
    fn modify(
        &mut self,
        address: u64,
        len: usize,
        locked: bool,
        mut update: impl FnMut(u64) -> u64,
    ) -> Result<u64, Stop> {
        let aligned = address.is_multiple_of(len as u64);
        if locked && !aligned {
            return Err(Stop::Unsupported("a locked access that is not aligned"));
        }
        let slot =
            self.writable_slot(address).filter(|_| aligned && !self.was_exit(address, false, len));
        let Some(slot) = slot else {
            let old = self.read(address, len)?;
            self.write(address, len, update(old))?;
            return Ok(old);
        };
        let offset = slot.offset + (address - slot.guest);
        let mut data = [0; 8];
        let faulted = |error| fault(error, address, FaultAccess::Write);
        slot.memory.read(offset, &mut data[..len]).map_err(faulted)?;
        let mut old = u64::from_le_bytes(data);
        loop {
            let found =
                slot.memory.compare_exchange(offset, len, old, update(old)).map_err(faulted)?;
            if found == old {
                return Ok(old);
            }
            old = found;
        }
    }

    fn port_read(&mut self, port: u16, len: usize) -> Result<u64, Stop> {
        self.exit(Target::Port(port), None, len).map(u64::from_le_bytes)
    }

    fn port_write(&mut self, port: u16, len: usize, value: u64) -> Result<(), Stop> {
        self.exit(Target::Port(port), Some(&value.to_le_bytes()[..len]), len).map(|_| ())
    }
}

/// The parts of an access within one page each: an access that spans pages may span slots.
fn fragments(address: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let to_page_end = usize::try_from(PAGE_SIZE - address % PAGE_SIZE).unwrap_or(len);
    let first = len.min(to_page_end);
    let second = address.wrapping_add(first as u64);
    [(address, 0..first), (second, first..len)].into_iter().filter(|(_, range)| !range.is_empty())
}

fn fault(error: AccessError, address: u64, access: FaultAccess) -> Stop {
    match error {
        AccessError::Inaccessible | AccessError::ReadOnly => {
            let page = GuestAddress(address & !(PAGE_SIZE - 1));
            let fault = MemoryFault::reported(page, PAGE_SIZE, Some(access));
            Stop::Bus(Interruption::Fault(fault))
        }
        AccessError::OutOfBounds { .. } | AccessError::Misaligned { .. } => {
            Stop::Unsupported("a slot that passes the end of its memory")
        }
    }
}
