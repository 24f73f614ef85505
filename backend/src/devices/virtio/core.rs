use std::fmt;
use std::ops::Deref;
use std::os::fd::BorrowedFd;

use vm_memory::GuestMemory;

use super::queue::{QueueAccess, QueueError};
use super::spec::DeviceType;
use crate::devices::RestoreError;
use thiserror::Error;

/// Guest memory that stays mapped while somebody holds this.
pub trait MemoryGuard:
    Deref<Target: GuestMemory + Sized> + Clone + fmt::Debug + Send + 'static
{
}

impl<G> MemoryGuard for G where
    G: Deref<Target: GuestMemory + Sized> + Clone + fmt::Debug + Send + 'static
{
}

/// A virtio device, whatever transport it is reached through: what it is, as data, and what it does
/// with its queues.
///
/// It works in the thread that calls it and waits for nothing: what takes time goes on in the
/// kernel, and an eventfd of [`wakes`](Self::wakes) tells of its end.
pub trait Core<G: MemoryGuard>: Send {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// The feature bits of its type that it offers. Those of the queues and of the transport (bits
    /// 24 to 41) are none of its business.
    fn features(&self) -> u64;

    /// The largest size of each of its queues: powers of two. It stays the same.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the device's configuration from `offset` on. `data` holds zeros, which is what lies
    /// behind its end.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration. What is no field that a driver may write is ignored.
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is set up, with these feature bits; they are some of those offered.
    fn start(&mut self, features: u64);

    /// The driver may have made buffers available in a queue. Told as well when the queue could not
    /// be served for a while and can now. A kick without new buffers is normal.
    ///
    /// # Errors
    /// [`DeviceError`]: the device needs to be reset.
    fn kicked(&mut self, queue: u16, io: &mut dyn Io<G>) -> Result<(), DeviceError>;

    /// Descriptors that wake it, by the index that [`woken`](Self::woken) gets; watched for the edge
    /// of readability. Asked once.
    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// One of them became readable, perhaps a while ago: while the device could not reach memory, it
    /// is not woken, and is told of every one of them afterwards. A wake without cause is normal.
    ///
    /// # Errors
    /// [`DeviceError`]: the device needs to be reset.
    fn woken(&mut self, _wake: usize, _io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Waits until nothing under way touches guest memory any more, and drops every guard. What is
    /// finished by that is delivered later, in a [`woken`](Self::woken) that the device sees to.
    fn quiesce(&mut self) {}

    /// A queue was reset or stopped: its requests are forgotten. The device is quiesced.
    fn queue_stopped(&mut self, _queue: u16) {}

    /// Back to the state of power-on. The device is quiesced.
    fn reset(&mut self);

    /// The operator wants it to look at its surroundings anew: the size of its image, for instance.
    ///
    /// # Errors
    /// What is wrong with them, in one line. The device goes on as before.
    fn reload(&mut self, _io: &mut dyn Io<G>) -> Result<(), String> {
        Ok(())
    }

    /// Requests that were taken from a queue and not given back yet, by the index of their first
    /// descriptor, in the order in which they were taken.
    fn in_flight(&self) -> Vec<InFlight> {
        Vec::new()
    }

    /// A request that another instance had [in flight](Self::in_flight): to be done as if it were
    /// new ([`QueueAccess::chain`]).
    ///
    /// # Errors
    /// [`DeviceError`]: the device needs to be reset.
    fn resubmit(&mut self, _request: InFlight, _io: &mut dyn Io<G>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What must move with the device, besides its queues and negotiated features.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what [`save`](Self::save) returned. [`start`](Self::start) came before, if the
    /// driver was set up.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then to be reset.
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        if state.is_empty() { Ok(()) } else { Err(RestoreError) }
    }
}

/// The transport as a device reaches it.
pub trait Io<G> {
    /// A queue, if the driver enabled it and it can be served now.
    fn queue(&mut self, index: u16) -> Option<QueueAccess<'_, G>>;

    /// The configuration changed by itself: the driver is told.
    fn config_changed(&mut self);
}

/// A request of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InFlight {
    /// The queue.
    pub queue: u16,
    /// Index of the request's first descriptor.
    pub head: u16,
}

/// What a driver did that ends in DEVICE_NEEDS_RESET (2.1.2).
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A ring or a chain is malformed, or memory is not there.
    #[error("queue {queue}: {error}")]
    Queue {
        /// Which queue.
        queue: u16,
        /// What is wrong.
        error: QueueError,
    },
    /// A request that can't even be answered.
    #[error("queue {queue}: {reason}")]
    Request {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
}
