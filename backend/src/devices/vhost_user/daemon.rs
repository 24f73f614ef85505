use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};

use super::channel::Channel;
use super::exchange::{DaemonError, Exchange};
use super::kinds::{Kind, Layout};
use super::memory::{Region, Wanted};
use crate::devices::virtio::spec::{feature, status};

/// A daemon that said what it can do, and what it was told since.
///
/// Every error means that the connection is of no use any more.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) exchange: Exchange,
    features: u64,
    protocol: Protocol,
    /// How many regions of memory it takes.
    slots: usize,
    /// Those that it has.
    memory: Vec<Region>,
    /// The features that it was told, since it was reset.
    session: Option<u64>,
}

/// What is used of the protocol where the daemon knows it.
const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::STATUS);
/// VHOST_USER_F_PROTOCOL_FEATURES
const HAS_PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Regions in one SET_MEM_TABLE.
const TABLE_SLOTS: usize = 8;
/// As many as windows keep their files.
const MAX_SLOTS: u64 = 512;
/// The longest configuration there is.
const MAX_CONFIG: usize = 256;
/// What a daemon gets that must have some memory and shall have none of the guest's.
const NOTHING: u64 = 4096;

impl Daemon {
    /// Connects and asks the first question, without waiting for its answer.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn greet(socket: &Path, patience: Duration) -> Result<Exchange, DaemonError> {
        let mut exchange = Exchange::connect(socket, patience)?;
        exchange.send_request(FrontendReq::GET_FEATURES, &[])?;
        Ok(exchange)
    }

    /// Learns what a daemon that was [greeted](Self::greet) can do.
    ///
    /// # Errors
    /// [`DaemonError`]; [`DaemonError::Unfit`] when it can't serve such a function.
    pub(super) fn negotiate(
        mut exchange: Exchange,
        kind: &Kind,
        requests: u16,
    ) -> Result<Self, DaemonError> {
        exchange.begin();
        let features = exchange.receive_u64(FrontendReq::GET_FEATURES)?;
        if features & feature::VERSION_1 == 0 {
            return Err(DaemonError::Unfit("does not know virtio 1"));
        }
        let mut protocol = Protocol::empty();
        if features & HAS_PROTOCOL != 0 {
            let offered = exchange.ask_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
            protocol = Protocol::from_bits_truncate(offered) & PROTOCOL;
            let body = protocol.bits().to_ne_bytes();
            exchange.tell(FrontendReq::SET_PROTOCOL_FEATURES, &body, &[])?;
        }
        if protocol.contains(Protocol::REPLY_ACK) {
            exchange.set_acknowledges();
        }
        let memory = Vec::new();
        let mut daemon =
            Self { exchange, features, protocol, slots: TABLE_SLOTS, memory, session: None };
        daemon.check_queues(kind, requests)?;
        if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            let slots = daemon.exchange.ask_u64(FrontendReq::GET_MAX_MEM_SLOTS)?.min(MAX_SLOTS);
            daemon.slots = usize::try_from(slots).expect("at most MAX_SLOTS");
        }
        if protocol.contains(Protocol::BACKEND_REQ) {
            let (channel, theirs) = Channel::new()?;
            let fds = [theirs.as_fd()];
            daemon.exchange.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &fds)?;
            daemon.exchange.set_channel(channel);
        }
        daemon.exchange.tell(FrontendReq::SET_OWNER, &[], &[])?;
        daemon.exchange.settle()?;
        Ok(daemon)
    }

    /// Every feature bit that it offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Whether it keeps track of requests in memory that outlives it.
    pub(super) fn has_inflight(&self) -> bool {
        self.protocol.contains(Protocol::INFLIGHT_SHMFD)
    }

    pub(super) fn has_config(&self) -> bool {
        self.protocol.contains(Protocol::CONFIG)
    }

    /// Whether rings must be enabled one by one ("Ring states").
    pub(super) fn enables_rings(&self) -> bool {
        self.features & HAS_PROTOCOL != 0
    }

    /// Reads the start of the device's configuration.
    pub(super) fn read_config(&mut self, config: &mut [u8]) -> Result<(), DaemonError> {
        const REQUEST: FrontendReq = FrontendReq::GET_CONFIG;
        let header = config_header(0, config.len());
        let body = [&header[..], &config[..]].concat();
        self.exchange.send_request(REQUEST, &body)?;
        let mut answer = [0; 12 + MAX_CONFIG];
        let (length, fds) = self.exchange.receive_some(REQUEST, &mut answer)?;
        let answer = &answer[..length];
        // "size" is 0, or nothing at all is there, if it can't.
        if answer.is_empty() || answer.get(4..8) == Some(&[0; 4]) {
            return Err(DaemonError::Refused(REQUEST));
        }
        // It may say what it likes in "flags".
        let bytes = answer.strip_prefix(&header[..8]).and_then(|rest| rest.get(4..));
        let bytes = bytes.filter(|bytes| bytes.len() == config.len() && fds.is_empty());
        let bytes = bytes.ok_or(DaemonError::Malformed(REQUEST))?;
        config.copy_from_slice(bytes);
        Ok(())
    }

    /// Writes a field of the device's configuration.
    pub(super) fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), DaemonError> {
        let body = [&config_header(offset, data.len())[..], data].concat();
        self.exchange.tell(FrontendReq::SET_CONFIG, &body, &[])
    }

    /// Tells it what the driver accepted, if it was not told since it was [reset](Self::reset).
    pub(super) fn set_features(&mut self, negotiated: u64) -> Result<(), DaemonError> {
        let features = negotiated | self.features & HAS_PROTOCOL;
        if self.session == Some(features) {
            return Ok(());
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER)?;
        self.exchange.tell(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[])?;
        self.session = Some(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK)
    }

    /// Tells it that everything is set up.
    pub(super) fn set_driver_ok(&mut self) -> Result<(), DaemonError> {
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(ready)
    }

    /// Back to the state in which it was found. Its rings are stopped.
    pub(super) fn reset(&mut self) -> Result<(), DaemonError> {
        self.exchange.begin();
        if self.session.take().is_some() {
            self.set_status(0)?;
            if self.protocol.contains(Protocol::RESET_DEVICE) {
                self.exchange.tell(FrontendReq::RESET_DEVICE, &[], &[])?;
            }
        }
        self.set_memory(&Wanted::default())?;
        self.exchange.settle()
    }

    /// Whether it has any of the guest's memory.
    pub(super) fn has_memory(&self) -> bool {
        !self.memory.is_empty()
    }

    /// How many regions of memory it takes.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// Whether its rings must be stopped for its memory to become this.
    pub(super) fn memory_moves(&self, wanted: &Wanted<'_>) -> bool {
        if self.has_slots() {
            self.memory.iter().any(|region| !wanted.contains(*region))
        } else {
            self.memory_differs(wanted)
        }
    }

    /// Gives it memory, in at most [`slots`](Self::slots) regions, and takes away what it had.
    pub(super) fn set_memory(&mut self, wanted: &Wanted<'_>) -> Result<(), DaemonError> {
        if !self.memory_differs(wanted) {
            return Ok(());
        }
        if !self.has_slots() {
            return self.set_table(wanted);
        }
        for region in std::mem::take(&mut self.memory) {
            if wanted.contains(region) {
                self.memory.push(region);
            } else {
                let body = single_region(&region.to_bytes());
                self.exchange.tell(FrontendReq::REM_MEM_REG, &body, &[])?;
            }
        }
        for (region, fd) in wanted.regions() {
            if !self.memory.contains(&region) {
                let body = single_region(&region.to_bytes());
                self.exchange.tell(FrontendReq::ADD_MEM_REG, &body, &[fd])?;
                self.memory.push(region);
            }
        }
        Ok(())
    }

    fn set_table(&mut self, wanted: &Wanted<'_>) -> Result<(), DaemonError> {
        let regions: Vec<(Region, BorrowedFd<'_>)> = wanted.regions().collect();
        let mut fds: Vec<BorrowedFd<'_>> = regions.iter().map(|(_, fd)| *fd).collect();
        let mut bytes: Vec<u8> = regions.iter().flat_map(|(region, _)| region.to_bytes()).collect();
        let nothing;
        if fds.is_empty() {
            nothing = memfd_create("barkeep-no-memory", MemfdFlags::CLOEXEC)?;
            ftruncate(&nothing, NOTHING)?;
            fds.push(nothing.as_fd());
            bytes.extend([0, NOTHING, 0, 0].into_iter().flat_map(u64::to_ne_bytes));
        }
        let count = u32::try_from(fds.len()).expect("at most TABLE_SLOTS");
        let body = [&count.to_ne_bytes()[..], &[0; 4], &bytes].concat();
        self.exchange.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)?;
        self.memory = regions.into_iter().map(|(region, _)| region).collect();
        Ok(())
    }

    fn memory_differs(&self, wanted: &Wanted<'_>) -> bool {
        let same = self.memory.iter().all(|region| wanted.contains(*region));
        !same || wanted.regions().count() != self.memory.len()
    }

    fn has_slots(&self) -> bool {
        self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS)
    }

    fn set_status(&mut self, status: u8) -> Result<(), DaemonError> {
        if !self.protocol.contains(Protocol::STATUS) {
            return Ok(());
        }
        self.exchange.tell(FrontendReq::SET_STATUS, &u64::from(status).to_ne_bytes(), &[])
    }

    /// Types with a fixed number of queues are served as they are: daemons count them differently.
    fn check_queues(&mut self, kind: &Kind, requests: u16) -> Result<(), DaemonError> {
        let Layout::Requests { .. } = kind.layout else { return Ok(()) };
        if self.protocol.contains(Protocol::MQ) {
            let most = self.exchange.ask_u64(FrontendReq::GET_QUEUE_NUM)?;
            if most < kind.layout.served(requests).into() {
                return Err(DaemonError::Unfit("has fewer queues than queues= says"));
            }
        } else if requests > 1 {
            return Err(DaemonError::Unfit("has one queue, and queues= says more"));
        }
        Ok(())
    }
}

/// "Virtio device config space": offset, size, flags.
fn config_header(offset: usize, size: usize) -> [u8; 12] {
    let mut header = [0; 12];
    let word = |value: usize| u32::try_from(value).expect("at most MAX_CONFIG").to_ne_bytes();
    header[..4].copy_from_slice(&word(offset));
    header[4..8].copy_from_slice(&word(size));
    header
}

/// "Single memory region description": padding, region.
fn single_region(region: &[u8]) -> Vec<u8> {
    [&[0; 8], region].concat()
}
