//! Plays rows to a backend, in every way that their bytes can arrive.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use barkeep_tests::peer::message::{COMMAND, Reply, command, message, u16_at};
use barkeep_tests::peer::requests::{CONFIG, access};
use barkeep_tests::peer::{Peer, version_body};

use super::process::Sidecar;
use super::{Exchange, Expect, Function, Row, Start};

/// How a row's bytes arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A message at a time, the next after the answer. Descriptors come with the first byte.
    Whole,
    /// A byte at a time, each with a share of the descriptors.
    Bytes,
    /// The header, then the rest with the descriptors.
    Halves,
    /// Everything at once, and in the same piece as the last message a request that must be answered.
    Coalesced,
}

pub(crate) const MODES: [Mode; 4] = [Mode::Whole, Mode::Bytes, Mode::Halves, Mode::Coalesced];

/// Longer messages come in pieces of this size instead of bytes.
const PIECE: usize = 4093;
const BYTES: usize = 8192;
const HEADER: usize = 16;

/// Plays a row; says what was wrong, with its name.
pub(crate) fn play(row: &Row, mode: Mode, sidecar: &Sidecar) -> Result<(), String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| Play::new(row, sidecar).run(mode, sidecar)));
    outcome.map_err(|panic| format!("{} [{mode:?}]: {}", row.name, text_of(&*panic)))
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

struct Play {
    peer: Peer,
    script: Vec<Prepared>,
    first_word: [u8; 4],
}

/// An exchange with its id and its descriptors.
struct Prepared {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    expect: Expect,
}

impl Play {
    fn new(row: &Row, sidecar: &Sidecar) -> Self {
        let mut peer = Peer::connect(&sidecar.socket_of(row.function));
        match row.start {
            Start::Silent => {}
            Start::Plain => {
                drop(peer.call(command::VERSION, &version_body(0, 2, "{}")).success());
            }
            Start::Greeted => peer.greet(),
        }
        let script = row.script.iter().map(|exchange| prepare(exchange, &mut peer)).collect();
        let first_word = match row.function {
            Function::Edu => [0x34, 0x12, 0xe8, 0x11],
            Function::Ivshmem => [0xf4, 0x1a, 0x10, 0x11],
        };
        Self { peer, script, first_word }
    }

    fn run(mut self, mode: Mode, sidecar: &Sidecar) {
        let script = std::mem::take(&mut self.script);
        let end = script.last().expect("a row sends something").expect;
        if mode == Mode::Coalesced {
            self.send_coalesced(&script);
        }
        for exchange in &script {
            match mode {
                Mode::Whole => self.send(&exchange.bytes, &exchange.fds),
                Mode::Bytes => self.send_in_pieces(exchange),
                Mode::Halves => {
                    let header = exchange.bytes.len().min(HEADER);
                    let (header, body) = exchange.bytes.split_at(header);
                    // A message that is all header has its descriptors with its second half.
                    let (header, body) = if body.is_empty() {
                        header.split_at(header.len() / 2)
                    } else {
                        (header, body)
                    };
                    self.send(header, &[]);
                    self.send(body, &exchange.fds);
                }
                Mode::Coalesced => {}
            }
            self.check(exchange, sidecar);
        }
        if !end.is_final() {
            if mode != Mode::Coalesced {
                self.peer.send(&probe());
            }
            let body = self.peer.reply_to(PROBE, command::REGION_READ).success();
            assert_eq!(body[16..], self.first_word, "the request behind it");
            assert!(self.peer.hears_nothing(), "more than one reply");
        }
    }

    /// What has been asked is not answered yet, so the server finds all of it together.
    fn send_coalesced(&mut self, script: &[Prepared]) {
        let mut bytes = Vec::new();
        for exchange in script {
            if exchange.fds.is_empty() {
                bytes.extend_from_slice(&exchange.bytes);
                continue;
            }
            // Whose descriptors they are, the kernel tells by the call that sent them.
            self.send(&std::mem::take(&mut bytes), &[]);
            self.send(&exchange.bytes, &exchange.fds);
        }
        if script.last().is_some_and(|exchange| exchange.expect != Expect::Waits) {
            bytes.extend(probe());
        }
        self.send(&bytes, &[]);
    }

    fn send_in_pieces(&mut self, exchange: &Prepared) {
        let Prepared { bytes, fds, .. } = exchange;
        let length = if bytes.len() > BYTES { PIECE } else { 1 };
        let share = fds.len().div_ceil(bytes.len().div_ceil(length)).max(1);
        let mut shares = fds.chunks(share);
        for piece in bytes.chunks(length) {
            self.send(piece, shares.next().unwrap_or_default());
        }
    }

    /// The server may hang up at any byte of a row that ends the session.
    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        if fds.is_empty() {
            let _ = self.peer.try_send(bytes);
            return;
        }
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        if let Ok(sent) = self.peer.try_send_with_fds(bytes, &fds) {
            let _ = self.peer.try_send(&bytes[sent..]);
        }
    }

    fn check(&mut self, exchange: &Prepared, sidecar: &Sidecar) {
        match exchange.expect {
            Expect::Success => drop(self.reply(exchange).success()),
            Expect::Payload(length) => {
                assert_eq!(self.reply(exchange).success().len(), length, "length of the payload");
            }
            Expect::Fails(errno) => self.reply(exchange).failure(errno),
            Expect::Refused => {
                let reply = self.reply(exchange);
                assert_eq!((reply.flags, reply.body.len()), (0x21, 0), "an error reply");
            }
            Expect::Reply => {
                let reply = self.reply(exchange);
                assert!(reply.flags == 1 || reply.flags == 0x21 && reply.body.is_empty());
            }
            Expect::FailsAndCloses(errno) => {
                self.reply(exchange).failure(errno);
                self.peer.expect_closed();
            }
            Expect::Closes => self.peer.expect_closed(),
            // The next reply must be that to the next request.
            Expect::Silence => {}
            Expect::Waits => {
                // Answers to somebody else mean that the server has seen what was sent.
                let mut neighbour = sidecar.neighbour();
                for _ in 0..2 {
                    assert_eq!(neighbour.config_u16(0), 0x1234);
                }
                assert!(self.peer.hears_nothing(), "an answer to what has not ended");
                self.peer.finish_sending();
                self.peer.expect_closed();
            }
        }
    }

    fn reply(&mut self, exchange: &Prepared) -> Reply {
        self.peer.reply_to(u16_at(&exchange.bytes, 0), u16_at(&exchange.bytes, 2))
    }
}

fn prepare(exchange: &Exchange, peer: &mut Peer) -> Prepared {
    let mut bytes = exchange.bytes.clone();
    if let Some(id) = bytes.first_chunk_mut() {
        *id = peer.take_id().to_ne_bytes();
    }
    let fds = exchange.fds.iter().map(|fd| fd.open()).collect();
    Prepared { bytes, fds, expect: exchange.expect }
}

const PROBE: u16 = 0xbeef;

fn probe() -> Vec<u8> {
    message(PROBE, command::REGION_READ, COMMAND, &access(CONFIG, 0, 4))
}
