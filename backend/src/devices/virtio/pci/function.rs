use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::common::{self, Request};
use super::driver::DriverState;
use super::layout::{self, MAX_QUEUES, STRUCTURES, Structure};
use super::{Backing, World};
use crate::config::ConfigError;
use crate::devices::virtio::spec::feature;
use crate::devices::{Context, Device, Doorbell, Saved};
use crate::pci::{BarIndex, Effects, FunctionSpec};

/// A virtio device behind a PCI function: modern, with the legacy interface left out (4.1).
///
/// It keeps what the driver sets up and tells its [`Backing`] what that means. A queue is served in
/// the thread that serves the client, or elsewhere if that is where the backing has it.
pub struct VirtioFunction {
    pub(super) driver: DriverState,
    pub(super) backing: Box<dyn Backing>,
    /// Whether the world was live when this was last looked at.
    live: bool,
    /// Whether the backing can move.
    movable: bool,
    /// Whether a state that was saved together with the backing's words may still come.
    pub(super) awaits_own_state: bool,
}

impl fmt::Debug for VirtioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioFunction").field("driver", &self.driver).finish_non_exhaustive()
    }
}

impl VirtioFunction {
    /// A function whose queues `backing` serves.
    ///
    /// # Errors
    /// [`ConfigError`]: too many queues.
    pub fn new(backing: Box<dyn Backing>) -> Result<Self, ConfigError> {
        let sizes = backing.queue_sizes();
        if sizes.len() > MAX_QUEUES.into() {
            let reason = format!("{} queues, more than {MAX_QUEUES}", sizes.len());
            return Err(ConfigError::invalid("queues", reason));
        }
        let offered = backing.features() & feature::OFFERABLE;
        let movable = backing.save().is_some();
        let driver = DriverState::new(offered, &sizes);
        Ok(Self { driver, backing, live: false, movable, awaits_own_state: false })
    }

    /// Tells the backing that something is another now.
    fn changed(&mut self, context: &mut Context<'_>) {
        self.stop_if_dead(context);
        self.call(context, |backing, world| backing.changed(world));
    }

    /// Lets the backing do something, which may end in DEVICE_NEEDS_RESET.
    pub(super) fn call<R>(
        &mut self,
        context: &mut Context<'_>,
        call: impl FnOnce(&mut dyn Backing, &mut World<'_>) -> R,
    ) -> R {
        let mut world = World::new(&mut self.driver, context.reborrow());
        let result = call(self.backing.as_mut(), &mut world);
        self.stop_if_dead(context);
        result
    }

    /// What must not go on does not.
    fn stop_if_dead(&mut self, context: &mut Context<'_>) {
        let live = World::new(&mut self.driver, context.reborrow()).is_live();
        if self.live && !live {
            self.backing.quiesce();
        }
        self.live = live;
    }

    fn common_write(&mut self, offset: u64, data: &[u8], context: &mut Context<'_>) {
        self.awaits_own_state = false;
        match common::write(&mut self.driver, offset, data) {
            Request::Nothing => {}
            Request::Reset => {
                self.backing.quiesce();
                self.power_on();
                self.driver.drive_pin(context);
            }
            Request::Start => {
                self.call(context, |_, world| world.driver_is_ready());
                self.changed(context);
            }
            Request::Change => self.changed(context),
            Request::StopQueue(queue) => {
                self.backing.quiesce();
                if let Some(slot) = self.driver.slot_mut(queue) {
                    slot.reset();
                }
                self.call(context, |backing, world| backing.queue_stopped(queue, world));
            }
            Request::Fail(reason) => {
                self.call(context, |_, world| world.needs_reset(&reason));
                self.changed(context);
            }
        }
    }

    /// The backing is quiesced.
    pub(super) fn power_on(&mut self) {
        self.backing.reset();
        self.driver.reset();
        self.live = false;
    }

    fn structure(&self, bar: BarIndex, offset: u64, length: usize) -> Option<Structure> {
        let queues = self.driver.queue_count();
        Structure::at(offset, length, queues).filter(|_| bar == STRUCTURES)
    }
}

impl Device for VirtioFunction {
    fn spec(&self) -> FunctionSpec {
        layout::function(self.backing.device_type(), self.driver.queue_count())
    }

    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.driver.name);
    }

    fn needs_window_files(&self) -> bool {
        self.backing.needs_window_files()
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8], context: &mut Context<'_>) {
        match self.structure(bar, offset, data.len()) {
            Some(Structure::Common(offset)) => common::read(&self.driver, offset, data),
            Some(Structure::Isr) => data.fill(self.driver.take_isr(context)),
            Some(Structure::Device(offset)) => {
                data.fill(0);
                self.backing.config_read(offset, data);
            }
            Some(Structure::Notify(_)) | None => {}
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>) {
        match self.structure(bar, offset, data.len()) {
            Some(Structure::Common(offset)) => self.common_write(offset, data, context),
            Some(Structure::Device(offset)) => {
                self.call(context, |backing, world| backing.config_write(offset, data, world));
            }
            // The queue's index, as the page says already; 4 bytes with features that are not
            // offered (4.1.5.2).
            Some(Structure::Notify(queue)) if matches!(data.len(), 2 | 4) => {
                self.call(context, |backing, world| backing.kicked(queue, world));
            }
            Some(Structure::Notify(_) | Structure::Isr) | None => {}
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        self.backing.wakes()
    }

    fn woken(&mut self, index: usize, context: &mut Context<'_>) {
        self.call(context, |backing, world| backing.woken(index, world));
    }

    fn doorbells(&self, bar: BarIndex) -> Vec<Doorbell> {
        if bar != STRUCTURES {
            return Vec::new();
        }
        let doorbell = |queue| Doorbell {
            offset: layout::doorbell(queue),
            width: 2,
            value: None,
            eventfd: Arc::clone(self.backing.kick(queue)),
        };
        (0..self.driver.queue_count()).map(doorbell).collect()
    }

    fn effects_applied(&mut self, effects: &Effects, context: &mut Context<'_>) {
        if effects.bus_master.is_some() {
            self.changed(context);
        }
    }

    fn rewired(&mut self, context: &mut Context<'_>) {
        self.changed(context);
    }

    fn reload(&mut self, context: &mut Context<'_>) -> Result<(), String> {
        self.call(context, |backing, world| backing.reload(world))
    }

    fn quiesce(&mut self) {
        self.backing.quiesce();
    }

    fn reset(&mut self) {
        self.power_on();
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        self.backing.kept()
    }

    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()> {
        self.backing.adopt(kept)
    }

    fn saved(&mut self) -> Option<&mut dyn Saved> {
        if self.movable { Some(self) } else { None }
    }
}
