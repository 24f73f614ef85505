//! x86-64 instructions in software: the integer code that guests and drivers access devices with.
//!
//! It has two users. The software hypervisor executes whole guests with it, and a hypervisor that
//! can't complete an access to a device has that one instruction completed here. What memory is, a
//! [`Bus`] says. Privilege levels, interrupts and exceptions are left out; an instruction that is not
//! known is [`Stop::Unsupported`], never a guess.

mod alu;
mod execute;
mod operand;

pub(crate) use self::execute::execute;
pub(crate) use self::operand::Registers;

/// Memory and ports as an instruction reaches them. Addresses are linear: a bus that pages translates
/// them.
pub(crate) trait Bus {
    /// Why an access can't be completed now.
    type Error;

    /// Reads `len` (1, 2, 4, 8) bytes of memory.
    fn read(&mut self, address: u64, len: usize) -> Result<u64, Stop<Self::Error>>;

    /// Writes the low `len` (1, 2, 4, 8) bytes of `value` to memory.
    fn write(&mut self, address: u64, len: usize, value: u64) -> Result<(), Stop<Self::Error>>;

    /// Replaces `len` bytes at `address` by what `update` makes of them, and returns what was there.
    /// `locked` says that the processor would lock the bus, with or without a LOCK prefix.
    fn modify(
        &mut self,
        address: u64,
        len: usize,
        locked: bool,
        update: impl FnMut(u64) -> u64,
    ) -> Result<u64, Stop<Self::Error>>;

    /// Reads `len` (1, 2, 4) bytes from a port.
    fn port_read(&mut self, port: u16, len: usize) -> Result<u64, Stop<Self::Error>>;

    /// Writes `len` (1, 2, 4) bytes to a port.
    fn port_write(&mut self, port: u16, len: usize, value: u64) -> Result<(), Stop<Self::Error>>;
}

/// Why an attempt at an instruction stopped before its end.
#[derive(Debug)]
pub(crate) enum Stop<E> {
    /// The bus stopped it.
    Bus(E),
    /// It was HLT; the registers are those after it.
    Halt,
    /// What is missing here.
    Unsupported(&'static str),
}

/// Something that is not known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unsupported(pub(crate) &'static str);

impl<E> From<Unsupported> for Stop<E> {
    fn from(Unsupported(what): Unsupported) -> Self {
        Stop::Unsupported(what)
    }
}
