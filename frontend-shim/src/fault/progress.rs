use thiserror::Error;

use super::MemoryFault;

/// Stops a vCPU from faulting on the same spot for ever.
///
/// Every resolved fault must let the instruction go on, or something must have changed meanwhile.
/// The same address again and again while nothing changes, with no other exit in between, is a bug
/// of ours or of the hypervisor, or a backend that lies: it is escalated instead of spinning.
#[derive(Debug, Default)]
pub struct ProgressGuard {
    last: Option<(MemoryFault, u64)>,
    repeats: u32,
}

/// The same fault again, too often.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{fault} repeats without progress")]
pub struct NoProgress {
    /// The fault.
    pub fault: MemoryFault,
}

impl ProgressGuard {
    /// Faults in a row that are still bearable. A fault can be spurious, or resolved by another vCPU
    /// while it is on its way here, a few times, and not this often.
    pub const BOUND: u32 = 64;

    /// Notes a fault. `changes` is a counter that moves when something is mapped or suspended.
    ///
    /// # Errors
    /// [`NoProgress`] when it is one too many.
    pub fn fault(&mut self, fault: &MemoryFault, changes: u64) -> Result<(), NoProgress> {
        if self.last.as_ref().is_some_and(|(last, at)| (last, *at) == (fault, changes)) {
            self.repeats += 1;
        } else {
            self.last = Some((fault.clone(), changes));
            self.repeats = 1;
        }
        if self.repeats > Self::BOUND { Err(NoProgress { fault: fault.clone() }) } else { Ok(()) }
    }

    /// Notes that the vCPU got on: any exit that is no memory fault.
    pub fn progress(&mut self) {
        self.last = None;
    }
}
