//! A vhost-user front-end of the tests' own: messages in bytes, and a driver's queues behind them.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use barkeep_tests::virtio::{Memory, Part, Queue, Used, Window, feature};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Requests (vhost-user, "Front-end message types").
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
}

/// The feature bit that protocol features hang on.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
pub(crate) const NEED_REPLY: u32 = 8;
/// What the front-end calls guest memory, as addresses of its own process.
const USER: u64 = 0x7f00_0000_0000;
/// Longer is a hang.
const DEADLINE: Duration = Duration::from_secs(10);

/// A connection.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    pub(crate) socket: UnixStream,
}

impl FrontEnd {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        Self { socket }
    }

    /// One that has set `features` of those offered, and all protocol features.
    pub(crate) fn negotiated(path: &Path, features: u64) -> Self {
        let front_end = Self::connect(path);
        front_end.send(request::SET_OWNER, 0, &[], &[]);
        let offered = front_end.ask(request::GET_FEATURES, &[]);
        let accepted = u64_of(&offered) & features;
        assert_eq!(accepted, features, "the device offers {:#x}", u64_of(&offered));
        let protocol = front_end.ask(request::GET_PROTOCOL_FEATURES, &[]);
        front_end.send(request::SET_PROTOCOL_FEATURES, 0, &protocol, &[]);
        front_end.command(request::SET_FEATURES, &accepted.to_le_bytes(), &[]);
        front_end
    }

    /// Sends a message with flags besides the version. The other side may be gone.
    pub(crate) fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let size = u32::try_from(payload.len()).unwrap();
        let header = [request, VERSION | flags, size].map(u32::to_le_bytes).concat();
        self.send_bytes(&[&header[..], payload].concat(), fds);
    }

    /// Sends bytes, whatever they are.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); 512];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "few descriptors");
        }
        let _ = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    /// The payload of the next message, which answers this request; `None` at the end of the session.
    pub(crate) fn receive(&self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).ok()?;
        let [code, flags, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        assert_eq!((code, flags), (request, VERSION | REPLY), "the answer to another request");
        let mut payload = vec![0; usize::try_from(size).unwrap()];
        (&self.socket).read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// A request with an answer.
    pub(crate) fn ask(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, 0, payload, &[]);
        self.receive(request).expect("an answer")
    }

    /// A request without an answer, which is acknowledged.
    pub(crate) fn command(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(request, NEED_REPLY, payload, fds);
        let answer = self.receive(request).expect("an acknowledgement");
        assert_eq!(u64_of(&answer), 0, "request {request} is refused");
    }

    /// Waits for the end of the session. Everything that was sent on the way is thrown away.
    pub(crate) fn expect_closed(mut self) {
        let mut rest = Vec::new();
        if let Err(error) = self.socket.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the session ends");
        }
    }

    pub(crate) fn set_memory(&self, memory: &Memory) {
        let windows = [&memory.rings, &memory.data];
        let table = [2_u32.to_le_bytes(), [0; 4]].concat();
        let regions = windows.map(region).concat();
        let fds = windows.map(|window| window.file().as_fd());
        self.command(request::SET_MEM_TABLE, &[table, regions].concat(), &fds);
    }

    /// The number and another one, which many messages consist of.
    pub(crate) fn set_ring(&self, request: u32, index: u32, value: u32) {
        self.command(request, &pair(index, value), &[]);
    }

    /// Sets an eventfd of a ring.
    pub(crate) fn set_eventfd(&self, request: u32, index: u8, fd: BorrowedFd<'_>) {
        self.command(request, &u64::from(index).to_le_bytes(), &[fd]);
    }
}

/// A region's description as in SET_MEM_TABLE.
pub(crate) fn region(window: &Window) -> Vec<u8> {
    let fields = [window.address, window.size, window.address + USER, 0];
    fields.map(u64::to_le_bytes).concat()
}

pub(crate) fn pair(first: u32, second: u32) -> Vec<u8> {
    [first, second].map(u32::to_le_bytes).concat()
}

/// The payload of SET_VRING_ADDR for a ring at these guest addresses: descriptors, available, used.
pub(crate) fn addresses(index: u32, [table, available, used]: [u64; 3]) -> Vec<u8> {
    let mut payload = pair(index, 0);
    for address in [table + USER, used + USER, available + USER, 0] {
        payload.extend(address.to_le_bytes());
    }
    payload
}

pub(crate) fn u64_of(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload.try_into().expect("8 bytes"))
}

pub(crate) fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

pub(crate) fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
}

/// Waits until an eventfd is signalled, and takes it.
pub(crate) fn wait(eventfd: &impl AsFd) {
    let deadline = Timespec::try_from(DEADLINE).unwrap();
    let ready = poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&deadline));
    assert_eq!(ready, Ok(1), "nothing happens");
    rustix::io::read(eventfd, &mut [0; 8]).unwrap();
}

/// A driver whose device is on the other side.
pub(crate) struct Driver {
    pub(crate) front_end: FrontEnd,
    pub(crate) memory: Arc<Memory>,
    pub(crate) rings: Vec<Ring>,
}

pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) error: OwnedFd,
}

impl Driver {
    /// Sets a device up with so many queues.
    pub(crate) fn start(path: &Path, queues: u16, size: u16) -> Self {
        Self::start_with(path, queues, size, feature::VERSION_1)
    }

    pub(crate) fn start_with(path: &Path, queues: u16, size: u16, features: u64) -> Self {
        let front_end = FrontEnd::negotiated(path, features | PROTOCOL_FEATURES);
        let driver = Self::prepare(front_end, queues, size, features);
        for index in 0..queues {
            driver.start_ring(index, size, 0);
        }
        driver
    }

    /// One with memory and queues, of which the device does not know where they are.
    pub(crate) fn prepare(front_end: FrontEnd, queues: u16, size: u16, features: u64) -> Self {
        let memory = Arc::new(Memory::new(16 << 20));
        front_end.set_memory(&memory);
        let mut driver = Self { front_end, memory, rings: Vec::new() };
        for index in 0..queues {
            let event_idx = features & feature::EVENT_IDX != 0;
            let indirect = features & feature::INDIRECT_DESC != 0;
            let queue = Queue::new(&driver.memory, index, size, event_idx, indirect);
            let [kick, call, error] = [(); 3].map(|()| new_eventfd());
            driver.rings.push(Ring { queue, kick, call, error });
        }
        driver
    }

    /// Starts a ring from the `base`th request on.
    pub(crate) fn start_ring(&self, index: u16, size: u16, base: u16) {
        self.place_ring(index, size, base);
        self.front_end.set_ring(request::SET_VRING_ENABLE, index.into(), 1);
    }

    /// Starts a ring, but does not enable it.
    pub(crate) fn place_ring(&self, index: u16, size: u16, base: u16) {
        let ring = &self.rings[usize::from(index)];
        let (front_end, number) = (&self.front_end, u32::from(index));
        front_end.set_ring(request::SET_VRING_NUM, number, size.into());
        front_end.set_ring(request::SET_VRING_BASE, number, base.into());
        let addresses = addresses(number, ring.queue.addresses());
        front_end.command(request::SET_VRING_ADDR, &addresses, &[]);
        let byte = u8::try_from(index).unwrap();
        front_end.set_eventfd(request::SET_VRING_CALL, byte, ring.call.as_fd());
        front_end.set_eventfd(request::SET_VRING_ERR, byte, ring.error.as_fd());
        front_end.set_eventfd(request::SET_VRING_KICK, byte, ring.kick.as_fd());
    }

    /// Stops a ring. Returns the number of the next request.
    pub(crate) fn stop_ring(&self, index: u16) -> u16 {
        let answer = self.front_end.ask(request::GET_VRING_BASE, &pair(index.into(), 0));
        u16::from_le_bytes(answer[4..6].try_into().unwrap())
    }

    pub(crate) fn send(&mut self, index: u16, parts: &[Part]) -> u16 {
        let ring = &mut self.rings[usize::from(index)];
        let head = ring.queue.add(parts).expect("a free descriptor");
        if ring.queue.needs_kick() {
            signal(&ring.kick);
        }
        head
    }

    /// The next request that comes back.
    pub(crate) fn next_used(&mut self, index: u16) -> Used {
        let ring = &mut self.rings[usize::from(index)];
        loop {
            if let Some(used) = ring.queue.used() {
                return used;
            }
            // Something may have come back before it was armed.
            if !ring.queue.arm() {
                wait(&ring.call);
            }
        }
    }
}
