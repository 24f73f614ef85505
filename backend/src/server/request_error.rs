use barkeep_protocol::wire::{Errno, WireError};
use thiserror::Error;

use crate::dma::DmaError;
use crate::irq::IrqError;

/// Why a client's request is answered with an error. The session goes on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// The message itself.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A DMA window.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// An interrupt.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// VERSION must come first, and once.
    #[error("message out of order")]
    OutOfOrder,
    /// An extension that was not negotiated.
    #[error("extension was not negotiated")]
    NotNegotiated,
    /// There is no region with this index.
    #[error("no region {0}")]
    NoRegion(u32),
    /// There is no interrupt with this index.
    #[error("no interrupt index {0}")]
    NoIrq(u32),
    /// The access leaves its region.
    #[error("{count} bytes at {offset:#x} leave region {region}")]
    OutOfRegion {
        /// Region index.
        region: u32,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        count: u64,
    },
    /// Action and data of a SET_IRQS don't go together for this interrupt.
    #[error("interrupt action is not supported for index {0}")]
    IrqAction(u32),
    /// The function has no such feature.
    #[error("no such feature")]
    NoFeature,
    /// The state that was asked for can't be reached from the present one, or data was read or
    /// written in a state that has none.
    #[error("migration state does not allow this")]
    MigrationState,
    /// A migration stream that is not of such a function, or damaged.
    #[error("state of another function, or damaged")]
    ForeignState,
    /// Memory that moves with the function.
    #[error("memory of the device: {0}")]
    Memory(Errno),
    /// There is no memory for the decode page, or it can't be handed out.
    #[error("decode page: {0}")]
    Page(Errno),
    /// The number of file descriptors does not fit the request.
    #[error("{0} file descriptors do not fit the request")]
    FdCount(usize),
    /// A real device, or the kernel in front of it, refuses.
    #[error("device: {0}")]
    Device(Errno),
    /// We are out of descriptors.
    #[error("can't duplicate a file descriptor: {0}")]
    Descriptor(Errno),
}

impl RequestError {
    /// Memory of a device's own that can't be read or written.
    pub(super) fn memory(error: &std::io::Error) -> Self {
        Self::Memory(Errno::from_io_error(error).unwrap_or(Errno::IO))
    }

    /// The decode page can't be had.
    pub(super) fn page(error: &std::io::Error) -> Self {
        Self::Page(Errno::from_io_error(error).unwrap_or(Errno::IO))
    }

    /// The errno of the error reply.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Wire(error) => error.errno(),
            Self::Dma(error) => error.errno(),
            Self::Descriptor(errno)
            | Self::Device(errno)
            | Self::Memory(errno)
            | Self::Page(errno) => *errno,
            // As for an ioctl that a device does not know.
            Self::NoFeature => Errno::NOTTY,
            Self::NotNegotiated => Errno::NOTSUP,
            Self::Irq(_)
            | Self::MigrationState
            | Self::ForeignState
            | Self::OutOfOrder
            | Self::NoRegion(_)
            | Self::NoIrq(_)
            | Self::OutOfRegion { .. }
            | Self::IrqAction(_)
            | Self::FdCount(_) => Errno::INVAL,
        }
    }
}
