//! MSI-X (PCI 6.8.2).

use std::ops::Range;

use super::msi::MsiOutcome;
use crate::pci::bar::{BarIndex, BarKind, BarOffset, BarSpec};
use crate::pci::config_space::{ConfigSpace, Register};
use crate::pci::function_spec::SpecError;
use crate::pci::spec::msix as registers;

/// The MSI-X capability of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixSpec {
    /// How many vectors the function has.
    pub vectors: MsixVectors,
    /// Where the table is: in a memory BAR, at a multiple of 8. It has 16 bytes for each vector.
    pub table: BarOffset,
    /// Where the Pending Bit Array is: likewise. It has 8 bytes for each 64 vectors.
    pub pending: BarOffset,
}

/// A number of MSI-X vectors, 1 to 2048.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MsixVectors(u16);

impl MsixVectors {
    /// The number, if a function can have as many.
    pub const fn new(count: u16) -> Option<Self> {
        if 1 <= count && count <= registers::VECTORS_MAX { Some(Self(count)) } else { None }
    }

    /// The number.
    pub const fn count(self) -> u16 {
        self.0
    }

    /// Length of the table in bytes.
    pub const fn table_length(self) -> usize {
        self.0 as usize * registers::ENTRY_LENGTH
    }

    /// Length of the Pending Bit Array in bytes.
    pub const fn pending_length(self) -> usize {
        8 * self.words()
    }

    const fn words(self) -> usize {
        (self.0 as usize).div_ceil(64)
    }
}

impl MsixSpec {
    /// Where the table is in its BAR.
    pub(in crate::pci) fn table_range(&self) -> Range<u64> {
        self.table.offset..self.table.offset.saturating_add(self.vectors.table_length() as u64)
    }

    /// Where the Pending Bit Array is in its BAR.
    pub(in crate::pci) fn pending_range(&self) -> Range<u64> {
        let length = self.vectors.pending_length() as u64;
        self.pending.offset..self.pending.offset.saturating_add(length)
    }

    /// Whether both structures lie in a memory BAR and clear of each other.
    pub(in crate::pci) fn validate(&self, bars: &[BarSpec]) -> Result<(), SpecError> {
        let (table, pending) = (self.table_range(), self.pending_range());
        for (BarOffset { bar, offset }, range) in [(self.table, &table), (self.pending, &pending)] {
            let memory = bars.iter().find(|spec| spec.index == bar && spec.kind != BarKind::Io);
            let size = memory.ok_or(SpecError::MsixNoMemoryBar { bar })?.size;
            if offset % registers::ALIGNMENT != 0 || offset > u32::MAX.into() {
                return Err(SpecError::MsixMisplaced { offset });
            }
            if range.end > size {
                return Err(SpecError::MsixOutsideBar { bar, end: range.end });
            }
        }
        let apart = table.end <= pending.start || pending.end <= table.start;
        if self.table.bar == self.pending.bar && !apart {
            return Err(SpecError::MsixOverlap);
        }
        Ok(())
    }
}

/// The capability at its place in configuration space.
#[derive(Clone, Copy, Debug)]
pub(in crate::pci) struct MsixCapability {
    at: u8,
    spec: MsixSpec,
}

impl MsixCapability {
    pub(super) const fn new(at: u8, spec: MsixSpec) -> Self {
        Self { at, spec }
    }

    pub(super) const fn at(&self) -> u8 {
        self.at
    }

    pub(super) fn registers(&self) -> [Register; 3] {
        let at = usize::from(self.at);
        [
            Register::word("Message Control", self.control())
                .reset(self.spec.vectors.count() - 1)
                .read_write(registers::CONTROL_ENABLE | registers::CONTROL_FUNCTION_MASK),
            Register::dword("Table Offset/BIR", at + registers::TABLE)
                .reset(offset_and_bir(self.spec.table)),
            Register::dword("PBA Offset/BIR", at + registers::PENDING)
                .reset(offset_and_bir(self.spec.pending)),
        ]
    }

    pub(in crate::pci) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16_at(self.control()) & registers::CONTROL_ENABLE != 0
    }

    pub(in crate::pci) fn function_masked(&self, space: &ConfigSpace) -> bool {
        space.u16_at(self.control()) & registers::CONTROL_FUNCTION_MASK != 0
    }

    /// The table and pending bits at power-on.
    pub(in crate::pci) fn structures(&self) -> MsixStructures {
        MsixStructures::new(self.spec.vectors)
    }

    const fn control(&self) -> usize {
        self.at as usize + registers::MESSAGE_CONTROL
    }
}

/// Offsets that don't fit were refused.
fn offset_and_bir(BarOffset { bar, offset }: BarOffset) -> u32 {
    let offset = u32::try_from(offset).expect("validated to be below 4 GiB");
    offset | u32::from(BarIndex::get(bar))
}

/// What an MSI-X function has in memory: its table and its pending bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::pci) struct MsixStructures {
    vectors: MsixVectors,
    table: Vec<u8>,
    /// Vector n is bit n % 64 of word n / 64.
    pending: Vec<u64>,
    /// Whether the table has held anything but its power-on contents since the last reset.
    programmed: bool,
}

impl MsixStructures {
    fn new(vectors: MsixVectors) -> Self {
        let mut structures = Self {
            vectors,
            table: vec![0; vectors.table_length()],
            pending: vec![0; vectors.words()],
            programmed: false,
        };
        structures.reset();
        structures
    }

    /// All vectors masked, none pending.
    pub(in crate::pci) fn reset(&mut self) {
        self.table.fill(0);
        for entry in self.table.chunks_exact_mut(registers::ENTRY_LENGTH) {
            entry[registers::ENTRY_VECTOR_CONTROL] = registers::VECTOR_CONTROL_MASK;
        }
        self.pending.fill(0);
        self.programmed = false;
    }

    pub(in crate::pci) fn read_table(&self, offset: u64, data: &mut [u8]) {
        read(&self.table, offset, data);
    }

    pub(in crate::pci) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let bytes = self.pending.iter().flat_map(|word| word.to_le_bytes());
        // An offset past the end skips all of them.
        let bytes = bytes.skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    /// Each byte by itself, as with byte enables: what `data` leaves out of an entry stays.
    pub(in crate::pci) fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let present = self.table.get_mut(offset..).unwrap_or_default();
        for (at, (byte, &value)) in present.iter_mut().zip(data).enumerate() {
            let writable = match (offset + at) % registers::ENTRY_LENGTH {
                registers::ENTRY_VECTOR_CONTROL => registers::VECTOR_CONTROL_MASK,
                // The rest of Vector Control is reserved.
                13..=15 => 0,
                // A message is an aligned doubleword write (PCI 6.8.2.6).
                0 => !0b11,
                _ => u8::MAX,
            };
            let before = *byte;
            *byte = *byte & !writable | value & writable;
            self.programmed |= *byte != before;
        }
    }

    /// An interrupt of a function that may send it, but for the masks.
    pub(in crate::pci) fn raise(&mut self, vector: u16, function_masked: bool) -> MsiOutcome {
        if vector >= self.vectors.count() {
            return MsiOutcome::Dropped;
        }
        if !function_masked && !self.masked(vector) {
            return MsiOutcome::Deliver;
        }
        self.pending[usize::from(vector / 64)] |= 1 << (vector % 64);
        MsiOutcome::Pending
    }

    /// Takes the vectors that are not masked out of the pending bits.
    pub(in crate::pci) fn take_deliverable(&mut self) -> MsixVectorSet {
        let deliver = self.deliverable();
        for vector in deliver.iter() {
            self.pending[usize::from(vector / 64)] &= !(1 << (vector % 64));
        }
        deliver
    }

    /// The pending vectors that their own mask bits let out.
    fn deliverable(&self) -> MsixVectorSet {
        let mut deliver = MsixVectorSet::EMPTY;
        for (first, word) in (0..).step_by(64).zip(&self.pending) {
            let mut word = *word;
            while word != 0 {
                let vector = first + u16::try_from(word.trailing_zeros()).expect("below 64");
                word &= word - 1;
                if !self.masked(vector) {
                    deliver.insert(vector);
                }
            }
        }
        deliver
    }

    /// No driver uses a vector whose entry it has not programmed. If it uses one while the whole table
    /// is as at power-on, its writes did not come here: clients of VFIO, QEMU among them, keep the
    /// table and its masks to themselves, and only tell which eventfd a vector has.
    fn masked(&self, vector: u16) -> bool {
        if !self.programmed {
            return false;
        }
        let entry = usize::from(vector) * registers::ENTRY_LENGTH;
        self.table[entry + registers::ENTRY_VECTOR_CONTROL] & registers::VECTOR_CONTROL_MASK != 0
    }

    /// Whether the vector is there and its entry does not mask it.
    pub(in crate::pci) fn delivers(&self, vector: u16) -> bool {
        vector < self.vectors.count() && !self.masked(vector)
    }

    pub(in crate::pci) fn table(&self) -> &[u8] {
        &self.table
    }

    pub(in crate::pci) fn pending(&self) -> &[u64] {
        &self.pending
    }

    /// Whether the table has held anything but its power-on contents since the last reset.
    pub(in crate::pci) fn programmed(&self) -> bool {
        self.programmed
    }

    /// The structures with these contents, unless none of this size could come to hold them.
    /// `can_send` tells whether the function sends what is not masked.
    pub(in crate::pci) fn restored(
        &self,
        table: &[u8],
        pending: &[u64],
        programmed: bool,
        can_send: bool,
    ) -> Option<Self> {
        let mut restored = Self::new(self.vectors);
        if table.len() != restored.table.len() || pending.len() != restored.pending.len() {
            return None;
        }
        // Reserved bits keep their values, so the difference shows.
        restored.write_table(0, table);
        // A table that was written may read as if it was not.
        restored.programmed |= programmed;
        restored.pending.copy_from_slice(pending);
        let last = u32::from(self.vectors.count() - 1) % 64;
        let beyond = pending.last().is_some_and(|word| word & !(u64::MAX >> (63 - last)) != 0);
        if restored.table != table || beyond {
            return None;
        }
        let overdue = can_send && !restored.deliverable().is_empty();
        (!overdue).then_some(restored)
    }
}

fn read(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0xff);
    let present = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
    let present = present.unwrap_or_default();
    let length = present.len().min(data.len());
    data[..length].copy_from_slice(&present[..length]);
}

/// A set of MSI-X vectors. The empty set holds no allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsixVectorSet(Option<Box<[u64; WORDS]>>);

const WORDS: usize = registers::VECTORS_MAX as usize / 64;

impl MsixVectorSet {
    /// The set of none.
    pub const EMPTY: Self = Self(None);

    /// Whether the vector is in the set.
    pub fn contains(&self, vector: u16) -> bool {
        let word = self.0.as_ref().and_then(|words| words.get(usize::from(vector / 64)));
        word.is_some_and(|word| word & 1 << (vector % 64) != 0)
    }

    /// Whether no vector is in the set.
    pub const fn is_empty(&self) -> bool {
        // There are words only once there is a vector.
        self.0.is_none()
    }

    /// The vectors in the set, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0..registers::VECTORS_MAX)
            .take_while(|_| !self.is_empty())
            .filter(|&vector| self.contains(vector))
    }

    /// Adds a vector that a function can have.
    fn insert(&mut self, vector: u16) {
        let words = self.0.get_or_insert_default();
        words[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    /// Adds the vectors of another set.
    pub(in crate::pci) fn extend(&mut self, other: &Self) {
        for vector in other.iter() {
            self.insert(vector);
        }
    }
}
