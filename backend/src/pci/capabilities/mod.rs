//! The capability list (PCI 6.7).

pub(super) mod express;
pub(super) mod msi;
pub(super) mod power;

use self::express::ExpressCapability;
use self::msi::MsiCapability;
use self::power::PowerCapability;
use super::config_space::Register;
use super::function_spec::FunctionSpec;
use super::spec::{self, capability};

/// The capabilities of a function and where they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    pub(super) power: Option<PowerCapability>,
    pub(super) msi: Option<MsiCapability>,
    pub(super) express: Option<ExpressCapability>,
}

impl Capabilities {
    /// Gives each capability a place behind the header, doubleword aligned, in list order. All
    /// of them together end well below 0x100.
    pub(super) fn lay_out(spec: &FunctionSpec) -> Self {
        let mut free = spec::header::LENGTH;
        let mut take = |length: u8| {
            let at = free;
            free += length.next_multiple_of(4);
            at
        };
        Self {
            power: spec.power.map(|spec| PowerCapability::new(take(spec::power::LENGTH), spec)),
            msi: spec.msi.map(|spec| MsiCapability::new(take(spec.length()), spec)),
            express: spec
                .express
                .map(|spec| ExpressCapability::new(take(spec::express::LENGTH), spec)),
        }
    }

    /// Where the list starts, if there is one.
    pub(super) fn first(&self) -> Option<u8> {
        self.list().next().map(|(at, _)| at)
    }

    /// The registers of all capabilities, with the links of the list.
    pub(super) fn registers(&self) -> Vec<Register> {
        let mut registers = Vec::new();
        let next = self.list().skip(1).map(|(at, _)| at).chain([0]);
        for ((at, id), next) in self.list().zip(next) {
            let at = usize::from(at);
            registers.push(Register::byte("Capability ID", at + capability::ID).reset(id));
            registers.push(Register::byte("Next Capability", at + capability::NEXT).reset(next));
        }
        registers.extend(self.power.iter().flat_map(PowerCapability::registers));
        registers.extend(self.msi.iter().flat_map(MsiCapability::registers));
        registers.extend(self.express.iter().flat_map(ExpressCapability::registers));
        registers.sort_by_key(|register| register.offset);
        registers
    }

    /// Where each capability is, and its ID.
    fn list(&self) -> impl Iterator<Item = (u8, u8)> {
        let Self { power, msi, express } = self;
        [
            power.map(|power| (power.at(), spec::power::CAPABILITY_ID)),
            msi.map(|msi| (msi.at(), spec::msi::CAPABILITY_ID)),
            express.map(|express| (express.at(), spec::express::CAPABILITY_ID)),
        ]
        .into_iter()
        .flatten()
    }
}
