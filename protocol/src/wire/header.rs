use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::HeaderError;
use super::limits::{HEADER_SIZE, HEADER_SIZE_U32};

/// Chosen by the sender of a command and echoed in its reply ("Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MessageId(pub u16);

/// What kind of message a header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageKind {
    /// A request; with `no_reply` the receiver must not answer, not even with an error.
    Command {
        /// The *No_reply* bit.
        no_reply: bool,
    },
    /// The answer to the command with the same id.
    Reply {
        /// The errno of a failed command. An error without a number arrives as `EIO`.
        error: Option<Errno>,
    },
}

/// A message header, 16 bytes on the wire ("Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Message ID.
    pub id: MessageId,
    /// The command number as received: possibly one that is not known.
    pub command: u16,
    /// Bytes of payload behind the header.
    pub body_size: u32,
    /// Command or reply, and its flags.
    pub kind: MessageKind,
}

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    id: u16,
    command: u16,
    size: u32,
    flags: u32,
    error: u32,
}

impl Header {
    /// Parses a header. The id is returned even with an error, for the farewell reply.
    ///
    /// # Errors
    /// [`HeaderError`] when the size or the type can't be believed: the stream has lost its framing.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Self, (MessageId, HeaderError)> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let id = MessageId(raw.id);
        let Some(body_size) = raw.size.checked_sub(HEADER_SIZE_U32) else {
            return Err((id, HeaderError::Size(raw.size)));
        };
        let kind = match raw.flags & TYPE_MASK {
            TYPE_COMMAND => MessageKind::Command { no_reply: raw.flags & FLAG_NO_REPLY != 0 },
            TYPE_REPLY if raw.flags & FLAG_ERROR != 0 => {
                MessageKind::Reply { error: Some(errno_from_wire(raw.error)) }
            }
            TYPE_REPLY => MessageKind::Reply { error: None },
            other => return Err((id, HeaderError::Type(other))),
        };
        Ok(Self { id, command: raw.command, body_size, kind })
    }

    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let (flags, error) = match self.kind {
            MessageKind::Command { no_reply: false } => (TYPE_COMMAND, 0),
            MessageKind::Command { no_reply: true } => (TYPE_COMMAND | FLAG_NO_REPLY, 0),
            MessageKind::Reply { error: None } => (TYPE_REPLY, 0),
            MessageKind::Reply { error: Some(errno) } => {
                (TYPE_REPLY | FLAG_ERROR, errno.raw_os_error().unsigned_abs())
            }
        };
        let size = self.body_size + HEADER_SIZE_U32;
        let raw = RawHeader { id: self.id.0, command: self.command, size, flags, error };
        zerocopy::transmute!(raw)
    }
}

/// The protocol lets a failed reply carry 0 or garbage as its errno; it must still be an error.
fn errno_from_wire(raw: u32) -> Errno {
    match i32::try_from(raw) {
        Ok(code @ 1..=4095) => Errno::from_raw_os_error(code),
        _ => Errno::IO,
    }
}
