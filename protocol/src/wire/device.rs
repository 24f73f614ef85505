use bitflags::bitflags;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::request::argsz_of;

/// Region indices of a PCI function (`VFIO_PCI_*_REGION_INDEX` in `<linux/vfio.h>`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PciRegion {
    /// BAR0 to BAR5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Configuration space.
    Config,
    /// The legacy VGA ranges.
    Vga,
}

impl PciRegion {
    /// How many regions a PCI function reports (`VFIO_PCI_NUM_REGIONS`).
    pub const COUNT: u32 = 9;

    /// The region with this index.
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        match index {
            6 => Some(Self::Rom),
            7 => Some(Self::Config),
            8 => Some(Self::Vga),
            bar => u8::try_from(bar).ok().filter(|bar| *bar < 6).map(Self::Bar),
        }
    }

    /// The index on the wire.
    #[must_use]
    pub fn index(self) -> u32 {
        match self {
            Self::Bar(bar) => u32::from(bar),
            Self::Rom => 6,
            Self::Config => 7,
            Self::Vga => 8,
        }
    }
}

/// Interrupt indices of a PCI function (`VFIO_PCI_*_IRQ_INDEX` in `<linux/vfio.h>`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PciIrq {
    /// The INTx pin.
    Intx,
    /// MSI vectors.
    Msi,
    /// MSI-X vectors.
    Msix,
    /// Uncorrected errors.
    Error,
    /// A request to give the device back.
    Request,
}

impl PciIrq {
    /// How many interrupt indices a PCI function reports (`VFIO_PCI_NUM_IRQS`).
    pub const COUNT: u32 = 5;

    /// The interrupt type with this index.
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        Some(match index {
            0 => Self::Intx,
            1 => Self::Msi,
            2 => Self::Msix,
            3 => Self::Error,
            4 => Self::Request,
            _ => return None,
        })
    }

    /// The index on the wire.
    #[must_use]
    pub fn index(self) -> u32 {
        self as u32
    }
}

bitflags! {
    /// What a device is ("VFIO_USER_DEVICE_GET_INFO").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// It supports VFIO_USER_DEVICE_RESET.
        const RESET = 1 << 0;
        /// It is a PCI function.
        const PCI = 1 << 1;
    }

    /// What can be done with a region ("VFIO_USER_DEVICE_GET_REGION_INFO").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// It can be read.
        const READ = 1 << 0;
        /// It can be written.
        const WRITE = 1 << 1;
        /// It can be mapped; a file descriptor travels with the reply.
        const MMAP = 1 << 2;
        /// Capabilities follow the fixed part.
        const CAPS = 1 << 3;
    }

    /// How an interrupt type behaves ("VFIO_USER_DEVICE_GET_IRQ_INFO").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqInfoFlags: u32 {
        /// It signals an eventfd.
        const EVENTFD = 1 << 0;
        /// It can be masked and unmasked by the client.
        const MASKABLE = 1 << 1;
        /// It masks itself when it fires; the client unmasks it.
        const AUTOMASKED = 1 << 2;
        /// Vectors can't be added to an enabled set.
        const NORESIZE = 1 << 3;
    }
}

/// The answer to "VFIO_USER_DEVICE_GET_INFO".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What the device is.
    pub flags: DeviceFlags,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of interrupt types.
    pub num_irqs: u32,
}

/// `argsz flags a b`: the shape that device info, irq info and the info requests share.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) first: u32,
    pub(super) second: u32,
}

impl DeviceInfo {
    /// Parses a reply. Unknown flags are dropped: they describe what this side can't use.
    ///
    /// # Errors
    /// [`WireError::Length`] when the payload is shorter than the structure.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawInfo = prefix(body)?;
        let flags = DeviceFlags::from_bits_truncate(raw.flags);
        Ok(Self { flags, num_regions: raw.first, num_irqs: raw.second })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        RawInfo {
            argsz: argsz_of::<RawInfo>(),
            flags: self.flags.bits(),
            first: self.num_regions,
            second: self.num_irqs,
        }
        .as_bytes()
        .to_vec()
    }
}

/// The answer to "VFIO_USER_DEVICE_GET_IRQ_INFO".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// How the type behaves.
    pub flags: IrqInfoFlags,
    /// Interrupt index, as asked.
    pub index: u32,
    /// Number of vectors; 0 when the function has none of this type.
    pub count: u32,
}

impl IrqInfo {
    /// Parses a reply.
    ///
    /// # Errors
    /// [`WireError::Length`] when the payload is shorter than the structure.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawInfo = prefix(body)?;
        let flags = IrqInfoFlags::from_bits_truncate(raw.flags);
        Ok(Self { flags, index: raw.first, count: raw.second })
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        RawInfo {
            argsz: argsz_of::<RawInfo>(),
            flags: self.flags.bits(),
            first: self.index,
            second: self.count,
        }
        .as_bytes()
        .to_vec()
    }
}

/// A part of a region that may be mapped (`struct vfio_region_sparse_mmap_area`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseArea {
    /// Offset from the start of the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The answer to "VFIO_USER_DEVICE_GET_REGION_INFO".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// What can be done with the region. `CAPS` is derived from `sparse`.
    pub flags: RegionFlags,
    /// Region index, as asked.
    pub index: u32,
    /// Length in bytes; 0 when the function has no such region.
    pub size: u64,
    /// Offset of the region in the file descriptor to map.
    pub file_offset: u64,
    /// The parts that may be mapped, when not the whole region.
    pub sparse: Vec<SparseArea>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawSparseHeader {
    id: u16,
    version: u16,
    next: u32,
    areas: u32,
    reserved: u32,
}

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`
const CAP_SPARSE_MMAP: u16 = 1;

impl RegionInfo {
    /// Size of the fixed part, in bytes: the least `argsz` that a request may have.
    pub const FIXED_SIZE: u32 = argsz_of::<RawRegionInfo>();

    /// Parses a reply. Returns the `argsz` that a complete answer needs beside what could be read:
    /// when it is larger than the payload, the capabilities are missing and the request is to be
    /// repeated with that `argsz`.
    ///
    /// # Errors
    /// [`WireError`] when a length or a capability offset points outside of the payload.
    pub fn parse(body: &[u8]) -> Result<(Self, u32), WireError> {
        let raw: RawRegionInfo = prefix(body)?;
        let flags = RegionFlags::from_bits_truncate(raw.flags);
        let complete = raw.argsz as usize <= body.len();
        let sparse = if flags.contains(RegionFlags::CAPS) && complete {
            parse_sparse(body, raw.cap_offset as usize)?
        } else {
            Vec::new()
        };
        let info =
            Self { flags, index: raw.index, size: raw.size, file_offset: raw.offset, sparse };
        Ok((info, raw.argsz))
    }

    /// The payload's bytes, at most `argsz` of them: an answer that does not fit is cut to its fixed
    /// part, whose `argsz` field tells what the whole needs ("Message sizes").
    #[must_use]
    pub fn to_bytes(&self, argsz: u32) -> Vec<u8> {
        let mut flags = self.flags - RegionFlags::CAPS;
        let mut whole = RawRegionInfo::new_zeroed();
        let mut caps = Vec::new();
        if !self.sparse.is_empty() {
            flags |= RegionFlags::CAPS;
            whole.cap_offset = Self::FIXED_SIZE;
            caps = sparse_bytes(&self.sparse);
        }
        let needed = size_of::<RawRegionInfo>() + caps.len();
        whole.argsz = u32::try_from(needed).expect("a region has few sparse areas");
        whole.index = self.index;
        whole.size = self.size;
        whole.offset = self.file_offset;
        if argsz < whole.argsz {
            whole.cap_offset = 0;
            caps.clear();
        }
        whole.flags = flags.bits();
        let mut bytes = whole.as_bytes().to_vec();
        bytes.extend_from_slice(&caps);
        bytes
    }
}

fn sparse_bytes(areas: &[SparseArea]) -> Vec<u8> {
    let header = RawSparseHeader {
        id: CAP_SPARSE_MMAP,
        version: 1,
        next: 0,
        areas: u32::try_from(areas.len()).expect("a region has few sparse areas"),
        reserved: 0,
    };
    let mut bytes = header.as_bytes().to_vec();
    for area in areas {
        bytes.extend_from_slice(&area.offset.to_ne_bytes());
        bytes.extend_from_slice(&area.size.to_ne_bytes());
    }
    bytes
}

/// Walks the capability chain. Each step must move forward, so a chain that loops ends.
fn parse_sparse(body: &[u8], mut offset: usize) -> Result<Vec<SparseArea>, WireError> {
    let short = |expected: usize| WireError::Length { expected, actual: body.len() };
    while offset != 0 {
        let cap = body.get(offset..).ok_or_else(|| short(offset))?;
        let header: RawSparseHeader = prefix(cap)?;
        if header.id == CAP_SPARSE_MMAP {
            let list = &cap[size_of::<RawSparseHeader>()..];
            let count = header.areas as usize;
            let needed = count.checked_mul(16).ok_or_else(|| short(usize::MAX))?;
            let list = list.get(..needed).ok_or_else(|| short(offset.saturating_add(needed)))?;
            let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
            return Ok(list
                .chunks_exact(16)
                .map(|area| SparseArea { offset: word(&area[..8]), size: word(&area[8..]) })
                .collect());
        }
        let next = header.next as usize;
        if next != 0 && next <= offset {
            return Err(WireError::Flags(header.next));
        }
        offset = next;
    }
    Ok(Vec::new())
}

/// A structure at the start of a reply that may be longer than it.
pub(super) fn prefix<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, WireError> {
    T::read_from_prefix(body)
        .map(|(value, _)| value)
        .map_err(|_| WireError::Length { expected: size_of::<T>(), actual: body.len() })
}
