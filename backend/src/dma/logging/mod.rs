//! Which pages a function has written, for a client that moves the guest to another host
//! (VFIO_DEVICE_FEATURE_DMA_LOGGING_*).

mod pages;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use rustix::io::Errno;
use thiserror::Error;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use self::pages::DirtyPages;
use super::Iova;

/// Ranges that one START may name; what the kernel's VFIO takes.
pub const MAX_LOGGED_RANGES: usize = 256;

/// The size in bytes of the largest bitmap that is reported at once; what the kernel's VFIO takes.
/// It stands for 8 TiB of pages of 4 KiB.
pub const MAX_BITMAP_SIZE: u64 = 256 << 20;

/// Why dirty pages can't be logged or reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LoggingError {
    /// Logging was started already.
    #[error("dirty pages are logged already")]
    Started,
    /// Logging was not started.
    #[error("dirty pages are not logged")]
    NotStarted,
    /// A page size that is not a power of two, or a report in pages of less than 4096 bytes.
    #[error("no page size: {0:#x}")]
    PageSize(u64),
    /// More than [`MAX_LOGGED_RANGES`].
    #[error("too many ranges to log")]
    TooManyRanges,
    /// A range that is empty, not made of pages, or overlaps another one.
    #[error("range can't be logged")]
    Range,
    /// A range that wraps.
    #[error("range exceeds the address space")]
    Overflow,
    /// A bitmap that has no room for the range, or is larger than [`MAX_BITMAP_SIZE`].
    #[error("bitmap does not fit the range")]
    Bitmap,
    /// A real device writes memory by itself: nobody here knows where.
    #[error("a real device logs nothing")]
    RealDevice,
}

impl LoggingError {
    /// The errno of the reply to DEVICE_FEATURE, as the kernel's VFIO answers.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::TooManyRanges => Errno::TOOBIG,
            Self::Overflow => Errno::OVERFLOW,
            Self::RealDevice => Errno::NOTSUP,
            Self::Started | Self::NotStarted | Self::PageSize(_) | Self::Range | Self::Bitmap => {
                Errno::INVAL
            }
        }
    }
}

/// The size in bytes of the bitmap for a range: one bit for each page, in whole words of 64 bits.
///
/// # Errors
/// [`LoggingError::PageSize`], [`LoggingError::Range`] when the range is empty,
/// [`LoggingError::Overflow`] when it wraps, [`LoggingError::Bitmap`] when the bitmap would exceed
/// [`MAX_BITMAP_SIZE`].
pub fn bitmap_size(iova: Iova, len: u64, page_size: u64) -> Result<usize, LoggingError> {
    if !page_size.is_power_of_two() || page_size < pages::SMALLEST_PAGE {
        return Err(LoggingError::PageSize(page_size));
    }
    let _ = last_of(iova, len)?;
    let size = len.div_ceil(page_size).div_ceil(64) * 8;
    let size = Some(size).filter(|size| *size <= MAX_BITMAP_SIZE);
    size.and_then(|size| usize::try_from(size).ok()).ok_or(LoggingError::Bitmap)
}

fn last_of(iova: Iova, len: u64) -> Result<u64, LoggingError> {
    let reach = len.checked_sub(1).ok_or(LoggingError::Range)?;
    iova.0.checked_add(reach).ok_or(LoggingError::Overflow)
}

/// The log of the pages that a function wrote, shared by all of its threads.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// Whether there are pages: asked before the lock is taken.
    started: AtomicBool,
    pages: RwLock<Option<DirtyPages>>,
}

impl DirtyLog {
    /// Starts to log writes to some ranges, or to all addresses if there are none. Returns the page
    /// size that is logged in.
    pub(super) fn start(
        &self,
        ranges: &[(Iova, u64)],
        page_size: u64,
    ) -> Result<u64, LoggingError> {
        if !page_size.is_power_of_two() {
            return Err(LoggingError::PageSize(page_size));
        }
        if ranges.len() > MAX_LOGGED_RANGES {
            return Err(LoggingError::TooManyRanges);
        }
        let mut sorted = Vec::with_capacity(ranges.len().max(1));
        for (iova, len) in ranges {
            if !iova.0.is_multiple_of(page_size) || !len.is_multiple_of(page_size) {
                return Err(LoggingError::Range);
            }
            sorted.push((iova.0, last_of(*iova, *len)?));
        }
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[1].0 <= pair[0].1) {
            return Err(LoggingError::Range);
        }
        if sorted.is_empty() {
            sorted.push((0, u64::MAX));
        }
        let mut pages = self.exclusive();
        if pages.is_some() {
            return Err(LoggingError::Started);
        }
        let new = pages.insert(DirtyPages::new(sorted, page_size));
        self.started.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Ok(new.page_size())
    }

    /// Ends logging, and forgets what was logged. Without logging, nothing happens.
    pub(super) fn stop(&self) {
        let mut pages = self.exclusive();
        self.started.store(false, Ordering::SeqCst);
        *pages = None;
    }

    pub(super) fn is_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    /// Notes a write, after it was done.
    pub(super) fn mark(&self, first: u64, len: u64) {
        // The write must be visible before the question is asked: a client that starts logging and
        // then copies a page must find in the copy what is not logged.
        fence(Ordering::SeqCst);
        if self.is_started() {
            self.mark_started(first, len);
        }
    }

    /// Notes writes to all of the ranges that were named: nobody knows any more where they were.
    pub(super) fn mark_ranges(&self) {
        let ranges = {
            let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
            pages.as_ref().map_or_else(Vec::new, |pages| pages.ranges().to_vec())
        };
        // All addresses, when none was named: no log could tell pages apart any more.
        for (first, last) in ranges.into_iter().filter(|range| *range != (0, u64::MAX)) {
            self.mark(first, (last - first).saturating_add(1));
        }
    }

    #[cold]
    fn mark_started(&self, first: u64, len: u64) {
        let Some(reach) = len.checked_sub(1) else { return };
        let last = first.saturating_add(reach);
        let marked = {
            let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
            pages.as_ref().is_none_or(|pages| pages.mark(first, last))
        };
        if !marked && let Some(pages) = self.exclusive().as_mut() {
            pages.mark_with_room(first, last);
        }
    }

    /// Sets the bits of the dirty pages of a range, clears all others, and forgets the pages that
    /// lie in the range as a whole.
    pub(super) fn report(
        &self,
        iova: Iova,
        len: u64,
        page_size: u64,
        bitmap: &mut [u8],
    ) -> Result<(), LoggingError> {
        self.check_report(iova, len, page_size, bitmap)?;
        let last = last_of(iova, len)?;
        let mut pages = self.exclusive();
        let pages = pages.as_mut().ok_or(LoggingError::NotStarted)?;
        bitmap.fill(0);
        pages.report((iova.0, last), page_size.trailing_zeros(), bitmap);
        Ok(())
    }

    /// Whether a report would succeed.
    pub(super) fn check_report(
        &self,
        iova: Iova,
        len: u64,
        page_size: u64,
        bitmap: &[u8],
    ) -> Result<(), LoggingError> {
        if !self.is_started() {
            return Err(LoggingError::NotStarted);
        }
        if bitmap.len() < bitmap_size(iova, len, page_size)? {
            return Err(LoggingError::Bitmap);
        }
        Ok(())
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Option<DirtyPages>> {
        self.pages.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_dirty(&self, address: u64) -> bool {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        pages.as_ref().is_some_and(|pages| pages.is_dirty(address))
    }
}

/// The log from an address on: what a slice of guest memory marks when it is written.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    log: &'a DirtyLog,
    iova: u64,
}

impl<'a> DirtySlice<'a> {
    pub(super) fn new(log: &'a DirtyLog, iova: u64) -> Self {
        Self { log, iova }
    }
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.iova.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_dirty(self.iova.saturating_add(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { iova: self.iova.saturating_add(offset as u64), ..*self }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset as u64)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice::new(self, offset as u64)
    }
}
