use serde::{Deserialize, Serialize};

use super::{FaultPlace, MemoryFault, Verdict};
use crate::sync::{AtomicU64, Ordering};

/// Counts memory faults: how their place was known, and what became of them. A fault that comes
/// again is counted again.
#[derive(Debug, Default)]
pub struct FaultCounters {
    places: [AtomicU64; 4],
    verdicts: [AtomicU64; 5],
}

/// What [`FaultCounters`] had counted at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// The hypervisor told the address.
    pub reported: u64,
    /// The instruction told the address: it has one access that can have faulted.
    pub located: u64,
    /// The instruction has several accesses that can have faulted; the backends were asked about each.
    pub one_of: u64,
    /// The address was unknown; every function with mapped BARs was asked.
    pub unknown: u64,
    /// Resolved as [`Verdict::UnsupportedRequest`].
    pub unsupported_request: u64,
    /// Resolved as [`Verdict::Map`].
    pub map: u64,
    /// Resolved as [`Verdict::Relax`].
    pub relax: u64,
    /// Resolved as [`Verdict::Retry`].
    pub retry: u64,
    /// Returned to the VMM: [`Verdict::NotMine`].
    pub not_mine: u64,
}

impl FaultCounters {
    /// Counts one fault.
    pub fn count(&self, fault: &MemoryFault, verdict: Verdict) {
        let place = match fault.place {
            FaultPlace::Reported(_) => 0,
            FaultPlace::Located(_) => 1,
            FaultPlace::OneOf(_) => 2,
            FaultPlace::Unknown(_) => 3,
        };
        let verdict = match verdict {
            Verdict::UnsupportedRequest => 0,
            Verdict::Map => 1,
            Verdict::Relax => 2,
            Verdict::Retry => 3,
            Verdict::NotMine => 4,
        };
        self.places[place].fetch_add(1, Ordering::Relaxed);
        self.verdicts[verdict].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    #[must_use]
    pub fn get(&self) -> FaultCounts {
        let [reported, located, one_of, unknown] =
            self.places.each_ref().map(|counter| counter.load(Ordering::Relaxed));
        let [unsupported_request, map, relax, retry, not_mine] =
            self.verdicts.each_ref().map(|counter| counter.load(Ordering::Relaxed));
        FaultCounts {
            reported,
            located,
            one_of,
            unknown,
            unsupported_request,
            map,
            relax,
            retry,
            not_mine,
        }
    }
}

impl FaultCounts {
    /// Faults that were resolved: the instruction went on.
    #[must_use]
    pub fn resolved(&self) -> u64 {
        self.unsupported_request + self.map + self.relax + self.retry
    }
}
