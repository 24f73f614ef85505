//! A client that sends one request after the other and serves DMA messages meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use barkeep_protocol::transport::{Flush, Frame, Received, Receiver, Sender};
use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind, ServerRequest};

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
    replies: Vec<Vec<u8>>,
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
            unshared,
            address,
        }
    }

    pub(super) fn replies(&self) -> Vec<Vec<u8>> {
        self.replies.clone()
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
                    assert_eq!((self.asked.take(), error), (Some(frame.header.id), None));
                    self.reply(frame);
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
        self.replies.push(body);
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
                let data = &self.unshared[range(read.address, usize::try_from(read.count).unwrap())];
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
