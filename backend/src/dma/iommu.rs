use std::fmt;

use rustix::io::Errno;

use super::{DmaAccess, Iova};

/// The IOMMU in front of a real device: what it maps, the device reaches by itself.
pub trait Iommu: Send + fmt::Debug {
    /// Lets the device reach a window. The memory stays pinned until [`unmap`](Self::unmap).
    ///
    /// # Errors
    /// What the kernel says; the device then reaches nothing of the window.
    fn map(&self, iova: Iova, memory: HostMemory, access: DmaAccess) -> Result<(), Errno>;

    /// Takes back exactly what one [`map`](Self::map) gave. When it returns, no access of the device
    /// is under way there.
    ///
    /// # Errors
    /// What the kernel says; the device may then still reach the window.
    fn unmap(&self, iova: Iova, size: u64) -> Result<(), Errno>;
}

/// The memory of a window, in this process's address space.
///
/// Only the table of windows makes one, so it is always a shared mapping of a file of the client's
/// that no reference of this process points into: a device may write there at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    address: u64,
    size: u64,
}

impl HostMemory {
    pub(super) fn new(address: u64, size: u64) -> Self {
        Self { address, size }
    }

    /// Its first address.
    #[must_use]
    pub fn address(self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        self.size
    }
}
