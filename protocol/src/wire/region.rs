use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::device::prefix;
use super::limits::MAX_DATA_XFER_SIZE;
use super::request::exact;

/// The fixed part of "VFIO_USER_REGION_READ" and "VFIO_USER_REGION_WRITE", in requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset from the start of the region, in bytes.
    pub offset: u64,
    /// Region index (see [`super::PciRegion`]).
    pub region: u32,
    /// Number of bytes.
    pub count: u32,
}

/// An access with its data: a write's request, or a read's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionData<'a> {
    /// Where and how much.
    pub access: RegionAccess,
    /// `access.count` bytes.
    pub data: &'a [u8],
}

impl RegionAccess {
    /// Size of the fixed part, in bytes.
    pub const SIZE: usize = size_of::<Self>();

    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        exact::<Self>(body)?.checked()
    }

    fn checked(self) -> Result<Self, WireError> {
        if self.count > MAX_DATA_XFER_SIZE {
            return Err(WireError::Transfer(self.count.into()));
        }
        Ok(self)
    }

    /// The fixed part followed by room for `count` bytes of data, all zero.
    #[must_use]
    pub fn reply_buffer(&self) -> Vec<u8> {
        let mut body = vec![0; Self::SIZE + self.count as usize];
        body[..Self::SIZE].copy_from_slice(self.as_bytes());
        body
    }

    /// Appends a read's reply: the fixed part, then `count` bytes that `fill` is given, all zero.
    /// Returns what `fill` returns; if that is a failure, the bytes are the caller's to drop.
    pub fn write_reply<R>(&self, out: &mut Vec<u8>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.write_to(out);
        fill(append_room(out, self.count as usize))
    }

    /// Appends the payload's bytes: a read's request or a write's reply.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

impl<'a> RegionData<'a> {
    /// Parses a write request or a read reply: exactly `count` bytes must follow the fixed part.
    ///
    /// # Errors
    /// [`WireError`] when count and payload disagree or the transfer is above the limit.
    pub fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let access = prefix::<RegionAccess>(body)?.checked()?;
        let data = &body[RegionAccess::SIZE..];
        if data.len() != access.count as usize {
            return Err(WireError::Length { expected: access.count as usize, actual: data.len() });
        }
        Ok(Self { access, data })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(RegionAccess::SIZE + self.data.len());
        self.write_to(&mut bytes);
        bytes
    }

    /// Appends the payload's bytes: a write's request or a read's reply.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        self.access.write_to(out);
        out.extend_from_slice(self.data);
    }
}

/// Appends `count` zeros and returns them.
pub(super) fn append_room(out: &mut Vec<u8>, count: usize) -> &mut [u8] {
    let start = out.len();
    out.resize(start + count, 0);
    &mut out[start..]
}
