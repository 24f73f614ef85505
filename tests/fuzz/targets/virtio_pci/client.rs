//! The VMM's side: whole requests, of which each has its answer.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use barkeep_backend::devices::Registry;
use barkeep_backend::server::fuzzing::Connection;
use barkeep_backend::server::{HostedFunction, ServedFunction};
use barkeep_fuzz::requests::Kind;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};

pub(crate) struct Client {
    pub(crate) kind: Kind,
    /// Where the capability is.
    pub(crate) msix: u64,
    socket: OwnedFd,
    connection: Option<Connection>,
    function: ServedFunction,
    mapped: bool,
    id: u16,
    frames: UnixDatagram,
}

/// What stays open from one input to the next.
struct Files {
    memory: File,
    image: File,
    interrupts: Vec<OwnedFd>,
}

pub(crate) const MEMORY: u64 = 0x4000;
const IMAGE: u64 = 1 << 16;
const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const RESET: u16 = 13;
const DEVICE_FEATURE: u16 = 16;
const MIG_DATA_READ: u16 = 17;
const MIG_DATA_WRITE: u16 = 18;
const CONFIG: u32 = 7;
const MSIX_CAPABILITY: u8 = 0x11;
const MSIX: u32 = 2;
const VECTORS: u32 = 3;

impl Client {
    pub(crate) fn new(kind: u8) -> Self {
        let files = files();
        files.memory.write_all_at(&vec![0; MEMORY as usize], 0).expect("room for a memfd");
        let image = format!("path=/proc/self/fd/{}", files.image.as_raw_fd());
        let (ours, theirs) = UnixDatagram::pair().expect("a pair");
        ours.set_nonblocking(true).expect("a socket");
        let (kind, spec) = match kind % 4 {
            0 => (Kind::Block { read_only: false }, format!("virtio-blk,aio=sync,{image}")),
            1 => (Kind::Block { read_only: false }, format!("virtio-blk,queues=3,{image}")),
            2 => (Kind::Entropy, "virtio-rng".to_owned()),
            _ => (Kind::Net, format!("virtio-net,fd={}", theirs.as_raw_fd())),
        };
        let spec = spec.parse().expect("a device specification");
        let (device, options) = Registry::default().create(spec).expect("a device");
        let function = HostedFunction::with_options("virtio", device, options);
        let function: ServedFunction = function.expect("a function that can exist").into();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a pair");
        let connection = Connection::new(theirs, &function).expect("an epoll instance");
        let mut client = Self {
            kind,
            msix: 0,
            socket,
            connection: Some(connection),
            function,
            mapped: false,
            id: 0,
            frames: ours,
        };
        let json = br#"{"capabilities":{"max_msg_fds":16,"migration":{"pgsize":4096}}}"#;
        client.call(VERSION, &[&[0, 0, 1, 0], &json[..], &[0]].concat(), &[]).expect("a version");
        client.msix = client.capability(MSIX_CAPABILITY);
        client
    }

    fn capability(&mut self, id: u8) -> u64 {
        let config = self.read(CONFIG, 0, 256);
        let mut at = config[0x34];
        while config[usize::from(at)] != id {
            at = config[usize::from(at) + 1];
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at.into()
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, length: usize) -> Vec<u8> {
        if length == 0 {
            return Vec::new();
        }
        let mut reply =
            self.call(REGION_READ, &access(region, offset, length), &[]).unwrap_or_default();
        // Past the end of a region there is an error.
        if reply.is_empty() {
            return vec![0xff; length];
        }
        assert_eq!(reply.len(), 16 + length);
        reply.split_off(16)
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        if !data.is_empty() {
            let body = [&access(region, offset, data.len())[..], data].concat();
            let _ = self.call(REGION_WRITE, &body, &[]);
        }
    }

    /// Writes guest memory.
    pub(crate) fn store(&self, address: u64, data: &[u8]) {
        let room = usize::try_from(MEMORY.saturating_sub(address)).expect("a small number");
        let data = &data[..data.len().min(room)];
        files().memory.write_all_at(data, address).expect("room for a memfd");
    }

    pub(crate) fn map(&mut self) {
        if !self.mapped {
            self.mapped = true;
            let body = words(&[32, 3, 0, 0, 0, 0, MEMORY as u32, 0]);
            self.call(DMA_MAP, &body, &[files().memory.as_fd()]).expect("it is not mapped");
        }
    }

    pub(crate) fn unmap(&mut self) {
        if self.mapped {
            let body = words(&[24, 0, 0, 0, MEMORY as u32, 0]);
            self.call(DMA_UNMAP, &body, &[]).expect("it is mapped");
            self.mapped = false;
        }
    }

    pub(crate) fn connect_interrupts(&mut self) {
        let interrupts = &files().interrupts;
        let count = VECTORS.min(2);
        let fds: Vec<_> = interrupts.iter().take(count as usize).map(AsFd::as_fd).collect();
        let _ = self.call(SET_IRQS, &words(&[20, 1 << 2 | 1 << 5, MSIX, 0, count]), &fds);
        for interrupt in interrupts {
            let _ = rustix::io::read(interrupt, &mut [0; 8]);
        }
    }

    pub(crate) fn disconnect_interrupts(&mut self) {
        let _ = self.call(SET_IRQS, &words(&[20, 1 | 1 << 5, MSIX, 0, 0]), &[]);
    }

    pub(crate) fn reset(&mut self) {
        self.call(RESET, &[], &[]).expect("a reset is always possible");
    }

    /// The other end of a network sends something.
    pub(crate) fn host_says(&mut self, bytes: &[u8]) {
        let _ = self.frames.send(bytes);
        while self.frames.recv(&mut [0; 2048]).is_ok() {}
        // The server gets to see it.
        let _ = self.read(CONFIG, 0, 4);
    }

    /// Stops the function and takes its state out.
    pub(crate) fn save(&mut self) -> Option<Vec<u8>> {
        self.go_to(3)?;
        let reply = self.call(MIG_DATA_READ, &words(&[8 + 65536, 65536]), &[]).expect("a state");
        Some(reply[8..].to_vec())
    }

    /// Whether the function takes a state and goes on with it.
    pub(crate) fn restore(&mut self, state: &[u8]) -> bool {
        let length = u32::try_from(state.len()).expect("a small state");
        let body = [&words(&[8 + length, length])[..], state].concat();
        self.go_to(4).is_some()
            && self.call(MIG_DATA_WRITE, &body, &[]).is_some()
            && self.go_to(2).is_some()
    }

    fn go_to(&mut self, state: u32) -> Option<()> {
        self.call(DEVICE_FEATURE, &words(&[16, 1 << 17 | 2, state, 0]), &[]).map(drop)
    }

    /// The payload of the answer; `None` is an error.
    fn call(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Option<Vec<u8>> {
        let before = (!self.mapped).then(contents);
        self.id = self.id.wrapping_add(1);
        let size = u32::try_from(16 + body.len()).expect("a small message");
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend(self.id.to_ne_bytes());
        message.extend(command.to_ne_bytes());
        message.extend(words(&[size, 0, 0]));
        message.extend(body);
        self.send(&message, fds);
        let connection = self.connection.as_mut().expect("until the end");
        let goes_on = connection.serve(&mut self.function).expect("an epoll instance");
        assert!(goes_on, "command {command} ended the session");
        if let Some(before) = before {
            assert!(contents() == before, "command {command}: memory is not the device's");
        }
        self.receive(command)
    }

    fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            sendmsg(&self.socket, &[IoSlice::new(message)], &mut control, SendFlags::empty());
        assert_eq!(sent, Ok(message.len()), "a buffer with room");
    }

    fn receive(&self, command: u16) -> Option<Vec<u8>> {
        let mut header = [0; 16];
        assert_eq!(rustix::io::read(&self.socket, &mut header), Ok(16), "command {command}");
        assert_eq!(header[..2], self.id.to_ne_bytes());
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; field(4) as usize - 16];
        if !body.is_empty() {
            assert_eq!(rustix::io::read(&self.socket, &mut body), Ok(body.len()));
        }
        (field(8) == 1).then_some(body)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.end(&mut self.function);
        }
    }
}

fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let memfd = |name: &str, size: u64| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = File::from(memfd_create(name, flags).expect("a memfd"));
            file.set_len(size).expect("room for a memfd");
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL).expect("a memfd");
            file
        };
        let counter =
            || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
        Files {
            memory: memfd("memory", MEMORY),
            image: memfd("image", IMAGE),
            interrupts: (0..VECTORS).map(|_| counter()).collect(),
        }
    })
}

/// What guest memory holds.
fn contents() -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    files().memory.read_exact_at(&mut bytes, 0).expect("it is there");
    bytes
}

fn access(region: u32, offset: u64, length: usize) -> Vec<u8> {
    let count = u32::try_from(length).expect("a small access");
    [&offset.to_ne_bytes()[..], &words(&[region, count])].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
