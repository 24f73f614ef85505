use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Windows are made of such.
pub(super) const SMALLEST_PAGE: u64 = 4096;

/// What is logged in at most, to begin with: a client that hints more gets more exact reports.
const LARGEST_FIRST_PAGE: u64 = 2 << 20;

/// A leaf holds this many words of 64 pages: 4 KiB, for 128 MiB of small pages.
const WORDS: usize = 512;
const LEAF_SHIFT: u32 = 15;

/// Leaves of one log: 16 MiB. For more, pages become larger.
const MOST_LEAVES: usize = 4096;

type Leaf = Box<[AtomicU64; WORDS]>;

/// Dirty pages of a few ranges, as a sparse bitmap of bounded size.
///
/// When the leaves are used up, the page size is multiplied by 8, until they suffice again. What is
/// reported then is more than what was written, never less.
#[derive(Debug)]
pub(super) struct DirtyPages {
    /// First and last address of each, in order, none overlapping another.
    ranges: Vec<(u64, u64)>,
    page_shift: u32,
    /// By the number of the first page in them, divided by the pages in a leaf.
    leaves: BTreeMap<u64, Leaf>,
    most_leaves: usize,
}

impl DirtyPages {
    pub(super) fn new(ranges: Vec<(u64, u64)>, page_size: u64) -> Self {
        let page_size = page_size.clamp(SMALLEST_PAGE, LARGEST_FIRST_PAGE);
        let page_shift = page_size.trailing_zeros();
        Self { ranges, page_shift, leaves: BTreeMap::new(), most_leaves: MOST_LEAVES }
    }

    /// The same, with another bound.
    #[cfg(test)]
    pub(super) fn with_leaves(self, most_leaves: usize) -> Self {
        Self { most_leaves, ..self }
    }

    pub(super) fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    pub(super) fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    #[cfg(test)]
    pub(super) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    /// Marks the pages that have an address of the range and are logged. `false` if a leaf is
    /// missing.
    pub(super) fn mark(&self, first: u64, last: u64) -> bool {
        self.logged(first, last).all(|(first, last)| {
            spans(first >> self.page_shift, last >> self.page_shift).all(|span| {
                let leaf = self.leaves.get(&span.leaf);
                leaf.map(|leaf| span.mark(leaf)).is_some()
            })
        })
    }

    /// The same, and makes the leaves that are missing.
    pub(super) fn mark_with_room(&mut self, first: u64, last: u64) {
        let logged: Vec<(u64, u64)> = self.logged(first, last).collect();
        for (first, last) in logged {
            // Never more leaves at once than there may be.
            while self.leaves_of(first, last) > self.most_leaves as u64 {
                self.coarsen();
            }
            while !self.make_room(first, last) {
                self.coarsen();
            }
            for span in spans(first >> self.page_shift, last >> self.page_shift) {
                if let Some(leaf) = self.leaves.get(&span.leaf) {
                    span.mark(leaf);
                }
            }
        }
    }

    pub(super) fn is_dirty(&self, address: u64) -> bool {
        let page = address >> self.page_shift;
        let word = self.leaves.get(&(page >> LEAF_SHIFT)).map(|leaf| &leaf[word_of(page)]);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & bit_of(page) != 0)
    }

    /// Sets the bit of each page of the report that holds an address of a dirty page, and forgets
    /// the dirty pages that lie in the range as a whole.
    pub(super) fn report(&mut self, (first, last): (u64, u64), shift: u32, bitmap: &mut [u8]) {
        let page_shift = self.page_shift;
        let leaf_shift = page_shift + LEAF_SHIFT;
        for (index, leaf) in self.leaves.range_mut(first >> leaf_shift..=last >> leaf_shift) {
            let words = leaf.iter_mut().map(AtomicU64::get_mut).enumerate();
            for (word, dirty) in words.filter(|(_, dirty)| **dirty != 0) {
                let mut left = *dirty;
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let page = (index << LEAF_SHIFT) | (word as u64 * 64 + u64::from(bit));
                    let start = page << page_shift;
                    let end = start | ((1 << page_shift) - 1);
                    if start <= last && end >= first {
                        let from = (start.max(first) - first) >> shift;
                        set_bits(bitmap, from, (end.min(last) - first) >> shift);
                        if start >= first && end <= last {
                            *dirty &= !(1 << bit);
                        }
                    }
                }
            }
        }
        self.leaves.retain(|_, leaf| leaf.iter_mut().any(|word| *word.get_mut() != 0));
    }

    /// The parts of a range that are logged.
    fn logged(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
        let ranges = self.ranges.iter().skip_while(move |range| range.1 < first);
        let ranges = ranges.take_while(move |range| range.0 <= last);
        ranges.map(move |range| (first.max(range.0), last.min(range.1)))
    }

    fn leaves_of(&self, first: u64, last: u64) -> u64 {
        let shift = self.page_shift + LEAF_SHIFT;
        (last >> shift) - (first >> shift) + 1
    }

    /// Makes the leaves for a range. `false` if there may not be that many.
    fn make_room(&mut self, first: u64, last: u64) -> bool {
        let shift = self.page_shift + LEAF_SHIFT;
        (first >> shift..=last >> shift).all(|index| {
            let room = self.leaves.len() < self.most_leaves;
            if room {
                self.leaves.entry(index).or_insert_with(new_leaf);
            }
            room || self.leaves.contains_key(&index)
        })
    }

    /// Makes pages 8 times as large.
    fn coarsen(&mut self) {
        let old = std::mem::take(&mut self.leaves);
        self.page_shift += 3;
        for (index, leaf) in old {
            let new = self.leaves.entry(index >> 3).or_insert_with(new_leaf);
            for (word, dirty) in leaf.iter().enumerate() {
                let dirty = dirty.load(Ordering::Relaxed);
                for byte in (0..8).filter(|byte| (dirty >> (8 * byte)) & 0xff != 0) {
                    let page = ((index << LEAF_SHIFT) | (word as u64 * 64 + 8 * byte)) >> 3;
                    new[word_of(page)].fetch_or(bit_of(page), Ordering::Relaxed);
                }
            }
        }
    }
}

fn new_leaf() -> Leaf {
    Box::new([const { AtomicU64::new(0) }; WORDS])
}

fn word_of(page: u64) -> usize {
    // Less than `WORDS`.
    usize::try_from((page >> 6) % WORDS as u64).unwrap_or(0)
}

fn bit_of(page: u64) -> u64 {
    1 << (page % 64)
}

/// Consecutive pages in one leaf.
#[derive(Clone, Copy, Debug)]
struct Span {
    leaf: u64,
    first: u64,
    last: u64,
}

impl Span {
    fn mark(self, leaf: &Leaf) {
        let mut page = self.first;
        loop {
            // Up to the end of its word.
            let last = self.last.min(page | 63);
            let bits = (u64::MAX >> (63 - (last - page))) << (page % 64);
            leaf[word_of(page)].fetch_or(bits, Ordering::SeqCst);
            if last == self.last {
                return;
            }
            page = last + 1;
        }
    }
}

/// Cuts a range of pages at the borders of leaves.
fn spans(first: u64, last: u64) -> impl Iterator<Item = Span> {
    (first >> LEAF_SHIFT..=last >> LEAF_SHIFT).map(move |leaf| {
        let start = leaf << LEAF_SHIFT;
        Span { leaf, first: first.max(start), last: last.min(start | ((1 << LEAF_SHIFT) - 1)) }
    })
}

/// Sets the bits `from` to `to` of a bitmap in little endian, which holds them.
fn set_bits(bitmap: &mut [u8], from: u64, to: u64) {
    let index = |bit: u64| usize::try_from(bit / 8).unwrap_or(usize::MAX);
    let (low, high) = (0xff << (from % 8) & 0xff, 0xff >> (7 - to % 8));
    let (first, last) = (index(from), index(to));
    let byte = |bits: u32| u8::try_from(bits & 0xff).unwrap_or(0);
    match bitmap.get_mut(first..=last) {
        Some([only]) => *only |= byte(low & high),
        Some([start, middle @ .., end]) => {
            *start |= byte(low);
            middle.fill(0xff);
            *end |= byte(high);
        }
        _ => {}
    }
}
