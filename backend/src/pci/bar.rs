//! Base Address registers (PCI 6.2.5.1).

use std::fmt;

use super::config_space::{ConfigSpace, Register};
use super::function_spec::SpecError;
use super::spec::{bar as encoding, header};

/// A BAR as a guest sees it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// The register, or for a 64-bit BAR the lower of its two.
    pub index: BarIndex,
    /// The address space, and how the BAR is placed in it.
    pub kind: BarKind,
    /// Length in bytes, a power of two.
    pub size: u64,
    /// First address, a multiple of `size`. Meaningful whether or not the function decodes.
    pub address: u64,
}

impl Bar {
    /// Last address. Not one past it: a 64-bit BAR may end where the address space does.
    pub fn last_address(&self) -> u64 {
        self.address | (self.size - 1)
    }

    /// Whether the BAR covers `address` of its own address space.
    pub fn contains(&self, address: u64) -> bool {
        (self.address..=self.last_address()).contains(&address)
    }
}

/// A place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarOffset {
    /// The BAR.
    pub bar: BarIndex,
    /// Bytes from its start.
    pub offset: u64,
}

/// What a function's author says about one BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// The register. A 64-bit BAR also takes the next one.
    pub index: BarIndex,
    /// The address space, and how the BAR can be placed in it.
    pub kind: BarKind,
    /// Length in bytes: a power of two, at least 16 for memory and 4 to 256 for I/O.
    pub size: u64,
}

/// The address space of a BAR, and how it can be placed there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

impl BarSpec {
    /// Checks the BAR by itself and returns the registers it takes.
    pub(super) fn slots(&self) -> Result<BarSet, SpecError> {
        let Self { index, kind, size } = *self;
        let (min, max) = match kind {
            BarKind::Memory32 { .. } => (encoding::MEMORY_SIZE_MIN, encoding::MEMORY32_SIZE_MAX),
            BarKind::Memory64 { .. } => (encoding::MEMORY_SIZE_MIN, encoding::MEMORY64_SIZE_MAX),
            BarKind::Io => (encoding::IO_SIZE_MIN, encoding::IO_SIZE_MAX),
        };
        if !size.is_power_of_two() {
            return Err(SpecError::BarSizeNotPowerOfTwo { index, size });
        }
        if !(min..=max).contains(&size) {
            return Err(SpecError::BarSizeOutOfRange { index, size, min, max });
        }

        let mut slots = BarSet::from(index);
        if let BarKind::Memory64 { .. } = kind {
            slots.insert(index.next().ok_or(SpecError::NoUpperHalf { index })?);
        }
        Ok(slots)
    }

    /// The registers of this BAR. Only address bits at or above the size are writable, which is
    /// all there is to sizing: all ones read back as the size mask, whatever the function decodes.
    pub(super) fn registers(&self, out: &mut Vec<Register>) {
        let (low, high) = halves(!(self.size - 1));
        let low_type = match self.kind {
            BarKind::Memory32 { prefetchable } => prefetchable_bit(prefetchable),
            BarKind::Memory64 { prefetchable } => {
                encoding::MEMORY_64 | prefetchable_bit(prefetchable)
            }
            BarKind::Io => encoding::IO_SPACE,
        };
        out.push(self.index.register().reset(low_type).read_write(low));
        if let (BarKind::Memory64 { .. }, Some(upper)) = (self.kind, self.index.next()) {
            out.push(upper.register().read_write(high));
        }
    }

    /// The BAR with the address that `space` holds for it.
    pub(super) fn placed(&self, space: &ConfigSpace) -> Bar {
        let (low_mask, _) = halves(!(self.size - 1));
        let low = u64::from(space.u32_at(self.index.offset()) & low_mask);
        let address = match (self.kind, self.index.next()) {
            (BarKind::Memory64 { .. }, Some(upper)) => {
                u64::from(space.u32_at(upper.offset())) << 32 | low
            }
            _ => low,
        };
        Bar { index: self.index, kind: self.kind, size: self.size, address }
    }
}

fn prefetchable_bit(prefetchable: bool) -> u32 {
    if prefetchable { encoding::PREFETCHABLE } else { 0 }
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The number of a Base Address register, 0 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

impl BarIndex {
    /// BAR 0.
    pub const BAR0: Self = Self(0);
    /// BAR 1.
    pub const BAR1: Self = Self(1);
    /// BAR 2.
    pub const BAR2: Self = Self(2);
    /// BAR 3.
    pub const BAR3: Self = Self(3);
    /// BAR 4.
    pub const BAR4: Self = Self(4);
    /// BAR 5.
    pub const BAR5: Self = Self(5);

    /// Every index, in order.
    pub const ALL: [Self; encoding::COUNT] =
        [Self::BAR0, Self::BAR1, Self::BAR2, Self::BAR3, Self::BAR4, Self::BAR5];

    /// The BAR with this number, if a type 0 header has it.
    pub const fn new(number: u8) -> Option<Self> {
        if number <= Self::BAR5.0 { Some(Self(number)) } else { None }
    }

    /// The number, 0 to 5.
    pub const fn get(self) -> u8 {
        self.0
    }

    const fn next(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    /// Offset of the register in configuration space.
    fn offset(self) -> usize {
        header::BAR0 + 4 * usize::from(self.0)
    }

    /// The register before it is implemented: reads 0.
    pub(super) fn register(self) -> Register {
        const NAMES: [&str; encoding::COUNT] = [
            "Base Address 0",
            "Base Address 1",
            "Base Address 2",
            "Base Address 3",
            "Base Address 4",
            "Base Address 5",
        ];
        Register::dword(NAMES[usize::from(self)], self.offset())
    }
}

impl From<BarIndex> for usize {
    fn from(index: BarIndex) -> Self {
        Self::from(index.0)
    }
}

impl TryFrom<u8> for BarIndex {
    type Error = u8;

    /// Gives a number back that is no BAR's.
    fn try_from(number: u8) -> Result<Self, u8> {
        Self::new(number).ok_or(number)
    }
}

impl fmt::Display for BarIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BAR{}", self.0)
    }
}

/// A set of BARs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BarSet(u8);

impl BarSet {
    /// The set of none.
    pub const EMPTY: Self = Self(0);

    /// Adds a BAR.
    pub const fn insert(&mut self, index: BarIndex) {
        self.0 |= 1 << index.0;
    }

    /// Whether the BAR is in the set.
    pub const fn contains(self, index: BarIndex) -> bool {
        self.0 & 1 << index.0 != 0
    }

    /// Whether no BAR is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The BARs in the set, in order.
    pub fn iter(self) -> impl Iterator<Item = BarIndex> {
        BarIndex::ALL.into_iter().filter(move |&index| self.contains(index))
    }
}

impl From<BarIndex> for BarSet {
    fn from(index: BarIndex) -> Self {
        Self(1 << index.0)
    }
}

impl FromIterator<BarIndex> for BarSet {
    fn from_iter<I: IntoIterator<Item = BarIndex>>(indices: I) -> Self {
        let mut set = Self::EMPTY;
        for index in indices {
            set.insert(index);
        }
        set
    }
}
