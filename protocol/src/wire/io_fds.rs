use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::device::{RawInfo, prefix};
use super::request::{argsz_of, with_argsz};

/// Asks for the file descriptors that stand for parts of a region
/// ("VFIO_USER_DEVICE_GET_REGION_IO_FDS").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFdsQuery {
    /// Region index.
    pub region: u32,
    /// Largest reply payload that the asker takes, in bytes.
    pub argsz: u32,
}

/// How the entries of the answer lie in it. The specification asks for 40 bytes each;
/// libvfio-user put an 8-byte offset for its shadow memory before the last field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFdLayout {
    /// 40 bytes, datamatch at 32.
    Spec,
    /// 48 bytes, datamatch at 40; an ioregionfd's user data stays at 32.
    Libvfio,
}

/// A part of a region and the file descriptor that stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFd {
    /// Offset from the start of the region, in bytes.
    pub offset: u64,
    /// Length in bytes; 0 when the size of an access does not matter.
    pub size: u64,
    /// Which of the reply's file descriptors; `None` when libvfio-user's application gave none.
    pub fd_index: Option<u32>,
    /// What to do with it.
    pub kind: IoFdKind,
}

/// How a file descriptor stands for a part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFdKind {
    /// An eventfd for `KVM_IOEVENTFD`.
    Eventfd {
        /// Only writes of this value are meant (`KVM_IOEVENTFD_FLAG_DATAMATCH`).
        datamatch: Option<u64>,
        /// The region is of I/O ports (`KVM_IOEVENTFD_FLAG_PIO`).
        pio: bool,
    },
    /// A socket for `KVM_SET_IOREGION`.
    IoRegion {
        /// How it is used.
        flags: IoRegionFlags,
        /// Comes with every message on the socket.
        user_data: u64,
    },
    /// Something that this side can't use, such as libvfio-user's shadow ioeventfds (type 2).
    Other(u32),
}

bitflags! {
    /// Flags of an ioregionfd.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoRegionFlags: u32 {
        /// The region is of I/O ports.
        const PIO = 1 << 0;
        /// Writes are not answered.
        const POSTED_WRITES = 1 << 1;
    }
}

/// The answer to an [`IoFdsQuery`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoFds {
    /// Region index, as asked.
    pub region: u32,
    /// The parts of the region that have a file descriptor. Several may share one.
    pub entries: Vec<IoFd>,
}

/// What a client makes of the answer to its [`IoFdsQuery`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoFdsReply {
    /// The whole answer.
    Complete(IoFds),
    /// Ask again, with this `argsz`.
    TooSmall {
        /// What the whole answer needs, in bytes.
        argsz: u32,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawIoFd {
    offset: u64,
    size: u64,
    fd_index: u32,
    kind: u32,
    flags: u32,
    padding: u32,
    value: u64,
}

const TYPE_EVENTFD: u32 = 0;
const TYPE_IOREGION: u32 = 1;
const EVENTFD_DATAMATCH: u32 = 1 << 0;
const EVENTFD_PIO: u32 = 1 << 1;
const NO_FD: u32 = u32::MAX;

impl IoFdsQuery {
    /// Size of the answer without entries, in bytes: the least `argsz` that a query may have.
    pub const FIXED_SIZE: u32 = argsz_of::<RawInfo>();

    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawInfo = prefix(body)?;
        with_argsz::<RawInfo>(raw.argsz)?;
        if raw.flags != 0 {
            return Err(WireError::Flags(raw.flags));
        }
        if raw.second != 0 {
            return Err(WireError::Count(raw.second.into()));
        }
        Ok(Self { region: raw.first, argsz: raw.argsz })
    }

    /// The layout that the asker expects.
    ///
    /// Nothing in the protocol says it, so it is taken from `argsz`: room for a whole number of
    /// 48-byte entries that is not one of 40-byte entries too is a client made with libvfio-user's
    /// header. Everything else, also a query without room for entries, is the specification's. Where
    /// both fit (room for 6 or a multiple of 6 entries of 40 bytes) it is the specification's.
    #[must_use]
    pub fn layout(&self) -> IoFdLayout {
        let room = self.argsz.saturating_sub(Self::FIXED_SIZE);
        let whole = |layout: IoFdLayout| room.is_multiple_of(layout.entry_size());
        if whole(IoFdLayout::Libvfio) && !whole(IoFdLayout::Spec) {
            IoFdLayout::Libvfio
        } else {
            IoFdLayout::Spec
        }
    }

    /// Appends the query's payload.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let raw = RawInfo { argsz: self.argsz, flags: 0, first: self.region, second: 0 };
        out.extend_from_slice(raw.as_bytes());
    }
}

impl IoFdLayout {
    /// Bytes of one entry.
    #[must_use]
    pub const fn entry_size(self) -> u32 {
        match self {
            Self::Spec => 40,
            Self::Libvfio => 48,
        }
    }
}

impl IoFds {
    /// Appends the payload of the answer to `query`, in the layout that it expects. Returns whether
    /// it is whole: if it does not fit into the query's `argsz`, only the fixed part is written,
    /// whose `argsz` tells what the whole needs, and no file descriptors belong to it.
    pub fn write_to(&self, query: &IoFdsQuery, out: &mut Vec<u8>) -> bool {
        let layout = query.layout();
        let count = u32::try_from(self.entries.len()).expect("a region has few of them");
        let argsz = IoFdsQuery::FIXED_SIZE + count * layout.entry_size();
        let raw = RawInfo { argsz, flags: 0, first: self.region, second: count };
        out.extend_from_slice(raw.as_bytes());
        let whole = argsz <= query.argsz;
        if whole {
            self.entries.iter().for_each(|entry| entry.write_to(layout, out));
        }
        whole
    }

    /// Parses the reply to `query` that came with `fds` file descriptors. The layout follows from the
    /// number of entries and the length of the payload.
    ///
    /// # Errors
    /// [`WireError`] when the payload has the length of neither layout, speaks of another region, or
    /// names a file descriptor that did not come with it. Offsets and sizes are the caller's to check.
    pub fn parse_reply(
        query: &IoFdsQuery,
        body: &[u8],
        fds: usize,
    ) -> Result<IoFdsReply, WireError> {
        let raw: RawInfo = prefix(body)?;
        if raw.first != query.region {
            return Err(WireError::Mismatch);
        }
        let list = &body[size_of::<RawInfo>()..];
        if list.is_empty() && raw.second > 0 {
            if raw.argsz <= query.argsz {
                return Err(WireError::ArgumentSize(raw.argsz));
            }
            return Ok(IoFdsReply::TooSmall { argsz: raw.argsz });
        }
        let holds = |layout: &IoFdLayout| {
            u64::from(raw.second) * u64::from(layout.entry_size()) == list.len() as u64
        };
        let layout = [IoFdLayout::Spec, IoFdLayout::Libvfio]
            .into_iter()
            .find(holds)
            .ok_or(WireError::Count(raw.second.into()))?;
        let entries = list
            .chunks_exact(layout.entry_size() as usize)
            .map(|entry| IoFd::parse(layout, entry, fds))
            .collect::<Result<_, _>>()?;
        Ok(IoFdsReply::Complete(Self { region: raw.first, entries }))
    }
}

impl IoFd {
    fn parse(layout: IoFdLayout, bytes: &[u8], fds: usize) -> Result<Self, WireError> {
        let raw: RawIoFd = prefix(bytes)?;
        let fd_index = match raw.fd_index {
            NO_FD => None,
            index if (index as usize) < fds => Some(index),
            index => return Err(WireError::FdIndex(index.into())),
        };
        let kind = match raw.kind {
            TYPE_EVENTFD => {
                if raw.flags & !(EVENTFD_DATAMATCH | EVENTFD_PIO) != 0 {
                    return Err(WireError::Flags(raw.flags));
                }
                let datamatch = match layout {
                    IoFdLayout::Spec => raw.value,
                    IoFdLayout::Libvfio => prefix(&bytes[size_of::<RawIoFd>()..])?,
                };
                IoFdKind::Eventfd {
                    datamatch: (raw.flags & EVENTFD_DATAMATCH != 0).then_some(datamatch),
                    pio: raw.flags & EVENTFD_PIO != 0,
                }
            }
            TYPE_IOREGION => IoFdKind::IoRegion {
                flags: IoRegionFlags::from_bits(raw.flags).ok_or(WireError::Flags(raw.flags))?,
                user_data: raw.value,
            },
            other => IoFdKind::Other(other),
        };
        Ok(Self { offset: raw.offset, size: raw.size, fd_index, kind })
    }

    fn write_to(&self, layout: IoFdLayout, out: &mut Vec<u8>) {
        let (kind, flags, value) = match self.kind {
            IoFdKind::Eventfd { datamatch, pio } => {
                let matching = if datamatch.is_some() { EVENTFD_DATAMATCH } else { 0 };
                let ports = if pio { EVENTFD_PIO } else { 0 };
                (TYPE_EVENTFD, matching | ports, datamatch.unwrap_or(0))
            }
            IoFdKind::IoRegion { flags, user_data } => (TYPE_IOREGION, flags.bits(), user_data),
            IoFdKind::Other(kind) => (kind, 0, 0),
        };
        // The last field of an ioeventfd moves; that of an ioregionfd does not.
        let (at_32, at_40) = match (layout, self.kind) {
            (IoFdLayout::Libvfio, IoFdKind::Eventfd { .. }) => (0, value),
            _ => (value, 0),
        };
        let raw = RawIoFd {
            offset: self.offset,
            size: self.size,
            fd_index: self.fd_index.unwrap_or(NO_FD),
            kind,
            flags,
            padding: 0,
            value: at_32,
        };
        out.extend_from_slice(raw.as_bytes());
        if layout == IoFdLayout::Libvfio {
            out.extend_from_slice(&u64::to_ne_bytes(at_40));
        }
    }
}
