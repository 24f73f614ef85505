use std::collections::BTreeMap;
use std::ops::Range;

use super::Protection;

/// The protection of each byte of a mapping, in runs.
#[derive(Debug)]
pub(super) struct Protections {
    /// First byte of each run; the next one ends it. There is always one at 0, and no two neighbours
    /// are alike.
    runs: BTreeMap<u64, Protection>,
}

impl Protections {
    pub(super) fn whole(protection: Protection) -> Protections {
        Protections { runs: BTreeMap::from([(0, protection)]) }
    }

    pub(super) fn set(&mut self, range: Range<u64>, protection: Protection) {
        self.change(range, |_| protection);
    }

    /// Takes away what `protection` does not allow.
    pub(super) fn lower(&mut self, range: Range<u64>, protection: Protection) {
        self.change(range, |before| before.min(protection));
    }

    /// The least that is allowed anywhere in `len` bytes from `offset` on; of no bytes, everything.
    pub(super) fn lowest(&self, offset: u64, len: u64) -> Protection {
        if len == 0 {
            return Protection::ReadWrite;
        }
        let later = self.runs.range(offset..offset.saturating_add(len)).map(|(_, found)| *found);
        later.fold(self.at(offset), Protection::min)
    }

    fn at(&self, offset: u64) -> Protection {
        let run = self.runs.range(..=offset).next_back();
        *run.expect("there is a run at 0").1
    }

    fn change(&mut self, range: Range<u64>, to: impl Fn(Protection) -> Protection) {
        if range.is_empty() {
            return;
        }
        for boundary in [range.start, range.end] {
            let protection = self.at(boundary);
            self.runs.insert(boundary, protection);
        }
        for (_, protection) in self.runs.range_mut(range) {
            *protection = to(*protection);
        }
        let mut before = None;
        self.runs.retain(|_, protection| before.replace(*protection) != Some(*protection));
    }
}

#[cfg(test)]
mod tests {
    use super::Protection::{None, ReadOnly, ReadWrite};
    use super::*;

    #[test]
    fn runs_split_and_grow_together_again() {
        let mut protections = Protections::whole(ReadWrite);
        let runs = |p: &Protections| p.runs.iter().map(|(at, p)| (*at, *p)).collect::<Vec<_>>();
        protections.set(3..5, ReadOnly);
        assert_eq!(runs(&protections), [(0, ReadWrite), (3, ReadOnly), (5, ReadWrite)]);
        protections.set(4..8, None);
        assert_eq!(runs(&protections), [(0, ReadWrite), (3, ReadOnly), (4, None), (8, ReadWrite)]);
        protections.lower(0..9, ReadOnly);
        assert_eq!(runs(&protections), [(0, ReadOnly), (4, None), (8, ReadOnly), (9, ReadWrite)]);
        protections.set(2..2, None);
        protections.set(0..9, ReadWrite);
        assert_eq!(runs(&protections), [(0, ReadWrite)]);
    }

    #[test]
    fn a_range_allows_what_all_of_it_allows() {
        let mut protections = Protections::whole(ReadWrite);
        protections.set(10..20, ReadOnly);
        protections.set(15..16, None);
        for (offset, len, lowest) in [
            (0, 10, ReadWrite),
            (0, 11, ReadOnly),
            (9, 6, ReadOnly),
            (9, 7, None),
            (15, 1, None),
            (16, 4, ReadOnly),
            (19, 100, ReadOnly),
            (20, u64::MAX, ReadWrite),
            (15, 0, ReadWrite),
        ] {
            assert_eq!(protections.lowest(offset, len), lowest, "{offset} {len}");
        }
    }
}
