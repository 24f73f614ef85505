use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bitmap::check_range;
use super::device::prefix;
use super::limits::MAX_DATA_XFER_SIZE;
use super::region::append_room;
use super::request::exact;
use super::{Command, Version, WireError};

/// The fixed part of "VFIO_USER_DMA_READ" and "VFIO_USER_DMA_WRITE", the server's own commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaTransfer {
    /// First DMA address (IOVA), in a window that the client mapped.
    pub address: u64,
    /// Number of bytes.
    pub count: u64,
}

/// Where the data of a DMA_READ's reply and of a DMA_WRITE lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaLayout {
    /// The specification's: a 64-bit count, data at offset 16 of the payload.
    Spec,
    /// QEMU's: a 32-bit count, data at offset 12, and 4 bytes behind the data to the same length.
    Qemu,
}

/// A transfer with its data: a DMA_WRITE, or what a DMA_READ brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaData<'a> {
    /// Where and how much.
    pub transfer: DmaTransfer,
    /// `transfer.count` bytes.
    pub data: &'a [u8],
}

/// What a DMA_READ brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaReadReply<'a> {
    /// As many bytes as were asked for.
    pub data: &'a [u8],
    /// The layout that the reply can only have; `None` when its bytes make sense in both.
    pub proven: Option<DmaLayout>,
}

/// A server's own command, as a client receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRequest<'a> {
    /// "VFIO_USER_DMA_READ"
    DmaRead(DmaTransfer),
    /// "VFIO_USER_DMA_WRITE"
    DmaWrite(DmaData<'a>),
}

impl DmaLayout {
    /// Where the data begins in the payload, in bytes.
    #[must_use]
    pub const fn data_offset(self) -> usize {
        match self {
            Self::Spec => 16,
            Self::Qemu => 12,
        }
    }

    /// The layout to be expected of the client that proposed `version`.
    ///
    /// QEMU proposes 0.0 with a `max_bitmap_size` in its `migration` object, a name that the
    /// specification does not have; nobody else does that. Versions with the specification's layout
    /// (11.1 is one) can't be told from those without by it, so the belief is to be checked before the
    /// first DMA_WRITE with data:
    /// a DMA_WRITE with count 0 changes nothing, and [`DmaTransfer::check_write_reply`] tells the
    /// layout from its answer.
    #[must_use]
    pub fn expected_of(version: &Version) -> Self {
        let migration = version.capabilities.migration.as_ref();
        if version.minor == 0 && migration.is_some_and(|m| m.max_bitmap_size.is_some()) {
            Self::Qemu
        } else {
            Self::Spec
        }
    }
}

impl DmaTransfer {
    /// Size of the fixed part, in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// Parses a DMA_READ.
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        exact::<Self>(body)?.checked()
    }

    /// A transfer within the limits whose range does not wrap. Count 0 is one.
    fn checked(self) -> Result<Self, WireError> {
        if self.count > u64::from(MAX_DATA_XFER_SIZE) {
            return Err(WireError::Transfer(self.count));
        }
        if self.count > 0 {
            check_range(self.address, self.count)?;
        }
        Ok(self)
    }

    /// Appends the payload of a DMA_READ. It is the same for both layouts.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    /// Appends a payload with data: a DMA_WRITE, or the reply to a DMA_READ. `fill` is given `count`
    /// bytes, all zero. Returns what `fill` returns; if that is a failure, the bytes are the caller's
    /// to drop.
    pub fn write_data<R>(
        &self,
        layout: DmaLayout,
        out: &mut Vec<u8>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let count = usize::try_from(self.count).expect("transfers are bounded by the limits");
        let start = out.len();
        self.write_to(out);
        let fixed = layout.data_offset();
        let _ = append_room(out, count);
        // In QEMU's layout the data begins where the upper half of the count is, which is 0.
        fill(&mut out[start + fixed..start + fixed + count])
    }

    /// Parses the reply to this DMA_READ, from a client of which `expected` is believed. A reply that
    /// proves the other layout is taken as what it proves.
    ///
    /// Both layouts have the same length. In the specification's, the upper half of the count is 0
    /// where QEMU has the first 4 bytes of its data; in QEMU's, there are 4 bytes of 0 behind the data
    /// where the specification has its last 4. Only a reply with 0 in both places leaves it open.
    ///
    /// # Errors
    /// [`WireError`] when the reply is of another length or speaks of another transfer.
    pub fn parse_read_reply<'a>(
        &self,
        body: &'a [u8],
        expected: DmaLayout,
    ) -> Result<DmaReadReply<'a>, WireError> {
        self.check_repeated(body)?;
        let count = usize::try_from(self.count).map_err(|_| WireError::Transfer(self.count))?;
        let wrong = WireError::Length { expected: Self::SIZE + count, actual: body.len() };
        let proven = if body.len() == Self::SIZE + count {
            let clear = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
            let upper_half = clear(&body[DmaLayout::Qemu.data_offset()..Self::SIZE]);
            let padding = clear(&body[DmaLayout::Qemu.data_offset() + count..]);
            match (upper_half, padding) {
                (true, true) => None,
                (true, false) => Some(DmaLayout::Spec),
                (false, true) => Some(DmaLayout::Qemu),
                (false, false) => return Err(WireError::Mismatch),
            }
        } else if body.len() == DmaLayout::Qemu.data_offset() + count {
            // What QEMU would send if it left its padding out.
            Some(DmaLayout::Qemu)
        } else {
            return Err(wrong);
        };
        let start = proven.unwrap_or(expected).data_offset();
        Ok(DmaReadReply { data: &body[start..start + count], proven })
    }

    /// Checks the reply to this DMA_WRITE. Returns the layout of the client that sent it: QEMU's
    /// reply has no payload, the specification's repeats address and count (as 64 or, by its table,
    /// as 32 bits).
    ///
    /// # Errors
    /// [`WireError`] when the reply is of another length or speaks of another transfer.
    pub fn check_write_reply(&self, body: &[u8]) -> Result<DmaLayout, WireError> {
        if body.is_empty() {
            return Ok(DmaLayout::Qemu);
        }
        self.check_repeated(body)?;
        let upper_half = &body[DmaLayout::Qemu.data_offset()..];
        match upper_half {
            [] | [0, 0, 0, 0] => Ok(DmaLayout::Spec),
            [_, _, _, _] => Err(WireError::Mismatch),
            _ => Err(WireError::Length { expected: Self::SIZE, actual: body.len() }),
        }
    }

    /// Address and the lower half of the count, which all layouts have in the same place.
    fn check_repeated(&self, body: &[u8]) -> Result<(), WireError> {
        let (address, count): (u64, u32) = (prefix(body)?, prefix(&body[size_of::<u64>()..])?);
        if address == self.address && u64::from(count) == self.count {
            Ok(())
        } else {
            Err(WireError::Mismatch)
        }
    }
}

impl<'a> DmaData<'a> {
    /// Parses a DMA_WRITE in the specification's layout: exactly `count` bytes must follow.
    fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let transfer = prefix::<DmaTransfer>(body)?.checked()?;
        let data = &body[DmaTransfer::SIZE..];
        if data.len() as u64 != transfer.count {
            let expected = usize::try_from(transfer.count).unwrap_or(usize::MAX);
            return Err(WireError::Length { expected, actual: data.len() });
        }
        Ok(Self { transfer, data })
    }
}

impl<'a> ServerRequest<'a> {
    /// Parses the payload of command number `code`, in the specification's layout. The reply to a
    /// DMA_READ is [`DmaTransfer::write_data`], to a DMA_WRITE [`DmaTransfer::write_to`].
    ///
    /// # Errors
    /// [`WireError`], whose [`errno`](WireError::errno) belongs into the error reply.
    pub fn parse(code: u16, body: &'a [u8]) -> Result<Self, WireError> {
        match Command::try_from(code)? {
            Command::DmaRead => Ok(Self::DmaRead(DmaTransfer::parse(body)?)),
            Command::DmaWrite => Ok(Self::DmaWrite(DmaData::parse(body)?)),
            other => Err(WireError::Unsupported(other)),
        }
    }
}
