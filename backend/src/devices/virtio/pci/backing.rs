use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::records::Records;
use super::world::World;
use crate::devices::RestoreError;
use crate::devices::virtio::Words;
use crate::devices::virtio::spec::DeviceType;
use crate::irq::EventFd;

/// What serves the queues of a virtio function: a core of this process, or a daemon elsewhere.
pub trait Backing: Send {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// Every feature bit that it offers, those of queues and transport too. Asked once.
    fn features(&self) -> u64;

    /// The largest size of each of its queues: powers of two. Asked once.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Whether it shows the files of guest memory to somebody else. Asked once.
    fn needs_window_files(&self) -> bool {
        false
    }

    /// The eventfd that stands for a notification of a queue that there is: the queue's doorbell.
    fn kick(&self, queue: u16) -> &Arc<EventFd>;

    /// Reads the device's configuration from `offset` on. `data` holds zeros, which is what lies
    /// behind its end.
    fn config_read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration. What is no field that a driver may write is ignored.
    fn config_write(&mut self, _offset: u64, _data: &[u8], _world: &mut World<'_>) {}

    /// Eventfds and other descriptors that wake it, by the index that [`woken`](Self::woken) gets;
    /// watched for the edge of readability. [Kicks](Self::kick) belong to them if this process
    /// serves the queues. Asked once.
    fn wakes(&self) -> Vec<BorrowedFd<'_>>;

    /// One of them became readable, perhaps a while ago. A wake without cause is normal, and so is
    /// one while the world is [not live](World::is_live).
    fn woken(&mut self, wake: usize, world: &mut World<'_>);

    /// The driver notified a queue by a write that was forwarded. As for [`woken`](Self::woken).
    fn kicked(&mut self, queue: u16, world: &mut World<'_>);

    /// Something of the world changed: DRIVER_OK or DEVICE_NEEDS_RESET, a queue was enabled or got
    /// another vector, bus mastering, guest memory, interrupt wiring or masks. Look at all of it
    /// anew; often it is as before.
    fn changed(&mut self, world: &mut World<'_>);

    /// Nothing touches guest memory when it returns, and no guard of it is held. This does not stop
    /// the device: what was under way is finished by that, or begun anew when the world
    /// [changes](Self::changed) or something wakes it.
    ///
    /// It comes before every [`reset`](Self::reset) and [`queue_stopped`](Self::queue_stopped), and
    /// when the world is no longer live, but then after the fact: nothing may come from guest memory
    /// that is looked up later.
    fn quiesce(&mut self);

    /// The queue was reset by itself (2.6.1): its requests are forgotten. The world does not have it
    /// any more.
    fn queue_stopped(&mut self, queue: u16, world: &mut World<'_>);

    /// Back to the state of power-on.
    fn reset(&mut self);

    /// The operator wants it to look at its surroundings anew.
    ///
    /// # Errors
    /// What is wrong with them, in one line. It goes on as before.
    fn reload(&mut self, _world: &mut World<'_>) -> Result<(), String> {
        Ok(())
    }

    /// What a successor in another process needs: the [doorbells](Self::kick) by queue, which clients
    /// have, and what else there is.
    fn kept(&self) -> Vec<BorrowedFd<'_>>;

    /// Takes over what a predecessor [kept](Self::kept). Called before anything else happens.
    ///
    /// # Errors
    /// When they are not what they should be. It is then of no use.
    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()>;

    /// How many words it needs that outlive the process. Asked once.
    fn word_count(&self) -> usize {
        0
    }

    /// Gives it that memory, before anything else happens: zeros, or what its predecessor left there.
    fn set_words(&mut self, _words: Words) {}

    /// What is in those words of its queues, if it has some.
    fn records(&self) -> Option<&Records> {
        None
    }

    /// Differs whenever [`save`](Self::save) may return something else than before, requests and their
    /// progress aside.
    fn revision(&self) -> u64 {
        0
    }

    /// What must move with it, besides queues and negotiated features; `None` if it can't move. It
    /// is quiesced. Whether it can never changes.
    fn save(&self) -> Option<Vec<u8>> {
        None
    }

    /// Takes over what [`save`](Self::save) returned. `features` are those negotiated, if the driver
    /// was set up; it is as at power-on.
    ///
    /// # Errors
    /// [`RestoreError`]; it is then to be reset.
    fn restore(&mut self, _state: &[u8], _features: Option<u64>) -> Result<(), RestoreError> {
        Err(RestoreError)
    }

    /// It was stopped and goes on, here or where it was [restored](Self::restore). Everything may
    /// have changed.
    fn resume(&mut self, world: &mut World<'_>) {
        self.changed(world);
    }
}
