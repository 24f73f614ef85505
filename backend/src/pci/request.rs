//! Requests to a function that it completes as Unsupported Requests, and what it says of them.

/// A request that no BAR claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnsupportedRequest {
    /// What it wanted.
    pub kind: RequestKind,
    /// First address, of memory or of I/O space.
    pub address: u64,
    /// Length in bytes.
    pub length: usize,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// To read memory.
    MemoryRead,
    /// To write memory.
    MemoryWrite,
    /// To read I/O ports.
    IoRead,
    /// To write I/O ports.
    IoWrite,
}

impl RequestKind {
    /// Whether the request has no completion (PCIe 2.1.1): only a memory write is posted.
    pub const fn is_posted(self) -> bool {
        matches!(self, Self::MemoryWrite)
    }
}

/// An error message to the root complex (PCIe 2.2.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorMessage {
    /// ERR_COR.
    Correctable,
    /// ERR_NONFATAL.
    NonFatal,
    /// ERR_FATAL.
    Fatal,
}

/// The largest payload of a write: Max_Payload_Size is hardwired to 128 bytes, for all of the
/// hierarchy (PCIe 7.5.3.4).
const PAYLOAD_MAX: u64 = 128;
/// No request crosses an address that is a multiple of this (PCIe 2.2.7).
const BOUNDARY: u64 = 4096;

impl UnsupportedRequest {
    /// The header of the transaction layer packet, as the Header Log shows it (PCIe 2.2.7.1 and
    /// 7.8.4.8): the first doubleword of the header first, its first byte in bits 31:24.
    ///
    /// An access that takes several packets on a link shows the first of them. Who asked is not
    /// known here: Requester ID, Tag, Traffic Class and attributes are 0.
    pub(super) fn header(&self) -> [u32; 4] {
        let Self { kind, address, length } = *self;
        let length = (length as u64).min(match kind {
            RequestKind::MemoryRead => BOUNDARY - address % BOUNDARY,
            RequestKind::MemoryWrite => {
                (BOUNDARY - address % BOUNDARY).min(PAYLOAD_MAX - address % 4)
            }
            // An I/O request is one doubleword.
            RequestKind::IoRead | RequestKind::IoWrite => 4 - address % 4,
        });
        let skipped = address % 4;
        let dwords = (skipped + length).div_ceil(4).max(1);
        // Bit n enables byte n of the doubleword (PCIe 2.2.5).
        let from = 0b1111_u32 << skipped & 0b1111;
        let to = 0b1111_u32 >> ((4 - (skipped + length) % 4) % 4);
        let (first, last) = match (length, dwords) {
            (0, _) => (0, 0),
            (_, 1) => (from & to, 0),
            _ => (from, to),
        };

        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        let low = u32::from_le_bytes([a & !0b11, b, c, d]);
        let high = u32::from_le_bytes([e, f, g, h]);
        let wide = high != 0 && !matches!(kind, RequestKind::IoRead | RequestKind::IoWrite);
        let format_and_type = match kind {
            RequestKind::MemoryRead => 0x00,
            RequestKind::MemoryWrite => 0x40,
            RequestKind::IoRead => 0x02,
            RequestKind::IoWrite => 0x42,
        } | if wide { 0x20 } else { 0 };
        // 1024 doublewords are encoded as 0.
        let encoded = u32::try_from(dwords % 1024).expect("below 1024");
        let [third, fourth] = if wide { [high, low] } else { [low, 0] };
        [format_and_type << 24 | encoded, last << 4 | first, third, fourth]
    }
}
