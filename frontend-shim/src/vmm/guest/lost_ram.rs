//! Reads RAM, has the VMM take its memory away, and reads it again: a genuine fault, which nobody may
//! turn into a read of all ones. The program does not come back from it.

use iced_x86::IcedError;
use iced_x86::code_asm::{al, dx, edx, r10, rbx, rcx};

use super::LOSE_RAM_PORT;
use super::asm::{Assembly, Width};
use super::layout::LOST_RAM;
use super::stats::field;

const VALUE: u64 = 0x105f_3a11_0000_a5a5;

pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    asm.a.mov(rbx, LOST_RAM.0)?;
    asm.a.mov(r10, VALUE)?;
    asm.store64(r10, field::MAPPED_WRITES)?;
    asm.read(Width::Qword)?;
    asm.a.mov(rcx, r10)?;
    asm.expect()?;
    asm.a.mov(edx, u32::from(LOSE_RAM_PORT))?;
    asm.a.out(dx, al)?;
    asm.read(Width::Qword)?;
    asm.record_wrong()?;
    asm.exit()?;
    asm.finish(address)
}
