//! Devices that decode again, before the VMM has put their BARs back.
//!
//! A VMM passes a guest's write to the device first and changes its own memory map after that, all
//! within one exit of the virtual CPU that writes. Another one that accesses the BAR in between finds a
//! device that decodes, and a VMM that knows of nothing there and reads 0. For the guest the write is not
//! over before its virtual CPU runs again, so that the access is rightly one to a device that does not
//! decode yet.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::device::DeviceId;

/// Should the virtual CPU never run again. The VMM has put the BARs back by then.
const LIMIT: Duration = Duration::from_secs(1);

/// In the place of a thread: the rest of the entry is being written. No variable is at such an address.
const TAKING: usize = usize::MAX;

/// Threads that do it at the same time. One more is too many to be followed.
const THREADS: usize = 16;

thread_local! {
    static THREAD: u8 = const { 0 };
}

/// Without locks: a child of a fork would find them held.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// How many entries are in use, so that there is one thing to look at.
    count: AtomicUsize,
    entries: [Arrival; THREADS],
    /// What times are counted from.
    start: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Arrival {
    /// The thread that wrote, by the address of something that each has. 0: the entry is free.
    thread: AtomicUsize,
    device: AtomicU32,
    /// In nanoseconds.
    since: AtomicU64,
}

impl Arrivals {
    /// A device may decode again after a write that this thread makes for the guest.
    pub(super) fn begin(&self, device: DeviceId, now: Instant) {
        let since = self.nanoseconds(now);
        for entry in &self.entries {
            let thread = entry.thread.load(Ordering::Acquire);
            if thread == TAKING || thread != 0 && !entry.is_over(since) {
                continue;
            }
            let taken =
                entry.thread.compare_exchange(thread, TAKING, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_ok() {
                entry.device.store(device.0, Ordering::Release);
                entry.since.store(since, Ordering::Release);
                if thread == 0 {
                    self.count.fetch_add(1, Ordering::AcqRel);
                }
                // Who sees the thread sees the rest, and does not take it for one that is over.
                entry.thread.store(this_thread(), Ordering::Release);
                return;
            }
        }
    }

    /// This thread is about to run a virtual CPU: what it was doing for the guest is done.
    pub(super) fn end(&self) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let thread = this_thread();
        for entry in &self.entries {
            let ended =
                entry.thread.compare_exchange(thread, 0, Ordering::AcqRel, Ordering::Relaxed);
            if ended.is_ok() {
                self.count.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Whether the VMM is about to put a device's BARs back.
    pub(super) fn has(&self, device: DeviceId, now: Instant) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let now = self.nanoseconds(now);
        self.entries.iter().any(|entry| {
            !matches!(entry.thread.load(Ordering::Acquire), 0 | TAKING)
                && entry.device.load(Ordering::Acquire) == device.0
                && !entry.is_over(now)
        })
    }

    fn nanoseconds(&self, now: Instant) -> u64 {
        let start = self.start.get_or_init(|| now);
        u64::try_from(now.saturating_duration_since(*start).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Arrival {
    fn is_over(&self, now: u64) -> bool {
        let limit = u64::try_from(LIMIT.as_nanos()).unwrap_or(u64::MAX);
        now.saturating_sub(self.since.load(Ordering::Acquire)) >= limit
    }
}

/// How often devices have stopped to decode.
#[derive(Debug)]
pub(super) struct Losses {
    of: [AtomicU64; DEVICES],
    in_all: AtomicU64,
}

/// Devices that are told apart. Of more than that some are counted together.
const DEVICES: usize = 256;

impl Default for Losses {
    fn default() -> Self {
        Self { of: std::array::from_fn(|_| AtomicU64::new(0)), in_all: AtomicU64::new(0) }
    }
}

impl Losses {
    pub(super) fn of(&self, device: DeviceId) -> u64 {
        self.of[device.0 as usize % DEVICES].load(Ordering::Acquire)
    }

    /// Of all devices.
    pub(super) fn in_all(&self) -> u64 {
        self.in_all.load(Ordering::Acquire)
    }

    pub(super) fn add(&self, device: DeviceId) {
        self.of[device.0 as usize % DEVICES].fetch_add(1, Ordering::AcqRel);
        self.in_all.fetch_add(1, Ordering::AcqRel);
    }
}

/// What tells threads apart.
pub(super) fn this_thread() -> usize {
    THREAD.with(|here| std::ptr::from_ref(here).addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arrival_lasts_until_its_own_thread_runs_a_virtual_cpu() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        arrivals.begin(DeviceId(3), now);
        std::thread::scope(|scope| {
            scope.spawn(|| arrivals.end());
        });
        assert!(arrivals.has(DeviceId(3), now));
        assert!(!arrivals.has(DeviceId(4), now));
        arrivals.end();
        assert!(!arrivals.has(DeviceId(3), now));
    }

    #[test]
    fn an_arrival_ends_by_itself() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        arrivals.begin(DeviceId(3), now);
        assert!(arrivals.has(DeviceId(3), now + LIMIT / 2));
        assert!(!arrivals.has(DeviceId(3), now + LIMIT));
    }

    #[test]
    fn an_entry_that_another_thread_is_taking_is_left_to_it() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        arrivals.nanoseconds(now);
        arrivals.entries[0].thread.store(TAKING, Ordering::Release);
        let now = now + LIMIT * 2;
        assert!(!arrivals.has(DeviceId(0), now), "what it says is of long ago");
        arrivals.begin(DeviceId(1), now);
        assert!(arrivals.has(DeviceId(1), now));
        assert_eq!(arrivals.entries[0].thread.load(Ordering::Acquire), TAKING);
    }
}
