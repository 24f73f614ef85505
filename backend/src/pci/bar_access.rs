//! Who answers which part of a BAR.

use std::ops::Range;

/// Who answers an access to a part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarOwner {
    /// The device behind the function.
    Device,
    /// The function's MSI-X table.
    MsixTable,
    /// The function's MSI-X Pending Bit Array.
    MsixPending,
}

/// The part of an access to a BAR that one owner answers. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarPiece {
    /// Who answers it.
    pub owner: BarOwner,
    /// Where it starts, in bytes: from the start of the BAR if the device owns it, else from the
    /// start of the table or Pending Bit Array.
    pub offset: u64,
    /// Which bytes of the access's data it is.
    pub data: Range<usize>,
}

/// The pieces of one access to a BAR, in ascending order. Holds no borrow and no allocation.
#[derive(Clone, Debug)]
pub struct BarPieces {
    zones: BarZones,
    start: u64,
    next: u64,
    end: u64,
}

impl BarPieces {
    /// What lies past the end of the BAR belongs to nobody and gets no piece.
    pub(super) fn new(zones: BarZones, offset: u64, length: usize) -> Self {
        let end = offset.saturating_add(length as u64).min(zones.size);
        Self { zones, start: offset, next: offset, end }
    }
}

impl Iterator for BarPieces {
    type Item = BarPiece;

    fn next(&mut self) -> Option<BarPiece> {
        if self.next >= self.end {
            return None;
        }
        let (owner, offset, zone_end) = self.zones.at(self.next);
        let end = zone_end.min(self.end);
        let index =
            |at: u64| usize::try_from(at - self.start).expect("no further than the access is long");
        let piece = BarPiece { owner, offset, data: index(self.next)..index(end) };
        self.next = end;
        Some(piece)
    }
}

/// What a BAR is divided into: the ranges of the MSI-X structures, empty if they are elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BarZones {
    pub(super) size: u64,
    pub(super) table: Range<u64>,
    pub(super) pending: Range<u64>,
}

/// Memory is mapped in pages of at least this many bytes.
const PAGE: u64 = 4096;

impl BarZones {
    /// The owner of the byte at `offset` of the BAR, what the owner calls it, and where the zone
    /// ends.
    fn at(&self, offset: u64) -> (BarOwner, u64, u64) {
        if self.table.contains(&offset) {
            return (BarOwner::MsixTable, offset - self.table.start, self.table.end);
        }
        if self.pending.contains(&offset) {
            return (BarOwner::MsixPending, offset - self.pending.start, self.pending.end);
        }
        let end = [&self.table, &self.pending]
            .into_iter()
            .filter(|zone| !zone.is_empty() && zone.start > offset)
            .map(|zone| zone.start)
            .fold(self.size, u64::min);
        (BarOwner::Device, offset, end)
    }

    /// The page-aligned areas that hold nothing but what is the device's.
    pub(super) fn mappable(&self) -> Vec<Range<u64>> {
        let mut kept: Vec<_> =
            [&self.table, &self.pending].into_iter().filter(|zone| !zone.is_empty()).collect();
        kept.sort_by_key(|zone| zone.start);
        let mut areas = Vec::new();
        let mut start = 0;
        for zone in kept {
            areas.push(start..zone.start / PAGE * PAGE);
            start = start.max(zone.end.next_multiple_of(PAGE));
        }
        areas.push(start..self.size / PAGE * PAGE);
        areas.retain(|area| area.start < area.end);
        areas
    }
}
