//! One instruction. The subset is the integer code that guests and drivers are made of, with its common
//! forms in all widths and addressing modes; string and vector instructions have files of their own.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::alu::{self, CF, DF, IF, STATUS, SYSTEM, Shift, ZF, sign_extend, truncate};
use super::operand::{address, is_memory, modify, read, register, set_register, width, write};
use super::{Bus, Registers, Stop, Unsupported, VectorFile, string, vector};

/// Executes `instruction` on `registers`, whose `rip` is already that of the next one.
///
/// Of an instruction with a repeat prefix, this is one iteration: `rip` is set back to it until it has
/// finished. Allocates nothing, once a first call has been made.
///
/// # Errors
/// [`Stop`]; the registers are to be thrown away then.
pub fn execute<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    if string::is_string(i) {
        return string::execute(r, i, bus);
    }
    match i.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movnti => {
            let value = read(r, i, 1, bus)?;
            write(r, i, 0, value, bus)
        }
        Mnemonic::Movsx | Mnemonic::Movsxd => {
            let value = sign_extend(read(r, i, 1, bus)?, width(i, 1));
            write(r, i, 0, value, bus)
        }
        Mnemonic::Lea => {
            let value = address(r, i, 1)?;
            write(r, i, 0, value, bus)
        }
        Mnemonic::Add => binary(r, i, bus, |a, b, _, w| alu::add(a, b, false, w)),
        Mnemonic::Adc => binary(r, i, bus, |a, b, flags, w| alu::add(a, b, flags & CF != 0, w)),
        Mnemonic::Sub => binary(r, i, bus, |a, b, _, w| alu::sub(a, b, false, w)),
        Mnemonic::Sbb => binary(r, i, bus, |a, b, flags, w| alu::sub(a, b, flags & CF != 0, w)),
        Mnemonic::And => binary(r, i, bus, |a, b, _, w| (a & b, alu::logic(a & b, w))),
        Mnemonic::Or => binary(r, i, bus, |a, b, _, w| (a | b, alu::logic(a | b, w))),
        Mnemonic::Xor => binary(r, i, bus, |a, b, _, w| (a ^ b, alu::logic(a ^ b, w))),
        Mnemonic::Not => {
            let w = width(i, 0);
            modify(r, i, 0, i.has_lock_prefix(), bus, |a| truncate(!a, w)).map(|_| ())
        }
        Mnemonic::Neg => unary(r, i, bus, |a, _, w| alu::sub(0, a, false, w)),
        Mnemonic::Inc => {
            unary(r, i, bus, |a, flags, w| keep_carry(flags, alu::add(a, 1, false, w)))
        }
        Mnemonic::Dec => {
            unary(r, i, bus, |a, flags, w| keep_carry(flags, alu::sub(a, 1, false, w)))
        }
        Mnemonic::Cmp => compare(r, i, bus, |a, b, w| alu::sub(a, b, false, w).1),
        Mnemonic::Test => compare(r, i, bus, |a, b, w| alu::logic(a & b, w)),
        Mnemonic::Shl | Mnemonic::Sal => shift(r, i, bus, Shift::Left),
        Mnemonic::Shr => shift(r, i, bus, Shift::Right),
        Mnemonic::Sar => shift(r, i, bus, Shift::ArithmeticRight),
        Mnemonic::Imul if i.op_count() >= 2 => {
            let w = width(i, 0);
            let a = read(r, i, i.op_count() - 2, bus)?;
            let b = truncate(read(r, i, i.op_count() - 1, bus)?, w);
            let (result, flags) = alu::multiply(a, b, w);
            set_status(r, flags);
            write(r, i, 0, result, bus)
        }
        Mnemonic::Xchg => {
            // Memory is operand 0 in every encoding, and the exchange is locked without a prefix.
            let new = read(r, i, 1, bus)?;
            let old = modify(r, i, 0, true, bus, |_| new)?;
            write(r, i, 1, old, bus)
        }
        Mnemonic::Xadd => {
            let w = width(i, 0);
            let addend = read(r, i, 1, bus)?;
            let old =
                modify(r, i, 0, i.has_lock_prefix(), bus, |a| alu::add(a, addend, false, w).0)?;
            set_status(r, alu::add(old, addend, false, w).1);
            // The sum wins where both operands are one register.
            if (i.op0_kind(), i.op0_register()) == (OpKind::Register, i.op1_register()) {
                return Ok(());
            }
            write(r, i, 1, old, bus)
        }
        Mnemonic::Cmpxchg => compare_exchange(r, i, bus),
        Mnemonic::Cmpxchg8b => compare_exchange_pair(r, i, bus),
        Mnemonic::Cmpxchg16b => compare_exchange_wide(r, i, bus),
        Mnemonic::Movbe => {
            let w = width(i, 0);
            let value = read(r, i, 1, bus)?.swap_bytes() >> (64 - 8 * w);
            write(r, i, 0, value, bus)
        }
        Mnemonic::Bt => bit_test(r, i, bus, None),
        Mnemonic::Bts => bit_test(r, i, bus, Some(|value, bit| value | bit)),
        Mnemonic::Btr => bit_test(r, i, bus, Some(|value, bit| value & !bit)),
        Mnemonic::Btc => bit_test(r, i, bus, Some(|value, bit| value ^ bit)),
        Mnemonic::Jmp => jump(r, i, bus),
        Mnemonic::Call => {
            let return_address = r.rip;
            jump(r, i, bus)?;
            push(r, return_address, bus)
        }
        Mnemonic::Ret => {
            r.rip = pop(r, bus)?;
            let release = if i.op_count() == 1 { i.immediate(0) } else { 0 };
            let rsp = register(r, Register::RSP)?;
            Ok(set_register(r, Register::RSP, rsp.wrapping_add(release))?)
        }
        Mnemonic::Push => {
            if i.stack_pointer_increment() != -8 {
                return Err(Stop::Unsupported("push of 2 bytes"));
            }
            let value = read(r, i, 0, bus)?;
            push(r, value, bus)
        }
        Mnemonic::Pop => {
            if i.stack_pointer_increment() != 8 {
                return Err(Stop::Unsupported("pop of 2 bytes"));
            }
            let value = pop(r, bus)?;
            write(r, i, 0, value, bus)
        }
        Mnemonic::Pushfq => push(r, r.flags, bus),
        Mnemonic::Popfq => {
            let flags = pop(r, bus)?;
            if (flags ^ r.flags) & SYSTEM != 0 {
                return Err(Stop::Unsupported("POPFQ that changes a system flag"));
            }
            r.flags = r.flags & !(STATUS | DF) | flags & (STATUS | DF);
            Ok(())
        }
        Mnemonic::In => {
            let port = port(r, i, 1, bus)?;
            let value = bus.port_read(port, width(i, 0))?;
            write(r, i, 0, value, bus)
        }
        Mnemonic::Out => {
            let port = port(r, i, 0, bus)?;
            let value = read(r, i, 1, bus)?;
            bus.port_write(port, width(i, 1), value)
        }
        Mnemonic::Cld => flag(r, DF, false),
        Mnemonic::Std => flag(r, DF, true),
        Mnemonic::Cli => flag(r, IF, false),
        // Nothing here has a weaker order to fence.
        Mnemonic::Nop
        | Mnemonic::Pause
        | Mnemonic::Mfence
        | Mnemonic::Lfence
        | Mnemonic::Sfence => Ok(()),
        Mnemonic::Hlt => Err(Stop::Halt),
        _ if vector::is_vector(i) => vector::execute(r, i, bus),
        _ => conditional(r, i, bus),
    }
}

/// Jcc, SETcc and CMOVcc.
fn conditional<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    const UNKNOWN: Unsupported = Unsupported("instruction outside the known subset");
    let holds = alu::condition(i.condition_code(), r.flags).ok_or(UNKNOWN)?;
    if i.flow_control() == FlowControl::ConditionalBranch {
        if matches!(i.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne) {
            return Err(UNKNOWN.into());
        }
        if holds {
            r.rip = i.near_branch_target();
        }
        return Ok(());
    }
    match i.op_count() {
        1 => write(r, i, 0, holds.into(), bus),
        2 => {
            // The source is read, and a 4 byte destination zero-extended, also if the condition is false.
            let source = read(r, i, 1, bus)?;
            let value = if holds { source } else { read(r, i, 0, bus)? };
            write(r, i, 0, value, bus)
        }
        _ => Err(UNKNOWN.into()),
    }
}

fn binary<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    operation: impl Fn(u64, u64, u64, usize) -> (u64, u64),
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let b = truncate(read(r, i, 1, bus)?, w);
    let before = r.flags;
    let a = modify(r, i, 0, i.has_lock_prefix(), bus, |a| operation(a, b, before, w).0)?;
    set_status(r, operation(a, b, before, w).1);
    Ok(())
}

fn unary<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    operation: impl Fn(u64, u64, usize) -> (u64, u64),
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let before = r.flags;
    let a = modify(r, i, 0, i.has_lock_prefix(), bus, |a| operation(a, before, w).0)?;
    set_status(r, operation(a, before, w).1);
    Ok(())
}

fn compare<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    flags: impl Fn(u64, u64, usize) -> u64,
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let a = read(r, i, 0, bus)?;
    let b = truncate(read(r, i, 1, bus)?, w);
    set_status(r, flags(a, b, w));
    Ok(())
}

fn shift<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    kind: Shift,
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let count = truncate(read(r, i, 1, bus)?, 1);
    let shifted = |a| alu::shift(kind, a, count, w);
    let a = modify(r, i, 0, false, bus, |a| shifted(a).map_or(a, |(result, _)| result))?;
    if let Some((_, flags)) = shifted(a) {
        set_status(r, flags);
    }
    Ok(())
}

fn compare_exchange<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let accumulator = match w {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    let expected = register(r, accumulator)?;
    let new = read(r, i, 1, bus)?;
    // The processor writes in either case: the old value where the comparison fails.
    let old = modify(r, i, 0, i.has_lock_prefix(), bus, |a| if a == expected { new } else { a })?;
    let flags = alu::sub(expected, old, false, w).1;
    set_status(r, flags);
    if flags & ZF == 0 {
        set_register(r, accumulator, old)?;
    }
    Ok(())
}

/// CMPXCHG8B: EDX:EAX against memory, ECX:EBX to it.
fn compare_exchange_pair<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let pair = |r: &Registers<V>, high, low| -> Result<u64, Unsupported> {
        Ok(register(r, high)? << 32 | register(r, low)?)
    };
    let expected = pair(r, Register::EDX, Register::EAX)?;
    let new = pair(r, Register::ECX, Register::EBX)?;
    let old = modify(r, i, 0, i.has_lock_prefix(), bus, |a| if a == expected { new } else { a })?;
    if old == expected {
        r.flags |= ZF;
        return Ok(());
    }
    r.flags &= !ZF;
    set_register(r, Register::EAX, truncate(old, 4))?;
    Ok(set_register(r, Register::EDX, old >> 32)?)
}

/// CMPXCHG16B: RDX:RAX against memory, RCX:RBX to it.
fn compare_exchange_wide<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let pair = |r: &Registers<V>, high, low| -> Result<u128, Unsupported> {
        Ok(u128::from(register(r, high)?) << 64 | u128::from(register(r, low)?))
    };
    let expected = pair(r, Register::RDX, Register::RAX)?;
    let new = pair(r, Register::RCX, Register::RBX)?;
    let address = address(r, i, 0)?;
    let old = bus.modify_16(address, |a| if a == expected { new } else { a })?;
    if old == expected {
        r.flags |= ZF;
        return Ok(());
    }
    r.flags &= !ZF;
    set_register(r, Register::RAX, alu::low(old))?;
    Ok(set_register(r, Register::RDX, alu::low(old >> 64))?)
}

/// BT, and with `change` BTS, BTR, BTC. An offset in a register may select any bit around a memory
/// operand, an immediate one selects within it.
fn bit_test<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    change: Option<fn(u64, u64) -> u64>,
) -> Result<(), Stop<B::Error>> {
    let w = width(i, 0);
    let offset = read(r, i, 1, bus)?;
    let bit = 1 << (offset % (8 * w as u64));
    let old = if is_memory(i.op0_kind()) {
        let mut address = address(r, i, 0)?;
        if i.op1_kind() == OpKind::Register {
            if [i.memory_base().size(), i.memory_index().size()].contains(&4)
                || i.memory_displ_size() == 4
            {
                return Err(Stop::Unsupported("a bit string at a 32-bit address"));
            }
            let cells = sign_extend(offset, w).cast_signed() >> (8 * w).ilog2();
            address = address.wrapping_add_signed(cells.wrapping_mul(w as i64));
        }
        match change {
            None => bus.read(address, w)?,
            Some(change) => bus.modify(address, w, i.has_lock_prefix(), |a| change(a, bit))?,
        }
    } else {
        match change {
            None => read(r, i, 0, bus)?,
            Some(change) => modify(r, i, 0, false, bus, |a| change(a, bit))?,
        }
    };
    r.flags = r.flags & !CF | if old & bit != 0 { CF } else { 0 };
    Ok(())
}

fn jump<B: Bus, V>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    r.rip = match i.op0_kind() {
        OpKind::NearBranch64 => i.near_branch_target(),
        OpKind::Register => register(r, i.op0_register())?,
        OpKind::Memory if i.memory_size().size() == 8 => read(r, i, 0, bus)?,
        _ => return Err(Stop::Unsupported("far branch")),
    };
    Ok(())
}

fn push<B: Bus, V>(r: &mut Registers<V>, value: u64, bus: &mut B) -> Result<(), Stop<B::Error>> {
    let rsp = register(r, Register::RSP)?.wrapping_sub(8);
    bus.write(rsp, 8, value)?;
    Ok(set_register(r, Register::RSP, rsp)?)
}

fn pop<B: Bus, V>(r: &mut Registers<V>, bus: &mut B) -> Result<u64, Stop<B::Error>> {
    let rsp = register(r, Register::RSP)?;
    let value = bus.read(rsp, 8)?;
    set_register(r, Register::RSP, rsp.wrapping_add(8))?;
    Ok(value)
}

fn port<B: Bus, V>(
    r: &Registers<V>,
    i: &Instruction,
    operand: u32,
    bus: &mut B,
) -> Result<u16, Stop<B::Error>> {
    // An immediate port is one byte; iced does not sign-extend it.
    let port = truncate(read(r, i, operand, bus)?, 2);
    u16::try_from(port).map_err(|_| Stop::Unsupported("port number"))
}

/// INC and DEC leave CF as it was.
fn keep_carry(before: u64, (result, flags): (u64, u64)) -> (u64, u64) {
    (result, flags & !CF | before & CF)
}

fn flag<E, V>(r: &mut Registers<V>, flag: u64, set: bool) -> Result<(), Stop<E>> {
    r.flags = if set { r.flags | flag } else { r.flags & !flag };
    Ok(())
}

pub(super) fn set_status<V>(r: &mut Registers<V>, flags: u64) {
    debug_assert_eq!(flags & !STATUS, 0, "only status flags");
    r.flags = r.flags & !STATUS | flags;
}
