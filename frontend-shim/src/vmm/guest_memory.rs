//! RAM of the virtual machine.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use barkeep_protocol::wire::Errno;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::Loss;
use super::guest::{LOST_RAM, LOST_RAM_SIZE, RAM_SIZE};
use crate::client::DmaTarget;
use crate::hypervisor::{GuestAddress, HostMapping, HypervisorError, SlotId, SlotMapping, Vm};

pub(super) const RAM_SLOT: SlotId = SlotId(0);
pub(super) const LOST_RAM_SLOT: SlotId = SlotId(1);

/// RAM that the guest keeps, and RAM that it may lose.
pub(super) struct GuestMemory {
    pub(super) ram: Arc<HostMapping>,
    /// To be shared with backends.
    pub(super) file: OwnedFd,
    lost: LostRam,
}

struct LostRam {
    memory: Arc<HostMapping>,
    file: OwnedFd,
    loss: Loss,
}

impl GuestMemory {
    pub(super) fn new(loss: Loss) -> io::Result<Self> {
        let file = memory_file("barkeep-ram", RAM_SIZE)?;
        // It can't shrink under the backends.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let ram = Arc::new(HostMapping::from_fd(&file, 0, RAM_SIZE, true)?);
        let lost_file = memory_file("barkeep-lost-ram", LOST_RAM_SIZE)?;
        let memory = Arc::new(HostMapping::from_fd(&lost_file, 0, LOST_RAM_SIZE, true)?);
        Ok(Self { ram, file, lost: LostRam { memory, file: lost_file, loss } })
    }

    pub(super) fn map(&self, vm: &dyn Vm) -> Result<(), HypervisorError> {
        vm.map_slot(RAM_SLOT, SlotMapping::whole(GuestAddress(0), &self.ram))?;
        vm.map_slot(LOST_RAM_SLOT, SlotMapping::whole(LOST_RAM, &self.lost.memory))
    }

    /// `(start, length)` of all RAM.
    pub(super) fn ranges() -> [(u64, u64); 2] {
        [(0, RAM_SIZE), (LOST_RAM.0, LOST_RAM_SIZE)]
    }

    /// Takes the memory at [`LOST_RAM`] away, behind the guest's and the hypervisor's back.
    pub(super) fn lose(&self) -> io::Result<()> {
        match self.lost.loss {
            Loss::Protected => self.lost.memory.set_accessible(false),
            Loss::Vanished => Ok(ftruncate(&self.lost.file, 0)?),
        }
    }

    /// RAM is no MMIO: a hypervisor that gives such an exit has lost its memory, as KVM's emulator
    /// does. To answer it would go on with a guest whose memory reads as all ones.
    pub(super) fn refuse_mmio(&self, address: GuestAddress) -> Result<(), String> {
        let within = |(start, len): (u64, u64)| (start..start + len).contains(&address.0);
        if Self::ranges().into_iter().any(within) {
            return Err(format!("memory fault at {address} in RAM, which arrived as MMIO"));
        }
        Ok(())
    }
}

/// RAM, for backends that ask for it.
pub(super) struct RamByMessages(pub(super) Arc<HostMapping>);

impl DmaTarget for RamByMessages {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.read(address, data).map_err(|_| Errno::FAULT)
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.write(address, data).map_err(|_| Errno::FAULT)
    }
}

fn memory_file(name: &str, size: u64) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, size)?;
    Ok(file)
}
