use zerocopy::byteorder::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::device::prefix;
use super::limits::MAX_MESSAGE_SIZE;
use super::{RegionAccess, WireError};

/// One write of a "VFIO_USER_REGION_WRITE_MULTI": at most 8 bytes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SmallWrite {
    offset: U64,
    region: U32,
    count: U32,
    data: [u8; SmallWrite::MAX_DATA],
}

impl SmallWrite {
    /// The most bytes that one write carries.
    pub const MAX_DATA: usize = 8;

    /// A write of `data` to `offset` of `region`; `None` for more than [`MAX_DATA`](Self::MAX_DATA)
    /// bytes.
    #[must_use]
    pub fn new(region: u32, offset: u64, data: &[u8]) -> Option<Self> {
        let mut padded = [0; Self::MAX_DATA];
        padded.get_mut(..data.len())?.copy_from_slice(data);
        let count = u32::try_from(data.len()).ok()?;
        Some(Self {
            offset: offset.into(),
            region: region.into(),
            count: count.into(),
            data: padded,
        })
    }

    /// Where and how much.
    #[must_use]
    pub fn access(&self) -> RegionAccess {
        RegionAccess {
            offset: self.offset.get(),
            region: self.region.get(),
            count: self.count.get(),
        }
    }

    /// The bytes to write, as many as the access counts.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        let count = self.count.get() as usize;
        &self.data[..count.min(Self::MAX_DATA)]
    }
}

/// Several small writes in one message, to be done in order ("VFIO_USER_REGION_WRITE_MULTI").
///
/// Every count is checked before any write is handed out: a malformed message changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrites<'a> {
    /// The writes.
    pub writes: &'a [SmallWrite],
}

impl<'a> RegionWrites<'a> {
    /// The most writes that fit a message of ours. QEMU sends at most 200.
    pub const MAX_WRITES: usize =
        (MAX_MESSAGE_SIZE as usize - super::limits::HEADER_SIZE - 8) / size_of::<SmallWrite>();

    pub(super) fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let count: u64 = prefix(body)?;
        let actual = body.len();
        let rest = &body[size_of::<u64>()..];
        let fits = usize::try_from(count).ok().and_then(|n| n.checked_mul(size_of::<SmallWrite>()));
        if fits != Some(rest.len()) {
            return Err(WireError::Count(count));
        }
        let writes = <[SmallWrite]>::ref_from_bytes(rest)
            .map_err(|_| WireError::Length { expected: actual, actual })?;
        let oversized = |write: &&SmallWrite| write.count.get() as usize > SmallWrite::MAX_DATA;
        match writes.iter().find(oversized) {
            Some(write) => Err(WireError::Count(write.count.get().into())),
            None => Ok(Self { writes }),
        }
    }

    /// Appends the request's payload.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.writes.len() as u64).to_ne_bytes());
        out.extend_from_slice(self.writes.as_bytes());
    }

    /// Appends the reply's payload: how many of the writes, from the first on, were completed.
    pub fn write_reply(out: &mut Vec<u8>, completed: usize) {
        out.extend_from_slice(&(completed as u64).to_ne_bytes());
    }

    /// Parses the reply to these writes: how many of them were completed.
    ///
    /// # Errors
    /// [`WireError`] for a short payload, or for more writes than were asked for.
    pub fn parse_reply(&self, body: &[u8]) -> Result<usize, WireError> {
        let count: u64 = prefix(body)?;
        match usize::try_from(count) {
            Ok(completed) if completed <= self.writes.len() => Ok(completed),
            _ => Err(WireError::Count(count)),
        }
    }
}
