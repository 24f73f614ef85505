use bitflags::bitflags;
use zerocopy::byteorder::native_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bitmap::{check_page_size, check_range};
use super::device::prefix;
use super::region::append_room;
use super::request::exact;
use super::{MigrationFlags, MigrationState, PageBitmap, PageBitmapMut, WireError};

/// A device feature ("Device Features").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FeatureIndex {
    /// `VFIO_DEVICE_FEATURE_MIGRATION`: which states there are.
    Migration = 1,
    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: the state the device is in.
    MigDeviceState = 2,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`
    DmaLoggingStart = 6,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`
    DmaLoggingStop = 7,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`
    DmaLoggingReport = 8,
}

bitflags! {
    /// What can be done with a device feature, as a probe asks for it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FeatureMethods: u32 {
        /// `VFIO_DEVICE_FEATURE_GET`
        const GET = 1 << 16;
        /// `VFIO_DEVICE_FEATURE_SET`
        const SET = 1 << 17;
    }
}

const FLAG_PROBE: u32 = 1 << 18;
const INDEX_MASK: u32 = 0xffff;

impl FeatureIndex {
    /// The methods that the feature has in any device that has it.
    #[must_use]
    pub const fn methods(self) -> FeatureMethods {
        match self {
            Self::Migration | Self::DmaLoggingReport => FeatureMethods::GET,
            Self::MigDeviceState => FeatureMethods::all(),
            Self::DmaLoggingStart | Self::DmaLoggingStop => FeatureMethods::SET,
        }
    }

    fn from_flags(flags: u32) -> Result<Self, WireError> {
        Ok(match flags & INDEX_MASK {
            1 => Self::Migration,
            2 => Self::MigDeviceState,
            6 => Self::DmaLoggingStart,
            7 => Self::DmaLoggingStop,
            8 => Self::DmaLoggingReport,
            #[expect(clippy::cast_possible_truncation, reason = "16 bits are left")]
            other => return Err(WireError::UnknownFeature(other as u16)),
        })
    }

    const fn bits(self) -> u32 {
        self as u32
    }
}

/// Gets, sets or probes a feature ("VFIO_USER_DEVICE_FEATURE").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFeature<'a> {
    /// Largest reply payload that the asker takes, in bytes. It holds the reply, whichever it is.
    pub argsz: u32,
    /// What is asked for.
    pub request: FeatureRequest<'a>,
}

/// What a [`DeviceFeature`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureRequest<'a> {
    /// Whether the device has the feature with all of these methods, which the feature may have.
    /// The reply repeats the request.
    Probe {
        /// Which feature.
        feature: FeatureIndex,
        /// With which methods; none asks for the feature alone.
        methods: FeatureMethods,
        /// Not looked at.
        data: &'a [u8],
    },
    /// The states there are. The reply is a [`MigrationFlags`].
    GetMigration,
    /// The state that the device is in. The reply is a [`MigDeviceState`].
    GetState,
    /// Brings the device into this state, never into ERROR. The reply repeats the request.
    SetState(MigDeviceState),
    /// Starts to log DMA writes. The reply repeats the request with the page size that was taken.
    StartLogging(DmaLogging<'a>),
    /// Stops it. The reply repeats the request.
    StopLogging {
        /// Not looked at. The specification gives STOP the data of START, VFIO gives it none.
        data: &'a [u8],
    },
    /// What was written since the last report. The reply is the query with its bitmap.
    ReportLogging(DmaLoggingQuery),
}

/// "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", in requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigDeviceState {
    /// The state.
    pub state: MigrationState,
    /// Not used in vfio-user, but repeated.
    pub data_fd: u32,
}

/// "VFIO_DEVICE_FEATURE_DMA_LOGGING_START", in requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaLogging<'a> {
    /// The granularity that the client would like, a power of two, in bytes; in a reply, the one
    /// that the device took.
    pub page_size: u64,
    /// What is to be logged; everything, when there is none. Each range holds something and does
    /// not wrap.
    pub ranges: &'a [LoggingRange],
}

/// A range of DMA addresses.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LoggingRange {
    address: U64,
    size: U64,
}

/// Asks for the dirty pages of a range ("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaLoggingQuery {
    /// First DMA address (IOVA).
    pub address: u64,
    /// Length in bytes, not 0.
    pub size: u64,
    /// What one bit stands for, in bytes: a power of two, not necessarily the one of the log.
    pub page_size: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawFeature {
    argsz: u32,
    flags: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawState {
    state: u32,
    data_fd: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawLogging {
    page_size: u64,
    num_ranges: u32,
    reserved: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawReport {
    address: u64,
    size: u64,
    page_size: u64,
}

impl<'a> DeviceFeature<'a> {
    /// A client's request, with the `argsz` that its reply needs.
    ///
    /// # Errors
    /// [`WireError`] for a report whose bitmap is above the limits.
    pub fn new(request: FeatureRequest<'a>) -> Result<Self, WireError> {
        let argsz = request.reply_size()?;
        Ok(Self { argsz, request })
    }

    pub(super) fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let raw: RawFeature = prefix(body)?;
        let request = FeatureRequest::parse(raw.flags, &body[size_of::<RawFeature>()..])?;
        if raw.argsz < request.reply_size()? {
            return Err(WireError::ArgumentSize(raw.argsz));
        }
        Ok(Self { argsz: raw.argsz, request })
    }

    /// Appends the payload: the request, and for a probe and everything that sets also the reply.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let flags = self.request.flags();
        out.extend_from_slice(RawFeature { argsz: self.argsz, flags }.as_bytes());
        self.request.write_data(out);
    }
}

impl<'a> FeatureRequest<'a> {
    fn parse(flags: u32, data: &'a [u8]) -> Result<Self, WireError> {
        let unknown = flags & !(INDEX_MASK | FLAG_PROBE | FeatureMethods::all().bits());
        if unknown != 0 {
            return Err(WireError::Flags(flags));
        }
        let feature = FeatureIndex::from_flags(flags)?;
        let methods = FeatureMethods::from_bits_truncate(flags);
        if !feature.methods().contains(methods) {
            return Err(WireError::Flags(flags));
        }
        if flags & FLAG_PROBE != 0 {
            return Ok(Self::Probe { feature, methods, data });
        }
        // What gets has no data of its own; a client may send the room that it has for the answer.
        Ok(match (feature, methods) {
            (FeatureIndex::Migration, FeatureMethods::GET) => Self::GetMigration,
            (FeatureIndex::MigDeviceState, FeatureMethods::GET) => Self::GetState,
            (FeatureIndex::MigDeviceState, FeatureMethods::SET) => {
                Self::SetState(MigDeviceState::parse_target(data)?)
            }
            (FeatureIndex::DmaLoggingStart, FeatureMethods::SET) => {
                Self::StartLogging(DmaLogging::parse(data)?)
            }
            (FeatureIndex::DmaLoggingStop, FeatureMethods::SET) => Self::StopLogging { data },
            (FeatureIndex::DmaLoggingReport, FeatureMethods::GET) => {
                Self::ReportLogging(DmaLoggingQuery::parse(data)?)
            }
            // Neither method, or both.
            _ => return Err(WireError::Flags(flags)),
        })
    }

    fn flags(&self) -> u32 {
        let get = |feature: FeatureIndex| feature.bits() | FeatureMethods::GET.bits();
        let set = |feature: FeatureIndex| feature.bits() | FeatureMethods::SET.bits();
        match self {
            Self::Probe { feature, methods, .. } => feature.bits() | methods.bits() | FLAG_PROBE,
            Self::GetMigration => get(FeatureIndex::Migration),
            Self::GetState => get(FeatureIndex::MigDeviceState),
            Self::SetState(_) => set(FeatureIndex::MigDeviceState),
            Self::StartLogging(_) => set(FeatureIndex::DmaLoggingStart),
            Self::StopLogging { .. } => set(FeatureIndex::DmaLoggingStop),
            Self::ReportLogging(_) => get(FeatureIndex::DmaLoggingReport),
        }
    }

    /// The size of the reply's payload.
    fn reply_size(&self) -> Result<u32, WireError> {
        let data = match self {
            Self::GetMigration => size_of::<MigrationFlags>(),
            Self::GetState | Self::SetState(_) => size_of::<RawState>(),
            Self::Probe { data, .. } | Self::StopLogging { data } => data.len(),
            Self::StartLogging(logging) => size_of::<RawLogging>() + size_of_val(logging.ranges),
            Self::ReportLogging(query) => size_of::<RawReport>() + query.bitmap_size()? as usize,
        };
        u32::try_from(size_of::<RawFeature>() + data).map_err(|_| WireError::Transfer(data as u64))
    }

    fn write_data(&self, out: &mut Vec<u8>) {
        match self {
            Self::GetMigration | Self::GetState => {}
            Self::Probe { data, .. } | Self::StopLogging { data } => out.extend_from_slice(data),
            Self::SetState(state) => state.write_data(out),
            Self::StartLogging(logging) => logging.write_data(out),
            Self::ReportLogging(query) => query.write_data(out),
        }
    }
}

/// The start of the reply to a request that gets: `data` bytes follow.
fn write_got(request: &FeatureRequest<'_>, data: usize, out: &mut Vec<u8>) {
    let argsz =
        u32::try_from(size_of::<RawFeature>() + data).expect("bitmaps are bounded by the limits");
    out.extend_from_slice(RawFeature { argsz, flags: request.flags() }.as_bytes());
}

/// The data of a reply to a request with these flags.
fn reply_data<'a>(request: &FeatureRequest<'_>, body: &'a [u8]) -> Result<&'a [u8], WireError> {
    let raw: RawFeature = prefix(body)?;
    if raw.flags != request.flags() {
        return Err(WireError::Flags(raw.flags));
    }
    Ok(&body[size_of::<RawFeature>()..])
}

/// The reply to [`FeatureRequest::GetMigration`].
impl MigrationFlags {
    /// Appends the reply's payload.
    pub fn write_reply(self, out: &mut Vec<u8>) {
        write_got(&FeatureRequest::GetMigration, size_of::<Self>(), out);
        out.extend_from_slice(&self.bits().to_ne_bytes());
    }

    /// Parses the reply. Unknown flags are dropped: they describe what this side can't use.
    ///
    /// # Errors
    /// [`WireError`] for a short payload or the reply to something else.
    pub fn parse_reply(body: &[u8]) -> Result<Self, WireError> {
        let bits: u64 = prefix(reply_data(&FeatureRequest::GetMigration, body)?)?;
        Ok(Self::from_bits_truncate(bits))
    }
}

impl MigDeviceState {
    /// The state, with nothing in the field that is not used.
    #[must_use]
    pub fn new(state: MigrationState) -> Self {
        Self { state, data_fd: 0 }
    }

    fn parse_target(data: &[u8]) -> Result<Self, WireError> {
        let raw: RawState = exact(data)?;
        match MigrationState::try_from(raw.state)? {
            MigrationState::Error => Err(WireError::MigrationState(raw.state)),
            state => Ok(Self { state, data_fd: raw.data_fd }),
        }
    }

    fn write_data(self, out: &mut Vec<u8>) {
        let raw = RawState { state: self.state.code(), data_fd: self.data_fd };
        out.extend_from_slice(raw.as_bytes());
    }

    /// Appends the payload of the reply to [`FeatureRequest::GetState`].
    pub fn write_reply(self, out: &mut Vec<u8>) {
        write_got(&FeatureRequest::GetState, size_of::<RawState>(), out);
        self.write_data(out);
    }

    /// Parses the reply to [`FeatureRequest::GetState`].
    ///
    /// # Errors
    /// [`WireError`] for a short payload, an unknown state or the reply to something else.
    pub fn parse_reply(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawState = prefix(reply_data(&FeatureRequest::GetState, body)?)?;
        Ok(Self { state: raw.state.try_into()?, data_fd: raw.data_fd })
    }
}

impl LoggingRange {
    /// The range of `size` bytes from `address` on.
    #[must_use]
    pub fn new(address: u64, size: u64) -> Self {
        Self { address: address.into(), size: size.into() }
    }

    /// First DMA address (IOVA).
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address.get()
    }

    /// Length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.get()
    }
}

impl<'a> DmaLogging<'a> {
    fn parse(data: &'a [u8]) -> Result<Self, WireError> {
        let raw: RawLogging = prefix(data)?;
        let rest = &data[size_of::<RawLogging>()..];
        let count = raw.num_ranges as usize;
        if count.checked_mul(size_of::<LoggingRange>()) != Some(rest.len()) {
            return Err(WireError::Count(raw.num_ranges.into()));
        }
        let ranges = <[LoggingRange]>::ref_from_bytes(rest)
            .map_err(|_| WireError::Count(raw.num_ranges.into()))?;
        check_page_size(raw.page_size)?;
        for range in ranges {
            check_range(range.address(), range.size())?;
        }
        Ok(Self { page_size: raw.page_size, ranges })
    }

    fn write_data(&self, out: &mut Vec<u8>) {
        let num_ranges = u32::try_from(self.ranges.len()).expect("messages are bounded");
        let raw = RawLogging { page_size: self.page_size, num_ranges, reserved: 0 };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.ranges.as_bytes());
    }

    /// Parses the reply to these: the page size that the device took, in bytes.
    ///
    /// # Errors
    /// [`WireError`] for a short payload, no page size or the reply to something else.
    pub fn parse_reply(&self, body: &[u8]) -> Result<u64, WireError> {
        let raw: RawLogging = prefix(reply_data(&FeatureRequest::StartLogging(*self), body)?)?;
        check_page_size(raw.page_size).map(|()| raw.page_size)
    }
}

impl DmaLoggingQuery {
    fn parse(data: &[u8]) -> Result<Self, WireError> {
        let raw: RawReport = prefix(data)?;
        Ok(Self { address: raw.address, size: raw.size, page_size: raw.page_size })
    }

    /// The size of the bitmap in bytes.
    ///
    /// # Errors
    /// See [`PageBitmap::size_for`].
    pub fn bitmap_size(&self) -> Result<u32, WireError> {
        PageBitmap::size_for(self.address, self.size, self.page_size)
    }

    fn write_data(&self, out: &mut Vec<u8>) {
        let raw = RawReport { address: self.address, size: self.size, page_size: self.page_size };
        out.extend_from_slice(raw.as_bytes());
    }

    /// Appends the reply's payload, whose bitmap is `fill`'s to write. Returns what `fill` returns;
    /// if that is a failure, the bytes are the caller's to drop.
    ///
    /// # Errors
    /// See [`PageBitmap::size_for`]. A query that was parsed has none.
    pub fn write_reply<R>(
        &self,
        out: &mut Vec<u8>,
        fill: impl FnOnce(PageBitmapMut<'_>) -> R,
    ) -> Result<R, WireError> {
        let size = self.bitmap_size()? as usize;
        write_got(&FeatureRequest::ReportLogging(*self), size_of::<RawReport>() + size, out);
        self.write_data(out);
        Ok(fill(PageBitmapMut::new(append_room(out, size))))
    }

    /// Parses the reply to this query.
    ///
    /// # Errors
    /// [`WireError`] for a short payload or the reply to something else.
    pub fn parse_reply<'a>(&self, body: &'a [u8]) -> Result<PageBitmap<'a>, WireError> {
        let data = reply_data(&FeatureRequest::ReportLogging(*self), body)?;
        if Self::parse(data)? != *self {
            return Err(WireError::Mismatch);
        }
        let (expected, rest) = (self.bitmap_size()? as usize, &data[size_of::<RawReport>()..]);
        let actual = rest.len();
        let bytes = rest.get(..expected).ok_or(WireError::Length { expected, actual })?;
        Ok(PageBitmap::new(bytes))
    }
}
