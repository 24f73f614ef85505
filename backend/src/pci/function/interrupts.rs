//! INTx, MSI and MSI-X.

use super::{Function, changed};
use crate::pci::capabilities::msi::MsiOutcome;
use crate::pci::capabilities::power::PowerState;
use crate::pci::command::{Command, Status};
use crate::pci::effects::Effects;

impl Function {
    /// Asserts or deasserts the function's INTx interrupt. Returns the level of the line if that
    /// changed. Without an interrupt pin, nothing happens.
    pub fn set_intx(&mut self, asserted: bool) -> Option<bool> {
        self.spec.interrupt_pin?;
        let before = self.intx_line();
        self.set_status(Status::INTERRUPT_STATUS, asserted);
        changed(before, self.intx_line())
    }

    /// The level of the INTx line: `true` is asserted.
    ///
    /// The interrupt stays pending, and Interrupt Status set, while Interrupt Disable, a power state
    /// other than D0, MSI or MSI-X keeps the function from using its pin (PCI 6.2.2, 6.8.1.3 and
    /// 6.8.2.3).
    pub fn intx_line(&self) -> bool {
        self.status().contains(Status::INTERRUPT_STATUS)
            && !self.command().contains(Command::INTERRUPT_DISABLE)
            && self.power_state() == PowerState::D0
            && !self.msi_enabled()
            && !self.msix_enabled()
    }

    /// Whether the function uses MSI: software enabled it, and not MSI-X too. What a function does
    /// with both enabled is undefined (PCI 6.8); this one uses MSI-X.
    pub fn msi_enabled(&self) -> bool {
        self.capabilities.msi.is_some_and(|msi| msi.enabled(&self.space)) && !self.msix_enabled()
    }

    /// Whether software enabled MSI-X.
    pub fn msix_enabled(&self) -> bool {
        self.capabilities.msix.is_some_and(|msix| msix.enabled(&self.space))
    }

    /// How many MSI vectors the function can use now: those that software granted, at most those
    /// the function asked for, and 0 while it does not use MSI.
    pub fn msi_vectors(&self) -> u8 {
        self.capabilities
            .msi
            .filter(|_| self.msi_enabled())
            .map_or(0, |msi| msi.granted(&self.space).count())
    }

    /// Raises an MSI interrupt.
    pub fn raise_msi(&mut self, vector: u8) -> MsiOutcome {
        let can_send = self.can_send_msi();
        self.capabilities
            .msi
            .map_or(MsiOutcome::Dropped, |msi| msi.raise(&mut self.space, vector, can_send))
    }

    /// Raises an MSI-X interrupt.
    pub fn raise_msix(&mut self, vector: u16) -> MsiOutcome {
        if !self.msix_enabled() || !self.bus_master() {
            return MsiOutcome::Dropped;
        }
        let function_masked = self.msix_function_masked();
        self.msix.as_mut().map_or(MsiOutcome::Dropped, |msix| msix.raise(vector, function_masked))
    }

    /// Whether a message of this vector would go out at once: MSI-X and bus mastering are enabled and
    /// nothing masks it.
    pub fn msix_delivers(&self, vector: u16) -> bool {
        self.can_send_msix() && self.msix.as_ref().is_some_and(|msix| msix.delivers(vector))
    }

    /// Reads the MSI-X table from `offset` of it on, at any alignment and of any length. Bytes past
    /// its end are all ones.
    pub fn msix_table_read(&self, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some(msix) => msix.read_table(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Reads the Pending Bit Array, likewise. It can't be written.
    pub fn msix_pending_read(&self, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some(msix) => msix.read_pending(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes the MSI-X table from `offset` of it on, at any alignment and of any length. Bytes
    /// past its end are dropped, those that `data` leaves out of a field keep their values.
    ///
    /// Unmasking a vector that is pending delivers it, if the function may send it.
    pub fn msix_table_write(&mut self, offset: u64, data: &[u8]) -> Effects {
        let can_send = self.can_send_msix();
        let mut effects = Effects::default();
        if let Some(msix) = &mut self.msix {
            msix.write_table(offset, data);
            if can_send {
                effects.msix.deliver = msix.take_deliverable();
            }
        }
        effects
    }

    pub(super) fn can_send_msi(&self) -> bool {
        self.msi_enabled() && self.bus_master()
    }

    /// Whether messages of vectors that are not masked go out.
    pub fn can_send_msix(&self) -> bool {
        self.msix_enabled() && !self.msix_function_masked() && self.bus_master()
    }

    fn msix_function_masked(&self) -> bool {
        self.capabilities.msix.is_some_and(|msix| msix.function_masked(&self.space))
    }
}
