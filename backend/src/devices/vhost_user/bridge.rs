use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::{debug, warn};

use super::config::Config;
use super::daemon::Daemon;
use super::exchange::{DaemonError, Exchange};
use super::inflight::Inflight;
use super::memory::Wanted;
use super::options::Options;
use super::relay::{Relay, RelayError, Shadow};
use super::rings::{Guest, Ring, Setup, StartError};
use super::wakes::{Wake, Wakes};
use crate::config::{ConfigError, Parameters};
use crate::devices::virtio::pci::{Backing, World, adopted};
use crate::devices::virtio::spec::{DeviceType, feature};
use crate::irq::EventFd;
use crate::log_limit::RateLimit;

/// A function's way to the daemon that serves it.
///
/// The daemon's rings run while the world is live, and only then: what makes it something else waits
/// until the daemon has stopped them. What is asked of the daemon at one time takes two seconds at
/// most; if it needs longer, it counts as gone, and the driver's requests wait until it is back.
pub struct Bridge {
    pub(super) options: Options,
    pub(super) wakes: Wakes,
    pub(super) link: Link,
    /// When the daemon was reached, and how long to wait before it is tried again.
    pub(super) up_since: Instant,
    pub(super) pause: Duration,
    offered: u64,
    pub(super) config: Config,
    /// One for each queue; those that the daemon serves come first.
    pub(super) rings: Vec<Ring>,
    /// Whether requests pass through this process, because the daemon keeps no track of them.
    relayed: bool,
    /// Where the rings are that this daemon has then.
    pub(super) shadow: Option<Arc<Shadow>>,
    /// What the daemon keeps track in, since the driver set the device up, if it does.
    pub(super) inflight: Option<Inflight>,
    /// Whether this daemon has it.
    pub(super) has_inflight: bool,
    /// What the daemon signals when a ring is broken; another one for each driver.
    broken: Option<EventFd>,
    pub(super) log: RateLimit,
}

/// The connection to the daemon.
pub(super) enum Link {
    /// Rings can be served.
    Up(Box<Daemon>),
    /// It was asked what it is, and may take its time to answer.
    Greeted(Exchange),
    /// There is none until the timer says to try.
    Down,
}

impl std::fmt::Debug for Bridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bridge").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Bridge {
    /// Reaches the daemon that serves the function:
    /// `type=TYPE,socket=PATH[,queues=N][,queue-size=N]`, and `tag=TAG` for a file system,
    /// `guest-cid=N` for a socket device, `mac=ADDRESS` for a network, `tracking=on|off` for a disk.
    ///
    /// # Errors
    /// [`ConfigError`]: a parameter can't be used, or the daemon is not there or unfit.
    pub fn from_parameters(parameters: &mut Parameters) -> Result<Self, ConfigError> {
        Self::new(Options::from_parameters(parameters)?)
    }

    pub(super) fn new(options: Options) -> Result<Self, ConfigError> {
        let path = options.socket.display().to_string();
        let unusable =
            |error: DaemonError| ConfigError::invalid("socket", format!("{path}: {error}"));
        let Options { kind, requests, made, patience, .. } = options;
        let mut daemon = Daemon::greet(&options.socket, patience)
            .and_then(|exchange| Daemon::negotiate(exchange, kind, requests))
            .map_err(unusable)?;
        let config = Config::new(kind, made, requests, &mut daemon).map_err(unusable)?;
        let offered = kind.offered(daemon.features()) | config.features();
        let queues = kind.layout.all(requests);
        // For good: the next daemon may be of another mind, and the driver's queues are where they
        // are.
        let relayed = options.tracking && !daemon.has_inflight();
        let bridge = || -> Result<Self, Errno> {
            let relay = |index| -> Result<_, Errno> {
                Ok(Relay::new(index, options.queue_size, EventFd::create()?))
            };
            let ring = |index| {
                let relay = relayed.then(|| relay(index)).transpose()?;
                Ok(Ring::new(index, EventFd::create()?, EventFd::create()?, relay))
            };
            Ok(Self {
                wakes: Wakes::new()?,
                link: Link::Down,
                up_since: Instant::now(),
                pause: Duration::ZERO,
                offered,
                config,
                rings: (0..queues).map(ring).collect::<Result<_, Errno>>()?,
                relayed,
                shadow: None,
                inflight: None,
                has_inflight: false,
                broken: None,
                log: RateLimit::default(),
                options,
            })
        };
        let mut bridge = bridge().map_err(|errno| unusable(errno.into()))?;
        for ring in &bridge.rings {
            let watched = bridge.wakes.watch(ring.call.as_fd(), Wake::Queue(ring.index()));
            watched.map_err(|errno| unusable(errno.into()))?;
            if ring.relay.is_some() {
                let watched = bridge.wakes.watch(ring.kick.as_fd(), Wake::Kick(ring.index()));
                watched.map_err(|errno| unusable(errno.into()))?;
            }
        }
        let watched = bridge.wakes.watch(daemon.exchange.socket(), Wake::Daemon);
        watched
            .map_err(DaemonError::from)
            .and_then(|()| bridge.welcome(daemon))
            .map_err(unusable)?;
        Ok(bridge)
    }

    /// Brings the daemon to where the world is.
    fn settle(&mut self, world: &mut World<'_>) {
        // What the last daemon gave back comes before what the next one gets.
        self.relay_all(world);
        match self.try_settle(world) {
            Ok(None) => {
                self.relay_all(world);
                self.pay_interrupts(world);
            }
            Ok(Some(reason)) => world.needs_reset(reason),
            Err(error) => self.lost(error),
        }
    }

    /// Returns why the device can't go on, if it can't.
    fn try_settle(&mut self, world: &mut World<'_>) -> Result<Option<&'static str>, DaemonError> {
        let Link::Up(daemon) = &mut self.link else { return Ok(None) };
        let Options { kind, requests, queue_size, .. } = self.options;
        let served = kind.layout.served(requests);
        daemon.exchange.begin();

        let mut features = kind.passed_on(world.features());
        if self.relayed {
            // Between it and us are fewer frills.
            features &= !feature::EVENT_IDX;
        }
        let guest_memory = world.memory();
        let mut queues: Vec<Option<(Setup, Arc<EventFd>)>> = Vec::new();
        for ring in &self.rings[..served.into()] {
            let setup = guest_memory.as_ref().and_then(|_| setup(world, ring.index()));
            queues.push(setup.map(|setup| (setup, route(world, ring))));
        }

        let slots = daemon.slots().saturating_sub(usize::from(self.relayed));
        let wants_shadow = self.relayed && queues.iter().any(Option::is_some);
        if wants_shadow && self.shadow.is_none() {
            let windows: Vec<_> = world.context().windows().collect();
            self.shadow = Some(Arc::new(Shadow::new(served, windows.into_iter())?));
        }
        let shadow = self.shadow.clone();
        let mut regions = Wanted::new(world.context().windows(), slots);
        if let Some(shadow) = &shadow {
            regions = regions.with(shadow.region());
        }
        let moves = daemon.memory_moves(&regions);
        for (ring, queue) in self.rings.iter_mut().zip(&queues) {
            if moves || queue.is_none() {
                ring.stop(daemon)?;
            }
        }
        self.rings.iter_mut().try_for_each(|ring| ring.wait(daemon, kind.finishes))?;
        let Some(memory) = guest_memory.filter(|_| queues.iter().any(Option::is_some)) else {
            if daemon.has_memory() {
                daemon.set_memory(&regions)?;
            }
            daemon.exchange.settle()?;
            return Ok(None);
        };
        if features & !daemon.features() != 0 {
            return Ok(Some("the daemon that came back lacks features that were negotiated"));
        }
        let tracked = self.inflight.is_some() && daemon.has_inflight();
        if !tracked && !kind.repeats && self.rings.iter().any(Ring::is_lost) {
            return Ok(Some("the daemon left in the middle of requests and kept no track of them"));
        }
        daemon.set_features(features)?;
        if !daemon.has_inflight() || self.relayed {
            self.inflight = None;
        } else if !self.has_inflight {
            let inflight = match self.inflight.take() {
                Some(inflight) => inflight,
                None => Inflight::new(daemon, served, queue_size)?,
            };
            inflight.hand_over(daemon)?;
            self.inflight = Some(inflight);
            self.has_inflight = true;
        }
        daemon.set_memory(&regions)?;
        if regions.left_out > 0
            && let Some(suppressed) = self.log.admit()
        {
            let (left_out, socket) = (regions.left_out, self.options.socket.display());
            warn!(%socket, suppressed, "the daemon has no room for {left_out} regions of memory");
        }
        let guest = Guest { memory: &memory, regions: &regions, shadow: shadow.as_ref() };
        if self.broken.is_none() {
            let broken = EventFd::create()?;
            self.wakes.watch(broken.as_fd(), Wake::Broken)?;
            self.broken = Some(broken);
        }
        let broken = self.broken.as_ref().expect("it was just made").as_fd();
        let mut started = false;
        for (ring, queue) in self.rings.iter_mut().zip(&queues) {
            let Some((setup, call)) = queue else { continue };
            if ring.is_running() {
                ring.route(daemon, call)?;
                continue;
            }
            match ring.start(daemon, *setup, guest, call, broken) {
                Ok(()) => started = true,
                // A firmware changes the memory map under its own rings, and it comes back.
                Err(StartError::Ring) => debug!(queue = ring.index(), "its rings have no memory"),
                Err(StartError::Daemon(error)) => return Err(error),
            }
        }
        if started {
            daemon.set_driver_ok()?;
        }
        daemon.exchange.settle()?;
        Ok(None)
    }

    /// Passes the requests of relayed queues on, and back.
    fn relay_all(&mut self, world: &mut World<'_>) {
        if self.relayed {
            (0..).take(self.rings.len()).for_each(|index| self.relay(index, world));
        }
    }

    fn relay(&mut self, index: u16, world: &mut World<'_>) {
        let Some(ring) = self.rings.get_mut(usize::from(index)) else { return };
        let running = ring.is_running();
        let (Some(relay), Some(memory)) = (&mut ring.relay, world.memory()) else { return };
        let Some(queue) = world.queue(index) else { return };
        if !running && !Setup::of(queue).is_reachable(&memory) {
            return;
        }
        let result = relay.give_back(queue, &memory).and_then(|interrupt| {
            if running {
                relay.take(queue, &memory)?;
            }
            Ok(interrupt)
        });
        match result {
            Ok(true) => world.interrupt_queue(index),
            Ok(false) => {}
            Err(RelayError::Driver(error)) => world.needs_reset(&format!("queue {index}: {error}")),
            Err(RelayError::Daemon(error)) => {
                relay.distrust();
                self.lost(error);
            }
        }
    }

    /// Interrupts the driver for what it could not be interrupted for when it happened.
    fn pay_interrupts(&mut self, world: &mut World<'_>) {
        if world.is_live() {
            for ring in self.rings.iter_mut().filter(|ring| ring.owed) {
                ring.owed = false;
                world.interrupt_queue(ring.index());
            }
        }
    }

    /// The daemon said that its configuration changed, or it is another one.
    fn refresh_config(&mut self, world: &mut World<'_>) {
        let Link::Up(daemon) = &mut self.link else { return };
        daemon.exchange.begin();
        match self.config.refresh(daemon) {
            Ok(true) => world.interrupt_config(),
            Ok(false) => {}
            Err(error) => self.lost(error),
        }
    }

    fn refresh_config_if_changed(&mut self, world: &mut World<'_>) {
        if let Link::Up(daemon) = &mut self.link
            && daemon.exchange.take_config_changed()
        {
            self.refresh_config(world);
        }
    }

    /// Forgets the eventfd for broken rings, which daemons may still have.
    fn forget_broken(&mut self) {
        if let Some(broken) = self.broken.take() {
            self.wakes.unwatch(broken.as_fd());
        }
    }

    fn woken_by(&mut self, wake: Wake, world: &mut World<'_>) {
        match wake {
            Wake::Daemon => {
                if self.look_at_daemon(world) {
                    self.settle(world);
                }
            }
            Wake::Channel | Wake::Again => self.serve_channel(),
            Wake::Timer => self.try_again(),
            Wake::Broken if world.is_started() => {
                world.needs_reset("the daemon says that a queue is broken");
            }
            Wake::Broken => {}
            Wake::Kick(index) => self.relay(index, world),
            Wake::Queue(index) if self.relayed => self.relay(index, world),
            Wake::Queue(index) => {
                if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                    ring.owed = true;
                }
                self.pay_interrupts(world);
            }
        }
    }
}

/// A queue as the driver set it up, if it is enabled.
fn setup(world: &mut World<'_>, index: u16) -> Option<Setup> {
    world.queue(index).map(|queue| Setup::of(queue))
}

/// What the daemon signals for a queue: the client's eventfd, or ours.
fn route(world: &mut World<'_>, ring: &Ring) -> Arc<EventFd> {
    if ring.relay.is_some() {
        return Arc::clone(&ring.call);
    }
    let vector = world.queue_vector(ring.index());
    let context = world.context();
    let route = vector.and_then(|vector| context.msix_route(vector));
    Arc::clone(route.unwrap_or(&ring.call))
}

impl Backing for Bridge {
    fn device_type(&self) -> DeviceType {
        self.options.kind.device_type
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; self.rings.len()]
    }

    fn needs_window_files(&self) -> bool {
        true
    }

    fn kick(&self, queue: u16) -> &Arc<EventFd> {
        &self.rings[usize::from(queue)].kick
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        self.rings.iter().map(|ring| ring.kick.as_fd()).collect()
    }

    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()> {
        let kicks = adopted(kept, self.rings.len())?;
        for (ring, kick) in self.rings.iter_mut().zip(kicks) {
            let before = std::mem::replace(&mut ring.kick, kick);
            if ring.relay.is_some() {
                self.wakes.unwatch(before.as_fd());
                self.wakes.watch(ring.kick.as_fd(), Wake::Kick(ring.index()))?;
            }
        }
        Ok(())
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8], _world: &mut World<'_>) {
        let Some(field) = self.config.writable(offset, data.len()) else { return };
        let Link::Up(daemon) = &mut self.link else { return };
        if !daemon.has_config() {
            return;
        }
        daemon.exchange.begin();
        let written = daemon.write_config(field.start, data);
        // Other fields may depend on it, of which the driver knows.
        if let Err(error) = written.and_then(|()| self.config.refresh(daemon)) {
            self.lost(error);
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wakes.as_fd()]
    }

    fn woken(&mut self, _wake: usize, world: &mut World<'_>) {
        for wake in self.wakes.take() {
            self.woken_by(wake, world);
        }
        self.refresh_config_if_changed(world);
    }

    fn kicked(&mut self, queue: u16, world: &mut World<'_>) {
        if self.relayed {
            self.relay(queue, world);
        } else {
            self.rings[usize::from(queue)].kick.signal();
        }
    }

    fn changed(&mut self, world: &mut World<'_>) {
        self.settle(world);
    }

    fn quiesce(&mut self) {
        let Link::Up(daemon) = &mut self.link else { return };
        daemon.exchange.begin();
        let finishes = self.options.kind.finishes;
        let stopped = self.rings.iter_mut().try_for_each(|ring| ring.stop(daemon));
        let rings = &mut self.rings;
        let waited = stopped
            .and_then(|()| rings.iter_mut().try_for_each(|ring| ring.wait(daemon, finishes)));
        if let Err(error) = waited {
            self.lost(error);
        }
    }

    fn queue_stopped(&mut self, queue: u16, world: &mut World<'_>) {
        let ring = &mut self.rings[usize::from(queue)];
        let tracked = ring.is_lost() && self.inflight.is_some();
        ring.forget();
        if tracked {
            world.needs_reset("a queue was reset while the daemon that keeps track of it was away");
        }
        self.settle(world);
    }

    fn reset(&mut self) {
        self.rings.iter_mut().for_each(Ring::forget);
        self.shadow = None;
        self.inflight = None;
        self.has_inflight = false;
        self.forget_broken();
        if let Link::Up(daemon) = &mut self.link
            && let Err(error) = daemon.reset()
        {
            self.lost(error);
        }
    }

    fn reload(&mut self, world: &mut World<'_>) -> Result<(), String> {
        self.refresh_config(world);
        Ok(())
    }
}
