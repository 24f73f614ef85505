use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::request::{argsz_of, exact, with_argsz};

bitflags! {
    /// What the server may do with a DMA window ("VFIO_USER_DMA_MAP", flags).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaAccess: u32 {
        /// The window may be read.
        const READ = 1 << 0;
        /// The window may be written.
        const WRITE = 1 << 1;
    }

    /// Flags of "VFIO_USER_DMA_UNMAP". The specification defines none; these are what peers send.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaUnmapFlags: u32 {
        /// The reply should carry the dirty-page bitmap.
        const DIRTY_BITMAP = 1 << 0;
        /// Every window is meant; address and size are zero.
        const ALL = 1 << 1;
    }
}

/// Announces a window of client memory ("VFIO_USER_DMA_MAP").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// What the server may do with it.
    pub access: DmaAccess,
    /// Offset in the file descriptor that travels with the message, in bytes.
    pub file_offset: u64,
    /// First DMA address (IOVA).
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawDmaMap {
    argsz: u32,
    flags: u32,
    offset: u64,
    address: u64,
    size: u64,
}

impl DmaMap {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawDmaMap = exact(body)?;
        with_argsz::<RawDmaMap>(raw.argsz)?;
        let access = DmaAccess::from_bits(raw.flags).ok_or(WireError::Flags(raw.flags))?;
        Ok(Self { access, file_offset: raw.offset, address: raw.address, size: raw.size })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        RawDmaMap {
            argsz: argsz_of::<RawDmaMap>(),
            flags: self.access.bits(),
            offset: self.file_offset,
            address: self.address,
            size: self.size,
        }
        .as_bytes()
        .to_vec()
    }
}

/// Withdraws a window of client memory ("VFIO_USER_DMA_UNMAP"); the reply repeats it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// See [`DmaUnmapFlags`].
    pub flags: DmaUnmapFlags,
    /// First DMA address (IOVA).
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawDmaUnmap {
    argsz: u32,
    flags: u32,
    address: u64,
    size: u64,
}

impl DmaUnmap {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawDmaUnmap = exact(body)?;
        with_argsz::<RawDmaUnmap>(raw.argsz)?;
        let flags = DmaUnmapFlags::from_bits(raw.flags).ok_or(WireError::Flags(raw.flags))?;
        Ok(Self { flags, address: raw.address, size: raw.size })
    }

    /// The payload's bytes, the same in the request and in the reply.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        RawDmaUnmap {
            argsz: argsz_of::<RawDmaUnmap>(),
            flags: self.flags.bits(),
            address: self.address,
            size: self.size,
        }
        .as_bytes()
        .to_vec()
    }
}
