use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::window::Window;
use super::{DmaAccess, DmaError, Iommu, Iova};

/// The windows of one function, none overlapping another.
#[derive(Debug)]
pub struct DmaTable {
    windows: BTreeMap<Iova, Window>,
    max_windows: usize,
    /// Of a real device, which every window is mapped for.
    iommu: Option<Box<dyn Iommu>>,
}

impl DmaTable {
    /// An empty table that takes at most `max_windows` windows.
    #[must_use]
    pub fn new(max_windows: usize) -> Self {
        Self { windows: BTreeMap::new(), max_windows, iommu: None }
    }

    /// The same for a real device: its windows are mapped in its IOMMU, and need a file.
    #[must_use]
    pub fn behind(iommu: Box<dyn Iommu>, max_windows: usize) -> Self {
        Self { iommu: Some(iommu), ..Self::new(max_windows) }
    }

    /// Adds a window of `size` bytes at `iova`, backed by a file from an offset on; without a file,
    /// it is known but can't be accessed.
    ///
    /// # Errors
    /// [`DmaError`] when the window is malformed, overlaps another, its file is too short or the
    /// IOMMU refuses it. Nothing has changed then.
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
        let below = self.windows.range(..=Iova(last)).next_back();
        if below.is_some_and(|(start, window)| start.0 + (window.size() - 1) >= iova.0) {
            return Err(DmaError::Overlap);
        }
        if self.windows.len() >= self.max_windows {
            return Err(DmaError::TooMany);
        }
        let window = Window::new(size, access, file)?;
        if let Some(iommu) = &self.iommu {
            let memory = window.host_memory().ok_or(DmaError::Unreachable)?;
            iommu.map(iova, memory, access).map_err(DmaError::Iommu)?;
        }
        self.windows.insert(iova, window);
        Ok(())
    }

    /// Removes every window in the range. When it returns, nothing of their memory is mapped any
    /// more. This is what VFIO's type 1 IOMMU does (docs/decisions/0008-unmap-by-range.md).
    ///
    /// # Errors
    /// Nothing has changed: [`DmaError::Bisected`] when a window lies only partly in the range,
    /// [`DmaError::NoSuchWindow`] when none lies in it, [`DmaError::Overflow`] when the range wraps.
    /// Or [`DmaError::Iommu`]: the windows that it does not give back are still there.
    pub fn unmap(&mut self, iova: Iova, size: u64) -> Result<(), DmaError> {
        let reach = size.checked_sub(1).ok_or(DmaError::NoSuchWindow)?;
        let last = iova.0.checked_add(reach).ok_or(DmaError::Overflow)?;
        if self.bisects(iova.0) || last.checked_add(1).is_some_and(|end| self.bisects(end)) {
            return Err(DmaError::Bisected);
        }
        match self.remove(iova, Iova(last))? {
            0 => Err(DmaError::NoSuchWindow),
            _ => Ok(()),
        }
    }

    /// Removes every window.
    ///
    /// # Errors
    /// [`DmaError::Iommu`]: some windows are still there. It never fails without an IOMMU.
    pub fn unmap_all(&mut self) -> Result<(), DmaError> {
        self.remove(Iova(0), Iova(u64::MAX)).map(|_| ())
    }

    /// Reads guest memory into `data`. The range may span adjacent windows.
    ///
    /// # Errors
    /// [`DmaError`]; `data` may then be partly filled.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < data.len() {
            let address = iova.0.checked_add(done as u64).ok_or(DmaError::Overflow)?;
            let (window, offset, length) = self.locate(address, data.len() - done)?;
            window.read(address, offset, &mut data[done..done + length])?;
            done += length;
        }
        Ok(())
    }

    /// Writes `data` to guest memory. The range may span adjacent windows.
    ///
    /// # Errors
    /// [`DmaError`]; the start of the range may then have been written, as on a bus.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < data.len() {
            let address = iova.0.checked_add(done as u64).ok_or(DmaError::Overflow)?;
            let (window, offset, length) = self.locate(address, data.len() - done)?;
            window.write(address, offset, &data[done..done + length])?;
            done += length;
        }
        Ok(())
    }

    /// Removes the windows that start in a range, and counts them. The IOMMU comes first: a device
    /// must not reach memory that was given back.
    fn remove(&mut self, first: Iova, last: Iova) -> Result<usize, DmaError> {
        let mut refusal = None;
        let iommu = &self.iommu;
        let removed = self.windows.extract_if(first..=last, |start, window| {
            let Some(iommu) = iommu else { return true };
            let outcome = iommu.unmap(*start, window.size());
            refusal = refusal.or(outcome.err());
            outcome.is_ok()
        });
        let removed = removed.count();
        refusal.map_or(Ok(removed), |errno| Err(DmaError::Iommu(errno)))
    }

    /// Whether a window starts below `address` and reaches it.
    fn bisects(&self, address: u64) -> bool {
        let below = self.windows.range(..Iova(address)).next_back();
        below.is_some_and(|(start, window)| address - start.0 < window.size())
    }

    /// The window that covers `address`, the offset in it, and how much of `length` lies in it.
    fn locate(&self, address: u64, length: usize) -> Result<(&Window, u64, usize), DmaError> {
        let (start, window) = self
            .windows
            .range(..=Iova(address))
            .next_back()
            .filter(|(start, window)| address - start.0 < window.size())
            .ok_or(DmaError::Unmapped(address))?;
        let offset = address - start.0;
        let room = usize::try_from(window.size() - offset).unwrap_or(usize::MAX);
        Ok((window, offset, length.min(room)))
    }
}

fn page_aligned(value: u64) -> bool {
    value.is_multiple_of(4096)
}
