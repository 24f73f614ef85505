//! Instruction operands.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Bus, Registers, Stop, Unsupported};

/// Width in bytes of an operand that is a register or memory.
pub(super) fn width(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

/// Value of an operand. Immediates are sign-extended: truncate to the width of the operation.
pub(super) fn read<B: Bus, V>(
    registers: &Registers<V>,
    instruction: &Instruction,
    operand: u32,
    bus: &mut B,
) -> Result<u64, Stop<B::Error>> {
    match instruction.op_kind(operand) {
        OpKind::Register => Ok(register(registers, instruction.op_register(operand))?),
        kind if is_memory(kind) => {
            let address = address(registers, instruction, operand)?;
            bus.read(address, memory_width(instruction)?)
        }
        _ => instruction.try_immediate(operand).map_err(|_| Stop::Unsupported("operand kind")),
    }
}

pub(super) fn write<B: Bus, V>(
    registers: &mut Registers<V>,
    instruction: &Instruction,
    operand: u32,
    value: u64,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    match instruction.op_kind(operand) {
        OpKind::Register => Ok(set_register(registers, instruction.op_register(operand), value)?),
        kind if is_memory(kind) => {
            let address = address(registers, instruction, operand)?;
            bus.write(address, memory_width(instruction)?, value)
        }
        _ => Err(Stop::Unsupported("operand kind")),
    }
}

/// Replaces an operand by what `update` makes of it and returns its old value.
pub(super) fn modify<B: Bus, V>(
    registers: &mut Registers<V>,
    instruction: &Instruction,
    operand: u32,
    locked: bool,
    bus: &mut B,
    update: impl FnMut(u64) -> u64,
) -> Result<u64, Stop<B::Error>> {
    let mut update = update;
    if is_memory(instruction.op_kind(operand)) {
        let address = address(registers, instruction, operand)?;
        return bus.modify(address, memory_width(instruction)?, locked, update);
    }
    let old = read(registers, instruction, operand, bus)?;
    write(registers, instruction, operand, update(old), bus)?;
    Ok(old)
}

pub(super) fn register<V>(
    registers: &Registers<V>,
    register: Register,
) -> Result<u64, Unsupported> {
    registers.get(register).ok_or(Unsupported("register other than a general-purpose one"))
}

pub(super) fn set_register<V>(
    registers: &mut Registers<V>,
    register: Register,
    value: u64,
) -> Result<(), Unsupported> {
    registers.set(register, value).ok_or(Unsupported("register other than a general-purpose one"))
}

/// Linear address of a memory operand. For LEA, which has no segment, its offset.
pub(super) fn address<V>(
    registers: &Registers<V>,
    instruction: &Instruction,
    operand: u32,
) -> Result<u64, Unsupported> {
    let value = |register: Register, _, _| match register {
        Register::FS | Register::GS if instruction.mnemonic() == Mnemonic::Lea => Some(0),
        Register::FS => Some(registers.fs_base),
        Register::GS => Some(registers.gs_base),
        _ if register.is_segment_register() => Some(0),
        _ => registers.get(register),
    };
    instruction.virtual_address(operand, 0, value).ok_or(Unsupported("addressing mode"))
}

pub(super) fn is_memory(kind: OpKind) -> bool {
    matches!(kind, OpKind::Memory | OpKind::MemorySegRSI | OpKind::MemoryESRDI)
}

fn memory_width(instruction: &Instruction) -> Result<usize, Unsupported> {
    match instruction.memory_size().size() {
        width @ (1 | 2 | 4 | 8) => Ok(width),
        _ => Err(Unsupported("width of a memory operand")),
    }
}
