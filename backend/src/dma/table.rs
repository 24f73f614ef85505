use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::handle::Shared;
use super::window::{FileBudget, PAGE_SIZE, Window, WindowInfo};
use super::windows::Windows;
use super::{DmaAccess, DmaError, DmaHandle, GuestView, Iommu, Iova, LoggingError, Pieces};

/// The windows of one function, none overlapping another.
///
/// Dropping it removes them, as [`unmap_all`](Self::unmap_all) does.
#[derive(Debug)]
pub struct DmaTable {
    /// What the thread that owns the table uses, without a lock.
    view: GuestView,
    shared: Arc<Shared>,
    max_windows: usize,
    /// Of a real device, which every window is mapped for.
    iommu: Option<Box<dyn Iommu>>,
    files: FileBudget,
}

impl DmaTable {
    /// An empty table that takes at most `max_windows` windows.
    #[must_use]
    pub fn new(max_windows: usize) -> Self {
        let view = GuestView { windows: Arc::default(), log: Arc::default() };
        Self {
            view,
            shared: Arc::default(),
            max_windows,
            iommu: None,
            files: FileBudget::default(),
        }
    }

    /// The same for a real device: its windows are mapped in its IOMMU, and need a file.
    #[must_use]
    pub fn behind(iommu: Box<dyn Iommu>, max_windows: usize) -> Self {
        let mut table = Self::new(max_windows);
        table.iommu = Some(iommu);
        table
    }

    /// Lets the windows that come from now on keep their files, for somebody else to map: at most so
    /// many at a time, because a process may have far fewer descriptors than a client windows. Those
    /// beyond have none to [show](Self::windows).
    pub fn keep_files(&mut self, most: usize) {
        self.files = FileBudget::new(most);
    }

    /// The windows there are, in order of addresses.
    pub fn windows(&self) -> impl Iterator<Item = WindowInfo<'_>> {
        self.view.windows.infos()
    }

    /// Adds a window of `size` bytes at `iova`, backed by a file from an offset on; without a file,
    /// it is reached with messages to the client.
    ///
    /// # Errors
    /// [`DmaError`] when the window is malformed, overlaps another, its file is too short, the
    /// process has too many mappings or the IOMMU refuses it. Nothing has changed then.
    pub fn map(
        &mut self,
        iova: Iova,
        size: u64,
        access: DmaAccess,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), DmaError> {
        if size == 0 || !page_aligned(size) || !page_aligned(iova.0) {
            return Err(DmaError::Unaligned);
        }
        // The last byte must be addressable; a window that ends exactly at 2^64 is legal.
        let last = iova.0.checked_add(size - 1).ok_or(DmaError::Overflow)?;
        if self.view.windows.overlap(iova.0, last) {
            return Err(DmaError::Overlap);
        }
        if self.view.windows.count() >= self.max_windows {
            return Err(DmaError::TooMany);
        }
        let window = Window::new(size, access, file, &self.files)?;
        if let Some(iommu) = &self.iommu {
            let memory = window.host_memory().ok_or(DmaError::Unreachable)?;
            iommu.map(iova, memory, access).map_err(DmaError::Iommu)?;
        }
        self.shared.change(&mut self.view.windows, |windows| windows.insert(iova, window));
        Ok(())
    }

    /// Removes every window in the range. When it returns, nothing of their memory is mapped any
    /// more; it waits for the guards of [`DmaHandle::memory`] that hold one of them. This is what
    /// VFIO's type 1 IOMMU does (docs/decisions/0008-unmap-by-range.md).
    ///
    /// # Errors
    /// Nothing has changed: [`DmaError::Bisected`] when a window lies only partly in the range,
    /// [`DmaError::NoSuchWindow`] when none lies in it, [`DmaError::Overflow`] when the range wraps.
    /// Or [`DmaError::Iommu`]: the windows that it does not give back are still there.
    pub fn unmap(&mut self, iova: Iova, size: u64) -> Result<(), DmaError> {
        let last = self.check_unmap(iova, size)?;
        self.remove(iova, last)
    }

    /// Removes every window in the range as [`unmap`](Self::unmap) does, and
    /// [reports](Self::report) the dirty pages of the range in `bitmap`, which holds the last writes
    /// to it too.
    ///
    /// # Errors
    /// Those of both; nothing has changed then, but for [`DmaError::Iommu`].
    pub fn unmap_reporting(
        &mut self,
        iova: Iova,
        size: u64,
        page_size: u64,
        bitmap: &mut [u8],
    ) -> Result<(), DmaError> {
        let last = self.check_unmap(iova, size)?;
        self.view.log.check_report(iova, size, page_size, bitmap)?;
        self.remove(iova, last)?;
        Ok(self.view.log.report(iova, size, page_size, bitmap)?)
    }

    /// Removes every window.
    ///
    /// # Errors
    /// [`DmaError::Iommu`]: some windows are still there. It never fails without an IOMMU.
    pub fn unmap_all(&mut self) -> Result<(), DmaError> {
        self.remove(Iova(0), Iova(u64::MAX))
    }

    /// Guest memory as it is, for the thread that serves the client.
    #[must_use]
    pub fn view(&self) -> &GuestView {
        &self.view
    }

    /// Guest memory for other threads.
    #[must_use]
    pub fn handle(&self) -> DmaHandle {
        DmaHandle::new(Arc::clone(&self.shared), Arc::clone(&self.view.log))
    }

    /// See [`GuestView::pieces`].
    ///
    /// # Errors
    /// [`DmaError`].
    pub fn pieces(&self, iova: Iova, len: u64, access: DmaAccess) -> Result<Pieces<'_>, DmaError> {
        self.view.pieces(iova, len, access)
    }

    /// See [`GuestView::read`].
    ///
    /// # Errors
    /// [`DmaError`]; `data` may then be partly filled.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        self.view.read(iova, data)
    }

    /// See [`GuestView::write`].
    ///
    /// # Errors
    /// [`DmaError`]; the start of the range may then have been written, as on a bus.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        self.view.write(iova, data)
    }

    /// Notes that the function has written to a range with a message to the client.
    pub fn mark_dirty(&self, iova: Iova, len: u64) {
        self.view.mark_dirty(iova, len);
    }

    /// Notes that the function may have written anywhere: the ranges that are logged, and whatever it
    /// reaches now.
    pub fn mark_all_dirty(&self) {
        self.view.log.mark_ranges();
        for window in self.windows() {
            self.mark_dirty(window.iova, window.size);
        }
    }

    /// Starts to log the pages that the function writes, in `ranges` of addresses and lengths in
    /// bytes, or everywhere if there are none. `page_size` is a hint; what is returned is the size
    /// that is logged in (VFIO_DEVICE_FEATURE_DMA_LOGGING_START).
    ///
    /// The log is bounded: if a function writes in too many places, it is kept in larger pages.
    ///
    /// # Errors
    /// [`DmaError::Logging`]; nothing has changed.
    pub fn start_logging(
        &mut self,
        ranges: &[(Iova, u64)],
        page_size: u64,
    ) -> Result<u64, DmaError> {
        if self.iommu.is_some() {
            return Err(LoggingError::RealDevice.into());
        }
        Ok(self.view.log.start(ranges, page_size)?)
    }

    /// Whether writes are logged.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.view.log.is_started()
    }

    /// Ends logging. Without logging, nothing happens (VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP).
    pub fn stop_logging(&mut self) {
        self.view.log.stop();
    }

    /// Fills `bitmap` with one bit for each page of a range, set if the function wrote to it since
    /// logging was started or the page was last reported: bit n of byte m is page 8 * m + n
    /// (VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT). [`bitmap_size`](super::bitmap_size) tells how long
    /// `bitmap` must be. The page size need not be that of the log.
    ///
    /// # Errors
    /// [`DmaError::Logging`]; nothing has changed.
    pub fn report(
        &mut self,
        iova: Iova,
        len: u64,
        page_size: u64,
        bitmap: &mut [u8],
    ) -> Result<(), DmaError> {
        Ok(self.view.log.report(iova, len, page_size, bitmap)?)
    }

    /// The last address of a range that can be unmapped.
    fn check_unmap(&self, iova: Iova, size: u64) -> Result<Iova, DmaError> {
        let reach = size.checked_sub(1).ok_or(DmaError::NoSuchWindow)?;
        let last = iova.0.checked_add(reach).ok_or(DmaError::Overflow)?;
        let windows: &Windows = &self.view.windows;
        if windows.bisects(iova.0) || last.checked_add(1).is_some_and(|end| windows.bisects(end)) {
            return Err(DmaError::Bisected);
        }
        if windows.any_start(iova.0, last) { Ok(Iova(last)) } else { Err(DmaError::NoSuchWindow) }
    }

    /// Removes the windows that start in a range. The IOMMU comes first: a device must not reach
    /// memory that was given back.
    fn remove(&mut self, first: Iova, last: Iova) -> Result<(), DmaError> {
        let mut refusal = None;
        let iommu = &self.iommu;
        let removed = self.shared.change(&mut self.view.windows, |windows| {
            windows.extract(first..=last, |start, window| {
                let Some(iommu) = iommu else { return true };
                let outcome = iommu.unmap(start, window.size());
                refusal = refusal.or(outcome.err());
                outcome.is_ok()
            })
        });
        self.shared.retire(removed);
        refusal.map_or(Ok(()), |errno| Err(DmaError::Iommu(errno)))
    }
}

impl Drop for DmaTable {
    fn drop(&mut self) {
        // What an IOMMU has not given back is pinned until it is dropped itself.
        let all = Iova(0)..=Iova(u64::MAX);
        let removed =
            self.shared.change(&mut self.view.windows, |windows| windows.extract(all, |_, _| true));
        self.shared.retire(removed);
    }
}

fn page_aligned(value: u64) -> bool {
    value.is_multiple_of(PAGE_SIZE as u64)
}
