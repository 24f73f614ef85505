//! Who answers which part of a BAR.

use std::ops::Range;

use super::Function;
use crate::pci::bar::{BarIndex, BarKind};
use crate::pci::bar_access::{BarPieces, BarZones};

impl Function {
    /// Divides an access to a BAR, of any offset and length, into the pieces that the device, the
    /// MSI-X table and the Pending Bit Array answer, in ascending order. What lies past the end of
    /// the BAR, or in a BAR that the function does not have, gets no piece: its bytes read all ones
    /// and drop what is written.
    ///
    /// Whether the function claims the BAR at all is not asked here: see [`Function::claims`].
    pub fn bar_pieces(&self, index: BarIndex, offset: u64, length: usize) -> BarPieces {
        BarPieces::new(self.zones(index), offset, length)
    }

    /// The areas of a BAR, as offsets, that a client may map: whole 4096-byte pages in which
    /// everything is the device's. None in an I/O BAR.
    pub fn mappable_areas(&self, index: BarIndex) -> Vec<Range<u64>> {
        match self.bar(index).map(|bar| bar.kind) {
            None | Some(BarKind::Io) => Vec::new(),
            Some(_) => self.zones(index).mappable(),
        }
    }

    fn zones(&self, index: BarIndex) -> BarZones {
        let mut zones = BarZones::default();
        if let Some(bar) = self.spec.bars.iter().find(|bar| bar.index == index) {
            zones.size = bar.size;
        }
        if let Some(msix) = &self.spec.msix {
            if msix.table.bar == index {
                zones.table = msix.table_range();
            }
            if msix.pending.bar == index {
                zones.pending = msix.pending_range();
            }
        }
        zones
    }
}
