use super::WireError;

/// A command number ("Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum Command {
    /// `VFIO_USER_VERSION`
    Version = 1,
    /// `VFIO_USER_DMA_MAP`
    DmaMap = 2,
    /// `VFIO_USER_DMA_UNMAP`
    DmaUnmap = 3,
    /// `VFIO_USER_DEVICE_GET_INFO`
    GetInfo = 4,
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`
    GetRegionInfo = 5,
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`
    GetRegionIoFds = 6,
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`
    GetIrqInfo = 7,
    /// `VFIO_USER_DEVICE_SET_IRQS`
    SetIrqs = 8,
    /// `VFIO_USER_REGION_READ`
    RegionRead = 9,
    /// `VFIO_USER_REGION_WRITE`
    RegionWrite = 10,
    /// `VFIO_USER_DMA_READ`, server to client
    DmaRead = 11,
    /// `VFIO_USER_DMA_WRITE`, server to client
    DmaWrite = 12,
    /// `VFIO_USER_DEVICE_RESET`
    Reset = 13,
    /// `VFIO_USER_REGION_WRITE_MULTI`
    RegionWriteMulti = 15,
    /// `VFIO_USER_DEVICE_FEATURE`
    DeviceFeature = 16,
    /// `VFIO_USER_MIG_DATA_READ`
    MigDataRead = 17,
    /// `VFIO_USER_MIG_DATA_WRITE`
    MigDataWrite = 18,
    /// barkeep extension `memory_fault`: a guest access that the hypervisor could not complete.
    MemoryFault = 0x8001,
    /// barkeep extension `region_state`: decode, epoch and access counters of one region.
    RegionState = 0x8002,
    /// barkeep extension `decode_page`: a page of memory that shows what the function decodes.
    DecodePage = 0x8003,
}

impl Command {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// How many file descriptors may travel with its reply.
    #[must_use]
    pub const fn max_reply_fds(self) -> usize {
        match self {
            // VERSION: the twin socket.
            Self::Version | Self::GetRegionInfo | Self::DecodePage => 1,
            Self::GetRegionIoFds => super::limits::MAX_MESSAGE_FDS,
            _ => 0,
        }
    }
}

impl TryFrom<u16> for Command {
    type Error = WireError;

    fn try_from(code: u16) -> Result<Self, WireError> {
        Ok(match code {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::GetInfo,
            5 => Self::GetRegionInfo,
            6 => Self::GetRegionIoFds,
            7 => Self::GetIrqInfo,
            8 => Self::SetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::Reset,
            15 => Self::RegionWriteMulti,
            16 => Self::DeviceFeature,
            17 => Self::MigDataRead,
            18 => Self::MigDataWrite,
            0x8001 => Self::MemoryFault,
            0x8002 => Self::RegionState,
            0x8003 => Self::DecodePage,
            _ => return Err(WireError::UnknownCommand(code)),
        })
    }
}
