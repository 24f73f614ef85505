use std::sync::{Mutex, MutexGuard, PoisonError};

use super::table::Exclusive;
use super::{Abort, Access, BLOCK_SIZE, Entry, FaultStatus, IPA_LIMIT, Perms, Stage2};
use crate::GuestAddress;
use crate::hypervisor::PAGE_SIZE;

/// The guest-physical memory of one virtual machine: regions, and the stage-2 table that maps what the
/// guest has touched of them.
#[derive(Debug, Default)]
pub struct GuestMemory {
    table: Stage2,
    regions: Mutex<Regions>,
    dic: bool,
}

/// A memory slot and what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; a multiple of [`PAGE_SIZE`].
    pub ipa: GuestAddress,
    /// Bytes; a multiple of [`PAGE_SIZE`].
    pub size: u64,
    /// Host-physical address of the first byte; a multiple of [`PAGE_SIZE`].
    pub frame: u64,
    /// What the memory behind permits. No entry ever permits more.
    pub perms: Perms,
    /// What it is.
    pub kind: RegionKind,
}

/// What a region is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Memory, private to the guest or shared with the host.
    Ram {
        /// What it is now. An access that takes it for the other asks for a conversion.
        private: bool,
    },
    /// A memory slot that is read-only, `KVM_MEM_READONLY`: writes exit as MMIO.
    Rom,
    /// A BAR that is mapped into the guest.
    Bar {
        /// Whether its function claims it.
        decodes: bool,
        /// Whether its memory slot has been taken away; accesses exit as MMIO then.
        suspended: bool,
    },
}

/// A region that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Empty, not made of pages, or beyond the address space.
    #[error("a region of {size:#x} bytes at guest {ipa}, host {frame:#x}")]
    BadRange {
        /// First guest-physical address.
        ipa: GuestAddress,
        /// Bytes.
        size: u64,
        /// Host-physical address.
        frame: u64,
    },
    /// Some of its addresses are another region's.
    #[error("the region at guest {ipa} overlaps another")]
    Overlap {
        /// First guest-physical address.
        ipa: GuestAddress,
    },
}

/// What a fault handler needs to know of the region that a fault lies in, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The region.
    pub region: Region,
    /// Writes are tracked: pages only, and writable only once written.
    pub tracked: bool,
    /// Moves with every invalidation. What was found out under another number may be outdated
    /// (`mmu_invalidate_seq`).
    pub sequence: u64,
}

#[derive(Debug, Default)]
struct Regions {
    all: Vec<Tracked>,
    sequence: u64,
    dirty: Vec<GuestAddress>,
}

#[derive(Debug)]
struct Tracked {
    region: Region,
    tracked: bool,
}

impl GuestMemory {
    /// No memory. `dic` tells whether the processor needs no invalidation of its instruction cache to
    /// execute what was written as data (CTR_EL0.DIC): memory is mapped executable at once then.
    #[must_use]
    pub fn new(dic: bool) -> Self {
        Self { dic, ..Self::default() }
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> &Stage2 {
        &self.table
    }

    /// Whether memory is mapped executable at once.
    #[must_use]
    pub fn dic(&self) -> bool {
        self.dic
    }

    /// Adds a region; nothing of it is mapped.
    ///
    /// # Errors
    /// [`RegionError`]
    pub fn add(&self, region: Region) -> Result<(), RegionError> {
        let Region { ipa, size, frame, .. } = region;
        let ends =
            ipa.0.checked_add(size).filter(|end| *end <= IPA_LIMIT).zip(frame.checked_add(size));
        let aligned = (ipa.0 | size | frame).is_multiple_of(PAGE_SIZE);
        if size == 0 || !aligned || ends.is_none() {
            return Err(RegionError::BadRange { ipa, size, frame });
        }
        let mut regions = self.lock();
        if regions.all.iter().any(|other| other.region.overlaps(&region)) {
            return Err(RegionError::Overlap { ipa });
        }
        regions.all.push(Tracked { region, tracked: false });
        Ok(())
    }

    /// The region at `ipa`.
    #[must_use]
    pub fn backing(&self, ipa: GuestAddress) -> Option<Backing> {
        let regions = self.lock();
        let Tracked { region, tracked } =
            regions.all.iter().find(|entry| entry.region.contains(ipa))?;
        Some(Backing { region: *region, tracked: *tracked, sequence: regions.sequence })
    }

    /// Does an access as the hardware does: by what the table has, and nothing else.
    ///
    /// # Errors
    /// The [`Abort`] that stops it.
    pub fn access(&self, access: Access) -> Result<(), Abort> {
        match self.table.lookup(access.ipa) {
            Entry::Valid(leaf) if leaf.perms.contains(access.needs()) => Ok(()),
            Entry::Valid(leaf) => {
                Err(Abort { access, status: FaultStatus::Permission, granule: leaf.size })
            }
            Entry::Invalid { size } => {
                Err(Abort { access, status: FaultStatus::Translation, granule: size })
            }
        }
    }

    /// Unmaps all of the region at `ipa`, as reclaim or a change of its backing does. Without effect
    /// where there is no region.
    pub fn invalidate(&self, ipa: GuestAddress) {
        self.change(&mut self.table.exclusive(), ipa, |_| {});
    }

    /// The function of the BAR at `ipa` begins or ceases to claim it, and its memory becomes
    /// inaccessible while its slot stays: the order in which vfio-pci does it.
    pub fn set_decode(&self, ipa: GuestAddress, decode: bool) {
        self.change(&mut self.table.exclusive(), ipa, |region| {
            if let RegionKind::Bar { decodes, .. } = &mut region.kind {
                *decodes = decode;
            }
        });
    }

    /// Takes away the memory slot of a BAR, or gives it back.
    pub fn set_suspended(&self, ipa: GuestAddress, suspend: bool) {
        self.set_suspended_in(&mut self.table.exclusive(), ipa, suspend);
    }

    pub(super) fn set_suspended_in(
        &self,
        table: &mut Exclusive<'_>,
        ipa: GuestAddress,
        suspend: bool,
    ) {
        self.change(table, ipa, |region| {
            if let RegionKind::Bar { suspended, .. } = &mut region.kind {
                *suspended = suspend;
            }
        });
    }

    /// Converts the memory at `ipa` to private or shared.
    pub fn set_private(&self, ipa: GuestAddress, to: bool) {
        self.change(&mut self.table.exclusive(), ipa, |region| {
            if let RegionKind::Ram { private } = &mut region.kind {
                *private = to;
            }
        });
    }

    /// Begins to track writes to the region at `ipa`: takes write permission from all of it, after
    /// splitting its blocks if `split`. Otherwise blocks are broken by the first write to each.
    pub fn track_writes(&self, ipa: GuestAddress, split: bool) {
        let mut table = self.table.exclusive();
        let mut regions = self.lock();
        let Some(entry) = regions.all.iter_mut().find(|entry| entry.region.contains(ipa)) else {
            return;
        };
        entry.tracked = true;
        let Region { ipa, size, .. } = entry.region;
        regions.sequence += 1;
        if split {
            table.split(ipa, size).expect("a region is a range of pages");
        }
        table.write_protect(ipa, size).expect("a region is a range of pages");
    }

    /// The pages written since the last call, one entry for each time one was marked, and tracks them
    /// anew.
    #[must_use]
    pub fn take_dirty(&self) -> Vec<GuestAddress> {
        let mut table = self.table.exclusive();
        let mut regions = self.lock();
        let dirty = std::mem::take(&mut regions.dirty);
        for page in &dirty {
            table.write_protect(*page, PAGE_SIZE).expect("a page");
        }
        dirty
    }

    pub(super) fn mark_dirty(&self, page: GuestAddress) {
        self.lock().dirty.push(page);
    }

    /// Number of invalidations so far.
    pub(super) fn sequence(&self) -> u64 {
        self.lock().sequence
    }

    /// Changes the region at `ipa` and unmaps it, while no walk is under way.
    fn change(&self, table: &mut Exclusive<'_>, ipa: GuestAddress, edit: impl FnOnce(&mut Region)) {
        let mut regions = self.lock();
        let Some(entry) = regions.all.iter_mut().find(|entry| entry.region.contains(ipa)) else {
            return;
        };
        edit(&mut entry.region);
        let Region { ipa, size, .. } = entry.region;
        regions.sequence += 1;
        table.unmap(ipa, size).expect("a region is a range of pages");
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Region {
    /// Whether `ipa` is one of its addresses.
    #[must_use]
    pub fn contains(&self, ipa: GuestAddress) -> bool {
        self.ipa <= ipa && ipa.0 - self.ipa.0 < self.size
    }

    /// Host-physical address behind `ipa`, which must be in the region.
    #[must_use]
    pub fn frame_of(&self, ipa: GuestAddress) -> u64 {
        self.frame + (ipa.0 - self.ipa.0)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.ipa) || other.contains(self.ipa)
    }
}

impl Backing {
    /// The page or block that a fault at `ipa` is to map: the block where all of it is in the region,
    /// both sides are aligned alike and writes are not tracked (`fault_supports_stage2_huge_mapping`).
    #[must_use]
    pub fn extent(&self, ipa: GuestAddress) -> (GuestAddress, u64) {
        let block = ipa.0 - ipa.0 % BLOCK_SIZE;
        let region = &self.region;
        let fits = block >= region.ipa.0
            && block - region.ipa.0 + BLOCK_SIZE <= region.size
            && region.frame_of(GuestAddress(block)).is_multiple_of(BLOCK_SIZE);
        if fits && !self.tracked {
            (GuestAddress(block), BLOCK_SIZE)
        } else {
            (GuestAddress(ipa.0 - ipa.0 % PAGE_SIZE), PAGE_SIZE)
        }
    }

    /// The permissions that a fault of `access` is to grant: never more than the backing has, write
    /// only for a write where writes are tracked, execute only for a fetch unless `dic`
    /// (`user_mem_abort`, `gmem_abort`).
    #[must_use]
    pub fn grant(&self, access: &Access, dic: bool) -> Perms {
        let mut grant = access.needs().with(Perms::R);
        if !self.tracked && self.region.kind != RegionKind::Rom {
            grant = grant.with(Perms::W);
        }
        if dic {
            grant = grant.with(Perms::X);
        }
        grant.and(self.region.perms)
    }
}
