use std::fs::File;

use thiserror::Error;

use crate::state::Scratch;

/// A device whose state can be taken away as data and given to another one of its kind.
///
/// The function's registers are saved elsewhere; this is what lies behind them. It is asked of a
/// device that is stopped: no access, transfer or wake comes until it runs again.
pub trait Saved {
    /// The state, in a form that carries its own version. Transfers under way are part of it.
    fn save(&self) -> Vec<u8>;

    /// Takes over what [`save`](Self::save) returned, perhaps in another process, perhaps in another
    /// version of this program.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as at power-on.
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError>;

    /// Memory of the device's own that moves as well, with its length in bytes.
    fn memory(&self) -> Option<(&File, u64)> {
        None
    }

    /// Words of memory that outlive the process, for what changes with every request and is not part
    /// of [`save`](Self::save) then: requests in flight. Asked once.
    fn scratch_words(&self) -> usize {
        0
    }

    /// Gives it that memory, before anything else happens. It holds what the device's predecessor
    /// left there, which may be anything; [`restore`](Self::restore) follows then, and zeros otherwise.
    fn set_scratch(&mut self, _scratch: Scratch) {}

    /// Differs whenever [`save`](Self::save) may return something else than before: whoever keeps the
    /// state up to date need not compare it. `None` if the device does not know.
    fn revision(&self) -> Option<u64> {
        None
    }

    /// The device runs again: what [`save`](Self::save) found under way is to be begun anew.
    fn resume(&mut self, _context: &mut super::Context<'_>) {}
}

/// Why a state can't be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("state of another device, or damaged")]
pub struct RestoreError;
