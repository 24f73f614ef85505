use thiserror::Error;

/// Stops a vCPU from faulting on the same spot for ever.
///
/// Every resolved fault must let the instruction go on, or something must have changed meanwhile.
/// The same address again and again, with no other exit in between, is a bug of ours or of the
/// hypervisor: it is reported and escalated instead of spinning.
#[derive(Debug, Default)]
pub struct ProgressGuard {
    address: Option<u64>,
    repeats: u32,
}

/// The same fault again, too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("memory fault at {address:#x?} repeats without progress")]
pub struct NoProgress {
    /// Guest-physical address, if it was known.
    pub address: Option<u64>,
}

impl ProgressGuard {
    /// Faults on one address in a row that are still bearable: a race lost to another vCPU that
    /// toggles decode as fast as it can is lost a few times, not this often.
    pub const BOUND: u32 = 64;

    /// Notes a fault.
    ///
    /// # Errors
    /// [`NoProgress`] when it is one too many.
    pub fn fault(&mut self, address: Option<u64>) -> Result<(), NoProgress> {
        if self.repeats > 0 && self.address == address {
            self.repeats += 1;
        } else {
            self.address = address;
            self.repeats = 1;
        }
        if self.repeats > Self::BOUND { Err(NoProgress { address }) } else { Ok(()) }
    }

    /// Notes that the vCPU got on: any exit that is no memory fault.
    pub fn progress(&mut self) {
        self.repeats = 0;
    }
}
