//! Messages as bytes.

pub(crate) const HEADER: usize = 16;
/// 1 MiB of data, and room for what is in front of it.
pub(crate) const MAX_MESSAGE: u32 = (1 << 20) + 4096;
pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const DMA_READ: u16 = 11;
pub(crate) const DMA_WRITE: u16 = 12;
pub(crate) const DEVICE_FEATURE: u16 = 16;
pub(crate) const MIG_DATA_READ: u16 = 17;
pub(crate) const MIG_DATA_WRITE: u16 = 18;
const TYPE: u32 = 0xf;
const COMMAND: u32 = 0;
pub(crate) const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
pub(crate) const ERROR: u32 = 1 << 5;

/// A message that was read.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: u16,
    pub(crate) command: u16,
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) error: u32,
}

/// A command whose header claims a body of `length` bytes, whatever it has.
pub(crate) fn message(id: u16, command: u16, flags: u8, length: u16, body: &[u8]) -> Vec<u8> {
    let size = 16 + u32::from(length);
    Header { id, command, size, flags: flags.into(), error: 0 }.with(body)
}

/// A command of any length.
pub(crate) fn command(id: u16, command: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(HEADER + body.len()).expect("far below the limit");
    Header { id, command, size, flags: COMMAND, error: 0 }.with(body)
}

/// A VERSION with every extension.
pub(crate) fn version(with_twin: bool, like_qemu: bool) -> Vec<u8> {
    let twin = if with_twin { r#""twin_socket":{"supported":true},"# } else { "" };
    let (minor, rest) = if like_qemu {
        (0, r#""migration":{"pgsize":4096,"max_bitmap_size":65536},"pgsizes":4096"#)
    } else {
        (
            2,
            r#""migration":{"pgsize":4096},"barkeep":{"memory_fault":true,"region_state":true,"decode_page":true}"#,
        )
    };
    let json =
        format!(r#"{{"capabilities":{{"max_msg_fds":16,"write_multiple":true,{twin}{rest}}}}}"#);
    command(0, VERSION, &[&[0, 0, minor, 0], json.as_bytes(), &[0]].concat())
}

impl Header {
    fn of(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Self {
            id: u16_at(0),
            command: u16_at(2),
            size: u32_at(4),
            flags: u32_at(8),
            error: u32_at(12),
        }
    }

    /// The header's bytes, and a body.
    pub(crate) fn with(&self, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(self.id.to_ne_bytes());
        bytes.extend(self.command.to_ne_bytes());
        bytes.extend(self.size.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(self.error.to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    /// A size and a type that can be.
    pub(crate) fn is_believed(&self) -> bool {
        self.size as usize >= HEADER && matches!(self.flags & TYPE, COMMAND | REPLY)
    }

    pub(crate) fn is_command(&self) -> bool {
        self.flags & TYPE == COMMAND
    }

    pub(crate) fn wants_no_reply(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    /// Whether a reply is an error; one of a server has no other flags.
    pub(crate) fn is_error(&self) -> bool {
        assert!(matches!(self.flags & !ERROR, REPLY), "{self:?}");
        self.flags & ERROR != 0
    }
}

/// Messages out of a stream of bytes.
#[derive(Default)]
pub(crate) struct Stream {
    header: Vec<u8>,
    body: Vec<u8>,
}

impl Stream {
    /// Takes the next message that is complete.
    pub(crate) fn next(&mut self, bytes: &mut &[u8]) -> Option<Message> {
        take(bytes, &mut self.header, HEADER);
        if self.header.len() < HEADER {
            return None;
        }
        let header = Header::of(&self.header);
        if header.is_believed() {
            let length = header.size as usize - HEADER;
            take(bytes, &mut self.body, length);
            if self.body.len() < length {
                return None;
            }
        } else {
            *bytes = &[];
        }
        self.header.clear();
        Some(Message { header, body: std::mem::take(&mut self.body) })
    }

    pub(crate) fn is_at_boundary(&self) -> bool {
        self.header.is_empty()
    }
}

/// Moves bytes until there are `length`.
fn take(from: &mut &[u8], to: &mut Vec<u8>, length: usize) {
    let (bytes, rest) = from.split_at(from.len().min(length - to.len()));
    to.extend_from_slice(bytes);
    *from = rest;
}
