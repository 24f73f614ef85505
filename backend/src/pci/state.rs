//! A function's state, as it outlives the process that ran it.

use serde::{Deserialize, Serialize};

use super::config_space::{Register, RegisterWidth};
use super::function_spec::Decoding;

/// What a function knows, to be restored into another function of the same specification, maybe in
/// another process and by another version of this code.
///
/// A type of its own: the running function can change without what was saved becoming unreadable.
/// Each version is a variant, appended and never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FunctionState {
    /// The first version.
    V1(StateV1),
}

/// [`FunctionState`], first version. Opaque: only a function makes one and takes one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateV1 {
    /// What kind of function it was.
    pub(super) decode: Decoding,
    pub(super) layout: Vec<SavedRegister>,
    pub(super) epoch: u64,
    /// All of configuration space.
    pub(super) config: Vec<u8>,
    /// The MSI-X table, empty without MSI-X.
    pub(super) msix_table: Vec<u8>,
    /// The MSI-X pending bits: vector n is bit n % 64 of word n / 64.
    pub(super) msix_pending: Vec<u64>,
    /// Whether the MSI-X table was ever written since the last reset, even if it reads as at power-on
    /// again: vectors of one that was not have no masks.
    pub(super) msix_programmed: bool,
}

/// A register without its name: two functions with the same list of these are alike to software.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedRegister {
    offset: u16,
    width: u8,
    reset: u32,
    read_write: u32,
    write_one_to_clear: u32,
    volatile: u32,
    reset_retains: u32,
    sticky: u32,
}

impl From<&Register> for SavedRegister {
    fn from(register: &Register) -> Self {
        // Destructured, so that no rule of a register is forgotten here.
        let Register {
            name: _,
            offset,
            width,
            reset,
            read_write,
            write_one_to_clear,
            volatile,
            reset_retains,
            sticky,
        } = *register;
        Self {
            offset: u16::try_from(offset).expect("configuration space has 4096 bytes"),
            width: match width {
                RegisterWidth::Byte => 1,
                RegisterWidth::Word => 2,
                RegisterWidth::Dword => 4,
            },
            reset,
            read_write,
            write_one_to_clear,
            volatile,
            reset_retains,
            sticky,
        }
    }
}

/// Why a state does not fit a function. The function is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// One function claims its BARs always, the other does not.
    #[error("the saved function has another decode policy")]
    OtherDecoding,
    /// The functions differ in ids, BARs or capabilities: one has a register that the other does
    /// not, or one that follows other rules.
    #[error("the saved function has other registers, from {offset:#x} on")]
    OtherRegisters {
        /// Where they differ first.
        offset: u16,
    },
    /// Configuration space is longer or shorter than the function's, or has a value that it can't
    /// come to hold.
    #[error("no function like this has the saved value at {offset:#x} of configuration space")]
    Config {
        /// The offset in bytes.
        offset: usize,
    },
    /// The MSI-X table or the pending bits are longer or shorter than the function's, or have a
    /// value that they can't come to hold.
    #[error("no function like this has the saved MSI-X table and pending bits")]
    Msix,
}

impl StateV1 {
    /// Whether it is the state of a function with these registers.
    pub(super) fn check_layout(&self, registers: &[Register]) -> Result<(), StateError> {
        let ours = registers.iter().map(SavedRegister::from);
        let differ =
            self.layout.iter().copied().zip(ours.clone()).find(|(saved, our)| saved != our);
        let offset = match differ {
            Some((saved, our)) => saved.offset.min(our.offset),
            None if self.layout.len() == registers.len() => return Ok(()),
            // One list is the start of the other.
            None => {
                let common = self.layout.len().min(registers.len());
                let next = self.layout.get(common).copied().or_else(|| ours.clone().nth(common));
                next.map_or(0, |register| register.offset)
            }
        };
        Err(StateError::OtherRegisters { offset })
    }
}
