//! Windows of the client's memory, in parts that are recorded apart.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::state::{FdKey, Part, SectionId};

/// A client may have tens of thousands of windows and changes one at a time, so each is in one of a few
/// parts, and only that one is recorded anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Windows {
    /// By address.
    parts: [BTreeMap<u64, Window>; Part::ALL.len()],
    /// How many have the file with this key.
    uses: BTreeMap<u64, usize>,
    changed: [bool; Part::ALL.len()],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Window {
    pub(super) size: u64,
    pub(super) access: u32,
    pub(super) offset: u64,
    pub(super) key: Option<u64>,
}

impl Windows {
    /// As they were recorded.
    pub(super) fn recorded(parts: [BTreeMap<u64, Window>; Part::ALL.len()]) -> Self {
        let mut uses = BTreeMap::new();
        for key in parts.iter().flat_map(BTreeMap::values).filter_map(|window| window.key) {
            *uses.entry(key).or_default() += 1;
        }
        Self { parts, uses, changed: Default::default() }
    }

    /// With one more, of which the address is free.
    pub(super) fn insert(&mut self, address: u64, window: Window) {
        let emptiest = Part::ALL.into_iter().min_by_key(|part| self.parts[part.index()].len());
        let place = emptiest.map_or(0, Part::index);
        self.parts[place].insert(address, window);
        self.changed[place] = true;
        if let Some(key) = window.key {
            *self.uses.entry(key).or_default() += 1;
        }
    }

    /// Without those in a range of addresses. The keys of files that no other has are appended to
    /// `unused`.
    pub(super) fn remove(&mut self, range: RangeInclusive<u64>, unused: &mut Vec<FdKey>) {
        for (part, changed) in self.parts.iter_mut().zip(&mut self.changed) {
            for (_, window) in part.extract_if(range.clone(), |_, _| true) {
                *changed = true;
                let Some(key) = window.key else { continue };
                let uses = self.uses.entry(key).or_default();
                *uses = uses.saturating_sub(1);
                if *uses == 0 {
                    self.uses.remove(&key);
                    unused.push(FdKey(key));
                }
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Window)> {
        self.parts.iter().flatten().map(|(address, window)| (*address, window))
    }

    /// The keys of their files, each once.
    pub(super) fn keys(&self) -> impl Iterator<Item = FdKey> {
        self.uses.keys().copied().map(FdKey)
    }

    /// How many have the file with this key.
    pub(super) fn uses(&self, key: FdKey) -> usize {
        self.uses.get(&key.0).copied().unwrap_or(0)
    }

    /// What is to be recorded anew.
    pub(super) fn take_changes(&mut self) -> impl Iterator<Item = (SectionId, Vec<u8>)> {
        Part::ALL.into_iter().filter_map(|part| {
            let changed = std::mem::take(&mut self.changed[part.index()]);
            let bytes = || postcard::to_allocvec(&self.parts[part.index()]);
            changed.then(|| (SectionId::Windows(part), bytes().expect("plain data serialises")))
        })
    }
}
