//! What the program is made of: texts, numbers and counters.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, byte_ptr, dl, dx, eax, ecx, edi, edx, esi, qword_ptr, rax, rbp,
    rcx, rsi, rsp,
};

use crate::image::TEXTS;

const SERIAL: u32 = 0x3f8;
const LINE_STATUS: u32 = SERIAL + 5;
const DATA_READY: i32 = 1;
const TRANSMITTER_EMPTY: i32 = 1 << 5;

/// Offsets in what counts the values of reads, each a u64; `rbp` is its address.
pub(crate) mod seen {
    pub(crate) const LIVE: u32 = 0;
    pub(crate) const ONES: u32 = 8;
    pub(crate) const ZERO: u32 = 16;
    pub(crate) const OTHER: u32 = 24;
    pub(crate) const FIRST_WRONG: u32 = 32;
    /// Its register; 0 is none.
    pub(crate) const FIRST_REGISTER: u32 = 40;
    pub(crate) const SIZE: u32 = 48;
}

/// The program under construction. Subroutines may change `rax`, `rcx`, `rdx`, `rsi` and `rdi`.
pub(crate) struct Assembly {
    pub(crate) a: CodeAssembler,
    texts: Vec<u8>,
    put_text: CodeLabel,
    put_number: CodeLabel,
    count: CodeLabel,
}

impl Assembly {
    pub(crate) fn new() -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let (put_text, put_number, count) = (a.create_label(), a.create_label(), a.create_label());
        Ok(Self { a, texts: Vec::new(), put_text, put_number, count })
    }

    /// Adds the subroutines; returns the code and the texts it uses.
    pub(crate) fn finish(mut self, address: u64) -> Result<(Vec<u8>, Vec<u8>), IcedError> {
        self.texts_and_numbers()?;
        self.counter()?;
        Ok((self.a.assemble(address)?, self.texts))
    }

    pub(crate) fn label(&mut self) -> CodeLabel {
        self.a.create_label()
    }

    /// Puts a label here. A `nop` keeps two labels at one place apart, which the assembler refuses.
    pub(crate) fn bind(&mut self, label: &mut CodeLabel) -> Result<(), IcedError> {
        self.a.set_label(label)?;
        self.a.nop()
    }

    /// Says a text.
    pub(crate) fn say(&mut self, text: &str) -> Result<(), IcedError> {
        let address = TEXTS + u32::try_from(self.texts.len()).expect("a few texts");
        self.texts.extend(text.bytes());
        self.texts.push(0);
        self.a.mov(esi, address)?;
        self.a.call(self.put_text)
    }

    /// Says `rax`.
    pub(crate) fn say_decimal(&mut self) -> Result<(), IcedError> {
        self.a.mov(ecx, 10)?;
        self.a.call(self.put_number)
    }

    /// Says `rax`, as Rust's `{:#x}`.
    pub(crate) fn say_hexadecimal(&mut self) -> Result<(), IcedError> {
        self.a.push(rax)?;
        self.say("0x")?;
        self.a.pop(rax)?;
        self.a.mov(ecx, 16)?;
        self.a.call(self.put_number)
    }

    /// Says a text and a variable.
    pub(crate) fn say_variable(&mut self, text: &str, variable: u32) -> Result<(), IcedError> {
        self.say(text)?;
        self.a.mov(rax, qword_ptr(variable))?;
        self.say_decimal()
    }

    /// Sets the flags for whether a byte came: `ne` if so.
    pub(crate) fn test_told(&mut self) -> Result<(), IcedError> {
        self.a.mov(edx, LINE_STATUS)?;
        self.a.in_(al, dx)?;
        self.a.test(al, DATA_READY)
    }

    /// Counts `rax`, which was read from the register `esi` and is `rcx` if the function answered. Leaves both.
    pub(crate) fn count(&mut self) -> Result<(), IcedError> {
        self.a.call(self.count)
    }

    fn texts_and_numbers(&mut self) -> Result<(), IcedError> {
        let (mut put, mut wait, mut end) = (self.label(), self.label(), self.label());
        let a = &mut self.a;
        // A byte at a time, when the last is gone.
        a.set_label(&mut self.put_text)?;
        a.mov(dl, byte_ptr(rsi))?;
        a.test(dl, dl)?;
        a.je(end)?;
        a.inc(rsi)?;
        a.movzx(edi, dl)?;
        a.call(put)?;
        a.jmp(self.put_text)?;
        a.set_label(&mut end)?;
        a.ret()?;

        a.set_label(&mut put)?;
        a.mov(edx, LINE_STATUS)?;
        a.set_label(&mut wait)?;
        a.in_(al, dx)?;
        a.test(al, TRANSMITTER_EMPTY)?;
        a.je(wait)?;
        a.mov(edx, SERIAL)?;
        a.mov(eax, edi)?;
        a.out(dx, al)?;
        a.ret()?;

        // `rax` in the base `rcx`: digits go to the stack from the last, and are a text there.
        let (mut digit, mut decimal) = (self.label(), self.label());
        let a = &mut self.a;
        a.set_label(&mut self.put_number)?;
        a.mov(rsi, rsp)?;
        a.sub(rsp, 72)?;
        a.dec(rsi)?;
        a.mov(byte_ptr(rsi), 0)?;
        a.set_label(&mut digit)?;
        a.xor(edx, edx)?;
        a.div(rcx)?;
        a.cmp(edx, 10)?;
        a.jb(decimal)?;
        a.add(edx, i32::from(b'a' - b'0' - 10))?;
        a.set_label(&mut decimal)?;
        a.add(edx, i32::from(b'0'))?;
        a.dec(rsi)?;
        a.mov(byte_ptr(rsi), dl)?;
        a.test(rax, rax)?;
        a.jne(digit)?;
        a.call(self.put_text)?;
        a.add(rsp, 72)?;
        a.ret()
    }

    fn counter(&mut self) -> Result<(), IcedError> {
        let (mut silent, mut zero, mut other, mut wrong, mut known) =
            (self.label(), self.label(), self.label(), self.label(), self.label());
        let a = &mut self.a;
        a.set_label(&mut self.count)?;
        a.cmp(rax, rcx)?;
        a.jne(silent)?;
        a.inc(qword_ptr(rbp + seen::LIVE))?;
        a.ret()?;
        a.set_label(&mut silent)?;
        a.cmp(rax, -1)?;
        a.jne(zero)?;
        a.inc(qword_ptr(rbp + seen::ONES))?;
        a.ret()?;
        a.set_label(&mut zero)?;
        a.test(rax, rax)?;
        a.jne(other)?;
        a.inc(qword_ptr(rbp + seen::ZERO))?;
        a.jmp(wrong)?;
        a.set_label(&mut other)?;
        a.inc(qword_ptr(rbp + seen::OTHER))?;
        a.set_label(&mut wrong)?;
        a.cmp(qword_ptr(rbp + seen::FIRST_REGISTER), 0)?;
        a.jne(known)?;
        a.mov(qword_ptr(rbp + seen::FIRST_WRONG), rax)?;
        a.mov(qword_ptr(rbp + seen::FIRST_REGISTER), rsi)?;
        a.set_label(&mut known)?;
        a.ret()
    }
}
