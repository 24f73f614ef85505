use std::sync::atomic::AtomicU64;

/// A page of memory that others write.
pub(crate) type PageWords = &'static [AtomicU64];

/// Bytes of the VMM's memory, laid out as a `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Extent {
    pub(crate) address: usize,
    /// In bytes.
    pub(crate) len: usize,
}

/// What `sendmsg` and `recvmsg` are given, all of it in the VMM's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SocketMessage {
    /// Address of a socket address, or 0.
    pub(crate) name: usize,
    pub(crate) name_len: u32,
    pub(crate) extents: Vec<Extent>,
    /// Address of ancillary data, or of room for it, or 0.
    pub(crate) control: usize,
    pub(crate) control_len: usize,
}

/// What `recvmsg` leaves in its message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SocketReceived {
    /// Bytes of data.
    pub(crate) count: usize,
    pub(crate) name_len: u32,
    pub(crate) control_len: usize,
    pub(crate) flags: i32,
}

impl SocketMessage {
    /// Bytes of data that there are, or that there is room for.
    pub(crate) fn len(&self) -> usize {
        self.extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len))
    }

    /// The part of its data, or of its room, that is `len` bytes from `from` on. Name and ancillary data
    /// go with the beginning.
    pub(crate) fn part(&self, from: usize, len: usize) -> Self {
        let mut skip = from;
        let mut left = len;
        let mut extents = Vec::with_capacity(self.extents.len());
        for extent in &self.extents {
            let skipped = skip.min(extent.len);
            skip -= skipped;
            let len = left.min(extent.len - skipped);
            left -= len;
            if len > 0 {
                extents.push(Extent { address: extent.address.wrapping_add(skipped), len });
            }
        }
        if from == 0 { Self { extents, ..self.clone() } } else { Self { extents, ..Self::default() } }
    }
}
