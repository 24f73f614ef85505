//! What comes from the server: which bytes are the VMM's, and which are answers to us.

use std::os::fd::OwnedFd;

use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{Header, MessageId, MessageKind};

/// As long as an answer to us may be, in bytes. Nothing that we ask has a longer one.
const LONGEST: u64 = 64 << 10;

/// Where in the server's stream the next byte is that nobody has read.
///
/// Nothing of the VMM's is ever taken out of the socket but by the VMM's own calls: a socket that
/// has something for the VMM is readable.
#[derive(Debug)]
pub(super) enum Incoming {
    /// In the header of a message, or before it. The VMM has read these bytes of it, so that it is
    /// the VMM's if there are any.
    Header(Vec<u8>),
    /// In a message of the VMM's with so many bytes left.
    Theirs(u64),
    /// In the answer to VERSION, all of which has arrived.
    Welcome(Patched),
    /// In an answer to us.
    Ours(Answer),
    /// This is no stream of messages: all of it is the VMM's.
    Lost,
}

/// An answer of which the VMM gets something else, and not more, than the server has sent.
#[derive(Debug)]
pub(super) struct Patched {
    pub(super) shown: Vec<u8>,
    /// How much of it the VMM has.
    pub(super) at: usize,
    /// Bytes that the server has sent more.
    pub(super) hidden: usize,
}

/// An answer to us, as far as it is here.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) id: MessageId,
    /// Header and payload.
    bytes: Vec<u8>,
    left: u64,
    /// The first descriptor that came with it: no answer has more.
    pub(super) fd: Option<OwnedFd>,
}

/// Whose the next message is, by what of it has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The VMM's, which may read so many bytes of it.
    Theirs(u64),
    /// An answer to us.
    Ours(Header),
    /// The answer to VERSION, of so many bytes.
    Welcome(usize),
    /// Not to be told yet.
    Unclear,
    /// No message.
    Lost,
}

/// Who waits for an answer.
pub(super) trait Expected {
    /// Whether a header is that of an answer to us.
    fn is_ours(&self, header: &Header) -> bool;
    /// Whether a header is that of the answer to the VMM's VERSION, not seen yet.
    fn is_welcome(&self, header: &Header) -> bool;
    /// Whether there is anything that one of these would say yes to.
    fn any(&self) -> bool;
}

impl Default for Incoming {
    fn default() -> Self {
        Self::Header(Vec::new())
    }
}

impl Incoming {
    /// Decides by the bytes that wait in the socket, at most as many as a header has left.
    pub(super) fn decide(&self, waiting: &[u8], expected: &impl Expected) -> Next {
        let Self::Header(read) = self else { return Next::Lost };
        let start = [read, waiting].concat();
        let Some(header) = start.first_chunk() else {
            let theirs = !read.is_empty() || !expected.any();
            return if theirs { Next::Theirs(waiting.len() as u64) } else { Next::Unclear };
        };
        let Ok(header) = Header::parse(header) else { return Next::Lost };
        let size = u64::from(header.body_size) + HEADER_SIZE as u64;
        if read.is_empty() {
            if expected.is_ours(&header) {
                return if size <= LONGEST { Next::Ours(header) } else { Next::Lost };
            }
            if expected.is_welcome(&header) {
                return usize::try_from(size).map_or(Next::Lost, Next::Welcome);
            }
        }
        Next::Theirs(size - read.len() as u64)
    }

    /// The VMM has read `count` bytes, of which the first are `waiting` if it was undecided what they
    /// are. Returns the header if this completes one.
    pub(super) fn given(&mut self, count: usize, waiting: &[u8]) -> Option<Header> {
        match self {
            Self::Header(read) => {
                let of_header = count.min(HEADER_SIZE - read.len()).min(waiting.len());
                read.extend_from_slice(&waiting[..of_header]);
                let header = Header::parse(read.first_chunk()?);
                let behind = (count - of_header) as u64;
                let left = header.map(|header| u64::from(header.body_size).checked_sub(behind));
                *self = match left {
                    Ok(Some(0)) => Self::default(),
                    Ok(Some(left)) => Self::Theirs(left),
                    _ => Self::Lost,
                };
                header.ok()
            }
            Self::Theirs(left) => {
                *self = match left.checked_sub(count as u64) {
                    Some(0) => Self::default(),
                    Some(left) => Self::Theirs(left),
                    None => Self::Lost,
                };
                None
            }
            Self::Welcome(_) | Self::Ours(_) | Self::Lost => None,
        }
    }
}

impl Answer {
    /// The answer with this header, of which nothing has been taken from the socket.
    pub(super) fn new(header: &Header) -> Self {
        let left = u64::from(header.body_size) + HEADER_SIZE as u64;
        Self { id: header.id, bytes: Vec::new(), left, fd: None }
    }

    /// Bytes to be taken from the socket, at most so many at once.
    pub(super) fn wanted(&self, most: usize) -> usize {
        usize::try_from(self.left).map_or(most, |left| left.min(most))
    }

    /// Adds what was taken from the socket, at most what was [`wanted`](Self::wanted).
    pub(super) fn add(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.left = self.left.saturating_sub(bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
        // The others are closed at once: a server may send any number, piece by piece.
        let first = fds.into_iter().next();
        self.fd = self.fd.take().or(first);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.left == 0
    }

    /// What it says, if it says yes.
    pub(super) fn body(&self) -> Option<&[u8]> {
        let (header, body) = self.bytes.split_first_chunk()?;
        let header = Header::parse(header).ok()?;
        let good = header.kind == (MessageKind::Reply { error: None })
            && header.body_size as usize == body.len();
        good.then_some(body)
    }
}
