use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll;
use rustix::io::{Errno, ReadWriteFlags, preadv2, read};
use vhost_user_backend::{
    VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT as Vring,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::irq::EventFd;

/// Guest memory as the crate keeps it.
pub(super) type Table = GuestMemoryAtomic<GuestMemoryMmap>;

/// A queue of the crate's with eventfds that can't stop this process.
///
/// The front-end shares its eventfds: it can empty one that was readable a moment ago, fill one that
/// is about to be written, and make both block. The crate reads and writes them as they come, and
/// does not notice when a kick eventfd is replaced by another. So it gets an epoll instance in place
/// of the kick eventfd, readable when that is, and nothing to write to.
#[derive(Clone)]
pub(super) struct Ring {
    vring: VringMutex<Table>,
    wires: Arc<Mutex<Wires>>,
}

/// The front-end's eventfds.
#[derive(Debug, Default)]
struct Wires {
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
}

/// A ring that nothing else changes meanwhile.
pub(super) type LockedRing<'a> = MutexGuard<'a, VringState<Table>>;

impl Ring {
    pub(super) fn lock(&self) -> LockedRing<'_> {
        self.vring.get_mut()
    }

    /// Interrupts the driver.
    pub(super) fn call(&self) {
        if let Some(call) = &self.wires().call {
            call.signal();
        }
    }

    /// Tells the front-end that the ring can't be served.
    pub(super) fn report_error(&self) {
        if let Some(error) = &self.wires().error {
            error.signal();
        }
    }

    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> VringStateGuard<'a, Table> for Ring {
    type G = LockedRing<'a>;
}

impl<'a> VringStateMutGuard<'a, Table> for Ring {
    type G = LockedRing<'a>;
}

impl Vring<Table> for Ring {
    fn new(memory: Table, max_queue_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self { vring: VringMutex::new(memory, max_queue_size)?, wires: Arc::default() })
    }

    fn get_ref(&self) -> LockedRing<'_> {
        self.vring.get_ref()
    }

    fn get_mut(&self) -> LockedRing<'_> {
        self.vring.get_mut()
    }

    fn add_used(&self, index: u16, len: u32) -> Result<(), virtio_queue::Error> {
        self.vring.add_used(index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.call();
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.vring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), virtio_queue::Error> {
        self.vring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.vring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.vring.set_enabled(enabled);
    }

    fn set_queue_info(
        &self,
        descriptors: u64,
        available: u64,
        used: u64,
    ) -> Result<(), virtio_queue::Error> {
        self.vring.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.vring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.vring.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, virtio_queue::Error> {
        self.vring.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.vring.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.vring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.vring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let kick = file.and_then(eventfd);
        let watch = kick.as_ref().and_then(|kick| watch(kick).ok());
        if watch.is_some() {
            // The crate watches the kick of a ring that gets ready, and of no other.
            self.vring.set_queue_ready(false);
        }
        self.wires().kick = kick;
        self.vring.set_kick(watch.map(File::from));
    }

    fn read_kick(&self) -> io::Result<bool> {
        let taken = self.wires().kick.as_ref().is_none_or(take);
        Ok(taken && self.lock().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.wires().call = file.and_then(eventfd);
    }

    fn set_err(&self, file: Option<File>) {
        self.wires().error = file.and_then(eventfd);
    }
}

/// Whatever is no eventfd is as good as none.
fn eventfd(file: File) -> Option<EventFd> {
    EventFd::new(file.into()).ok()
}

/// A descriptor of our own that is readable when the eventfd is. Closed, it is not watched any more,
/// which is not so with a descriptor that the front-end has as well.
fn watch(eventfd: &EventFd) -> Result<OwnedFd, Errno> {
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&watch, eventfd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    Ok(watch)
}

/// Empties an eventfd, without waiting if somebody else did. Tells whether it held anything.
fn take(eventfd: &EventFd) -> bool {
    let mut value = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut value)];
    match preadv2(eventfd, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) => true,
        // Linux before 5.8.
        Err(Errno::OPNOTSUPP | Errno::INVAL) => read(eventfd, &mut value).is_ok(),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn ring() -> Ring {
        let ring = Ring::new(Table::new(GuestMemoryMmap::new()), 8).unwrap();
        ring.set_enabled(true);
        ring
    }

    #[test]
    fn a_kick_that_was_taken_by_somebody_else_is_none_and_is_not_waited_for() {
        // It would block.
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ring = ring();
        ring.set_kick(Some(kick.try_clone().unwrap().into()));
        assert!(!ring.read_kick().unwrap());
        rustix::io::write(&kick, &5_u64.to_ne_bytes()).unwrap();
        assert!(ring.read_kick().unwrap());
        assert!(!ring.read_kick().unwrap());
    }

    #[test]
    fn a_kick_of_a_ring_that_is_not_enabled_is_taken_and_is_none() {
        let kick = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        let ring = ring();
        ring.set_kick(Some(kick.into()));
        ring.set_enabled(false);
        assert!(!ring.read_kick().unwrap());
    }
}
