//! A software hypervisor for machines without KVM.
//!
//! It executes the x86-64 code of the built-in guest programs instruction by instruction, with the slots
//! and exits of a hardware hypervisor, so that everything above [`Hypervisor`] runs
//! and is tested the same way everywhere. What it leaves out: paging (virtual addresses are physical,
//! as the guests' identity mapping has it), privilege levels, interrupts and exceptions, and every
//! instruction that `crate::x86` does not know. Anything left out is a typed error, never a guess.
//!
//! Memory is ordered at least as strongly as on x86: loads acquire, stores release, locked
//! instructions are sequentially consistent.

mod slots;
#[cfg(test)]
mod tests;
mod vcpu;

use std::sync::Arc;

use self::slots::SharedSlots;
use self::vcpu::ModelVcpu;
use super::slots::Slot;
use super::{
    Hypervisor, HypervisorError, HypervisorKind, SlotId, SlotMapping, Vcpu, VcpuEntry, Vm,
};

/// A virtual machine in software.
#[derive(Debug, Default)]
pub struct Model {
    slots: Arc<SharedSlots>,
}

impl Model {
    /// A machine without memory slots.
    pub fn new() -> Model {
        Model::default()
    }
}

impl Hypervisor for Model {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Model
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        let slot = Slot::new(slot, mapping)?;
        self.slots.change(|table| table.insert(slot))
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        self.slots.change(|table| table.remove(slot).map(|_| ()))
    }
}

impl Vm for Model {
    fn create_vcpu(&self, id: u32, entry: &VcpuEntry) -> Result<Box<dyn Vcpu>, HypervisorError> {
        Ok(Box::new(ModelVcpu::new(id, entry, self.slots.reader())))
    }
}
