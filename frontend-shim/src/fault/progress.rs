use thiserror::Error;

/// Stops a vCPU from faulting on the same spot for ever.
///
/// Every resolved fault must let the instruction go on, or something must have changed meanwhile.
/// The same address again and again while nothing changes, with no other exit in between, is a bug
/// of ours or of the hypervisor, or a backend that lies: it is escalated instead of spinning.
#[derive(Debug, Default)]
pub struct ProgressGuard {
    last: Option<Seen>,
    repeats: u32,
}

/// What tells one fault from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    address: Option<u64>,
    changes: u64,
}

/// The same fault again, too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("memory fault at {address:#x?} repeats without progress")]
pub struct NoProgress {
    /// Guest-physical address, if it was known.
    pub address: Option<u64>,
}

impl ProgressGuard {
    /// Faults in a row that are still bearable. A fault can be spurious, or resolved by another vCPU
    /// while it is on its way here, a few times, and not this often.
    pub const BOUND: u32 = 64;

    /// Notes a fault. `changes` is a counter that moves when something is mapped or suspended.
    ///
    /// # Errors
    /// [`NoProgress`] when it is one too many.
    pub fn fault(&mut self, address: Option<u64>, changes: u64) -> Result<(), NoProgress> {
        let seen = Seen { address, changes };
        self.repeats = if self.last == Some(seen) { self.repeats + 1 } else { 1 };
        self.last = Some(seen);
        if self.repeats > Self::BOUND { Err(NoProgress { address }) } else { Ok(()) }
    }

    /// Notes that the vCPU got on: any exit that is no memory fault.
    pub fn progress(&mut self) {
        self.last = None;
    }
}
