use std::hint;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread;

use super::{BarMapping, DeviceId};

#[cfg(test)]
mod tests;

const LIMIT: usize = 1024;
/// An entry is being written for the time of five stores, unless its writer lost the processor.
const SPINS: u32 = 64;
/// Then a reader lets others run. A handler that interrupted the writer itself would wait for ever.
const YIELDS: u32 = 10_000;

/// What may be done only while nobody else does it: proof of the devices' lock.
pub(super) type Writing<'a> = MutexGuard<'a, super::Turn>;

/// Which host memory is which part of which BAR.
///
/// Readers take no lock, allocate nothing, and may be signal handlers. Each entry is a seqlock by
/// itself, and what is found in one is true. What is not found may have gone from an entry ahead of the
/// reader to one behind it, which the number of changes tells. So what is mapped before and after a
/// change is found during it. Entries never overlap, but for a moment when one is split, and both say
/// the same then.
#[derive(Debug)]
pub(super) struct Mappings {
    entries: Box<[Entry]>,
    /// Entries from here on were never used.
    used: AtomicUsize,
    /// Goes up before an entry is written.
    changes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Entry {
    /// Odd while the rest is written.
    sequence: AtomicU32,
    start: AtomicUsize,
    /// 0 for an entry that is free.
    len: AtomicUsize,
    device: AtomicU32,
    bar: AtomicU32,
    offset: AtomicU64,
}

impl Default for Mappings {
    fn default() -> Self {
        let entries = (0..LIMIT).map(|_| Entry::default()).collect();
        Self { entries, used: AtomicUsize::new(0), changes: AtomicUsize::new(0) }
    }
}

impl Mappings {
    /// The mapping that has a byte. Safe in a signal handler.
    pub(super) fn at(&self, host: usize) -> Option<BarMapping> {
        self.within(host, 1)
    }

    /// The mapping that has all bytes of a range. Safe in a signal handler.
    pub(super) fn within(&self, host: usize, len: usize) -> Option<BarMapping> {
        self.find(|mapping| {
            let before = host.checked_sub(mapping.start);
            before.is_some_and(|before| before < mapping.len && len <= mapping.len - before)
        })
    }

    /// Whether a part of a range is mapped. Takes no lock.
    pub(super) fn overlaps(&self, start: usize, len: usize) -> bool {
        self.find(|mapping| overlap(mapping, start, len).is_some()).is_some()
    }

    pub(super) fn any_of(&self, device: DeviceId) -> bool {
        self.find(|mapping| mapping.device == device).is_some()
    }

    /// Adds what does not overlap any other. False if there is no room.
    #[must_use]
    pub(super) fn insert(&self, mapping: &BarMapping, _: &Writing<'_>) -> bool {
        let free = |entry: &Entry| entry.len.load(Ordering::Relaxed) == 0;
        let Some(index) = self.entries.iter().position(free) else { return false };
        self.write(&self.entries[index], mapping);
        // Readers that see the entry count see what is in it.
        self.used.fetch_max(index + 1, Ordering::Release);
        true
    }

    /// Takes a range out. What was in it comes back, in pieces; what is left of their mappings stays.
    /// An error for a piece that could not stay because there was no room.
    pub(super) fn remove(
        &self,
        start: usize,
        len: usize,
        writing: &Writing<'_>,
    ) -> (Vec<BarMapping>, Result<(), NoRoom>) {
        let mut removed = Vec::new();
        let mut room = Ok(());
        for entry in &self.entries[..self.used.load(Ordering::Relaxed)] {
            let Some(whole) = entry.read() else { continue };
            let Some(piece) = overlap(&whole, start, len) else { continue };
            let before = piece.start - whole.start;
            let after = part(&whole, before + piece.len, whole.len);
            // What stays is never without an entry.
            if before > 0 {
                if after.is_some_and(|after| !self.insert(&after, writing)) {
                    room = Err(NoRoom);
                }
                self.write(entry, &BarMapping { len: before, ..whole });
            } else {
                self.write(entry, &after.unwrap_or(BarMapping { len: 0, ..whole }));
            }
            removed.push(piece);
        }
        (removed, room)
    }

    /// The first mapping that is the one. Asks for some of them again if mappings change meanwhile.
    fn find(&self, mut is_it: impl FnMut(&BarMapping) -> bool) -> Option<BarMapping> {
        for attempt in 0..SPINS + YIELDS {
            let changes = self.changes.load(Ordering::Acquire);
            let used = self.used.load(Ordering::Acquire).min(LIMIT);
            let found = self.entries[..used].iter().filter_map(Entry::read).find(&mut is_it);
            // Who has seen what an entry was changed to sees that it was.
            fence(Ordering::Acquire);
            if found.is_some() || self.changes.load(Ordering::Relaxed) == changes {
                return found;
            }
            wait(attempt);
        }
        None
    }

    fn write(&self, entry: &Entry, mapping: &BarMapping) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        entry.write(mapping);
    }
}

/// There are as many mappings as are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom;

impl Entry {
    fn write(&self, mapping: &BarMapping) {
        self.begin();
        self.start.store(mapping.start, Ordering::Relaxed);
        self.len.store(mapping.len, Ordering::Relaxed);
        self.device.store(mapping.device.0, Ordering::Relaxed);
        self.bar.store(mapping.bar.into(), Ordering::Relaxed);
        self.offset.store(mapping.offset, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Release);
    }

    fn begin(&self) {
        self.sequence.fetch_add(1, Ordering::Relaxed);
        // A reader that sees one of the stores to come sees the odd number as well, and what came before.
        fence(Ordering::Release);
    }

    /// `None` if the entry is free, or is written for longer than anybody writes.
    fn read(&self) -> Option<BarMapping> {
        for attempt in 0..SPINS + YIELDS {
            let sequence = self.sequence.load(Ordering::Acquire);
            if sequence.is_multiple_of(2) {
                let mapping = self.load();
                // The loads above are done before the number is looked at again.
                fence(Ordering::Acquire);
                if self.sequence.load(Ordering::Relaxed) == sequence {
                    return (mapping.len > 0).then_some(mapping);
                }
            }
            wait(attempt);
        }
        None
    }

    fn load(&self) -> BarMapping {
        BarMapping {
            device: DeviceId(self.device.load(Ordering::Relaxed)),
            bar: u8::try_from(self.bar.load(Ordering::Relaxed)).unwrap_or(u8::MAX),
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            offset: self.offset.load(Ordering::Relaxed),
        }
    }
}

fn wait(attempt: u32) {
    if attempt < SPINS {
        hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

/// The part of a mapping that lies in a range.
pub(super) fn overlap(mapping: &BarMapping, start: usize, len: usize) -> Option<BarMapping> {
    let end = start.saturating_add(len);
    let from = start.max(mapping.start) - mapping.start;
    let to = end.min(mapping.start.saturating_add(mapping.len)).checked_sub(mapping.start)?;
    part(mapping, from, to)
}

/// The part of a mapping between two places in it.
fn part(mapping: &BarMapping, from: usize, to: usize) -> Option<BarMapping> {
    let len = to.checked_sub(from).filter(|len| *len > 0)?;
    let offset = mapping.offset.checked_add(from as u64)?;
    Some(BarMapping { start: mapping.start.checked_add(from)?, len, offset, ..*mapping })
}
