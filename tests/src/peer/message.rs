//! Bytes on the wire, laid out by hand from QEMU's `docs/interop/vfio-user.rst`.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

/// "Commands": the numbers.
pub mod command {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const GET_INFO: u16 = 4;
    pub const GET_REGION_INFO: u16 = 5;
    pub const GET_REGION_IO_FDS: u16 = 6;
    pub const GET_IRQ_INFO: u16 = 7;
    pub const SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;
    pub const DEVICE_FEATURE: u16 = 16;
    pub const MIG_DATA_READ: u16 = 17;
    pub const MIG_DATA_WRITE: u16 = 18;
    pub const MEMORY_FAULT: u16 = 0x8001;
    pub const REGION_STATE: u16 = 0x8002;
    pub const DECODE_PAGE: u16 = 0x8003;
}

/// Flags of a header: type Command.
pub const COMMAND: u32 = 0;
/// Flags of a header: type Reply.
pub const REPLY: u32 = 1;
/// Flags of a header: *No_reply*.
pub const NO_REPLY: u32 = 1 << 4;
/// Flags of a header: *Error*.
pub const ERROR: u32 = 1 << 5;

/// A whole message: header and payload.
#[must_use]
pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).expect("a test's message is small");
    let mut bytes = header(id, command, size, flags);
    bytes.extend_from_slice(body);
    bytes
}

/// A header that claims a message of `size` bytes.
#[must_use]
pub fn header(id: u16, command: u16, size: u32, flags: u32) -> Vec<u8> {
    Payload::new().u16(id).u16(command).u32(size).u32(flags).u32(0).done()
}

/// A payload, field by field, in host byte order.
#[derive(Clone, Debug, Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a field of 2 bytes.
    #[must_use]
    pub fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a field of 4 bytes.
    #[must_use]
    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a field of 8 bytes.
    #[must_use]
    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The bytes.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// A message that arrived.
#[derive(Debug)]
pub struct Reply {
    /// Message ID.
    pub id: u16,
    /// Command.
    pub command: u16,
    /// Flags.
    pub flags: u32,
    /// Error.
    pub error: u32,
    /// The payload.
    pub body: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload of a reply that reports success.
    #[must_use]
    pub fn success(self) -> Vec<u8> {
        assert_eq!((self.flags, self.error), (REPLY, 0), "command {} failed", self.command);
        self.body
    }

    /// Checks that this is an error reply as the specification wants it: the header only.
    pub fn failure(&self, errno: Errno) {
        assert_eq!(self.flags, REPLY | ERROR, "command {} did not fail", self.command);
        assert_eq!(Errno::from_raw_os_error(self.error.cast_signed()), errno);
        assert!(self.body.is_empty(), "\"the reply message must only include the reply header\"");
        assert!(self.fds.is_empty());
    }
}

/// The 2 bytes at `offset` of a payload.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_ne_bytes(bytes[offset..offset + 2].try_into().expect("2 bytes"))
}

/// The 4 bytes at `offset` of a payload.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

/// The 8 bytes at `offset` of a payload.
#[must_use]
pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}
