//! Programs functions anew that have been reset behind the guest's back, as a driver does that recovers
//! its device: the BARs' addresses, and then decode.
//!
//! Per round, device and function:
//!
//! | Command | BAR | then |
//! |---|---|---|
//! | all ones | - | nothing: the function is not there |
//! | decode on | where it was placed | nothing |
//! | decode on | all ones | nothing: the function has gone in between |
//! | anything else | | decode off, the BAR where it was, decode on; counted |
//!
//! The others run `hammer` meanwhile, which expects registers to hold their reset values at any time.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, dword_ptr, dx, eax, ecx, edx, esi, qword_ptr, r12, r13, r15, rbp, rcx, rsi,
};

use super::asm::Assembly;
use super::layout::{control, row};
use super::stats::{FINISHED, field};
use super::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT};

const COMMAND: i32 = 0x04;
const COMMAND_MEMORY: i32 = 0x2;
const BAR0: i32 = 0x10;
const BAR2: i32 = 0x18;
/// Address bits of the low half of a memory BAR.
const ADDRESS: i32 = !0xf;

/// Registers beyond the common ones: `rsi` where the BAR was placed, `rcx` its high half.
pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    let (mut round, mut stop) = (asm.label(), asm.label());
    asm.a.xor(r13, r13)?;
    asm.bind(&mut round)?;
    asm.a.cmp(dword_ptr(r12 + control::STOP), 0)?;
    asm.a.jne(stop)?;
    asm.a.inc(r13)?;
    asm.each_device(|asm| {
        recover(asm, row::TRAPPED_CONFIG, row::TRAPPED_BAR, BAR0)?;
        recover(asm, row::MAPPED_CONFIG, row::MAPPED_BAR, BAR2)
    })?;
    asm.a.mov(qword_ptr(rbp + field::PROGRESS), r13)?;
    asm.a.pause()?;
    asm.a.jmp(round)?;
    asm.bind(&mut stop)?;
    asm.a.mov(qword_ptr(rbp + field::STATE), FINISHED)?;
    asm.halt()?;
    asm.finish(address)
}

/// One function: its place in configuration space and its BAR from fields of the row.
fn recover(asm: &mut Assembly, config: i32, bar: i32, register: i32) -> Result<(), IcedError> {
    let (mut program, mut low_alone, mut done) = (asm.label(), asm.label(), asm.label());
    asm.a.mov(rsi, qword_ptr(r15 + bar))?;
    asm.a.mov(rcx, rsi)?;
    asm.a.shr(rcx, 32)?;
    read_config(asm, config, COMMAND)?;
    asm.a.cmp(eax, -1)?;
    asm.a.je(done)?;
    asm.a.test(eax, COMMAND_MEMORY)?;
    asm.a.je(program)?;
    unless_placed(asm, (config, register), program, done)?;
    asm.a.jmp(done)?;

    asm.bind(&mut program)?;
    asm.count(field::RECOVERIES)?;
    asm.write_command(config, control::COMMAND_OFF)?;
    select(asm, config, register)?;
    asm.a.mov(eax, esi)?;
    asm.a.out(dx, eax)?;
    asm.a.test(rcx, rcx)?;
    asm.a.je(low_alone)?;
    select(asm, config, register + 4)?;
    asm.a.mov(eax, ecx)?;
    asm.a.out(dx, eax)?;
    asm.bind(&mut low_alone)?;
    asm.write_command(config, control::COMMAND_ON)?;
    asm.bind(&mut done)
}

/// Goes to `elsewhere` unless the BAR is where it was placed, and to `gone` if nobody says where.
fn unless_placed(
    asm: &mut Assembly,
    (config, register): (i32, i32),
    elsewhere: CodeLabel,
    gone: CodeLabel,
) -> Result<(), IcedError> {
    let mut placed = asm.label();
    read_config(asm, config, register)?;
    asm.a.cmp(eax, -1)?;
    asm.a.je(gone)?;
    asm.a.and(eax, ADDRESS)?;
    asm.a.cmp(eax, esi)?;
    asm.a.jne(elsewhere)?;
    asm.a.test(rcx, rcx)?;
    asm.a.je(placed)?;
    read_config(asm, config, register + 4)?;
    asm.a.cmp(eax, -1)?;
    asm.a.je(gone)?;
    asm.a.cmp(eax, ecx)?;
    asm.a.jne(elsewhere)?;
    asm.bind(&mut placed)
}

/// Reads a register of configuration space into `eax`.
fn read_config(asm: &mut Assembly, config: i32, register: i32) -> Result<(), IcedError> {
    select(asm, config, register)?;
    asm.a.in_(eax, dx)
}

/// Has CONFIG_DATA, whose port is in `dx` then, reach a register.
fn select(asm: &mut Assembly, config: i32, register: i32) -> Result<(), IcedError> {
    asm.a.mov(eax, dword_ptr(r15 + config))?;
    asm.a.or(eax, register)?;
    asm.a.mov(edx, u32::from(CONFIG_ADDRESS_PORT))?;
    asm.a.out(dx, eax)?;
    asm.a.mov(edx, u32::from(CONFIG_DATA_PORT))
}
