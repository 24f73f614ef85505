//! What a change of a function means for the world outside.

use super::bar::BarSet;
use super::capabilities::msi::MsiVectorSet;
use super::capabilities::msix::MsixVectorSet;
use super::capabilities::power::PowerState;

/// What a configuration write or a reset changed, for the owner of the function to act on.
///
/// Each field compares the function before and after the whole operation, so one write that does
/// several things yields one consistent answer. `None` and empty sets mean no change; the default
/// is no change at all, and holds no allocation.
#[must_use = "the world outside does not follow the function by itself"]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// What the function claims now.
    pub decode: Option<Decode>,
    /// Whether the function may access memory now.
    pub bus_master: Option<bool>,
    /// BARs whose address changed, decoding or not.
    pub bars_moved: BarSet,
    /// The expansion ROM's address changed, decoding or not.
    pub rom_moved: bool,
    /// The level of the INTx line now: `true` is asserted.
    pub intx: Option<bool>,
    /// What happened to MSI.
    pub msi: MsiEffects,
    /// What happened to MSI-X.
    pub msix: MsixEffects,
    /// The power state now.
    pub power: Option<PowerState>,
    /// The function was reset, and with it everything behind its registers must be.
    pub reset: Option<ResetKind>,
}

impl Effects {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a function claims: its enables, as far as its power state lets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decode {
    /// The function claims its memory BARs.
    pub memory: bool,
    /// The function claims its I/O BARs.
    pub io: bool,
    /// The function claims its expansion ROM.
    pub rom: bool,
}

/// The part of [`Effects`] that concerns MSI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiEffects {
    /// Whether MSI is enabled now.
    pub enabled: Option<bool>,
    /// Vectors that were pending and are to be delivered now. Their pending bits are already
    /// clear.
    pub deliver: MsiVectorSet,
}

/// The part of [`Effects`] that concerns MSI-X.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsixEffects {
    /// Whether MSI-X is enabled now.
    pub enabled: Option<bool>,
    /// Vectors that were pending and are to be delivered now. Their pending bits are already
    /// clear.
    pub deliver: MsixVectorSet,
}

/// What reset a function, from the weakest to the strongest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResetKind {
    /// The function left D3hot and does not keep its context (PM 3.2.4, No_Soft_Reset clear).
    Soft,
    /// Software set Initiate Function Level Reset (PCIe 6.6.2).
    FunctionLevel,
    /// A reset of the bus above, with power kept (PCIe 6.6.1: hot reset). The link is trained
    /// again; sticky bits stay.
    Hot,
    /// Power-on of the whole device (PCIe 6.6.1: cold reset). Nothing stays.
    Device,
}
