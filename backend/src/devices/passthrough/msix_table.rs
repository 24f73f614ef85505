use std::ops::Range;

use super::config_policy::MsixTablePlace;
use super::device::VfioRegion;

/// The MSI-X table as a guest sees it (PCI 6.8.2.6).
///
/// The kernel keeps the real one to itself: reads return all ones there and writes are dropped. This
/// one is memory for the VMM, which makes interrupts of what the guest writes there.
#[derive(Debug)]
pub(super) struct MsixTable {
    place: MsixTablePlace,
    entries: Vec<u8>,
}

const ENTRY: usize = 16;
/// In the last word of an entry: the vector is masked, as after a reset.
const VECTOR_CONTROL: usize = 12;

impl MsixTable {
    pub(super) fn new(place: MsixTablePlace) -> Self {
        let mut table = Self { place, entries: vec![0; usize::from(place.entries) * ENTRY] };
        table.reset();
        table
    }

    /// Where it is in its BAR.
    pub(super) fn range(&self) -> Range<u64> {
        self.place.offset..self.place.offset + self.entries.len() as u64
    }

    pub(super) fn reset(&mut self) {
        self.entries.fill(0);
        for entry in self.entries.chunks_exact_mut(ENTRY) {
            entry[VECTOR_CONTROL] = 1;
        }
    }

    /// Puts the entries into what the device answered.
    pub(super) fn read(&self, region: VfioRegion, offset: u64, data: &mut [u8]) {
        if let Some((inside, entries)) = self.overlap(region, offset, data.len()) {
            data[inside].copy_from_slice(&self.entries[entries]);
        }
    }

    /// Takes in what of a write hits the entries.
    pub(super) fn write(&mut self, region: VfioRegion, offset: u64, data: &[u8]) {
        if let Some((inside, entries)) = self.overlap(region, offset, data.len()) {
            self.entries[entries].copy_from_slice(&data[inside]);
        }
    }

    /// The part of an access that hits the table: its place in the data and in the entries.
    fn overlap(
        &self,
        region: VfioRegion,
        offset: u64,
        length: usize,
    ) -> Option<(Range<usize>, Range<usize>)> {
        let table = self.range();
        let start = offset.max(table.start);
        let end = offset.checked_add(length as u64)?.min(table.end);
        if region != VfioRegion::Bar(self.place.bar) || start >= end {
            return None;
        }
        let place = |from: u64, at: u64| usize::try_from(at - from).ok();
        let inside = place(offset, start)?..place(offset, end)?;
        let entries = place(table.start, start)?..place(table.start, end)?;
        Some((inside, entries))
    }
}
