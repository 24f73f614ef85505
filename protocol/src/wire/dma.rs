use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::device::prefix;
use super::region::append_room;
use super::request::{argsz_of, exact, with_argsz};
use super::{PageBitmap, PageBitmapMut, WireError};

bitflags! {
    /// What the server may do with a DMA window ("VFIO_USER_DMA_MAP", flags).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaAccess: u32 {
        /// The window may be read.
        const READ = 1 << 0;
        /// The window may be written.
        const WRITE = 1 << 1;
    }

    /// Flags of "VFIO_USER_DMA_UNMAP". The specification defines none; these are VFIO's, which QEMU
    /// and libvfio-user use. The `vfio_user` crate's server has them one bit higher, its client sends
    /// none.
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

/// Withdraws windows of client memory ("VFIO_USER_DMA_UNMAP"); the reply repeats it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// What is meant. `DIRTY_BITMAP` is derived from `bitmap`.
    pub flags: DmaUnmapFlags,
    /// First DMA address (IOVA); 0 with `ALL`.
    pub address: u64,
    /// Length in bytes; 0 with `ALL`.
    pub size: u64,
    /// The bitmap of dirty pages that the reply should carry. Not together with `ALL`.
    pub bitmap: Option<BitmapRequest>,
}

/// Asks for a bitmap (`struct vfio_bitmap`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BitmapRequest {
    /// What one bit stands for, in bytes: a power of two.
    pub page_size: u64,
    /// The size of the bitmap in bytes, at least what the range needs.
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
    /// Every window.
    #[must_use]
    pub const fn all() -> Self {
        Self { flags: DmaUnmapFlags::ALL, address: 0, size: 0, bitmap: None }
    }

    /// The windows in a range.
    #[must_use]
    pub const fn range(address: u64, size: u64) -> Self {
        Self { flags: DmaUnmapFlags::empty(), address, size, bitmap: None }
    }

    /// The windows in a range, with the bitmap of its dirty pages.
    ///
    /// # Errors
    /// See [`PageBitmap::size_for`].
    pub fn with_bitmap(address: u64, size: u64, page_size: u64) -> Result<Self, WireError> {
        let bytes = PageBitmap::size_for(address, size, page_size)?.into();
        let bitmap = Some(BitmapRequest { page_size, size: bytes });
        Ok(Self { flags: DmaUnmapFlags::DIRTY_BITMAP, address, size, bitmap })
    }

    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawDmaUnmap = prefix(body)?;
        let flags = DmaUnmapFlags::from_bits(raw.flags).ok_or(WireError::Flags(raw.flags))?;
        let (address, size) = (raw.address, raw.size);
        let rest = &body[size_of::<RawDmaUnmap>()..];
        let mut bitmap = None;
        if flags.contains(DmaUnmapFlags::ALL) {
            if flags != DmaUnmapFlags::ALL {
                return Err(WireError::Flags(raw.flags));
            }
            if (address, size) != (0, 0) {
                return Err(WireError::Range { address, size });
            }
        }
        if flags.contains(DmaUnmapFlags::DIRTY_BITMAP) {
            bitmap = Some(exact::<BitmapRequest>(rest)?.checked(address, size)?);
        } else if !rest.is_empty() {
            return Err(WireError::Length {
                expected: size_of::<RawDmaUnmap>(),
                actual: body.len(),
            });
        }
        let unmap = Self { flags, address, size, bitmap };
        if (raw.argsz as usize) < unmap.reply_size() {
            return Err(WireError::ArgumentSize(raw.argsz));
        }
        Ok(unmap)
    }

    /// The size of the reply's payload, in bytes.
    fn reply_size(&self) -> usize {
        let bitmap = self.bitmap.map_or(0, |bitmap| size_of::<BitmapRequest>() + bitmap.room());
        size_of::<RawDmaUnmap>() + bitmap
    }

    /// The payload's bytes, the same in the request and, without a bitmap, in the reply.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes);
        bytes
    }

    /// Appends the payload, the same in the request and, without a bitmap, in the reply.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let mut flags = self.flags - DmaUnmapFlags::DIRTY_BITMAP;
        flags.set(DmaUnmapFlags::DIRTY_BITMAP, self.bitmap.is_some());
        let argsz = u32::try_from(self.reply_size()).expect("bitmaps are bounded by the limits");
        let (address, size) = (self.address, self.size);
        let raw = RawDmaUnmap { argsz, flags: flags.bits(), address, size };
        out.extend_from_slice(raw.as_bytes());
        if let Some(bitmap) = &self.bitmap {
            out.extend_from_slice(bitmap.as_bytes());
        }
    }

    /// Appends the reply's payload. If a bitmap was asked for, `fill` writes it; otherwise it is not
    /// called.
    pub fn write_reply(&self, out: &mut Vec<u8>, fill: impl FnOnce(PageBitmapMut<'_>)) {
        self.write_to(out);
        if let Some(bitmap) = &self.bitmap {
            fill(PageBitmapMut::new(append_room(out, bitmap.room())));
        }
    }

    /// Parses the reply: the bitmap, if this asked for one.
    ///
    /// # Errors
    /// [`WireError`] for a short payload or the reply to something else.
    pub fn parse_reply<'a>(&self, body: &'a [u8]) -> Result<Option<PageBitmap<'a>>, WireError> {
        let raw: RawDmaUnmap = prefix(body)?;
        if (raw.address, raw.size) != (self.address, self.size) {
            return Err(WireError::Mismatch);
        }
        let Some(bitmap) = self.bitmap else { return Ok(None) };
        let rest = &body[size_of::<RawDmaUnmap>()..];
        if prefix::<BitmapRequest>(rest)? != bitmap {
            return Err(WireError::Mismatch);
        }
        let rest = &rest[size_of::<BitmapRequest>()..];
        let (expected, actual) = (bitmap.room(), rest.len());
        let bytes = rest.get(..expected).ok_or(WireError::Length { expected, actual })?;
        Ok(Some(PageBitmap::new(bytes)))
    }
}

impl BitmapRequest {
    fn checked(self, address: u64, size: u64) -> Result<Self, WireError> {
        let needed = PageBitmap::size_for(address, size, self.page_size)?.into();
        if self.size > u64::from(PageBitmap::MAX_SIZE) {
            return Err(WireError::Transfer(self.size));
        }
        if self.size < needed {
            return Err(WireError::Bitmap { expected: needed, actual: self.size });
        }
        Ok(self)
    }

    fn room(&self) -> usize {
        usize::try_from(self.size).expect("bitmaps are bounded by the limits")
    }
}
