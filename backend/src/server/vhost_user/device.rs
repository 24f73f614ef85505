use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use tracing::{info, warn};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::queues::{Queues, Taking};
use super::ring::{Ring, Table};
use crate::devices::virtio::spec::feature;
use crate::devices::virtio::{Core, DeviceError};
use crate::dma::SharedMemory;
use crate::irq::EventFd;
use crate::log_limit::RateLimit;

/// A virtio device as the crate serves it: the same in every session.
///
/// The crate calls it from two threads of a session, for messages and for events. The device and its
/// rings are locked in this order.
pub(super) struct VhostUserDevice {
    /// What logs call it.
    name: String,
    features: u64,
    queue_sizes: Vec<u16>,
    state: Mutex<State>,
    /// The rings of a session have arrived.
    introduced: Condvar,
    /// Told of a session's first message.
    greeted: Box<dyn Fn() + Send + Sync>,
}

struct State {
    core: Box<dyn Core<SharedMemory>>,
    wakes: u16,
    /// Those of the session; empty without one.
    rings: Vec<Ring>,
    memory: Option<SharedMemory>,
    /// The features that the front-end set.
    features: u64,
    /// Those that the core was started with.
    started: Option<u64>,
    /// What the core knows of each ring.
    seen: Vec<Seen>,
    /// It can't go on before a reset.
    halted: bool,
    log: RateLimit,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// The core has been told that the ring can be served, and it could be ever since.
    live: bool,
    /// Requests may have been taken from it.
    used: bool,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Kick(u16),
    Wake(u16),
    /// Rings or memory changed.
    Change,
}

/// Why a device halts.
#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("guest memory is gone")]
    MemoryLost,
    #[error("the driver is not one of virtio 1")]
    Legacy,
    #[error("queue {0} stops with {1} requests that are not done")]
    Unfinished(u16, usize),
    #[error("queue {0} has {1} descriptors, which are too many")]
    Size(u16, u16),
}

/// Tokens of events, behind those of the queues. The crate has the first one for itself.
const DOOR: u64 = 1;

/// Rounds of waiting for the requests of a queue that stops: more than a request has steps, of which a
/// disk has one for each MiB of at most 4 GiB.
const STOP_ROUNDS: usize = 8192;

impl VhostUserDevice {
    /// `greeted` is called when a front-end has sent its first message.
    pub(super) fn new(
        name: String,
        core: Box<dyn Core<SharedMemory>>,
        greeted: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let queue_sizes = core.queue_sizes();
        let own = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
        let features = core.features() | own | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let wakes = u16::try_from(core.wakes().len()).expect("a device has few wakes");
        let seen = vec![Seen::default(); queue_sizes.len()];
        let state = State {
            core,
            wakes,
            rings: Vec::new(),
            memory: None,
            features: 0,
            started: None,
            seen,
            halted: false,
            log: RateLimit::default(),
        };
        let state = Mutex::new(state);
        Self { name, features, queue_sizes, state, introduced: Condvar::new(), greeted }
    }

    /// Connects the device with the events of a new session. When what it
    /// returns is signalled, the thread of events ends.
    pub(super) fn join(&self, handler: &VringEpollHandler<Arc<Self>>) -> io::Result<EventFd> {
        let door = EventFd::create()?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let token = self.queue_sizes.len() as u64 + DOOR;
        handler.register_listener(door.as_fd().as_raw_fd(), edge, token)?;
        // The crate shows the rings in events only.
        door.signal();
        let without_rings = |state: &mut State| state.rings.is_empty();
        let state = self.introduced.wait_while(self.state(), without_rings);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        for (token, wake) in (token + 1..).zip(state.core.wakes()) {
            handler.register_listener(wake.as_raw_fd(), edge, token)?;
        }
        Ok(door)
    }

    /// The session is over, and its threads are.
    pub(super) fn leave(&self) {
        let mut state = self.state();
        state.reset();
        state.rings = Vec::new();
        state.memory = None;
        state.features = 0;
    }

    /// The operator wants the device to look at its surroundings anew.
    pub(super) fn reload(&self) {
        let mut state = self.state();
        let State { core, rings, memory, started, .. } = &mut *state;
        let features = started.unwrap_or(0);
        let mut queues = Queues::lock(rings, memory.as_ref(), features, Taking::New);
        if let Err(reason) = core.reload(&mut queues) {
            warn!(device = self.name, "goes on as before: {reason}");
        }
        let finished = queues.finish();
        self.after(&mut state, finished.map_err(Halt::from));
    }

    fn event(&self, event: Event) {
        let mut state = self.state();
        if !state.halted {
            let result = state.serve(event, &self.queue_sizes);
            self.after(&mut state, result);
        }
    }

    /// What follows from serving: a device that failed halts.
    fn after(&self, state: &mut State, result: Result<bool, Halt>) {
        match result {
            Ok(false) => {}
            Ok(true) => info!(device = self.name, "the configuration changed"),
            Err(halt) => {
                state.halt(&halt);
                if let Some(suppressed) = state.log.admit() {
                    warn!(device = self.name, suppressed, "stopped until it is reset: {halt}");
                }
            }
        }
    }

    /// The first event of a session brings its rings, the second one ends its thread. The crate has
    /// an eventfd of its own for that, which it never closes.
    fn pass_door(&self, rings: &[Ring]) -> io::Result<()> {
        let mut state = self.state();
        if !state.rings.is_empty() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        state.rings = rings.to_vec();
        self.introduced.notify_all();
        Ok(())
    }

    /// What a panic left behind is reset when its session ends.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Tells the core what it can do now and what happened. Returns whether the configuration
    /// changed.
    fn serve(&mut self, event: Event, sizes: &[u16]) -> Result<bool, Halt> {
        let Self { core, rings, memory, features, started, seen, .. } = self;
        let features = *features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let memory = memory.as_ref();
        let mut queues = Queues::lock(rings, memory, features, Taking::New);
        let mut news = false;
        for ((index, seen), size) in (0..).zip(&mut *seen).zip(sizes) {
            let live = queues.is_live(index);
            if live && queues.size(index) > *size {
                return Err(Halt::Size(index, queues.size(index)));
            }
            news |= live && !seen.live;
        }
        if !news && !seen.iter().any(|seen| seen.live) {
            return Ok(false);
        }
        if features & feature::VERSION_1 == 0 {
            return Err(Halt::Legacy);
        }
        if *started != Some(features) {
            if started.is_some() {
                core.quiesce();
                core.reset();
            }
            core.start(features);
            *started = Some(features);
        }
        if news {
            for wake in 0..self.wakes {
                core.woken(wake.into(), &mut queues)?;
            }
        }
        for (index, seen) in (0..).zip(&mut *seen) {
            let live = queues.is_live(index);
            let told = std::mem::replace(&mut seen.live, live);
            seen.used |= live;
            if live && (!told || event == Event::Kick(index)) {
                core.kicked(index, &mut queues)?;
            }
        }
        if let (Event::Wake(wake), false) = (event, news) {
            core.woken(wake.into(), &mut queues)?;
        }
        let changed = queues.finish()?;
        if memory.is_some_and(SharedMemory::lost) { Err(Halt::MemoryLost) } else { Ok(changed) }
    }

    /// Has the core finish what it began and give it back, and takes nothing new. Nothing touches
    /// guest memory then, until the next [`serve`](Self::serve).
    fn settle(&mut self, stopped: Option<u16>) -> Result<bool, Halt> {
        let Self { core, rings, memory, started, wakes, .. } = self;
        core.quiesce();
        let features = started.unwrap_or(0);
        let taking = Taking::Nothing { stopped };
        let mut queues = Queues::lock(rings, memory.as_ref(), features, taking);
        for _ in 0..STOP_ROUNDS {
            for wake in 0..*wakes {
                core.woken(wake.into(), &mut queues)?;
            }
            core.quiesce();
            if core.in_flight().is_empty() {
                break;
            }
        }
        if let Some(index) = stopped {
            // A limit keeps some waiting for longer than a front-end should.
            let left = core.in_flight().into_iter().filter(|request| request.queue == index);
            let left: Vec<_> = left.map(|request| request.head).collect();
            if !queues.untake(index, &left) {
                return Err(Halt::Unfinished(index, left.len()));
            }
        }
        Ok(queues.finish()?)
    }

    fn ring_stopped(&mut self, index: u16) {
        self.core.queue_stopped(index);
        if let Some(seen) = self.seen.get_mut(usize::from(index)) {
            *seen = Seen::default();
        }
        let queues = Queues::lock(&self.rings, None, 0, Taking::New);
        if !queues.any_started() {
            drop(queues);
            // A front-end whose guest resets the device may say no more than this.
            if self.halted {
                self.reset();
            }
            self.started = None;
        }
    }

    /// What the core was told of rings and memory is no longer so.
    fn look_anew(&mut self) {
        self.seen.iter_mut().for_each(|seen| seen.live = false);
    }

    fn halt(&mut self, halt: &Halt) {
        self.halted = true;
        self.core.quiesce();
        match halt {
            Halt::Device(DeviceError::Queue { queue, .. } | DeviceError::Request { queue, .. })
            | Halt::Size(queue, _)
            | Halt::Unfinished(queue, _) => {
                if let Some(ring) = self.rings.get(usize::from(*queue)) {
                    ring.report_error();
                }
            }
            Halt::MemoryLost | Halt::Legacy => self.rings.iter().for_each(Ring::report_error),
        }
    }

    fn reset(&mut self) {
        self.core.quiesce();
        for (queue, seen) in (0..).zip(&mut self.seen) {
            self.core.queue_stopped(queue);
            *seen = Seen::default();
        }
        self.core.reset();
        self.started = None;
        self.halted = false;
    }
}

impl VhostUserBackend for VhostUserDevice {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.queue_sizes.len()
    }

    fn max_queue_size(&self) -> usize {
        self.queue_sizes.iter().max().copied().unwrap_or(0).into()
    }

    fn features(&self) -> u64 {
        (self.greeted)();
        self.features
    }

    fn acked_features(&self, features: u64) {
        self.state().features = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.state().reset();
    }

    /// The crate has set it in its queues.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // The crate bounds it by 256.
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        self.state().core.config_read(offset.into(), &mut data);
        data
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        self.state().core.config_write(offset.into(), data);
        Ok(())
    }

    /// The crate's rings have the new memory already, the device has the old one: until this is
    /// answered, both are the front-end's.
    fn update_memory(&self, table: Table) -> io::Result<()> {
        let mut state = self.state();
        let memory = SharedMemory::new((*table.memory()).clone(), state.memory.as_ref())?;
        if !state.halted {
            let result = state.settle(None);
            self.after(&mut state, result);
        }
        state.memory = Some(memory);
        state.look_anew();
        drop(state);
        self.event(Event::Change);
        Ok(())
    }

    /// One thread for all queues: the device is one.
    fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX >> (64 - self.queue_sizes.len().clamp(1, 64))]
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        let queue = u16::try_from(queue).map_err(|_| Errno::INVAL)?;
        let mut state = self.state();
        if !state.halted {
            let used = state.seen.get(usize::from(queue)).is_some_and(|seen| seen.used);
            let result = state.settle(used.then_some(queue));
            self.after(&mut state, result);
        }
        state.ring_stopped(queue);
        state.look_anew();
        drop(state);
        self.event(Event::Change);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        let queues = self.queue_sizes.len();
        match u64::from(event).checked_sub(queues as u64) {
            None => self.event(Event::Kick(event)),
            Some(0) => {}
            Some(DOOR) => return self.pass_door(rings),
            Some(wake) => {
                let wake = wake - DOOR - 1;
                self.event(Event::Wake(u16::try_from(wake).expect("it was made of one")));
            }
        }
        Ok(())
    }
}
