//! Slots that virtual CPUs look up without a lock while other threads change them.
//!
//! A lookup uses a snapshot, so by itself removing a slot would not stop a virtual CPU that still holds
//! the old snapshot from touching the memory. The kernel promises more for KVM: when the ioctl that
//! deletes a slot returns, no guest access reaches its memory. The same promise is kept here with one
//! counter per virtual CPU that is odd while the CPU may use a snapshot:
//!
//! - the CPU makes its counter odd, then loads the snapshot;
//! - a change publishes the new snapshot, then waits for every counter that it finds odd to move.
//!
//! Both sides put a sequentially consistent fence between their two steps. So either the change sees the
//! odd counter and waits, or the CPU sees the new snapshot; a counter that has moved belongs to a CPU
//! that has loaded the new snapshot since, or will. The span is one instruction, and a CPU that is out
//! for an exit is not within it: a thread that handles an exit may change slots without waiting for
//! itself.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::{ArcSwap, Guard};

use crate::hypervisor::HypervisorError;
use crate::hypervisor::slots::SlotTable;

/// The slots of one machine.
#[derive(Debug, Default)]
pub(super) struct SharedSlots {
    current: ArcSwap<SlotTable>,
    /// Held across a change, so that changes don't lose one another.
    readers: Mutex<Vec<Weak<AtomicU64>>>,
}

impl SharedSlots {
    /// Registers a virtual CPU.
    pub(super) fn reader(self: &Arc<Self>) -> SlotReader {
        let activity = Arc::new(AtomicU64::new(0));
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|reader| reader.strong_count() > 0);
        readers.push(Arc::downgrade(&activity));
        drop(readers);
        SlotReader { slots: Arc::clone(self), activity }
    }

    /// Publishes a changed table and returns when nobody uses the old one any more.
    pub(super) fn change(
        &self,
        change: impl FnOnce(&mut SlotTable) -> Result<(), HypervisorError>,
    ) -> Result<(), HypervisorError> {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = SlotTable::clone(&self.current.load());
        change(&mut table)?;
        self.current.store(Arc::new(table));
        fence(Ordering::SeqCst);
        for activity in readers.iter().filter_map(Weak::upgrade) {
            let seen = activity.load(Ordering::Acquire);
            while seen % 2 == 1 && activity.load(Ordering::Acquire) == seen {
                // The other side is within one instruction; it may need this processor to leave it.
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

/// One virtual CPU's way to the slots.
#[derive(Debug)]
pub(super) struct SlotReader {
    slots: Arc<SharedSlots>,
    activity: Arc<AtomicU64>,
}

impl SlotReader {
    /// A snapshot that stays the truth until it is dropped: changes wait for that.
    pub(super) fn enter(&mut self) -> Snapshot<'_> {
        self.activity.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let leave = Leave { activity: &self.activity };
        Snapshot { table: self.slots.current.load(), _leave: leave }
    }
}

/// See [`SlotReader::enter`].
pub(super) struct Snapshot<'a> {
    // Declared before `_leave`: the table is let go before the counter says so.
    table: Guard<Arc<SlotTable>>,
    _leave: Leave<'a>,
}

impl Snapshot<'_> {
    pub(super) fn table(&self) -> &SlotTable {
        &self.table
    }
}

struct Leave<'a> {
    activity: &'a AtomicU64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        // Release: everything done with the snapshot is over before the counter shows it.
        self.activity.fetch_add(1, Ordering::Release);
    }
}
