//! Exceptions and interrupts, none of which there should be: the first is said, and is the end.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, ax, cr2, dword_ptr, eax, ecx, edi, edx, ptr, qword_ptr, rax, rbx, rcx, rdi, rsp,
    word_ptr,
};

use crate::asm::Assembly;
use crate::boot::{CODE_SELECTOR, TASK_SELECTORS};
use crate::image::{INTERRUPTS, TASKS, TRAP_STACKS};
use crate::program::power_off;

const VECTORS: u32 = 256;
/// Size of a descriptor in bytes (AMD64 APM volume 2, 4.8.4), and a present interrupt gate.
const GATE: u32 = 16;
const GATE_TYPE: u32 = 0x8e00;
/// It takes the first stack of the task state, which is there (12.2.5).
const GATE_STACK: u32 = 1;
const TASK_STACK: u32 = 0x24;
/// A handler is a call to what they have in common, so that the return address tells which it was.
const HANDLER: u32 = 5;

pub(crate) struct Traps {
    handlers: CodeLabel,
    pointer: CodeLabel,
}

impl Traps {
    pub(crate) fn new(program: &mut Assembly) -> Self {
        Self { handlers: program.label(), pointer: program.label() }
    }

    /// Fills in the descriptors.
    pub(crate) fn prepare(&self, program: &mut Assembly) -> Result<(), IcedError> {
        let mut next = program.label();
        let a = &mut program.a;
        a.lea(rax, ptr(self.handlers))?;
        a.mov(edi, INTERRUPTS)?;
        a.mov(ecx, VECTORS)?;
        a.set_label(&mut next)?;
        a.mov(word_ptr(rdi), ax)?;
        a.mov(word_ptr(rdi + 2), u32::from(CODE_SELECTOR))?;
        a.mov(edx, eax)?;
        a.and(edx, 0xffff_0000_u32.cast_signed())?;
        a.or(edx, (GATE_TYPE | GATE_STACK).cast_signed())?;
        a.mov(dword_ptr(rdi + 4), edx)?;
        // The image lies in the lower 4 GiB, and RAM begins as zero.
        a.add(rdi, GATE.cast_signed())?;
        a.add(rax, HANDLER.cast_signed())?;
        a.dec(ecx)?;
        a.jne(next)
    }

    /// Has a processor use them.
    pub(crate) fn take(&self, program: &mut Assembly, processor: usize) -> Result<(), IcedError> {
        let a = &mut program.a;
        a.mov(dword_ptr(TASKS[processor] + TASK_STACK), TRAP_STACKS[processor])?;
        a.mov(eax, TASK_SELECTORS[processor])?;
        a.ltr(ax)?;
        a.lidt(ptr(self.pointer))
    }

    pub(crate) fn handlers(&mut self, program: &mut Assembly) -> Result<(), IcedError> {
        let mut trapped = program.label();
        program.a.set_label(&mut self.handlers)?;
        for _ in 0..VECTORS {
            program.a.call(trapped)?;
        }
        program.a.set_label(&mut self.pointer)?;
        let limit = u16::try_from(VECTORS * GATE - 1).expect("4 KiB");
        let base = u64::from(INTERRUPTS);
        program.a.db(&[limit.to_le_bytes().as_slice(), &base.to_le_bytes()].concat())?;

        program.a.set_label(&mut trapped)?;
        program.a.pop(rax)?;
        program.a.mov(rbx, rsp)?;
        program.a.lea(rcx, ptr(self.handlers))?;
        program.a.sub(rax, rcx)?;
        program.a.xor(edx, edx)?;
        program.a.mov(ecx, HANDLER)?;
        program.a.div(rcx)?;
        program.a.dec(rax)?;
        program.a.push(rax)?;
        program.say("\nTRAP ")?;
        program.a.pop(rax)?;
        program.say_decimal()?;
        program.say(" cr2 ")?;
        program.a.mov(rax, cr2)?;
        program.say_hexadecimal()?;
        // The error code if the vector has one, the instruction, its segment, flags and the stack.
        program.say(" stack")?;
        for offset in (0..40).step_by(8) {
            program.say(" ")?;
            program.a.mov(rax, qword_ptr(rbx + offset))?;
            program.say_hexadecimal()?;
        }
        program.say("\n")?;
        power_off(program)
    }
}
