//! Message signalled interrupts (PCI 6.8.1).

use crate::pci::config_space::{ConfigSpace, Register};
use crate::pci::spec::msi as registers;

/// The MSI capability of a function. The message address always has 64 bits, which PCI Express
/// asks of an endpoint (PCIe 7.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiSpec {
    /// How many vectors the function asks for.
    pub vectors: MsiVectors,
    /// Software can mask each vector.
    pub per_vector_masking: bool,
}

impl MsiSpec {
    pub(super) const fn length(&self) -> u8 {
        if self.per_vector_masking { registers::LENGTH_MASKING } else { registers::LENGTH }
    }
}

/// A number of vectors, as Message Control encodes it: log2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum MsiVectors {
    /// 1 vector.
    One = 0,
    /// 2 vectors.
    Two = 1,
    /// 4 vectors.
    Four = 2,
    /// 8 vectors.
    Eight = 3,
    /// 16 vectors.
    Sixteen = 4,
    /// 32 vectors.
    ThirtyTwo = 5,
}

impl MsiVectors {
    /// The number.
    pub const fn count(self) -> u8 {
        1 << self as u8
    }

    /// All vectors below the number.
    const fn set(self) -> u32 {
        u32::MAX >> (32 - self.count())
    }

    /// The number that Multiple Message Enable encodes; 6 and 7 are reserved.
    const fn granted(multiple_message_enable: u16) -> Option<Self> {
        Some(match multiple_message_enable {
            0 => Self::One,
            1 => Self::Two,
            2 => Self::Four,
            3 => Self::Eight,
            4 => Self::Sixteen,
            5 => Self::ThirtyTwo,
            _ => return None,
        })
    }
}

/// What became of an interrupt that the function raised.
#[must_use = "a message to deliver does not deliver itself"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsiOutcome {
    /// The message goes out now.
    Deliver,
    /// The vector is masked. [`MsiEffects::deliver`](crate::pci::MsiEffects::deliver) names it
    /// once it no longer is.
    Pending,
    /// The function must not send it: MSI or bus mastering is off, or the vector was not granted.
    Dropped,
}

/// The capability at its place in configuration space.
#[derive(Clone, Copy, Debug)]
pub(in crate::pci) struct MsiCapability {
    at: u8,
    spec: MsiSpec,
}

impl MsiCapability {
    pub(super) const fn new(at: u8, spec: MsiSpec) -> Self {
        Self { at, spec }
    }

    pub(super) const fn at(&self) -> u8 {
        self.at
    }

    pub(super) fn registers(&self) -> Vec<Register> {
        let at = usize::from(self.at);
        let MsiSpec { vectors, per_vector_masking } = self.spec;
        let mut capable = registers::CONTROL_64_BIT
            | (vectors as u16) << registers::CONTROL_MULTIPLE_CAPABLE_SHIFT;
        if per_vector_masking {
            capable |= registers::CONTROL_PER_VECTOR_MASKING;
        }

        let mut list = vec![
            Register::word("Message Control", at + registers::MESSAGE_CONTROL)
                .reset(capable)
                .read_write(registers::CONTROL_ENABLE | registers::CONTROL_MULTIPLE_ENABLE),
            Register::dword("Message Address", at + registers::MESSAGE_ADDRESS)
                .read_write(registers::ADDRESS_MASK),
            Register::dword("Message Upper Address", at + registers::MESSAGE_UPPER_ADDRESS)
                .read_write(u32::MAX),
            Register::word("Message Data", at + registers::MESSAGE_DATA).read_write(u16::MAX),
        ];
        if per_vector_masking {
            // Bits of vectors the function does not have are reserved (PCI 6.8.1.7).
            list.push(Register::dword("Mask Bits", self.mask()).read_write(vectors.set()));
            list.push(Register::dword("Pending Bits", self.pending()).volatile(vectors.set()));
        }
        list
    }

    pub(in crate::pci) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16_at(self.control()) & registers::CONTROL_ENABLE != 0
    }

    /// The vectors software granted: never more than the function asked for, whatever was written.
    pub(in crate::pci) fn granted(&self, space: &ConfigSpace) -> MsiVectors {
        let multiple_message_enable = (space.u16_at(self.control())
            & registers::CONTROL_MULTIPLE_ENABLE)
            >> registers::CONTROL_MULTIPLE_ENABLE_SHIFT;
        MsiVectors::granted(multiple_message_enable)
            .map_or(self.spec.vectors, |granted| granted.min(self.spec.vectors))
    }

    /// An interrupt of a function that may or may not send messages.
    pub(in crate::pci) fn raise(
        &self,
        space: &mut ConfigSpace,
        vector: u8,
        can_send: bool,
    ) -> MsiOutcome {
        if !can_send || vector >= self.granted(space).count() {
            return MsiOutcome::Dropped;
        }
        let bit = 1 << vector;
        if self.spec.per_vector_masking && space.u32_at(self.mask()) & bit != 0 {
            space.set_u32(self.pending(), space.u32_at(self.pending()) | bit);
            return MsiOutcome::Pending;
        }
        MsiOutcome::Deliver
    }

    /// Completes a write to configuration space, which may have unmasked vectors: takes those that
    /// the function may send now out of the pending bits.
    pub(in crate::pci) fn take_deliverable(
        &self,
        space: &mut ConfigSpace,
        can_send: bool,
    ) -> MsiVectorSet {
        if !self.spec.per_vector_masking {
            return MsiVectorSet::EMPTY;
        }
        // A vector that was granted no longer has no message to be pending for.
        let pending = space.u32_at(self.pending()) & self.granted(space).set();
        let deliver = if can_send { pending & !space.u32_at(self.mask()) } else { 0 };
        space.set_u32(self.pending(), pending & !deliver);
        MsiVectorSet(deliver)
    }

    /// Whether the pending bits can be as they are: only of vectors that were granted, and not of
    /// one that would have been sent.
    pub(in crate::pci) fn is_possible(&self, space: &ConfigSpace, can_send: bool) -> bool {
        if !self.spec.per_vector_masking {
            return true;
        }
        let pending = space.u32_at(self.pending());
        let overdue = if can_send { pending & !space.u32_at(self.mask()) } else { 0 };
        pending & !self.granted(space).set() == 0 && overdue == 0
    }

    fn control(&self) -> usize {
        usize::from(self.at) + registers::MESSAGE_CONTROL
    }

    /// There only with per-vector masking, as are the pending bits.
    fn mask(&self) -> usize {
        usize::from(self.at) + registers::MASK
    }

    pub(in crate::pci) fn pending(&self) -> usize {
        usize::from(self.at) + registers::PENDING
    }
}

/// A set of MSI vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiVectorSet(u32);

impl MsiVectorSet {
    /// The set of none.
    pub const EMPTY: Self = Self(0);

    /// Whether the vector is in the set.
    pub const fn contains(self, vector: u8) -> bool {
        vector < 32 && self.0 & 1 << vector != 0
    }

    /// Whether no vector is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The vectors of both sets.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The vectors in the set, lowest first.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..32).filter(move |&vector| self.contains(vector))
    }
}
