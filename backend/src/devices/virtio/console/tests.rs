mod chains;
mod patience;
mod pty;
mod socket;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::config::DeviceSpec;
use crate::devices::virtio::testing::{Driver, Memory, Part};

fn parse(text: &str) -> Result<Console, String> {
    let spec: DeviceSpec = format!("virtio-console{text}").parse().unwrap();
    let mut parameters = spec.parameters;
    let device = Console::from_parameters(&mut parameters).map_err(|error| error.to_string())?;
    parameters.finish().map(|()| device).map_err(|error| error.to_string())
}

/// A console with its guest. The host's ends are in a directory of its own.
struct Bench {
    device: Box<dyn Core<Memory>>,
    driver: Driver,
    /// Watches the device's wake by edges, as transports do.
    transport: OwnedFd,
    /// What runs while output waits for a reader.
    timer: OwnedFd,
    /// Where the guest's buffers for input are, in the order of their use.
    room: Vec<(u16, u64)>,
    path: PathBuf,
    _directory: TempDir,
}

/// Longer than any test takes, however slow the machine.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

impl Bench {
    /// One whose patience ends when the test [says so](Self::expire).
    fn new(end: &str) -> Self {
        Self::with_patience(end, FOR_EVER)
    }

    fn with_patience(end: &str, patience: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let options = match end {
            "socket" => Options::Socket(path.clone()),
            _ => Options::Pty(path.clone()),
        };
        let console = Console::with_patience(&options, patience).unwrap();
        let timer = console.port.timer().try_clone_to_owned().unwrap();
        let device: Box<dyn Core<Memory>> = Box::new(console);
        let transport = epoll::create(CreateFlags::CLOEXEC).unwrap();
        let edges = EventFlags::IN | EventFlags::ET;
        epoll::add(&transport, device.wakes()[0], EventData::new_u64(0), edges).unwrap();
        let driver = Driver::new(2);
        Self { device, driver, transport, timer, room: Vec::new(), path, _directory: directory }
    }

    /// The guest says something.
    fn say(&mut self, bytes: &[u8]) {
        self.driver.send(TRANSMIT, &[Part::Readable(bytes)]);
        self.kick(TRANSMIT);
    }

    /// The guest has room for so many bytes.
    fn listen(&mut self, len: u32) {
        let sent = self.driver.send(RECEIVE, &[Part::Writable(len)]);
        self.room.insert(0, (sent.head, sent.addresses[0]));
        self.kick(RECEIVE);
    }

    fn kick(&mut self, queue: u16) {
        self.device.kicked(queue, &mut self.driver).unwrap();
    }

    /// What the guest has heard since the last time.
    fn heard(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        while let Some((head, len)) = self.driver.used(RECEIVE) {
            let (expected, address) = self.room.pop().unwrap();
            assert_eq!(head, expected);
            heard.extend(self.driver.bytes(address, len as usize));
        }
        heard
    }

    /// The same, when it is something. What was written may be on its way through a terminal.
    fn hear(&mut self) -> Vec<u8> {
        loop {
            let heard = self.heard();
            if !heard.is_empty() {
                return heard;
            }
            self.wait();
        }
    }

    /// How many of the guest's requests have been said since the last time.
    fn said(&mut self) -> usize {
        std::iter::from_fn(|| self.driver.used(TRANSMIT)).count()
    }

    /// Waits for a wake and serves it.
    fn wait(&mut self) {
        assert!(self.is_woken(None));
        self.device.woken(0, &mut self.driver).unwrap();
    }

    /// Serves what there is to be served, without waiting for more.
    fn settle(&mut self) {
        while self.is_awake() {
            self.device.woken(0, &mut self.driver).unwrap();
        }
    }

    /// Whether there was a wake since the last look.
    fn is_awake(&self) -> bool {
        self.is_woken(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    fn is_woken(&self, timeout: Option<&Timespec>) -> bool {
        let mut events = Vec::with_capacity(1);
        epoll::wait(&self.transport, spare_capacity(&mut events), timeout).unwrap();
        !events.is_empty()
    }
}

/// Waits until there is something to read, and reads so much of it at most; empty at the end.
fn read(peer: impl AsFd, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    let read = rustix::io::read(&peer, &mut bytes).or_else(|errno| {
        assert_eq!(errno, Errno::AGAIN);
        poll(&mut [PollFd::new(&peer, PollFlags::IN)], None).unwrap();
        rustix::io::read(&peer, &mut bytes)
    });
    bytes.truncate(read.unwrap());
    bytes
}

fn read_exactly(peer: impl AsFd, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let more = read(&peer, len - bytes.len());
        assert!(!more.is_empty(), "{} bytes of {len}", bytes.len());
        bytes.extend(more);
    }
    bytes
}

/// Whether there is nothing to read.
fn is_quiet(peer: impl AsFd) -> bool {
    rustix::io::read(peer, &mut [0; 1]) == Err(Errno::AGAIN)
}

/// Bytes of which no piece is like another.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..len).map(|_| next()).collect()
}

const MEBIBYTE: usize = 1 << 20;
/// What a guest says at once.
const CHUNK: usize = 5000;
/// How many requests it has under way: fewer than the queue holds.
const DEPTH: usize = 100;

/// Says a lot to a peer that reads only when the device can't go on, in pieces of an odd size.
fn say_all_to_a_slow_peer(bench: &mut Bench, peer: &OwnedFd) {
    let expected = pattern(MEBIBYTE);
    let mut chunks = expected.chunks(CHUNK);
    let (mut under_way, mut blocked, mut heard) = (0, 0, Vec::new());
    while heard.len() < expected.len() {
        while under_way < DEPTH
            && let Some(chunk) = chunks.next()
        {
            bench.say(chunk);
            under_way += 1;
        }
        bench.settle();
        under_way -= bench.said();
        blocked += usize::from(under_way > 0);
        heard.extend(read(peer, 70_000));
    }
    bench.settle();
    under_way -= bench.said();
    assert_eq!(under_way, 0);
    assert!(blocked > 0, "the peer was never slow");
    assert!(heard == expected);
    assert!(is_quiet(peer));
}

/// Hears a lot from a peer that says as much as there is room for, in buffers of odd sizes.
fn hear_all_of_a_fast_peer(bench: &mut Bench, peer: &OwnedFd) {
    let expected = pattern(MEBIBYTE);
    let (mut rest, mut heard, mut full) = (&expected[..], Vec::new(), 0);
    while heard.len() < expected.len() {
        while !rest.is_empty() {
            match rustix::io::write(peer, rest) {
                Ok(written) if written > 0 => rest = &rest[written..],
                Ok(_) | Err(Errno::AGAIN) => {
                    full += 1;
                    break;
                }
                Err(errno) => panic!("{errno}"),
            }
        }
        bench.settle();
        for len in [1, 777, 4096, 50_000] {
            bench.listen(len);
        }
        heard.extend(bench.hear());
    }
    assert!(full > 0, "there was always room");
    assert!(heard == expected);
}

#[test]
fn bad_options_are_told_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |text: &str| parse(text).unwrap_err();
    assert_eq!(refused(""), "parameter 'socket': missing, and so is pty");
    assert_eq!(refused(",socket=a,pty=b"), "parameter 'pty': there is socket already");
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let missing = directory.path().join("no/console");
    let long = directory.path().join("x".repeat(120));
    let link = directory.path().join("link");
    std::os::unix::fs::symlink("file", &link).unwrap();
    let rows: [(&str, &Path, &str); 6] = [
        ("socket", &file, "exists and is not a socket"),
        ("socket", &missing, "No such file or directory (os error 2)"),
        ("socket", &long, "File name too long (os error 36)"),
        ("pty", &file, "File exists (os error 17)"),
        ("pty", &link, "File exists (os error 17)"),
        ("pty", &missing, "No such file or directory (os error 2)"),
    ];
    for (parameter, path, reason) in rows {
        let path = path.display();
        let expected = format!("parameter '{parameter}': {path}: {reason}");
        assert_eq!(refused(&format!(",{parameter}={path}")), expected);
    }
    assert_eq!(std::fs::read_to_string(link).unwrap(), "precious");
    let other = directory.path().join("other");
    let refused = refused(&format!(",socket={},size=80x25", other.display()));
    assert_eq!(refused, "unknown parameter 'size'");
    assert!(!other.exists());
}
