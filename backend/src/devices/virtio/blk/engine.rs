//! Input and output in the kernel, one operation at a time for each request.

use std::fs::File;
use std::ops::Deref;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Permissions;
use vm_memory::{GuestMemory, VolatileSlice};

use super::request::Pieces;
use crate::devices::virtio::MemoryGuard;

/// What does operations on an image. It may do a part of a transfer only, as the kernel does.
pub(super) trait Engine<G>: Send {
    /// Takes an operation. It may wait until [`submit`](Self::submit). There is none of this id yet.
    fn start(&mut self, id: Id, operation: Operation<G>);

    /// Hands what was started to the kernel, all at once.
    fn submit(&mut self);

    /// An operation that is done, if there is one.
    fn completed(&mut self) -> Option<Completion<G>>;

    /// Waits until an operation is done, if there are any. It may return early.
    fn wait(&mut self);
}

/// The request that an operation belongs to: a number below the engine's depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(pub(super) usize);

/// The image, opened once more: nothing but the fate of what was written is asked of it.
pub(super) type Witness = Arc<File>;

/// An operation on the image. Addresses and lengths are in bytes.
#[derive(Debug)]
pub(super) enum Operation<G> {
    /// Reads from the image.
    Read { at: u64, into: Span<G> },
    /// Writes to the image.
    Write { at: u64, from: Span<G> },
    /// Writes zeros.
    Zeros { at: u64, len: u64 },
    /// Makes what was written before durable. There is one at a time: see [`Syncs`](super::syncs::Syncs).
    Sync,
    /// Fails if something could not be made durable since the witness was opened or asked. It moves
    /// and waits for nothing, so nobody who dies meanwhile takes the answer along, as with a sync.
    Ask(Witness),
    /// fallocate()
    Allocate { at: u64, len: u64, mode: FallocateFlags },
}

impl<G> Operation<G> {
    /// The same with other memory, or none.
    pub(super) fn with_memory<H>(self, memory: H) -> Operation<H> {
        match self {
            Self::Read { at, into } => Operation::Read { at, into: into.with_memory(memory) },
            Self::Write { at, from } => Operation::Write { at, from: from.with_memory(memory) },
            Self::Zeros { at, len } => Operation::Zeros { at, len },
            Self::Sync => Operation::Sync,
            Self::Ask(witness) => Operation::Ask(witness),
            Self::Allocate { at, len, mode } => Operation::Allocate { at, len, mode },
        }
    }
}

/// An operation that is done.
#[derive(Debug)]
pub(super) struct Completion<G> {
    pub(super) id: Id,
    pub(super) operation: Operation<G>,
    /// The number of bytes that were moved.
    pub(super) result: Result<u64, Errno>,
}

/// Guest memory of a transfer, which stays mapped while this lives.
#[derive(Debug)]
pub(super) struct Span<G> {
    memory: G,
    pieces: Pieces,
}

/// The most bytes that one operation moves; the rest of a longer transfer is done afterwards. The
/// kernel may copy them while we wait, and [`Core::quiesce`](crate::devices::virtio::Core::quiesce)
/// waits for all that was begun.
const MAX_TRANSFER: usize = 1 << 20;

impl<G> Span<G> {
    fn with_memory<H>(self, memory: H) -> Span<H> {
        Span { memory, pieces: self.pieces }
    }
}

impl<G: MemoryGuard> Span<G> {
    pub(super) fn new(memory: G, pieces: Pieces) -> Self {
        Self { memory, pieces }
    }

    pub(super) fn len(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| *len as u64).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Drops bytes at its beginning.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        let whole = self.pieces.iter().take_while(|(_, len)| {
            let over = *len <= left;
            left -= if over { *len } else { 0 };
            over
        });
        let whole = whole.count();
        self.pieces.drain(..whole);
        if let Some((address, len)) = self.pieces.first_mut() {
            // Wrapping is found out when the memory is looked up.
            address.0 = address.0.wrapping_add(left as u64);
            *len -= left;
        }
    }

    /// Shows the memory of one operation in this process to `each`, until that has enough of it and
    /// returns false.
    ///
    /// # Errors
    /// `FAULT` when a part of it is not there or may not be accessed so.
    pub(super) fn slices<'a>(
        &'a self,
        access: Permissions,
        mut each: impl FnMut(Slice<'a, G>) -> bool,
    ) -> Result<(), Errno> {
        let mut left = MAX_TRANSFER;
        for &(address, len) in &self.pieces {
            if left == 0 {
                break;
            }
            let len = len.min(left);
            left -= len;
            let slices = self.memory.get_slices(address, len, access);
            for slice in slices.map_err(|_| Errno::FAULT)? {
                if !each(slice.map_err(|_| Errno::FAULT)?) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether all of it is there and may be accessed so.
    pub(super) fn reachable(&self, access: Permissions) -> bool {
        let mut pieces = self.pieces.iter();
        pieces.all(|&(address, len)| self.memory.check_range(address, len, access))
    }

    /// Writes as much of `data` as there is room for, and returns how much that is.
    ///
    /// # Errors
    /// `FAULT` when memory is not there or may not be written.
    pub(super) fn fill(&self, data: &[u8]) -> Result<u64, Errno> {
        let mut rest = data;
        self.slices(Permissions::Write, |slice| {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
            !rest.is_empty()
        })?;
        Ok((data.len() - rest.len()) as u64)
    }

    /// Notes that the kernel wrote to its first bytes.
    ///
    /// # Errors
    /// `FAULT` when the memory went away meanwhile.
    pub(super) fn written(&self, bytes: u64) -> Result<(), Errno> {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.slices(Permissions::Write, |slice| {
            let len = slice.len().min(left);
            slice.bitmap().mark_dirty(0, len);
            left -= len;
            left > 0
        })
    }
}

/// A part of guest memory in this process.
pub(super) type Slice<'a, G> =
    VolatileSlice<'a, BS<'a, <<G as Deref>::Target as GuestMemory>::Bitmap>>;

/// What zeros are written from.
pub(super) static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
