//! barkeep's own commands, negotiated under the `barkeep` capability (docs/protocol.md).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::device::prefix;
use super::request::{argsz_of, exact, with_argsz};

bitflags! {
    /// What the faulting instruction tried. Empty when the hypervisor does not tell.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultAccess: u32 {
        /// It read.
        const READ = 1 << 0;
        /// It wrote.
        const WRITE = 1 << 1;
        /// It was an instruction fetch.
        const EXECUTE = 1 << 2;
    }

    /// What a function claims at the moment.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DecodeFlags: u32 {
        /// The asked region's space decodes: accesses reach the device.
        const CLAIMED = 1 << 0;
    }
}

/// A memory fault on a BAR, forwarded to the backend that owns the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// Region index of the BAR.
    pub region: u32,
    /// What the guest tried.
    pub access: FaultAccess,
    /// Offset of the fault from the start of the BAR, in bytes.
    pub offset: u64,
    /// Size of the faulting range in bytes, as the hypervisor tells it: usually a page.
    pub size: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawFaultReport {
    argsz: u32,
    access: u32,
    region: u32,
    reserved: u32,
    offset: u64,
    size: u64,
}

impl FaultReport {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawFaultReport = exact(body)?;
        with_argsz::<RawFaultReport>(raw.argsz)?;
        let access = FaultAccess::from_bits(raw.access).ok_or(WireError::Flags(raw.access))?;
        Ok(Self { region: raw.region, access, offset: raw.offset, size: raw.size })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        RawFaultReport {
            argsz: argsz_of::<RawFaultReport>(),
            access: self.access.bits(),
            region: self.region,
            reserved: 0,
            offset: self.offset,
            size: self.size,
        }
        .as_bytes()
        .to_vec()
    }
}

/// The backend's answer to a [`FaultReport`], with the epoch at which it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultVerdict {
    /// The BAR does not decode: suspend its memory slot, re-enter, and forward the MMIO access.
    UnsupportedRequest {
        /// See [`RegionState::epoch`].
        epoch: u64,
    },
    /// The BAR decodes and may be mapped: map it, or re-enter if it is mapped already.
    Map {
        /// See [`RegionState::epoch`].
        epoch: u64,
    },
    /// The BAR decodes but is trapped: there must be no memory slot there.
    Trap {
        /// See [`RegionState::epoch`].
        epoch: u64,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawVerdict {
    verdict: u32,
    reserved: u32,
    epoch: u64,
}

impl FaultVerdict {
    /// The epoch at which it holds. See [`RegionState::epoch`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        match *self {
            Self::UnsupportedRequest { epoch } | Self::Map { epoch } | Self::Trap { epoch } => {
                epoch
            }
        }
    }

    /// Parses a reply.
    ///
    /// # Errors
    /// [`WireError`] for a short payload or an unknown verdict.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawVerdict = prefix(body)?;
        match raw.verdict {
            1 => Ok(Self::UnsupportedRequest { epoch: raw.epoch }),
            2 => Ok(Self::Map { epoch: raw.epoch }),
            3 => Ok(Self::Trap { epoch: raw.epoch }),
            other => Err(WireError::Flags(other)),
        }
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let (verdict, epoch) = match *self {
            Self::UnsupportedRequest { epoch } => (1, epoch),
            Self::Map { epoch } => (2, epoch),
            Self::Trap { epoch } => (3, epoch),
        };
        RawVerdict { verdict, reserved: 0, epoch }.as_bytes().to_vec()
    }
}

/// Asks for the [`RegionState`] of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionStateQuery {
    /// Region index.
    pub region: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawQuery {
    argsz: u32,
    flags: u32,
    region: u32,
    reserved: u32,
}

impl RegionStateQuery {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawQuery = exact(body)?;
        if raw.flags != 0 {
            return Err(WireError::Flags(raw.flags));
        }
        if (raw.argsz as usize) < size_of::<RegionState>() {
            return Err(WireError::ArgumentSize(raw.argsz));
        }
        Ok(Self { region: raw.region })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let argsz = argsz_of::<RegionState>();
        RawQuery { argsz, flags: 0, region: self.region, reserved: 0 }.as_bytes().to_vec()
    }
}

/// Decode, epoch and access counters of one region.
///
/// The counters cover accesses that reached the backend as region reads and writes; accesses to
/// directly mapped memory are not seen by anyone.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RegionState {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`DecodeFlags`] bits.
    pub decode: u32,
    /// Moves with every change of the function's decode or of a BAR address.
    pub epoch: u64,
    /// Reads that the device answered.
    pub reads: u64,
    /// Writes that the device applied.
    pub writes: u64,
    /// Reads completed as Unsupported Request: all ones.
    pub reads_ur: u64,
    /// Writes completed as Unsupported Request: dropped.
    pub writes_dropped: u64,
    /// Memory faults forwarded for this region.
    pub memory_faults: u64,
}

impl RegionState {
    /// Parses a reply.
    ///
    /// # Errors
    /// [`WireError::Length`] when the payload is shorter than the structure.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        prefix(body)
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        Self { argsz: argsz_of::<Self>(), ..*self }.as_bytes().to_vec()
    }

    /// Whether the region's space decodes.
    #[must_use]
    pub fn claimed(&self) -> bool {
        DecodeFlags::from_bits_truncate(self.decode).contains(DecodeFlags::CLAIMED)
    }
}

/// Asks for the function's decode page ([`crate::page::decode`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodePageQuery;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawPageQuery {
    argsz: u32,
    flags: u32,
}

impl DecodePageQuery {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawPageQuery = exact(body)?;
        if raw.flags != 0 {
            return Err(WireError::Flags(raw.flags));
        }
        with_argsz::<RawPageInfo>(raw.argsz)?;
        Ok(Self)
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        RawPageQuery { argsz: argsz_of::<RawPageInfo>(), flags: 0 }.as_bytes().to_vec()
    }
}

/// What there is to map of the file that comes with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodePageInfo {
    /// Bytes from the file's beginning on.
    pub length: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawPageInfo {
    argsz: u32,
    reserved: u32,
    length: u64,
}

impl DecodePageInfo {
    /// Parses a reply.
    ///
    /// # Errors
    /// [`WireError::Length`] when the payload is shorter than the structure.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawPageInfo = prefix(body)?;
        Ok(Self { length: raw.length })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        let argsz = argsz_of::<RawPageInfo>();
        RawPageInfo { argsz, reserved: 0, length: self.length }.as_bytes().to_vec()
    }
}
