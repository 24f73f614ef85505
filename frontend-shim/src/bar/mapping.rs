use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use barkeep_protocol::wire::RegionInfo;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, SlotId, SlotMapping,
};

/// A BAR whose memory the backend shares: the host mapping and its slot.
#[derive(Debug)]
pub(super) struct BarMapping {
    memory: Arc<HostMapping>,
    slot: SlotId,
    mapped_at: Option<GuestAddress>,
}

impl BarMapping {
    /// Maps the file that a backend sent for a region.
    ///
    /// The file must be as long as the region; that it stays so is certain only for one sealed
    /// against shrinking. Others are taken too, with a warning: a shared file can't be sealed.
    pub(super) fn new(region: &RegionInfo, file: &OwnedFd, slot: SlotId) -> io::Result<Self> {
        let end = region.file_offset.checked_add(region.size);
        let length = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
        if end.is_none_or(|end| end > length) {
            return Err(io::Error::other(format!("file of {length} bytes is shorter than it")));
        }
        if !fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            tracing::warn!(
                region = region.index,
                "the backend's memory is not sealed: if its file is truncated, this VM dies"
            );
        }
        let memory = HostMapping::from_fd(file, region.file_offset, region.size, true)?.of_device();
        Ok(Self { memory: Arc::new(memory), slot, mapped_at: None })
    }

    /// Where the slot is, if it is there.
    pub(super) fn mapped_at(&self) -> Option<GuestAddress> {
        self.mapped_at
    }

    /// Makes the memory visible to the guest at `address`. Idempotent.
    pub(super) fn map(
        &mut self,
        hypervisor: &dyn Hypervisor,
        address: GuestAddress,
    ) -> Result<(), MappingError> {
        if self.mapped_at != Some(address) {
            self.suspend(hypervisor)?;
            hypervisor.map_slot(self.slot, SlotMapping::whole(address, &self.memory))?;
            self.mapped_at = Some(address);
        }
        Ok(self.memory.set_accessible(true)?)
    }

    /// Takes the memory away from the guest: when it returns, every access exits as MMIO. Idempotent.
    ///
    /// A hypervisor may fail to remove a slot for lack of memory. The slot then stays with memory
    /// that refuses access, so that no access reaches the device, and goes at the next attempt.
    pub(super) fn suspend(&mut self, hypervisor: &dyn Hypervisor) -> Result<(), MappingError> {
        if self.mapped_at.is_some() {
            if let Err(error) = hypervisor.unmap_slot(self.slot) {
                self.memory.set_accessible(false)?;
                return Err(error.into());
            }
            self.mapped_at = None;
        }
        Ok(())
    }

    /// Refuses access to the memory behind the slot, as vfio-pci does when a device stops to decode.
    pub(super) fn refuse_access(&self) -> io::Result<()> {
        self.memory.set_accessible(false)
    }
}

/// Why a slot is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum MappingError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("mprotect: {0}")]
    Protection(#[from] io::Error),
}
