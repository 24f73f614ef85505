//! Rings between the driver's and the daemon's, for a daemon that keeps no track of its requests.
//!
//! A disk's requests end in any order, and nobody who sees the driver's rings alone can tell which
//! of them a daemon had when it died: an entry of the available ring is gone after a round. So a
//! daemon that has no memory for requests in flight gets rings of ours, which hold what it has and
//! nothing else, while descriptors and data stay in the guest's memory. Another daemon finds there
//! what the last one had not given back.

use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::exchange::DaemonError;
use super::memory::Region;
use crate::devices::virtio::spec::avail;
use crate::devices::virtio::{QueueError, needs_interrupt};
use crate::dma::{DmaGuard, WindowInfo};
use crate::irq::EventFd;

/// The memory of such rings, which one daemon gets: the next one gets another, because nobody knows
/// what the last one still writes.
#[derive(Debug)]
pub(super) struct Shadow {
    file: OwnedFd,
    memory: GuestMemoryMmap,
    region: Region,
}

/// One queue.
#[derive(Debug)]
pub(super) struct Relay {
    /// What the daemon is kicked with.
    pub(super) feed: EventFd,
    index: u16,
    shadow: Option<Arc<Shadow>>,
    size: u16,
    /// Of the rings in the shadow.
    available: Wrapping<u16>,
    used: Wrapping<u16>,
    /// The requests that the daemon has: when each was taken, by its first descriptor.
    taken: Vec<Option<u64>>,
    takes: u64,
}

/// Why a queue can't be relayed.
#[derive(Debug)]
pub(super) enum RelayError {
    /// The driver's rings are malformed, or not in memory.
    Driver(QueueError),
    /// The daemon is not to be trusted.
    Daemon(DaemonError),
}

impl From<QueueError> for RelayError {
    fn from(error: QueueError) -> Self {
        Self::Driver(error)
    }
}

impl From<virtio_queue::Error> for RelayError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Driver(error.into())
    }
}

/// What each queue has: the available ring, and the used ring behind it.
const SLOT: u64 = 0x4000;
const USED: u64 = 0x1000;
/// Flags and index come before the entries (2.7.6, 2.7.8).
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
/// Where windows are not: the first of these that is so.
const PLACES: [u64; 5] = [1 << 46, 1 << 47, 1 << 50, 1 << 56, 1 << 62];

impl Shadow {
    /// Memory for so many queues, at an address where no window is.
    ///
    /// # Errors
    /// When there is none, or no more descriptors.
    pub(super) fn new<'a>(
        queues: u16,
        windows: impl Iterator<Item = WindowInfo<'a>> + Clone,
    ) -> Result<Self, Errno> {
        let size = SLOT * u64::from(queues);
        let free = |place: &u64| {
            let apart = |window: WindowInfo<'_>| {
                let last = window.iova.0 + (window.size - 1);
                window.iova.0 >= place + size || last < *place
            };
            windows.clone().all(apart)
        };
        let address = PLACES.into_iter().find(|place| free(place)).ok_or(Errno::NOMEM)?;
        let file = memfd_create("barkeep-rings", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, size)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let length = usize::try_from(size).map_err(|_| Errno::NOMEM)?;
        let offset = FileOffset::new(file.try_clone().map_err(|_| Errno::MFILE)?.into(), 0);
        let ranges = [(GuestAddress(address), length, Some(offset))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|_| Errno::NOMEM)?;
        let region = Region::new(address, size, file.as_fd())?;
        Ok(Self { file, memory, region })
    }

    pub(super) fn region(&self) -> (Region, BorrowedFd<'_>) {
        (self.region, self.file.as_fd())
    }

    /// Where the rings of a queue are.
    pub(super) fn available(&self, index: u16) -> u64 {
        self.region.iova + SLOT * u64::from(index)
    }

    pub(super) fn used(&self, index: u16) -> u64 {
        self.available(index) + USED
    }

    fn load<T: vm_memory::AtomicAccess>(&self, address: u64) -> T {
        let value = self.memory.load(GuestAddress(address), Ordering::Acquire);
        value.expect("a ring lies in the shadow")
    }

    fn store<T: vm_memory::AtomicAccess>(&self, address: u64, value: T) {
        let stored = self.memory.store(value, GuestAddress(address), Ordering::Release);
        stored.expect("a ring lies in the shadow");
    }
}

impl Relay {
    pub(super) fn new(index: u16, size: u16, feed: EventFd) -> Self {
        Self {
            feed,
            index,
            shadow: None,
            size,
            available: Wrapping(0),
            used: Wrapping(0),
            taken: vec![None; size.into()],
            takes: 0,
        }
    }

    /// The queue is another one now, or the driver is.
    pub(super) fn forget(&mut self) {
        self.shadow = None;
        self.taken.fill(None);
    }

    /// What the daemon wrote so far is all that is believed.
    pub(super) fn distrust(&mut self) {
        self.shadow = None;
    }

    /// A daemon gets the queue, whose size is this, or gets it again. Returns where in the available
    /// ring it begins.
    pub(super) fn begin(&mut self, shadow: &Arc<Shadow>, size: u16) -> u16 {
        let same = self.shadow.as_ref().is_some_and(|present| Arc::ptr_eq(present, shadow));
        if !same {
            self.shadow = Some(Arc::clone(shadow));
            self.size = size;
            (self.available, self.used) = (Wrapping(0), Wrapping(0));
            let heads = (0_u16..).zip(&self.taken);
            let mut heads: Vec<_> =
                heads.filter_map(|(head, when)| Some(((*when)?, head))).collect();
            heads.sort_unstable();
            for (_, head) in heads {
                self.put(shadow, head);
            }
            self.publish(shadow);
            shadow.store(shadow.used(self.index) + INDEX, 0_u16);
            return 0;
        }
        self.available.0
    }

    /// Whether the daemon has given back everything that it has.
    pub(super) fn is_idle(&self) -> bool {
        let Some(shadow) = &self.shadow else { return true };
        u16::from_le(shadow.load(shadow.used(self.index) + INDEX)) == self.available.0
    }

    /// Gives the daemon what the driver made available.
    ///
    /// # Errors
    /// [`RelayError`]. What came before is the daemon's all the same.
    pub(super) fn take(&mut self, queue: &mut Queue, memory: &DmaGuard) -> Result<(), RelayError> {
        let Some(shadow) = self.shadow.clone() else { return Ok(()) };
        let before = self.available;
        let taken = self.take_all(queue, memory, &shadow);
        if self.available != before {
            self.publish(&shadow);
            self.feed.signal();
        }
        taken
    }

    /// Gives the driver what the daemon gave back. Returns whether it is to be interrupted.
    ///
    /// # Errors
    /// [`RelayError`].
    pub(super) fn give_back(
        &mut self,
        queue: &mut Queue,
        memory: &DmaGuard,
    ) -> Result<bool, RelayError> {
        let Some(shadow) = self.shadow.clone() else { return Ok(false) };
        let ring = shadow.used(self.index);
        let index = Wrapping(u16::from_le(shadow.load(ring + INDEX)));
        let mut any = false;
        while self.used != index {
            let slot = ring + ENTRIES + 8 * u64::from(self.used.0 % self.size);
            let head = u32::from_le(shadow.load(slot));
            let length = u32::from_le(shadow.load(slot + 4));
            let taken = usize::try_from(head).ok().and_then(|head| self.taken.get_mut(head));
            let strange =
                RelayError::Daemon(DaemonError::Unfit("gives back what it does not have"));
            let Some((taken, head)) = taken.zip(u16::try_from(head).ok()) else {
                return Err(strange);
            };
            taken.take().ok_or(strange)?;
            queue.add_used(&**memory, head, length)?;
            self.used += 1;
            any = true;
        }
        Ok(any && needs_interrupt(queue, memory)?)
    }

    fn take_all(
        &mut self,
        queue: &mut Queue,
        memory: &DmaGuard,
        shadow: &Shadow,
    ) -> Result<(), RelayError> {
        loop {
            queue.disable_notification(&**memory)?;
            let available = queue.avail_idx(&**memory, Ordering::Acquire)?;
            let mut next = Wrapping(queue.next_avail());
            if (available - next).0 > queue.size() {
                return Err(QueueError::TooManyAvailable((available - next).0).into());
            }
            while next != available {
                let slot = avail::RING + 2 * u64::from(next.0 % queue.size());
                let address = queue.avail_ring().checked_add(slot).ok_or(QueueError::Overflow)?;
                let head = memory.load(GuestAddress(address), Ordering::Relaxed);
                let head = u16::from_le(head.map_err(QueueError::from)?);
                let taken = self.taken.get_mut(usize::from(head));
                let taken = taken.filter(|_| head < queue.size()).ok_or(QueueError::Index(head))?;
                if taken.is_some() {
                    // Which also bounds what the daemon has by the size of its ring.
                    return Err(QueueError::Loop.into());
                }
                *taken = Some(self.takes);
                self.takes += 1;
                self.put(shadow, head);
                next += 1;
                queue.set_next_avail(next.0);
            }
            if !queue.enable_notification(&**memory)? {
                return Ok(());
            }
        }
    }

    fn put(&mut self, shadow: &Shadow, head: u16) {
        let slot = ENTRIES + 2 * u64::from(self.available.0 % self.size);
        shadow.store(shadow.available(self.index) + slot, head.to_le());
        self.available += 1;
    }

    fn publish(&self, shadow: &Shadow) {
        shadow.store(shadow.available(self.index) + INDEX, self.available.0.to_le());
    }
}
