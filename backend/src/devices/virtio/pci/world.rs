use virtio_queue::{Queue, QueueT};

use super::driver::{DriverState, Interrupt};
use crate::devices::Context;
use crate::devices::virtio::spec::status;
use crate::dma::DmaGuard;

/// What a [`Backing`](super::Backing) reaches: the state that the driver set up, and the way to the
/// guest.
#[derive(Debug)]
pub struct World<'a> {
    driver: &'a mut DriverState,
    context: Context<'a>,
}

impl<'a> World<'a> {
    pub(super) fn new(driver: &'a mut DriverState, context: Context<'a>) -> Self {
        Self { driver, context }
    }

    /// What logs call the function.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.driver.name
    }

    /// The features that were negotiated; none before FEATURES_OK.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.driver.negotiated()
    }

    /// Whether the driver is set up, and the device has not failed since.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.driver.is_started()
    }

    /// Whether queues may be served now: the driver is [set up](Self::is_started), bus mastering is
    /// on and the function runs.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.is_started() && self.context.bus_master()
    }

    /// A queue that the driver enabled. Whether it may be served is another question.
    pub fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.driver.slot_mut(index).map(|slot| &mut slot.queue).filter(|queue| queue.ready())
    }

    /// Which start of a queue it was when the driver enabled this one: they are numbered, and the
    /// numbers last through resets.
    #[must_use]
    pub fn queue_start(&self, index: u16) -> Option<u64> {
        self.driver.slot(index).filter(|slot| slot.queue.ready()).map(|slot| slot.start)
    }

    /// Guest memory, while the world is live. The guard may be held until the next
    /// [`quiesce`](super::Backing::quiesce).
    #[must_use]
    pub fn memory(&self) -> Option<DmaGuard> {
        if self.is_live() { self.context.memory().ok() } else { None }
    }

    /// The MSI-X vector of a queue; `None` while MSI-X is disabled, or if the driver gave it none.
    #[must_use]
    pub fn queue_vector(&self, index: u16) -> Option<u16> {
        let vector = self.driver.slot(index)?.vector?;
        self.context.msix_enabled().then_some(vector)
    }

    /// Interrupts the driver for buffers that were given back in a queue (4.1.5.3). The driver's
    /// wish not to be is the caller's to look at.
    pub fn interrupt_queue(&mut self, index: u16) {
        let vector = self.driver.slot(index).and_then(|slot| slot.vector);
        self.driver.interrupt(Interrupt::Queue, vector, &mut self.context);
    }

    /// The device's configuration changed: the driver is told if it is set up, and finds another
    /// generation in any case (4.1.5.4).
    pub fn interrupt_config(&mut self) {
        self.driver.generation = self.driver.generation.wrapping_add(1);
        self.driver.revision += 1;
        if self.driver.status & status::DRIVER_OK != 0 {
            self.notify_config();
        }
    }

    /// The device can't go on: DEVICE_NEEDS_RESET, which the driver is told (2.1.2), and a line in
    /// the log for the operator. The first reason stands until the reset.
    pub fn needs_reset(&mut self, reason: &str) {
        if self.driver.fail(reason) && self.driver.status & status::DRIVER_OK != 0 {
            self.notify_config();
        }
    }

    /// DRIVER_OK: a failure from before is told now.
    pub(super) fn driver_is_ready(&mut self) {
        if self.driver.status & status::DEVICE_NEEDS_RESET != 0 {
            self.notify_config();
        }
    }

    /// The way to the guest.
    pub fn context(&mut self) -> &mut Context<'a> {
        &mut self.context
    }

    fn notify_config(&mut self) {
        let vector = self.driver.config_vector;
        self.driver.interrupt(Interrupt::Config, vector, &mut self.context);
    }
}
