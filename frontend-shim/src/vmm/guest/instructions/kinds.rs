//! Every kind of access that the program makes.
//!
//! A kind is code that accesses `[rbx + offset]`, with offsets below 256 or, where it crosses, around
//! 4096. It finds `rax`, `rcx` and `rdx` with values of its round, `rsi` as `rbx`, and `rdi` at the buffer
//! of its output block; `rbx` and `r10` to `r15` are not its own. What it leaves in `rax`, `rcx`, `rdx`,
//! `r8`, `rsi`, `rdi` and the output block is compared.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{BUFFER, CONSTANTS, VECTOR};
use crate::vmm::guest::asm::imm;

/// What a kind needs of the virtual CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionGroup {
    /// Nothing that not every x86-64 processor has.
    Integer,
    /// MOVBE (CPUID 1, ECX bit 22).
    Movbe,
    /// CR4.OSFXSR.
    Sse,
    /// The same, and scalar moves where every instruction is emulated.
    SseScalar,
    /// CR4.OSXSAVE, and XMM and YMM state in XCR0.
    Avx,
}

/// One kind of access.
#[derive(Debug, Clone, Copy)]
pub struct InstructionKind {
    /// The instruction, in words.
    pub name: &'static str,
    /// What it needs.
    pub group: InstructionGroup,
    /// It accesses the second page of the BAR as well.
    pub crossing: bool,
    pub(super) code: Code,
}

impl InstructionKind {
    /// Whether KVM's emulator knows it in released kernels, for any guest CPU. A kind that it does not
    /// know works on RAM where the processor itself executes it, and on a device only where the VMM
    /// completes it.
    #[must_use]
    pub fn is_emulated_by_kvm(&self) -> bool {
        matches!(self.group, InstructionGroup::Integer | InstructionGroup::Sse)
    }
}

pub(super) type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const fn integer(name: &'static str, code: Code) -> InstructionKind {
    InstructionKind { name, group: InstructionGroup::Integer, crossing: false, code }
}

const fn movbe(name: &'static str, code: Code) -> InstructionKind {
    InstructionKind { name, group: InstructionGroup::Movbe, crossing: false, code }
}

const fn sse(name: &'static str, code: Code) -> InstructionKind {
    InstructionKind { name, group: InstructionGroup::Sse, crossing: false, code }
}

const fn sse_scalar(name: &'static str, code: Code) -> InstructionKind {
    InstructionKind { name, group: InstructionGroup::SseScalar, crossing: false, code }
}

const fn avx(name: &'static str, code: Code) -> InstructionKind {
    InstructionKind { name, group: InstructionGroup::Avx, crossing: false, code }
}

const fn crossing(kind: InstructionKind) -> InstructionKind {
    InstructionKind { crossing: true, ..kind }
}

/// All kinds; the position is the number of its bit in a selection.
pub(super) const KINDS: [InstructionKind; 62] = [
    integer("load of 1 byte", |a| a.mov(al, byte_ptr(rbx + 1))),
    integer("load of 2 bytes", |a| a.mov(ax, word_ptr(rbx + 2))),
    integer("load of 4 bytes", |a| a.mov(eax, dword_ptr(rbx + 4))),
    integer("load of 8 bytes", |a| a.mov(rax, qword_ptr(rbx + 8))),
    integer("movzx of 1 byte", |a| a.movzx(eax, byte_ptr(rbx + 3))),
    integer("movzx of 2 bytes", |a| a.movzx(rax, word_ptr(rbx + 6))),
    integer("movsx of 1 byte", |a| a.movsx(rax, byte_ptr(rbx + 5))),
    integer("movsx of 2 bytes", |a| a.movsx(eax, word_ptr(rbx + 6))),
    integer("movsxd", |a| a.movsxd(rax, dword_ptr(rbx + 4))),
    integer("store of 1 byte", |a| a.mov(byte_ptr(rbx + 0x11), al)),
    integer("store of 2 bytes", |a| a.mov(word_ptr(rbx + 0x12), ax)),
    integer("store of 4 bytes", |a| a.mov(dword_ptr(rbx + 0x14), eax)),
    integer("store of 8 bytes", |a| a.mov(qword_ptr(rbx + 0x18), rax)),
    integer("store of an immediate", |a| a.mov(qword_ptr(rbx + 0x20), -2)),
    integer("movnti", |a| a.movnti(dword_ptr(rbx + 0x28), ecx)),
    integer("add to memory", |a| {
        a.add(dword_ptr(rbx + 0x30), ecx)?;
        flags(a)
    }),
    integer("add from memory", |a| {
        a.add(rax, qword_ptr(rbx + 0x30))?;
        flags(a)
    }),
    integer("or", |a| {
        a.or(word_ptr(rbx + 0x34), cx)?;
        flags(a)
    }),
    integer("and", |a| {
        a.and(byte_ptr(rbx + 0x36), cl)?;
        flags(a)
    }),
    integer("xor", |a| {
        a.xor(qword_ptr(rbx + 0x38), rcx)?;
        flags(a)
    }),
    integer("inc", |a| {
        a.inc(qword_ptr(rbx + 0x40))?;
        flags(a)
    }),
    integer("neg", |a| {
        a.neg(dword_ptr(rbx + 0x48))?;
        flags(a)
    }),
    integer("not", |a| a.not(dword_ptr(rbx + 0x4c))),
    integer("cmp", |a| {
        a.cmp(qword_ptr(rbx + 0x50), -1)?;
        flags(a)
    }),
    integer("test", |a| {
        a.test(dword_ptr(rbx + 0x50), ecx)?;
        flags(a)
    }),
    integer("xchg", |a| a.xchg(qword_ptr(rbx + 0x58), rcx)),
    integer("lock xadd", |a| {
        a.lock().xadd(dword_ptr(rbx + 0x60), ecx)?;
        flags(a)
    }),
    integer("lock cmpxchg that may exchange", |a| {
        a.mov(rax, -1_i64)?;
        a.lock().cmpxchg(qword_ptr(rbx + 0x68), rcx)?;
        flags(a)
    }),
    integer("cmpxchg that does not", |a| {
        a.cmpxchg(dword_ptr(rbx + 0x70), ecx)?;
        flags(a)
    }),
    integer("lock cmpxchg8b", |a| {
        // EDX:EAX is no value that memory has, so that ECX:EBX, an address, is not written.
        a.lock().cmpxchg8b(qword_ptr(rbx + 0x78))?;
        flags(a)
    }),
    integer("bt", |a| {
        a.bt(dword_ptr(rbx + 0x80), 5)?;
        carry(a)
    }),
    integer("lock bts", |a| {
        a.lock().bts(dword_ptr(rbx + 0x80), 6)?;
        carry(a)
    }),
    integer("btr", |a| {
        a.btr(qword_ptr(rbx + 0x80), 7)?;
        carry(a)
    }),
    integer("cmovns", |a| {
        a.or(eax, eax)?;
        a.cmovns(rax, qword_ptr(rbx + 0x88))
    }),
    integer("push and pop", |a| {
        a.push(qword_ptr(rbx + 0x90))?;
        a.pop(qword_ptr(rbx + 0x98))
    }),
    integer("rep movsb to RAM", |a| {
        a.mov(ecx, 5)?;
        a.rep().movsb()
    }),
    integer("rep movsq from RAM", |a| {
        a.mov(ecx, 3)?;
        a.lea(rdi, ptr(rbx + 0xa0))?;
        a.mov(rsi, CONSTANTS)?;
        a.rep().movsq()?;
        from_ram(a)?;
        to_bar(a)
    }),
    integer("movsd down", |a| {
        a.std()?;
        a.movsd()?;
        a.cld()
    }),
    integer("rep stosw", |a| {
        a.mov(ecx, 3)?;
        a.lea(rdi, ptr(rbx + 0xb8))?;
        a.rep().stosw()?;
        to_bar(a)
    }),
    integer("lodsd", |a| a.lodsd()),
    integer("rep lodsb", |a| {
        a.mov(ecx, 4)?;
        a.rep().lodsb()
    }),
    integer("repe scasb", |a| {
        a.mov(ecx, 4)?;
        a.mov(eax, 0xff)?;
        a.mov(rdi, rbx)?;
        a.repe().scasb()?;
        flags(a)?;
        to_bar(a)
    }),
    integer("repne cmpsw with RAM", |a| {
        a.mov(ecx, 4)?;
        a.repne().cmpsw()?;
        flags(a)
    }),
    movbe("movbe load", |a| a.movbe(eax, dword_ptr(rbx + 0x14))),
    movbe("movbe store", |a| a.movbe(qword_ptr(rbx + 0xc0), rcx)),
    crossing(integer("load across pages", |a| a.mov(rax, qword_ptr(rbx + 0xffd)))),
    crossing(integer("store across pages", |a| a.mov(dword_ptr(rbx + 0xffe), ecx))),
    crossing(integer("add across pages", |a| {
        a.add(qword_ptr(rbx + 0xff9), rcx)?;
        flags(a)
    })),
    sse("movdqu load", |a| {
        a.movdqu(xmm1, xmmword_ptr(rbx + 5))?;
        vector(a)
    }),
    sse("movups store", |a| {
        a.movups(xmm1, xmmword_ptr(CONSTANTS))?;
        a.movups(xmmword_ptr(rbx + 0xc9), xmm1)
    }),
    sse("movdqa load", |a| {
        a.movdqa(xmm1, xmmword_ptr(rbx + 0x10))?;
        vector(a)
    }),
    sse("movaps load", |a| {
        a.movaps(xmm1, xmmword_ptr(rbx + 0x20))?;
        vector(a)
    }),
    sse("movaps store", |a| {
        a.movups(xmm1, xmmword_ptr(CONSTANTS + 16))?;
        a.movaps(xmmword_ptr(rbx + 0xd0), xmm1)
    }),
    sse("movntdq", |a| {
        a.movups(xmm1, xmmword_ptr(CONSTANTS + 32))?;
        a.movntdq(xmmword_ptr(rbx + 0xe0), xmm1)
    }),
    sse_scalar("movd and movq loads", |a| {
        a.movd(xmm1, dword_ptr(rbx + 0x1c))?;
        vector(a)?;
        a.movq(xmm1, qword_ptr(rbx + 0x21))?;
        a.movups(xmmword_ptr(r10 + BUFFER), xmm1)
    }),
    sse_scalar("movsd store", |a| {
        a.movups(xmm1, xmmword_ptr(CONSTANTS + 48))?;
        a.movsd_2(qword_ptr(rbx + 0xf0), xmm1)
    }),
    crossing(sse("movdqu load across pages", |a| {
        a.movdqu(xmm1, xmmword_ptr(rbx + 0xff5))?;
        vector(a)
    })),
    crossing(sse("movdqu store across pages", |a| {
        a.movdqu(xmm1, xmmword_ptr(CONSTANTS + 64))?;
        a.movdqu(xmmword_ptr(rbx + 0xff3), xmm1)
    })),
    avx("vmovdqu load", |a| {
        a.vmovdqu(ymm1, ymmword_ptr(rbx + 7))?;
        a.vmovdqu(ymmword_ptr(r10 + VECTOR), ymm1)
    }),
    avx("vmovdqu store", |a| {
        a.vmovdqu(ymm1, ymmword_ptr(CONSTANTS + 96))?;
        a.vmovdqu(ymmword_ptr(rbx + 0x61), ymm1)
    }),
    crossing(avx("vmovdqu load across pages", |a| {
        a.vmovdqu(ymm1, ymmword_ptr(rbx + 0xfed))?;
        a.vmovdqu(ymmword_ptr(r10 + VECTOR), ymm1)
    })),
    crossing(avx("vmovdqu store across pages", |a| {
        a.vmovdqu(ymm1, ymmword_ptr(CONSTANTS + 128))?;
        a.vmovdqu(ymmword_ptr(rbx + 0xfef), ymm1)
    })),
];

/// Makes the flags a result, but for AF, which logic leaves undefined.
fn flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.pop(r8)?;
    a.and(r8, 0x8c5)
}

/// The same where only CF is defined.
fn carry(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.pop(r8)?;
    a.and(r8, 1)
}

fn vector(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.movups(xmmword_ptr(r10 + VECTOR), xmm1)
}

/// `rdi` went through the BAR: its distance counts.
fn to_bar(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sub(rdi, rbx)?;
    a.add(rdi, r10)
}

/// `rsi` went through the constants.
fn from_ram(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sub(rsi, imm(CONSTANTS))?;
    a.add(rsi, rbx)
}
