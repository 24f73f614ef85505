//! Saving a function and restoring it.

use super::{Events, Function};
use crate::pci::capabilities::Capabilities;
use crate::pci::capabilities::msix::MsixStructures;
use crate::pci::effects::Effects;
use crate::pci::state::{FunctionState, StateError, StateV1};

impl Function {
    /// What the function knows, to be restored into another one like it.
    pub fn save(&self) -> FunctionState {
        // Destructured, so that nothing the function comes to know is forgotten here.
        let Self { spec, capabilities: _, space, msix, epoch } = self;
        FunctionState::V1(StateV1 {
            decode: spec.decode,
            layout: space.registers().iter().map(Into::into).collect(),
            epoch: *epoch,
            config: space.bytes().to_vec(),
            msix_table: msix.as_ref().map_or_else(Vec::new, |msix| msix.table().to_vec()),
            msix_pending: msix.as_ref().map_or_else(Vec::new, |msix| msix.pending().to_vec()),
            msix_programmed: msix.as_ref().is_some_and(MsixStructures::programmed),
        })
    }

    /// Whether [`save`](Self::save) would return this state, for much less than saving costs.
    pub fn is_as_saved(&self, state: &FunctionState) -> bool {
        let FunctionState::V1(state) = state;
        let msix = self.msix.as_ref();
        self.epoch == state.epoch
            && self.space.bytes() == state.config
            && msix.is_none_or(|msix| {
                msix.table() == state.msix_table
                    && msix.pending() == state.msix_pending
                    && msix.programmed() == state.msix_programmed
            })
    }

    /// Makes the function what another one like it was. The effects compare it with what it was
    /// before; nothing counts as reset, and no message as raised.
    ///
    /// The epoch does not go back: neither behind that of the state nor behind this function's.
    ///
    /// # Errors
    /// [`StateError`] if the state is of another kind of function, or one that no function can get
    /// into. The function is then as it was.
    pub fn restore(&mut self, state: &FunctionState) -> Result<Effects, StateError> {
        let FunctionState::V1(state) = state;
        if state.decode != self.spec.decode {
            return Err(StateError::OtherDecoding);
        }
        state.check_layout(self.registers())?;

        let mut restored = self.clone();
        restored.space.restore(&state.config).map_err(|offset| StateError::Config { offset })?;
        restored.check_config()?;
        let can_send = restored.can_send_msix();
        match &mut restored.msix {
            Some(msix) => {
                let StateV1 { msix_table: table, msix_pending: pending, .. } = state;
                let programmed = state.msix_programmed;
                *msix =
                    msix.restored(table, pending, programmed, can_send).ok_or(StateError::Msix)?;
            }
            None if state.msix_table.is_empty() && state.msix_pending.is_empty() => {}
            None => return Err(StateError::Msix),
        }
        restored.epoch = restored.epoch.max(state.epoch);

        let before = self.observe();
        *self = restored;
        Ok(self.finish(before, Events::default()))
    }

    /// Makes the function what it was itself, in a process that has ended: also the epoch is what it was
    /// then, since nobody has been told of another one.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    pub fn recover(&mut self, state: &FunctionState) -> Result<(), StateError> {
        let FunctionState::V1(StateV1 { epoch, .. }) = state;
        let _effects = self.restore(state)?;
        self.epoch = *epoch;
        Ok(())
    }

    /// Checks what the registers' masks can't say: which values of a field there are.
    fn check_config(&self) -> Result<(), StateError> {
        let Capabilities { power, msi, aer, .. } = &self.capabilities;
        let power = power.filter(|power| !power.is_possible(&self.space)).map(|it| it.pmcsr());
        let can_send = self.can_send_msi();
        let msi = msi.filter(|msi| !msi.is_possible(&self.space, can_send)).map(|it| it.pending());
        let aer = aer.filter(|aer| !aer.is_possible(&self.space)).map(|it| it.control());
        match power.or(msi).or(aer) {
            Some(offset) => Err(StateError::Config { offset }),
            None => Ok(()),
        }
    }
}
