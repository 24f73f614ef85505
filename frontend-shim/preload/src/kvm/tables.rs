//! VMs and virtual CPUs by number, found without a lock.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use barkeep_shim::fault::ProgressGuard;

use super::run_area::RunArea;
use crate::device::BarAddress;

const CHUNK: usize = 64;

/// Entries that never move and are used again once they are free.
#[derive(Debug)]
pub(super) struct Table<T> {
    /// Filled from the first one on, as they are needed.
    chunks: Box<[OnceLock<Box<[T]>>]>,
}

/// Whether an entry of a table is in use.
#[derive(Debug, Default)]
pub(super) struct Use(AtomicU32);

impl Use {
    const FREE: u32 = 0;
    const TAKEN: u32 = 1;
    /// A lock inside may be held by a thread that does not exist in this process.
    const LOST: u32 = 2;

    pub(super) fn is_taken(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::TAKEN
    }

    /// Returns false if it was not in use.
    pub(super) fn free(&self) -> bool {
        let swapped =
            self.0.compare_exchange(Self::TAKEN, Self::FREE, Ordering::AcqRel, Ordering::Relaxed);
        swapped.is_ok()
    }

    fn take(&self) -> bool {
        let swapped =
            self.0.compare_exchange(Self::FREE, Self::TAKEN, Ordering::AcqRel, Ordering::Relaxed);
        swapped.is_ok()
    }

    fn lose(&self) {
        self.0.store(Self::LOST, Ordering::Release);
    }
}

/// What a table holds.
pub(super) trait Entry: Default {
    fn state(&self) -> &Use;
}

impl<T: Entry> Table<T> {
    /// A table of at most `chunks` times 64 entries.
    pub(super) fn new(chunks: usize) -> Self {
        Self { chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let index = usize::try_from(index).ok()?;
        self.chunks.get(index / CHUNK)?.get()?.get(index % CHUNK)
    }

    /// An entry that nobody uses; `None` if there are too many.
    pub(super) fn take(&self) -> Option<(u32, &T)> {
        for (chunk, base) in self.chunks.iter().zip((0..).step_by(CHUNK)) {
            let entries = chunk.get_or_init(|| (0..CHUNK).map(|_| T::default()).collect());
            let free = entries.iter().zip(base..).find(|(entry, _)| entry.state().take());
            if let Some((entry, index)) = free {
                return Some((index, entry));
            }
        }
        None
    }

    /// All entries in use.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let chunks = self.chunks.iter().map_while(OnceLock::get);
        let entries = chunks.flat_map(|chunk| chunk.iter()).zip(0..);
        entries.filter(|(entry, _)| entry.state().is_taken()).map(|(entry, index)| (index, entry))
    }

    /// Forgets all entries in the child of a fork, whatever other threads were doing to them.
    pub(super) fn lose_all(&self) {
        for (_, entry) in self.iter() {
            entry.state().lose();
        }
    }
}

/// A read of a BAR that decoded, which the VMM was given to complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handed {
    pub(super) place: BarAddress,
    /// In bytes.
    pub(super) len: usize,
    /// How often the device had stopped to decode by then.
    pub(super) losses: u64,
}

/// A virtual CPU.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Vcpu {
    state: Use,
    /// How many virtual CPUs were here before.
    generation: AtomicU32,
    /// Number of its VM.
    pub(super) vm: AtomicU32,
    /// Who ran it last.
    pub(super) thread: AtomicUsize,
    /// Where the VMM has its `struct kvm_run`; 0 for nowhere.
    run: AtomicUsize,
    run_len: AtomicUsize,
    /// Whether `guard` has faults after which nothing else happened.
    stands: AtomicBool,
    /// Whether there is something in `handed`.
    handing: AtomicBool,
    handed: Mutex<Option<Handed>>,
    /// Those faults. Only the thread in `KVM_RUN` takes it.
    guard: Mutex<ProgressGuard>,
}

impl Entry for Vcpu {
    fn state(&self) -> &Use {
        &self.state
    }
}

impl Vcpu {
    /// Begins anew, for another virtual CPU.
    pub(super) fn begin(&self, vm: u32) {
        self.vm.store(vm, Ordering::Relaxed);
        self.thread.store(0, Ordering::Relaxed);
        self.run.store(0, Ordering::Release);
        self.take_handed();
        self.progress();
    }

    /// Its last descriptor is closed. Another thread may be in `KVM_RUN` still. Returns false to all but one who
    /// say so.
    pub(super) fn close(&self) -> bool {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.state.free()
    }

    /// What tells it from those that are here before and after it.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn run(&self) -> Option<RunArea> {
        let address = self.run.load(Ordering::Acquire);
        RunArea::mapped(address, self.run_len.load(Ordering::Relaxed))
    }

    /// Notes where the VMM has mapped its `struct kvm_run`; 0 for nowhere.
    pub(super) fn mapped(&self, address: usize, len: usize) {
        self.run.store(0, Ordering::Release);
        self.run_len.store(len, Ordering::Release);
        self.run.store(address, Ordering::Release);
    }

    /// Whether any of its `struct kvm_run` is in a range of host memory.
    pub(super) fn has_run_in(&self, start: usize, len: usize) -> bool {
        let run = self.run.load(Ordering::Acquire);
        let end = run.saturating_add(self.run_len.load(Ordering::Acquire));
        run != 0 && run < start.saturating_add(len) && start < end
    }

    /// Notes that the guest got on: anything but another fault.
    pub(super) fn progress(&self) {
        if self.stands.load(Ordering::Relaxed) {
            self.stands.store(false, Ordering::Relaxed);
            self.guard.lock().unwrap_or_else(PoisonError::into_inner).progress();
        }
    }

    /// Notes a read that the VMM completes before it runs this virtual CPU again.
    pub(super) fn hand(&self, handed: Handed) {
        *self.handed.lock().unwrap_or_else(PoisonError::into_inner) = Some(handed);
        self.handing.store(true, Ordering::Relaxed);
    }

    /// That read, once.
    pub(super) fn take_handed(&self) -> Option<Handed> {
        if !self.handing.load(Ordering::Relaxed) {
            return None;
        }
        self.handing.store(false, Ordering::Relaxed);
        self.handed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Lets a fault be noted.
    pub(super) fn with_guard<T>(&self, note: impl FnOnce(&mut ProgressGuard) -> T) -> T {
        self.stands.store(true, Ordering::Relaxed);
        note(&mut self.guard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_number_and_used_again() {
        let table = Table::<Vcpu>::new(2);
        let numbers: Vec<u32> = (0..128).map(|_| table.take().unwrap().0).collect();
        assert_eq!(numbers, Vec::from_iter(0..128));
        assert!(table.take().is_none(), "full");
        table.get(70).unwrap().state().free();
        assert_eq!(table.iter().count(), 127);
        assert_eq!(table.take().unwrap().0, 70);
        assert!(table.get(128).is_none());
    }

    #[test]
    fn entries_of_the_parent_are_never_used_in_the_child() {
        let table = Table::<Vcpu>::new(1);
        table.take().unwrap();
        table.lose_all();
        assert_eq!(table.iter().count(), 0);
        assert_eq!(table.take().unwrap().0, 1);
    }

    #[test]
    fn a_run_area_is_found_by_any_of_it() {
        let vcpu = Vcpu::default();
        assert!(!vcpu.has_run_in(0, usize::MAX));
        vcpu.mapped(0x10000, 0x3000);
        assert!(vcpu.run().is_some());
        let parts = [(0x13000, 0x1000), (0xf000, 0x1000), (0x12000, 0x1000), (0, usize::MAX)];
        let found = parts.map(|(start, len)| vcpu.has_run_in(start, len));
        assert_eq!(found, [false, false, true, true]);
    }
}
