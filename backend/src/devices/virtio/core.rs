use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};

use vm_memory::GuestMemory;

use super::inflight::Words;
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

    /// Whether it gives the requests of each queue back in the order in which they were made
    /// available, and bears it to do those again that it did not give back: after a crash they are
    /// available once more. The others are [resubmitted](Self::resubmit).
    fn is_in_order(&self) -> bool {
        false
    }

    /// A queue goes on where a process was killed: what [`restore`](Self::restore) told of the progress
    /// of requests is older than they are.
    fn queue_recovered(&mut self, _queue: u16) {}

    /// How many words it needs that outlive the process: for what a driver may have been told of before
    /// anybody asks it to [`save`](Self::save).
    fn word_count(&self) -> usize {
        0
    }

    /// Gives it that memory, before anything else happens: zeros, or what its predecessor left there.
    /// It lasts through resets.
    fn set_words(&mut self, _words: Words) {}

    /// Descriptors of its own that a successor in another process needs, always as many. Asked once.
    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Takes over what a predecessor [kept](Self::kept). Called before anything else happens.
    ///
    /// # Errors
    /// When they are not what they should be. The device is then of no use.
    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()> {
        if kept.is_empty() { Ok(()) } else { Err(io::Error::other("too many descriptors")) }
    }

    /// Differs whenever [`save`](Self::save) may return something else than before, the progress of
    /// requests aside.
    fn revision(&self) -> u64 {
        0
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
