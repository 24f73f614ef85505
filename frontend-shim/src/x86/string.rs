//! String instructions: MOVS, STOS, LODS, SCAS and CMPS, with and without a repeat prefix.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::alu::{self, DF, ZF, truncate};
use super::execute::set_status;
use super::operand::{read, register, set_register, write};
use super::{Bus, Registers, Stop, Unsupported};

/// Whether an operand is addressed the way that only string instructions do. Their mnemonics don't tell:
/// MOVSD and CMPSD are vector instructions too.
pub(super) fn is_string(i: &Instruction) -> bool {
    (0..i.op_count())
        .any(|operand| matches!(i.op_kind(operand), OpKind::MemorySegRSI | OpKind::MemoryESRDI))
}

/// One iteration. With a repeat prefix the instruction is its own successor until it has finished:
/// `rip` stays at it, as it does for an interrupt between two iterations.
pub(super) fn execute<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let compares = compares(i)?;
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let count = register(r, Register::RCX)?;
    if repeated && count == 0 {
        return Ok(());
    }
    let first = read(r, i, if compares { 0 } else { 1 }, bus)?;
    if compares {
        let width = i.memory_size().size();
        let (a, b) = (truncate(first, width), truncate(read(r, i, 1, bus)?, width));
        set_status(r, alu::sub(a, b, false, width).1);
    } else {
        write(r, i, 0, first, bus)?;
    }
    advance(r, i)?;
    if repeated {
        set_register(r, Register::RCX, count - 1)?;
        // REPE goes on while equal, REPNE while not.
        let ended = compares && (r.flags & ZF != 0) == i.has_repne_prefix();
        if count > 1 && !ended {
            r.rip = i.ip();
        }
    }
    Ok(())
}

/// Whether it compares its operands; the others copy the second to the first.
fn compares(i: &Instruction) -> Result<bool, Unsupported> {
    match i.mnemonic() {
        Mnemonic::Movsb
        | Mnemonic::Movsw
        | Mnemonic::Movsd
        | Mnemonic::Movsq
        | Mnemonic::Stosb
        | Mnemonic::Stosw
        | Mnemonic::Stosd
        | Mnemonic::Stosq
        | Mnemonic::Lodsb
        | Mnemonic::Lodsw
        | Mnemonic::Lodsd
        | Mnemonic::Lodsq => Ok(false),
        Mnemonic::Cmpsb
        | Mnemonic::Cmpsw
        | Mnemonic::Cmpsd
        | Mnemonic::Cmpsq
        | Mnemonic::Scasb
        | Mnemonic::Scasw
        | Mnemonic::Scasd
        | Mnemonic::Scasq => Ok(true),
        _ => Err(Unsupported("string instruction of ports")),
    }
}

/// Moves the pointers that the instruction uses.
fn advance<V>(r: &mut Registers<V>, i: &Instruction) -> Result<(), Unsupported> {
    let width = i.memory_size().size() as u64;
    let step = if r.flags & DF == 0 { width } else { width.wrapping_neg() };
    for operand in 0..i.op_count() {
        let pointer = match i.op_kind(operand) {
            OpKind::MemoryESRDI => Register::RDI,
            OpKind::MemorySegRSI => Register::RSI,
            _ => continue,
        };
        let value = register(r, pointer)?;
        set_register(r, pointer, value.wrapping_add(step))?;
    }
    Ok(())
}
