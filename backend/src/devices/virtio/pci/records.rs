use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::rand::{GetRandomFlags, getrandom};

use super::World;
use crate::devices::virtio::inflight::About;
use crate::devices::virtio::{InFlight, QueueError, Record, Words, record_words, recover};
use crate::dma::DmaGuard;

/// What outlives the process of the queues of a function.
#[derive(Debug)]
pub struct Records {
    /// Tells these words from those of all other functions, here and elsewhere.
    identity: u64,
    queues: Vec<Queue>,
}

#[derive(Debug)]
struct Queue {
    record: Record,
    /// Which start of the queue is being served.
    served: Option<u64>,
}

/// How a queue begins to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Attached {
    /// It is served already, or the driver has not enabled it.
    Before,
    /// Where the driver's state says that it is.
    Anew,
    /// Where a process was killed, with what it had in flight, oldest first, and when that was taken.
    Recovered(Vec<(u64, u16)>),
}

/// The words before those of the queues: the identity.
const HEADER: usize = 1;

impl Records {
    /// How many words they take for queues of these sizes.
    pub(super) fn word_count(sizes: &[u16], in_order: bool) -> usize {
        HEADER + sizes.iter().map(|size| record_words(*size, in_order)).sum::<usize>()
    }

    /// Takes them from the front.
    pub(super) fn new(words: &mut Words, sizes: &[u16], in_order: bool) -> Self {
        let header = words.take(HEADER);
        if header.get(0) == 0 {
            header.set(0, some_number());
        }
        let clock = Arc::new(AtomicU64::new(0));
        let queue = |size: &u16| {
            let record = Record::new(words.take(record_words(*size, in_order)), Arc::clone(&clock));
            Queue { record, served: None }
        };
        Self { identity: header.get(0), queues: sizes.iter().map(queue).collect() }
    }

    pub(super) fn identity(&self) -> u64 {
        self.identity
    }

    /// The latest start of a queue that is known.
    pub(super) fn latest_start(&self) -> u64 {
        self.queues.iter().map(|queue| queue.record.latest_start()).max().unwrap_or(0)
    }

    /// Whether the driver's state and the device's say all of a queue that was enabled by this start,
    /// so that these words are not needed.
    pub(super) fn is_settled(&self, index: u16, start: u64) -> bool {
        let queue = self.queues.get(usize::from(index));
        queue.is_none_or(|queue| {
            queue.served == Some(start) || queue.record.about(start) == About::Earlier
        })
    }

    /// The record of a queue that is served.
    pub(super) fn served(&self, index: u16, world: &World<'_>) -> Option<&Record> {
        let queue = self.queues.get(usize::from(index))?;
        (queue.served.is_some() && queue.served == world.queue_start(index))
            .then_some(&queue.record)
    }

    /// No queue is served any more.
    pub(super) fn detach(&mut self) {
        self.queues.iter_mut().for_each(|queue| queue.served = None);
    }

    /// Begins to serve a queue that the driver enabled. `in_flight` is what the device has of it by
    /// its own account, which counts if the queue was not served since.
    ///
    /// # Errors
    /// [`QueueError`]: where it is can't be told. If that is because its rings are not in memory, it
    /// may be tried again.
    pub(super) fn attach(
        &mut self,
        index: u16,
        world: &mut World<'_>,
        memory: &DmaGuard,
        in_flight: &[InFlight],
    ) -> Result<Attached, QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Ok(Attached::Before);
        };
        let start = world.queue_start(index);
        let (Some(start), Some(ring)) = (start, world.queue(index)) else {
            queue.served = None;
            return Ok(Attached::Before);
        };
        if queue.served == Some(start) {
            return Ok(Attached::Before);
        }
        let attached = match queue.record.about(start) {
            About::Earlier => {
                let own = in_flight.iter().filter(|request| request.queue == index);
                let used = virtio_queue::QueueT::next_used(ring);
                queue.record.begin(start, used, own.map(|request| request.head));
                Attached::Anew
            }
            About::This => Attached::Recovered(recover(ring, memory, &queue.record)?),
            About::Later => return Err(QueueError::SetUpAnew),
        };
        queue.served = Some(start);
        Ok(attached)
    }
}

/// Any number that is not 0, and none that somebody else has.
fn some_number() -> u64 {
    let mut bytes = [0; 8];
    // Nothing depends on it but which of two states is whose.
    let _ = getrandom(&mut bytes[..], GetRandomFlags::empty());
    u64::from_ne_bytes(bytes).max(1)
}
