//! A machine with two pages of RAM and nothing but devices around them.

mod hostile;
mod integer;
mod resume;
mod vector;

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use super::*;
use crate::hypervisor::{GuestAddress, HostMapping, PAGE_SIZE, VcpuExit};

/// Where the code is, for RIP alone: instructions are given as bytes.
const CODE: u64 = 0x1000;
const RAM: u64 = 0x2000;
const RAM_SIZE: u64 = 2 * PAGE_SIZE;
/// A device, and right after it another one.
const DEVICE: u64 = 0x8000;
/// Linear pages that lead elsewhere, or nowhere.
const ALIAS: u64 = 0x10_0000;
const ALIASED: u64 = 0x9_0000;
const READ_ONLY: u64 = 0x10_1000;
const NOT_MAPPED: u64 = 0x10_2000;

struct Board {
    memory: Arc<HostMapping>,
}

impl Board {
    fn new() -> Board {
        Board { memory: Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap()) }
    }

    fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(address - RAM, &mut data).unwrap();
        data
    }

    fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(address - RAM, data).unwrap();
    }
}

impl Memory for Board {
    fn translate(&mut self, linear: u64, write: bool) -> Option<GuestAddress> {
        let page = match linear & !(PAGE_SIZE - 1) {
            ALIAS => ALIASED,
            READ_ONLY if write => return None,
            NOT_MAPPED => return None,
            page => page,
        };
        Some(GuestAddress(page + linear % PAGE_SIZE))
    }

    fn ram(&self, address: GuestAddress, _write: bool) -> Option<Ram<'_>> {
        let offset = address.0.checked_sub(RAM).filter(|offset| *offset < RAM_SIZE)?;
        Some(Ram { memory: &self.memory, offset })
    }
}

/// What a device answers: each byte tells its address.
fn device_byte(address: u64) -> u8 {
    u8::try_from((address >> 12 << 4 ^ address) & 0xff).unwrap()
}

fn device_bytes<const N: usize>(address: u64) -> [u8; N] {
    std::array::from_fn(|at| device_byte(address + at as u64))
}

fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    code(&mut assembler).unwrap();
    assembler.assemble(CODE).unwrap()
}

fn pending(
    registers: &Registers,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> PendingInstruction {
    PendingInstruction::new(registers.clone(), &assemble(code)).unwrap()
}

/// Completes the access that `pending` waits for, and says what it was.
fn complete(pending: &mut PendingInstruction) -> String {
    match pending.exit().expect("an access to complete") {
        VcpuExit::MmioRead { address, data } => {
            for (at, byte) in (0..).zip(data.iter_mut()) {
                *byte = device_byte(address.0.wrapping_add(at));
            }
            format!("read {address} {}", data.len())
        }
        VcpuExit::MmioWrite { address, data } => format!("write {address} {data:02x?}"),
        VcpuExit::PioRead { port, data, .. } => {
            data.fill(0x5a);
            format!("in {port:#x} {}", data.len())
        }
        VcpuExit::PioWrite { port, data, .. } => format!("out {port:#x} {data:02x?}"),
        other => panic!("{other:?}"),
    }
}

/// Executes one instruction to its end, all iterations of it; the registers after it and its exits.
fn run(
    board: &mut Board,
    registers: &Registers,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(Registers, Vec<String>), Unsupported> {
    let mut pending = pending(registers, code);
    let mut exits = Vec::new();
    loop {
        match pending.attempt(board)? {
            Outcome::Retired if pending.repeats() => {}
            Outcome::Retired => return Ok((pending.registers().clone(), exits)),
            Outcome::Exit => exits.push(complete(&mut pending)),
            other => panic!("{other:?}"),
        }
    }
}

/// All registers zero but these.
fn registers(values: &[(iced_x86::Register, u64)]) -> Registers {
    let mut registers = Registers::new(CODE);
    for (register, value) in values {
        registers.set(*register, *value).unwrap();
    }
    registers
}

/// One instruction.
type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
