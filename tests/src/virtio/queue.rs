//! A split virtqueue from the driver's side (2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::{Memory, RINGS};

/// A part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The device reads it: address and length.
    Read(u64, u32),
    /// The device writes it.
    Write(u64, u32),
}

/// A request that the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// How many bytes the device wrote.
    pub len: u32,
}

/// A queue in guest memory.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<Memory>,
    base: u64,
    size: u16,
    event_idx: bool,
    indirect: bool,
    free: Vec<u16>,
    /// The descriptors of the requests that are with the device, by head.
    taken: Vec<Vec<u16>>,
    available: u16,
    /// What was available when the device was last asked whether it wants a kick.
    kicked: u16,
    seen: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Each queue has its rings in so many bytes.
const STRIDE: u64 = 1 << 20;
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const TABLES: u64 = 0x4_0000;
/// The most parts of a request in a table of its own.
const TABLE: usize = 32;
const DESCRIPTOR: u64 = 16;

impl Queue {
    /// The queue with this number, empty. The memory must have its place for itself.
    ///
    /// # Panics
    /// If there is no room for so large a queue or so many.
    #[must_use]
    pub fn new(
        memory: &Arc<Memory>,
        index: u16,
        size: u16,
        event_idx: bool,
        indirect: bool,
    ) -> Self {
        let base = RINGS + u64::from(index) * STRIDE;
        assert!(index < 16 && size <= 1024, "there is room for the queue");
        memory.rings.write(base, &vec![0; usize::try_from(TABLES).expect("a small number")]);
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            event_idx,
            indirect,
            free: (0..size).rev().collect(),
            taken: vec![Vec::new(); usize::from(size)],
            available: 0,
            kicked: 0,
            seen: 0,
        }
    }

    /// Its addresses: descriptor table, driver area, device area.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + AVAIL, self.base + USED]
    }

    /// Requests that the device has.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.taken.iter().filter(|taken| !taken.is_empty()).count()
    }

    /// How many requests were ever made available, and how many were seen coming back: 16 bits each.
    #[must_use]
    pub fn counts(&self) -> (u16, u16) {
        (self.available, self.seen)
    }

    /// How many requests the device ever gave back, seen or not: 16 bits.
    #[must_use]
    pub fn given_back(&self) -> u16 {
        self.memory.rings.load(self.used_at())
    }

    /// Where the device counts what it gives back.
    #[must_use]
    pub fn used_at(&self) -> u64 {
        self.base + USED + 2
    }

    /// Makes a request available; its head. `None` when there are not enough descriptors.
    pub fn add(&mut self, parts: &[Part]) -> Option<u16> {
        let taken = if self.indirect && parts.len() > 1 {
            self.add_indirect(parts)?
        } else {
            self.add_direct(parts)?
        };
        let head = taken[0];
        self.taken[usize::from(head)] = taken;
        self.make_available(head);
        Some(head)
    }

    fn add_direct(&mut self, parts: &[Part]) -> Option<Vec<u16>> {
        let kept = self.free.len().checked_sub(parts.len())?;
        let taken: Vec<u16> = self.free.split_off(kept);
        for (position, part) in parts.iter().enumerate() {
            let next = taken.get(position + 1).copied();
            self.describe(taken[position], descriptor(*part, next));
        }
        Some(taken)
    }

    fn add_indirect(&mut self, parts: &[Part]) -> Option<Vec<u16>> {
        assert!(parts.len() <= TABLE, "a table has room for {TABLE} parts");
        let head = self.free.pop()?;
        let size = TABLE as u64 * DESCRIPTOR;
        let table = self.base + TABLES + u64::from(head) * size;
        for (index, part) in (0_u16..).zip(parts) {
            let more = usize::from(index) + 1 < parts.len();
            let bytes = descriptor(*part, more.then_some(index + 1));
            self.memory.rings.write(table + u64::from(index) * DESCRIPTOR, &bytes);
        }
        let length = u32::try_from(parts.len() * 16).expect("a small table");
        self.describe(head, raw_descriptor(table, length, INDIRECT, 0));
        Some(vec![head])
    }

    /// Writes a descriptor, whatever it says.
    pub fn describe(&self, index: u16, bytes: [u8; 16]) {
        self.memory.rings.write(self.base + u64::from(index) * DESCRIPTOR, &bytes);
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let slot = self.base + AVAIL + 4 + 2 * u64::from(self.available % self.size);
        self.memory.rings.store(slot, head);
        self.available = self.available.wrapping_add(1);
        self.memory.rings.store(self.base + AVAIL + 2, self.available);
    }

    /// Says that so many requests more are available than there are.
    pub fn overstate(&self, by: u16) {
        self.memory.rings.store(self.base + AVAIL + 2, self.available.wrapping_add(by));
    }

    /// Whether the device wants to hear of the requests made available since this was last asked.
    pub fn needs_kick(&mut self) -> bool {
        // The index is there before the device's wish is looked at (2.7.13.4.1).
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.available);
        self.kicked = new;
        if self.event_idx {
            let event = self.memory.rings.load(self.base + USED + 4 + 8 * u64::from(self.size));
            // vring_need_event (2.7.10).
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        self.memory.rings.load(self.base + USED) & 1 == 0
    }

    /// The next request that the device gave back.
    ///
    /// # Panics
    /// If the device never had it.
    pub fn used(&mut self) -> Option<Used> {
        let ring = self.base + USED;
        if self.memory.rings.load(ring + 2) == self.seen {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(self.seen % self.size);
        let mut bytes = [0; 8];
        self.memory.rings.read(slot, &mut bytes);
        self.seen = self.seen.wrapping_add(1);
        let [id, len] = [0, 4]
            .map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        let head = u16::try_from(id).expect("the head of a request");
        let taken = std::mem::take(&mut self.taken[usize::from(head)]);
        assert!(!taken.is_empty(), "the device gave back {head}, which it did not have");
        self.free.extend(taken.into_iter().rev());
        Some(Used { head, len })
    }

    /// Asks for an interrupt at the next request that is given back. Whether there is one already.
    pub fn arm(&self) -> bool {
        if self.event_idx {
            let event = self.base + AVAIL + 4 + 2 * u64::from(self.size);
            self.memory.rings.store(event, self.seen);
        }
        // The wish is there before the index is looked at.
        fence(Ordering::SeqCst);
        self.memory.rings.load(self.base + USED + 2) != self.seen
    }
}

fn descriptor(part: Part, next: Option<u16>) -> [u8; 16] {
    let (address, length, flags) = match part {
        Part::Read(address, length) => (address, length, 0),
        Part::Write(address, length) => (address, length, WRITE),
    };
    let flags = if next.is_some() { flags | NEXT } else { flags };
    raw_descriptor(address, length, flags, next.unwrap_or(0))
}

/// The bytes of a descriptor (2.7.5).
#[must_use]
pub fn raw_descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
