use std::os::fd::OwnedFd;

use crate::wire::{Command, Errno, Header, MessageId, MessageKind};

/// One message as it was received: its payload still lies in the receiver's buffer.
#[derive(Debug)]
pub struct Message<'a> {
    /// The header; `body_size` is the length of `body`.
    pub header: Header,
    /// The payload.
    pub body: &'a [u8],
    /// File descriptors, owned and close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Message<'_> {
    /// The message with a payload of its own, for whoever keeps it.
    #[must_use]
    pub fn into_frame(self) -> Frame {
        Frame { header: self.header, body: self.body.to_vec(), fds: self.fds }
    }
}

/// One message that owns its payload.
#[derive(Debug)]
pub struct Frame {
    /// The header; `body_size` is the length of `body`.
    pub header: Header,
    /// The payload.
    pub body: Vec<u8>,
    /// File descriptors, owned and close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    /// A command that wants a reply.
    #[must_use]
    pub fn command(id: MessageId, command: Command, body: Vec<u8>) -> Self {
        let kind = MessageKind::Command { no_reply: false };
        Self::new(id, command.code(), kind, body)
    }

    /// The successful reply to `command`.
    #[must_use]
    pub fn reply(command: &Header, body: Vec<u8>) -> Self {
        Self::new(command.id, command.command, MessageKind::Reply { error: None }, body)
    }

    /// The error reply to `command`: header only ("Header").
    #[must_use]
    pub fn error(id: MessageId, command: u16, errno: Errno) -> Self {
        Self::new(id, command, MessageKind::Reply { error: Some(errno) }, Vec::new())
    }

    /// The frame with file descriptors attached.
    #[must_use]
    pub fn with_fds(mut self, fds: Vec<OwnedFd>) -> Self {
        self.fds = fds;
        self
    }

    fn new(id: MessageId, command: u16, kind: MessageKind, body: Vec<u8>) -> Self {
        let body_size = u32::try_from(body.len()).expect("payloads are bounded by the limits");
        Self { header: Header { id, command, body_size, kind }, body, fds: Vec::new() }
    }
}
