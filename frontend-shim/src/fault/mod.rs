//! What to do about a memory fault: pure decisions, without a hypervisor or a socket.
//!
//! A memory fault is a guest access that the hypervisor could not complete. It carries no width,
//! register or data, so it is never answered; it is resolved by changing what is mapped, and the
//! instruction is executed again (docs/fault-semantics.md).
#![forbid(unsafe_code)]

mod counters;
#[cfg(feature = "x86")]
mod locator;
mod progress;
mod report;
mod router;
mod verdict;
mod windows;

#[cfg(test)]
mod tests;

pub use counters::{FaultCounters, FaultCounts};
#[cfg(feature = "x86")]
pub use locator::{Backing, CodeWidth, SegmentBases, StoppedVcpu, VcpuState, locate, narrow};
pub use progress::{NoProgress, ProgressGuard};
pub use report::{FaultAccess, FaultPlace, GuestAccess, MemoryFault, Unlocated};
pub use router::{BarTarget, Route};
pub use verdict::{SlotState, Verdict, decide};
pub use windows::{AddressSpace, BarWindow, Piece, WindowTable};
