//! The registers that an instruction reads and changes.

use std::sync::Arc;

use iced_x86::Register;

use super::alu::{ALWAYS, truncate};

/// What an instruction reads and changes of a virtual CPU.
///
/// A caller that has a real one fills in every field. Segment bases other than those of FS and GS are
/// zero in 64-bit mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registers<V = Option<Arc<Vectors>>> {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of their numbers in instructions.
    pub general: [u64; 16],
    /// Linear address of the next instruction.
    pub rip: u64,
    /// RFLAGS. Bits that no instruction here changes come out as they went in.
    pub flags: u64,
    /// Linear address that segment FS starts at.
    pub fs_base: u64,
    /// Linear address that segment GS starts at.
    pub gs_base: u64,
    /// Vector registers.
    pub vectors: V,
}

/// Vector registers, where they are kept.
pub trait VectorFile {
    /// What is known of vector register `number`, from its least significant byte on: 16 bytes (XMM), 32
    /// (YMM) or 64 (ZMM), the same for all registers. `None` for a register that is not known: an
    /// instruction that needs it is unsupported.
    fn get(&self, number: usize) -> Option<&[u8]>;

    /// Like [`get`](Self::get), to change it.
    fn get_mut(&mut self, number: usize) -> Option<&mut [u8]>;

    /// Mask register `number` of AVX-512. `None` where it is not known, which makes every instruction with
    /// a mask unsupported.
    fn mask(&self, number: usize) -> Option<u64> {
        let _ = number;
        None
    }
}

/// XMM0 to XMM15, or YMM0 to YMM15 where the processor has them: byte 0 is the least significant, an
/// XMM register is the first 16 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vectors(pub [[u8; 32]; 16]);

/// Shared, because most instructions leave them alone.
impl VectorFile for Arc<Vectors> {
    fn get(&self, number: usize) -> Option<&[u8]> {
        self.0.get(number).map(<[u8; 32]>::as_slice)
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut [u8]> {
        Arc::make_mut(self).0.get_mut(number).map(<[u8; 32]>::as_mut_slice)
    }
}

/// `None` where the caller does not know them.
impl<V: VectorFile> VectorFile for Option<V> {
    fn get(&self, number: usize) -> Option<&[u8]> {
        self.as_ref()?.get(number)
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut [u8]> {
        self.as_mut()?.get_mut(number)
    }

    fn mask(&self, number: usize) -> Option<u64> {
        self.as_ref()?.mask(number)
    }
}

impl Registers {
    /// All zero, vector registers too.
    pub fn new(rip: u64) -> Registers {
        Registers {
            general: [0; 16],
            rip,
            flags: ALWAYS,
            fs_base: 0,
            gs_base: 0,
            vectors: Some(Arc::default()),
        }
    }
}

impl<V> Registers<V> {
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
}

impl<V: VectorFile> Registers<V> {
    /// All that is known of the register that an XMM, YMM or ZMM register is part of: at least all of
    /// itself. `None` for any other register, and where it is not known.
    pub(super) fn vector(&self, register: Register) -> Option<&[u8]> {
        self.vectors.get(vector_index(register)?).filter(|known| known.len() >= register.size())
    }

    /// Like [`vector`](Self::vector), to change it.
    pub(super) fn vector_mut(&mut self, register: Register) -> Option<&mut [u8]> {
        let known = self.vectors.get_mut(vector_index(register)?);
        known.filter(|known| known.len() >= register.size())
    }
}

fn index(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

fn vector_index(register: Register) -> Option<usize> {
    register.is_vector_register().then(|| register.number())
}

fn shift(register: Register) -> u32 {
    match register {
        Register::AH | Register::BH | Register::CH | Register::DH => 8,
        _ => 0,
    }
}
