use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use barkeep_protocol::wire::{RegionInfo, SparseArea};
use rustix::fs::{
    FileType, FsWord, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, readlink,
};
use rustix::io::Errno;

use super::written::Written;
use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, PAGE_SIZE, Protection, SlotId,
    SlotMapping,
};

/// A BAR whose memory the backend shares: the host mappings and their slots.
#[derive(Debug)]
pub(super) struct BarMapping {
    /// The parts that may be mapped, by offset; they don't overlap.
    areas: Vec<Area>,
    mapped_at: Option<GuestAddress>,
    size: u64,
    /// Access was refused and not given back yet.
    refused: bool,
    /// Given up: it gets no slot any more.
    quarantined: bool,
    /// What was written, while that is tracked.
    written: Option<Written>,
}

/// A part of a BAR: usually all of it, or what lies around an MSI-X table.
#[derive(Debug)]
struct Area {
    offset: u64,
    memory: Arc<HostMapping>,
    slot: SlotId,
    /// Whether the hypervisor has the slot.
    present: bool,
}

/// Of a file system (statfs(2)).
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;

/// More parts than any device leaves: a page of vectors cuts a BAR in two.
const MAX_AREAS: usize = 16;

impl BarMapping {
    /// Maps the file that a backend sent for a region.
    ///
    /// `None` for one that could be truncated afterwards: the next access would end the VM with a
    /// SIGBUS, and from inside the guest with a memory fault that nothing resolves. Its BAR is
    /// trapped. A memfd is sealed here if its owner has not done it. A device (vfio) has no length;
    /// its driver checks the range.
    pub(super) fn new(
        region: &RegionInfo,
        file: &OwnedFd,
        slots: &mut dyn FnMut() -> SlotId,
    ) -> io::Result<Option<Self>> {
        if !is_device(file)? {
            if !keeps_its_length(file) {
                return Ok(None);
            }
            let end = region.file_offset.checked_add(region.size);
            let length = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
            if end.is_none_or(|end| end > length) {
                return Err(io::Error::other(format!("file of {length} bytes is shorter than it")));
            }
        }
        let mut areas = Vec::new();
        for SparseArea { offset, size } in parts(region)? {
            let at = region.file_offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
            let memory = Arc::new(HostMapping::from_fd(file, at, size, true)?.of_device());
            areas.push(Area { offset, memory, slot: slots(), present: false });
        }
        Ok(Some(Self {
            areas,
            mapped_at: None,
            size: region.size,
            refused: false,
            quarantined: false,
            written: None,
        }))
    }

    /// Where the BAR is mapped, if it is.
    pub(super) fn mapped_at(&self) -> Option<GuestAddress> {
        self.mapped_at
    }

    /// Offset and length of each part that has a slot when the BAR is mapped.
    pub(super) fn parts(&self) -> impl Iterator<Item = (u64, u64)> {
        self.areas.iter().map(|area| (area.offset, area.memory.len()))
    }

    /// The slots of those parts.
    pub(super) fn slots(&self) -> impl Iterator<Item = SlotId> {
        self.areas.iter().map(|area| area.slot)
    }

    /// Makes the memory visible to the guest, with the BAR at `address`: all of it or nothing.
    /// Idempotent.
    pub(super) fn map(
        &mut self,
        hypervisor: &dyn Hypervisor,
        address: GuestAddress,
    ) -> Result<(), MappingError> {
        if self.quarantined {
            return Ok(());
        }
        if self.mapped_at != Some(address) {
            self.suspend(hypervisor)?;
            // From the first slot on, also if a later one fails and does not let itself be removed.
            self.mapped_at = Some(address);
        }
        if let Err(error) = self.map_areas(hypervisor, address) {
            self.suspend(hypervisor)?;
            return Err(error.into());
        }
        self.restore_access()
    }

    fn map_areas(
        &mut self,
        hypervisor: &dyn Hypervisor,
        address: GuestAddress,
    ) -> Result<(), HypervisorError> {
        // Some are there already where the others were removed and these could not be.
        for area in self.areas.iter_mut().filter(|area| !area.present) {
            let guest = GuestAddress(address.0 + area.offset);
            hypervisor.map_slot(area.slot, SlotMapping::whole(guest, &area.memory))?;
            area.present = true;
        }
        Ok(())
    }

    /// Takes the memory away from the guest: when it returns, every access exits as MMIO. Idempotent.
    ///
    /// A hypervisor may fail to remove a slot for lack of memory. The slot then stays with memory
    /// that refuses access, so that no access reaches the device, and goes at the next attempt.
    pub(super) fn suspend(&mut self, hypervisor: &dyn Hypervisor) -> Result<(), MappingError> {
        for area in self.areas.iter_mut().filter(|area| area.present) {
            if let Err(error) = hypervisor.unmap_slot(area.slot) {
                self.refuse_access()?;
                return Err(error.into());
            }
            area.present = false;
        }
        self.mapped_at = None;
        Ok(())
    }

    /// Gives up on slots for this session; `false` if that had been done. Writes go on to be tracked.
    pub(super) fn quarantine(&mut self) -> bool {
        !std::mem::replace(&mut self.quarantined, true)
    }

    pub(super) fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    /// Refuses access to the memory behind the slots, as vfio-pci does when a device stops to decode.
    pub(super) fn refuse_access(&mut self) -> io::Result<()> {
        self.refused = true;
        self.areas.iter().try_for_each(|area| area.memory.set_accessible(false))
    }

    /// Gives access back to memory that is mapped: all of it, or with writes tracked, writing only to
    /// what is written already.
    fn restore_access(&mut self) -> Result<(), MappingError> {
        if let Some(written) = &self.written {
            self.refuse_writes()?;
            written.ranges().iter().try_for_each(|range| self.allow_writes(range))?;
        } else {
            self.areas.iter().try_for_each(|area| area.memory.set_accessible(true))?;
        }
        self.refused = false;
        Ok(())
    }

    /// Resolves a fault on memory that is there: gives back what was missing for this access.
    pub(super) fn relax(
        &mut self,
        offset: u64,
        len: u64,
        writes: bool,
    ) -> Result<(), MappingError> {
        let touched = if writes { self.note_write(offset, len) } else { None };
        match touched {
            // Also what was written before: it may still be protected.
            Some(touched) if !self.refused => Ok(self.allow_writes(&touched)?),
            // What is tracked is write-protected on purpose.
            None if !self.refused && self.written.is_some() => Ok(()),
            _ => self.restore_access(),
        }
    }

    /// Notes a write and returns the grains that it touches; `None` where writes are not tracked.
    pub(super) fn note_write(&mut self, offset: u64, len: u64) -> Option<Range<u64>> {
        Some(self.written.as_mut()?.note(offset, len))
    }

    /// The same for a write that can have been anywhere, and lets it go on.
    pub(super) fn note_all(&mut self) -> Result<(), MappingError> {
        if self.refused { Ok(()) } else { self.relax(0, self.size, true) }
    }

    /// Tracks writes if they were tracked in the memory that this one takes the place of. All of it
    /// differs from what was there, so all of it counts as written.
    pub(super) fn go_on_tracking(&mut self, last: &Self) {
        self.written = last.written.as_ref().map(|_| {
            let mut written = Written::nothing(self.size);
            written.note(0, self.size);
            written
        });
    }

    pub(super) fn tracks_writes(&self) -> bool {
        self.written.is_some()
    }

    /// Starts to track writes: none so far.
    ///
    /// On an error, everything is tracked as it was before.
    pub(super) fn track_writes(&mut self) -> Result<(), MappingError> {
        // Memory that refuses access stays so: it may belong to a function that does not decode.
        if !self.refused {
            self.refuse_writes()?;
        }
        self.written = Some(Written::nothing(self.size));
        Ok(())
    }

    /// Ends tracking.
    pub(super) fn stop_tracking(&mut self) -> Result<(), MappingError> {
        self.written = None;
        if self.refused { Ok(()) } else { self.restore_access() }
    }

    /// What was written since tracking began or this was asked last; `None` if writes are not tracked.
    pub(super) fn take_written(&mut self) -> Result<Option<Vec<Range<u64>>>, MappingError> {
        let Some(written) = &self.written else { return Ok(None) };
        let ranges = written.ranges();
        self.track_writes()?;
        Ok(Some(ranges))
    }

    fn refuse_writes(&self) -> io::Result<()> {
        self.areas
            .iter()
            .try_for_each(|area| area.memory.protect(0, area.memory.len(), Protection::ReadOnly))
    }

    fn allow_writes(&self, range: &Range<u64>) -> io::Result<()> {
        for area in &self.areas {
            let end = area.offset + area.memory.len();
            let (start, end) = (range.start.max(area.offset), range.end.min(end));
            if start < end {
                area.memory.protect(start - area.offset, end - start, Protection::ReadWrite)?;
            }
        }
        Ok(())
    }
}

/// Whether the memory is a device's, which keeps its length. A device of VFIO has a character device's
/// file, or one of no type at all that only its name in /proc tells from others.
fn is_device(file: &OwnedFd) -> Result<bool, Errno> {
    Ok(match FileType::from_raw_mode(fstat(file)?.st_mode) {
        FileType::CharacterDevice => true,
        FileType::Unknown => {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            readlink(path, Vec::new())
                .is_ok_and(|name| name.to_bytes() == b"anon_inode:[vfio-device]")
        }
        _ => false,
    })
}

/// Seals a file against shrinking, unless it is; `false` if it can't be, or if that keeps no memory
/// behind it: pages of hugetlbfs can be punched out, and the pool need not have others then.
fn keeps_its_length(file: &OwnedFd) -> bool {
    if fstatfs(file).is_ok_and(|system| system.f_type == HUGETLBFS_MAGIC) {
        return false;
    }
    let sealed = || fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    // What counts is what is there afterwards.
    sealed() || (fcntl_add_seals(file, SealFlags::SHRINK).is_ok() && sealed())
}

/// The parts of a region that may be mapped, checked: a backend may be as hostile as a guest.
fn parts(region: &RegionInfo) -> io::Result<Vec<SparseArea>> {
    let whole = SparseArea { offset: 0, size: region.size };
    let mut parts = if region.sparse.is_empty() { vec![whole] } else { region.sparse.clone() };
    parts.retain(|part| part.size > 0);
    parts.sort_by_key(|part| part.offset);
    let mut end = 0;
    for part in &parts {
        let aligned = part.offset.is_multiple_of(PAGE_SIZE) && part.size.is_multiple_of(PAGE_SIZE);
        let next = part.offset.checked_add(part.size).filter(|next| *next <= region.size);
        match next {
            Some(next) if aligned && part.offset >= end => end = next,
            _ => return Err(io::Error::other("a part that it lets map is out of place")),
        }
    }
    if parts.is_empty() || parts.len() > MAX_AREAS {
        return Err(io::Error::other(format!("it lets {} parts map", parts.len())));
    }
    Ok(parts)
}

/// Why a slot is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum MappingError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("mprotect: {0}")]
    Protection(#[from] io::Error),
}
