use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::records::{Attached, Records};
use super::{Backing, World};
use crate::devices::RestoreError;
use crate::devices::virtio::spec::{DeviceType, feature};
use crate::devices::virtio::{
    Core, DeviceError, InFlight, Io, QueueAccess, QueueError, Words, needs_interrupt,
};
use crate::dma::DmaGuard;
use crate::irq::EventFd;

/// A core of this process, served in the thread that serves the client.
pub struct CoreBacking {
    core: Box<dyn Core<DmaGuard>>,
    /// What the core is told that the driver kicked, by queue. They are the first wakes.
    kicks: Vec<Arc<EventFd>>,
    own_wakes: usize,
    /// Whether buffers were given back that the driver was not told of, by queue.
    used: Vec<bool>,
    /// Whether the core was told of the driver.
    started: bool,
    /// Whether the core could reach memory when something last changed.
    live: bool,
    /// Queues that it could serve then.
    served: Vec<bool>,
    /// Requests of another instance that the core was not given yet.
    to_resubmit: Vec<InFlight>,
    /// What outlives the process, if something does.
    records: Option<Records>,
    /// Whether the configuration is another than the driver was told, by another instance.
    config_differs: bool,
}

impl CoreBacking {
    /// Lets a core serve its queues.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn new(core: Box<dyn Core<DmaGuard>>) -> Result<Self, Errno> {
        let queues = core.queue_sizes().len();
        let kicks = (0..queues).map(|_| EventFd::create().map(Arc::new));
        Ok(Self {
            kicks: kicks.collect::<Result<_, _>>()?,
            own_wakes: core.wakes().len(),
            used: vec![false; queues],
            started: false,
            live: false,
            served: vec![false; queues],
            to_resubmit: Vec::new(),
            records: None,
            config_differs: false,
            core,
        })
    }

    /// Lets the core do something with its queues, and tells the driver what came of it.
    fn serve(
        &mut self,
        world: &mut World<'_>,
        serve: impl FnOnce(&mut dyn Core<DmaGuard>, &mut CoreIo<'_, '_>) -> Result<(), DeviceError>,
    ) {
        let memory = world.memory();
        let Some(memory) = &memory else { return };
        let records = self.records.as_ref();
        let mut io = CoreIo { world, memory: Some(memory), used: &mut self.used, records };
        let result = serve(self.core.as_mut(), &mut io);
        // What was given back before something went wrong is the driver's all the same.
        let told = self.interrupt(world, memory);
        if let Err(error) = result.and(told) {
            world.needs_reset(&error.to_string());
        }
    }

    fn interrupt(&mut self, world: &mut World<'_>, memory: &DmaGuard) -> Result<(), DeviceError> {
        for (used, index) in self.used.iter_mut().zip(0..) {
            if std::mem::take(used)
                && let Some(queue) = world.queue(index)
                && needs_interrupt(queue, memory)
                    .map_err(|error| DeviceError::Queue { queue: index, error })?
            {
                world.interrupt_queue(index);
            }
        }
        Ok(())
    }

    /// Finds out where the queues are that are not served yet. Returns those that a predecessor
    /// served.
    fn attach(&mut self, world: &mut World<'_>) -> BTreeSet<u16> {
        let mut recovered = BTreeSet::new();
        let mut resubmit = Vec::new();
        let (Some(records), Some(memory)) = (&mut self.records, world.memory()) else {
            return recovered;
        };
        for queue in (0..).take(self.kicks.len()) {
            match records.attach(queue, world, &memory, &self.to_resubmit) {
                Ok(Attached::Before | Attached::Anew) => {}
                Ok(Attached::Recovered(requests)) => {
                    recovered.insert(queue);
                    self.to_resubmit.retain(|request| request.queue != queue);
                    self.core.queue_recovered(queue);
                    let request = |(when, head)| (when, InFlight { queue, head });
                    resubmit.extend(requests.into_iter().map(request));
                }
                // Firmware changes the map under its own rings: it waits for them.
                Err(QueueError::Memory(_)) => {}
                Err(error) => {
                    world.needs_reset(&DeviceError::Queue { queue, error }.to_string());
                    break;
                }
            }
        }
        resubmit.sort_unstable();
        self.to_resubmit.extend(resubmit.into_iter().map(|(_, request)| request));
        recovered
    }

    /// The device's configuration, as far as any has fields.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        self.core.config_read(0, &mut config);
        config
    }

    /// Whether it is known where the queue is, if there is one.
    fn may_serve(&self, queue: u16, world: &World<'_>) -> bool {
        let Some(records) = &self.records else { return true };
        world.queue_start(queue).is_none() || records.served(queue, world).is_some()
    }

    /// The core can reach memory: what it may have missed is done now.
    fn catch_up(&mut self, world: &mut World<'_>, was_live: bool) {
        let recovered = self.attach(world);
        let resubmit = std::mem::take(&mut self.to_resubmit);
        let (resubmit, later) =
            resubmit.into_iter().partition(|request| self.may_serve(request.queue, world));
        self.to_resubmit = later;
        for request in resubmit {
            self.serve(world, |core, io| core.resubmit(request, io));
        }
        for queue in (0..).take(self.kicks.len()) {
            let ready = world.queue(queue).is_some() && self.may_serve(queue, world);
            let served = std::mem::replace(&mut self.served[usize::from(queue)], ready);
            if ready && !(served && was_live) {
                self.serve(world, |core, io| core.kicked(queue, io));
                if served || recovered.contains(&queue) {
                    // A client may drop the message that was sent just before bus mastering went off,
                    // and a process may be killed before it sends one. With event indices nothing
                    // would ever ask for another one.
                    world.interrupt_queue(queue);
                }
            }
        }
        for wake in 0..if was_live { 0 } else { self.own_wakes } {
            self.serve(world, |core, io| core.woken(wake, io));
        }
    }
}

impl Backing for CoreBacking {
    fn device_type(&self) -> DeviceType {
        self.core.device_type()
    }

    fn features(&self) -> u64 {
        self.core.features() | feature::TRANSPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.core.queue_sizes()
    }

    fn kick(&self, queue: u16) -> &Arc<EventFd> {
        &self.kicks[usize::from(queue)]
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        self.core.config_read(offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8], _: &mut World<'_>) {
        self.core.config_write(offset, data);
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        let kicks = self.kicks.iter().map(|kick| kick.as_fd());
        kicks.chain(self.core.wakes()).collect()
    }

    fn woken(&mut self, wake: usize, world: &mut World<'_>) {
        match wake.checked_sub(self.kicks.len()) {
            Some(own) => self.serve(world, |core, io| core.woken(own, io)),
            None => self.kicked(u16::try_from(wake).unwrap_or(u16::MAX), world),
        }
    }

    fn kicked(&mut self, queue: u16, world: &mut World<'_>) {
        if !self.may_serve(queue, world) {
            // Its rings may be there now.
            self.changed(world);
        } else if world.queue(queue).is_some() {
            self.serve(world, |core, io| core.kicked(queue, io));
        }
    }

    fn changed(&mut self, world: &mut World<'_>) {
        if world.is_started() && !self.started {
            self.started = true;
            self.core.start(world.features());
        }
        let was_live = std::mem::replace(&mut self.live, world.is_live());
        if self.live {
            self.catch_up(world, was_live);
        }
    }

    fn quiesce(&mut self) {
        self.core.quiesce();
    }

    fn queue_stopped(&mut self, queue: u16, _: &mut World<'_>) {
        self.core.queue_stopped(queue);
        self.used[usize::from(queue)] = false;
        self.served[usize::from(queue)] = false;
        self.to_resubmit.retain(|request| request.queue != queue);
    }

    fn reset(&mut self) {
        self.core.reset();
        self.used.fill(false);
        self.served.fill(false);
        self.to_resubmit.clear();
        if let Some(records) = &mut self.records {
            records.detach();
        }
        self.started = false;
        self.live = false;
        self.config_differs = false;
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        self.kicks.iter().map(|kick| kick.as_fd()).chain(self.core.kept()).collect()
    }

    fn adopt(&mut self, mut kept: Vec<OwnedFd>) -> io::Result<()> {
        let of_core = kept.split_off(self.kicks.len().min(kept.len()));
        self.kicks = adopted(kept, self.kicks.len())?;
        self.core.adopt(of_core)
    }

    fn word_count(&self) -> usize {
        let in_order = self.core.is_in_order();
        Records::word_count(&self.core.queue_sizes(), in_order) + self.core.word_count()
    }

    fn set_words(&mut self, mut words: Words) {
        let in_order = self.core.is_in_order();
        self.records = Some(Records::new(&mut words, &self.core.queue_sizes(), in_order));
        self.core.set_words(words);
    }

    fn records(&self) -> Option<&Records> {
        self.records.as_ref()
    }

    fn revision(&self) -> u64 {
        self.core.revision()
    }

    fn save(&self) -> Option<Vec<u8>> {
        let requests = self.to_resubmit.iter().copied().chain(self.core.in_flight());
        let in_flight = requests.map(|request| (request.queue, request.head)).collect();
        let core = self.core.save();
        let state = match &self.records {
            None => State::V1 { in_flight, core },
            Some(_) => State::V2 { in_flight, core, config: self.config() },
        };
        Some(postcard::to_allocvec(&state).expect("plain data serialises"))
    }

    fn restore(&mut self, state: &[u8], features: Option<u64>) -> Result<(), RestoreError> {
        let (state, rest) = postcard::take_from_bytes(state).map_err(|_| RestoreError)?;
        let (in_flight, core, config) = match state {
            State::V1 { in_flight, core } => (in_flight, core, None),
            State::V2 { in_flight, core, config } => (in_flight, core, Some(config)),
        };
        let sizes = self.core.queue_sizes();
        let mut known = BTreeSet::new();
        let possible = |&(queue, head): &(u16, u16)| {
            let size = sizes.get(usize::from(queue));
            size.is_some_and(|size| head < *size) && known.insert((queue, head))
        };
        let by_nobody = features.is_none() && !in_flight.is_empty();
        if !rest.is_empty() || by_nobody || !in_flight.iter().all(possible) {
            return Err(RestoreError);
        }
        if let Some(features) = features {
            self.started = true;
            self.core.start(features);
        }
        self.core.restore(&core)?;
        self.config_differs = config.is_some_and(|config| config != self.config());
        let request = |(queue, head)| InFlight { queue, head };
        self.to_resubmit = in_flight.into_iter().map(request).collect();
        Ok(())
    }

    fn resume(&mut self, world: &mut World<'_>) {
        // What was finished while it was stopped has told nobody yet.
        self.live = false;
        self.changed(world);
        if std::mem::take(&mut self.config_differs) {
            world.interrupt_config();
        }
    }

    fn reload(&mut self, world: &mut World<'_>) -> Result<(), String> {
        let memory = world.memory();
        let (memory_now, records) = (memory.as_ref(), self.records.as_ref());
        let mut io = CoreIo { world, memory: memory_now, used: &mut self.used, records };
        let result = self.core.reload(&mut io);
        if let Some(memory) = &memory
            && let Err(error) = self.interrupt(world, memory)
        {
            world.needs_reset(&error.to_string());
        }
        result
    }
}

/// The doorbells of a predecessor.
///
/// # Errors
/// When there are not so many, or they are no eventfds.
pub(in crate::devices) fn adopted(
    fds: Vec<OwnedFd>,
    count: usize,
) -> io::Result<Vec<Arc<EventFd>>> {
    if fds.len() != count {
        return Err(io::Error::other(format!("{} descriptors in place of {count}", fds.len())));
    }
    let eventfd = |fd| EventFd::new(fd).map(Arc::new).map_err(io::Error::other);
    fds.into_iter().map(eventfd).collect()
}

/// More than any device of ours has fields, in bytes.
const CONFIG: usize = 128;

/// The versions of the state.
#[derive(Serialize, Deserialize)]
enum State {
    V1 {
        /// Queue and head of each request.
        in_flight: Vec<(u16, u16)>,
        core: Vec<u8>,
    },
    /// Of a device with records.
    V2 {
        in_flight: Vec<(u16, u16)>,
        core: Vec<u8>,
        /// What the driver has read, or been told to read.
        config: Vec<u8>,
    },
}

/// The transport as a core reaches it.
struct CoreIo<'a, 'w> {
    world: &'a mut World<'w>,
    memory: Option<&'a DmaGuard>,
    used: &'a mut [bool],
    records: Option<&'a Records>,
}

impl Io<DmaGuard> for CoreIo<'_, '_> {
    fn queue(&mut self, index: u16) -> Option<QueueAccess<'_, DmaGuard>> {
        let memory = self.memory?;
        let used = self.used.get_mut(usize::from(index))?;
        let features = self.world.features();
        let record = match self.records {
            Some(records) => Some(records.served(index, self.world)?),
            None => None,
        };
        let queue = self.world.queue(index)?;
        Some(QueueAccess::new(queue, memory, features, used).recorded(record))
    }

    fn config_changed(&mut self) {
        self.world.interrupt_config();
    }
}
