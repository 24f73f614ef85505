//! Vector instructions that move data, and the few that make a constant (AMD64 APM volume 4).
//!
//! A result in a vector register keeps the bytes of the YMM register above the XMM register in the
//! legacy encoding, and clears them with VEX. Alignment that the processor insists on is insisted on
//! here: such an access is unsupported, because it raises an exception there.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::operand::{address, is_memory, register, set_register, width};
use super::{Bus, Registers, Stop, Unsupported, VectorFile};

const UNKNOWN: Unsupported = Unsupported("instruction outside the known subset");
const NO_VECTOR: Unsupported = Unsupported("vector register that is not known");

/// Bytes of an operand, the least significant first; the rest is zero.
type Value = [u8; 64];

/// Whether an instruction has to do with vector registers.
pub fn is_vector(i: &Instruction) -> bool {
    i.encoding() != EncodingKind::Legacy
        || (0..i.op_count()).any(|operand| {
            i.op_kind(operand) == OpKind::Register && i.op_register(operand).is_vector_register()
        })
}

/// Executes one; see [`execute`](super::execute::execute).
pub(super) fn execute<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    match i.encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {}
        EncodingKind::EVEX if has_mask(i) => return masked(r, i, bus),
        EncodingKind::EVEX if is_plain(r, i) => {}
        _ => return Err(UNKNOWN.into()),
    }
    match i.mnemonic() {
        Mnemonic::Movups
        | Mnemonic::Movupd
        | Mnemonic::Movdqu
        | Mnemonic::Lddqu
        | Mnemonic::Vmovups
        | Mnemonic::Vmovupd
        | Mnemonic::Vmovdqu
        | Mnemonic::Vmovdqu8
        | Mnemonic::Vmovdqu16
        | Mnemonic::Vmovdqu32
        | Mnemonic::Vmovdqu64
        | Mnemonic::Vlddqu
        | Mnemonic::Movd
        | Mnemonic::Movq
        | Mnemonic::Vmovd
        | Mnemonic::Vmovq => {
            let value = read(r, i, 1, false, bus)?;
            write(r, i, value, false, bus)
        }
        Mnemonic::Movaps
        | Mnemonic::Movapd
        | Mnemonic::Movdqa
        | Mnemonic::Movntps
        | Mnemonic::Movntpd
        | Mnemonic::Movntdq
        | Mnemonic::Movntdqa
        | Mnemonic::Vmovaps
        | Mnemonic::Vmovapd
        | Mnemonic::Vmovdqa
        | Mnemonic::Vmovdqa32
        | Mnemonic::Vmovdqa64
        | Mnemonic::Vmovntps
        | Mnemonic::Vmovntpd
        | Mnemonic::Vmovntdq
        | Mnemonic::Vmovntdqa => {
            let value = read(r, i, 1, true, bus)?;
            write(r, i, value, true, bus)
        }
        Mnemonic::Movss | Mnemonic::Vmovss => scalar(r, i, 4, bus),
        Mnemonic::Movsd | Mnemonic::Vmovsd => scalar(r, i, 8, bus),
        Mnemonic::Movlps | Mnemonic::Movlpd | Mnemonic::Vmovlps | Mnemonic::Vmovlpd => {
            half(r, i, 0, bus)
        }
        Mnemonic::Movhps | Mnemonic::Movhpd | Mnemonic::Vmovhps | Mnemonic::Vmovhpd => {
            half(r, i, 8, bus)
        }
        Mnemonic::Pxor
        | Mnemonic::Xorps
        | Mnemonic::Xorpd
        | Mnemonic::Vpxor
        | Mnemonic::Vxorps
        | Mnemonic::Vxorpd => binary(r, i, bus, 1, |a, b| {
            if let ([a], [b]) = (a, b) {
                *a ^= b
            }
        }),
        Mnemonic::Pcmpeqb | Mnemonic::Vpcmpeqb => binary(r, i, bus, 1, equal),
        Mnemonic::Pcmpeqw | Mnemonic::Vpcmpeqw => binary(r, i, bus, 2, equal),
        Mnemonic::Pcmpeqd | Mnemonic::Vpcmpeqd => binary(r, i, bus, 4, equal),
        Mnemonic::Vzeroupper => clear(r, 16),
        Mnemonic::Vzeroall => clear(r, 0),
        _ => Err(UNKNOWN.into()),
    }
}

/// Whether an instruction of AVX-512 may be taken for what it would be without: its registers are known
/// to their ends, and memory is as many elements as they have.
fn is_plain<V: VectorFile>(r: &Registers<V>, i: &Instruction) -> bool {
    r.vectors.get(0).is_some_and(|known| known.len() == 64) && !i.is_broadcast()
}

fn has_mask(i: &Instruction) -> bool {
    i.op_mask() != Register::None
}

/// A move to or from memory of those elements that a mask register tells. The others are not accessed,
/// and in a register keep what they had, or become zero.
fn masked<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let (size, aligned) = match i.mnemonic() {
        Mnemonic::Vmovdqu8 => (1, false),
        Mnemonic::Vmovdqu16 => (2, false),
        Mnemonic::Vmovdqu32 | Mnemonic::Vmovups => (4, false),
        Mnemonic::Vmovdqu64 | Mnemonic::Vmovupd => (8, false),
        Mnemonic::Vmovdqa32 | Mnemonic::Vmovaps => (4, true),
        Mnemonic::Vmovdqa64 | Mnemonic::Vmovapd => (8, true),
        _ => return Err(UNKNOWN.into()),
    };
    let mask = r.vectors.mask(i.op_mask().number()).ok_or(NO_VECTOR)?;
    let load = i.op0_kind() == OpKind::Register;
    let (memory, register) = if load { (1, i.op0_register()) } else { (0, i.op1_register()) };
    if !is_plain(r, i) || !is_memory(i.op_kind(memory)) {
        return Err(UNKNOWN.into());
    }
    let address = checked_address(r, i, memory, aligned)?;
    let mut value = vector(r, register)?;
    let elements = (0_u64..).step_by(size).zip(value[..register.size()].chunks_exact_mut(size));
    for (number, (offset, element)) in elements.enumerate() {
        let address = address.wrapping_add(offset);
        match (mask >> number & 1 != 0, load) {
            (true, true) => bus.read_bytes(address, element)?,
            (true, false) => bus.write_bytes(address, element)?,
            (false, true) if i.zeroing_masking() => element.fill(0),
            (false, _) => {}
        }
    }
    if load {
        set_vector(r, i, register.size(), &value)?;
    }
    Ok(())
}

/// MOVSS and MOVSD: from memory the rest of the XMM register becomes zero; between registers it stays,
/// or with VEX comes from a third one.
fn scalar<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    len: usize,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    if is_memory(i.op0_kind()) {
        let value = vector(r, i.op1_register())?;
        return bus.write_bytes(address(r, i, 0)?, &value[..len]);
    }
    if is_memory(i.op1_kind()) {
        let mut value = [0; 64];
        bus.read_bytes(address(r, i, 1)?, &mut value[..len])?;
        return Ok(set_vector(r, i, 16, &value)?);
    }
    let mut value = vector(r, i.op_register(i.op_count() - 2))?;
    value[..len].copy_from_slice(&vector(r, i.op_register(i.op_count() - 1))?[..len]);
    Ok(set_vector(r, i, 16, &value)?)
}

/// MOVLPS and MOVHPS: 8 bytes from byte `at` of an XMM register on; a load leaves the other 8, or with
/// VEX takes them from a third register.
fn half<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    at: usize,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    if is_memory(i.op0_kind()) {
        let value = vector(r, i.op1_register())?;
        return bus.write_bytes(address(r, i, 0)?, &value[at..at + 8]);
    }
    let source = i.op_count() - 1;
    let mut value = vector(r, i.op_register(source - 1))?;
    bus.read_bytes(address(r, i, source)?, &mut value[at..at + 8])?;
    Ok(set_vector(r, i, 16, &value)?)
}

/// An operation on elements of `size` bytes; its first operand is the destination, or with VEX a third
/// register.
fn binary<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    bus: &mut B,
    size: usize,
    operation: impl Fn(&mut [u8], &[u8]),
) -> Result<(), Stop<B::Error>> {
    let source = i.op_count() - 1;
    let mut a = vector(r, i.op_register(source - 1))?;
    let b = read(r, i, source, i.encoding() == EncodingKind::Legacy, bus)?;
    for (a, b) in a.chunks_exact_mut(size).zip(b.chunks_exact(size)) {
        operation(a, b);
    }
    Ok(set_vector(r, i, width(i, 0), &a)?)
}

fn equal(a: &mut [u8], b: &[u8]) {
    let ones = if *a == *b { 0xff } else { 0 };
    a.fill(ones);
}

/// Clears all vector registers from byte `from` on.
fn clear<E, V: VectorFile>(r: &mut Registers<V>, from: usize) -> Result<(), Stop<E>> {
    const XMM: [Register; 16] = [
        Register::XMM0,
        Register::XMM1,
        Register::XMM2,
        Register::XMM3,
        Register::XMM4,
        Register::XMM5,
        Register::XMM6,
        Register::XMM7,
        Register::XMM8,
        Register::XMM9,
        Register::XMM10,
        Register::XMM11,
        Register::XMM12,
        Register::XMM13,
        Register::XMM14,
        Register::XMM15,
    ];
    for register in XMM {
        r.vector_mut(register).ok_or(NO_VECTOR)?[from..].fill(0);
    }
    Ok(())
}

fn read<B: Bus, V: VectorFile>(
    r: &Registers<V>,
    i: &Instruction,
    operand: u32,
    aligned: bool,
    bus: &mut B,
) -> Result<Value, Stop<B::Error>> {
    let mut value = [0; 64];
    let len = width(i, operand).min(64);
    if is_memory(i.op_kind(operand)) {
        let address = checked_address(r, i, operand, aligned)?;
        bus.read_bytes(address, &mut value[..len])?;
    } else if i.op_register(operand).is_gpr() {
        value[..8].copy_from_slice(&register(r, i.op_register(operand))?.to_le_bytes());
    } else {
        value[..len].copy_from_slice(&vector(r, i.op_register(operand))?[..len]);
    }
    // MOVQ between registers moves half of what they hold.
    if matches!(i.mnemonic(), Mnemonic::Movq | Mnemonic::Vmovq) {
        value[8..].fill(0);
    }
    Ok(value)
}

/// Writes the first operand of a move.
fn write<B: Bus, V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    value: Value,
    aligned: bool,
    bus: &mut B,
) -> Result<(), Stop<B::Error>> {
    let len = width(i, 0).min(64);
    if is_memory(i.op0_kind()) {
        let address = checked_address(r, i, 0, aligned)?;
        return bus.write_bytes(address, &value[..len]);
    }
    if i.op0_register().is_gpr() {
        let (low, _) = value.split_first_chunk().ok_or(UNKNOWN)?;
        return Ok(set_register(r, i.op0_register(), u64::from_le_bytes(*low))?);
    }
    Ok(set_vector(r, i, len, &value)?)
}

fn checked_address<V: VectorFile>(
    r: &Registers<V>,
    i: &Instruction,
    operand: u32,
    aligned: bool,
) -> Result<u64, Unsupported> {
    let address = address(r, i, operand)?;
    if aligned && !address.is_multiple_of(i.memory_size().size() as u64) {
        return Err(Unsupported("an aligned vector access that is not aligned"));
    }
    Ok(address)
}

fn vector<V: VectorFile>(r: &Registers<V>, register: Register) -> Result<Value, Unsupported> {
    let known = r.vector(register).ok_or(NO_VECTOR)?;
    let mut value = [0; 64];
    value[..known.len()].copy_from_slice(known);
    Ok(value)
}

/// Sets the first `len` bytes of the destination, and with VEX or EVEX clears those above.
fn set_vector<V: VectorFile>(
    r: &mut Registers<V>,
    i: &Instruction,
    len: usize,
    value: &Value,
) -> Result<(), Unsupported> {
    let full = r.vector_mut(i.op0_register()).ok_or(NO_VECTOR)?;
    full[..len].copy_from_slice(&value[..len]);
    if i.encoding() != EncodingKind::Legacy {
        full[len..].fill(0);
    }
    Ok(())
}
