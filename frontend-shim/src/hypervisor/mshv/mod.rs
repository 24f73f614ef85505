//! Microsoft's hypervisor (mshv) on x86-64 Linux.
//!
//! **This adapter has never met a real mshv.** Everything but `vm.rs`, which makes the ioctls, is tested
//! against a model of the hypervisor's rules and against messages in the format that its headers give;
//! `vm.rs` itself has only been compiled, and what it does not do (interrupts, CPUID and MSR intercepts,
//! vector registers) is left out of the model too. How the model came by its rules is said there.
//!
//! A slot with RAM is mapped when it is added. A slot with a device's memory
//! ([`HostMapping::of_device`](super::HostMapping::of_device)) is mapped when the guest first accesses it,
//! all of it or page by page ([`MapPolicy`]). What can happen to an access that the hypervisor reports:
//!
//! | the address lies in | outcome |
//! |---|---|
//! | a slot that takes the access, page not mapped | the page, or all of it, is mapped; the guest goes on |
//! | the same, and another virtual CPU has just mapped it | the guest goes on; nothing is mapped twice |
//! | the same, but the host memory refuses | [`VcpuExit::MemoryFault`](super::VcpuExit::MemoryFault) with the page: the slot is suspended |
//! | a page that was mapped before the guest ran | its mapping has lost its host memory: it is removed, and as above |
//! | a slot that is read-only, for a write | [`VcpuExit::MmioWrite`](super::VcpuExit::MmioWrite) |
//! | no slot | [`VcpuExit::MmioRead`](super::VcpuExit::MmioRead) and [`VcpuExit::MmioWrite`](super::VcpuExit::MmioWrite) |
//! | nobody knows | a memory fault without an address |
//!
//! A suspended slot is not remembered as such: each later access tries again, so that it comes back as
//! soon as its memory does.

mod hypercalls;
mod message;
#[cfg(test)]
mod model;
mod policy;
#[cfg(test)]
mod recorded;
mod regions;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use std::sync::Arc;

use self::hypercalls::{Partition, Processor};
pub use self::policy::{GuestFrame, HostFrame, MapPlan, MapPolicy};
use self::regions::Regions;
use self::vcpu::MshvVcpu;
use self::vm::IoctlPartition;
use super::{
    Hypervisor, HypervisorError, HypervisorKind, SlotId, SlotMapping, Vcpu, VcpuEntry, Vm,
};

/// A virtual machine of Microsoft's hypervisor.
#[derive(Debug)]
pub struct Mshv {
    adapter: Adapter<IoctlPartition>,
}

impl Mshv {
    /// Opens `/dev/mshv` and creates a virtual machine.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`] says why mshv can't be used on this machine,
    /// [`HypervisorError::Call`] which call failed unexpectedly.
    pub fn open(policy: MapPolicy) -> Result<Mshv, HypervisorError> {
        Ok(Mshv { adapter: Adapter::new(IoctlPartition::open()?, policy) })
    }
}

impl Hypervisor for Mshv {
    fn kind(&self) -> HypervisorKind {
        self.adapter.kind()
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        self.adapter.map_slot(slot, mapping)
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        self.adapter.unmap_slot(slot)
    }
}

impl Vm for Mshv {
    fn create_vcpu(&self, id: u32, entry: &VcpuEntry) -> Result<Box<dyn Vcpu>, HypervisorError> {
        self.adapter.create_vcpu(id, entry)
    }
}

/// All of it, whatever makes the calls.
#[derive(Debug)]
struct Adapter<P> {
    regions: Arc<Regions<P>>,
}

impl<P: Partition> Adapter<P> {
    fn new(partition: P, policy: MapPolicy) -> Adapter<P> {
        Adapter { regions: Arc::new(Regions::new(partition, policy)) }
    }
}

impl<P: Partition> Hypervisor for Adapter<P> {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Mshv
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        self.regions.add(slot, mapping)
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        self.regions.remove(slot)
    }
}

impl<P: Partition> Vm for Adapter<P> {
    fn create_vcpu(&self, id: u32, entry: &VcpuEntry) -> Result<Box<dyn Vcpu>, HypervisorError> {
        let mut processor = self.regions.partition().create_processor(id)?;
        processor.enter_long_mode(entry)?;
        Ok(Box::new(MshvVcpu::new(id, processor, Arc::clone(&self.regions))))
    }
}
