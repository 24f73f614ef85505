//! A daemon in a thread of the test, which does what a daemon should unless the test twists it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use crate::devices::virtio::spec::{descriptor, feature};

pub(super) const HAS_PROTOCOL: u64 = 1 << 30;
/// Longer than anything takes, and short of what a test may.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What a daemon is.
#[derive(Clone, Debug)]
pub(super) struct Traits {
    pub(super) features: u64,
    pub(super) protocol: Protocol,
    pub(super) config: Vec<u8>,
    pub(super) queues: u64,
    pub(super) slots: u64,
}

/// What a daemon does wrong when it is asked this.
#[derive(Clone, Debug)]
pub(super) enum Twist {
    /// It does not answer.
    Silence,
    /// It closes the connection.
    HangUp,
    /// It says no.
    Refuse,
    /// It sends these bytes, whatever they are.
    Raw(Vec<u8>),
    /// It answers with so many descriptors.
    Fds(usize),
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) guest: u64,
    pub(super) size: u64,
    pub(super) user: u64,
    pub(super) offset: u64,
    pub(super) file: File,
}

#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: u32,
    pub(super) base: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) error: Option<OwnedFd>,
    pub(super) enabled: bool,
    /// Requests that a daemon before this one had begun.
    pub(super) resubmitted: Vec<u16>,
}

/// What a daemon was told.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) heard: Vec<FrontendReq>,
    pub(super) features: Option<u64>,
    pub(super) protocol: Option<Protocol>,
    pub(super) memory: Vec<Region>,
    pub(super) vrings: BTreeMap<u32, Vring>,
    pub(super) channel: Option<UnixStream>,
    pub(super) inflight: Option<File>,
    pub(super) status: Vec<u64>,
    pub(super) connections: usize,
    /// What it does wrong, by request.
    pub(super) twists: BTreeMap<u32, Twist>,
    traits: Option<Traits>,
    connection: Option<UnixStream>,
    dead: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
pub(super) struct Fake {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Traits {
    /// A disk of a few sectors, which knows everything that is of use.
    pub(super) fn disk() -> Self {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&64_u64.to_le_bytes());
        Self {
            features: HAS_PROTOCOL | feature::VERSION_1 | feature::EVENT_IDX | 1 << 9 | 1 << 11,
            protocol: Protocol::MQ
                | Protocol::REPLY_ACK
                | Protocol::CONFIG
                | Protocol::BACKEND_REQ
                | Protocol::INFLIGHT_SHMFD
                | Protocol::CONFIGURE_MEM_SLOTS,
            config,
            queues: 4,
            slots: 32,
        }
    }

    pub(super) fn with(self, protocol: Protocol) -> Self {
        Self { protocol: self.protocol | protocol, ..self }
    }

    pub(super) fn without(self, protocol: Protocol) -> Self {
        Self { protocol: self.protocol.difference(protocol), ..self }
    }
}

impl Fake {
    pub(super) fn start(path: &Path, traits: Traits) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared::default());
        shared.state.lock().unwrap().traits = Some(traits);
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || run(&listener, &shared)
        });
        Self { path: path.to_owned(), shared, thread: Some(thread) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// Waits until the state is so.
    pub(super) fn wait(&self, mut so: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let state = self.state();
        let (state, late) =
            self.shared.changed.wait_timeout_while(state, PATIENCE, |state| !so(state)).unwrap();
        assert!(!late.timed_out(), "the daemon never came there: {:?}", state.heard);
        state
    }

    pub(super) fn twist(&self, request: FrontendReq, twist: Twist) {
        self.state().twists.insert(request.into(), twist);
    }

    pub(super) fn change_config(&self, at: usize, bytes: &[u8]) {
        let mut state = self.state();
        let traits = state.traits.as_mut().unwrap();
        traits.config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn config(&self) -> Vec<u8> {
        self.state().traits.as_ref().unwrap().config.clone()
    }

    /// Whether somebody came and went.
    pub(super) fn was_left(&self) -> bool {
        let state = self.state();
        state.connections > 0 && state.connection.is_none()
    }

    /// Forgets what it heard.
    pub(super) fn listen(&self) {
        self.state().heard.clear();
    }

    pub(super) fn heard(&self, request: FrontendReq) -> usize {
        self.state().heard.iter().filter(|heard| **heard == request).count()
    }

    /// Is gone, and its socket with it.
    pub(super) fn die(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let _ = std::fs::remove_file(&self.path);
        let mut state = self.state();
        state.dead = true;
        if let Some(connection) = &state.connection {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        drop(state);
        thread.join().unwrap();
    }

    /// Sends bytes that nobody asked for.
    pub(super) fn shout(&self, bytes: &[u8]) {
        send(self.state().connection.as_ref().unwrap(), bytes, &[]);
    }

    /// Takes the next request of a queue that it serves.
    pub(super) fn take(&self, queue: u32) -> Option<u16> {
        self.state().take(queue)
    }

    /// Gives a request back and interrupts.
    pub(super) fn give_back(&self, queue: u32, head: u16) {
        self.state().give_back(queue, head);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.die();
    }
}

impl State {
    pub(super) fn running(&self) -> Vec<u32> {
        let running = self.vrings.iter().filter(|(_, ring)| ring.kick.is_some() && ring.enabled);
        running.map(|(index, _)| *index).collect()
    }

    /// Whether somebody kicked since this was last asked.
    pub(super) fn kicked(&self, queue: u32) -> bool {
        let kick = self.vrings[&queue].kick.as_ref().expect("the ring is started");
        rustix::io::read(kick, &mut [0; 8]).is_ok()
    }

    pub(super) fn signal(&self, queue: u32) {
        let call = self.vrings[&queue].call.as_ref().expect("the ring is started");
        rustix::io::write(call, &1_u64.to_ne_bytes()).unwrap();
    }

    fn take(&mut self, queue: u32) -> Option<u16> {
        let ring = &self.vrings[&queue];
        assert!(ring.kick.is_some() && ring.enabled, "the ring is served");
        if let Some(head) = self.vrings.get_mut(&queue).unwrap().resubmitted.pop() {
            return Some(head);
        }
        let ring = &self.vrings[&queue];
        let (size, base, available) = (ring.size, ring.base, ring.available);
        if self.read_u16(available + 2) == base {
            return None;
        }
        let head = self.read_u16(available + 4 + 2 * u64::from(u32::from(base) % size));
        self.vrings.get_mut(&queue).unwrap().base = base.wrapping_add(1);
        self.track(queue, head, 1);
        Some(head)
    }

    fn give_back(&mut self, queue: u32, head: u16) {
        let ring = &self.vrings[&queue];
        let (size, used) = (ring.size, ring.used);
        let index = self.read_u16(used + 2);
        let entry = used + 4 + 8 * u64::from(u32::from(index) % size);
        self.write(entry, &u32::from(head).to_le_bytes());
        self.write(entry + 4, &0_u32.to_le_bytes());
        self.write(used + 2, &index.wrapping_add(1).to_le_bytes());
        self.track(queue, head, 0);
        self.signal(queue);
    }

    /// The address of a request's first buffer.
    pub(super) fn buffer(&self, queue: u32, head: u16) -> u64 {
        let at = self.vrings[&queue].descriptors + u64::from(head) * descriptor::SIZE;
        let mut bytes = [0; 8];
        self.read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn read_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(address, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn read(&self, user: u64, data: &mut [u8]) {
        let (file, at) = self.locate(user);
        file.read_exact_at(data, at).unwrap();
    }

    pub(super) fn write(&self, user: u64, data: &[u8]) {
        let (file, at) = self.locate(user);
        file.write_all_at(data, at).unwrap();
    }

    fn locate(&self, user: u64) -> (&File, u64) {
        let region = self
            .memory
            .iter()
            .find(|region| (region.user..region.user + region.size).contains(&user));
        let region = region.unwrap_or_else(|| panic!("{user:#x} is in no region"));
        (&region.file, region.offset + (user - region.user))
    }

    /// One byte for each descriptor of each queue.
    fn track(&self, queue: u32, head: u16, state: u8) {
        if let Some(file) = &self.inflight {
            file.write_all_at(&[state], u64::from(queue) * 1024 + u64::from(head)).unwrap();
        }
    }

    fn resubmit(&mut self, queue: u32) {
        let Some(file) = &self.inflight else { return };
        let mut tracked = [0; 1024];
        file.read_exact_at(&mut tracked, u64::from(queue) * 1024).unwrap();
        let begun = (0_u16..).zip(tracked).filter(|(_, state)| *state == 1);
        let ring = self.vrings.get_mut(&queue).unwrap();
        ring.resubmitted = begun.map(|(head, _)| head).collect();
        ring.resubmitted.reverse();
        // Behind what was begun; the base is where it was given back to.
        let count = u16::try_from(ring.resubmitted.len()).unwrap();
        if ring.kick.is_none() {
            ring.base = ring.base.wrapping_add(count);
        }
    }
}

fn run(listener: &UnixListener, shared: &Shared) {
    listener.set_nonblocking(true).unwrap();
    loop {
        let mut fds = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
        let tick = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let _ = rustix::event::poll(&mut fds, Some(&tick));
        if shared.state.lock().unwrap().dead {
            return;
        }
        let Ok((connection, _)) = listener.accept() else { continue };
        connection.set_nonblocking(false).unwrap();
        let mut state = shared.state.lock().unwrap();
        state.connection = Some(connection.try_clone().unwrap());
        state.connections += 1;
        shared.changed.notify_all();
        drop(state);
        serve(connection, shared);
        // A daemon forgets everything with its frontend.
        let mut state = shared.state.lock().unwrap();
        state.connection = None;
        state.vrings.clear();
        state.memory.clear();
        state.channel = None;
        state.inflight = None;
        state.features = None;
        shared.changed.notify_all();
    }
}

fn serve(mut connection: UnixStream, shared: &Shared) {
    while let Some((request, flags, body, fds)) = receive(&mut connection) {
        let mut state = shared.state.lock().unwrap();
        state.heard.push(request);
        let twist = state.twists.get(&u32::from(request)).cloned();
        let acknowledged = || (flags & 8 != 0).then(|| (vec![0; 8], Vec::new()));
        let answer = state.act(request, &body, fds).or_else(acknowledged);
        shared.changed.notify_all();
        drop(state);
        let answer = match (answer, twist) {
            (_, Some(Twist::Silence)) => continue,
            (_, Some(Twist::HangUp)) => return,
            (_, Some(Twist::Raw(bytes))) => {
                let _ = connection.write_all(&bytes);
                continue;
            }
            (_, Some(Twist::Refuse)) => Some((1_u64.to_ne_bytes().to_vec(), Vec::new())),
            (Some((body, _)), Some(Twist::Fds(count))) => {
                let fd = || memfd_create("fd", MemfdFlags::CLOEXEC).unwrap();
                Some((body, (0..count).map(|_| fd()).collect()))
            }
            (answer, _) => answer,
        };
        if let Some((body, fds)) = answer {
            send(&connection, &message(request.into(), 5, &body), &fds);
        }
    }
}

pub(super) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let header: Vec<u8> = [request, flags, size].into_iter().flat_map(u32::to_ne_bytes).collect();
    [&header[..], body].concat()
}

fn send(connection: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let _ = sendmsg(connection, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}

type Received = (FrontendReq, u32, Vec<u8>, Vec<OwnedFd>);

fn receive(connection: &mut UnixStream) -> Option<Received> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(&mut header)];
    let flags = RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(&*connection, &mut data, &mut control, flags).ok()?;
    if received.bytes < header.len() {
        return None;
    }
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8).try_into().unwrap()];
    match connection.read_exact(&mut body) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return None,
        result => result.ok()?,
    }
    assert_eq!(word(4) & 7, 1, "version 1, and no reply");
    let request = FrontendReq::try_from(word(0)).expect("a request that there is");
    Some((request, word(4), body, fds))
}

type Answer = Option<(Vec<u8>, Vec<OwnedFd>)>;

fn number(value: u64) -> Answer {
    Some((value.to_ne_bytes().to_vec(), Vec::new()))
}

impl State {
    fn act(&mut self, request: FrontendReq, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let traits = self.traits.clone().unwrap();
        let u32_at = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
        let mut fds = fds.into_iter();
        match request {
            FrontendReq::GET_FEATURES => return number(traits.features),
            FrontendReq::SET_FEATURES => self.features = Some(u64_at(0)),
            FrontendReq::GET_PROTOCOL_FEATURES => return number(traits.protocol.bits()),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                self.protocol = Protocol::from_bits(u64_at(0));
            }
            FrontendReq::GET_QUEUE_NUM => return number(traits.queues),
            FrontendReq::GET_MAX_MEM_SLOTS => return number(traits.slots),
            FrontendReq::SET_BACKEND_REQ_FD => {
                self.channel = Some(UnixStream::from(fds.next().unwrap()));
            }
            FrontendReq::GET_CONFIG => {
                let (offset, size) = (u32_at(0) as usize, u32_at(4) as usize);
                let part = &traits.config[offset..offset + size];
                return Some(([&body[..12], part].concat(), Vec::new()));
            }
            FrontendReq::SET_CONFIG => {
                let (offset, size) = (u32_at(0) as usize, u32_at(4) as usize);
                assert_eq!((u32_at(8), body.len()), (0, 12 + size));
                let config = &mut self.traits.as_mut().unwrap().config;
                config[offset..offset + size].copy_from_slice(&body[12..]);
            }
            FrontendReq::SET_MEM_TABLE => {
                let count = u32_at(0) as usize;
                assert_eq!(body.len(), 8 + 32 * count);
                let region =
                    |at: usize| (u64_at(at), u64_at(at + 8), u64_at(at + 16), u64_at(at + 24));
                let region = |(index, fd): (usize, OwnedFd)| {
                    let (guest, size, user, offset) = region(8 + 32 * index);
                    Region { guest, size, user, offset, file: File::from(fd) }
                };
                self.memory = (0..count).zip(fds).map(region).collect();
                assert_eq!(self.memory.len(), count, "a descriptor for each region");
            }
            FrontendReq::ADD_MEM_REG => {
                let [guest, size, user, offset] = [8, 16, 24, 32].map(u64_at);
                let file = File::from(fds.next().unwrap());
                self.memory.push(Region { guest, size, user, offset, file });
            }
            FrontendReq::REM_MEM_REG => {
                let [guest, size, user] = [8, 16, 24].map(u64_at);
                let before = self.memory.len();
                self.memory.retain(|region| {
                    (region.guest, region.size, region.user) != (guest, size, user)
                });
                assert_eq!(self.memory.len() + 1, before, "a region that there is");
            }
            FrontendReq::SET_VRING_NUM => self.vring(u32_at(0)).size = u32_at(4),
            FrontendReq::SET_VRING_BASE => {
                self.vring(u32_at(0)).base = u32_at(4).try_into().unwrap();
            }
            FrontendReq::SET_VRING_ADDR => {
                let ring = self.vring(u32_at(0));
                [ring.descriptors, ring.used, ring.available] = [8, 16, 24].map(u64_at);
            }
            FrontendReq::SET_VRING_KICK => {
                self.resubmit(u32_at(0));
                self.vring(u32_at(0)).kick = fds.next();
            }
            FrontendReq::SET_VRING_CALL => self.vring(u32_at(0)).call = fds.next(),
            FrontendReq::SET_VRING_ERR => self.vring(u32_at(0)).error = fds.next(),
            FrontendReq::SET_VRING_ENABLE => self.vring(u32_at(0)).enabled = u32_at(4) == 1,
            FrontendReq::GET_VRING_BASE => {
                let ring = self.vring(u32_at(0));
                ring.kick = None;
                ring.call = None;
                let base = u32::from(ring.base);
                return Some(([&body[..4], &base.to_ne_bytes()].concat(), Vec::new()));
            }
            FrontendReq::GET_INFLIGHT_FD => {
                let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
                ftruncate(&file, 16 * 1024).unwrap();
                let mut body = body.to_vec();
                body[..8].copy_from_slice(&(16 * 1024_u64).to_ne_bytes());
                return Some((body, vec![file]));
            }
            FrontendReq::SET_INFLIGHT_FD => self.inflight = fds.next().map(File::from),
            FrontendReq::SET_STATUS => self.status.push(u64_at(0)),
            FrontendReq::RESET_DEVICE => self.features = None,
            FrontendReq::SET_OWNER => {}
            other => panic!("{other:?} is never sent"),
        }
        None
    }

    fn vring(&mut self, index: u32) -> &mut Vring {
        self.vrings.entry(index).or_default()
    }
}
