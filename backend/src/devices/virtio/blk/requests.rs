use super::engine::{Id, Operation};
use super::progress::Progress;
use super::request::{Answer, Command, Status};
use crate::devices::virtio::InFlight;

/// The requests that were taken and are not given back, by queue and head: as many as the queues
/// have descriptors, so no driver can have more of them.
#[derive(Debug)]
pub(super) struct Requests {
    queue_size: u16,
    slots: Vec<Option<Taken>>,
    /// The next [`Taken::order`].
    next: u64,
}

/// A request that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) answer: Answer,
    pub(super) state: State,
    order: u64,
}

/// Where a request is.
#[derive(Debug)]
pub(super) enum State {
    /// It waits for a limit. It holds no guest memory.
    Waiting(Command),
    /// The engine has an operation of it, or it waits for a sync.
    Running(Progress),
    /// The next operation of it waits until memory can be reached again.
    Paused(Progress, Operation<()>),
    /// It is to be given back, with the number of bytes that were written from the first on.
    Finished(Status, u64),
}

impl Requests {
    pub(super) fn new(queues: u16, queue_size: u16) -> Self {
        let slots = usize::from(queues) * usize::from(queue_size);
        Self { queue_size, slots: (0..slots).map(|_| None).collect(), next: 0 }
    }

    /// The place of a request; `None` when the queue or head is out of range.
    pub(super) fn id(&self, InFlight { queue, head }: InFlight) -> Option<Id> {
        let index = usize::from(queue) * usize::from(self.queue_size) + usize::from(head);
        (head < self.queue_size && index < self.slots.len()).then_some(Id(index))
    }

    /// Puts a request in its place, unless there is one.
    pub(super) fn insert(&mut self, id: Id, answer: Answer, state: State) -> bool {
        let order = self.next;
        let Some(slot @ None) = self.slots.get_mut(id.0) else { return false };
        *slot = Some(Taken { answer, state, order });
        self.next += 1;
        true
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut Taken> {
        self.slots.get_mut(id.0)?.as_mut()
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<Taken> {
        self.slots.get_mut(id.0)?.take()
    }

    /// Queue and head of a request.
    pub(super) fn name(&self, id: Id) -> InFlight {
        let size = usize::from(self.queue_size);
        let part = |part| u16::try_from(part).expect("there are as many slots as queues and heads");
        InFlight { queue: part(id.0 / size), head: part(id.0 % size) }
    }

    /// All of them, in the order in which they were taken.
    pub(super) fn in_order(&self) -> Vec<InFlight> {
        let taken = self.slots.iter().enumerate();
        let taken = taken.filter_map(|(index, slot)| Some((slot.as_ref()?.order, Id(index))));
        let mut taken: Vec<_> = taken.collect();
        taken.sort_unstable_by_key(|(order, _)| *order);
        taken.into_iter().map(|(_, id)| self.name(id)).collect()
    }

    /// Forgets those of a queue.
    pub(super) fn forget(&mut self, queue: u16) {
        let size = usize::from(self.queue_size);
        for slot in self.slots.iter_mut().skip(usize::from(queue) * size).take(size) {
            *slot = None;
        }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.slots.fill_with(|| None);
    }
}
