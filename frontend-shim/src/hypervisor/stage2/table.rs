use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Perms;
use super::walk::Walk;
use crate::GuestAddress;
use crate::hypervisor::PAGE_SIZE;

/// What one entry of the level above pages spans: 2 MiB, with pages of 4 KiB.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Guest-physical addresses end here: 48 bits, the most that two-stage translation with pages of
/// 4 KiB has without FEAT_LPA2.
pub const IPA_LIMIT: u64 = 1 << 48;

pub(super) const PAGES_PER_BLOCK: usize = 512;

/// A stage-2 page table in software: from guest-physical addresses (IPAs) to host memory.
///
/// Entries are pages of 4 KiB and blocks of 2 MiB. Fault handlers of several vCPUs change it at the
/// same time ("shared" walks); each of their steps is an atomic operation on one entry, and who finds
/// that an entry has moved since it was read loses with [`TableError::Again`]. Taking mappings away
/// excludes them ([`Exclusive`]). Return codes are those of Linux' arch/arm64/kvm/hyp/pgtable.c. TLBs
/// and caches are left out.
#[derive(Debug, Default)]
pub struct Stage2 {
    inner: Mutex<Inner>,
    idle: Condvar,
}

/// Why a change of the table was not made, or not made to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// `EAGAIN`: somebody else changed the entry, or is about to; or `map` met an entry that maps
    /// the same memory already, whatever its permissions; or `relax` met no valid entry. The
    /// expected answer is to let the guest execute the instruction again.
    #[error("the entry is not what the walk expected; execute the instruction again")]
    Again,
    /// `EINVAL` or `ERANGE`: an empty or misaligned range, or one past [`IPA_LIMIT`].
    #[error("a range that is empty, misaligned or beyond the guest-physical address space")]
    BadRange,
}

/// What the table has at an address, as the hardware would find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing valid: an access takes a translation fault. So it is while an entry is being replaced.
    Invalid {
        /// Bytes that an entry there would span: [`PAGE_SIZE`] or [`BLOCK_SIZE`].
        size: u64,
    },
    /// A page or a block.
    Valid(Leaf),
}

/// A valid page or block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First guest-physical address.
    pub ipa: GuestAddress,
    /// Bytes: [`PAGE_SIZE`] or [`BLOCK_SIZE`].
    pub size: u64,
    /// Host-physical address of the first byte.
    pub frame: u64,
    /// What the guest may do there.
    pub perms: Perms,
}

impl Stage2 {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `size` bytes at `ipa` to host memory from `frame`, with blocks where all three allow it.
    ///
    /// An entry that maps the same memory already is left as it is, even where its permissions
    /// differ: that is [`relax`](Self::relax)'s business (`stage2_map_walker_try_leaf`,
    /// `stage2_pte_needs_update`). One that maps other memory, or memory of another size, is broken
    /// first and made new second, and what a broken block mapped beyond the range is gone; it comes
    /// back by faults.
    ///
    /// # Errors
    /// [`TableError::Again`] as above, identical mappings included, or where another walk was faster.
    /// What lies before that entry has been mapped. [`TableError::BadRange`].
    pub fn map(
        &self,
        ipa: GuestAddress,
        size: u64,
        frame: u64,
        perms: Perms,
    ) -> Result<(), TableError> {
        self.shared().map(ipa, size, frame, perms)?.run()
    }

    /// Adds permissions to the valid page or block at `ipa`. Never takes one away, and is no error
    /// where they are there already (`kvm_pgtable_stage2_relax_perms`, `stage2_attr_walker`).
    ///
    /// # Errors
    /// [`TableError::Again`] without a valid entry, or where another walk was faster.
    pub fn relax(&self, ipa: GuestAddress, perms: Perms) -> Result<(), TableError> {
        self.shared().relax(ipa, perms).run()
    }

    /// Removes everything that lies in the range, and the whole of a block that lies in it partly
    /// (`stage2_unmap_walker`). Waits for shared walks to end.
    ///
    /// # Errors
    /// [`TableError::BadRange`]
    pub fn unmap(&self, ipa: GuestAddress, size: u64) -> Result<(), TableError> {
        self.exclusive().unmap(ipa, size)
    }

    /// What is mapped at `ipa`.
    #[must_use]
    pub fn lookup(&self, ipa: GuestAddress) -> Entry {
        self.lock().lookup(ipa.0)
    }

    /// A number that moves whenever the entry that covers `ipa` changes.
    #[must_use]
    pub fn changes(&self, ipa: GuestAddress) -> u64 {
        self.lock().changes(ipa.0)
    }

    /// Whether a walk is replacing the entry that covers `ipa` at this moment.
    #[must_use]
    pub fn is_being_replaced(&self, ipa: GuestAddress) -> bool {
        self.lock().is_locked(ipa.0)
    }

    /// All valid entries by address.
    #[must_use]
    pub fn leaves(&self) -> Vec<Leaf> {
        self.lock().leaves()
    }

    /// Begins a walk that shares the table with other walks, as a fault handler does.
    #[must_use]
    pub fn shared(&self) -> Shared<'_> {
        self.lock().walkers += 1;
        Shared { table: self }
    }

    /// Waits until no walk is under way, and keeps others from beginning.
    #[must_use]
    pub fn exclusive(&self) -> Exclusive<'_> {
        let inner = self
            .idle
            .wait_while(self.lock(), |inner| inner.walkers > 0)
            .unwrap_or_else(PoisonError::into_inner);
        Exclusive { inner }
    }

    /// As [`exclusive`](Self::exclusive), unless a walk is under way.
    #[must_use]
    pub fn try_exclusive(&self) -> Option<Exclusive<'_>> {
        let inner = self.lock();
        (inner.walkers == 0).then_some(Exclusive { inner })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to walk the table together with others. Lasts until dropped.
#[derive(Debug)]
pub struct Shared<'t> {
    pub(super) table: &'t Stage2,
}

impl<'t> Shared<'t> {
    /// A walk that does [`Stage2::map`] step by step.
    ///
    /// # Errors
    /// [`TableError::BadRange`]
    pub fn map(
        self,
        ipa: GuestAddress,
        size: u64,
        frame: u64,
        perms: Perms,
    ) -> Result<Walk<'t>, TableError> {
        let end = range_end(ipa, size)?;
        if !frame.is_multiple_of(PAGE_SIZE) || frame.checked_add(size).is_none() {
            return Err(TableError::BadRange);
        }
        Ok(Walk::map(self, ipa.0, end, frame, perms))
    }

    /// A walk that does [`Stage2::relax`] step by step.
    #[must_use]
    pub fn relax(self, ipa: GuestAddress, perms: Perms) -> Walk<'t> {
        Walk::relax(self, ipa.0, perms)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let mut inner = self.table.lock();
        inner.walkers -= 1;
        if inner.walkers == 0 {
            self.table.idle.notify_all();
        }
    }
}

/// The table without anybody else in it.
#[derive(Debug)]
pub struct Exclusive<'t> {
    inner: MutexGuard<'t, Inner>,
}

impl Exclusive<'_> {
    /// See [`Stage2::unmap`].
    ///
    /// # Errors
    /// [`TableError::BadRange`]
    pub fn unmap(&mut self, ipa: GuestAddress, size: u64) -> Result<(), TableError> {
        let end = range_end(ipa, size)?;
        let inner = &mut *self.inner;
        for (index, slot) in slots_in(&mut inner.slots, ipa.0, end) {
            let changed = match &mut slot.state {
                SlotState::Table(pages) => {
                    for at in pages_in(*index, ipa.0, end) {
                        if pages[at].state != PageState::Invalid {
                            pages[at] =
                                Page { state: PageState::Invalid, stamp: tick(&mut inner.clock) };
                        }
                    }
                    pages.iter().all(|page| page.state == PageState::Invalid)
                }
                SlotState::Block { .. } => true,
                SlotState::Invalid | SlotState::Locked => false,
            };
            if changed {
                *slot = Slot { state: SlotState::Invalid, stamp: tick(&mut inner.clock) };
            }
        }
        Ok(())
    }

    /// Takes write permission from every valid entry that lies in the range, wholly or partly, as
    /// dirty tracking does when it begins (`kvm_pgtable_stage2_wrprotect`).
    ///
    /// # Errors
    /// [`TableError::BadRange`]
    pub fn write_protect(&mut self, ipa: GuestAddress, size: u64) -> Result<(), TableError> {
        let end = range_end(ipa, size)?;
        let inner = &mut *self.inner;
        for (index, slot) in slots_in(&mut inner.slots, ipa.0, end) {
            match &mut slot.state {
                SlotState::Table(pages) => {
                    for page in &mut pages[pages_in(*index, ipa.0, end)] {
                        if let PageState::Valid { perms, .. } = &mut page.state
                            && perms.contains(Perms::W)
                        {
                            *perms = perms.without(Perms::W);
                            page.stamp = tick(&mut inner.clock);
                        }
                    }
                }
                SlotState::Block { perms, .. } if perms.contains(Perms::W) => {
                    *perms = perms.without(Perms::W);
                    slot.stamp = tick(&mut inner.clock);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Replaces every block that lies in the range, wholly or partly, by pages with the same
    /// permissions (`kvm_pgtable_stage2_split`).
    ///
    /// # Errors
    /// [`TableError::BadRange`]
    pub fn split(&mut self, ipa: GuestAddress, size: u64) -> Result<(), TableError> {
        let end = range_end(ipa, size)?;
        let inner = &mut *self.inner;
        for (_, slot) in slots_in(&mut inner.slots, ipa.0, end) {
            if let SlotState::Block { frame, perms } = slot.state {
                let stamp = tick(&mut inner.clock);
                let page = |index| {
                    let frame = frame + index * PAGE_SIZE;
                    Page { state: PageState::Valid { frame, perms }, stamp }
                };
                let pages = (0..PAGES_PER_BLOCK as u64).map(page).collect();
                *slot = Slot { state: SlotState::Table(pages), stamp };
            }
        }
        Ok(())
    }
}

/// The entries themselves. Each write of one gets a new stamp, so that "has it moved since I read it"
/// is a comparison of stamps; a page's stamp counts only below the stamp of its table.
#[derive(Debug, Default)]
pub(super) struct Inner {
    slots: BTreeMap<u64, Slot>,
    clock: u64,
    walkers: u32,
}

/// One entry of the level above pages. An invalid one stays, for its stamp.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    pub(super) stamp: u64,
}

#[derive(Debug)]
pub(super) enum SlotState {
    Invalid,
    /// Broken by a walk that is about to make it new.
    Locked,
    Block {
        frame: u64,
        perms: Perms,
    },
    Table(Vec<Page>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) state: PageState,
    pub(super) stamp: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageState {
    Invalid,
    /// Broken by a walk that is about to make it new.
    Locked,
    Valid {
        frame: u64,
        perms: Perms,
    },
}

impl Inner {
    pub(super) fn slot(&self, ipa: u64) -> Option<&Slot> {
        self.slots.get(&(ipa / BLOCK_SIZE))
    }

    /// The page entry at `ipa`, if its table is still the one with stamp `table`.
    pub(super) fn page(&self, ipa: u64, table: u64) -> Option<&Page> {
        match self.slot(ipa) {
            Some(Slot { state: SlotState::Table(pages), stamp }) if *stamp == table => {
                Some(&pages[page_index(ipa)])
            }
            _ => None,
        }
    }

    pub(super) fn set_slot(&mut self, ipa: u64, state: SlotState) -> u64 {
        let stamp = tick(&mut self.clock);
        match self.slots.entry(ipa / BLOCK_SIZE) {
            MapEntry::Occupied(mut slot) => *slot.get_mut() = Slot { state, stamp },
            MapEntry::Vacant(slot) => {
                slot.insert(Slot { state, stamp });
            }
        }
        stamp
    }

    /// Writes the page entry at `ipa`; without effect where there is no table.
    pub(super) fn set_page(&mut self, ipa: u64, state: PageState) -> u64 {
        let stamp = tick(&mut self.clock);
        if let Some(Slot { state: SlotState::Table(pages), .. }) =
            self.slots.get_mut(&(ipa / BLOCK_SIZE))
        {
            pages[page_index(ipa)] = Page { state, stamp };
        }
        stamp
    }

    /// A table of invalid pages, to be put into a slot.
    pub(super) fn empty_table(&self) -> SlotState {
        let page = Page { state: PageState::Invalid, stamp: self.clock };
        SlotState::Table(vec![page; PAGES_PER_BLOCK])
    }

    fn lookup(&self, ipa: u64) -> Entry {
        match self.slot(ipa).map(|slot| &slot.state) {
            Some(SlotState::Block { frame, perms }) => Entry::Valid(Leaf {
                ipa: GuestAddress(ipa - ipa % BLOCK_SIZE),
                size: BLOCK_SIZE,
                frame: *frame,
                perms: *perms,
            }),
            Some(SlotState::Table(pages)) => match pages[page_index(ipa)].state {
                PageState::Valid { frame, perms } => {
                    let ipa = GuestAddress(ipa - ipa % PAGE_SIZE);
                    Entry::Valid(Leaf { ipa, size: PAGE_SIZE, frame, perms })
                }
                PageState::Invalid | PageState::Locked => Entry::Invalid { size: PAGE_SIZE },
            },
            None | Some(SlotState::Invalid | SlotState::Locked) => {
                Entry::Invalid { size: BLOCK_SIZE }
            }
        }
    }

    fn changes(&self, ipa: u64) -> u64 {
        match self.slot(ipa) {
            Some(Slot { state: SlotState::Table(pages), stamp }) => {
                pages[page_index(ipa)].stamp.max(*stamp)
            }
            Some(slot) => slot.stamp,
            None => 0,
        }
    }

    fn is_locked(&self, ipa: u64) -> bool {
        match self.slot(ipa).map(|slot| &slot.state) {
            Some(SlotState::Locked) => true,
            Some(SlotState::Table(pages)) => pages[page_index(ipa)].state == PageState::Locked,
            _ => false,
        }
    }

    fn leaves(&self) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        for (index, slot) in &self.slots {
            let entries = match slot.state {
                SlotState::Table(_) => PAGES_PER_BLOCK as u64,
                _ => 1,
            };
            for entry in 0..entries {
                if let Entry::Valid(leaf) = self.lookup(index * BLOCK_SIZE + entry * PAGE_SIZE) {
                    leaves.push(leaf);
                }
            }
        }
        leaves
    }
}

fn tick(clock: &mut u64) -> u64 {
    *clock += 1;
    *clock
}

fn page_index(ipa: u64) -> usize {
    (ipa % BLOCK_SIZE / PAGE_SIZE) as usize
}

fn slots_in(
    slots: &mut BTreeMap<u64, Slot>,
    ipa: u64,
    end: u64,
) -> impl Iterator<Item = (&u64, &mut Slot)> {
    slots.range_mut(ipa / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE))
}

/// Which pages of the table in slot `index` lie in the range.
fn pages_in(index: u64, ipa: u64, end: u64) -> std::ops::Range<usize> {
    let start = index * BLOCK_SIZE;
    let first = ipa.max(start) - start;
    let last = end.min(start + BLOCK_SIZE) - start;
    (first / PAGE_SIZE) as usize..(last / PAGE_SIZE) as usize
}

/// End of a range of pages, exclusive.
fn range_end(ipa: GuestAddress, size: u64) -> Result<u64, TableError> {
    let end = ipa.0.checked_add(size).filter(|end| *end <= IPA_LIMIT);
    match end {
        Some(end) if size > 0 && (ipa.0 | size).is_multiple_of(PAGE_SIZE) => Ok(end),
        _ => Err(TableError::BadRange),
    }
}
