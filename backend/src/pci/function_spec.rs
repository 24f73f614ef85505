//! What a function's author says about it.

use serde::{Deserialize, Serialize};

use super::bar::{BarIndex, BarSet, BarSpec};
use super::capabilities::Capabilities;
use super::capabilities::express::ExpressSpec;
use super::capabilities::msi::MsiSpec;
use super::capabilities::msix::MsixSpec;
use super::capabilities::power::PowerSpec;
use super::capabilities::vendor::VendorSpec;
use super::rom::RomSpec;
use super::spec;

/// What a function is, for as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionSpec {
    /// Who made it and what it is.
    pub ids: Ids,
    /// Its BARs, in any order.
    pub bars: Vec<BarSpec>,
    /// The INTx pin, if it has one.
    pub interrupt_pin: Option<InterruptPin>,
    /// The MSI capability, if it has one.
    pub msi: Option<MsiSpec>,
    /// The MSI-X capability, if it has one.
    pub msix: Option<MsixSpec>,
    /// The power management capability, if it has one.
    pub power: Option<PowerSpec>,
    /// The PCI Express capability; without one the function is a conventional one.
    pub express: Option<ExpressSpec>,
    /// Vendor-specific capabilities, in list order, behind all others.
    pub vendor: Vec<VendorSpec>,
    /// Which of them is a [window to BARs](VendorSpec::bar_window), by its place in the list.
    pub bar_window: Option<usize>,
    /// The expansion ROM, if it has one.
    pub rom: Option<RomSpec>,
    /// Whether the Command register decides what the function claims.
    pub decode: Decoding,
}

/// Whether the Command register decides what a function claims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decoding {
    /// It does, as on any bus: nothing is claimed and nothing mastered until software enables it.
    #[default]
    Strict,
    /// In D0, the function claims its BARs and masters the bus whatever the Command register says.
    ///
    /// Not what the specification says: for clients that drive a function without ever writing its
    /// Command register. The register reads back what was written all the same.
    Always,
}

impl FunctionSpec {
    /// A conventional function with no BARs, interrupts or capabilities, to start from.
    pub const fn new(ids: Ids) -> Self {
        Self {
            ids,
            bars: Vec::new(),
            interrupt_pin: None,
            msi: None,
            msix: None,
            power: None,
            express: None,
            vendor: Vec::new(),
            bar_window: None,
            rom: None,
            decode: Decoding::Strict,
        }
    }

    /// Whether a function can be like this.
    pub(super) fn validate(&self) -> Result<(), SpecError> {
        if self.ids.vendor == spec::VENDOR_ABSENT {
            return Err(SpecError::VendorAbsent);
        }
        let mut taken = BarSet::EMPTY;
        for bar in &self.bars {
            for slot in bar.slots()?.iter() {
                if taken.contains(slot) {
                    return Err(SpecError::BarsOverlap { slot });
                }
                taken.insert(slot);
            }
        }
        if let Some(msix) = &self.msix {
            msix.validate(&self.bars)?;
        }
        if let Some(rom) = &self.rom {
            rom.validate()?;
        }
        let end = Capabilities::end(self);
        if end > spec::CONFIG_SIZE {
            return Err(SpecError::CapabilitiesTooLong { end });
        }
        Ok(())
    }
}

/// Why no function can be like its specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The Vendor ID is the one that says that there is no function.
    #[error("vendor ID 0xffff means that there is no function")]
    VendorAbsent,
    /// A BAR's size is no power of two.
    #[error("{index} is {size:#x} bytes, which is no power of two")]
    BarSizeNotPowerOfTwo {
        /// The BAR.
        index: BarIndex,
        /// Its size in bytes.
        size: u64,
    },
    /// A BAR is too small or too large for its kind.
    #[error("{index} is {size:#x} bytes; its kind can have {min:#x} to {max:#x}")]
    BarSizeOutOfRange {
        /// The BAR.
        index: BarIndex,
        /// Its size in bytes.
        size: u64,
        /// The smallest size of its kind.
        min: u64,
        /// The largest size of its kind.
        max: u64,
    },
    /// A 64-bit BAR in the last register.
    #[error("{index} is 64 bits wide, and no register follows it")]
    NoUpperHalf {
        /// The BAR.
        index: BarIndex,
    },
    /// The MSI-X table or Pending Bit Array is in no memory BAR.
    #[error("MSI-X needs {bar}, which is no memory BAR")]
    MsixNoMemoryBar {
        /// The BAR it is said to be in.
        bar: BarIndex,
    },
    /// The MSI-X table or Pending Bit Array starts where its register can't point.
    #[error("MSI-X can't start at {offset:#x}: no multiple of 8 below 4 GiB")]
    MsixMisplaced {
        /// The offset in its BAR.
        offset: u64,
    },
    /// The MSI-X table or Pending Bit Array leaves its BAR.
    #[error("MSI-X ends at {end:#x} of {bar}, past the end of it")]
    MsixOutsideBar {
        /// The BAR.
        bar: BarIndex,
        /// One past the last byte.
        end: u64,
    },
    /// The MSI-X table and Pending Bit Array overlap.
    #[error("the MSI-X table and the Pending Bit Array overlap")]
    MsixOverlap,
    /// An expansion ROM's size is no power of two from 2 KiB to 16 MiB.
    #[error("an expansion ROM can't have {size:#x} bytes")]
    RomSize {
        /// Its size in bytes.
        size: u32,
    },
    /// The capabilities do not fit into the 256 bytes that the list can reach.
    #[error("the capabilities end at {end:#x}, past 0x100")]
    CapabilitiesTooLong {
        /// One past the last byte.
        end: usize,
    },
    /// Two BARs want the same register.
    #[error("two BARs use the register of {slot}")]
    BarsOverlap {
        /// The register.
        slot: BarIndex,
    },
}

/// Who made a function and what it is (PCI 6.2.1 and 6.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor ID. 0xffff is no vendor's.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class Code.
    pub class: ClassCode,
}

/// What kind of function it is (PCI 6.2.1 and appendix D).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassCode {
    /// Base class.
    pub base: u8,
    /// Sub-class.
    pub sub: u8,
    /// Programming interface.
    pub interface: u8,
}

/// An INTx pin, as the Interrupt Pin register encodes it (PCI 6.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptPin {
    /// INTA#.
    A = 1,
    /// INTB#.
    B = 2,
    /// INTC#.
    C = 3,
    /// INTD#.
    D = 4,
}
