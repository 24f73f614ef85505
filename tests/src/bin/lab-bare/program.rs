//! What both processors do in long mode.
//!
//! Registers of the first, by convention: `r12` the value of `PCI_COMMAND` with decode, `r13` the BAR,
//! `r14` the address of the function's configuration space, `r15` how often it toggles, 0 if until told.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    al, ax, byte_ptr, dword_ptr, dx, eax, ebp, ebx, ecx, edi, edx, esi, esp, qword_ptr, r8, r12d,
    r13, r13d, r14d, r15, r15d, rax, rbx, rcx, rdi, rsi,
};

use crate::asm::{Assembly, seen};
use crate::image::{PROGRAM, STACKS, TRAMPOLINE, TRAMPOLINE_SIZE, TRAMPOLINE_SOURCE, VARIABLES};
use crate::traps::Traps;

/// Variables, each a u64.
const TICKET: u32 = VARIABLES;
const BAR: u32 = VARIABLES + 8;
const READY: u32 = VARIABLES + 16;
const STOP: u32 = VARIABLES + 24;
const DONE: u32 = VARIABLES + 32;
/// Reads of the processor that toggles, right after a toggle, that gave what was right before it.
const LATE: u32 = VARIABLES + 40;
/// What 4 bytes at `LIVENESS` read after `LIVENESS_PATTERN` was written, with its sign.
const NARROW_RIGHT: u32 = VARIABLES + 48;
/// What was read: 8 bytes by the second processor, then by the first, and 4 bytes.
const WIDE: u32 = VARIABLES + 0x100;
const AFTER: u32 = WIDE + seen::SIZE;
const NARROW: u32 = AFTER + seen::SIZE;

/// A function that can be hammered: something that keeps 8 bytes at `DMA_SOURCE` and `DMA_DESTINATION`.
struct Known {
    name: &'static str,
    /// Vendor and device id, as they stand in configuration space.
    id: i32,
    /// Where in configuration space the BAR is.
    bar: i32,
    /// What reads give at `LIVENESS` after `LIVENESS_PATTERN`.
    liveness: u32,
}

const KNOWN: [Known; 2] = [
    Known { name: "edu", id: 0x11e8_1234, bar: 0x10, liveness: !LIVENESS_PATTERN },
    // Memory, from its first byte on.
    Known { name: "ivshmem", id: 0x1110_1af4, bar: 0x18, liveness: LIVENESS_PATTERN },
];

/// Edu's registers (QEMU, docs/specs/edu.rst). What is written to the liveness check is read inverted.
const LIVENESS: u32 = 0x04;
const DMA_SOURCE: u32 = 0x80;
const DMA_DESTINATION: u32 = 0x88;
/// What is written. No byte is zero, and none is all ones.
const PATTERN: u64 = 0x1122_3344_5566_7788;
const LIVENESS_PATTERN: u32 = 0x5a5a_1234;

/// Configuration space through ports (PCI Local Bus 3.0, 3.2.2.3.2): the address, and the data.
const CONFIG_ADDRESS: u32 = 0xcf8;
const CONFIG_DATA: u32 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;
const CONFIG_FUNCTIONS: u32 = 0x800;
const CONFIG_BUS_1: u32 = CONFIG_ENABLE | 1 << 16;
const PCI_COMMAND: i32 = 0x04;
const MEMORY_SPACE: i32 = 1 << 1;
const BUS_MASTER: i32 = 1 << 2;

/// The local APIC's interrupt command register, and commands to all processors but this one: INIT, and
/// to start at a page.
const INTERRUPT_COMMAND: u32 = 0xfee0_0300;
const INIT: i32 = 0xc_4500;
const STARTUP: u32 = 0xc_4600;

/// PM1a control of q35, whose base the firmware sets to 0x600, and what powers off there.
const POWER: u32 = 0x604;
const POWER_OFF: u32 = 0x2000;

/// How often a bystander hears of the toggles.
const TOGGLES_AT_ONCE: u32 = 20;

/// The code and its texts.
pub(crate) fn make() -> Result<(Vec<u8>, Vec<u8>), IcedError> {
    let mut program = Assembly::new()?;
    let mut second = program.label();
    let mut traps = Traps::new(&mut program);
    program.a.mov(eax, 1)?;
    program.a.lock().xadd(dword_ptr(TICKET), eax)?;
    program.a.test(eax, eax)?;
    program.a.jne(second)?;
    program.a.mov(esp, STACKS[0])?;
    traps.prepare(&mut program)?;
    traps.take(&mut program, 0)?;
    toggles(&mut program)?;
    find(&mut program)?;
    begin(&mut program)?;
    start_second(&mut program)?;
    work(&mut program)?;
    result(&mut program)?;
    power_off(&mut program)?;
    program.bind(&mut second)?;
    program.a.mov(esp, STACKS[1])?;
    traps.take(&mut program, 1)?;
    hammer(&mut program)?;
    traps.handlers(&mut program)?;
    program.finish(PROGRAM.into())
}

/// How often, from the last word of the loader's command line.
fn toggles(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut character, mut last, mut digit, mut end) =
        (program.label(), program.label(), program.label(), program.label());
    let a = &mut program.a;
    // The upper half is not defined after the change of mode.
    a.mov(ebx, ebx)?;
    a.mov(esi, dword_ptr(rbx + 16))?;
    a.mov(rdi, rsi)?;
    a.set_label(&mut character)?;
    a.mov(al, byte_ptr(rsi))?;
    a.inc(rsi)?;
    a.test(al, al)?;
    a.je(last)?;
    a.cmp(al, i32::from(b' '))?;
    a.cmove(rdi, rsi)?;
    a.jmp(character)?;
    a.set_label(&mut last)?;
    a.xor(r15d, r15d)?;
    a.set_label(&mut digit)?;
    a.movzx(eax, byte_ptr(rdi))?;
    a.inc(rdi)?;
    a.sub(eax, i32::from(b'0'))?;
    a.cmp(eax, 9)?;
    a.ja(end)?;
    a.imul_3(r15, r15, 10)?;
    a.add(r15, rax)?;
    a.jmp(digit)?;
    program.bind(&mut end)
}

/// The first known function on bus 0, and its BAR where the firmware put it.
fn find(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut next, mut found) = (program.label(), program.label());
    let mut kinds = KNOWN.map(|known| (known, program.label()));
    program.a.mov(r14d, CONFIG_ENABLE)?;
    program.bind(&mut next)?;
    read_config(program, 0)?;
    for (known, kind) in &kinds {
        program.a.cmp(eax, known.id)?;
        program.a.je(*kind)?;
    }
    program.a.add(r14d, CONFIG_FUNCTIONS.cast_signed())?;
    program.a.cmp(r14d, CONFIG_BUS_1.cast_signed())?;
    program.a.jne(next)?;
    program.say("no function to hammer on bus 0\n")?;
    power_off(program)?;

    for (known, kind) in &mut kinds {
        program.bind(kind)?;
        program.say(&format!("HAMMER {}\n", known.name))?;
        program.a.mov(rax, i64::from(known.liveness.cast_signed()).cast_unsigned())?;
        program.a.mov(qword_ptr(NARROW_RIGHT), rax)?;
        read_config(program, known.bar)?;
        program.a.jmp(found)?;
    }
    program.bind(&mut found)?;
    program.a.and(eax, !0xf)?;
    program.a.mov(r13d, eax)?;
    program.a.mov(dword_ptr(BAR), eax)?;
    read_config(program, PCI_COMMAND)?;
    program.a.movzx(r12d, ax)?;
    program.a.or(r12d, MEMORY_SPACE | BUS_MASTER)?;
    decode_on(program)
}

/// From here on every read has one right value.
fn begin(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut untried, mut tried) = (program.label(), program.label());
    let a = &mut program.a;
    // What memory has at its first byte; edu has its identification there, and ignores this.
    a.mov(dword_ptr(r13), LIVENESS_PATTERN)?;
    a.mov(dword_ptr(r13 + LIVENESS), LIVENESS_PATTERN)?;
    a.mov(rcx, PATTERN)?;
    a.mov(qword_ptr(r13 + DMA_SOURCE), rcx)?;
    a.not(rcx)?;
    a.mov(qword_ptr(r13 + DMA_DESTINATION), rcx)?;

    program.say("BEGIN enabled ")?;
    say_first(program)?;
    program.a.test(r15, r15)?;
    program.a.je(untried)?;
    program.say(" disabled ")?;
    decode_off(program)?;
    program.a.mov(ebx, dword_ptr(r13))?;
    decode_on(program)?;
    program.a.mov(eax, ebx)?;
    program.say_hexadecimal()?;
    program.a.jmp(tried)?;
    program.bind(&mut untried)?;
    program.say(" disabled untried")?;
    program.bind(&mut tried)?;
    program.say(" again ")?;
    say_first(program)?;
    program.say("\n")
}

/// Edu's identification, or what memory has there.
fn say_first(program: &mut Assembly) -> Result<(), IcedError> {
    program.a.mov(eax, dword_ptr(r13))?;
    program.say_hexadecimal()
}

/// Starts the other processor, and again until it is there.
fn start_second(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut again, mut wait, mut ready) = (program.label(), program.label(), program.label());
    let a = &mut program.a;
    a.mov(esi, TRAMPOLINE_SOURCE)?;
    a.mov(edi, TRAMPOLINE)?;
    a.mov(ecx, TRAMPOLINE_SIZE)?;
    a.rep().movsb()?;
    a.mov(ebx, INTERRUPT_COMMAND)?;
    a.mov(dword_ptr(rbx), INIT)?;
    a.set_label(&mut again)?;
    a.mov(ecx, 1_000_000)?;
    a.mov(dword_ptr(rbx), STARTUP | TRAMPOLINE >> 12)?;
    a.set_label(&mut wait)?;
    a.cmp(dword_ptr(READY), 0)?;
    a.jne(ready)?;
    a.pause()?;
    a.dec(ecx)?;
    a.jne(wait)?;
    a.jmp(again)?;
    program.bind(&mut ready)
}

/// Toggles as often as it was told, or waits for somebody who says when to end.
fn work(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut until_told, mut toggle, mut quiet, mut end, mut gone) =
        (program.label(), program.label(), program.label(), program.label(), program.label());
    program.a.mov(ebp, AFTER)?;
    program.a.xor(ebx, ebx)?;
    program.a.test(r15, r15)?;
    program.a.je(until_told)?;
    program.bind(&mut toggle)?;
    decode_off(program)?;
    read_after_toggle(program, u64::MAX)?;
    decode_on(program)?;
    read_after_toggle(program, PATTERN)?;
    let a = &mut program.a;
    a.inc(rbx)?;
    a.xor(edx, edx)?;
    a.mov(rax, rbx)?;
    a.mov(ecx, TOGGLES_AT_ONCE)?;
    a.div(rcx)?;
    a.test(edx, edx)?;
    a.jne(quiet)?;
    program.say("TOGGLED ")?;
    program.a.mov(rax, rbx)?;
    program.say_decimal()?;
    program.say("\n")?;
    program.bind(&mut quiet)?;
    program.a.cmp(rbx, r15)?;
    program.a.jne(toggle)?;
    program.a.jmp(end)?;

    program.bind(&mut until_told)?;
    program.test_told()?;
    program.a.je(until_told)?;

    program.bind(&mut end)?;
    program.a.mov(dword_ptr(STOP), 1)?;
    program.bind(&mut gone)?;
    program.a.pause()?;
    program.a.cmp(dword_ptr(DONE), 0)?;
    program.a.je(gone)
}

/// Nobody but this processor toggles, so it knows what it must read.
fn read_after_toggle(program: &mut Assembly, right: u64) -> Result<(), IcedError> {
    let mut is_right = program.label();
    program.a.mov(rcx, PATTERN)?;
    program.a.mov(esi, DMA_SOURCE)?;
    program.a.mov(rax, qword_ptr(r13 + DMA_SOURCE))?;
    program.count()?;
    program.a.mov(r8, right)?;
    program.a.cmp(rax, r8)?;
    program.a.je(is_right)?;
    program.a.inc(qword_ptr(LATE))?;
    program.bind(&mut is_right)
}

fn result(program: &mut Assembly) -> Result<(), IcedError> {
    let mut right = program.label();
    program.say("RESULT toggles ")?;
    program.a.mov(rax, r15)?;
    program.say_decimal()?;
    for offset in [seen::LIVE, seen::ONES, seen::ZERO, seen::OTHER] {
        program.a.mov(rax, qword_ptr(AFTER + offset))?;
        program.a.add(qword_ptr(WIDE + offset), rax)?;
    }
    let names = [" live ", " ones ", " zero ", " other "];
    for (name, offset) in names.iter().zip((0..).step_by(8)) {
        program.say_variable(name, WIDE + offset)?;
    }
    program.say_variable(" late ", LATE)?;
    for (name, offset) in names.iter().zip((0..).step_by(8)) {
        program.say_variable(&format!(" narrow-{}", &name[1..]), NARROW + offset)?;
    }
    program.say(" last ")?;
    say_first(program)?;
    program.say(" first-wrong ")?;
    for counters in [WIDE, AFTER] {
        let mut none = program.label();
        program.a.cmp(dword_ptr(counters + seen::FIRST_REGISTER), 0)?;
        program.a.je(none)?;
        program.a.mov(rax, qword_ptr(counters + seen::FIRST_WRONG))?;
        program.say_hexadecimal()?;
        program.say("@")?;
        program.a.mov(rax, qword_ptr(counters + seen::FIRST_REGISTER))?;
        program.say_hexadecimal()?;
        program.a.jmp(right)?;
        program.bind(&mut none)?;
    }
    program.say("none")?;
    program.bind(&mut right)?;
    program.say("\n")
}

pub(crate) fn power_off(program: &mut Assembly) -> Result<(), IcedError> {
    program.a.mov(edx, POWER)?;
    program.a.mov(eax, POWER_OFF)?;
    program.a.out(dx, ax)?;
    halt(program)
}

fn halt(program: &mut Assembly) -> Result<(), IcedError> {
    let mut halted = program.label();
    program.bind(&mut halted)?;
    program.a.hlt()?;
    program.a.jmp(halted)
}

/// The second processor: reads and writes without a pause. Reads of 4 bytes are counted apart: where a memory slot
/// appears while KVM emulates an access, it copies from the slot, fewer than 8 bytes one by one; real
/// functions answer those, QEMU's edu doesn't, and that would be a zero of the lab's own.
fn hammer(program: &mut Assembly) -> Result<(), IcedError> {
    let (mut next, mut end) = (program.label(), program.label());
    program.a.mov(ebx, dword_ptr(BAR))?;
    program.a.mov(dword_ptr(READY), 1)?;
    program.bind(&mut next)?;
    program.a.cmp(dword_ptr(STOP), 0)?;
    program.a.jne(end)?;
    for (register, value) in [(DMA_SOURCE, PATTERN), (DMA_DESTINATION, !PATTERN)] {
        program.a.mov(ebp, WIDE)?;
        program.a.mov(esi, register)?;
        program.a.mov(rcx, value)?;
        program.a.mov(qword_ptr(rbx + register), rcx)?;
        program.a.mov(rax, qword_ptr(rbx + register))?;
        program.count()?;
    }
    program.a.mov(ebp, NARROW)?;
    program.a.mov(esi, LIVENESS)?;
    program.a.mov(rcx, qword_ptr(NARROW_RIGHT))?;
    program.a.mov(dword_ptr(rbx + LIVENESS), LIVENESS_PATTERN)?;
    program.a.mov(eax, dword_ptr(rbx + LIVENESS))?;
    // All ones are all ones, then.
    program.a.movsxd(rax, eax)?;
    program.count()?;
    program.a.jmp(next)?;
    program.bind(&mut end)?;
    program.a.mov(dword_ptr(DONE), 1)?;
    halt(program)
}

/// Reads 4 bytes of the function's configuration space into `eax`.
fn read_config(program: &mut Assembly, offset: i32) -> Result<(), IcedError> {
    address_config(program, offset)?;
    program.a.in_(eax, dx)
}

fn decode_on(program: &mut Assembly) -> Result<(), IcedError> {
    address_config(program, PCI_COMMAND)?;
    program.a.mov(eax, r12d)?;
    program.a.out(dx, ax)
}

fn decode_off(program: &mut Assembly) -> Result<(), IcedError> {
    address_config(program, PCI_COMMAND)?;
    program.a.mov(eax, r12d)?;
    program.a.and(eax, !MEMORY_SPACE)?;
    program.a.out(dx, ax)
}

/// Leaves the data's port in `dx`.
fn address_config(program: &mut Assembly, offset: i32) -> Result<(), IcedError> {
    let a = &mut program.a;
    a.mov(eax, r14d)?;
    a.or(eax, offset)?;
    a.mov(edx, CONFIG_ADDRESS)?;
    a.out(dx, eax)?;
    a.mov(edx, CONFIG_DATA)
}
