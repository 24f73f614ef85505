//! Operands of which only some elements are accessed, or each at an address of its own.

use iced_x86::{Instruction, Mnemonic, OpAccess, Register};

use super::StoppedVcpu;
use super::operands::{LinearAccess, Operand};
use crate::fault::Unlocated;

/// Gathers and scatters: one access for each lane whose mask bit is set, or for every lane if the masks
/// can't be read.
pub(super) fn gather(
    operand: &Operand<'_>,
    accesses: &mut Vec<LinearAccess>,
) -> Result<(), Unlocated> {
    let Operand { vcpu, instruction, memory } = *operand;
    if memory.access() == OpAccess::NoMemAccess {
        return Ok(());
    }
    let no_vectors = Unlocated::VectorRegisters(vcpu.state().rip);
    let size = memory.memory_size().element_size();
    let index_size = usize::try_from(memory.vsib_size()).expect("4 or 8");
    let data = data_register(instruction).ok_or_else(|| operand.unknown())?;
    let lanes = (data.size() / size).min(memory.index().size() / index_size);
    let indices = vcpu.vector(memory.index().number()).ok_or(no_vectors)?;
    let mask = lane_mask(vcpu, instruction, size).unwrap_or(u64::MAX);
    for lane in (0..lanes).filter(|lane| mask >> lane & 1 == 1) {
        let index = sign_extended(&indices[lane * index_size..][..index_size]);
        let extra = index.wrapping_mul(memory.scale().into()).cast_unsigned();
        let address = operand.address(extra)?;
        accesses.push(LinearAccess { address, size: size as u64, write: operand.writes() });
    }
    Ok(())
}

/// Offset and size of what an instruction with a mask accesses, neighbours together; `None` if it has no
/// mask that keeps memory from being accessed, or the mask can't be read.
pub(super) fn masked(operand: &Operand<'_>) -> Option<Vec<(u64, u64)>> {
    let Operand { vcpu, instruction, memory } = *operand;
    let kind = Masking::of(instruction)?;
    let (size, count) = match (kind, memory.memory_size()) {
        (Masking::Bytes, whole) => (1, whole.size()),
        (_, whole) => (whole.element_size(), whole.element_count()),
    };
    let mask = lane_mask(vcpu, instruction, size)?;
    let selected = (0..count).filter(|lane| mask >> lane & 1 == 1);
    let size = size as u64;
    if kind == Masking::Packed {
        let total = selected.count() as u64 * size;
        return Some(if total == 0 { Vec::new() } else { vec![(0, total)] });
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for from in selected.map(|lane| lane as u64 * size) {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == from => *len += size,
            _ => runs.push((from, size)),
        }
    }
    Some(runs)
}

/// How masked elements lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Masking {
    /// Each in its place, with gaps.
    InPlace,
    /// The same, and the elements are bytes whatever the decoder calls them.
    Bytes,
    /// Those that are selected, side by side.
    Packed,
}

impl Masking {
    /// Moves alone: what arithmetic reads of a masked operand differs between processors.
    fn of(instruction: &Instruction) -> Option<Masking> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => Some(Self::InPlace),
            M::Maskmovdqu | M::Vmaskmovdqu => Some(Self::Bytes),
            _ if !instruction.has_op_mask() => None,
            M::Vcompresspd | M::Vcompressps | M::Vexpandpd | M::Vexpandps => Some(Self::Packed),
            M::Vpcompressb | M::Vpcompressw | M::Vpcompressd | M::Vpcompressq => Some(Self::Packed),
            M::Vpexpandb | M::Vpexpandw | M::Vpexpandd | M::Vpexpandq => Some(Self::Packed),
            M::Vmovdqu8 | M::Vmovdqu16 | M::Vmovdqu32 | M::Vmovdqu64 => Some(Self::InPlace),
            M::Vmovdqa32 | M::Vmovdqa64 | M::Vmovaps | M::Vmovapd => Some(Self::InPlace),
            M::Vmovups | M::Vmovupd | M::Vmovss | M::Vmovsd | M::Vmovsh => Some(Self::InPlace),
            M::Vpmovqb | M::Vpmovsqb | M::Vpmovusqb => Some(Self::InPlace),
            M::Vpmovqw | M::Vpmovsqw | M::Vpmovusqw => Some(Self::InPlace),
            M::Vpmovqd | M::Vpmovsqd | M::Vpmovusqd => Some(Self::InPlace),
            M::Vpmovdb | M::Vpmovsdb | M::Vpmovusdb => Some(Self::InPlace),
            M::Vpmovdw | M::Vpmovsdw | M::Vpmovusdw => Some(Self::InPlace),
            M::Vpmovwb | M::Vpmovswb | M::Vpmovuswb => Some(Self::InPlace),
            _ => None,
        }
    }
}

/// Which lanes are selected; `None` if that can't be read.
fn lane_mask(vcpu: &dyn StoppedVcpu, instruction: &Instruction, size: usize) -> Option<u64> {
    if instruction.has_op_mask() {
        return vcpu.mask(instruction.op_mask().number());
    }
    // The sign bits of a vector register: operand 2 of gathers and of MASKMOVDQU, operand 1 of VMASKMOV.
    let register = match instruction.mnemonic() {
        Mnemonic::Vmaskmovps
        | Mnemonic::Vmaskmovpd
        | Mnemonic::Vpmaskmovd
        | Mnemonic::Vpmaskmovq => instruction.op1_register(),
        _ => instruction.op2_register(),
    };
    let signs = vcpu.vector(register.number())?;
    let lanes = signs.chunks_exact(size).enumerate();
    Some(lanes.fold(0, |mask, (lane, bytes)| mask | u64::from(bytes[size - 1] >> 7) << lane))
}

/// The register that a gather fills or a scatter empties.
fn data_register(instruction: &Instruction) -> Option<Register> {
    [instruction.op0_register(), instruction.op1_register()]
        .into_iter()
        .find(|register| register.is_vector_register())
}

fn sign_extended(bytes: &[u8]) -> i64 {
    let mut value = [if bytes.last().is_some_and(|high| high >> 7 == 1) { 0xff } else { 0 }; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(value)
}
