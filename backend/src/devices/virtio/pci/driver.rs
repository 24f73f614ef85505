use tracing::warn;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::devices::Context;
use crate::devices::virtio::spec::status;
use crate::log_limit::RateLimit;

/// What the driver has set up, and what it is told.
#[derive(Debug)]
pub(super) struct DriverState {
    /// What logs call the function.
    pub(super) name: String,
    /// Feature bits that the device offers.
    pub(super) offered: u64,
    /// `device_feature_select` and `driver_feature_select`.
    pub(super) feature_select: [u32; 2],
    /// What the driver wrote to `driver_feature`: 128 bits, most of which nothing defines.
    pub(super) accepted: u128,
    pub(super) status: u8,
    pub(super) generation: u8,
    /// `None` is VIRTIO_MSI_NO_VECTOR.
    pub(super) config_vector: Option<u16>,
    pub(super) queue_select: u16,
    pub(super) isr: u8,
    /// How often a queue was enabled. Not even a reset begins to count anew.
    pub(super) starts: u64,
    /// Counts what changes here, but for what a request changes.
    pub(super) revision: u64,
    slots: Vec<Slot>,
    log: RateLimit,
}

/// A queue as the driver sets it up.
#[derive(Debug)]
pub(super) struct Slot {
    /// Ready while the driver has it enabled.
    pub(super) queue: Queue,
    /// `None` is VIRTIO_MSI_NO_VECTOR.
    pub(super) vector: Option<u16>,
    /// Addresses of descriptors, available and used ring, as they were written.
    pub(super) rings: [u64; 3],
    /// Which start of a queue this was, while it is enabled.
    pub(super) start: u64,
}

impl Slot {
    /// Makes a queue of what was set up.
    pub(super) fn enable(&mut self, event_idx: bool) -> Result<(), virtio_queue::Error> {
        let [descriptors, available, used] = self.rings.map(GuestAddress);
        self.queue.try_set_desc_table_address(descriptors)?;
        self.queue.try_set_avail_ring_address(available)?;
        self.queue.try_set_used_ring_address(used)?;
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        Ok(())
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) {
        self.queue.reset();
        self.vector = None;
        self.rings = [0; 3];
    }
}

/// What the driver is interrupted for: a bit of the ISR status (4.1.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    Queue = 1,
    Config = 2,
}

impl DriverState {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        let slot = |&size: &u16| Slot {
            queue: Queue::new(size).expect("a device's queue sizes are powers of two"),
            vector: None,
            rings: [0; 3],
            start: 0,
        };
        Self {
            name: String::new(),
            offered,
            feature_select: [0; 2],
            accepted: 0,
            status: 0,
            generation: 0,
            config_vector: None,
            queue_select: 0,
            isr: 0,
            starts: 0,
            revision: 0,
            slots: queue_sizes.iter().map(slot).collect(),
            log: RateLimit::default(),
        }
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) {
        self.feature_select = [0; 2];
        self.accepted = 0;
        self.status = 0;
        self.generation = 0;
        self.config_vector = None;
        self.queue_select = 0;
        self.isr = 0;
        self.revision += 1;
        self.slots_mut().for_each(Slot::reset);
    }

    pub(super) fn queue_count(&self) -> u16 {
        u16::try_from(self.slots.len()).expect("at most MAX_QUEUES")
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    pub(super) fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut()
    }

    pub(super) fn slot(&self, index: u16) -> Option<&Slot> {
        self.slots.get(usize::from(index))
    }

    pub(super) fn slot_mut(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))
    }

    /// A queue is enabled: which start of one that is.
    pub(super) fn next_start(&mut self) -> u64 {
        self.starts += 1;
        self.starts
    }

    /// See [`World::features`](super::World::features).
    pub(super) fn negotiated(&self) -> u64 {
        let agreed = self.status & status::FEATURES_OK != 0;
        if agreed { u64::try_from(self.accepted).unwrap_or(0) } else { 0 }
    }

    /// See [`World::is_started`](super::World::is_started).
    pub(super) fn is_started(&self) -> bool {
        self.status & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK
    }

    /// Sets DEVICE_NEEDS_RESET; returns whether that is new.
    pub(super) fn fail(&mut self, reason: &str) -> bool {
        if self.status & status::DEVICE_NEEDS_RESET != 0 {
            return false;
        }
        self.status |= status::DEVICE_NEEDS_RESET;
        self.revision += 1;
        if let Some(suppressed) = self.log.admit() {
            warn!(function = self.name, suppressed, "device needs a reset: {reason}");
        }
        true
    }

    /// "The device MUST reset ISR status to 0 on driver read" (4.1.4.5.1).
    pub(super) fn take_isr(&mut self, context: &mut Context<'_>) -> u8 {
        let isr = std::mem::take(&mut self.isr);
        self.drive_pin(context);
        isr
    }

    /// The pin is asserted as long as the ISR status is not 0; the function keeps it silent while
    /// MSI-X is enabled.
    pub(super) fn drive_pin(&self, context: &mut Context<'_>) {
        context.set_intx(self.isr != 0);
    }

    /// Sends an interrupt, by a message if MSI-X is enabled and by the pin otherwise.
    pub(super) fn interrupt(
        &mut self,
        interrupt: Interrupt,
        vector: Option<u16>,
        context: &mut Context<'_>,
    ) {
        let by_message = context.msix_enabled();
        if !by_message || interrupt == Interrupt::Config {
            self.isr |= interrupt as u8;
            self.drive_pin(context);
        }
        if by_message && let Some(vector) = vector {
            context.raise_msix(vector);
        }
    }
}
