use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::guest_memory::{Error as GuestMemoryError, GuestMemorySliceIterator, Permissions};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::logging::{DirtyLog, DirtySlice};
use super::windows::{Share, Shares, Windows};
use super::{DmaAccess, DmaError, Iova};

/// Guest memory at one moment: the windows, and the log of what is written to them.
///
/// It is the [`GuestMemory`] of devices that are built on `vm-memory`, a virtio queue for instance.
/// Such a device reaches mapped windows only. What it asks for is granted as a whole or not at all:
/// a range that leaves the windows, that one of them does not allow, or that lies in a window
/// without a file gives no slice. A slice that was asked for reading must not be written.
///
/// Memory that its owner takes away reads as zeros; [`intact`](Self::intact) tells, after the
/// access.
#[derive(Debug)]
pub struct GuestView {
    pub(super) windows: Arc<Windows>,
    pub(super) log: Arc<DirtyLog>,
}

/// How a function reaches a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It is mapped: [`GuestView::read`] and [`GuestView::write`].
    Mapped,
    /// The client has to be asked: DMA_READ and DMA_WRITE.
    Message,
}

/// A part of a range, in one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its first address.
    pub iova: Iova,
    /// Its length in bytes, at least 1.
    pub len: u64,
    /// How it is reached.
    pub reach: Reach,
}

impl GuestView {
    /// Cuts a range at the borders of windows, after a check that all of it is mapped and allows the
    /// access. No byte is no piece, at any address.
    ///
    /// # Errors
    /// [`DmaError::Unmapped`] or [`DmaError::Denied`] with the first address that is, and
    /// [`DmaError::Overflow`] when the range wraps.
    pub fn pieces(&self, iova: Iova, len: u64, access: DmaAccess) -> Result<Pieces<'_>, DmaError> {
        self.windows.check(iova, len, access)?;
        Ok(Pieces(self.windows.shares(iova, len)))
    }

    /// Reads guest memory into `data`. The range may span adjacent windows.
    ///
    /// # Errors
    /// [`DmaError`]; `data` may then be partly filled.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        let mut rest = data;
        for share in self.windows.shares(iova, rest.len() as u64) {
            let Share { window, address, offset, len } = share?;
            let (data, behind) = rest.split_at_mut(length(len));
            window.read(address, offset, data)?;
            rest = behind;
        }
        Ok(())
    }

    /// Writes `data` to guest memory. The range may span adjacent windows.
    ///
    /// # Errors
    /// [`DmaError`]; the start of the range may then have been written, as on a bus.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let mut rest = data;
        for share in self.windows.shares(iova, rest.len() as u64) {
            let Share { window, address, offset, len } = share?;
            let (data, behind) = rest.split_at(length(len));
            window.write(address, offset, data, DirtySlice::new(&self.log, address))?;
            rest = behind;
        }
        Ok(())
    }

    /// Whether the memory of a range was there whenever it was accessed. Whoever used slices asks
    /// afterwards; [`read`](Self::read) and [`write`](Self::write) do it themselves.
    ///
    /// # Errors
    /// [`DmaError::Vanished`], or [`DmaError::Unmapped`] if no window covers it.
    pub fn intact(&self, iova: Iova, len: u64) -> Result<(), DmaError> {
        for share in self.windows.shares(iova, len) {
            let Share { window, address, offset, len } = share?;
            window.intact(address, offset, length(len))?;
        }
        Ok(())
    }

    /// Notes that the function has written to a range in another way than through this view, while
    /// dirty pages are logged.
    pub fn mark_dirty(&self, iova: Iova, len: u64) {
        self.log.mark(iova.0, len);
    }

    /// Nothing when a slice of the range can't be given.
    fn grant(&self, iova: Iova, len: usize, access: DmaAccess) -> Result<(), DmaError> {
        for share in self.windows.shares(iova, len as u64) {
            let Share { window, address, offset, len } = share?;
            let _ = window.slice(address, offset, length(len), access, ())?;
        }
        Ok(())
    }
}

/// A share of a slice is no longer than the slice.
fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// See [`GuestView::pieces`].
#[derive(Clone, Debug)]
pub struct Pieces<'a>(Shares<'a>);

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let share = self.0.next()?.ok()?;
        let reach = if share.window.is_mapped() { Reach::Mapped } else { Reach::Message };
        Some(Piece { iova: Iova(share.address), len: share.len, reach })
    }
}

impl GuestMemory for GuestView {
    /// There is none of this kind.
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = DirtyLog;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.grant(Iova(addr.0), count, dma_access(access)).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, DirtySlice<'a>>, GuestMemoryError> {
        let access = dma_access(access);
        self.grant(Iova(addr.0), count, access).map_err(guest_memory_error)?;
        let shares = self.windows.shares(Iova(addr.0), count as u64);
        Ok(Slices { shares, access, log: &self.log })
    }
}

fn dma_access(permissions: Permissions) -> DmaAccess {
    let mut access = DmaAccess::empty();
    access.set(DmaAccess::READ, permissions.allow(Permissions::Read));
    access.set(DmaAccess::WRITE, permissions.allow(Permissions::Write));
    access
}

fn guest_memory_error(error: DmaError) -> GuestMemoryError {
    match error {
        DmaError::Unmapped(address)
        | DmaError::Denied(address)
        | DmaError::NotShared(address)
        | DmaError::Vanished(address) => {
            GuestMemoryError::InvalidGuestAddress(GuestAddress(address))
        }
        _ => GuestMemoryError::GuestAddressOverflow,
    }
}

/// The slices of a range, which was checked.
#[derive(Debug)]
struct Slices<'a> {
    shares: Shares<'a>,
    access: DmaAccess,
    log: &'a DirtyLog,
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, DirtySlice<'a>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = self.shares.next()?.and_then(|share| {
            let Share { window, address, offset, len } = share;
            let bitmap = DirtySlice::new(self.log, address);
            window.slice(address, offset, length(len), self.access, bitmap)
        });
        Some(slice.map_err(guest_memory_error))
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, DirtySlice<'a>> for Slices<'a> {}
