//! Memory decode off and on, as fast as it goes.
//!
//! Per cycle, device and function, with X a value of its own for each:
//!
//! | decode | access | must be |
//! |---|---|---|
//! | on | write X, read | X |
//! | off | read | all ones |
//! | off | write a poison value | dropped |
//! | on | read | X: the register kept its value, the poison never shows |
//! | on | edu only: read identification | `0x010000ed` |

use iced_x86::IcedError;
use iced_x86::code_asm::{
    dword_ptr, ecx, qword_ptr, r10, r12, r13, r14, r15, rax, rbp, rbx, rcx, rsi,
};

use super::asm::{Assembly, EDU_ID, Width};
use super::layout::{control, row};
use super::stats::field;

/// Offset of the register that only this program uses.
const EDU_DMA_SOURCE: i32 = 0x80;
const MAPPED_CELL: i32 = 0;

/// Most significant bytes of the values written, so that a stray one tells where it came from.
const TRAPPED_TAG: u64 = 0x1a << 56;
const MAPPED_TAG: u64 = 0x2b << 56;
const POISON: u64 = 0xdead << 48;

struct Function {
    config: i32,
    bar: i32,
    register: i32,
    tag: u64,
    writes: i32,
    is_edu: bool,
}

const FUNCTIONS: [Function; 2] = [
    Function {
        config: row::TRAPPED_CONFIG,
        bar: row::TRAPPED_BAR,
        register: EDU_DMA_SOURCE,
        tag: TRAPPED_TAG,
        writes: field::TRAPPED_WRITES,
        is_edu: true,
    },
    Function {
        config: row::MAPPED_CONFIG,
        bar: row::MAPPED_BAR,
        register: MAPPED_CELL,
        tag: MAPPED_TAG,
        writes: field::MAPPED_WRITES,
        is_edu: false,
    },
];

pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    let (mut cycle, mut done) = (asm.label(), asm.label());
    asm.a.xor(r13, r13)?;
    asm.bind(&mut cycle)?;
    asm.a.cmp(r13, qword_ptr(r12 + control::CYCLES))?;
    asm.a.jae(done)?;
    asm.each_device(|asm| FUNCTIONS.iter().try_for_each(|function| exercise(asm, function)))?;
    asm.a.inc(r13)?;
    asm.a.mov(qword_ptr(rbp + field::PROGRESS), r13)?;
    asm.a.jmp(cycle)?;
    asm.bind(&mut done)?;
    asm.a.mov(dword_ptr(r12 + control::STOP), 1)?;
    asm.exit()?;
    asm.finish(address)
}

fn exercise(asm: &mut Assembly, function: &Function) -> Result<(), IcedError> {
    asm.a.mov(rsi, qword_ptr(r15 + function.bar))?;
    asm.a.lea(rbx, qword_ptr(rsi + function.register))?;
    // X: tag, cycle, and how many devices are left in the low 16 bits.
    asm.tagged(r10, function.tag, 16)?;
    asm.a.or(r10, r14)?;

    asm.store64(r10, function.writes)?;
    asm.read(Width::Qword)?;
    asm.a.mov(rcx, r10)?;
    asm.expect()?;

    asm.write_command(function.config, control::COMMAND_OFF)?;
    asm.read(Width::Qword)?;
    asm.a.mov(rcx, u64::MAX)?;
    asm.expect()?;
    asm.tagged(rcx, POISON, 0)?;
    asm.store64(rcx, function.writes)?;

    asm.write_command(function.config, control::COMMAND_ON)?;
    asm.read(Width::Qword)?;
    asm.a.mov(rcx, r10)?;
    asm.expect()?;
    if function.is_edu {
        asm.a.mov(rbx, rsi)?;
        asm.read(Width::Dword)?;
        asm.a.mov(ecx, EDU_ID)?;
        asm.expect()?;
    }
    // The next function computes its own X from here.
    asm.a.xor(rax, rax)
}
