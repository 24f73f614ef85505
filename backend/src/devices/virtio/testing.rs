//! A driver for tests of device cores: guest memory, and queues that it fills.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::spec::{descriptor, feature};
use super::{Io, QueueAccess, needs_interrupt};

/// Guest memory in tests.
pub(crate) type Memory = Arc<GuestMemoryMmap>;

/// A driver with its queues. It is the [`Io`] of the device as well.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    pub(crate) features: u64,
    queues: Vec<DriverQueue>,
    /// Where the next buffer goes.
    free: u64,
    /// How often the device said that its configuration changed.
    pub(crate) config_changes: usize,
    /// Whether the queues can't be served.
    pub(crate) paused: bool,
    /// Whether the queues are about to stop.
    pub(crate) stopping: bool,
}

#[derive(Debug)]
struct DriverQueue {
    queue: Queue,
    used: bool,
    /// The next free descriptor; they are never given back.
    next: u16,
    seen_used: u16,
    available: u16,
}

/// A part of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    /// Bytes for the device to read.
    Readable(&'a [u8]),
    /// Room for so many bytes.
    Writable(u32),
    /// A descriptor as it is: address, length, flags without NEXT.
    Raw(u64, u32, u16),
}

/// A request that was made available.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) head: u16,
    /// Where its parts are.
    pub(crate) addresses: Vec<u64>,
}

const MEMORY_SIZE: usize = 64 << 20;
/// Each queue has its rings in so many bytes.
const RINGS: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 256;
const AVAIL: u64 = 0x10000;
const USED: u64 = 0x20000;

impl Driver {
    /// A driver with so many queues of 256 descriptors each, and all features of the transport but
    /// EVENT_IDX.
    pub(crate) fn new(queues: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let queue = |index: u16| {
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            let base = u64::from(index) * RINGS;
            queue.try_set_size(QUEUE_SIZE).unwrap();
            queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(base + AVAIL)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(base + USED)).unwrap();
            queue.set_ready(true);
            DriverQueue { queue, used: false, next: 0, seen_used: 0, available: 0 }
        };
        Self {
            memory: Arc::new(memory),
            features: feature::TRANSPORT & !feature::EVENT_IDX,
            queues: (0..queues).map(queue).collect(),
            free: u64::from(queues) * RINGS,
            config_changes: 0,
            paused: false,
            stopping: false,
        }
    }

    /// Makes a request available.
    pub(crate) fn send(&mut self, queue: u16, parts: &[Part<'_>]) -> Sent {
        let base = u64::from(queue) * RINGS;
        let head = self.queues[usize::from(queue)].next;
        let mut addresses = Vec::new();
        for (position, part) in parts.iter().enumerate() {
            let (address, len, flags) = match *part {
                Part::Readable(bytes) => {
                    let address = self.room(bytes.len() as u64);
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (address, u32::try_from(bytes.len()).unwrap(), 0)
                }
                Part::Writable(len) => (self.room(len.into()), len, descriptor::WRITE),
                Part::Raw(address, len, flags) => (address, len, flags),
            };
            addresses.push(address);
            let index = (head + u16::try_from(position).unwrap()) % QUEUE_SIZE;
            let more = position + 1 < parts.len();
            let flags = if more { flags | descriptor::NEXT } else { flags };
            let at = base + u64::from(index) * descriptor::SIZE;
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj((index + 1) % QUEUE_SIZE, GuestAddress(at + 14)).unwrap();
        }
        let length = u16::try_from(parts.len()).unwrap();
        self.queues[usize::from(queue)].next = (head + length) % QUEUE_SIZE;
        self.make_available(queue, head);
        Sent { head, addresses }
    }

    /// Puts a head into the available ring, whatever it is.
    pub(crate) fn make_available(&mut self, queue: u16, head: u16) {
        let base = u64::from(queue) * RINGS + AVAIL;
        let state = &mut self.queues[usize::from(queue)];
        let slot = base + 4 + 2 * u64::from(state.available % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        state.available = state.available.wrapping_add(1);
        self.memory.write_obj(state.available, GuestAddress(base + 2)).unwrap();
    }

    /// Says that so many requests more are available than there are.
    pub(crate) fn overstate(&mut self, queue: u16, by: u16) {
        let base = u64::from(queue) * RINGS + AVAIL;
        let index = self.queues[usize::from(queue)].available.wrapping_add(by);
        self.memory.write_obj(index, GuestAddress(base + 2)).unwrap();
    }

    /// The next request that the device gave back: its head and how much was written.
    pub(crate) fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let base = u64::from(queue) * RINGS + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let state = &mut self.queues[usize::from(queue)];
        if index == state.seen_used {
            return None;
        }
        let slot = base + 4 + 8 * u64::from(state.seen_used % QUEUE_SIZE);
        state.seen_used = state.seen_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Whether the device owes an interrupt for what it gave back; asking settles it.
    pub(crate) fn interrupted(&mut self, queue: u16) -> bool {
        let state = &mut self.queues[usize::from(queue)];
        std::mem::take(&mut state.used) && needs_interrupt(&mut state.queue, &self.memory).unwrap()
    }

    /// Sets the flags of the available ring.
    pub(crate) fn set_avail_flags(&mut self, queue: u16, flags: u16) {
        let base = u64::from(queue) * RINGS + AVAIL;
        self.memory.write_obj(flags, GuestAddress(base)).unwrap();
    }

    /// Whether the device asked for kicks, by the flags of the used ring.
    pub(crate) fn wants_kicks(&self, queue: u16) -> bool {
        let base = u64::from(queue) * RINGS + USED;
        let flags: u16 = self.memory.read_obj(GuestAddress(base)).unwrap();
        flags & 1 == 0
    }

    /// Has EVENT_IDX negotiated for a queue.
    pub(crate) fn use_event_idx(&mut self, queue: u16) {
        self.queues[usize::from(queue)].queue.set_event_idx(true);
    }

    /// The index of the available ring whose passing the device wants to be kicked for.
    pub(crate) fn avail_event(&self, queue: u16) -> u16 {
        let base = u64::from(queue) * RINGS + USED;
        let at = base + 4 + 8 * u64::from(QUEUE_SIZE);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Asks for an interrupt when the index of the used ring passes this one.
    pub(crate) fn set_used_event(&mut self, queue: u16, index: u16) {
        let base = u64::from(queue) * RINGS + AVAIL;
        let at = base + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Bytes of guest memory.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Room for a buffer, with some space behind it.
    pub(crate) fn room(&mut self, len: u64) -> u64 {
        let address = self.free;
        self.free += len.next_multiple_of(64) + 64;
        assert!(self.free < MEMORY_SIZE as u64, "the test is short enough");
        address
    }
}

impl Io<Memory> for Driver {
    fn queue(&mut self, index: u16) -> Option<QueueAccess<'_, Memory>> {
        if self.paused {
            return None;
        }
        let state = self.queues.get_mut(usize::from(index))?;
        let access =
            QueueAccess::new(&mut state.queue, &self.memory, self.features, &mut state.used);
        Some(if self.stopping { access.without_new_requests() } else { access })
    }

    fn config_changed(&mut self) {
        self.config_changes += 1;
    }
}
