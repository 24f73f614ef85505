use vm_memory::GuestMemory;

use super::header::{Direction, Header};
use super::spec::header;
use crate::devices::virtio::{Buffers, QueueError};

/// The longest frame in bytes: an Ethernet header with a VLAN tag, and an IP packet.
pub(super) const MAX_LEN: usize = 14 + 4 + 65535;

/// The shortest frame in bytes: an Ethernet header.
const MIN_LEN: usize = 14;

/// One frame with its header in front, in memory that is kept for the next one.
#[derive(Debug)]
pub(super) struct Frame {
    /// One byte longer than a frame may be, so that a longer one is seen to be cut.
    bytes: Box<[u8]>,
    /// Of header and frame.
    len: usize,
}

impl Frame {
    pub(super) fn new() -> Self {
        let bytes = vec![0; header::SIZE + MAX_LEN + 1].into_boxed_slice();
        Self { bytes, len: 0 }
    }

    /// Header and frame.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The frame alone.
    pub(super) fn data(&self) -> &[u8] {
        &self.bytes[header::SIZE..self.len.max(header::SIZE)]
    }

    /// Reads a frame with a header in front. Returns whether it is one.
    pub(super) fn fill<E>(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<bool, E> {
        self.len = read(&mut self.bytes)?.min(self.bytes.len());
        Ok(self.is_whole())
    }

    /// Reads a frame without a header, in front of which goes an empty one. Returns whether it is a
    /// frame.
    pub(super) fn fill_bare<E>(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<bool, E> {
        let (head, data) = self.bytes.split_at_mut(header::SIZE);
        head.fill(0);
        self.len = header::SIZE + read(data)?.min(data.len());
        Ok(self.is_whole())
    }

    /// Copies what the driver sends. Returns whether it is a frame: one with too little or too much
    /// data is none.
    pub(super) fn gather<M: GuestMemory>(
        &mut self,
        memory: &M,
        buffers: &Buffers,
    ) -> Result<bool, QueueError> {
        self.len = usize::try_from(buffers.len()).unwrap_or(usize::MAX).min(self.bytes.len());
        if self.is_whole() {
            buffers.read(memory, 0, &mut self.bytes[..self.len])?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Leaves in the header what was agreed upon. Returns whether the frame can be used then.
    pub(super) fn agree(&mut self, features: u64, direction: Direction) -> bool {
        let agreed = self.header().agreed(features, direction);
        if let Some(agreed) = agreed {
            self.set_header(agreed);
        }
        agreed.is_some()
    }

    /// Says in how many chains the frame lies.
    pub(super) fn set_num_buffers(&mut self, buffers: u16) {
        let mut header = self.header();
        header.set_num_buffers(buffers);
        self.set_header(header);
    }

    fn header(&self) -> Header {
        let mut header = [0; header::SIZE];
        header.copy_from_slice(&self.bytes[..header::SIZE]);
        Header(header)
    }

    fn set_header(&mut self, header: Header) {
        self.bytes[..header::SIZE].copy_from_slice(&header.0);
    }

    fn is_whole(&self) -> bool {
        (header::SIZE + MIN_LEN..=header::SIZE + MAX_LEN).contains(&self.len)
    }
}
