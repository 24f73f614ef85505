use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use barkeep_protocol::page::decode::{Bar, DecodeState, DecodeWriter, LENGTH, Space};
use barkeep_protocol::wire::{
    BarkeepExtensions, Command, DecodePageInfo, FaultVerdict, Header, RegionAccess, RegionFlags,
    RegionInfo, Version,
};
use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{YES, message};

/// What a server of the tests has and does.
#[derive(Clone, Debug)]
pub(super) struct Habits {
    /// `None`: it knows nothing of barkeep.
    pub(super) extensions: Option<BarkeepExtensions>,
    /// Commands that it never answers.
    pub(super) ignores: Vec<Command>,
    /// The page's file can shrink.
    pub(super) unsealed: bool,
    /// Answers to reads are about another place, and zeros.
    pub(super) misreads: bool,
    /// Its configuration space.
    pub(super) config: [u8; 256],
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            extensions: Some(BarkeepExtensions::all()),
            ignores: Vec::new(),
            unsealed: false,
            misreads: false,
            config: [0; 256],
        }
    }
}

/// A server in a thread, with one BAR of 64 KiB that is a file.
pub(super) struct Server {
    /// The commands that came, in order.
    pub(super) commands: mpsc::Receiver<(Header, Vec<u8>)>,
    pub(super) bar: OwnedFd,
    pub(super) habits: Arc<Mutex<Habits>>,
    /// Its end of the connection, for what a test sends by itself.
    pub(super) socket: UnixStream,
}

pub(super) const BAR_SIZE: u64 = 0x10000;
/// Where in its file the BAR is.
pub(super) const BAR_START: u64 = 0x3000;

impl Server {
    pub(super) fn start(mut socket: UnixStream, habits: Habits) -> Self {
        let bar = memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
        let (tell, commands) = mpsc::channel();
        let habits = Arc::new(Mutex::new(habits));
        let server = Self {
            commands,
            bar: bar.try_clone().unwrap(),
            habits: Arc::clone(&habits),
            socket: socket.try_clone().unwrap(),
        };
        thread::spawn(move || {
            loop {
                let mut start = [0; 16];
                if socket.read_exact(&mut start).is_err() {
                    return;
                }
                let header = Header::parse(&start).unwrap();
                let mut body = vec![0; header.body_size as usize];
                socket.read_exact(&mut body).unwrap();
                let habits = habits.lock().unwrap().clone();
                let _ = tell.send((header, body.clone()));
                if let Some((answer, fd)) = answer(&habits, &header, &body, &bar) {
                    send(&mut socket, &answer, fd);
                }
            }
        });
        server
    }
}

fn answer(
    habits: &Habits,
    header: &Header,
    body: &[u8],
    bar: &OwnedFd,
) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let command = Command::try_from(header.command).unwrap();
    if habits.ignores.contains(&command) || header.kind != super::ASK {
        return None;
    }
    let mut fd = None;
    let body = match command {
        Command::Version => {
            let mut theirs = Version::parse(body).unwrap();
            assert!(theirs.capabilities.barkeep.is_some());
            theirs.capabilities.barkeep = habits.extensions;
            theirs.to_bytes()
        }
        Command::GetRegionInfo => {
            let index = u32::from_ne_bytes(*body[8..].first_chunk().unwrap());
            let there = index == 2;
            if there {
                fd = Some(bar.try_clone().unwrap());
            }
            RegionInfo {
                flags: RegionFlags::READ | RegionFlags::WRITE,
                index,
                size: if there { BAR_SIZE } else { 0 },
                file_offset: if there { BAR_START } else { 0 },
                sparse: Vec::new(),
            }
            .to_bytes(1024)
        }
        Command::DecodePage => {
            fd = Some(page(habits.unsealed));
            DecodePageInfo { length: LENGTH as u64 }.to_bytes()
        }
        Command::RegionRead => {
            let mut access = access(body);
            if habits.misreads {
                access.offset += 4;
            }
            let data = match access.region {
                7 => habits.config[..access.count as usize].to_vec(),
                _ if habits.misreads => vec![0; access.count as usize],
                _ => vec![0xff; access.count as usize],
            };
            [access.to_bytes(), data].concat()
        }
        Command::RegionWrite => access(body).to_bytes(),
        Command::MemoryFault => FaultVerdict::UnsupportedRequest { epoch: 9 }.to_bytes(),
        _ => Vec::new(),
    };
    Some((message(header.id.0, header.command, YES, &body), fd))
}

fn access(body: &[u8]) -> RegionAccess {
    let word = |at: usize| u32::from_ne_bytes(*body[at..].first_chunk().unwrap());
    RegionAccess {
        offset: u64::from_ne_bytes(*body.first_chunk().unwrap()),
        region: word(8),
        count: word(12),
    }
}

/// BAR 2 is at an address where it decoded, and does not decode.
fn page(unsealed: bool) -> OwnedFd {
    let words: Vec<AtomicU64> = (0..LENGTH / 8).map(|_| AtomicU64::new(0)).collect();
    let mut writer = DecodeWriter::new(&words).unwrap();
    let mut state = DecodeState::default();
    for decodes in [true, false] {
        let bar = Bar { address: 0xe000_0000, size: BAR_SIZE, space: Space::Memory, decodes };
        state.bars[2] = Some(bar);
        state.epoch += 1;
        writer.show(&state, || {});
    }
    let bytes: Vec<u8> =
        words.into_iter().flat_map(|word| word.into_inner().to_ne_bytes()).collect();
    let file = memfd_create("page", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, LENGTH as u64).unwrap();
    rustix::io::pwrite(&file, &bytes, 0).unwrap();
    if !unsealed {
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    }
    file
}

pub(super) fn send(socket: &mut UnixStream, data: &[u8], fd: Option<OwnedFd>) {
    let Some(fd) = fd else { return socket.write_all(data).unwrap() };
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let flags = SendFlags::empty();
    let sent = rustix::net::sendmsg(&*socket, &[IoSlice::new(data)], &mut control, flags);
    assert_eq!(sent, Ok(data.len()));
}
