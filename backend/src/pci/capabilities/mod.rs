//! The capability list (PCI 6.7) and the extended capability list (PCIe 7.6).

pub(super) mod aer;
pub(super) mod express;
pub(super) mod msi;
pub(super) mod msix;
pub(super) mod power;
pub(super) mod vendor;

use self::aer::AerCapability;
use self::express::ExpressCapability;
use self::msi::MsiCapability;
use self::msix::MsixCapability;
use self::power::PowerCapability;
use super::config_space::Register;
use super::function_spec::FunctionSpec;
use super::spec::{self, capability, extended_capability};

/// The capabilities of a function and where they are.
#[derive(Clone, Debug)]
pub(super) struct Capabilities {
    pub(super) power: Option<PowerCapability>,
    pub(super) msi: Option<MsiCapability>,
    pub(super) msix: Option<MsixCapability>,
    pub(super) express: Option<ExpressCapability>,
    pub(super) aer: Option<AerCapability>,
    /// Where the vendor-specific capabilities are, in the order of the specification.
    vendor: Vec<u8>,
    /// Where the one is that is a window to BARs.
    pub(super) bar_window: Option<u8>,
}

impl Capabilities {
    /// Gives each capability a place behind the header, doubleword aligned, in list order. The
    /// specification was checked to leave room for all of them.
    pub(super) fn lay_out(spec: &FunctionSpec) -> Self {
        let mut free = usize::from(spec::header::LENGTH);
        let mut take = |length: usize| {
            let at = u8::try_from(free).expect("capabilities end by 0x100");
            free += length.next_multiple_of(4);
            at
        };
        let mut capabilities = Self {
            power: spec
                .power
                .map(|spec| PowerCapability::new(take(spec::power::LENGTH.into()), spec)),
            msi: spec.msi.map(|spec| MsiCapability::new(take(spec.length().into()), spec)),
            msix: spec.msix.map(|spec| MsixCapability::new(take(spec::msix::LENGTH.into()), spec)),
            express: spec
                .express
                .map(|spec| ExpressCapability::new(take(spec::express::LENGTH.into()), spec)),
            aer: spec
                .express
                .filter(|express| express.aer)
                .map(|_| AerCapability::new(extended_capability::FIRST)),
            vendor: spec.vendor.iter().map(|vendor| take(vendor.length())).collect(),
            bar_window: None,
        };
        let window = spec
            .bar_window
            .filter(|&index| spec.vendor.get(index).is_some_and(vendor::VendorSpec::has_window));
        capabilities.bar_window = window.map(|index| capabilities.vendor[index]);
        capabilities
    }

    /// Where the last capability of a function like this ends.
    pub(super) fn end(spec: &FunctionSpec) -> usize {
        let lengths = [
            spec.power.map(|_| spec::power::LENGTH.into()),
            spec.msi.map(|msi| msi.length().into()),
            spec.msix.map(|_| spec::msix::LENGTH.into()),
            spec.express.map(|_| spec::express::LENGTH.into()),
        ];
        let vendor = spec.vendor.iter().map(vendor::VendorSpec::length);
        let lengths = lengths.into_iter().flatten().chain(vendor);
        usize::from(spec::header::LENGTH)
            + lengths.map(|length: usize| length.next_multiple_of(4)).sum::<usize>()
    }

    /// Where the list starts, if there is one.
    pub(super) fn first(&self) -> Option<u8> {
        self.list().next().map(|(at, _)| at)
    }

    /// The registers of all capabilities, with the links of the lists.
    pub(super) fn registers(&self, spec: &FunctionSpec) -> Vec<Register> {
        let mut registers = Vec::new();
        let next = self.list().skip(1).map(|(at, _)| at).chain([0]);
        for ((at, id), next) in self.list().zip(next) {
            let at = usize::from(at);
            registers.push(Register::byte("Capability ID", at + capability::ID).reset(id));
            registers.push(Register::byte("Next Capability", at + capability::NEXT).reset(next));
        }
        registers.extend(self.power.iter().flat_map(PowerCapability::registers));
        registers.extend(self.msi.iter().flat_map(MsiCapability::registers));
        registers.extend(self.msix.iter().flat_map(MsixCapability::registers));
        registers.extend(self.express.iter().flat_map(ExpressCapability::registers));
        for (vendor, &at) in spec.vendor.iter().zip(&self.vendor) {
            registers.extend(vendor.registers(at.into()));
        }
        if let Some(aer) = self.aer {
            registers.push(extended(aer.at(), spec::aer::CAPABILITY_ID, spec::aer::VERSION));
            registers.extend(aer.registers());
        }
        registers.sort_by_key(|register| register.offset);
        registers
    }

    /// Where each capability is, and its ID.
    fn list(&self) -> impl Iterator<Item = (u8, u8)> {
        let Self { power, msi, msix, express, aer: _, vendor, bar_window: _ } = self;
        [
            power.map(|power| (power.at(), spec::power::CAPABILITY_ID)),
            msi.map(|msi| (msi.at(), spec::msi::CAPABILITY_ID)),
            msix.map(|msix| (msix.at(), spec::msix::CAPABILITY_ID)),
            express.map(|express| (express.at(), spec::express::CAPABILITY_ID)),
        ]
        .into_iter()
        .flatten()
        .chain(vendor.iter().map(|&at| (at, spec::vendor::CAPABILITY_ID)))
    }
}

/// The header of the last extended capability.
fn extended(at: usize, id: u16, version: u32) -> Register {
    Register::dword("Extended Capability Header", at)
        .reset(u32::from(id) | version << extended_capability::VERSION_SHIFT)
}
