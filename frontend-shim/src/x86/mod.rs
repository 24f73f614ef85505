//! x86-64 instructions in software: what guests and drivers access devices with.
//!
//! [`execute()`] is one instruction at once, on what a [`Bus`] calls memory: a process whose own access to a
//! device was refused completes it so, in its signal handler. Where the access has to leave for somebody
//! else to complete, there is more around it. The software hypervisor executes whole guests, and a
//! hypervisor that can't complete an access to a device has that one instruction completed here; both do
//! it through `PendingInstruction` or the `Execution` under it: what memory is, a `Memory` says, and
//! an access to what is not RAM stops the instruction until the caller has completed it. Privilege
//! levels, interrupts and exceptions are left out; an instruction that is not known is unsupported, never
//! a guess.

mod alu;
mod execute;
pub(crate) mod long_mode;
mod operand;
mod registers;
mod resume;
mod string;
#[cfg(test)]
mod tests;
mod vector;
mod xsave;

pub use self::execute::execute;
pub use self::registers::{Registers, VectorFile, Vectors};
pub(crate) use self::resume::{Execution, Memory, Outcome, PendingInstruction, Ram};
pub use self::vector::is_vector;
pub use self::xsave::{XsaveComponent, XsaveImage, XsaveLayout};

/// Longest instruction in bytes.
pub const MAX_INSTRUCTION: usize = 15;

/// Memory and ports as an instruction reaches them. Addresses are linear.
///
/// Every access fails with a [`Stop`], which ends the attempt at the instruction.
#[expect(clippy::missing_errors_doc, reason = "they are all the same, and told above")]
pub trait Bus {
    /// Why an access can't be completed now.
    type Error;

    /// Reads `len` (1, 2, 4, 8) bytes of memory.
    fn read(&mut self, address: u64, len: usize) -> Result<u64, Stop<Self::Error>>;

    /// Writes the low `len` (1, 2, 4, 8) bytes of `value` to memory.
    fn write(&mut self, address: u64, len: usize, value: u64) -> Result<(), Stop<Self::Error>>;

    /// Replaces `len` (1, 2, 4, 8) bytes at `address` by what `update` makes of them, and returns what
    /// was there. `locked` says that the processor would lock the bus, with or without a LOCK prefix.
    fn modify(
        &mut self,
        address: u64,
        len: usize,
        locked: bool,
        update: impl FnMut(u64) -> u64,
    ) -> Result<u64, Stop<Self::Error>>;

    /// Reads 1, 2, 4, 8, 16, 32 or 64 bytes of memory.
    fn read_bytes(&mut self, address: u64, data: &mut [u8]) -> Result<(), Stop<Self::Error>> {
        for (offset, part) in (0..).step_by(8).zip(data.chunks_mut(8)) {
            let value = self.read(address.wrapping_add(offset), part.len())?;
            part.copy_from_slice(&value.to_le_bytes()[..part.len()]);
        }
        Ok(())
    }

    /// Writes 1, 2, 4, 8, 16, 32 or 64 bytes of memory.
    fn write_bytes(&mut self, address: u64, data: &[u8]) -> Result<(), Stop<Self::Error>> {
        for (offset, part) in (0..).step_by(8).zip(data.chunks(8)) {
            let mut value = [0; 8];
            value[..part.len()].copy_from_slice(part);
            self.write(address.wrapping_add(offset), part.len(), u64::from_le_bytes(value))?;
        }
        Ok(())
    }

    /// Like [`modify`](Self::modify), of 16 bytes.
    fn modify_16(
        &mut self,
        address: u64,
        update: impl FnOnce(u128) -> u128,
    ) -> Result<u128, Stop<Self::Error>> {
        let mut data = [0; 16];
        self.read_bytes(address, &mut data)?;
        let old = u128::from_le_bytes(data);
        self.write_bytes(address, &update(old).to_le_bytes())?;
        Ok(old)
    }

    /// Reads `len` (1, 2, 4) bytes from a port.
    fn port_read(&mut self, port: u16, len: usize) -> Result<u64, Stop<Self::Error>>;

    /// Writes `len` (1, 2, 4) bytes to a port.
    fn port_write(&mut self, port: u16, len: usize, value: u64) -> Result<(), Stop<Self::Error>>;
}

/// Why an attempt at an instruction stopped before its end.
#[derive(Debug)]
pub enum Stop<E> {
    /// The bus stopped it.
    Bus(E),
    /// It was HLT; the registers are those after it.
    Halt,
    /// What is missing here.
    Unsupported(&'static str),
}

/// Something that is not known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsupported(pub &'static str);

impl<E> From<Unsupported> for Stop<E> {
    fn from(Unsupported(what): Unsupported) -> Self {
        Stop::Unsupported(what)
    }
}
