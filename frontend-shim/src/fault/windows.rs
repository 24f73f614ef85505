#[cfg(test)]
mod tests;

use crate::sync::{Mutex, Snapshot, lock};

/// Which addresses a window lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressSpace {
    /// Guest-physical memory.
    Memory,
    /// I/O ports.
    Io,
}

/// The addresses of one BAR, decoding or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// Which addresses.
    pub space: AddressSpace,
    /// The first address.
    pub start: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// Which function, by the order of attachment.
    pub function: usize,
    /// Region index of the BAR.
    pub bar: u8,
    /// Where in the BAR it starts: 0, or for the slot of a part, where the part is.
    pub offset: u64,
    /// Whether the function claimed it when the window was published.
    pub decodes: bool,
}

/// A part of an access: all in one window, or all in none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The window and the offset in it, if there is one.
    pub target: Option<(BarWindow, u64)>,
    /// Length in bytes.
    pub len: usize,
}

/// All windows of a VM, and the memory slots in them. Lookups are lock-free on a snapshot; whoever
/// changes a function's windows publishes a new snapshot.
///
/// Overlaps are a guest's mistake with a defined result, as in a host bridge: what the VMM itself
/// claims (RAM, ECAM) comes before any BAR, a BAR that decodes before one that does not, and the
/// function attached first before the others.
#[derive(Debug)]
pub struct WindowTable {
    windows: Published,
    slots: Published,
    claimed: Vec<(u64, u64)>,
}

/// Windows by function, and a sorted snapshot of them for lookups.
#[derive(Debug, Default)]
struct Published {
    snapshot: Snapshot<Vec<BarWindow>>,
    by_function: Mutex<Vec<Vec<BarWindow>>>,
}

impl WindowTable {
    /// A table for a VM that claims these `(start, length)` ranges of memory itself. Empty ones claim
    /// nothing.
    #[must_use]
    pub fn new(mut claimed: Vec<(u64, u64)>) -> Self {
        claimed.retain(|(_, len)| *len > 0);
        Self { windows: Published::default(), slots: Published::default(), claimed }
    }

    /// Replaces the windows of one function.
    pub fn publish(&self, function: usize, windows: Vec<BarWindow>) {
        self.windows.replace(function, windows, |all| self.merge(all));
    }

    /// Replaces the memory slots of one function: what the guest reaches without an exit.
    pub fn publish_slots(&self, function: usize, slots: Vec<BarWindow>) {
        // The hypervisor lets no two slots overlap, so there is nothing to merge.
        self.slots.replace(function, slots, |all| sorted(all.iter().flatten().copied().collect()));
    }

    /// The window that claims `address`, and the offset in it.
    #[must_use]
    pub fn find(&self, space: AddressSpace, address: u64) -> Option<(BarWindow, u64)> {
        find_in(&self.windows.snapshot.load(), space, address)
    }

    /// The BAR that a memory fault at `address` is about: the one whose slot is there, whatever else
    /// claims the address by now, else the one whose window is.
    #[must_use]
    pub fn find_faulting(&self, address: u64) -> Option<(BarWindow, u64)> {
        find_in(&self.slots.snapshot.load(), AddressSpace::Memory, address)
            .map(|(slot, offset)| (slot, slot.offset + offset))
            .or_else(|| self.find(AddressSpace::Memory, address))
    }

    /// Whether `window` lies in the table whole, with nothing else claiming a part of it. Only then
    /// may its memory be mapped: direct accesses must reach the BAR that the table names.
    #[must_use]
    pub fn owns(&self, window: &BarWindow) -> bool {
        self.find(window.space, window.start).is_some_and(|(winner, _)| {
            (winner.function, winner.bar, winner.start, winner.len)
                == (window.function, window.bar, window.start, window.len)
        })
    }

    /// Whether the VMM itself claims this address.
    #[must_use]
    pub fn is_claimed(&self, address: u64) -> bool {
        self.claimed.iter().any(|range| ranges_overlap((address, 1), *range))
    }

    /// Cuts the access of `len` bytes at `address` into pieces that each have one target: an access
    /// may straddle the end of a BAR.
    pub fn pieces(
        &self,
        space: AddressSpace,
        address: u64,
        len: usize,
    ) -> impl Iterator<Item = Piece> {
        let snapshot = self.windows.snapshot.load_full();
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = address.wrapping_add(done as u64);
            let target = find_in(&snapshot, space, at);
            let room = match target {
                Some((window, offset)) => window.len - offset,
                None => distance_to_next(&snapshot, space, at),
            };
            let piece = (len - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            done += piece;
            Some(Piece { target, len: piece })
        })
    }

    fn merge(&self, all: &[Vec<BarWindow>]) -> Vec<BarWindow> {
        let mut candidates: Vec<BarWindow> =
            all.iter().flatten().filter(|window| !self.over_claimed(window)).copied().collect();
        // Stable: within a rank, the order of attachment stays.
        candidates.sort_by_key(|window| !window.decodes);
        let mut merged: Vec<BarWindow> = Vec::with_capacity(candidates.len());
        for window in candidates {
            if !merged.iter().any(|other| overlap(other, &window)) {
                merged.push(window);
            }
        }
        sorted(merged)
    }

    fn over_claimed(&self, window: &BarWindow) -> bool {
        let range = (window.start, window.len);
        window.space == AddressSpace::Memory
            && self.claimed.iter().any(|claimed| ranges_overlap(range, *claimed))
    }
}

impl Published {
    fn replace(
        &self,
        function: usize,
        windows: Vec<BarWindow>,
        merge: impl FnOnce(&[Vec<BarWindow>]) -> Vec<BarWindow>,
    ) {
        let mut all = lock(&self.by_function);
        if all.len() <= function {
            all.resize(function + 1, Vec::new());
        }
        if all[function] != windows {
            all[function] = windows;
            self.snapshot.store(merge(&all));
        }
    }
}

fn sorted(mut windows: Vec<BarWindow>) -> Vec<BarWindow> {
    windows.sort_by_key(|window| (window.space, window.start));
    windows
}

fn find_in(windows: &[BarWindow], space: AddressSpace, address: u64) -> Option<(BarWindow, u64)> {
    let after = windows.partition_point(|window| (window.space, window.start) <= (space, address));
    let window = *windows.get(after.checked_sub(1)?)?;
    let offset = address.checked_sub(window.start)?;
    (window.space == space && offset < window.len).then_some((window, offset))
}

fn distance_to_next(windows: &[BarWindow], space: AddressSpace, address: u64) -> u64 {
    let after = windows.partition_point(|window| (window.space, window.start) <= (space, address));
    windows
        .get(after)
        .filter(|window| window.space == space)
        .map_or(u64::MAX, |window| window.start - address)
}

fn overlap(a: &BarWindow, b: &BarWindow) -> bool {
    a.space == b.space && ranges_overlap((a.start, a.len), (b.start, b.len))
}

/// Ends are compared as last addresses, so a window up to the very top does not wrap.
fn ranges_overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    let last = |(start, len): (u64, u64)| start.saturating_add(len - 1);
    a.0 <= last(b) && b.0 <= last(a)
}
