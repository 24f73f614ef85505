//! Power management (PM 3.2, PCIe 5.3).

use crate::pci::config_space::{ConfigSpace, Register};
use crate::pci::spec::power as registers;

/// Power management of a function that has the two mandatory states, D0 and D3hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerSpec {
    /// The function keeps its context when it leaves D3hot. Otherwise it comes back reset.
    pub no_soft_reset: bool,
}

/// The power state of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PowerState {
    /// Fully on.
    #[default]
    D0,
    /// Off but for configuration space: claims nothing, initiates nothing.
    D3Hot,
}

/// What a write did to the power state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pci) enum Transition {
    /// At most a change that keeps the function's context.
    ContextKept,
    /// The function left D3hot and its context is lost.
    ContextLost,
}

/// The capability at its place in configuration space.
#[derive(Clone, Copy, Debug)]
pub(in crate::pci) struct PowerCapability {
    at: u8,
    spec: PowerSpec,
}

impl PowerCapability {
    pub(super) const fn new(at: u8, spec: PowerSpec) -> Self {
        Self { at, spec }
    }

    pub(super) const fn at(&self) -> u8 {
        self.at
    }

    pub(super) fn registers(&self) -> [Register; 2] {
        let at = usize::from(self.at);
        let no_soft_reset =
            if self.spec.no_soft_reset { registers::PMCSR_NO_SOFT_RESET } else { 0 };
        [
            Register::word("Power Management Capabilities", at + registers::PMC)
                .reset(registers::PMC_VERSION),
            Register::word("Power Management Control/Status", self.pmcsr())
                .reset(no_soft_reset)
                .read_write(registers::PMCSR_POWER_STATE),
        ]
    }

    pub(in crate::pci) fn state(&self, space: &ConfigSpace) -> PowerState {
        match space.u16_at(self.pmcsr()) & registers::PMCSR_POWER_STATE {
            0b11 => PowerState::D3Hot,
            _ => PowerState::D0,
        }
    }

    /// Completes a write to configuration space that may have hit the power state.
    ///
    /// A state that the function does not have is discarded without a change (PM 3.2.4).
    pub(in crate::pci) fn complete_write(
        &self,
        space: &mut ConfigSpace,
        before: PowerState,
    ) -> Transition {
        let pmcsr = space.u16_at(self.pmcsr());
        let kept = match (pmcsr & registers::PMCSR_POWER_STATE, before) {
            (0b00, PowerState::D3Hot) if !self.spec.no_soft_reset => {
                return Transition::ContextLost;
            }
            (0b01 | 0b10, PowerState::D0) => 0b00,
            (0b01 | 0b10, PowerState::D3Hot) => 0b11,
            _ => return Transition::ContextKept,
        };
        space.set_u16(self.pmcsr(), pmcsr & !registers::PMCSR_POWER_STATE | kept);
        Transition::ContextKept
    }

    /// Whether the power state is one that the function has: the register never holds another.
    pub(in crate::pci) fn is_possible(&self, space: &ConfigSpace) -> bool {
        matches!(space.u16_at(self.pmcsr()) & registers::PMCSR_POWER_STATE, 0b00 | 0b11)
    }

    pub(in crate::pci) fn pmcsr(&self) -> usize {
        usize::from(self.at) + registers::PMCSR
    }
}
