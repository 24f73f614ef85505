//! Requests of the driver (5.2.6), read once from guest memory.

use vm_memory::{GuestAddress, GuestMemory};

use super::config::{MAX_DISCARD, MAX_SEGMENTS, MAX_WRITE_ZEROES, SECTOR, feature};
use crate::devices::virtio::{Buffers, Chain};

/// A request: what it wants, or why it gets nothing, and where that is told.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) answer: Answer,
    pub(super) command: Result<Command, Status>,
}

/// The part of a request that the device writes to when it is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// The last byte that may be written, whatever the layout (2.7.4.3).
    pub(super) status: GuestAddress,
    /// Bytes that may be written before it.
    pub(super) room: u64,
}

/// What a request wants. Addresses in the image and lengths are in bytes and lie in the disk.
#[derive(Debug)]
pub(super) enum Command {
    Read { at: u64, into: Pieces },
    Write { at: u64, from: Pieces },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId { into: Pieces },
}

/// Buffers in guest memory, in order. None is empty.
pub(super) type Pieces = Vec<(GuestAddress, usize)>;

/// A range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) at: u64,
    pub(super) len: u64,
    /// Whether its space may be given back.
    pub(super) unmap: bool,
}

/// The status of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request is measured against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    /// In bytes.
    pub(super) size: u64,
    /// In bytes.
    pub(super) block_size: u64,
    pub(super) read_only: bool,
    /// The negotiated features.
    pub(super) features: u64,
}

/// Types of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Length of a request's header in bytes: type, reserved, sector.
const HEADER: usize = 16;
/// Length of a segment of a discard or write-zeroes in bytes: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// The most pieces of a request: no queue has more descriptors, so no driver has use for more
/// (2.7.5.3.1), and this bounds what requests under way cost.
const MAX_PIECES: usize = 1024;
/// The flag `unmap` of a segment.
const UNMAP: u32 = 1;

impl Request {
    /// Reads the header and, if there are any, the segments behind it. `None` when there is no byte
    /// for the status.
    pub(super) fn parse<M: GuestMemory>(chain: &Chain, memory: &M, disk: &Disk) -> Option<Self> {
        let room = chain.writable.len().checked_sub(1)?;
        let (status, _) = chain.writable.pieces(room, 1).next()?;
        let answer = Answer { status, room };
        Some(Self { answer, command: disk.command(chain, memory, room) })
    }
}

impl Command {
    /// The end of what it accesses, in bytes.
    pub(super) fn end(&self) -> u64 {
        match self {
            Self::Read { at, .. } | Self::Write { at, .. } => *at + self.bytes(),
            Self::Discard(ranges) | Self::WriteZeroes(ranges) => {
                ranges.iter().map(|range| range.at + range.len).max().unwrap_or(0)
            }
            Self::Flush | Self::GetId { .. } => 0,
        }
    }

    /// Bytes that it may move, for a limit of them.
    pub(super) fn bytes(&self) -> u64 {
        let total = |pieces: &Pieces| pieces.iter().map(|(_, len)| *len as u64).sum();
        match self {
            Self::Read { into: pieces, .. } | Self::Write { from: pieces, .. } => total(pieces),
            Self::WriteZeroes(ranges) => ranges.iter().map(|range| range.len).sum(),
            Self::Flush | Self::Discard(_) | Self::GetId { .. } => 0,
        }
    }
}

impl Disk {
    fn command<M: GuestMemory>(
        &self,
        chain: &Chain,
        memory: &M,
        room: u64,
    ) -> Result<Command, Status> {
        let mut header = [0; HEADER];
        chain.readable.read(memory, 0, &mut header).map_err(|_| Status::IoError)?;
        let sector = le64(&header[8..]);
        let data = chain.readable.len() - HEADER as u64;
        match le32(&header) {
            kind::IN => {
                let at = self.locate(sector, room)?;
                Ok(Command::Read { at, into: pieces(&chain.writable, 0, room)? })
            }
            kind::OUT => {
                self.check_writable()?;
                let at = self.locate(sector, data)?;
                Ok(Command::Write { at, from: pieces(&chain.readable, HEADER as u64, data)? })
            }
            kind::FLUSH => Ok(Command::Flush),
            kind::GET_ID => Ok(Command::GetId { into: pieces(&chain.writable, 0, room)? }),
            kind::DISCARD => {
                self.check_writable()?;
                let rules = Segments { feature: feature::DISCARD, most: MAX_DISCARD, flags: 0 };
                Ok(Command::Discard(self.ranges(&chain.readable, memory, &rules)?))
            }
            kind::WRITE_ZEROES => {
                self.check_writable()?;
                let (feature, most) = (feature::WRITE_ZEROES, MAX_WRITE_ZEROES);
                let rules = Segments { feature, most, flags: UNMAP };
                Ok(Command::WriteZeroes(self.ranges(&chain.readable, memory, &rules)?))
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    /// The address of `len` bytes from a sector on, if they are whole blocks of the disk.
    fn locate(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let at = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = at.checked_add(len).ok_or(Status::IoError)?;
        let whole = at.is_multiple_of(self.block_size) && len.is_multiple_of(self.block_size);
        if whole && end <= self.size { Ok(at) } else { Err(Status::IoError) }
    }

    fn ranges<M: GuestMemory>(
        &self,
        readable: &Buffers,
        memory: &M,
        rules: &Segments,
    ) -> Result<Vec<Range>, Status> {
        if self.features & rules.feature == 0 {
            return Err(Status::Unsupported);
        }
        let len = usize::try_from(readable.len()).map_err(|_| Status::IoError)? - HEADER;
        let most = MAX_SEGMENTS as usize * SEGMENT;
        if len == 0 || !len.is_multiple_of(SEGMENT) || len > most {
            return Err(Status::IoError);
        }
        let mut segments = vec![0; len];
        readable.read(memory, HEADER as u64, &mut segments).map_err(|_| Status::IoError)?;
        let segments = || segments.chunks_exact(SEGMENT);
        // "MUST set the status byte to VIRTIO_BLK_S_UNSUPP ... if any unknown flag is set" (5.2.6.2)
        if segments().any(|segment| le32(&segment[12..]) & !rules.flags != 0) {
            return Err(Status::Unsupported);
        }
        // Space can be given back only if the operator allows it.
        let may_unmap = self.features & feature::DISCARD != 0;
        let range = |segment: &[u8]| {
            let sectors = le32(&segment[8..]);
            if sectors > rules.most {
                return Err(Status::IoError);
            }
            let len = u64::from(sectors) * SECTOR;
            let at = self.locate(le64(segment), len)?;
            Ok(Range { at, len, unmap: may_unmap && le32(&segment[12..]) & UNMAP != 0 })
        };
        segments().map(range).collect()
    }
}

/// What holds for the segments of a request.
struct Segments {
    /// The feature that allows the request.
    feature: u64,
    /// The most sectors of one.
    most: u32,
    /// The flags that it may have.
    flags: u32,
}

fn pieces(buffers: &Buffers, offset: u64, len: u64) -> Result<Pieces, Status> {
    let pieces: Pieces = buffers.pieces(offset, len).take(MAX_PIECES + 1).collect();
    if pieces.len() > MAX_PIECES { Err(Status::IoError) } else { Ok(pieces) }
}

/// The first bytes, which are there.
fn le32(bytes: &[u8]) -> u32 {
    let [a, b, c, d, ..] = *bytes else { return 0 };
    u32::from_le_bytes([a, b, c, d])
}

fn le64(bytes: &[u8]) -> u64 {
    u64::from(le32(bytes)) | u64::from(le32(bytes.get(4..).unwrap_or_default())) << 32
}
