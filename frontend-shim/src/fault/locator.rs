//! Where an access that the hypervisor could not complete went: found from registers, page tables and
//! the instruction alone, because touching the memory itself could have effects.
//!
//! [`locate`] lists every access that the instruction makes, with guest-physical address, size and
//! direction. [`narrow()`] drops those that can't have faulted.

mod lanes;
mod narrow;
mod operands;
#[cfg(test)]
mod property;
mod state;
#[cfg(test)]
mod tests;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

pub use self::narrow::{Backing, narrow};
pub use self::state::{CodeWidth, SegmentBases, VcpuState};

use self::operands::LinearAccess;
use super::{FaultAccess, GuestAccess, Unlocated};
use crate::GuestAddress;

/// Longest instruction in bytes (AMD64 APM volume 3, 1.1).
const MAX_INSTRUCTION: usize = 15;

const PAGE_SIZE: u64 = 4096;

/// What can be asked of a virtual CPU that is stopped in front of an instruction.
pub trait StoppedVcpu {
    /// The registers that addresses are made of.
    fn state(&self) -> &VcpuState;

    /// What the guest's page tables make of a linear address; `None` where they map nothing.
    fn translate(&self, linear: u64) -> Option<GuestAddress>;

    /// Copies bytes within one page. Returns false, and touches nothing, unless all of them are RAM.
    fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool;

    /// Vector register `number` (0 to 31), zero-extended; `None` if it can't be read. Only instructions
    /// whose addresses or masks are in vector registers ask for it.
    fn vector(&self, number: usize) -> Option<[u8; 64]>;

    /// AVX-512 mask register `number` (0 to 7); `None` if it can't be read.
    fn mask(&self, number: usize) -> Option<u64>;
}

/// All memory accesses of the instruction that `vcpu` is about to execute, its own fetch included, each
/// within one page and about in the order of execution. Of an instruction with a REP prefix it is the
/// iteration that is next. Prefetches are left out: they never fault. So are accesses that the guest's
/// page tables don't map, which the guest's own page fault comes before.
///
/// If the instruction is not in RAM, its fetch is all that is known. Accesses that the processor makes
/// to its own tables (descriptors, page tables, the stack of an interrupt) are not listed.
///
/// # Errors
/// [`Unlocated::NotMapped`] if the guest maps none of it, [`Unlocated::UnknownInstruction`] for bytes
/// that are no instruction or one whose accesses are not known, and [`Unlocated::VectorRegisters`].
pub fn locate(vcpu: &dyn StoppedVcpu) -> Result<Vec<GuestAccess>, Unlocated> {
    let fetched = fetch(vcpu)?;
    let mut accesses = fetched.accesses;
    let Some(instruction) = fetched.instruction else {
        return Ok(accesses);
    };
    let mut unmapped = None;
    for linear in operands::linear_accesses(vcpu, &instruction)? {
        for piece in linear.pieces(vcpu.state()) {
            let kind = if linear.write { FaultAccess::Write } else { FaultAccess::Read };
            match vcpu.translate(piece.address) {
                Some(address) => {
                    let access = GuestAccess { address, size: piece.size, kind: Some(kind) };
                    if !accesses.contains(&access) {
                        accesses.push(access);
                    }
                }
                None => unmapped = unmapped.or(Some(piece.address)),
            }
        }
    }
    let has_operands = accesses.iter().any(|access| access.kind != Some(FaultAccess::Execute));
    match unmapped {
        Some(linear) if !has_operands => Err(Unlocated::NotMapped(linear)),
        _ => Ok(accesses),
    }
}

/// The fetch of an instruction, and the instruction unless a part of it is not in RAM.
struct Fetched {
    accesses: Vec<GuestAccess>,
    instruction: Option<Instruction>,
}

fn fetch(vcpu: &dyn StoppedVcpu) -> Result<Fetched, Unlocated> {
    let state = vcpu.state();
    let start = state.code_address();
    let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
    let mut accesses = Vec::new();
    // The second page only if the instruction reaches into it: the processor would not fault otherwise.
    for piece in
        (LinearAccess { address: start, size: MAX_INSTRUCTION as u64, write: false }).pieces(state)
    {
        let address = vcpu.translate(piece.address).ok_or(Unlocated::NotMapped(piece.address))?;
        let from = bytes.len();
        bytes.resize(from + usize::try_from(piece.size).expect("15 bytes at most"), 0);
        let in_ram = vcpu.read_ram(address, &mut bytes[from..]);
        accesses.push(GuestAccess { address, size: piece.size, kind: Some(FaultAccess::Execute) });
        if !in_ram {
            return Ok(Fetched { accesses, instruction: None });
        }
        let mut decoder =
            Decoder::with_ip(state.code.bits(), &bytes, state.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => {
                let last = accesses.last_mut().expect("one was just added");
                last.size = (instruction.len() - from) as u64;
                return Ok(Fetched { accesses, instruction: Some(instruction) });
            }
            DecoderError::NoMoreBytes => {}
            _ => break,
        }
    }
    Err(Unlocated::UnknownInstruction(state.rip))
}
