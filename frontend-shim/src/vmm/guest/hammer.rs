//! Reads and writes of all widths against functions whose decode somebody else switches.
//!
//! What a read may return:
//!
//! | register | besides all ones |
//! |---|---|
//! | edu identification | `0x010000ed` |
//! | edu liveness, after a tagged write | the inverse of any virtual CPU's tagged value |
//! | edu DMA destination, after a tagged write | any virtual CPU's tagged value |
//! | own cell of the mapped BAR, after a write | own values, from the last one seen to the last one written |
//! | the same with 1 and 2 bytes | the constant bytes of own values |
//! | edu with 1 and 2 bytes | nothing: the device answers only 4 and 8 |
//!
//! A register may also hold its reset value of zero until a tagged value has been seen in it: all writes
//! so far may have met a function that did not decode. And at any time, where functions may be reset.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, dword_ptr, eax, ecx, qword_ptr, r8, r9, r10, r10d, r11, r12, r13, r13d, r15,
    rax, rbp, rbx, rcx, rdi, rdx, rsi,
};

use super::asm::{Assembly, EDU_ID, Width, imm};
use super::layout::{HAMMER_MEMORY, HAMMER_MEMORY_SHIFT, ROW_SIZE, control, row};
use super::stats::{FINISHED, field};

const EDU_LIVENESS: i32 = 0x04;
const EDU_DMA_DESTINATION: i32 = 0x88;

/// Most significant byte of what is written to each register. Then comes the number of the virtual CPU.
const LIVENESS_TAG: u32 = 0x5a;
const DESTINATION_TAG: u64 = 0xb7;
const CELL_TAG: u64 = 0xc3;
/// Least significant byte of a cell, so that a read of its low bytes is never all ones by chance.
const CELL_LOW: u32 = 0x3c;

/// What is remembered per device, each a u64: whether a tagged value was seen in the edu registers, and
/// the last value seen in the cell.
const SEEN_LIVENESS: i32 = 0;
const SEEN_DESTINATION: i32 = 8;
const LAST_CELL: i32 = 16;

/// log2 of the distance of two virtual CPUs' cells.
const CELL_SHIFT: u32 = 6;

/// Registers beyond the common ones: `r8` virtual CPU << 48, `r9` what is remembered of the first
/// device, `r11` of this one, `rsi` BAR, `r10` value written.
pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    let (mut round, mut stop) = (asm.label(), asm.label());
    asm.a.mov(r8, rdi)?;
    asm.a.shl(r8, 48)?;
    asm.a.mov(r9, rdi)?;
    asm.a.shl(r9, HAMMER_MEMORY_SHIFT)?;
    asm.a.add(r9, imm(HAMMER_MEMORY))?;
    asm.a.xor(r13, r13)?;

    asm.bind(&mut round)?;
    asm.a.inc(r13)?;
    asm.a.mov(r11, r9)?;
    asm.each_device(|asm| {
        asm.a.cmp(dword_ptr(r12 + control::STOP), 0)?;
        asm.a.jne(stop)?;
        asm.a.mov(rsi, qword_ptr(r15 + row::TRAPPED_BAR))?;
        edu_identification(asm)?;
        edu_liveness(asm)?;
        edu_dma_destination(asm)?;
        edu_narrow(asm)?;
        asm.a.mov(rsi, qword_ptr(r15 + row::MAPPED_BAR))?;
        cell(asm)?;
        asm.a.add(r11, ROW_SIZE)
    })?;
    asm.a.mov(qword_ptr(rbp + field::PROGRESS), r13)?;
    asm.a.pause()?;
    asm.a.cmp(dword_ptr(r12 + control::STOP), 0)?;
    asm.a.je(round)?;
    asm.bind(&mut stop)?;
    asm.a.mov(qword_ptr(rbp + field::STATE), FINISHED)?;
    asm.halt()?;
    asm.finish(address)
}

fn edu_identification(asm: &mut Assembly) -> Result<(), IcedError> {
    let mut done = asm.label();
    asm.a.mov(rbx, rsi)?;
    asm.read_or(Width::Dword, done)?;
    asm.a.mov(ecx, EDU_ID)?;
    asm.expect()?;
    asm.bind(&mut done)
}

fn edu_liveness(asm: &mut Assembly) -> Result<(), IcedError> {
    let mut done = asm.label();
    asm.a.lea(rbx, qword_ptr(rsi + EDU_LIVENESS))?;
    // Tag, virtual CPU, low 16 bits of the round.
    asm.a.mov(rax, r8)?;
    asm.a.shr(rax, 32)?;
    asm.a.mov(r10d, r13d)?;
    asm.a.and(r10d, 0xffff)?;
    asm.a.or(r10d, eax)?;
    asm.a.or(r10d, (LIVENESS_TAG << 24).cast_signed())?;
    asm.store32(r10d, field::TRAPPED_WRITES)?;
    asm.read_or(Width::Dword, done)?;
    asm.a.mov(rdx, rax)?;
    asm.a.shr(rdx, 24)?;
    asm.a.mov(ecx, r10d)?;
    asm.a.not(ecx)?;
    tag_or_reset(asm, u64::from(!LIVENESS_TAG & 0xff), SEEN_LIVENESS)?;
    asm.bind(&mut done)
}

fn edu_dma_destination(asm: &mut Assembly) -> Result<(), IcedError> {
    let mut done = asm.label();
    asm.a.lea(rbx, qword_ptr(rsi + EDU_DMA_DESTINATION))?;
    asm.tagged(r10, DESTINATION_TAG << 56, 0)?;
    asm.a.or(r10, r8)?;
    asm.store64(r10, field::TRAPPED_WRITES)?;
    asm.read_or(Width::Qword, done)?;
    asm.a.mov(rdx, rax)?;
    asm.a.shr(rdx, 56)?;
    asm.a.mov(rcx, r10)?;
    tag_or_reset(asm, DESTINATION_TAG, SEEN_DESTINATION)?;
    asm.bind(&mut done)
}

/// Checks the tag in `rdx` of the value in `rax`.
fn tag_or_reset(asm: &mut Assembly, tag: u64, seen: i32) -> Result<(), IcedError> {
    let (mut tagged, mut wrong, mut done) = (asm.label(), asm.label(), asm.label());
    asm.a.cmp(rdx, imm(tag))?;
    asm.a.je(tagged)?;
    asm.a.test(rax, rax)?;
    asm.a.jne(wrong)?;
    asm.a.cmp(qword_ptr(r11 + seen), 0)?;
    asm.a.je(done)?;
    asm.a.cmp(qword_ptr(r12 + control::RESETS), 0)?;
    asm.a.jne(done)?;
    asm.bind(&mut wrong)?;
    asm.record_wrong()?;
    asm.a.jmp(done)?;
    asm.bind(&mut tagged)?;
    asm.a.mov(qword_ptr(r11 + seen), 1)?;
    asm.bind(&mut done)
}

fn edu_narrow(asm: &mut Assembly) -> Result<(), IcedError> {
    let mut undefined = asm.label();
    asm.a.cmp(qword_ptr(r15 + row::NARROW), 0)?;
    asm.a.je(undefined)?;
    asm.a.mov(rbx, rsi)?;
    asm.load(Width::Word)?;
    asm.count(field::NARROW_READS)?;
    asm.a.mov(ecx, 0xffff)?;
    asm.expect()?;
    asm.a.lea(rbx, qword_ptr(rsi + EDU_LIVENESS))?;
    asm.load(Width::Byte)?;
    asm.count(field::NARROW_READS)?;
    asm.a.mov(ecx, 0xff)?;
    asm.expect()?;
    asm.bind(&mut undefined)
}

fn cell(asm: &mut Assembly) -> Result<(), IcedError> {
    let (mut done, mut wrong, mut narrow) = (asm.label(), asm.label(), asm.label());
    let (mut unseen, mut no_reset) = (asm.label(), asm.label());
    asm.a.mov(rbx, rdi)?;
    asm.a.shl(rbx, CELL_SHIFT)?;
    asm.a.add(rbx, rsi)?;
    asm.tagged(r10, CELL_TAG << 56 | u64::from(CELL_LOW), 8)?;
    asm.a.or(r10, r8)?;
    asm.store64(r10, field::MAPPED_WRITES)?;
    asm.read_or(Width::Qword, narrow)?;

    asm.a.test(rax, rax)?;
    asm.a.jne(no_reset)?;
    asm.a.cmp(qword_ptr(r12 + control::RESETS), 0)?;
    asm.a.jne(unseen)?;
    asm.bind(&mut no_reset)?;

    let last = qword_ptr(r11 + LAST_CELL);
    asm.a.cmp(rax, last)?;
    asm.a.jb(wrong)?;
    asm.a.cmp(rax, r10)?;
    asm.a.ja(wrong)?;
    // At least the last value seen and zero: nothing was seen yet, and no write has arrived.
    asm.a.test(rax, rax)?;
    asm.a.je(unseen)?;
    asm.a.mov(rdx, rax)?;
    asm.a.xor(rdx, r10)?;
    asm.a.shr(rdx, 48)?;
    asm.a.jne(wrong)?;
    asm.a.cmp(al, CELL_LOW)?;
    asm.a.jne(wrong)?;
    asm.a.mov(last, rax)?;
    asm.a.jmp(narrow)?;
    asm.bind(&mut wrong)?;
    asm.a.mov(rcx, r10)?;
    asm.record_wrong()?;
    asm.bind(&mut unseen)?;

    asm.bind(&mut narrow)?;
    let mut after_word = asm.label();
    asm.read_or(Width::Word, after_word)?;
    asm.a.mov(ecx, eax)?;
    asm.a.and(ecx, 0xff)?;
    constant_byte_or_reset(asm, CELL_LOW)?;
    asm.bind(&mut after_word)?;
    asm.a.add(rbx, 7)?;
    asm.read_or(Width::Byte, done)?;
    asm.a.mov(ecx, eax)?;
    constant_byte_or_reset(asm, u32::try_from(CELL_TAG).unwrap_or(0))?;
    asm.bind(&mut done)
}

/// Checks that `ecx` is `byte`, or that `rax` is zero and nothing was seen in the cell yet.
fn constant_byte_or_reset(asm: &mut Assembly, byte: u32) -> Result<(), IcedError> {
    let mut right: CodeLabel = asm.label();
    let mut wrong = asm.label();
    asm.a.cmp(ecx, byte)?;
    asm.a.je(right)?;
    asm.a.test(rax, rax)?;
    asm.a.jne(wrong)?;
    asm.a.cmp(qword_ptr(r11 + LAST_CELL), 0)?;
    asm.a.je(right)?;
    asm.a.cmp(qword_ptr(r12 + control::RESETS), 0)?;
    asm.a.jne(right)?;
    asm.bind(&mut wrong)?;
    asm.a.mov(ecx, byte)?;
    asm.record_wrong()?;
    asm.bind(&mut right)
}
