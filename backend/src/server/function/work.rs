//! Transfers, as far as they can be done without waiting.

use super::HostedFunction;
use crate::devices::{MemoryMessage, Step};

/// Transfers that are finished in one go. A device may begin the next one when one is over, and
/// others have their turn as well.
const STEPS: usize = 256;

impl HostedFunction {
    /// Does the transfers that need no message.
    pub(super) fn do_transfers(&mut self) {
        self.unfinished = false;
        if self.transfers.is_empty() || !self.migration.is_running() {
            return;
        }
        for _ in 0..STEPS {
            match self.transfers.step(&self.dma, self.function.bus_master(), None) {
                done @ Step::Done(..) => self.step_taken(done),
                Step::Idle | Step::Message(_) => return,
            }
        }
        self.unfinished = true;
    }

    /// The next message, of at most `limit` bytes.
    pub(super) fn message(&mut self, limit: usize) -> Option<MemoryMessage> {
        match self.transfers.step(&self.dma, self.function.bus_master(), Some(limit)) {
            Step::Message(message) => Some(message),
            step => {
                self.step_taken(step);
                None
            }
        }
    }

    /// Tells the device about a transfer that is over.
    pub(super) fn step_taken(&mut self, step: Step) {
        if let Step::Done(id, result) = step {
            let (device, mut context) = self.split();
            device.dma_done(id, result, &mut context);
        }
    }
}
