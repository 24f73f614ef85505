//! What must come back, by a second reading of the bytes that were sent.

use std::collections::VecDeque;

use crate::message::{
    DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, HEADER, Header, MAX_MESSAGE, Message, Stream, VERSION,
};

/// Commands of the server that may wait at a time: 16, and the question for the client's layout.
const MAX_COMMANDS: usize = 17;
/// DMA_UNMAP of everything.
const UNMAP_ALL: u32 = 1 << 1;

/// One of the two sockets that a session can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Socket {
    Main,
    Twin,
}

/// A command of the server that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServerCommand {
    pub(crate) socket: Socket,
    pub(crate) id: u16,
    pub(crate) command: u16,
    pub(crate) address: u64,
    pub(crate) count: u64,
    /// The client will not answer it.
    pub(crate) ignored: bool,
}

#[derive(Default)]
pub(crate) struct Expected {
    main: Side,
    twin: Side,
    pub(crate) has_twin: bool,
    greeted: bool,
    answered: bool,
    /// A message was sent after which the session ends; nothing behind it is looked at.
    must_end: bool,
    /// It may have ended already, or the client has left.
    may_end: bool,
    pub(crate) commands: Vec<ServerCommand>,
    /// The right answer to a command, which is about to be sent.
    answering: Option<(u16, u16)>,
    windows: Vec<Window>,
    /// A DMA_WRITE was answered as QEMU does, and further ones may be laid out for it.
    like_qemu: bool,
    /// The last reply on the main socket.
    pub(crate) last_reply: Option<Message>,
}

#[derive(Default)]
struct Side {
    sent: Stream,
    received: Stream,
    /// The commands that wait for their replies, and the farewell if there will be one.
    owed: VecDeque<Owed>,
}

struct Owed {
    message: Message,
    /// It is answered only if it ends the session.
    optional: bool,
}

/// What the server may reach, or may have been able to.
#[derive(Clone, Copy, Debug)]
struct Window {
    access: u32,
    first: u64,
    last: u64,
}

impl Expected {
    pub(crate) fn sent(&mut self, socket: Socket, mut bytes: &[u8]) {
        while !self.must_end
            && let Some(message) = self.side(socket).sent.next(&mut bytes)
        {
            self.sent_message(socket, message);
        }
    }

    fn sent_message(&mut self, socket: Socket, message: Message) {
        let header = message.header;
        if header.is_believed() && header.is_command() {
            if header.wants_no_reply() {
                // Whether it was done is not told.
                if header.command == DMA_MAP {
                    self.windows.extend(Window::mapped_by(&message.body));
                }
            } else {
                self.owe(socket, message, false);
            }
            if socket == Socket::Main && !self.greeted {
                self.greeted = true;
                self.must_end = header.command != VERSION;
                // Only the reply says whether a handshake has failed.
                self.may_end = header.wants_no_reply();
            }
            return;
        }
        self.like_qemu |= header.command == DMA_WRITE && message.body.is_empty();
        if header.is_believed() && self.answering.take() == Some((header.id, header.command)) {
            self.commands
                .retain(|command| (command.id, command.command) != (header.id, header.command));
            return;
        }
        let to_command = matches!(header.command, DMA_READ | DMA_WRITE);
        if header.is_believed() && to_command && !self.windows.is_empty() && self.greeted {
            // It may be an answer, even to a command that has not been read yet.
            self.commands
                .retain(|command| (command.id, command.command) != (header.id, header.command));
            self.owe(socket, message, true);
            self.may_end = true;
            return;
        }
        self.owe(socket, message, false);
        self.must_end = true;
    }

    fn owe(&mut self, socket: Socket, message: Message, optional: bool) {
        self.side(socket).owed.push_back(Owed { message, optional });
    }

    pub(crate) fn received(&mut self, socket: Socket, mut bytes: &[u8]) {
        while let Some(message) = self.side(socket).received.next(&mut bytes) {
            let header = message.header;
            assert!((HEADER as u32..=MAX_MESSAGE).contains(&header.size), "{header:?}");
            if header.is_command() {
                self.received_command(socket, &message);
            } else {
                self.received_reply(socket, message);
            }
        }
    }

    /// The server's own: about memory that the client has given it.
    fn received_command(&mut self, socket: Socket, message: &Message) {
        let Message { header, body } = message;
        assert!(self.greeted && (socket == Socket::Twin) == self.has_twin, "{header:?}");
        assert_eq!((header.flags, header.error), (0, 0), "{header:?}");
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("8 bytes"));
        assert!(body.len() >= 16, "{header:?}");
        let (address, mut count) = (word(0), word(8));
        if self.like_qemu && header.command == DMA_WRITE {
            // The upper half may be data.
            count &= u64::from(u32::MAX);
        }
        let (data, access) = match header.command {
            DMA_READ => (0, 1),
            DMA_WRITE => (count, 2),
            _ => panic!("no command of a server: {header:?}"),
        };
        assert_eq!(body.len() as u64, 16 + data, "{header:?}");
        let last = address.checked_add(count.saturating_sub(1)).expect("it does not wrap");
        let allowed = |window: &Window| {
            (count == 0 || window.access & access != 0)
                && (window.first..=window.last).contains(&address)
                && last <= window.last
        };
        assert!(self.windows.iter().any(allowed), "{count:#x} bytes at {address:#x}");
        let command = ServerCommand {
            socket,
            id: header.id,
            command: header.command,
            address,
            count,
            ignored: false,
        };
        assert!(self.commands.iter().all(|other| other.id != command.id), "{command:?}");
        self.commands.push(command);
        assert!(self.commands.len() <= MAX_COMMANDS, "{:?}", self.commands);
    }

    fn received_reply(&mut self, socket: Socket, message: Message) {
        let header = message.header;
        let asked = loop {
            let asked = self.side(socket).owed.pop_front();
            let asked = asked.unwrap_or_else(|| panic!("a reply to nothing: {header:?}"));
            let Header { id, command, .. } = asked.message.header;
            if (header.id, header.command) == (id, command) {
                break asked;
            }
            assert!(asked.optional, "{header:?} instead of {:?}", asked.message.header);
        };
        if header.is_error() {
            assert!((1..=4095).contains(&header.error), "{header:?}");
            assert_eq!(header.size as usize, HEADER, "an error has no payload");
        } else {
            assert!(!asked.optional && socket == Socket::Main, "{header:?}");
            assert_eq!(header.error, 0, "{header:?}");
            match header.command {
                DMA_MAP => self.windows.extend(Window::mapped_by(&asked.message.body)),
                // With two sockets, commands from before may still be on their way.
                DMA_UNMAP if !self.has_twin => self.unmap(&asked.message.body),
                _ => {}
            }
        }
        if socket == Socket::Main {
            let first = !std::mem::replace(&mut self.answered, true);
            self.may_end |= first && header.command == VERSION && header.is_error();
            self.last_reply = Some(message);
        }
    }

    fn unmap(&mut self, body: &[u8]) {
        let flags = u32::from_ne_bytes(body[4..8].try_into().expect("4 bytes"));
        if flags & UNMAP_ALL != 0 {
            self.windows.clear();
        }
        let Some(range) = Window::new(0, &body[8..]) else { return };
        self.windows.retain(|window| window.first < range.first || window.last > range.last);
    }

    /// The client is about to send the right answer to a command.
    pub(crate) fn answers(&mut self, command: &ServerCommand) {
        self.answering = Some((command.id, command.command));
    }

    /// Whether what is sent now is the start of a message.
    pub(crate) fn is_at_boundary(&mut self, socket: Socket) -> bool {
        self.side(socket).sent.is_at_boundary()
    }

    /// Whether a version was negotiated.
    pub(crate) fn is_greeted(&self) -> bool {
        self.answered
    }

    /// Every complete message has been answered.
    pub(crate) fn nothing_is_owed(&mut self) {
        assert!(!self.must_end, "the session should have ended");
        for side in [&mut self.main, &mut self.twin] {
            assert!(side.received.is_at_boundary(), "half a reply");
            side.owed.retain(|owed| !owed.optional);
            let owed: Vec<_> = side.owed.iter().map(|owed| owed.message.header).collect();
            assert!(owed.is_empty(), "owed: {owed:?}");
        }
        self.answering = None;
        // It has not ended, whatever could have ended it.
        self.may_end = false;
        // A silent VERSION may have gone well.
        self.answered |= self.greeted;
    }

    /// The client is about to hang up.
    pub(crate) fn leaves(&mut self) {
        self.may_end = true;
    }

    /// The session has ended: there must be a reason, and all that came before it is answered.
    pub(crate) fn ended(&self) {
        assert!(self.must_end || self.may_end, "the session ended for no reason");
        for side in [&self.main, &self.twin] {
            assert!(side.received.is_at_boundary(), "half a reply");
            let owed: Vec<_> = side.owed.iter().map(|owed| owed.message.header).collect();
            assert!(self.may_end || owed.is_empty(), "owed: {owed:?}");
        }
    }

    fn side(&mut self, socket: Socket) -> &mut Side {
        match socket {
            Socket::Main => &mut self.main,
            Socket::Twin => &mut self.twin,
        }
    }
}

impl Window {
    /// What a DMA_MAP announces.
    fn mapped_by(body: &[u8]) -> Option<Self> {
        let flags = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
        Self::new(flags, body.get(16..)?)
    }

    /// From an address and a size.
    fn new(access: u32, range: &[u8]) -> Option<Self> {
        let word = |at: usize| range.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
        let (first, size) = (word(0)?, word(8)?);
        Some(Self { access, first, last: first.checked_add(size.checked_sub(1)?)? })
    }
}
