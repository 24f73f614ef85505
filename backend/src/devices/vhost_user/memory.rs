//! Guest memory as a daemon gets it: regions of files, under the addresses of the client's windows.

use std::cmp::Reverse;
use std::os::fd::BorrowedFd;

use rustix::fs::fstat;
use rustix::io::Errno;

use crate::dma::{DmaAccess, WindowInfo};

/// Memory that a daemon maps. Its address for the driver and its "user address" are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) iova: u64,
    /// In bytes. The end does not wrap.
    pub(super) size: u64,
    /// Where it starts in its file.
    pub(super) offset: u64,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Region {
    /// A file of our own, as a whole.
    ///
    /// # Errors
    /// When the file can't be looked at.
    pub(super) fn new(address: u64, size: u64, file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = fstat(file)?;
        Ok(Self { iova: address, size, offset: 0, file: (stat.st_dev, stat.st_ino) })
    }

    /// "Memory region description".
    pub(super) fn to_bytes(self) -> Vec<u8> {
        [self.iova, self.size, self.iova, self.offset]
            .into_iter()
            .flat_map(u64::to_ne_bytes)
            .collect()
    }

    fn contains(self, address: u64, size: u64) -> bool {
        let Some(offset) = address.checked_sub(self.iova) else { return false };
        offset.checked_add(size).is_some_and(|end| end <= self.size)
    }
}

/// The memory that a daemon is to have.
#[derive(Debug, Default)]
pub(super) struct Wanted<'a> {
    regions: Vec<(Region, BorrowedFd<'a>)>,
    /// Regions that the daemon has no room for.
    pub(super) left_out: usize,
}

impl<'a> Wanted<'a> {
    /// What of the windows a daemon can map, in at most so many regions. Windows that are adjacent
    /// in both the address space and their file are one. Those that a function may not write are
    /// none of its: a daemon maps everything for both.
    pub(super) fn new(windows: impl Iterator<Item = WindowInfo<'a>>, most: usize) -> Self {
        let mut regions: Vec<(Region, BorrowedFd<'a>)> = Vec::new();
        for window in windows.filter(|window| window.access == DmaAccess::all()) {
            let Some(file) = window.file else { continue };
            if window.iova.0.checked_add(window.size).is_none() {
                continue;
            }
            let next = Region {
                iova: window.iova.0,
                size: window.size,
                offset: file.offset,
                file: file.id,
            };
            match regions.last_mut() {
                Some((region, _)) if follows(*region, next) => region.size += next.size,
                _ => regions.push((next, file.fd)),
            }
        }
        let left_out = regions.len().saturating_sub(most);
        if left_out > 0 {
            regions.sort_by_key(|(region, _)| Reverse(region.size));
            regions.truncate(most);
            regions.sort_by_key(|(region, _)| region.iova);
        }
        Self { regions, left_out }
    }

    /// And a region that is none of the guest's.
    pub(super) fn with(mut self, (region, fd): (Region, BorrowedFd<'a>)) -> Self {
        self.regions.push((region, fd));
        self
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = (Region, BorrowedFd<'a>)> {
        self.regions.iter().copied()
    }

    pub(super) fn contains(&self, region: Region) -> bool {
        self.regions.iter().any(|(wanted, _)| *wanted == region)
    }

    /// Whether a daemon finds the whole range where it finds its start.
    pub(super) fn covers(&self, address: u64, size: u64) -> bool {
        self.regions.iter().any(|(region, _)| region.contains(address, size))
    }
}

fn follows(region: Region, next: Region) -> bool {
    region.file == next.file
        && region.iova + region.size == next.iova
        && region.offset.checked_add(region.size) == Some(next.offset)
}
