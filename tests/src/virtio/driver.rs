//! A device that was set up by a driver (3.1.1), with its queues and interrupts.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use barkeep_protocol::wire::{IrqAction, IrqData, PciIrq, SetIrqs};
use barkeep_shim::client::Doorbell;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::feature;
use super::function::{Function, common, status};
use super::memory::Memory;
use super::queue::{Part, Queue, Used};
use crate::event_counter::EventCounter;

/// An interrupt that takes so long is lost.
pub const DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// How a driver sets its device up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The features that it accepts if they are offered. VERSION_1 comes on top, and what the device
    /// says of the platform.
    pub features: u64,
    /// The most queues that it uses.
    pub queues: u16,
    /// The most descriptors of a queue.
    pub size: u16,
    /// How it notifies the device.
    pub kicks: Kicks,
    /// How the device notifies it.
    pub interrupts: Interrupts,
}

/// How a device is notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicks {
    /// By a write to the queue's notification address.
    Write,
    /// By the eventfd that stands for it.
    Eventfd,
}

/// How a driver is notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// By MSI-X, with a vector for each queue and one for the configuration.
    Msix,
    /// By the pin, which masks itself until it is served.
    Intx,
}

impl Default for Setup {
    /// Everything that queues have, one queue of up to 256, eventfds, MSI-X.
    fn default() -> Self {
        let features = feature::EVENT_IDX | feature::INDIRECT_DESC | feature::RING_RESET;
        let (kicks, interrupts) = (Kicks::Eventfd, Interrupts::Msix);
        Self { features, queues: 1, size: 256, kicks, interrupts }
    }
}

/// A driver with its device.
#[derive(Debug)]
pub struct Driver {
    /// The device.
    pub function: Arc<Function>,
    /// What the device may reach.
    pub memory: Arc<Memory>,
    /// The features that were negotiated.
    pub features: u64,
    queues: Vec<Queue>,
    setup: Setup,
    /// Queues that had an interrupt and are not empty yet, as far as is known.
    interrupted: Vec<bool>,
    /// The queue that is looked at first.
    next_queue: u16,
    kicks: Vec<Kick>,
    /// The configuration's vector, then those of the queues. Only the first one for the pin.
    vectors: Vec<EventCounter>,
}

#[derive(Debug)]
enum Kick {
    Write(u64),
    Eventfd(Arc<OwnedFd>),
}

/// Something that the device did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It gave back a request of this queue.
    Used(u16, Used),
    /// It said that its configuration changed, or that it needs a reset.
    Config,
}

impl Driver {
    /// Resets the device and sets it up. Its memory is mapped already.
    ///
    /// # Panics
    /// If the device does not agree.
    #[must_use]
    pub fn start(function: &Arc<Function>, memory: &Arc<Memory>, setup: Setup) -> Self {
        function.reset();
        function.set_status(status::ACKNOWLEDGE);
        function.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let wanted = setup.features | feature::VERSION_1 | feature::ACCESS_PLATFORM;
        let features = function.features() & wanted;
        assert_ne!(features & feature::VERSION_1, 0, "a modern device");
        function.accept(features);
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        function.set_status(ready);
        assert_eq!(function.status(), ready, "the device agrees to {features:#x}");

        let count = setup.queues.min(function.queues());
        let vectors = match setup.interrupts {
            Interrupts::Msix => (0..=count).map(|_| EventCounter::new()).collect(),
            Interrupts::Intx => {
                function.use_pin();
                vec![EventCounter::new()]
            }
        };
        let mut driver = Self {
            function: Arc::clone(function),
            memory: Arc::clone(memory),
            features,
            queues: Vec::new(),
            kicks: Vec::new(),
            vectors,
            setup,
            interrupted: vec![false; count.into()],
            next_queue: 0,
        };
        driver.connect_vectors();
        if setup.interrupts == Interrupts::Msix {
            driver.set_vector(common::CONFIG_MSIX_VECTOR, 0);
        }
        for index in 0..count {
            let queue = driver.place_queue(index);
            driver.queues.push(queue);
        }
        driver.find_kicks();
        function.set_status(ready | status::DRIVER_OK);
        driver
    }

    /// Goes on with the function in another place, which was brought to the state of the old one:
    /// what the driver of a guest does not notice, and its VMM does. Between the two,
    /// [`connect`](Self::connect) is called on the new function.
    pub fn go_on_with(&mut self, function: &Arc<Function>) {
        self.function = Arc::clone(function);
        self.find_kicks();
    }

    /// Gives a function this driver's memory and interrupts.
    pub fn connect(&self, function: &Function) {
        self.memory.map(&function.client);
        self.connect_vectors_of(function);
    }

    /// Resets a queue and sets it up again (2.6.1); its requests are forgotten.
    ///
    /// # Panics
    /// If the device does not do it.
    pub fn reset_queue(&mut self, index: u16) {
        let area = self.function.common;
        self.function.select(index);
        self.function.write(area, common::QUEUE_RESET, &1_u16.to_le_bytes());
        let busy = || self.function.read(area, common::QUEUE_RESET) != [0, 0];
        assert!((0..1000).any(|_| !busy()), "queue {index} does not reset");
        assert_eq!(self.function.read(area, common::QUEUE_ENABLE), [0, 0], "queue {index}");
        self.queues[usize::from(index)] = self.place_queue(index);
        self.interrupted[usize::from(index)] = false;
    }

    fn connect_vectors(&self) {
        self.connect_vectors_of(&self.function);
    }

    fn connect_vectors_of(&self, function: &Function) {
        let fd = |vector: &EventCounter| vector.as_fd().try_clone_to_owned().expect("a descriptor");
        let set = SetIrqs {
            action: IrqAction::Trigger,
            data: IrqData::Eventfd,
            index: match self.setup.interrupts {
                Interrupts::Msix => PciIrq::Msix.index(),
                Interrupts::Intx => PciIrq::Intx.index(),
            },
            start: 0,
            count: u32::try_from(self.vectors.len()).expect("a few"),
        };
        let eventfds = self.vectors.iter().map(fd).collect();
        function.client.set_irqs(&set, eventfds).expect("as many vectors");
    }

    fn set_vector(&self, register: u64, vector: u16) {
        let common = self.function.common;
        self.function.write(common, register, &vector.to_le_bytes());
        let read = u16::from_le_bytes(self.function.read(common, register));
        assert_eq!(read, vector, "the device has the vector");
    }

    /// Sets up a queue (4.1.5.1.3).
    fn place_queue(&self, index: u16) -> Queue {
        let function = &self.function;
        let area = function.common;
        function.select(index);
        let largest = u16::from_le_bytes(function.read(area, common::QUEUE_SIZE));
        assert!(largest.is_power_of_two(), "queue {index} has {largest} descriptors");
        let size = largest.min(self.setup.size);
        let has = |bit: u64| self.features & bit != 0;
        let (event_idx, indirect) = (has(feature::EVENT_IDX), has(feature::INDIRECT_DESC));
        let queue = Queue::new(&self.memory, index, size, event_idx, indirect);
        function.write(area, common::QUEUE_SIZE, &size.to_le_bytes());
        if self.setup.interrupts == Interrupts::Msix {
            self.set_vector(common::QUEUE_MSIX_VECTOR, index + 1);
        }
        let registers = [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
        for (register, address) in registers.into_iter().zip(queue.addresses()) {
            function.write(area, register, &address.to_le_bytes());
        }
        function.write(area, common::QUEUE_ENABLE, &1_u16.to_le_bytes());
        queue
    }

    fn find_kicks(&mut self) {
        let kicks = (0..self.queues()).map(|index| {
            let offset = self.notify_offset(index);
            match self.setup.kicks {
                Kicks::Write => Kick::Write(offset),
                Kicks::Eventfd => Kick::Eventfd(doorbell(&self.function, offset).eventfd),
            }
        });
        self.kicks = kicks.collect();
    }

    /// Where a queue is notified of, in the notification structure.
    #[must_use]
    pub fn notify_offset(&self, index: u16) -> u64 {
        self.function.select(index);
        let area = self.function.common;
        let place = u16::from_le_bytes(self.function.read(area, common::QUEUE_NOTIFY_OFF));
        u64::from(place) * u64::from(self.function.notify_multiplier)
    }

    /// A queue.
    pub fn queue(&mut self, index: u16) -> &mut Queue {
        &mut self.queues[usize::from(index)]
    }

    /// Exchanges the first two queues, for tests that have the first one do something.
    pub fn swap_queues(&mut self) {
        self.queues.swap(0, 1);
        self.kicks.swap(0, 1);
        self.vectors.swap(1, 2);
    }

    /// How many queues are set up.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::try_from(self.queues.len()).expect("a few")
    }

    /// Makes a request available and notifies the device if it wants that; the request's head.
    ///
    /// # Panics
    /// If the queue is full.
    pub fn send(&mut self, queue: u16, parts: &[Part]) -> u16 {
        let head = self.queue(queue).add(parts).expect("the test leaves room in the queue");
        if self.queue(queue).needs_kick() {
            self.kick(queue);
        }
        head
    }

    /// Notifies the device, whether it wants that or not.
    pub fn kick(&self, queue: u16) {
        match &self.kicks[usize::from(queue)] {
            Kick::Write(offset) => {
                self.function.write(self.function.notify, *offset, &queue.to_le_bytes());
            }
            Kick::Eventfd(eventfd) => {
                let written = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
                assert_eq!(written, Ok(8), "a counter far from its end");
            }
        }
    }

    /// What the device does next. Without an interrupt for it, it is never seen.
    ///
    /// # Panics
    /// If nothing happens for [`DEADLINE`].
    pub fn wait(&mut self) -> Event {
        self.next_before(&DEADLINE).unwrap_or_else(|| {
            let waiting: Vec<_> = self.queues.iter().map(Queue::outstanding).collect();
            let status = self.function.status();
            unreachable!("no interrupt, with {waiting:?} requests; status {status:#x}")
        })
    }

    /// What the device has done already, if there was an interrupt for it.
    pub fn look(&mut self) -> Option<Event> {
        self.next_before(&Timespec::default())
    }

    fn next_before(&mut self, deadline: &Timespec) -> Option<Event> {
        loop {
            if self.take_interrupts() {
                return Some(Event::Config);
            }
            if let Some((queue, used)) = self.next_of_interrupted() {
                return Some(Event::Used(queue, used));
            }
            let mut fds: Vec<_> =
                self.vectors.iter().map(|vector| PollFd::new(vector, PollFlags::IN)).collect();
            if poll(&mut fds, Some(deadline)).expect("eventfds") == 0 {
                return None;
            }
        }
    }

    /// Takes note of the interrupts of queues. Whether there was one of the configuration.
    fn take_interrupts(&mut self) -> bool {
        match self.setup.interrupts {
            Interrupts::Msix => {
                for (interrupted, vector) in self.interrupted.iter_mut().zip(&self.vectors[1..]) {
                    *interrupted |= vector.take() > 0;
                }
                self.vectors[0].take() > 0
            }
            Interrupts::Intx => {
                if self.vectors[0].take() == 0 {
                    return false;
                }
                // Reading it takes the level away (4.1.4.5); only then may the pin speak again.
                let [status] = self.function.read::<1>(self.function.isr, 0);
                self.function.unmask_pin();
                if status & 1 != 0 {
                    self.interrupted.fill(true);
                }
                status & 2 != 0
            }
        }
    }

    /// Looks at the queues that had an interrupt, each until it is empty and armed again. They have
    /// their turns: one that is never empty does not keep the others waiting.
    fn next_of_interrupted(&mut self) -> Option<(u16, Used)> {
        let first = self.next_queue;
        for index in (first..self.queues()).chain(0..first) {
            let place = usize::from(index);
            let (interrupted, queue) = (&mut self.interrupted[place], &mut self.queues[place]);
            while *interrupted {
                if let Some(used) = queue.used() {
                    self.next_queue = (index + 1) % self.queues();
                    return Some((index, used));
                }
                *interrupted = queue.arm();
            }
        }
        None
    }

    /// The next request that the device gives back.
    ///
    /// # Panics
    /// If something else happens.
    pub fn next_used(&mut self, queue: u16) -> Used {
        match self.wait() {
            Event::Used(index, used) if index == queue => used,
            other => unreachable!("{other:?} came before a request of queue {queue}"),
        }
    }
}

/// The eventfd that stands for a write of 2 bytes to the notification structure.
///
/// # Panics
/// If there is none.
fn doorbell(function: &Function, offset: u64) -> Doorbell {
    let at = function.notify.offset + offset;
    let doorbells = function.client.doorbells(function.notify.bar).expect("a served function");
    let found = doorbells.iter().find(|doorbell| doorbell.offset == at);
    found.unwrap_or_else(|| unreachable!("no eventfd for {at:#x}: {doorbells:?}")).clone()
}
