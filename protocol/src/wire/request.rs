use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::device::RawInfo;
use super::extension::{DecodePageQuery, FaultReport, RegionStateQuery};
use super::{
    Command, DeviceFeature, DmaMap, DmaUnmap, IoFdsQuery, MigData, MigDataRead, RegionAccess,
    RegionData, RegionInfo, RegionWrites, SetIrqs, Version, WireError,
};

/// A client's command with its payload, lengths and flags checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Request<'a> {
    /// "VFIO_USER_VERSION"
    Version(Version),
    /// "VFIO_USER_DMA_MAP"
    DmaMap(DmaMap),
    /// "VFIO_USER_DMA_UNMAP"
    DmaUnmap(DmaUnmap),
    /// "VFIO_USER_DEVICE_GET_INFO"
    GetInfo,
    /// "VFIO_USER_DEVICE_GET_REGION_INFO"
    GetRegionInfo(InfoQuery),
    /// "VFIO_USER_DEVICE_GET_REGION_IO_FDS"
    GetRegionIoFds(IoFdsQuery),
    /// "VFIO_USER_DEVICE_GET_IRQ_INFO"
    GetIrqInfo(InfoQuery),
    /// "VFIO_USER_DEVICE_SET_IRQS"
    SetIrqs(SetIrqs<'a>),
    /// "VFIO_USER_REGION_READ"
    RegionRead(RegionAccess),
    /// "VFIO_USER_REGION_WRITE"
    RegionWrite(RegionData<'a>),
    /// "VFIO_USER_DEVICE_RESET"
    Reset,
    /// "VFIO_USER_REGION_WRITE_MULTI"
    RegionWriteMulti(RegionWrites<'a>),
    /// "VFIO_USER_DEVICE_FEATURE"
    DeviceFeature(DeviceFeature<'a>),
    /// "VFIO_USER_MIG_DATA_READ"
    MigDataRead(MigDataRead),
    /// "VFIO_USER_MIG_DATA_WRITE"
    MigDataWrite(MigData<'a>),
    /// Extension `memory_fault`.
    MemoryFault(FaultReport),
    /// Extension `region_state`.
    RegionState(RegionStateQuery),
    /// Extension `decode_page`.
    DecodePage(DecodePageQuery),
}

/// An index to be described, with the room that the asker has for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoQuery {
    /// Region or interrupt index.
    pub index: u32,
    /// Largest reply payload that the asker takes, in bytes.
    pub argsz: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRegionQuery {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

impl<'a> Request<'a> {
    /// Parses the payload of command number `code`.
    ///
    /// # Errors
    /// [`WireError`], whose [`errno`](WireError::errno) belongs into the error reply.
    pub fn parse(code: u16, body: &'a [u8]) -> Result<Self, WireError> {
        Ok(match Command::try_from(code)? {
            Command::Version => Self::Version(Version::parse(body)?),
            Command::DmaMap => Self::DmaMap(DmaMap::parse(body)?),
            Command::DmaUnmap => Self::DmaUnmap(DmaUnmap::parse(body)?),
            Command::GetInfo => {
                let raw: RawInfo = prefix(body)?;
                with_argsz::<RawInfo>(raw.argsz)?;
                Self::GetInfo
            }
            Command::GetRegionInfo => {
                let raw: RawRegionQuery = prefix(body)?;
                if raw.argsz < RegionInfo::FIXED_SIZE {
                    return Err(WireError::ArgumentSize(raw.argsz));
                }
                Self::GetRegionInfo(InfoQuery { index: raw.index, argsz: raw.argsz })
            }
            Command::GetIrqInfo => {
                let raw: RawInfo = prefix(body)?;
                with_argsz::<RawInfo>(raw.argsz)?;
                Self::GetIrqInfo(InfoQuery { index: raw.first, argsz: raw.argsz })
            }
            Command::SetIrqs => Self::SetIrqs(SetIrqs::parse(body)?),
            Command::RegionRead => Self::RegionRead(RegionAccess::parse(body)?),
            Command::RegionWrite => Self::RegionWrite(RegionData::parse(body)?),
            Command::Reset => {
                if !body.is_empty() {
                    return Err(WireError::Length { expected: 0, actual: body.len() });
                }
                Self::Reset
            }
            Command::MemoryFault => Self::MemoryFault(FaultReport::parse(body)?),
            Command::RegionState => Self::RegionState(RegionStateQuery::parse(body)?),
            Command::DecodePage => Self::DecodePage(DecodePageQuery::parse(body)?),
            Command::GetRegionIoFds => Self::GetRegionIoFds(IoFdsQuery::parse(body)?),
            Command::RegionWriteMulti => Self::RegionWriteMulti(RegionWrites::parse(body)?),
            Command::DeviceFeature => Self::DeviceFeature(DeviceFeature::parse(body)?),
            Command::MigDataRead => Self::MigDataRead(MigDataRead::parse(body)?),
            Command::MigDataWrite => Self::MigDataWrite(MigData::parse(body)?),
            command @ (Command::DmaRead | Command::DmaWrite) => {
                return Err(WireError::Unsupported(command));
            }
        })
    }

    /// How many file descriptors may travel with this request.
    #[must_use]
    pub fn max_fds(&self) -> usize {
        match self {
            // SPDK's client sends the window's descriptor again when it withdraws the window.
            Self::DmaMap(_) | Self::DmaUnmap(_) => 1,
            Self::SetIrqs(_) => super::limits::MAX_MESSAGE_FDS,
            _ => 0,
        }
    }
}

impl InfoQuery {
    /// The payload of a GET_REGION_INFO.
    #[must_use]
    pub fn to_region_bytes(self) -> Vec<u8> {
        let Self { index, argsz } = self;
        RawRegionQuery { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 }
            .as_bytes()
            .to_vec()
    }

    /// The payload of a GET_IRQ_INFO.
    #[must_use]
    pub fn to_irq_bytes(self) -> Vec<u8> {
        let Self { index, argsz } = self;
        RawInfo { argsz, flags: 0, first: index, second: 0 }.as_bytes().to_vec()
    }
}

/// A payload that may be longer than its structure: SPDK's client sends its queries with the room
/// that it has for the answer, padded with zeros.
fn prefix<T: FromBytes>(body: &[u8]) -> Result<T, WireError> {
    let short = |_| WireError::Length { expected: size_of::<T>(), actual: body.len() };
    T::read_from_prefix(body).map(|(structure, _)| structure).map_err(short)
}

/// A payload that must have exactly the length of its structure.
pub(super) fn exact<T: FromBytes>(body: &[u8]) -> Result<T, WireError> {
    T::read_from_bytes(body)
        .map_err(|_| WireError::Length { expected: size_of::<T>(), actual: body.len() })
}

/// `argsz` must hold at least the structure whose first field it is.
pub(super) fn with_argsz<T>(argsz: u32) -> Result<(), WireError> {
    if (argsz as usize) < size_of::<T>() { Err(WireError::ArgumentSize(argsz)) } else { Ok(()) }
}

/// The size of a structure as its `argsz` field holds it.
#[expect(clippy::cast_possible_truncation, reason = "the protocol's structures have tens of bytes")]
pub(super) const fn argsz_of<T>() -> u32 {
    size_of::<T>() as u32
}
