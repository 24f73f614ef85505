//! Guest memory and queues of a fuzz input's own making.

use std::sync::Arc;

use barkeep_backend::devices::virtio::{Io, QueueAccess};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Input;

/// Guest memory.
pub type Memory = Arc<GuestMemoryMmap>;

/// Where memory is: from an address on, so many bytes. Between and behind them there is none.
pub const MEMORY: [(u64, usize); 2] = [(0, 0x3000), (ISLAND, 0x800)];
/// The smaller piece.
pub const ISLAND: u64 = 0x8000;

/// Memory full of zeros. One piece of memory is used again and again, so there is one at a time.
pub fn memory() -> Memory {
    thread_local! {
        static CACHE: Memory = {
            let ranges = MEMORY.map(|(start, length)| (GuestAddress(start), length));
            Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("room for memory"))
        };
    }
    CACHE.with(|memory| {
        for (start, length) in MEMORY {
            memory.write_slice(&vec![0; length], GuestAddress(start)).expect("it is there");
        }
        Arc::clone(memory)
    })
}

/// An address that may be anything, most of the time one where memory is.
pub fn address(input: &mut Input<'_>) -> u64 {
    let kind = input.u8();
    let low = u64::from(input.u16());
    match kind {
        0..=0xc0 => low % 0x3000,
        0xc1..=0xe0 => ISLAND + low % 0x900,
        0xe1..=0xec => 0x2f00 + low % 0x200,
        0xed..=0xf0 => low,
        0xf1..=0xf8 => u64::MAX - low,
        kind => low << (4 * (kind & 0xf)),
    }
}

/// A queue whose size and rings an input chooses. What can't be set stays at zero, as with a
/// transport.
pub fn queue(input: &mut Input<'_>) -> Queue {
    let mut queue = Queue::new(256).expect("a power of two");
    let size = 1 << (input.u8() % 9);
    queue.try_set_size(size).expect("a power of two up to 256");
    let _ = queue.try_set_desc_table_address(GuestAddress(address(input) & !0xf));
    let _ = queue.try_set_avail_ring_address(GuestAddress(address(input) & !0x1));
    let _ = queue.try_set_used_ring_address(GuestAddress(address(input) & !0x3));
    queue.set_ready(true);
    queue
}

/// Writes a descriptor, with fields that an input chooses.
pub fn write_descriptor(memory: &Memory, table: u64, size: u16, input: &mut Input<'_>) {
    let index = u16::from(input.u8()) % size;
    let at = address(input);
    let length = match input.u8() {
        short @ 0..=0xe0 => u32::from(short) * 8,
        0xe1..=0xf0 => u32::from(input.u16()),
        0xf1..=0xfb => u32::MAX - u32::from(input.u8()),
        more => u32::from(more) << 24,
    };
    let flags = input.u8();
    let flags = if flags & 0x80 == 0 { u16::from(flags & 7) } else { u16::from(flags) << 1 };
    let next = u16::from(input.u8());
    let next = if next < 0xf0 { next % size } else { next << 4 };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    let place = table.wrapping_add(16 * u64::from(index));
    let _ = memory.write_slice(&bytes, GuestAddress(place));
}

/// Puts a head into an available ring, and says that so many more are there.
pub fn make_available(memory: &Memory, queue: &Queue, head: u16, more: u16) {
    let ring = queue.avail_ring();
    let mut index = [0; 2];
    let _ = memory.read_slice(&mut index, GuestAddress(ring.wrapping_add(2)));
    let index = u16::from_le_bytes(index);
    let slot = ring.wrapping_add(4 + 2 * u64::from(index % queue.size()));
    let _ = memory.write_slice(&head.to_le_bytes(), GuestAddress(slot));
    let index = index.wrapping_add(more).to_le_bytes();
    let _ = memory.write_slice(&index, GuestAddress(ring.wrapping_add(2)));
}

/// Everything that is in memory.
pub fn snapshot(memory: &Memory) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (start, length) in MEMORY {
        let at = bytes.len();
        bytes.resize(at + length, 0);
        memory.read_slice(&mut bytes[at..], GuestAddress(start)).expect("it is there");
    }
    bytes
}

/// The queues of a device, without a transport.
#[derive(Debug)]
pub struct Queues {
    pub memory: Memory,
    pub features: u64,
    pub queues: Vec<Queue>,
    /// Whether bus mastering is off.
    pub paused: bool,
    used: bool,
}

impl Queues {
    #[must_use]
    pub fn new(memory: &Memory, features: u64, queues: Vec<Queue>) -> Self {
        Self { memory: Arc::clone(memory), features, queues, paused: false, used: false }
    }
}

impl Io<Memory> for Queues {
    fn queue(&mut self, index: u16) -> Option<QueueAccess<'_, Memory>> {
        let queue = self.queues.get_mut(usize::from(index)).filter(|_| !self.paused)?;
        Some(QueueAccess::new(queue, &self.memory, self.features, &mut self.used))
    }

    fn config_changed(&mut self) {}
}
