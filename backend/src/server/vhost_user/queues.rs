use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::ring::{LockedRing, Ring};
use crate::devices::virtio::spec::avail;
use crate::devices::virtio::{DeviceError, Io, QueueAccess, needs_interrupt};
use crate::dma::SharedMemory;

/// All rings of a device, for the duration of one event.
pub(super) struct Queues<'a> {
    queues: Vec<Locked<'a>>,
    memory: Option<&'a SharedMemory>,
    features: u64,
    taking: Taking,
    config_changed: bool,
}

struct Locked<'a> {
    ring: &'a Ring,
    state: LockedRing<'a>,
    used: bool,
}

/// Which requests a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taking {
    /// Those of rings that are started and enabled.
    New,
    /// None: it gives back what it has. One ring has been stopped just now and is served for that.
    Nothing {
        /// That ring, if anything was taken from it.
        stopped: Option<u16>,
    },
}

impl<'a> Queues<'a> {
    pub(super) fn lock(
        rings: &'a [Ring],
        memory: Option<&'a SharedMemory>,
        features: u64,
        taking: Taking,
    ) -> Self {
        let lock = |ring: &'a Ring| Locked { ring, state: ring.lock(), used: false };
        let queues = rings.iter().map(lock).collect();
        Self { queues, memory, features, taking, config_changed: false }
    }

    /// Whether the front-end wants a ring to be served, and it can be.
    pub(super) fn is_live(&self, index: u16) -> bool {
        let queue = self.queues.get(usize::from(index));
        self.memory.is_some()
            && queue
                .is_some_and(|queue| queue.state.is_enabled() && queue.state.get_queue().ready())
    }

    /// Whether a ring is started, enabled or not.
    pub(super) fn any_started(&self) -> bool {
        self.queues.iter().any(|queue| queue.state.get_queue().ready())
    }

    /// The number of descriptors of a ring.
    pub(super) fn size(&self, index: u16) -> u16 {
        self.queues.get(usize::from(index)).map_or(0, |queue| queue.state.get_queue().size())
    }

    /// Gives the last requests that were taken from a ring back as if they had not been. `false` if
    /// these are not the last ones.
    pub(super) fn untake(&mut self, index: u16, heads: &[u16]) -> bool {
        let (Some(memory), Some(ring), Ok(count)) =
            (self.memory, self.queues.get_mut(usize::from(index)), u16::try_from(heads.len()))
        else {
            return false;
        };
        let queue = ring.state.get_queue_mut();
        let first = queue.next_avail().wrapping_sub(count);
        let last = (0..count).zip(heads).all(|(number, head)| {
            let slot = first.wrapping_add(number) % queue.size();
            let entry = avail::RING + 2 * u64::from(slot);
            let found = queue
                .avail_ring()
                .checked_add(entry)
                .and_then(|address| memory.load(GuestAddress(address), Ordering::Relaxed).ok());
            found.map(u16::from_le) == Some(*head)
        });
        if last {
            queue.set_next_avail(first);
        }
        last
    }

    /// Interrupts the driver for the requests that were given back. Tells whether the configuration
    /// changed.
    pub(super) fn finish(self) -> Result<bool, DeviceError> {
        let Some(memory) = self.memory else { return Ok(self.config_changed) };
        let mut result = Ok(self.config_changed);
        for (index, mut queue) in (0_u16..).zip(self.queues) {
            if !queue.used {
                continue;
            }
            match needs_interrupt(queue.state.get_queue_mut(), memory) {
                Ok(true) => queue.ring.call(),
                Ok(false) => {}
                Err(error) => result = Err(DeviceError::Queue { queue: index, error }),
            }
        }
        result
    }
}

impl Io<SharedMemory> for Queues<'_> {
    fn queue(&mut self, index: u16) -> Option<QueueAccess<'_, SharedMemory>> {
        let stopped = self.taking == Taking::Nothing { stopped: Some(index) };
        if !stopped && !self.is_live(index) {
            return None;
        }
        let Locked { state, used, .. } = self.queues.get_mut(usize::from(index))?;
        let access = QueueAccess::new(state.get_queue_mut(), self.memory?, self.features, used);
        Some(match self.taking {
            Taking::New => access,
            Taking::Nothing { .. } => access.without_new_requests(),
        })
    }

    fn config_changed(&mut self) {
        self.config_changed = true;
    }
}
