//! Every kind of access that an instruction can make, against a BAR with decode on and off.
//!
//! Nobody computes what is right by hand. Each kind runs twice with the same registers: on RAM that holds
//! what the BAR must, and on the BAR. All registers, flags and memory that it leaves must be equal. With
//! decode on, the RAM is a mirror of the BAR. With decode off it is all ones, afresh for every kind, which
//! is what UR reads; and what was written must have gone nowhere.
//!
//! Per cycle and device:
//!
//! | decode | what | only where the BAR is memory |
//! |---|---|---|
//! | on | a pattern into BAR and mirror; every kind; BAR and mirror must be equal | yes |
//! | off | every kind, against all ones | |
//! | on | the BAR must be as it was before decode went off | yes |

mod kinds;
#[cfg(test)]
mod tests;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, cr4, eax, ecx, edx, esi, qword_ptr, r8, r8d, r9, r9d, r10, r11, r11d, r12, r13, r15,
    rax, rbp, rbx, rcx, rdi, rdx, rsi,
};

use self::kinds::KINDS;
pub use self::kinds::{InstructionGroup, InstructionKind};
use super::GuestError;
use super::asm::{Assembly, imm};
use super::layout::{INSTRUCTIONS, control, row};
use super::stats::field;
use crate::hypervisor::HostMapping;

/// Parameters.
const SELECTED: u64 = INSTRUCTIONS;
const FLAGS: u64 = INSTRUCTIONS + 8;
/// What each kind counts: runs, wrong ones, and of the first of these the value and the right value.
const ROWS: u64 = INSTRUCTIONS + 0x200;
const ROW_SIZE: u64 = 32;
const RUNS: i32 = 0;
const WRONG: i32 = 8;
const WRONG_VALUE: i32 = 16;
const WRONG_EXPECTED: i32 = 24;
/// Output blocks: what a kind left on RAM, and on the BAR.
const OUT_RAM: u64 = INSTRUCTIONS + 0x1000;
const OUT_BAR: u64 = INSTRUCTIONS + 0x1400;
const OUT_LEN: i32 = 0x100;
/// Where a kind puts vectors in its output block, and where `rdi` points.
const VECTOR: i32 = 0x40;
const BUFFER: i32 = 0x80;
/// What stores of vectors and strings store.
const CONSTANTS: u64 = INSTRUCTIONS + 0x2000;
const CONSTANTS_LEN: usize = 0x100;
/// Two pages, as the first two of the BAR.
const MIRROR: u64 = INSTRUCTIONS + 0x3000;
/// Where the mirror is kept while it is all ones.
const SAVED: u64 = INSTRUCTIONS + 0x5000;

/// Bits of [`FLAGS`].
const FLAG_MEMORY: i32 = 1 << 0;
const FLAG_CROSSING: i32 = 1 << 1;
const FLAG_ENABLE_SSE: i32 = 1 << 2;
const FLAG_ENABLE_AVX: i32 = 1 << 3;
const FLAG_EACH: i32 = 1 << 4;

/// What of the BAR is used: always, and by kinds that cross pages.
const FIRST: (i32, i32) = (0, 0x100);
const AROUND_PAGE_END: (i32, i32) = (0xfc0, 0x1040);

/// Checks that no kind does; they count in rows behind those of the kinds.
const CONTENT_ON: usize = KINDS.len();
const CONTENT_KEPT: usize = KINDS.len() + 1;
const CONTENT_NAMES: [&str; 2] = ["content with decode on", "content kept while decode was off"];

/// CR4 (AMD64 APM volume 2, 3.1.3).
const CR4_OSFXSR: i32 = 1 << 9;
const CR4_OSXSAVE: i32 = 1 << 18;
/// x87, XMM and YMM in XCR0 (AMD64 APM volume 2, 11.5.2).
const XCR0: u32 = 7;

/// An odd constant without pattern: each qword of the BAR is a multiple of it.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What [`Program::Instructions`](super::Program::Instructions) is told, besides
/// [`Parameters`](super::Parameters): there, `cycles` are its rounds and the mapped BARs of the device
/// table are what it works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionsParameters {
    /// Kinds to run, by their position in [`kinds`](Self::kinds): bit 0 is the first.
    pub selected: u64,
    /// The BARs are plain memory. Otherwise they are only touched while they do not decode.
    pub memory: bool,
    /// While decode is off, it goes on and off again before each kind.
    pub each: bool,
    /// The guest itself enables what the selected kinds need in CR4 and XCR0. The software hypervisor
    /// needs none of it, and knows neither.
    pub enable: bool,
}

impl InstructionsParameters {
    /// All kinds there are.
    #[must_use]
    pub fn kinds() -> &'static [InstructionKind] {
        &KINDS
    }

    /// A selection of all kinds that `wanted` says yes to.
    #[must_use]
    pub fn select(wanted: impl Fn(&InstructionKind) -> bool) -> u64 {
        (0..).zip(&KINDS).filter(|(_, kind)| wanted(kind)).fold(0, |mask, (bit, _)| mask | 1 << bit)
    }

    /// Writes them to guest RAM, after [`Parameters::install`](super::Parameters::install), which clears
    /// all results.
    ///
    /// # Errors
    /// [`GuestError::Ram`] for RAM smaller than [`RAM_SIZE`](super::RAM_SIZE).
    pub fn install(&self, ram: &HostMapping) -> Result<(), GuestError> {
        let needs =
            |needed: fn(&InstructionKind) -> bool| self.selected & Self::select(needed) != 0;
        let sse = |kind: &InstructionKind| {
            !matches!(kind.group, InstructionGroup::Integer | InstructionGroup::Movbe)
        };
        let flags = [
            (FLAG_MEMORY, self.memory),
            (FLAG_EACH, self.each),
            (FLAG_CROSSING, needs(|kind| kind.crossing)),
            (FLAG_ENABLE_SSE, self.enable && needs(sse)),
            (FLAG_ENABLE_AVX, self.enable && needs(|kind| kind.group == InstructionGroup::Avx)),
        ];
        let set = flags.into_iter().filter(|(_, set)| *set);
        ram.store_u64(FLAGS, set.fold(0, |all, (flag, _)| all | u64::from(flag.unsigned_abs())))?;
        ram.store_u64(SELECTED, self.selected)?;
        let mut constants = [0; CONSTANTS_LEN];
        // No byte is zero or all ones, and neighbours differ.
        for (byte, value) in constants.iter_mut().zip((1..0xff_u8).cycle()) {
            *byte = value;
        }
        Ok(ram.write(CONSTANTS, &constants)?)
    }
}

/// What the program has seen so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstructionsReport {
    /// All kinds, also those that were not selected, and two checks of what the BAR holds.
    pub kinds: Vec<InstructionReport>,
}

/// What it has seen of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstructionReport {
    /// Which kind.
    pub name: &'static str,
    /// It was to run.
    pub selected: bool,
    /// How often it ran, with decode on and off.
    pub runs: u64,
    /// How often a register, a flag or memory was not right after it.
    pub wrong: u64,
    /// The first such qword, and what would have been right.
    pub first_wrong: Option<(u64, u64)>,
}

impl InstructionsReport {
    /// Reads the results.
    ///
    /// # Errors
    /// [`GuestError::Ram`].
    pub fn read(ram: &HostMapping) -> Result<InstructionsReport, GuestError> {
        let selected = ram.load_u64(SELECTED)?;
        let memory = ram.load_u64(FLAGS)? & u64::from(FLAG_MEMORY.unsigned_abs()) != 0;
        let names = KINDS.iter().map(|kind| kind.name).chain(CONTENT_NAMES);
        let mut kinds = Vec::new();
        for (index, name) in names.enumerate() {
            let row = ROWS + ROW_SIZE * index as u64;
            let get = |offset: i32| ram.load_u64(row + u64::from(offset.unsigned_abs()));
            let wrong = get(WRONG)?;
            let first = (get(WRONG_VALUE)?, get(WRONG_EXPECTED)?);
            let selected = if index < KINDS.len() { selected >> index & 1 == 1 } else { memory };
            kinds.push(InstructionReport {
                name,
                selected,
                runs: get(RUNS)?,
                wrong,
                first_wrong: (wrong > 0).then_some(first),
            });
        }
        Ok(InstructionsReport { kinds })
    }

    /// Whether everything that was selected ran and was right.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.kinds.iter().all(|kind| (kind.runs > 0) == kind.selected && kind.wrong == 0)
    }
}

/// Subroutines.
struct Subroutines {
    run_kinds: CodeLabel,
    prepare: CodeLabel,
    capture: CodeLabel,
    fill_ones: CodeLabel,
    toggle: CodeLabel,
    compare: CodeLabel,
}

/// Registers beyond the common ones: `rbx` what a kind works on, `r10` its output block, `r11` not zero
/// while decode is off, `r9` number of a kind.
pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    let mut subroutines = Subroutines {
        run_kinds: asm.label(),
        prepare: asm.label(),
        capture: asm.label(),
        fill_ones: asm.label(),
        toggle: asm.label(),
        compare: asm.label(),
    };
    enable_vectors(&mut asm)?;
    let (mut cycle, mut done) = (asm.label(), asm.label());
    asm.a.xor(r13, r13)?;
    asm.bind(&mut cycle)?;
    asm.a.cmp(r13, qword_ptr(r12 + control::CYCLES))?;
    asm.a.jae(done)?;
    asm.each_device(|asm| exercise(asm, &subroutines))?;
    asm.a.inc(r13)?;
    asm.a.mov(qword_ptr(rbp + field::PROGRESS), r13)?;
    asm.a.jmp(cycle)?;
    asm.bind(&mut done)?;
    asm.exit()?;

    run_kinds(&mut asm, &mut subroutines)?;
    prepare(&mut asm, &mut subroutines)?;
    capture(&mut asm, &mut subroutines)?;
    fill_ones(&mut asm, &mut subroutines)?;
    toggle(&mut asm, &mut subroutines)?;
    compare(&mut asm, &mut subroutines)?;
    asm.finish(address)
}

fn enable_vectors(asm: &mut Assembly) -> Result<(), IcedError> {
    let (mut no_sse, mut no_avx) = (asm.label(), asm.label());
    asm.a.test(qword_ptr(FLAGS), FLAG_ENABLE_SSE)?;
    asm.a.je(no_sse)?;
    asm.a.mov(rax, cr4)?;
    asm.a.or(rax, CR4_OSFXSR)?;
    asm.a.mov(cr4, rax)?;
    asm.bind(&mut no_sse)?;
    asm.a.test(qword_ptr(FLAGS), FLAG_ENABLE_AVX)?;
    asm.a.je(no_avx)?;
    asm.a.mov(rax, cr4)?;
    asm.a.or(rax, CR4_OSXSAVE)?;
    asm.a.mov(cr4, rax)?;
    asm.a.mov(eax, XCR0)?;
    asm.a.xor(edx, edx)?;
    asm.a.xor(ecx, ecx)?;
    asm.a.xsetbv()?;
    asm.bind(&mut no_avx)
}

/// One cycle on one device.
fn exercise(asm: &mut Assembly, subroutines: &Subroutines) -> Result<(), IcedError> {
    asm.write_command(row::MAPPED_CONFIG, control::COMMAND_ON)?;
    if_memory(asm, |asm| {
        each_range(asm, fill_pattern)?;
        asm.a.xor(r11d, r11d)?;
        asm.a.call(subroutines.run_kinds)?;
        compare_content(asm, MIRROR, CONTENT_ON)?;
        each_range(asm, save)
    })?;
    asm.write_command(row::MAPPED_CONFIG, control::COMMAND_OFF)?;
    asm.a.mov(r11d, 1)?;
    asm.a.call(subroutines.run_kinds)?;
    asm.write_command(row::MAPPED_CONFIG, control::COMMAND_ON)?;
    if_memory(asm, |asm| compare_content(asm, SAVED, CONTENT_KEPT))?;
    asm.a.xor(rax, rax)
}

fn if_memory(
    asm: &mut Assembly,
    body: impl FnOnce(&mut Assembly) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut skip = asm.label();
    asm.a.test(qword_ptr(FLAGS), FLAG_MEMORY)?;
    asm.a.je(skip)?;
    body(asm)?;
    asm.bind(&mut skip)
}

/// For every qword that is used, with its offset in `rsi` and the BAR in `rbx`.
fn each_range(
    asm: &mut Assembly,
    body: impl Fn(&mut Assembly) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut done = asm.label();
    asm.a.mov(rbx, qword_ptr(r15 + row::MAPPED_BAR))?;
    for (start, end) in [FIRST, AROUND_PAGE_END] {
        let mut next = asm.label();
        asm.a.mov(esi, start)?;
        asm.bind(&mut next)?;
        body(asm)?;
        asm.a.add(rsi, 8)?;
        asm.a.cmp(rsi, end)?;
        asm.a.jb(next)?;
        if (start, end) == FIRST {
            asm.a.test(qword_ptr(FLAGS), FLAG_CROSSING)?;
            asm.a.je(done)?;
        }
    }
    asm.bind(&mut done)
}

/// A value that differs by offset and cycle.
fn fill_pattern(asm: &mut Assembly) -> Result<(), IcedError> {
    asm.a.lea(rax, qword_ptr(rsi + r13 + 1))?;
    asm.a.mov(rcx, PATTERN)?;
    asm.a.imul_2(rax, rcx)?;
    asm.a.mov(qword_ptr(rbx + rsi), rax)?;
    asm.a.mov(qword_ptr(rsi + imm(MIRROR)), rax)
}

fn save(asm: &mut Assembly) -> Result<(), IcedError> {
    asm.a.mov(rax, qword_ptr(rsi + imm(MIRROR)))?;
    asm.a.mov(qword_ptr(rsi + imm(SAVED)), rax)
}

/// Compares the BAR with RAM and counts it as kind `index`.
fn compare_content(asm: &mut Assembly, with: u64, index: usize) -> Result<(), IcedError> {
    let row = imm(ROWS + ROW_SIZE * index as u64);
    asm.a.inc(qword_ptr(row + RUNS))?;
    asm.a.mov(r8d, row)?;
    each_range(asm, |asm| {
        asm.a.mov(rax, qword_ptr(rbx + rsi))?;
        asm.a.mov(rcx, qword_ptr(rsi + imm(with)))?;
        check(asm)
    })
}

/// Counts it in the row at `r8` unless `rax` equals `rcx`.
fn check(asm: &mut Assembly) -> Result<(), IcedError> {
    let (mut equal, mut counted) = (asm.label(), asm.label());
    asm.a.cmp(rax, rcx)?;
    asm.a.je(equal)?;
    asm.a.inc(qword_ptr(r8 + WRONG))?;
    asm.a.cmp(qword_ptr(r8 + WRONG), 1)?;
    asm.a.jne(counted)?;
    asm.a.mov(qword_ptr(r8 + WRONG_VALUE), rax)?;
    asm.a.mov(qword_ptr(r8 + WRONG_EXPECTED), rcx)?;
    asm.bind(&mut counted)?;
    asm.record_wrong()?;
    asm.bind(&mut equal)
}

/// Every kind that is selected: on RAM, on the BAR, compared.
fn run_kinds(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    asm.bind(&mut subroutines.run_kinds)?;
    let mut bodies = Vec::new();
    for (index, kind) in (0_u32..).zip(&KINDS) {
        let (mut skip, mut filled, body) = (asm.label(), asm.label(), asm.label());
        asm.a.mov(rax, 1_u64 << index)?;
        asm.a.test(qword_ptr(SELECTED), rax)?;
        asm.a.je(skip)?;
        asm.a.test(r11, r11)?;
        asm.a.je(filled)?;
        asm.a.call(subroutines.fill_ones)?;
        asm.a.test(qword_ptr(FLAGS), FLAG_EACH)?;
        asm.a.je(filled)?;
        asm.a.call(subroutines.toggle)?;
        asm.bind(&mut filled)?;
        asm.a.mov(rbx, MIRROR)?;
        asm.a.mov(r10, OUT_RAM)?;
        asm.a.call(body)?;
        asm.a.mov(rbx, qword_ptr(r15 + row::MAPPED_BAR))?;
        asm.a.mov(r10, OUT_BAR)?;
        asm.a.call(body)?;
        asm.a.mov(r9d, index)?;
        asm.a.call(subroutines.compare)?;
        asm.bind(&mut skip)?;
        bodies.push((body, kind.code));
    }
    asm.a.ret()?;
    for (mut body, code) in bodies {
        asm.bind(&mut body)?;
        asm.a.call(subroutines.prepare)?;
        code(&mut asm.a)?;
        asm.a.call(subroutines.capture)?;
        asm.a.ret()?;
    }
    Ok(())
}

/// The registers that a kind finds, and an empty output block.
fn prepare(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    asm.bind(&mut subroutines.prepare)?;
    asm.a.xor(eax, eax)?;
    asm.a.mov(rdi, r10)?;
    asm.a.mov(ecx, OUT_LEN / 8)?;
    asm.a.rep().stosq()?;
    asm.a.xor(r8d, r8d)?;
    asm.a.mov(rax, 0x1122_3344_5566_7788_u64)?;
    asm.a.mov(rcx, 0xf1e2_d3c4_b5a6_9788_u64)?;
    asm.a.add(rcx, r13)?;
    asm.a.mov(rdx, 0x0102_0304_0506_0708_u64)?;
    asm.a.mov(rsi, rbx)?;
    asm.a.lea(rdi, qword_ptr(r10 + BUFFER))?;
    asm.a.ret()
}

/// The registers that it left.
fn capture(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    asm.bind(&mut subroutines.capture)?;
    asm.a.sub(rsi, rbx)?;
    asm.a.sub(rdi, r10)?;
    for (offset, register) in (0..).step_by(8).zip([rax, rcx, rdx, r8, rsi, rdi]) {
        asm.a.mov(qword_ptr(r10 + offset), register)?;
    }
    asm.a.ret()
}

fn fill_ones(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    asm.bind(&mut subroutines.fill_ones)?;
    asm.a.mov(rax, u64::MAX)?;
    for (start, end) in [FIRST, AROUND_PAGE_END] {
        asm.a.mov(rdi, MIRROR + u64::from(start.unsigned_abs()))?;
        asm.a.mov(ecx, (end - start) / 8)?;
        asm.a.rep().stosq()?;
    }
    asm.a.ret()
}

/// Decode on and off again.
fn toggle(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    asm.bind(&mut subroutines.toggle)?;
    asm.write_command(row::MAPPED_CONFIG, control::COMMAND_ON)?;
    asm.write_command(row::MAPPED_CONFIG, control::COMMAND_OFF)?;
    asm.a.ret()
}

/// Compares the output blocks of kind `r9`.
fn compare(asm: &mut Assembly, subroutines: &mut Subroutines) -> Result<(), IcedError> {
    let mut next = asm.label();
    asm.bind(&mut subroutines.compare)?;
    asm.a.mov(r8, r9)?;
    asm.a.shl(r8, ROW_SIZE.ilog2())?;
    asm.a.add(r8, imm(ROWS))?;
    asm.a.inc(qword_ptr(r8 + RUNS))?;
    asm.a.xor(esi, esi)?;
    asm.bind(&mut next)?;
    asm.a.mov(rax, qword_ptr(rsi + imm(OUT_BAR)))?;
    asm.a.mov(rcx, qword_ptr(rsi + imm(OUT_RAM)))?;
    check(asm)?;
    asm.a.add(rsi, 8)?;
    asm.a.cmp(rsi, OUT_LEN)?;
    asm.a.jb(next)?;
    asm.a.ret()
}

const _: () = assert!(KINDS.len() <= 62, "a bit for each kind, and rows up to the output blocks");
