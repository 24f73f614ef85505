//! A function as it outlives the process that serves it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::HostedFunction;
use crate::pci::FunctionState;
use crate::server::migration::{Migration, Outgoing};

/// What was recorded of a function last. Comparing with it costs much less than recording does, and
/// most accesses change nothing.
#[derive(Debug, Default)]
pub(in crate::server) struct Image {
    function: Option<(FunctionState, Rest)>,
    device: Option<DeviceImage>,
}

#[derive(Debug)]
struct DeviceImage {
    revision: Option<u64>,
    state: Vec<u8>,
}

/// The parts of a function that have changed, to be recorded.
#[derive(Debug, Default)]
pub(in crate::server) struct Changes {
    /// The function's own.
    pub(in crate::server) function: Option<Vec<u8>>,
    /// The device's.
    pub(in crate::server) device: Option<Vec<u8>>,
}

/// The same parts as they were recorded last; what never was is as at power-on.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::server) struct Recorded<'a> {
    pub(in crate::server) function: Option<&'a [u8]>,
    pub(in crate::server) device: Option<&'a [u8]>,
}

/// What was recorded is of another function, or damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("state of another function, or damaged")]
pub(in crate::server) struct Damaged;

/// The first version.
#[derive(Deserialize)]
enum RecordedFunction {
    V1(FunctionState, Rest),
}

/// The same, borrowed.
#[derive(Serialize)]
enum RecordedFunctionRef<'a> {
    V1(&'a FunctionState, &'a Rest),
}

/// What the server knows of a function besides its registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::server) struct Rest {
    migration: SavedMigration,
    /// The client has not unmasked INTx since its last signal.
    masked: bool,
    missed_wakes: BTreeSet<usize>,
    missed_reload: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum SavedMigration {
    #[default]
    Running,
    Stopped,
    /// So many bytes of the state have been read.
    Saving(u64),
    /// Or a state was being written: what has come of it is lost.
    Failed,
}

impl HostedFunction {
    pub(super) fn changes_from(&mut self, image: &mut Image) -> Changes {
        let mut changes = Changes::default();
        let rest = self.rest();
        let Some(saved) = self.device.saved() else { return changes };
        let known = image.device.as_ref();
        let revision = saved.revision();
        if revision.is_none() || known.is_none_or(|known| known.revision != revision) {
            let state = saved.save();
            if known.is_none_or(|known| known.state != state) {
                changes.device = Some(state.clone());
            }
            image.device = Some(DeviceImage { revision, state });
        }
        let same = |(state, known): &(FunctionState, Rest)| {
            *known == rest && self.function.is_as_saved(state)
        };
        if !image.function.as_ref().is_some_and(same) {
            let (state, rest) = image.function.insert((self.function.save(), rest));
            let recorded = RecordedFunctionRef::V1(state, rest);
            let bytes = postcard::to_allocvec(&recorded).expect("plain data serialises");
            changes.function = Some(bytes);
        }
        changes
    }

    pub(super) fn become_recorded(&mut self, recorded: Recorded<'_>) -> Result<(), Damaged> {
        let rest = match self.restore_recorded(recorded) {
            Ok(rest) => rest,
            Err(damaged) => {
                self.reset_function();
                self.migration = Migration::Recovering(Rest::default());
                return Err(damaged);
            }
        };
        self.migration = Migration::Recovering(rest);
        Ok(())
    }

    fn restore_recorded(&mut self, recorded: Recorded<'_>) -> Result<Rest, Damaged> {
        let Some(bytes) = recorded.function else { return Ok(Rest::default()) };
        let RecordedFunction::V1(state, rest) = postcard::from_bytes(bytes).map_err(|_| Damaged)?;
        // The device is told nothing: its own state is from the same moment.
        self.function.recover(&state).map_err(|_| Damaged)?;
        let saved = self.device.saved().ok_or(Damaged)?;
        saved.restore(recorded.device.ok_or(Damaged)?).map_err(|_| Damaged)?;
        Ok(rest)
    }

    pub(super) fn end_recovery(&mut self) {
        let Migration::Recovering(rest) = std::mem::take(&mut self.migration) else { return };
        let Rest { migration, masked, missed_wakes, missed_reload } = rest;
        self.missed_wakes = missed_wakes;
        self.missed_reload = missed_reload;
        if masked {
            self.interrupts.intx.mask();
        }
        // Nobody knows what was written and not reported.
        if self.dma.is_logging() {
            self.dma.mark_all_dirty();
        }
        self.migration = match migration {
            SavedMigration::Running => return self.resume(),
            SavedMigration::Stopped => Migration::Stopped,
            SavedMigration::Saving(position) => match self.saved_function() {
                Ok(saved) => Migration::Saving(Outgoing::from(&saved, position)),
                Err(_) => Migration::Failed,
            },
            SavedMigration::Failed => Migration::Failed,
        };
        self.interrupts.intx.set_level(self.function.intx_line());
    }

    fn rest(&self) -> Rest {
        Rest {
            migration: match &self.migration {
                Migration::Running | Migration::Recovering(_) => SavedMigration::Running,
                Migration::Stopped => SavedMigration::Stopped,
                Migration::Saving(outgoing) => SavedMigration::Saving(outgoing.position()),
                Migration::Resuming(_) | Migration::Failed => SavedMigration::Failed,
            },
            masked: self.interrupts.intx.is_masked(),
            missed_wakes: self.missed_wakes.clone(),
            missed_reload: self.missed_reload,
        }
    }
}
