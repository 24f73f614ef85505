//! What an edu device can do: a factorial, and DMA in both directions.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, eax, ecx, edx, qword_ptr, r8, r10, r11, r12, r14, r15, rax, rbx, rcx, rsi,
};

use super::asm::{Assembly, Width, imm};
use super::layout::{DEVICE_TABLE, DMA_BUFFER, EDU_RESULTS, ROW_SIZE, control, row};
use super::stats::field;
use super::{GuestError, MAX_DEVICES};
use crate::hypervisor::HostMapping;

/// Registers of the device (QEMU, docs/specs/edu.rst).
const FACTORIAL: i32 = 0x08;
const STATUS: i32 = 0x20;
const DMA_SOURCE: i32 = 0x80;
const DMA_DESTINATION: i32 = 0x88;
const DMA_COUNT: i32 = 0x90;
const DMA_COMMAND: i32 = 0x98;
/// Bit 0 of the status and of the DMA command: at work.
const BUSY: i32 = 1;
const START_TO_DEVICE: i32 = 1;
const START_FROM_DEVICE: i32 = 3;
/// Address of the buffer inside the device, in the device's own terms.
const DEVICE_BUFFER: i32 = 0x4_0000;
const DMA_LENGTH: i32 = 4096;

const FACTORIAL_INPUT: i32 = 10;
const FACTORIAL_OUTPUT: u32 = 3_628_800;
/// An odd constant without pattern (2^64 / golden ratio): each qword of the buffer is its multiple.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Offsets in the result of a device; every field is a u64.
const OUTCOME: i32 = 0;
const FACTORIAL_RESULT: i32 = 8;
const DMA_MISMATCHES: i32 = 16;
const PASSED_UNLESS_WRONG: i32 = 1;
const TIMED_OUT: i32 = 2;

/// What `edu` saw of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EduReport {
    /// The program has gone through all steps for this device.
    pub completed: bool,
    /// A step did not finish within [`Parameters::poll_limit`](super::Parameters::poll_limit) polls.
    pub timed_out: bool,
    /// 10!, if the device can count.
    pub factorial: u64,
    /// Qwords that came back from the device other than they went.
    pub dma_mismatches: u64,
}

impl EduReport {
    /// Reads the result for row `device` of the device table.
    ///
    /// # Errors
    /// [`GuestError::TooManyDevices`] and [`GuestError::Ram`].
    pub fn read(ram: &HostMapping, device: usize) -> Result<EduReport, GuestError> {
        if device >= MAX_DEVICES {
            return Err(GuestError::TooManyDevices { devices: device + 1 });
        }
        let result = EDU_RESULTS + 64 * device as u64;
        let get = |offset: i32| ram.load_u64(result + u64::from(offset.unsigned_abs()));
        let outcome = get(OUTCOME)?;
        Ok(EduReport {
            completed: outcome == u64::from(PASSED_UNLESS_WRONG.unsigned_abs()),
            timed_out: outcome == u64::from(TIMED_OUT.unsigned_abs()),
            factorial: get(FACTORIAL_RESULT)?,
            dma_mismatches: get(DMA_MISMATCHES)?,
        })
    }

    /// Whether the device did everything right.
    pub fn passed(&self) -> bool {
        self.completed && self.factorial == u64::from(FACTORIAL_OUTPUT) && self.dma_mismatches == 0
    }
}

/// Registers beyond the common ones: `rsi` BAR, `r11` result of the device, `r10` and `r8` scratch.
pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let source = DMA_BUFFER.0;
    let destination = source + u64::from(DMA_LENGTH.unsigned_abs());
    let mut asm = Assembly::new()?;
    asm.each_device(|asm| {
        let (mut timed_out, mut done) = (asm.label(), asm.label());
        asm.a.lea(r11, qword_ptr(r15 + (imm(EDU_RESULTS) - imm(DEVICE_TABLE))))?;
        asm.a.mov(rsi, qword_ptr(r15 + row::TRAPPED_BAR))?;
        asm.write_command(row::TRAPPED_CONFIG, control::COMMAND_ON)?;

        asm.a.mov(eax, FACTORIAL_INPUT)?;
        asm.a.lea(rbx, qword_ptr(rsi + FACTORIAL))?;
        asm.store32(eax, field::TRAPPED_WRITES)?;
        wait_idle(asm, STATUS, timed_out)?;
        asm.a.lea(rbx, qword_ptr(rsi + FACTORIAL))?;
        asm.read(Width::Dword)?;
        asm.a.mov(qword_ptr(r11 + FACTORIAL_RESULT), rax)?;
        asm.a.mov(ecx, FACTORIAL_OUTPUT)?;
        asm.expect()?;

        fill_buffers(asm, source, destination)?;
        let device_buffer = u64::from(DEVICE_BUFFER.unsigned_abs());
        transfer(asm, source, device_buffer, START_TO_DEVICE, timed_out)?;
        transfer(asm, device_buffer, destination, START_FROM_DEVICE, timed_out)?;
        compare_buffers(asm, source, destination)?;
        asm.a.mov(qword_ptr(r11 + OUTCOME), PASSED_UNLESS_WRONG)?;
        asm.a.jmp(done)?;

        asm.bind(&mut timed_out)?;
        asm.a.mov(qword_ptr(r11 + OUTCOME), TIMED_OUT)?;
        asm.a.mov(ecx, 0)?;
        asm.record_wrong()?;
        asm.bind(&mut done)
    })?;
    asm.exit()?;
    asm.finish(address)
}

/// Polls a register until it is idle. A dead device reads all ones, which looks busy: hence the limit.
fn wait_idle(asm: &mut Assembly, register: i32, timed_out: CodeLabel) -> Result<(), IcedError> {
    let (mut poll, mut idle) = (asm.label(), asm.label());
    asm.a.lea(rbx, qword_ptr(rsi + register))?;
    asm.a.mov(r10, qword_ptr(r12 + control::POLL_LIMIT))?;
    asm.bind(&mut poll)?;
    asm.read(Width::Dword)?;
    asm.a.test(eax, BUSY)?;
    asm.a.je(idle)?;
    asm.a.pause()?;
    asm.a.sub(r10, 1)?;
    asm.a.ja(poll)?;
    asm.a.jmp(timed_out)?;
    asm.bind(&mut idle)
}

fn transfer(
    asm: &mut Assembly,
    from: u64,
    to: u64,
    command: i32,
    timed_out: CodeLabel,
) -> Result<(), IcedError> {
    let length = u64::from(DMA_LENGTH.unsigned_abs());
    let command = u64::from(command.unsigned_abs());
    for (register, value) in
        [(DMA_SOURCE, from), (DMA_DESTINATION, to), (DMA_COUNT, length), (DMA_COMMAND, command)]
    {
        asm.a.lea(rbx, qword_ptr(rsi + register))?;
        asm.a.mov(rax, value)?;
        asm.store64(rax, field::TRAPPED_WRITES)?;
    }
    wait_idle(asm, DMA_COMMAND, timed_out)
}

/// Source: a pattern that differs by device. Destination: zeroes.
fn fill_buffers(asm: &mut Assembly, source: u64, destination: u64) -> Result<(), IcedError> {
    let mut next = asm.label();
    asm.a.mov(r8, PATTERN)?;
    asm.a.mov(rax, r8)?;
    asm.a.imul_2(rax, r14)?;
    asm.a.xor(ecx, ecx)?;
    asm.a.xor(edx, edx)?;
    asm.bind(&mut next)?;
    asm.a.add(rax, r8)?;
    asm.a.mov(qword_ptr(rcx + imm(source)), rax)?;
    asm.a.mov(qword_ptr(rcx + imm(destination)), 0)?;
    asm.a.add(ecx, 8)?;
    asm.a.cmp(ecx, DMA_LENGTH)?;
    asm.a.jb(next)
}

fn compare_buffers(asm: &mut Assembly, source: u64, destination: u64) -> Result<(), IcedError> {
    let (mut next, mut equal) = (asm.label(), asm.label());
    asm.a.xor(r10, r10)?;
    asm.bind(&mut next)?;
    asm.a.lea(rbx, qword_ptr(r10 + imm(destination)))?;
    asm.a.mov(rax, qword_ptr(rbx))?;
    asm.a.mov(rcx, qword_ptr(r10 + imm(source)))?;
    asm.a.cmp(rax, rcx)?;
    asm.a.je(equal)?;
    asm.a.inc(qword_ptr(r11 + DMA_MISMATCHES))?;
    asm.record_wrong()?;
    asm.bind(&mut equal)?;
    asm.a.add(r10, 8)?;
    asm.a.cmp(r10, DMA_LENGTH)?;
    asm.a.jb(next)
}

const _: () = assert!(ROW_SIZE == 64, "results and rows of the device table advance together");
