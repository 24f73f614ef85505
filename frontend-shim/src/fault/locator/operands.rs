//! The memory operands of an instruction, explicit and implied, as linear addresses.

use iced_x86::{
    Code, CodeSize, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize,
    Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};

use super::lanes;
use super::state::VcpuState;
use super::{PAGE_SIZE, StoppedVcpu};
use crate::fault::Unlocated;

/// A range of linear addresses that an instruction accesses at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinearAccess {
    pub(super) address: u64,
    pub(super) size: u64,
    /// Also for the write half of a read-modify-write.
    pub(super) write: bool,
}

impl LinearAccess {
    /// The parts within one page each.
    pub(super) fn pieces(self, state: &VcpuState) -> impl Iterator<Item = LinearAccess> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let address = state.wrap(self.address.wrapping_add(at));
            let size = (self.size - at).min(PAGE_SIZE - address % PAGE_SIZE);
            at += size;
            (size > 0).then_some(LinearAccess { address, size, ..self })
        })
    }
}

/// All data accesses of `instruction`, reads before writes.
pub(super) fn linear_accesses(
    vcpu: &dyn StoppedVcpu,
    instruction: &Instruction,
) -> Result<Vec<LinearAccess>, Unlocated> {
    let state = vcpu.state();
    // The decoder assumes that the stack is as wide as the code.
    let mut instruction = *instruction;
    instruction.set_code_size(state.stack_width());
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(&instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    let mut accesses = Vec::new();
    for memory in info.used_memory().iter().chain(&at_rax(&instruction)) {
        let operand = Operand { vcpu, instruction: &instruction, memory };
        operand.accesses(&mut accesses)?;
    }
    // Stable: what is read goes to where it is written.
    accesses.sort_by_key(|access| access.write);
    Ok(accesses)
}

/// The operand of CLZERO, MONITOR and MONITORX, which the decoder does not list.
fn at_rax(instruction: &Instruction) -> Option<UsedMemory> {
    let (base, size, access) = match instruction.code() {
        Code::Clzerow => (Register::AX, MemorySize::UInt512, OpAccess::Write),
        Code::Clzerod => (Register::EAX, MemorySize::UInt512, OpAccess::Write),
        Code::Clzeroq => (Register::RAX, MemorySize::UInt512, OpAccess::Write),
        Code::Monitorw | Code::Monitorxw => (Register::AX, MemorySize::UInt8, OpAccess::Read),
        Code::Monitord | Code::Monitorxd => (Register::EAX, MemorySize::UInt8, OpAccess::Read),
        Code::Monitorq | Code::Monitorxq => (Register::RAX, MemorySize::UInt8, OpAccess::Read),
        _ => return None,
    };
    let segment = match instruction.segment_prefix() {
        Register::None => Register::DS,
        prefix => prefix,
    };
    Some(UsedMemory::new(segment, base, Register::None, 1, 0, size, access))
}

/// One memory operand.
pub(super) struct Operand<'a> {
    pub(super) vcpu: &'a dyn StoppedVcpu,
    pub(super) instruction: &'a Instruction,
    pub(super) memory: &'a UsedMemory,
}

impl Operand<'_> {
    fn accesses(&self, accesses: &mut Vec<LinearAccess>) -> Result<(), Unlocated> {
        if self.memory.vsib_size() != 0 {
            return lanes::gather(self, accesses);
        }
        if self.repeats_never()? {
            return Ok(());
        }
        let size = self.size()?;
        let address = match self.instruction.mnemonic() {
            Mnemonic::Clzero => self.address(0)? & !(size - 1),
            Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts => {
                self.address(self.bit_offset(size)?)?
            }
            _ => self.address(0)?,
        };
        match lanes::masked(self) {
            Some(runs) => accesses.extend(runs.into_iter().map(|(from, size)| LinearAccess {
                address: address.wrapping_add(from),
                size,
                write: self.writes(),
            })),
            None => accesses.push(LinearAccess { address, size, write: self.writes() }),
        }
        Ok(())
    }

    /// Linear address of what is `extra` bytes behind the operand's address. The offset within the
    /// segment wraps at the width of addresses.
    pub(super) fn address(&self, extra: u64) -> Result<u64, Unlocated> {
        let memory = self.memory;
        let index = if memory.vsib_size() == 0 { memory.index() } else { Register::None };
        let index = self.value(index)?.wrapping_mul(memory.scale().into());
        let offset = memory
            .displacement()
            .wrapping_add(self.value(memory.base())?)
            .wrapping_add(index)
            .wrapping_add(extra);
        let offset = match memory.address_size() {
            CodeSize::Code16 => offset & u64::from(u16::MAX),
            CodeSize::Code32 => offset & u64::from(u32::MAX),
            _ => offset,
        };
        Ok(self.vcpu.state().linear(memory.segment(), offset))
    }

    pub(super) fn writes(&self) -> bool {
        match self.memory.access() {
            OpAccess::Write
            | OpAccess::CondWrite
            | OpAccess::ReadWrite
            | OpAccess::ReadCondWrite => true,
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess => false,
        }
    }

    pub(super) fn unknown(&self) -> Unlocated {
        Unlocated::UnknownInstruction(self.vcpu.state().rip)
    }

    /// Value of a register in an address; zero for none.
    fn value(&self, register: Register) -> Result<u64, Unlocated> {
        if register == Register::None {
            return Ok(0);
        }
        self.vcpu.state().get(register).ok_or_else(|| self.unknown())
    }

    /// A string instruction with a REP prefix accesses nothing when its count is zero.
    fn repeats_never(&self) -> Result<bool, Unlocated> {
        if !self.repeats() {
            return Ok(false);
        }
        let count = match self.memory.address_size() {
            CodeSize::Code16 => Register::CX,
            CodeSize::Code32 => Register::ECX,
            _ => Register::RCX,
        };
        Ok(self.value(count)? == 0)
    }

    fn repeats(&self) -> bool {
        let prefixed = self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix();
        prefixed && self.instruction.is_string_instruction()
    }

    fn size(&self) -> Result<u64, Unlocated> {
        let size = match self.memory.memory_size() {
            MemorySize::Xsave | MemorySize::Xsave64 => return self.xsave_size(),
            // What is accessed in all iterations together is not known, but an element is.
            MemorySize::Unknown if self.repeats() => self.instruction.memory_size().size(),
            size => size.size(),
        };
        if size == 0 { Err(self.unknown()) } else { Ok(size as u64) }
    }

    /// What XSAVE and its relatives may access: up to the end of the last component that EDX:EAX asks
    /// for, where Intel processors have it in the standard form (Intel SDM volume 1, 13.4 to 13.5).
    fn xsave_size(&self) -> Result<u64, Unlocated> {
        const LEGACY_AND_HEADER: u64 = 512 + 64;
        const ENDS: [(u32, u64); 8] = [
            (2, 832),    // AVX
            (3, 1024),   // BNDREGS
            (4, 1088),   // BNDCSR
            (5, 1152),   // opmask
            (6, 1664),   // upper halves of ZMM0 to ZMM15
            (7, 2688),   // ZMM16 to ZMM31
            (9, 2696),   // PKRU
            (18, 11008), // TILECFG and TILEDATA
        ];
        let wanted = self.value(Register::EDX)? << 32 | self.value(Register::EAX)?;
        let ends = ENDS.into_iter().filter(|(component, _)| wanted >> component & 1 == 1);
        Ok(ends.map(|(_, end)| end).fold(LEGACY_AND_HEADER, u64::max))
    }

    /// BT and its relatives with a register access the element of `size` bytes that has the bit.
    fn bit_offset(&self, size: u64) -> Result<u64, Unlocated> {
        if self.instruction.op1_kind() != OpKind::Register {
            return Ok(0);
        }
        let bit = self.value(self.instruction.op1_register())?;
        let unused = u32::try_from(64 - 8 * size).map_err(|_| self.unknown())?;
        let bit = (bit << unused).cast_signed() >> unused;
        let bits = i64::try_from(8 * size).map_err(|_| self.unknown())?;
        Ok(bit.div_euclid(bits).wrapping_mul(bits / 8).cast_unsigned())
    }
}
