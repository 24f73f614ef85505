//! The expansion ROM and its Base Address register (PCI 6.2.5.2).

use super::config_space::{ConfigSpace, Register};
use super::function_spec::SpecError;
use super::spec::{header, rom as encoding};

/// An expansion ROM as a guest sees it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rom {
    /// Length in bytes, a power of two.
    pub size: u32,
    /// First address in memory space, a multiple of `size`. Meaningful whether or not the function
    /// decodes.
    pub address: u32,
    /// Expansion ROM Enable. The function claims the ROM only if it claims memory as well:
    /// [`Function::claims_rom`](crate::pci::Function::claims_rom).
    pub enabled: bool,
}

/// What a function's author says about its expansion ROM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RomSpec {
    /// Length in bytes: a power of two from 2 KiB to 16 MiB.
    pub size: u32,
}

impl RomSpec {
    pub(super) fn validate(&self) -> Result<(), SpecError> {
        let Self { size } = *self;
        let in_range = (encoding::SIZE_MIN..=encoding::SIZE_MAX).contains(&size);
        if size.is_power_of_two() && in_range { Ok(()) } else { Err(SpecError::RomSize { size }) }
    }

    /// The register of a function without a ROM: reads 0.
    pub(super) const fn absent() -> Register {
        Register::dword("Expansion ROM Base Address", header::EXPANSION_ROM)
    }

    /// Sized like a BAR: only address bits at or above the size are writable.
    pub(super) fn register(&self) -> Register {
        Self::absent().read_write(self.address_mask() | encoding::ENABLE)
    }

    /// The ROM with the address that `space` holds for it.
    pub(super) fn placed(&self, space: &ConfigSpace) -> Rom {
        let register = space.u32_at(header::EXPANSION_ROM);
        Rom {
            size: self.size,
            address: register & self.address_mask(),
            enabled: register & encoding::ENABLE != 0,
        }
    }

    const fn address_mask(&self) -> u32 {
        !(self.size - 1)
    }
}
