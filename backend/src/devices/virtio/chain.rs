use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::guest_memory::Permissions;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::queue::QueueError;
use super::spec::descriptor;

/// One request as the driver described it: buffers to read, then buffers to write (2.7.4.2). Kept
/// and filled anew for one request after another, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

/// The most descriptors of a chain in a smaller queue. Drivers make none that is longer than their
/// queue (2.7.5.3.1), or than half of this, which QEMU allows. A table could have 65535, and following
/// them for each request would leave no time for anybody else.
const MAX_DESCRIPTORS: u16 = 2048;

/// A sequence of bytes in guest memory, in pieces. No piece is empty.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    pieces: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Chain {
    /// The index of its first descriptor, which names it in the used ring.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Follows the chain that starts at `head`, in place of what was there before.
    pub(super) fn follow<M: GuestMemory>(
        &mut self,
        memory: &M,
        table: GuestAddress,
        queue_size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<(), QueueError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let table = Table { address: table, length: queue_size };
        self.walk(memory, table, head, indirect)
    }

    /// Reads descriptors one by one. A chain is as long as its table at most; a longer one is a loop
    /// (2.7.5.2).
    fn walk<M: GuestMemory>(
        &mut self,
        memory: &M,
        mut table: Table,
        mut index: u16,
        mut indirect: bool,
    ) -> Result<(), QueueError> {
        let most = table.length.max(MAX_DESCRIPTORS);
        let mut left = table.length;
        loop {
            let found = table.descriptor(memory, index)?;
            left = left.checked_sub(1).ok_or(QueueError::Loop)?;
            if found.flags() & descriptor::INDIRECT != 0 {
                if !indirect {
                    // Not negotiated, or one table in another (2.7.5.3.1).
                    return Err(QueueError::Indirect);
                }
                if found.flags() & descriptor::NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                table = Table::indirect(&found)?;
                (index, indirect, left) = (0, false, table.length.min(most));
                continue;
            }
            self.add(&found)?;
            if found.flags() & descriptor::NEXT == 0 {
                return Ok(());
            }
            index = found.next();
        }
    }

    fn add(&mut self, found: &Descriptor) -> Result<(), QueueError> {
        let buffers = if found.flags() & descriptor::WRITE != 0 {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(QueueError::Order);
        };
        buffers.push(found.addr(), found.len());
        // "the total length of all buffers must not exceed 2^32 bytes" (2.7.5.2).
        if self.readable.len + self.writable.len > 1 << 32 {
            return Err(QueueError::TooLong);
        }
        Ok(())
    }
}

impl Buffers {
    /// Their length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of a range of the bytes, as far as there are any.
    pub fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = offset;
        let mut left = len;
        self.pieces.iter().filter_map(move |&(address, length)| {
            let length = u64::from(length);
            let skipped = skip.min(length);
            skip -= skipped;
            let taken = left.min(length - skipped);
            left -= taken;
            let taken = usize::try_from(taken).ok().filter(|taken| *taken > 0)?;
            // Wrapping is found out when the memory is looked up.
            Some((GuestAddress(address.0.wrapping_add(skipped)), taken))
        })
    }

    /// Reads `data.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are not so many, [`QueueError::Memory`] when memory is not
    /// there or may not be read.
    pub fn read<M: GuestMemory>(
        &self,
        memory: &M,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), QueueError> {
        let mut rest = data;
        for (address, length) in self.pieces(offset, rest.len() as u64) {
            let (part, behind) = rest.split_at_mut(length);
            memory.read_slice(part, address)?;
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { Err(QueueError::Short) }
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there is no room for all of it, [`QueueError::Memory`] when memory
    /// is not there or may not be written.
    pub fn write<M: GuestMemory>(
        &self,
        memory: &M,
        offset: u64,
        data: &[u8],
    ) -> Result<(), QueueError> {
        let mut rest = data;
        for (address, length) in self.pieces(offset, rest.len() as u64) {
            let (part, behind) = rest.split_at(length);
            memory.write_slice(part, address)?;
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { Err(QueueError::Short) }
    }

    /// Whether all of it is there and may be read, or written.
    #[must_use]
    pub fn reachable<M: GuestMemory>(&self, memory: &M, access: Permissions) -> bool {
        self.pieces(0, self.len).all(|(address, len)| memory.check_range(address, len, access))
    }

    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.pieces.push((address, len));
            self.len += u64::from(len);
        }
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }
}

/// A table of descriptors.
#[derive(Clone, Copy)]
struct Table {
    address: GuestAddress,
    /// In descriptors.
    length: u16,
}

impl Table {
    /// The table may be longer than the chain in it.
    fn indirect(found: &Descriptor) -> Result<Self, QueueError> {
        let bytes = u64::from(found.len());
        let length = u16::try_from(bytes / descriptor::SIZE).map_err(|_| QueueError::Indirect)?;
        if length == 0 || !bytes.is_multiple_of(descriptor::SIZE) {
            return Err(QueueError::Indirect);
        }
        Ok(Self { address: found.addr(), length })
    }

    fn descriptor<M: GuestMemory>(&self, memory: &M, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.length {
            return Err(QueueError::Index(index));
        }
        let offset = u64::from(index) * descriptor::SIZE;
        let address = self.address.0.checked_add(offset).ok_or(QueueError::Index(index))?;
        let raw: RawDescriptor = memory.read_obj(GuestAddress(address))?;
        Ok(raw.into())
    }
}
