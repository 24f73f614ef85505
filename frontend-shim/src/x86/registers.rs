//! The registers that an instruction reads and changes.

use std::sync::Arc;

use iced_x86::Register;

use super::alu::{ALWAYS, truncate};

/// What an instruction reads and changes of a virtual CPU.
///
/// A caller that has a real one fills in every field. Segment bases other than those of FS and GS are
/// zero in 64-bit mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of their numbers in instructions.
    pub(crate) general: [u64; 16],
    pub(crate) rip: u64,
    /// RFLAGS. Bits that no instruction here changes come out as they went in.
    pub(crate) flags: u64,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// Vector registers; `None` where the caller does not know them, which makes every vector
    /// instruction unsupported. Shared, because most instructions leave them alone.
    pub(crate) vectors: Option<Arc<Vectors>>,
}

/// XMM0 to XMM15, or YMM0 to YMM15 where the processor has them: byte 0 is the least significant, an
/// XMM register is the first 16 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Vectors(pub(crate) [[u8; 32]; 16]);

impl Registers {
    /// All zero, vector registers too.
    pub(crate) fn new(rip: u64) -> Registers {
        Registers {
            general: [0; 16],
            rip,
            flags: ALWAYS,
            fs_base: 0,
            gs_base: 0,
            vectors: Some(Arc::default()),
        }
    }

    /// Value of a general-purpose register of any width, zero-extended; `None` for any other register.
    pub(crate) fn get(&self, register: Register) -> Option<u64> {
        let value = *self.general.get(index(register)?)?;
        Some(truncate(value >> shift(register), register.size()))
    }

    /// Sets a general-purpose register as the processor does: 4 bytes clear the upper half, 1 and 2
    /// bytes keep the rest.
    pub(crate) fn set(&mut self, register: Register, value: u64) -> Option<()> {
        let full = self.general.get_mut(index(register)?)?;
        match register.size() {
            8 => *full = value,
            4 => *full = truncate(value, 4),
            width => {
                let mask = truncate(u64::MAX, width) << shift(register);
                *full = *full & !mask | value << shift(register) & mask;
            }
        }
        Some(())
    }

    /// All bytes of the YMM register that an XMM or YMM register is or is part of; `None` for any other
    /// register, and where vector registers are unknown.
    pub(super) fn vector(&self, register: Register) -> Option<&[u8; 32]> {
        self.vectors.as_ref()?.0.get(vector_index(register)?)
    }

    /// Like [`vector`](Self::vector), to change it.
    pub(super) fn vector_mut(&mut self, register: Register) -> Option<&mut [u8; 32]> {
        Arc::make_mut(self.vectors.as_mut()?).0.get_mut(vector_index(register)?)
    }
}

fn index(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

fn vector_index(register: Register) -> Option<usize> {
    (register.is_xmm() || register.is_ymm()).then(|| register.number())
}

fn shift(register: Register) -> u32 {
    match register {
        Register::AH | Register::BH | Register::CH | Register::DH => 8,
        _ => 0,
    }
}
