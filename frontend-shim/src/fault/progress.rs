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
    /// While nothing changed.
    repeats: u32,
    /// Whatever changed.
    in_all: u32,
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

    /// The same, while things change all the time: another vCPU that maps and suspends without end
    /// must not hide that this one stands still.
    pub const BOUND_IN_ALL: u32 = 1 << 16;

    /// Notes a fault. `changes` is a counter that moves when something is mapped or suspended that
    /// the fault may be about.
    ///
    /// # Errors
    /// [`NoProgress`] when it is one too many.
    pub fn fault(&mut self, fault: &MemoryFault, changes: u64) -> Result<(), NoProgress> {
        let seen = self.last.as_ref().filter(|(last, _)| last == fault).map(|(_, at)| *at);
        self.repeats = if seen == Some(changes) { self.repeats + 1 } else { 1 };
        self.in_all = if seen.is_some() { self.in_all + 1 } else { 1 };
        self.last = Some((fault.clone(), changes));
        if self.repeats > Self::BOUND || self.in_all > Self::BOUND_IN_ALL {
            return Err(NoProgress { fault: fault.clone() });
        }
        Ok(())
    }

    /// Notes that the vCPU got on: any exit that is no memory fault.
    pub fn progress(&mut self) {
        self.last = None;
    }
}
