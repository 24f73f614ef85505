use std::ops::Range;

use crate::hypervisor::PAGE_SIZE;

/// Which parts of a BAR were written, in grains of whole pages.
///
/// A grain is write-protected until its first write faults and relaxes it: dirty tracking as vfio and
/// migration do it. A host keeps one mapping for every run of pages with one protection, and has some
/// 65,000 of them for a whole process; so a large BAR has coarser grains, never more of them.
#[derive(Debug)]
pub(super) struct Written {
    grain: u64,
    size: u64,
    grains: Vec<bool>,
}

/// Grains of a BAR at most.
const MAX_GRAINS: u64 = 1024;

impl Written {
    /// Nothing of a BAR of `size` bytes is written. `size` is a power of two.
    pub(super) fn nothing(size: u64) -> Self {
        let grain = (size / MAX_GRAINS).max(PAGE_SIZE);
        let grains = usize::try_from(size.div_ceil(grain)).unwrap_or(0);
        Self { grain, size, grains: vec![false; grains] }
    }

    /// Notes a write of `len` bytes, and returns the grains that it touches.
    pub(super) fn note(&mut self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len.max(1)).min(self.size);
        let touched = offset.min(end) / self.grain..end.div_ceil(self.grain);
        let index = |grain: u64| usize::try_from(grain).unwrap_or(usize::MAX);
        if let Some(grains) = self.grains.get_mut(index(touched.start)..index(touched.end)) {
            grains.fill(true);
        }
        touched.start * self.grain..(touched.end * self.grain).min(self.size)
    }

    /// What is written, as few ranges as possible, by offset.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (grain, _) in (0..).zip(&self.grains).filter(|(_, written)| **written) {
            let range = self.range(grain);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    fn range(&self, grain: u64) -> Range<u64> {
        let start = grain * self.grain;
        start..(start + self.grain).min(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_noted_by_the_grains_they_touch() {
        let mut written = Written::nothing(0x10000);
        let rows = [
            (0x1004, 4, 0x1000..0x2000),
            (0x1fff, 1, 0x1000..0x2000),
            (0x1ffc, 8, 0x1000..0x3000),
            (0x2ffc, 8, 0x2000..0x4000),
            (0xf000, 0, 0xf000..0x10000),
            (0xfffc, 0x1000, 0xf000..0x10000),
            (u64::MAX, 8, 0x10000..0x10000),
        ];
        for (offset, len, touched) in rows {
            assert_eq!(written.note(offset, len), touched, "{offset:#x}+{len}");
        }
        assert_eq!(written.ranges(), [0x1000..0x4000, 0xf000..0x10000]);
    }

    #[test]
    fn a_large_bar_has_coarser_grains_and_no_more_of_them() {
        let mut written = Written::nothing(1 << 40);
        assert_eq!(written.note(1 << 39, 1), 1 << 39..(1 << 39) + (1 << 30));
        assert_eq!(written.grains.len(), 1024);
        assert_eq!(Written::nothing(4096).grains.len(), 1);
    }
}
