//! What the programs have in common.
//!
//! Registers by convention: `rdi` number of the virtual CPU, `rbp` its stat block, `r12` control block,
//! `r13` cycle or round, `r14` devices left, `r15` row of the device table. A check takes the address in
//! `rbx`, the value read in `rax` and the value that is right in `rcx`.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmRegister32, AsmRegister64, CodeAssembler, CodeLabel, al, ax, dword_ptr, dx, eax, edx,
    qword_ptr, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, word_ptr,
};

use super::layout::{CONTROL, DEVICE_TABLE, ROW_SIZE, STAT_BLOCK_SHIFT, STAT_BLOCKS, control};
use super::stats::{FINISHED, RUNNING, field};
use super::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, EXIT_PORT};

/// Identification register of an edu device, and its value for version 1.0.
pub(super) const EDU_ID: u32 = 0x0100_00ed;
/// Offset of `PCI_COMMAND` in configuration space (PCI Local Bus 3.0, 6.1).
const PCI_COMMAND: i32 = 4;

/// A program under construction.
pub(super) struct Assembly {
    pub(super) a: CodeAssembler,
    wrong: CodeLabel,
}

/// Width of a read.
#[derive(Clone, Copy)]
pub(super) enum Width {
    Byte,
    Word,
    Dword,
    Qword,
}

impl Assembly {
    /// Starts a program: sets up the registers of the convention.
    pub(super) fn new() -> Result<Assembly, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let wrong = a.create_label();
        a.mov(rbp, rdi)?;
        a.shl(rbp, STAT_BLOCK_SHIFT)?;
        a.add(rbp, imm(STAT_BLOCKS))?;
        a.mov(r12, CONTROL)?;
        a.mov(qword_ptr(rbp + field::STATE), RUNNING)?;
        Ok(Assembly { a, wrong })
    }

    /// Adds the shared subroutine and encodes.
    pub(super) fn finish(mut self, address: u64) -> Result<Vec<u8>, IcedError> {
        let a = &mut self.a;
        let mut counted = a.create_label();
        a.set_label(&mut self.wrong)?;
        a.inc(qword_ptr(rbp + field::WRONG))?;
        a.cmp(qword_ptr(rbp + field::WRONG), 1)?;
        a.jne(counted)?;
        a.mov(qword_ptr(rbp + field::WRONG_ADDRESS), rbx)?;
        a.mov(qword_ptr(rbp + field::WRONG_VALUE), rax)?;
        a.mov(qword_ptr(rbp + field::WRONG_EXPECTED), rcx)?;
        a.set_label(&mut counted)?;
        a.ret()?;
        self.a.assemble(address)
    }

    /// Ends the program: counters are final, the exit port is told, the virtual CPU halts for good.
    pub(super) fn exit(&mut self) -> Result<(), IcedError> {
        let a = &mut self.a;
        a.mov(qword_ptr(rbp + field::STATE), FINISHED)?;
        a.xor(eax, eax)?;
        a.cmp(qword_ptr(rbp + field::WRONG), 0)?;
        a.setne(al)?;
        a.mov(edx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        self.halt()
    }

    pub(super) fn halt(&mut self) -> Result<(), IcedError> {
        let mut halted = self.label();
        self.bind(&mut halted)?;
        self.a.hlt()?;
        self.a.jmp(halted)
    }

    /// A loop over the device table: `r15` is the row, `r14` counts down.
    pub(super) fn each_device(
        &mut self,
        body: impl FnOnce(&mut Assembly) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let (mut next, mut done) = (self.label(), self.label());
        self.a.mov(r15, DEVICE_TABLE)?;
        self.a.mov(r14, qword_ptr(r12 + control::DEVICE_COUNT))?;
        self.bind(&mut next)?;
        self.a.test(r14, r14)?;
        self.a.je(done)?;
        body(self)?;
        self.a.add(r15, ROW_SIZE)?;
        self.a.dec(r14)?;
        self.a.jmp(next)?;
        self.bind(&mut done)
    }

    /// Writes `PCI_COMMAND` through the ports: the function from a field of the row, the value from a
    /// field of the control block. Clobbers `rax` and `rdx`.
    pub(super) fn write_command(&mut self, config: i32, value: i32) -> Result<(), IcedError> {
        let a = &mut self.a;
        a.mov(eax, dword_ptr(r15 + config))?;
        a.or(eax, PCI_COMMAND)?;
        a.mov(edx, u32::from(CONFIG_ADDRESS_PORT))?;
        a.out(dx, eax)?;
        a.mov(ax, word_ptr(r12 + value))?;
        a.mov(edx, u32::from(CONFIG_DATA_PORT))?;
        a.out(dx, ax)
    }

    pub(super) fn count(&mut self, field: i32) -> Result<(), IcedError> {
        self.a.inc(qword_ptr(rbp + field))
    }

    /// Reads `[rbx]` into `rax`, zero-extended, and counts it; where it is all ones, as UR too.
    pub(super) fn read(&mut self, width: Width) -> Result<(), IcedError> {
        let mut live = self.label();
        self.load(width)?;
        self.jump_unless_all_ones(width, live)?;
        self.count(field::READS_UR)?;
        self.bind(&mut live)
    }

    /// Like [`read`](Self::read), and goes to `ur` where it is all ones.
    pub(super) fn read_or(&mut self, width: Width, ur: CodeLabel) -> Result<(), IcedError> {
        let mut live = self.label();
        self.load(width)?;
        self.jump_unless_all_ones(width, live)?;
        self.count(field::READS_UR)?;
        self.a.jmp(ur)?;
        self.bind(&mut live)
    }

    /// Reads `[rbx]` into `rax`, zero-extended, and counts only that it was read.
    pub(super) fn load(&mut self, width: Width) -> Result<(), IcedError> {
        match width {
            Width::Byte => self.a.movzx(eax, iced_x86::code_asm::byte_ptr(rbx))?,
            Width::Word => self.a.movzx(eax, word_ptr(rbx))?,
            Width::Dword => self.a.mov(eax, dword_ptr(rbx))?,
            Width::Qword => self.a.mov(rax, qword_ptr(rbx))?,
        }
        self.count(field::READS)
    }

    fn jump_unless_all_ones(&mut self, width: Width, live: CodeLabel) -> Result<(), IcedError> {
        match width {
            Width::Byte => self.a.cmp(eax, 0xff)?,
            Width::Word => self.a.cmp(eax, 0xffff)?,
            Width::Dword => self.a.cmp(eax, -1)?,
            Width::Qword => self.a.cmp(rax, -1)?,
        }
        self.a.jne(live)
    }

    /// Checks that `rax` equals `rcx`.
    pub(super) fn expect(&mut self) -> Result<(), IcedError> {
        let mut right = self.label();
        self.a.cmp(rax, rcx)?;
        self.a.je(right)?;
        self.record_wrong()?;
        self.bind(&mut right)
    }

    /// Records `rax` as wrong.
    pub(super) fn record_wrong(&mut self) -> Result<(), IcedError> {
        self.a.call(self.wrong)
    }

    /// `destination = tag | r13 << shift`.
    pub(super) fn tagged(
        &mut self,
        destination: AsmRegister64,
        tag: u64,
        shift: u32,
    ) -> Result<(), IcedError> {
        self.a.mov(rax, r13)?;
        self.a.shl(rax, shift)?;
        self.a.mov(destination, tag)?;
        self.a.or(destination, rax)
    }

    pub(super) fn store32(&mut self, source: AsmRegister32, counter: i32) -> Result<(), IcedError> {
        self.a.mov(dword_ptr(rbx), source)?;
        self.count(counter)
    }

    pub(super) fn store64(&mut self, source: AsmRegister64, counter: i32) -> Result<(), IcedError> {
        self.a.mov(qword_ptr(rbx), source)?;
        self.count(counter)
    }

    pub(super) fn label(&mut self) -> CodeLabel {
        self.a.create_label()
    }

    /// Puts a label here. A `nop` keeps two labels at one place apart, which the assembler refuses.
    pub(super) fn bind(&mut self, label: &mut CodeLabel) -> Result<(), IcedError> {
        self.a.set_label(label)?;
        self.a.nop()
    }
}

/// An address of guest RAM as the sign-extended immediate of an ALU instruction.
pub(super) fn imm(address: u64) -> i32 {
    i32::try_from(address).expect("guest RAM ends far below 2 GiB")
}
