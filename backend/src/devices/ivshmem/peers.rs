//! Who can interrupt whom.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;

use crate::irq::EventFd;

/// Vectors of one device: each takes a descriptor.
pub(super) const MAX_VECTORS: u16 = 64;

/// The devices of a process, by the identity of the file whose memory they share.
#[derive(Debug, Default)]
pub(in crate::devices) struct Groups(HashMap<(u64, u64), Weak<Group>>);

/// Devices over the same memory, by peer ID.
#[derive(Debug, Default)]
struct Group(Mutex<Vec<Option<Vectors>>>);

/// One eventfd for each vector of a device.
type Vectors = Vec<Arc<EventFd>>;

/// A device's place in its group, which it leaves when this is dropped.
#[derive(Debug)]
pub(super) struct Membership {
    group: Arc<Group>,
    id: u16,
    vectors: Vectors,
}

impl Groups {
    /// Gives a device the lowest free peer ID over this file.
    pub(super) fn join(&mut self, file: (u64, u64), vectors: u16) -> Result<Membership, Errno> {
        let vectors: Vectors =
            (0..vectors).map(|_| EventFd::create().map(Arc::new)).collect::<Result<_, _>>()?;
        self.0.retain(|_, group| group.strong_count() > 0);
        let group = self.0.get(&file).and_then(Weak::upgrade).unwrap_or_default();
        self.0.insert(file, Arc::downgrade(&group));

        let mut peers = group.peers();
        let free = peers.iter().position(Option::is_none).unwrap_or(peers.len());
        // "peer ID, 16 bits"
        let id = u16::try_from(free).map_err(|_| Errno::NOSPC)?;
        if free == peers.len() {
            peers.push(None);
        }
        peers[free] = Some(vectors.clone());
        drop(peers);
        Ok(Membership { group, id, vectors })
    }
}

impl Group {
    fn peers(&self) -> MutexGuard<'_, Vec<Option<Vectors>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    pub(super) fn id(&self) -> u16 {
        self.id
    }

    pub(super) fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).expect("at most MAX_VECTORS")
    }

    /// What is signalled when this device is to be interrupted, by vector.
    pub(super) fn own_vectors(&self) -> Vec<BorrowedFd<'_>> {
        self.vectors.iter().map(|eventfd| eventfd.as_fd()).collect()
    }

    /// Has these vectors in place of its own: those of a predecessor, which clients ring.
    ///
    /// # Errors
    /// They are too few or too many, or no eventfds.
    pub(super) fn adopt(&mut self, fds: impl Iterator<Item = OwnedFd>) -> io::Result<()> {
        let eventfd = |fd| EventFd::new(fd).map(Arc::new).map_err(io::Error::other);
        let vectors: Vectors = fds.map(eventfd).collect::<io::Result<_>>()?;
        if vectors.len() != self.vectors.len() {
            let (found, expected) = (vectors.len(), self.vectors.len());
            return Err(io::Error::other(format!("{found} vectors in place of {expected}")));
        }
        self.group.peers()[usize::from(self.id)] = Some(vectors.clone());
        self.vectors = vectors;
        Ok(())
    }

    /// "Bits 31..16: peer ID, bits 15..0: vector". A peer or vector that does not exist is not rung.
    pub(super) fn ring(&self, doorbell: u32) {
        let (peer, vector) = ((doorbell >> 16) as usize, (doorbell & 0xffff) as usize);
        let peers = self.group.peers();
        let vectors = peers.get(peer).and_then(Option::as_ref);
        if let Some(eventfd) = vectors.and_then(|vectors| vectors.get(vector)) {
            eventfd.signal();
        }
    }

    /// Every doorbell value that rings somebody now, with what it signals.
    pub(super) fn peers(&self) -> impl Iterator<Item = (u32, Arc<EventFd>)> {
        let peers: Vec<_> = self.group.peers().iter().cloned().enumerate().collect();
        peers.into_iter().flat_map(|(peer, vectors)| {
            vectors.unwrap_or_default().into_iter().enumerate().filter_map(move |(vector, fd)| {
                let value = u32::try_from(peer << 16 | vector).ok()?;
                Some((value, fd))
            })
        })
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.group.peers()[usize::from(self.id)] = None;
    }
}
