//! A vendor-specific capability through which software reaches BARs.

use super::Function;
use crate::pci::bar::{BarIndex, BarOffset};
use crate::pci::spec::vendor_window as window;

impl Function {
    /// What an access of `length` bytes at `offset` of configuration space reaches through the
    /// function's window to BARs, if it has one and its data register is accessed: where in which
    /// BAR, and how many bytes. `None` as well when the window's registers name no BAR, or a length
    /// that software must not ask for; it may still name a place past the end of the BAR.
    pub fn window_access(&self, offset: usize, length: usize) -> Option<(BarOffset, usize)> {
        let at = usize::from(self.capabilities.bar_window?);
        let touched =
            offset < at + window::END && offset.saturating_add(length) > at + window::DATA;
        let bar = BarIndex::new(self.space.bytes()[at + window::BAR]).filter(|_| touched)?;
        let offset = self.space.u32_at(at + window::OFFSET).into();
        let length = self.space.u32_at(at + window::ACCESS_LENGTH);
        matches!(length, 1 | 2 | 4).then_some((BarOffset { bar, offset }, length as usize))
    }

    /// The window's data register.
    pub fn window_data(&self) -> [u8; 4] {
        let at = self.capabilities.bar_window.map(|at| usize::from(at) + window::DATA);
        at.map_or([0; 4], |at| self.space.u32_at(at).to_le_bytes())
    }

    /// Puts what was read through the window into its data register, from the first byte on.
    pub fn set_window_data(&mut self, data: [u8; 4]) {
        if let Some(at) = self.capabilities.bar_window {
            self.space.set_u32(usize::from(at) + window::DATA, u32::from_le_bytes(data));
        }
    }
}
