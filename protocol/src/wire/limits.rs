//! Limits of the protocol and of this implementation, in bytes unless said otherwise.

/// Size of the message header ("Header").
pub const HEADER_SIZE: usize = 16;

/// [`HEADER_SIZE`] in the width of the header's size field.
pub const HEADER_SIZE_U32: u32 = 16;

/// `max_data_xfer_size` that both sides of barkeep announce, and the protocol's default: the most
/// data that one region or DMA transfer may carry.
pub const MAX_DATA_XFER_SIZE: u32 = 1 << 20;

/// The largest message that is read into memory: a full transfer with its header and fixed part.
///
/// Anything longer is refused with `EINVAL` and drained without being stored, so a peer's claim
/// about a length never costs more memory than this.
pub const MAX_MESSAGE_SIZE: u32 = MAX_DATA_XFER_SIZE + 4096;

/// `max_msg_fds` that barkeep announces: the most file descriptors taken from one message.
///
/// QEMU refuses a server that announces more than 16.
pub const MAX_MESSAGE_FDS: usize = 16;

/// `max_msg_fds` of a peer that does not say ("Version").
pub const DEFAULT_MESSAGE_FDS: usize = 1;

/// `max_dma_maps` that barkeep announces: simultaneous DMA windows, the protocol's default.
pub const MAX_DMA_MAPS: usize = 65535;

/// `pgsizes` that barkeep announces, as a mask: DMA windows are multiples of 4 KiB.
pub const PAGE_SIZES: u64 = 4096;

/// The longest VERSION JSON that is parsed.
pub const MAX_VERSION_DATA: usize = 4096;
