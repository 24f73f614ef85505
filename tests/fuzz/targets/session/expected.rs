//! What must come back, by a second reading of the bytes that were sent.

use std::collections::VecDeque;

const HEADER: usize = 16;
/// 1 MiB of data, and room for what is in front of it.
const MAX_MESSAGE: u32 = (1 << 20) + 4096;
const VERSION: u16 = 1;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const TYPE: u32 = 0xf;
const COMMAND: u32 = 0;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A message whose header claims a body of `length` bytes, whatever it has.
pub(crate) fn message(id: u16, command: u16, flags: u8, length: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend((16 + u32::from(length)).to_ne_bytes());
    bytes.extend(u32::from(flags).to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

/// A VERSION with every extension.
pub(crate) fn version() -> Vec<u8> {
    let json = br#"{"capabilities":{"max_msg_fds":16,"barkeep":{"memory_fault":true,"region_state":true}}}"#;
    let body = [&[0, 0, 2, 0], json.as_slice(), &[0]].concat();
    let length = u16::try_from(body.len()).expect("short");
    message(0, VERSION, 0, length, &body)
}

#[derive(Default)]
pub(crate) struct Expected {
    sent: Stream,
    received: Stream,
    /// The commands that wait for their replies, and the farewell if there will be one.
    owed: VecDeque<Header>,
    greeted: bool,
    answered: bool,
    /// A message was sent after which the session ends; nothing behind it is looked at.
    must_end: bool,
    /// It may have ended already, or the client has left.
    may_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    id: u16,
    command: u16,
    size: u32,
    flags: u32,
    error: u32,
}

/// Headers out of a stream of messages.
#[derive(Default)]
struct Stream {
    header: Vec<u8>,
    body: usize,
}

impl Stream {
    /// Takes the header of the next message that is complete.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Header> {
        if self.header.len() < HEADER {
            let (start, rest) = bytes.split_at(bytes.len().min(HEADER - self.header.len()));
            self.header.extend_from_slice(start);
            *bytes = rest;
            if self.header.len() < HEADER {
                return None;
            }
            self.body = (Header::of(&self.header).size as usize).saturating_sub(HEADER);
        }
        let header = Header::of(&self.header);
        let skipped = if header.is_believed() { self.body.min(bytes.len()) } else { self.body };
        *bytes = bytes.get(skipped..).unwrap_or_default();
        self.body -= skipped;
        if self.body > 0 {
            return None;
        }
        self.header.clear();
        Some(header)
    }

    fn is_at_boundary(&self) -> bool {
        self.header.is_empty()
    }
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

    /// A size and a type that can be.
    fn is_believed(&self) -> bool {
        self.size as usize >= HEADER && matches!(self.flags & TYPE, COMMAND | REPLY)
    }
}

impl Expected {
    pub(crate) fn sent(&mut self, mut bytes: &[u8]) {
        while !self.must_end
            && let Some(header) = self.sent.next(&mut bytes)
        {
            if header.is_believed() && header.flags & TYPE == COMMAND {
                if header.flags & NO_REPLY == 0 {
                    self.owed.push_back(header);
                }
                if !self.greeted {
                    self.greeted = true;
                    self.must_end = header.command != VERSION;
                    // Only the reply says whether a handshake has failed.
                    self.may_end = header.flags & NO_REPLY != 0;
                }
            } else {
                self.owed.push_back(header);
                self.must_end = true;
            }
        }
    }

    pub(crate) fn received(&mut self, mut bytes: &[u8]) {
        while let Some(header) = self.received.next(&mut bytes) {
            assert!((HEADER as u32..=MAX_MESSAGE).contains(&header.size), "{header:?}");
            if header.flags & TYPE == COMMAND {
                // The server's own. It is not answered, which the server has to live with.
                assert!(matches!(header.command, DMA_READ | DMA_WRITE), "{header:?}");
                continue;
            }
            let asked = self.owed.pop_front();
            let asked = asked.unwrap_or_else(|| panic!("a reply to nothing: {header:?}"));
            assert_eq!((header.id, header.command), (asked.id, asked.command));
            match header.flags {
                REPLY => assert_eq!(header.error, 0, "{header:?}"),
                flags => {
                    assert_eq!(flags, REPLY | ERROR, "{header:?}");
                    assert!((1..=4095).contains(&header.error), "{header:?}");
                    assert_eq!(header.size as usize, HEADER, "an error has no payload");
                }
            }
            let first = !std::mem::replace(&mut self.answered, true);
            self.may_end |= first && asked.command == VERSION && header.flags & ERROR != 0;
        }
    }

    /// Every complete message has been answered.
    pub(crate) fn nothing_is_owed(&self) {
        assert!(self.received.is_at_boundary(), "half a reply");
        assert!(self.owed.is_empty(), "owed: {:?}", self.owed);
        assert!(!self.must_end, "the session should have ended");
    }

    /// The client is about to hang up.
    pub(crate) fn leaves(&mut self) {
        self.may_end = true;
    }

    /// The session has ended: there must be a reason, and all that came before it is answered.
    pub(crate) fn ended(&self) {
        assert!(self.must_end || self.may_end, "the session ended for no reason");
        assert!(self.received.is_at_boundary(), "half a reply");
        assert!(self.may_end || self.owed.is_empty(), "owed: {:?}", self.owed);
    }
}
