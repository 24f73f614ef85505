use std::num::Wrapping;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::chain::Chain;
use super::core::MemoryGuard;
use super::inflight::{Record, RecordError};
use super::spec::{avail, feature, used};

/// A queue for as long as a device works on it.
#[derive(Debug)]
pub struct QueueAccess<'a, G> {
    queue: &'a mut Queue,
    memory: &'a G,
    indirect: bool,
    /// Whether new requests may be taken.
    takes: bool,
    /// Whether buffers were given back that the driver has not been told of.
    used: &'a mut bool,
    /// Where it is noted what is in flight.
    record: Option<&'a Record>,
}

impl<'a, G: MemoryGuard> QueueAccess<'a, G> {
    /// For transports: a queue that is ready, and guest memory. `features` are those negotiated.
    /// `used` is set when buffers are given back; the transport [notifies](needs_interrupt) then.
    pub fn new(queue: &'a mut Queue, memory: &'a G, features: u64, used: &'a mut bool) -> Self {
        let indirect = features & feature::INDIRECT_DESC != 0;
        Self { queue, memory, indirect, takes: true, used, record: None }
    }

    /// For transports that can go on where a process was killed: what is in flight is noted there.
    #[must_use]
    pub fn recorded(self, record: Option<&'a Record>) -> Self {
        Self { record, ..self }
    }

    /// For transports: a queue that is about to stop. Requests that were taken can be given back, and
    /// it looks as if there were no new ones.
    #[must_use]
    pub fn without_new_requests(self) -> Self {
        Self { takes: false, ..self }
    }

    /// Guest memory. A clone of the guard keeps it mapped.
    #[must_use]
    pub fn memory(&self) -> &'a G {
        self.memory
    }

    /// Whether it is [about to stop](Self::without_new_requests): what is not given back soon is lost.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        !self.takes
    }

    /// How many descriptors it has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request, if the driver made one available.
    ///
    /// # Errors
    /// [`QueueError`]: the ring or the chain is malformed, or not in memory. The request is not
    /// taken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.takes {
            return Ok(false);
        }
        let memory: &G::Target = self.memory;
        let size = self.queue.size();
        let next = Wrapping(self.queue.next_avail());
        let available = self.queue.avail_idx(memory, Ordering::Acquire)? - next;
        if available.0 == 0 {
            return Ok(false);
        }
        if available.0 > size {
            return Err(QueueError::TooManyAvailable(available.0));
        }
        let entry = avail::RING + 2 * u64::from(next.0 % size);
        let address = self.queue.avail_ring().checked_add(entry).ok_or(QueueError::Overflow)?;
        let head = u16::from_le(memory.load(GuestAddress(address), Ordering::Relaxed)?);
        self.chain(head, chain)?;
        if let Some(record) = self.record {
            record.take(head)?;
        }
        self.queue.set_next_avail((next + Wrapping(1)).0);
        Ok(true)
    }

    /// Reads the request that starts at `head`, which was taken before.
    ///
    /// # Errors
    /// [`QueueError`]: the chain is malformed, or not in memory.
    pub fn chain(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let table = GuestAddress(self.queue.desc_table());
        chain.follow::<G::Target>(self.memory, table, self.queue.size(), head, self.indirect)
    }

    /// Gives the last taken request, which starts at `head`, back as if it had not been taken. Only
    /// the last one.
    pub fn unpop(&mut self, head: u16) {
        if let Some(record) = self.record {
            record.untake(head);
        }
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a request back, with the number of bytes that were written to it, from the first on.
    ///
    /// # Errors
    /// [`QueueError`]: the used ring is not in memory.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_all(&[(head, written)])
    }

    /// Gives several requests back at once: the driver sees all of them or none.
    ///
    /// # Errors
    /// [`QueueError`]: the used ring is not in memory.
    pub fn push_all(&mut self, requests: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((last, written), before)) = requests.split_last() else {
            return Ok(());
        };
        let memory: &G::Target = self.memory;
        let first = self.queue.next_used();
        let mut position = Wrapping(first);
        for &(head, written) in before {
            let entry = used::RING + used::SIZE * u64::from(position.0 % self.queue.size());
            let address = self.queue.used_ring().checked_add(entry).ok_or(QueueError::Overflow)?;
            let element = [u32::from(head).to_le(), written.to_le()];
            memory.write_obj(element, GuestAddress(address))?;
            position += 1;
        }
        // The crate publishes the index with each request that it is given, and counts requests for
        // the decision whether to interrupt: it is given the last one once for each of them.
        if let Some(record) = self.record {
            record.begin_return(first, requests);
        }
        for _ in requests {
            self.queue.set_next_used(position.0);
            super::crash::point();
            self.queue.add_used(memory, *last, *written)?;
        }
        super::crash::point();
        if let Some(record) = self.record {
            record.end_return();
        }
        *self.used = true;
        Ok(())
    }

    /// Asks the driver not to kick until [`rearm`](Self::rearm). It may kick all the same.
    ///
    /// # Errors
    /// [`QueueError`]: the used ring is not in memory.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification::<G::Target>(self.memory)?)
    }

    /// Asks for a kick when the next request is available. Returns whether there is one already, for
    /// which no kick may come.
    ///
    /// # Errors
    /// [`QueueError`]: a ring is not in memory.
    pub fn rearm(&mut self) -> Result<bool, QueueError> {
        if !self.takes {
            return Ok(false);
        }
        Ok(self.queue.enable_notification::<G::Target>(self.memory)?)
    }
}

/// Puts a queue where its record and its used ring say that it is, after the death of the process that
/// served it. Returns what is in flight, oldest first, with the time at which it was taken; what is
/// served in order is available again instead.
///
/// # Errors
/// [`QueueError`]: the used ring is not in memory, or is not as the device left it.
pub fn recover<G: MemoryGuard>(
    queue: &mut Queue,
    memory: &G,
    record: &Record,
) -> Result<Vec<(u64, u16)>, QueueError> {
    let address = queue.used_ring().checked_add(used::INDEX).ok_or(QueueError::Overflow)?;
    let used: u16 = memory.load(GuestAddress(address), Ordering::Acquire)?;
    let used = u16::from_le(used);
    let in_flight = record.recover(used, queue.size())?;
    let taken = u16::try_from(in_flight.len()).unwrap_or(u16::MAX);
    queue.set_next_used(used);
    queue.set_next_avail(used.wrapping_add(taken));
    Ok(in_flight)
}

/// Whether the driver wants to be interrupted for the buffers that were given back since this was
/// last asked (2.7.7).
///
/// # Errors
/// [`QueueError`]: the available ring is not in memory.
pub fn needs_interrupt<G: MemoryGuard>(queue: &mut Queue, memory: &G) -> Result<bool, QueueError> {
    let memory: &G::Target = memory;
    if !queue.needs_notification(memory)? {
        return Ok(false);
    }
    if queue.event_idx_enabled() {
        return Ok(true);
    }
    let flags: u16 = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)?;
    Ok(u16::from_le(flags) & avail::NO_INTERRUPT == 0)
}

/// What is wrong with a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// More requests than the queue has room for.
    #[error("{0} requests are available, more than the queue's size")]
    TooManyAvailable(u16),
    /// A request that was not given back is available again.
    #[error("request {0} is available again before it was given back")]
    Twice(u16),
    /// A descriptor outside of its table.
    #[error("descriptor {0} is outside of its table")]
    Index(u16),
    /// A chain that is longer than its table, or than drivers make them.
    #[error("descriptors form a loop, or a chain that is too long")]
    Loop,
    /// A table of descriptors that may not be there, or that is malformed.
    #[error("an indirect descriptor is not allowed there, or malformed")]
    Indirect,
    /// A buffer to read behind one to write.
    #[error("a buffer to read follows a buffer to write")]
    Order,
    /// Buffers of more than 4 GiB.
    #[error("the buffers of a request are longer than 4 GiB")]
    TooLong,
    /// An address wraps around.
    #[error("a ring exceeds the address space")]
    Overflow,
    /// The buffers of a request are shorter than what they must hold.
    #[error("a request's buffers are too short")]
    Short,
    /// Its state is older than what is known of it.
    #[error("the queue was set up anew")]
    SetUpAnew,
    /// What was in flight can't be told any more.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Memory that is not there or does not allow the access.
    #[error("memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// What the crate found.
    #[error(transparent)]
    Ring(#[from] virtio_queue::Error),
}
