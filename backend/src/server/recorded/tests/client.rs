//! A client that sends one request after the other and serves DMA messages meanwhile.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use barkeep_protocol::transport::{Flush, Frame, Received, Receiver, Sender};
use barkeep_protocol::wire::{Command, Errno, Header, MessageId, MessageKind, ServerRequest};
use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::lab::Status;

/// One request.
#[derive(Debug)]
pub(super) struct Step {
    command: Command,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Repeated until the lowest bit of the answer's last 8 bytes is clear.
    until_clear: bool,
}

pub(super) struct Client {
    line: Line,
    twin: Option<Line>,
    steps: VecDeque<Step>,
    /// The command that waits for its reply.
    asked: Option<MessageId>,
    id: u16,
    replies: Vec<Result<Vec<u8>, Errno>>,
    /// Descriptors of the last one that had some.
    fds: Vec<OwnedFd>,
    /// Memory that is not shared.
    unshared: Vec<u8>,
    address: u64,
}

struct Line {
    socket: OwnedFd,
    receiver: Receiver,
    sender: Sender,
}

impl Step {
    pub(super) fn new(command: Command, body: Vec<u8>) -> Self {
        Self { command, body, fds: Vec::new(), until_clear: false }
    }

    pub(super) fn with(mut self, fd: Option<&OwnedFd>) -> Self {
        self.fds.extend(fd.map(|fd| fd.try_clone().unwrap()));
        self
    }

    /// Its bytes with this id.
    pub(super) fn message(&self, id: u16) -> Vec<u8> {
        let frame = Frame::command(MessageId(id), self.command, self.body.clone());
        [&frame.header.to_bytes()[..], &frame.body].concat()
    }

    pub(super) fn until_clear(self) -> Self {
        Self { until_clear: true, ..self }
    }
}

impl Client {
    pub(super) fn new(socket: UnixStream, steps: Vec<Step>, address: u64, size: u64) -> Self {
        let unshared = (0..size).map(|at| (at % 251) as u8).collect();
        Self {
            line: Line::new(socket.into()),
            twin: None,
            steps: steps.into(),
            asked: None,
            id: 0,
            replies: Vec::new(),
            fds: Vec::new(),
            unshared,
            address,
        }
    }

    /// Those to steps of which none has failed.
    pub(super) fn replies(&self) -> Vec<Vec<u8>> {
        self.replies.iter().map(|reply| reply.clone().unwrap()).collect()
    }

    /// How many there were, unless one is due.
    pub(super) fn answered(&self) -> Option<usize> {
        self.asked.is_none().then_some(self.replies.len())
    }

    /// The descriptor that came last with a reply.
    pub(super) fn fd(&self) -> Option<&OwnedFd> {
        self.fds.last()
    }

    pub(super) fn last(&self) -> Result<Vec<u8>, Errno> {
        self.replies.last().unwrap().clone()
    }

    pub(super) fn also(&mut self, steps: Vec<Step>) {
        self.steps.extend(steps);
    }

    /// The reply to a message that was sent otherwise.
    pub(super) fn expects(&mut self, id: u16) {
        self.steps.push_back(Step::new(Command::GetInfo, Vec::new()));
        self.asked = Some(MessageId(id));
    }

    pub(super) fn socket(&self) -> UnixStream {
        self.line.socket.try_clone().unwrap().into()
    }

    pub(super) fn leave(&self) {
        self.socket().shutdown(Shutdown::Both).unwrap();
    }

    /// Whether the connection has ended, and nothing was said before that.
    pub(super) fn is_hung_up(&self) -> bool {
        rustix::io::read(&self.line.socket, &mut [0; 1]) == Ok(0)
    }

    pub(super) fn unshared(&self) -> Vec<u8> {
        self.unshared.clone()
    }

    /// Does what can be done without waiting.
    pub(super) fn step(&mut self) -> Status {
        let mut status = Status::Waits;
        if self.asked.is_none() {
            let Some(step) = self.steps.front() else { return Status::Done };
            let fds = step.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
            let id = MessageId(self.id);
            let frame = Frame::command(id, step.command, step.body.clone()).with_fds(fds);
            self.line.send(frame);
            self.asked = Some(id);
            self.id += 1;
            status = Status::Busy;
        }
        while let Some(frame) = self.line.receive() {
            status = Status::Busy;
            match frame.header.kind {
                MessageKind::Command { .. } => {
                    let answer = self.serve(&frame);
                    self.line.send(answer);
                }
                MessageKind::Reply { error } => {
                    assert_eq!(self.asked.take(), Some(frame.header.id));
                    match error {
                        None => self.reply(frame),
                        Some(errno) => {
                            self.steps.pop_front();
                            self.replies.push(Err(errno));
                        }
                    }
                }
            }
        }
        while let Some(frame) = self.twin.as_mut().and_then(Line::receive) {
            status = Status::Busy;
            let answer = self.serve(&frame);
            self.twin.as_mut().unwrap().send(answer);
        }
        status
    }

    fn reply(&mut self, frame: Frame) {
        let Frame { header, body, mut fds } = frame;
        if header.command == Command::Version.code()
            && let Some(twin) = fds.pop()
        {
            rustix::io::ioctl_fionbio(&twin, true).unwrap();
            self.twin = Some(Line::new(twin));
        }
        let step = self.steps.front().unwrap();
        if step.until_clear && body[body.len() - 8] & 1 == 1 {
            return;
        }
        self.steps.pop_front();
        if !fds.is_empty() {
            self.fds = fds;
        }
        self.replies.push(Ok(body));
    }

    fn serve(&mut self, frame: &Frame) -> Frame {
        let Header { command, .. } = frame.header;
        let range = |address: u64, length: usize| {
            let start = usize::try_from(address - self.address).unwrap();
            start..start + length
        };
        let layout = barkeep_protocol::wire::DmaLayout::Spec;
        let mut body = Vec::new();
        match ServerRequest::parse(command, &frame.body).unwrap() {
            ServerRequest::DmaRead(read) => {
                let data =
                    &self.unshared[range(read.address, usize::try_from(read.count).unwrap())];
                read.write_data(layout, &mut body, |room| room.copy_from_slice(data));
            }
            ServerRequest::DmaWrite(write) => {
                let range = range(write.transfer.address, write.data.len());
                self.unshared[range].copy_from_slice(write.data);
                write.transfer.write_to(&mut body);
            }
        }
        Frame::reply(&frame.header, body)
    }
}

impl Line {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, receiver: Receiver::default(), sender: Sender::default() }
    }

    fn send(&mut self, frame: Frame) {
        self.sender.queue(frame);
        assert_eq!(self.sender.flush(self.socket.as_fd()).unwrap(), Flush::Done);
    }

    fn receive(&mut self) -> Option<Frame> {
        match self.receiver.receive(&self.socket).unwrap() {
            Received::Message(message) => Some(message.into_frame()),
            Received::Pending => None,
            other => panic!("{other:?}"),
        }
    }
}

/// Sends bytes with descriptors, however many.
pub(super) fn send_with(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(rights.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut rights, SendFlags::NOSIGNAL)
}
