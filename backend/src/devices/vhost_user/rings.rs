use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::FrontendReq;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::daemon::Daemon;
use super::exchange::DaemonError;
use super::memory::Wanted;
use super::relay::{Relay, Shadow};
use crate::devices::virtio::spec::descriptor;
use crate::dma::{DmaAccess, DmaGuard, Iova};
use crate::irq::EventFd;

/// A queue as the daemon has it.
#[derive(Debug)]
pub(super) struct Ring {
    index: u16,
    /// The doorbell. What was rung while the daemon was away is still in it when it is back.
    pub(super) kick: Arc<EventFd>,
    /// What the daemon signals while the client's own eventfd is not to be signalled.
    pub(super) call: Arc<EventFd>,
    state: State,
    /// Signalled while the driver could not be interrupted, or perhaps without its notice.
    pub(super) owed: bool,
    /// Whether a daemon has served the queue, this one or one before.
    served: bool,
    /// If the daemon does not have the driver's own rings.
    pub(super) relay: Option<Relay>,
}

#[derive(Debug)]
enum State {
    Stopped(Position),
    /// Served.
    Running {
        /// What the daemon signals.
        call: Arc<EventFd>,
        setup: Setup,
        /// To look at the rings, whoever asks the daemon to stop.
        memory: DmaGuard,
    },
    /// Not served any more. What the daemon took is given back when so much is.
    Stopping {
        base: u16,
        setup: Setup,
        memory: DmaGuard,
    },
}

/// Where in the available ring a daemon begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    /// At this index; everything before is done.
    At(u16),
    /// The daemon left without saying: what it has not given back may have been begun.
    Lost,
}

/// Guest memory, and what of it a daemon has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'a> {
    pub(super) memory: &'a DmaGuard,
    pub(super) regions: &'a Wanted<'a>,
    /// Where relayed rings are.
    pub(super) shadow: Option<&'a Arc<Shadow>>,
}

/// What of a queue a daemon is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Ring {
    pub(super) fn new(index: u16, kick: EventFd, call: EventFd, relay: Option<Relay>) -> Self {
        let state = State::Stopped(Position::At(0));
        let (kick, call) = (Arc::new(kick), Arc::new(call));
        Self { index, kick, call, state, owed: false, served: false, relay }
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub(super) fn is_lost(&self) -> bool {
        matches!(self.state, State::Stopped(Position::Lost))
    }

    /// The queue is another one now, or the driver is.
    pub(super) fn forget(&mut self) {
        self.state = State::Stopped(Position::At(0));
        self.owed = false;
        self.served = false;
        if let Some(relay) = &mut self.relay {
            relay.forget();
        }
    }

    /// The daemon is gone.
    pub(super) fn lose(&mut self) {
        if let State::Running { setup, memory, .. } | State::Stopping { setup, memory, .. } =
            &self.state
        {
            let idle = if self.relay.is_some() { Some(0) } else { setup.idle_at(memory) };
            self.state = State::Stopped(idle.map_or(Position::Lost, Position::At));
        }
    }

    /// Has the daemon serve the queue, from where it was left.
    ///
    /// # Errors
    /// [`StartError`].
    pub(super) fn start(
        &mut self,
        daemon: &mut Daemon,
        setup: Setup,
        guest: Guest<'_>,
        call: &Arc<EventFd>,
        broken: BorrowedFd<'_>,
    ) -> Result<(), StartError> {
        let State::Stopped(position) = self.state else { return Ok(()) };
        if !setup.lies_in(guest.regions) {
            return Err(StartError::Ring);
        }
        let (theirs, base) = match (&mut self.relay, guest.shadow, position) {
            (Some(relay), Some(shadow), _) => {
                (setup.relayed(self.index, shadow), relay.begin(shadow, setup.size))
            }
            (_, _, Position::At(base)) => (setup, base),
            (_, _, Position::Lost) => {
                (setup, setup.used_index(guest.memory).ok_or(StartError::Ring)?)
            }
        };
        self.set_up(daemon, theirs, base, call, broken)?;
        let memory = guest.memory.clone();
        self.state = State::Running { call: Arc::clone(call), setup, memory };
        // A client may drop a message that was sent just before bus mastering went off, and a daemon
        // may die between giving a buffer back and saying so. Nobody would ask for another message.
        self.owed |= std::mem::replace(&mut self.served, true);
        Ok(())
    }

    /// Has the daemon signal something else.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn route(
        &mut self,
        daemon: &mut Daemon,
        call: &Arc<EventFd>,
    ) -> Result<(), DaemonError> {
        let State::Running { call: present, .. } = &mut self.state else { return Ok(()) };
        if Arc::ptr_eq(present, call) {
            return Ok(());
        }
        set_fd(daemon, FrontendReq::SET_VRING_CALL, self.index, call.as_fd())?;
        *present = Arc::clone(call);
        // From now on nobody else is interrupted.
        daemon.exchange.settle()
    }

    /// Has the daemon stop. What it took may still be under way when this returns
    /// ([`wait`](Self::wait)).
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn stop(&mut self, daemon: &mut Daemon) -> Result<(), DaemonError> {
        const BASE: FrontendReq = FrontendReq::GET_VRING_BASE;
        const CALL: FrontendReq = FrontendReq::SET_VRING_CALL;
        let State::Running { setup, memory, .. } = &self.state else { return Ok(()) };
        if let Some(relay) = &self.relay {
            // It gets nothing new, so this ends, and then it has nothing under way.
            daemon.exchange.wait_until(|| relay.is_idle())?;
        }
        daemon.exchange.send_request(BASE, &pair(self.index.into(), 0))?;
        // libvhost-user forgets what it has to signal and signals all the same when something under
        // way ends, which is the end of it. So it gets something else before it comes to that.
        let index = u64::from(self.index).to_ne_bytes();
        daemon.exchange.start_telling(CALL, &index, &[self.call.as_fd()])?;
        let mut answer = [0; 8];
        daemon.exchange.receive(BASE, &mut answer)?;
        daemon.exchange.end_telling(CALL)?;
        let [index @ .., b0, b1, b2, b3] = answer;
        match u16::try_from(u32::from_ne_bytes([b0, b1, b2, b3])) {
            Ok(base) if index == u32::from(self.index).to_ne_bytes() => {
                let (setup, memory) = (*setup, memory.clone());
                self.state = State::Stopping { base, setup, memory };
                Ok(())
            }
            _ => Err(DaemonError::Malformed(BASE)),
        }
    }

    /// Waits until nothing of the queue is under way in a daemon that has stopped. It should have
    /// waited itself ("VHOST_USER_GET_VRING_BASE"), but not all do; and what it is still at would be
    /// begun a second time. `finishes` tells whether that ever comes.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn wait(&mut self, daemon: &mut Daemon, finishes: bool) -> Result<(), DaemonError> {
        let State::Stopping { base, setup, memory } = &self.state else { return Ok(()) };
        if finishes && self.relay.is_none() {
            // Memory that is gone is nothing to wait for.
            let done = || setup.used_index(memory).is_none_or(|used| used == *base);
            daemon.exchange.wait_until(done)?;
        }
        self.state = State::Stopped(Position::At(*base));
        Ok(())
    }

    /// In the order in which QEMU does it: daemons look at the rings when they get the addresses,
    /// and at what is in flight when they get the kick.
    fn set_up(
        &self,
        daemon: &mut Daemon,
        setup: Setup,
        base: u16,
        call: &Arc<EventFd>,
        broken: BorrowedFd<'_>,
    ) -> Result<(), DaemonError> {
        let index = self.index.into();
        daemon.exchange.tell(FrontendReq::SET_VRING_NUM, &pair(index, setup.size.into()), &[])?;
        daemon.exchange.tell(FrontendReq::SET_VRING_BASE, &pair(index, base.into()), &[])?;
        daemon.exchange.tell(FrontendReq::SET_VRING_ADDR, &setup.addresses(index), &[])?;
        set_fd(daemon, FrontendReq::SET_VRING_ERR, self.index, broken)?;
        // Before the kick, which may be waiting: libvhost-user gives up if it has nothing to signal.
        set_fd(daemon, FrontendReq::SET_VRING_CALL, self.index, call.as_fd())?;
        let kick = self.relay.as_ref().map_or(&*self.kick, |relay| &relay.feed);
        set_fd(daemon, FrontendReq::SET_VRING_KICK, self.index, kick.as_fd())?;
        if daemon.enables_rings() {
            daemon.exchange.tell(FrontendReq::SET_VRING_ENABLE, &pair(index, 1), &[])?;
        }
        // A daemon begins with the first kick, and there may be requests without one.
        kick.signal();
        Ok(())
    }
}

/// Why a queue is not served.
#[derive(Debug)]
pub(super) enum StartError {
    /// Its rings are not in memory that the daemon has, now.
    Ring,
    /// The daemon is gone.
    Daemon(DaemonError),
}

impl From<DaemonError> for StartError {
    fn from(error: DaemonError) -> Self {
        Self::Daemon(error)
    }
}

impl Setup {
    /// A queue as its driver set it up.
    pub(super) fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
        }
    }

    /// The same with the rings of a shadow.
    fn relayed(self, index: u16, shadow: &Shadow) -> Self {
        Self { available: shadow.available(index), used: shadow.used(index), ..self }
    }

    /// Whether each part is in one region. Behind both rings is an index for EVENT_IDX (2.7.6,
    /// 2.7.8).
    fn lies_in(self, regions: &Wanted<'_>) -> bool {
        self.parts().into_iter().all(|(address, size)| regions.covers(address, size))
    }

    /// Whether both rings and the descriptors are in memory that may be written.
    pub(super) fn is_reachable(self, memory: &DmaGuard) -> bool {
        let reachable = |(address, size)| memory.pieces(Iova(address), size, DmaAccess::all());
        self.parts().into_iter().all(|part| reachable(part).is_ok())
    }

    fn parts(self) -> [(u64, u64); 3] {
        let entries = u64::from(self.size);
        [
            (self.descriptors, descriptor::SIZE * entries),
            (self.available, 6 + 2 * entries),
            (self.used, 6 + 8 * entries),
        ]
    }

    /// What was given back so far.
    fn used_index(self, memory: &DmaGuard) -> Option<u16> {
        index(self.used, memory)
    }

    /// Where the queue is, if everything that was made available was given back.
    fn idle_at(self, memory: &DmaGuard) -> Option<u16> {
        let used = self.used_index(memory)?;
        (index(self.available, memory)? == used).then_some(used)
    }

    /// "A vring address description": index, flags, descriptors, used, available, log.
    fn addresses(self, index: u32) -> Vec<u8> {
        let addresses = [self.descriptors, self.used, self.available, 0];
        let addresses: Vec<u8> = addresses.into_iter().flat_map(u64::to_ne_bytes).collect();
        [&pair(index, 0)[..], &addresses].concat()
    }
}

/// Two numbers, as in "a vring state description".
fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    bytes
}

/// Queues are fewer than the 256 that the lower bits can name.
fn set_fd(
    daemon: &mut Daemon,
    request: FrontendReq,
    index: u16,
    fd: BorrowedFd<'_>,
) -> Result<(), DaemonError> {
    daemon.exchange.tell(request, &u64::from(index).to_ne_bytes(), &[fd])
}

/// The index of a ring: its second field (2.7.6, 2.7.8).
fn index(ring: u64, memory: &DmaGuard) -> Option<u16> {
    let address = GuestAddress(ring.checked_add(2)?);
    memory.load(address, Ordering::Acquire).ok().map(u16::from_le)
}
