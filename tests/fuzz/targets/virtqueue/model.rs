//! What is legal, by the letter of virtio 1.2, section 2.7, on a copy of memory.

use std::collections::BTreeSet;

use barkeep_fuzz::guest::{self, MEMORY, Queues};
use virtio_queue::QueueT;

pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    pub(crate) next_avail: u16,
    next_used: u16,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    indirect: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) head: u16,
    pub(crate) readable: Vec<Piece>,
    pub(crate) writable: Vec<Piece>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) length: u32,
}

struct Descriptor {
    piece: Piece,
    next: Option<u16>,
    write: bool,
    indirect: bool,
}

impl Model {
    pub(crate) fn of(queues: &Queues, indirect: bool) -> Self {
        let queue = &queues.queues[0];
        Self {
            bytes: guest::snapshot(&queues.memory),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            size: queue.size(),
            table: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            indirect,
        }
    }

    pub(crate) fn pop(&self) -> Result<Option<Request>, ()> {
        let count = self.avail_index().ok_or(())?.wrapping_sub(self.next_avail);
        if count == 0 {
            return Ok(None);
        }
        if count > self.size {
            return Err(());
        }
        let slot = 4 + 2 * u64::from(self.next_avail % self.size);
        let head = self.u16_at(self.avail, slot).ok_or(())?;
        self.follow(head).map(Some)
    }

    pub(crate) fn follow(&self, head: u16) -> Result<Request, ()> {
        let mut request = Request { head, readable: Vec::new(), writable: Vec::new() };
        let mut index = head;
        let mut seen = BTreeSet::new();
        loop {
            let found = self.descriptor(self.table, self.size, index)?;
            if !seen.insert(index) {
                return Err(());
            }
            if found.indirect {
                if !self.indirect || found.next.is_some() {
                    return Err(());
                }
                self.follow_table(found.piece, &mut request)?;
                break;
            }
            add(&mut request, &found)?;
            let Some(next) = found.next else { break };
            index = next;
        }
        Ok(request)
    }

    fn follow_table(&self, table: Piece, request: &mut Request) -> Result<(), ()> {
        if table.length == 0 || !table.length.is_multiple_of(16) {
            return Err(());
        }
        let size = u16::try_from(table.length / 16).map_err(|_| ())?;
        let (mut index, mut seen) = (0, BTreeSet::new());
        loop {
            let found = self.descriptor(table.address, size, index)?;
            if found.indirect || !seen.insert(index) {
                return Err(());
            }
            add(request, &found)?;
            let Some(next) = found.next else { return Ok(()) };
            index = next;
        }
    }

    fn descriptor(&self, table: u64, size: u16, index: u16) -> Result<Descriptor, ()> {
        if index >= size {
            return Err(());
        }
        let at = table.checked_add(16 * u64::from(index)).ok_or(())?;
        let bytes = self.read(at, 16).ok_or(())?;
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        let next = u16::from_le_bytes([bytes[14], bytes[15]]);
        Ok(Descriptor {
            piece: Piece {
                address: u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")),
                length: u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes")),
            },
            next: (flags & 1 != 0).then_some(next),
            write: flags & 2 != 0,
            indirect: flags & 4 != 0,
        })
    }

    /// What memory holds after a request was given back.
    pub(crate) fn push(&self, head: u16, written: u32) -> Result<Vec<u8>, ()> {
        if head >= self.size {
            return Err(());
        }
        let mut after = self.bytes.clone();
        let slot = 4 + 8 * u64::from(self.next_used % self.size);
        let element = [u32::from(head).to_le_bytes(), written.to_le_bytes()].concat();
        write(&mut after, self.used.checked_add(slot).ok_or(())?, &element)?;
        let index = self.next_used.wrapping_add(1).to_le_bytes();
        write(&mut after, self.used.checked_add(2).ok_or(())?, &index)?;
        Ok(after)
    }

    /// Asking for kicks, or for none, is a matter of the used ring's flags or of what is behind it.
    pub(crate) fn assert_only_wishes_changed(&self, now: &[u8]) {
        let event = self.used.wrapping_add(4 + 8 * u64::from(self.size));
        let wishes = [self.used, event].into_iter().filter_map(place);
        let wishes: Vec<usize> = wishes.flat_map(|at| [at, at + 1]).collect();
        for (at, (was, is)) in self.bytes.iter().zip(now).enumerate() {
            assert!(was == is || wishes.contains(&at), "at {at:#x}");
        }
    }

    pub(crate) fn avail_index(&self) -> Option<u16> {
        self.u16_at(self.avail, 2)
    }

    fn u16_at(&self, base: u64, offset: u64) -> Option<u16> {
        let bytes = self.read(base.checked_add(offset)?, 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// Bytes of memory, if all of them are there.
    pub(crate) fn read(&self, address: u64, length: usize) -> Option<Vec<u8>> {
        if length == 0 {
            return Some(Vec::new());
        }
        let at = place(address)?;
        let left = MEMORY.iter().find_map(|(start, size)| {
            let end = start + *size as u64;
            (*start..end).contains(&address).then(|| end - address)
        })?;
        (length as u64 <= left).then(|| self.bytes[at..at + length].to_vec())
    }
}

fn add(request: &mut Request, found: &Descriptor) -> Result<(), ()> {
    // What holds no byte is nowhere.
    let side = if found.write {
        &mut request.writable
    } else if request.writable.is_empty() {
        &mut request.readable
    } else {
        return Err(());
    };
    if found.piece.length > 0 {
        side.push(found.piece);
    }
    let pieces = request.readable.iter().chain(&request.writable);
    let total: u64 = pieces.map(|piece| u64::from(piece.length)).sum();
    if total > 1 << 32 { Err(()) } else { Ok(()) }
}

/// Where an address is in a snapshot.
fn place(address: u64) -> Option<usize> {
    let mut before = 0;
    for (start, length) in MEMORY {
        if (start..start + length as u64).contains(&address) {
            return Some(before + usize::try_from(address - start).expect("a small number"));
        }
        before += length;
    }
    None
}

fn write(bytes: &mut [u8], address: u64, data: &[u8]) -> Result<(), ()> {
    let last = address.checked_add(data.len() as u64 - 1).ok_or(())?;
    let (first, last) = (place(address).ok_or(())?, place(last).ok_or(())?);
    if last - first != data.len() - 1 {
        return Err(());
    }
    bytes[first..=last].copy_from_slice(data);
    Ok(())
}
