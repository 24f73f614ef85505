//! Guest memory as a function sees it: the windows that the client announced with DMA_MAP.
//!
//! A window's file belongs to the client, who may shrink it at any time; touching a mapping behind
//! the end of its file raises SIGBUS, which `sigbus.rs` survives. A window without a file is reached
//! with messages to the client, which the session sends: [`GuestView::pieces`] tells where.
//!
//! The thread that serves the client owns the [`DmaTable`] and uses its memory without a lock. The
//! threads of a device hold a [`DmaHandle`]: while they hold a guard of it, what they see stays
//! mapped, and the client's DMA_UNMAP waits.
//!
//! A real device accesses memory by itself. Its windows are mapped in its [`Iommu`] as well, which
//! pins their pages: what a client shrinks then is lost to the client, not to the device.

mod handle;
mod iommu;
mod logging;
mod mapping;
mod shared;
mod sigbus;
mod table;
mod view;
mod window;
mod windows;

#[cfg(test)]
mod tests;

pub use handle::{DmaGuard, DmaHandle};
pub use iommu::{HostMemory, Iommu};
pub use logging::{
    DirtyLog, DirtySlice, LoggingError, MAX_BITMAP_SIZE, MAX_LOGGED_RANGES, bitmap_size,
};
pub use shared::SharedMemory;
pub use table::DmaTable;
pub use view::{GuestView, Piece, Pieces, Reach};
pub use window::{WindowFile, WindowInfo};

use bitflags::bitflags;
use rustix::io::Errno;
use thiserror::Error;

/// An address on the function's side of the IOMMU: what a driver writes into DMA registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

bitflags! {
    /// What a function may do with a window.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaAccess: u8 {
        /// Read from it.
        const READ = 1 << 0;
        /// Write to it.
        const WRITE = 1 << 1;
    }
}

/// Why a window can't be mapped or unmapped, or a transfer can't be done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaError {
    /// Address, size or file offset is not a multiple of the page size, or the size is 0.
    #[error("window is not page aligned")]
    Unaligned,
    /// The window wraps around the address space.
    #[error("window exceeds the address space")]
    Overflow,
    /// The window overlaps one that exists.
    #[error("window overlaps another one")]
    Overlap,
    /// As many windows as announced in `max_dma_maps` exist.
    #[error("too many windows")]
    TooMany,
    /// The file is shorter than the window, or it can't be mapped: `NOMEM` when the process has as
    /// many mappings as it may.
    #[error("file can't back the window: {0}")]
    Backing(Errno),
    /// A range to unmap starts or ends inside a window.
    #[error("range splits a window")]
    Bisected,
    /// No window lies in the range to unmap.
    #[error("no such window")]
    NoSuchWindow,
    /// A transfer to an address that no window covers.
    #[error("address {0:#x} is not mapped")]
    Unmapped(u64),
    /// A transfer to a window that does not allow it.
    #[error("address {0:#x} does not allow this access")]
    Denied(u64),
    /// A transfer to a window that came without a file descriptor: it takes a message.
    #[error("address {0:#x} has no shared memory")]
    NotShared(u64),
    /// The file did not hold the memory when it was accessed. It stays so until the window is mapped
    /// again.
    #[error("memory behind address {0:#x} is gone")]
    Vanished(u64),
    /// A window without a file descriptor for a real device, which could not reach it.
    #[error("a real device reaches only windows with a file descriptor")]
    Unreachable,
    /// The IOMMU of a real device refuses.
    #[error("IOMMU: {0}")]
    Iommu(Errno),
    /// Dirty pages can't be logged or reported.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// The client refuses to move memory.
    #[error("client refuses access to {address:#x}: {errno}")]
    Refused {
        /// Where the transfer started.
        address: u64,
        /// Its answer.
        errno: Errno,
    },
    /// `PCI_COMMAND.BME` is clear or the function is not in D0: it may not issue requests.
    #[error("bus mastering is disabled")]
    BusMasterDisabled,
}

impl DmaError {
    /// The errno of the reply to DMA_MAP, DMA_UNMAP or DEVICE_FEATURE.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Overlap => Errno::EXIST,
            Self::TooMany => Errno::NOSPC,
            Self::NoSuchWindow => Errno::NOENT,
            Self::Unreachable => Errno::NOTSUP,
            Self::Logging(error) => error.errno(),
            Self::Backing(errno) | Self::Iommu(errno) | Self::Refused { errno, .. } => *errno,
            Self::Unaligned
            | Self::Overflow
            | Self::Bisected
            | Self::Unmapped(_)
            | Self::Denied(_)
            | Self::NotShared(_)
            | Self::Vanished(_)
            | Self::BusMasterDisabled => Errno::INVAL,
        }
    }
}
