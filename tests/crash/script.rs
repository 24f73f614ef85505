//! A client that notes every answer, so that two runs of the same session can be compared byte by
//! byte.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, REPLY, Reply, command, message, u64_at};
use barkeep_tests::peer::requests::{CONFIG, access, irq, set_irqs, write};
use barkeep_tests::peer::{Peer, version_body};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// An answer, but for its id: command, flags, error, payload, and how many descriptors came with it.
pub(crate) type Answer = (u16, u32, u32, Vec<u8>, usize);

/// A client with its notes.
pub(crate) struct Script {
    peer: Peer,
    /// Over which the server sends commands, if not over the first socket.
    twin: Option<Peer>,
    /// What the server reaches by messages alone: its address, and the memory.
    pub(crate) messages: Option<(u64, Vec<u8>)>,
    notes: Vec<Answer>,
    /// The descriptors of the last answer.
    pub(crate) fds: Vec<OwnedFd>,
}

/// An event that must have come and has not means that the worker has lost it.
const LOST: &str = "no signal";

impl Script {
    /// Connects and negotiates version 0.2 with every extension.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut script = Self::over(Peer::connect(socket));
        let json = r#"{"capabilities":{"max_msg_fds":16,
            "barkeep":{"memory_fault":true,"region_state":true,"decode_page":true}}}"#;
        script.call(command::VERSION, &version_body(0, 2, json));
        script
    }

    /// The same, with a socket of its own for what the server wants.
    pub(crate) fn with_twin(socket: &Path) -> Self {
        let mut script = Self::over(Peer::connect(socket));
        let json = r#"{"capabilities":{"max_msg_fds":2,"twin_socket":{"supported":true}}}"#;
        let id = script.peer.take_id();
        script.peer.send(&message(id, command::VERSION, COMMAND, &version_body(0, 1, json)));
        let mut reply = script.peer.reply_to(id, command::VERSION);
        let fd = reply.fds.pop().expect("the other end of the twin socket");
        script.note(reply);
        script.twin = Some(Peer::over(fd));
        script
    }

    fn over(peer: Peer) -> Self {
        Self { peer, twin: None, messages: None, notes: Vec::new(), fds: Vec::new() }
    }

    /// What was answered.
    pub(crate) fn notes(self) -> Vec<Answer> {
        self.notes
    }

    /// How much was noted so far.
    pub(crate) fn noted(&self) -> usize {
        self.notes.len()
    }

    /// Forgets what was noted after so much.
    pub(crate) fn forget_after(&mut self, noted: usize) {
        self.notes.truncate(noted);
    }

    fn note(&mut self, reply: Reply) -> &Answer {
        let Reply { id: _, command, flags, error, body, fds } = reply;
        self.notes.push((command, flags, error, body, fds.len()));
        self.fds = fds;
        self.notes.last().expect("the one just pushed")
    }

    /// Sends a command and notes its answer.
    pub(crate) fn call(&mut self, command: u16, body: &[u8]) -> &Answer {
        self.call_with_fds(command, body, &[])
    }

    /// Sends a command with descriptors and notes its answer.
    pub(crate) fn call_with_fds(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> &Answer {
        let id = self.peer.take_id();
        let bytes = message(id, command, COMMAND, body);
        if fds.is_empty() {
            self.peer.send(&bytes)
        } else {
            self.peer.send_with_fds(&bytes, fds)
        }
        self.answer_to(id, command)
    }

    /// Sends a command that wants no answer.
    pub(crate) fn post(&mut self, command: u16, body: &[u8]) {
        let id = self.peer.take_id();
        self.peer.send(&message(id, command, COMMAND | NO_REPLY, body));
    }

    /// Sends a command in pieces of so many bytes and notes its answer.
    pub(crate) fn call_in_pieces(&mut self, command: u16, body: &[u8], piece: usize) -> &Answer {
        let id = self.peer.take_id();
        for piece in message(id, command, COMMAND, body).chunks(piece) {
            self.peer.send(piece);
        }
        self.answer_to(id, command)
    }

    /// Sends commands at once and notes their answers, which come in the same order.
    pub(crate) fn call_all(&mut self, commands: &[(u16, Vec<u8>)]) {
        let mut bytes = Vec::new();
        let mut ids = Vec::new();
        for (command, body) in commands {
            let id = self.peer.take_id();
            bytes.extend(message(id, *command, COMMAND, body));
            ids.push((id, *command));
        }
        self.peer.send(&bytes);
        self.answers_to(&ids);
    }

    /// Sends commands, each with a descriptor or without, and waits for no answer before the last one
    /// is sent; notes their answers, which come in the same order.
    pub(crate) fn call_all_with_fds(&mut self, commands: &[(u16, Vec<u8>, Option<&File>)]) {
        let mut ids = Vec::new();
        for (command, body, file) in commands {
            let id = self.peer.take_id();
            let bytes = message(id, *command, COMMAND, body);
            match file {
                Some(file) => self.peer.send_with_fds(&bytes, &[file.as_fd()]),
                None => self.peer.send(&bytes),
            }
            ids.push((id, *command));
        }
        self.answers_to(&ids);
    }

    fn answers_to(&mut self, ids: &[(u16, u16)]) {
        for (id, command) in ids {
            self.answer_to(*id, *command);
        }
    }

    /// Notes the next answer, which must be this one. Commands of the server are served meanwhile.
    fn answer_to(&mut self, id: u16, command: u16) -> &Answer {
        loop {
            let reply = self.peer.receive();
            if reply.flags & 0xf != COMMAND {
                let (expected, found) = ((id, command), (reply.id, reply.command));
                assert_eq!(found, expected, "an answer to something else, or twice");
                return self.note(reply);
            }
            let answer = self.serve(&reply);
            self.peer.send(&answer);
        }
    }

    /// Serves commands of the server until there is a signal. A worker's successor asks again for what
    /// its predecessor has asked for, so there may be more of them than without deaths.
    pub(crate) fn serve_until(&mut self, signal: &EventCounter) {
        loop {
            let asks = self.twin.as_mut().unwrap_or(&mut self.peer);
            let mut ready = [
                PollFd::new(signal, PollFlags::IN),
                PollFd::from_borrowed_fd(asks.as_fd(), PollFlags::IN),
            ];
            let deadline = Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_ne!(poll(&mut ready, Some(&deadline)), Ok(0), "{LOST} and no command");
            let (signalled, asked) = (!ready[0].revents().is_empty(), ready[1].revents());
            if !asked.is_empty() {
                self.serve_one();
            } else if signalled {
                let _ = signal.take();
                return;
            }
        }
    }

    /// Serves what the server has asked over its own socket by now.
    pub(crate) fn serve_twin(&mut self) {
        while self.twin.as_ref().is_some_and(|twin| !twin.hears_nothing()) {
            self.serve_one();
        }
    }

    fn serve_one(&mut self) {
        let request = self.twin.as_mut().unwrap_or(&mut self.peer).receive();
        let answer = self.serve(&request);
        self.twin.as_mut().unwrap_or(&mut self.peer).send(&answer);
    }

    /// Whether nothing more has come than what was noted.
    pub(crate) fn hears_nothing(&self) -> bool {
        self.peer.hears_nothing()
    }

    fn serve(&mut self, request: &Reply) -> Vec<u8> {
        let (base, memory) = self.messages.as_mut().expect("memory without a descriptor");
        let count = usize::try_from(u64_at(&request.body, 8) & 0xffff_ffff).unwrap();
        let start = usize::try_from(u64_at(&request.body, 0) - *base).unwrap();
        let mut body = request.body[..16].to_vec();
        match request.command {
            command::DMA_READ => body.extend_from_slice(&memory[start..start + count]),
            command::DMA_WRITE => {
                memory[start..start + count].copy_from_slice(&request.body[16..16 + count]);
            }
            other => unreachable!("command {other} of the server"),
        }
        message(request.id, request.command, REPLY, &body)
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let (.., body, _) = self.call(command::REGION_READ, &access(region, offset, count));
        body.get(16..).unwrap_or_default().to_vec()
    }

    pub(crate) fn read_u32(&mut self, region: u32, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(region, offset, 4).try_into().expect("4 bytes"))
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.call(command::REGION_WRITE, &write(region, offset, data));
    }

    pub(crate) fn write_u32(&mut self, region: u32, offset: u64, value: u32) {
        self.write(region, offset, &value.to_le_bytes());
    }

    pub(crate) fn set_config_u16(&mut self, offset: u64, value: u16) {
        self.write(CONFIG, offset, &value.to_le_bytes());
    }

    pub(crate) fn config_u16(&mut self, offset: u64) -> u16 {
        let bytes = self.read(CONFIG, offset, 2);
        u16::from_le_bytes(bytes.try_into().expect("2 bytes"))
    }

    /// Gives one vector its eventfd.
    pub(crate) fn set_eventfd(&mut self, index: u32, vector: u32, fd: BorrowedFd<'_>) {
        let flags = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
        let body = set_irqs(flags, index, vector, 1, &[]);
        self.call_with_fds(command::SET_IRQS, &body, &[fd]);
    }
}

/// Checks that a session was answered as the one that nothing disturbed. `what` was different about it.
pub(crate) fn assert_same(expected: &[Answer], found: &[Answer], what: &str) {
    for (index, (expected, found)) in expected.iter().zip(found).enumerate() {
        let head = |answer: &Answer| (answer.0, answer.1, answer.2, answer.3.len(), answer.4);
        assert_eq!(head(found), head(expected), "answer {index}, {what}");
        let at = expected.3.iter().zip(&found.3).position(|(expected, found)| expected != found);
        let Some(at) = at else { continue };
        let part = |answer: &Answer| answer.3[at..].iter().take(16).copied().collect::<Vec<_>>();
        assert_eq!(part(found), part(expected), "answer {index} from byte {at} on, {what}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

/// Checks that a signal came, once or more often: a worker that dies may repeat one.
pub(crate) fn assert_signalled(counter: &EventCounter) {
    assert!(counter.take() > 0, "{LOST}");
}

/// Checks what a file holds.
pub(crate) fn assert_holds(file: &File, offset: u64, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, offset).unwrap();
    assert_eq!(found, expected, "at {offset:#x}");
}
