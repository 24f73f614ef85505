//! A function with its client and its driver, as far as they matter here.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::fake::{Fake, PATIENCE, Traits};
use crate::config::{ConfigError, DeviceSpec};
use crate::devices::vhost_user::bridge::Bridge;
use crate::devices::vhost_user::options::Options;
use crate::devices::virtio::pci::VirtioFunction;
use crate::devices::virtio::spec::{descriptor, feature, status};
use crate::devices::{Context, Device, Transfers};
use crate::dma::{DmaAccess, DmaTable, Iova};
use crate::irq::{EventFd, Interrupts};
use crate::pci::{BarIndex, Function, spec};

pub(super) struct Bench {
    pub(super) device: VirtioFunction,
    pub(super) function: Function,
    pub(super) interrupts: Interrupts,
    pub(super) dma: DmaTable,
    transfers: Transfers,
    /// Guest memory.
    pub(super) memory: File,
    /// The client's eventfds, by vector.
    vectors: Vec<OwnedFd>,
    pin: OwnedFd,
    available: Vec<u16>,
    next: Vec<u16>,
}

/// Where the memory is for the driver, and how much there is of it.
pub(super) const MEMORY: u64 = 0x4000_0000;
pub(super) const SIZE: u64 = 4 << 20;
/// Each queue has so much, with its descriptors at the start.
const QUEUE: u64 = 0x10000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
pub(super) const ENTRIES: u16 = 64;
const COMMAND: [u16; 2] = [0b010, 0b110];

/// A socket in a folder of its own, which goes away with it.
pub(super) struct Place {
    _folder: tempfile::TempDir,
    pub(super) socket: PathBuf,
}

impl Place {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("daemon.sock");
        Self { _folder: folder, socket }
    }
}

pub(super) fn bridge(text: &str, place: &Place, patience: Duration) -> Result<Bridge, ConfigError> {
    let text = format!("vhost-user,{text},socket={}", place.socket.display());
    let mut parameters = text.parse::<DeviceSpec>().unwrap().parameters;
    let options = Options::from_parameters(&mut parameters)?;
    parameters.finish()?;
    Bridge::new(Options { patience, ..options })
}

/// A disk whose driver has set everything up, and its daemon.
pub(super) fn disk(traits: Traits) -> (Bench, Fake, Place) {
    let place = Place::new();
    let fake = Fake::start(&place.socket, traits);
    let mut bench = Bench::new("type=blk,queues=2", &place);
    bench.drive();
    (bench, fake, place)
}

impl Bench {
    pub(super) fn new(text: &str, place: &Place) -> Self {
        Self::behind(bridge(text, place, PATIENCE).unwrap())
    }

    pub(super) fn behind(bridge: Bridge) -> Self {
        let device = VirtioFunction::new(Box::new(bridge)).unwrap();
        let function = Function::new(device.spec()).unwrap();
        let vectors = function.spec().msix.unwrap().vectors.count();
        let fd = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, SIZE).unwrap();
        let mut dma = DmaTable::new(64);
        assert!(device.needs_window_files());
        dma.keep_files(64);
        let mut interrupts = Interrupts::new(1, vectors.into());
        let pin = fd();
        interrupts.intx.set_eventfd(Some(EventFd::new(pin.try_clone().unwrap()).unwrap()));
        let mut bench = Self {
            device,
            function,
            interrupts,
            dma,
            transfers: Transfers::default(),
            memory: File::from(memory),
            vectors: (0..vectors).map(|_| fd()).collect(),
            pin,
            available: vec![0; 16],
            next: vec![0; 16],
        };
        bench.map(MEMORY, 0, SIZE);
        bench
    }

    /// Everything that a driver does before its first request, with MSI-X.
    pub(super) fn drive(&mut self) {
        self.command(true);
        self.enable_msix(true);
        self.connect_vectors();
        let features = self.offered();
        self.set_up(features);
    }

    pub(super) fn map(&mut self, iova: u64, offset: u64, size: u64) {
        let file = OwnedFd::from(self.memory.try_clone().unwrap());
        self.dma.map(Iova(iova), size, DmaAccess::all(), Some((file, offset))).unwrap();
        self.rewired();
    }

    pub(super) fn unmap(&mut self, iova: u64, size: u64) {
        self.device.quiesce();
        self.dma.unmap(Iova(iova), size).unwrap();
        self.rewired();
    }

    pub(super) fn rewired(&mut self) {
        self.with(|device, context| device.rewired(context));
    }

    /// Memory decode is always on; bus mastering is, or not.
    pub(super) fn command(&mut self, bus_master: bool) {
        let value = COMMAND[usize::from(bus_master)].to_le_bytes();
        let effects = self.function.config_write(spec::header::COMMAND, &value);
        self.with(|device, context| device.effects_applied(&effects, context));
    }

    pub(super) fn enable_msix(&mut self, enabled: bool) {
        let byte = |at: usize| {
            let mut byte = [0];
            self.function.config_read(at, &mut byte);
            usize::from(byte[0])
        };
        let mut at = byte(0x34);
        while byte(at) != 0x11 {
            at = byte(at + 1);
        }
        let control = [0, u8::from(enabled) << 7];
        let effects = self.function.config_write(at + 2, &control);
        self.with(|device, context| {
            device.effects_applied(&effects, context);
            device.rewired(context);
        });
    }

    pub(super) fn mask(&mut self, vector: u64, masked: bool) {
        let effects = self.function.msix_table_write(vector * 16 + 12, &[masked.into()]);
        for vector in effects.msix.deliver.iter() {
            self.interrupts.msix.signal(vector.into());
        }
        self.rewired();
    }

    pub(super) fn connect_vectors(&mut self) {
        for (vector, fd) in self.vectors.iter().enumerate() {
            let eventfd = EventFd::new(fd.try_clone().unwrap()).unwrap();
            self.interrupts.msix.set_eventfd(vector, Some(eventfd)).unwrap();
        }
        self.rewired();
    }

    /// How often a vector was signalled since this was last asked.
    pub(super) fn signals(&self, vector: usize) -> u64 {
        take(&self.vectors[vector])
    }

    pub(super) fn pin_signals(&self) -> u64 {
        take(&self.pin)
    }

    pub(super) fn offered(&mut self) -> u64 {
        let mut features = 0;
        for half in [0_u32, 1] {
            self.write(0x00, &half.to_le_bytes());
            features |= u64::from(self.read_u32(0x04)) << (32 * half);
        }
        features
    }

    /// Negotiates features and enables every queue, with a vector of its own behind that of the
    /// configuration.
    pub(super) fn set_up(&mut self, features: u64) {
        self.set_up_at(features, MEMORY);
    }

    /// The same, with the queues from an address on.
    pub(super) fn set_up_at(&mut self, features: u64, rings: u64) {
        assert_ne!(features & feature::VERSION_1, 0);
        self.set_status(0);
        self.available.fill(0);
        self.next.fill(0);
        self.memory.write_all_at(&vec![0; 0x10_0000], 0).unwrap();
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        for half in [0_u32, 1] {
            self.write(0x08, &half.to_le_bytes());
            let part = u32::try_from(features >> (32 * half) & 0xffff_ffff).unwrap();
            self.write(0x0c, &part.to_le_bytes());
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(ready);
        assert_eq!(self.status(), ready);
        self.write(0x10, &0_u16.to_le_bytes());
        for queue in 0..self.queues() {
            self.enable_queue_at(queue, rings + u64::from(queue) * QUEUE);
        }
        self.set_status(ready | status::DRIVER_OK);
    }

    pub(super) fn enable_queue(&mut self, queue: u16) {
        let rings = MEMORY + u64::from(queue) * QUEUE;
        self.enable_queue_at(queue, rings);
    }

    fn enable_queue_at(&mut self, queue: u16, rings: u64) {
        self.write(0x16, &queue.to_le_bytes());
        self.write(0x18, &ENTRIES.to_le_bytes());
        self.write(0x1a, &(queue + 1).to_le_bytes());
        for (at, address) in [(0x20, rings), (0x28, rings + AVAILABLE), (0x30, rings + USED)] {
            self.write(at, &address.to_le_bytes());
        }
        self.write(0x1c, &1_u16.to_le_bytes());
    }

    pub(super) fn reset_queue(&mut self, queue: u16) {
        self.write(0x16, &queue.to_le_bytes());
        self.write(0x3a, &1_u16.to_le_bytes());
        let rings = usize::from(queue);
        self.available[rings] = 0;
        self.next[rings] = 0;
        self.memory.write_all_at(&[0; 0x10000], u64::from(queue) * QUEUE).unwrap();
    }

    pub(super) fn queues(&mut self) -> u16 {
        let mut data = [0; 2];
        self.read(0x12, &mut data);
        u16::from_le_bytes(data)
    }

    pub(super) fn status(&mut self) -> u8 {
        let mut data = [0];
        self.read(0x14, &mut data);
        data[0]
    }

    pub(super) fn set_status(&mut self, status: u8) {
        self.write(0x14, &[status]);
    }

    pub(super) fn needs_reset(&mut self) -> bool {
        self.status() & status::DEVICE_NEEDS_RESET != 0
    }

    pub(super) fn config(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xff; length];
        self.read(0x2000 + offset, &mut data);
        data
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.write(0x2000 + offset, data);
    }

    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.with(|device, context| device.bar_read(BarIndex::BAR0, offset, data, context));
    }

    fn read_u32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        self.with(|device, context| device.bar_write(BarIndex::BAR0, offset, data, context));
    }

    /// Makes a request of one buffer available, without a kick. Returns its head.
    pub(super) fn send(&mut self, queue: u16, data: &[u8]) -> u16 {
        let index = usize::from(queue);
        let rings = u64::from(queue) * QUEUE;
        let head = self.next[index];
        self.next[index] = (head + 1) % ENTRIES;
        let buffer = 0x10_0000 + rings + u64::from(head) * 512;
        self.memory.write_all_at(data, buffer).unwrap();
        let mut bytes = (MEMORY + buffer).to_le_bytes().to_vec();
        bytes.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        bytes.extend([0; 4]);
        let at = rings + u64::from(head) * descriptor::SIZE;
        self.memory.write_all_at(&bytes, at).unwrap();
        self.make_available(queue, head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub(super) fn make_available(&mut self, queue: u16, head: u16) {
        let index = usize::from(queue);
        let slot = self.available[index] % ENTRIES;
        let ring = u64::from(queue) * QUEUE + AVAILABLE;
        self.memory.write_all_at(&head.to_le_bytes(), ring + 4 + 2 * u64::from(slot)).unwrap();
        self.overstate(queue, 1);
    }

    /// Says that so many requests more are available.
    pub(super) fn overstate(&mut self, queue: u16, by: u16) {
        let available = &mut self.available[usize::from(queue)];
        *available = available.wrapping_add(by);
        let ring = u64::from(queue) * QUEUE + AVAILABLE;
        self.memory.write_all_at(&available.to_le_bytes(), ring + 2).unwrap();
    }

    pub(super) fn set_avail_flags(&mut self, queue: u16, flags: u16) {
        let ring = u64::from(queue) * QUEUE + AVAILABLE;
        self.memory.write_all_at(&flags.to_le_bytes(), ring).unwrap();
    }

    /// Kicks as a VMM does that knows the doorbell's eventfd.
    pub(super) fn ring_doorbell(&self, queue: u16) {
        self.device.doorbells(BarIndex::BAR0)[usize::from(queue)].eventfd.signal();
    }

    /// Kicks by a write that is forwarded.
    pub(super) fn notify(&mut self, queue: u16) {
        self.write(0x4000 + 0x1000 * u64::from(queue), &queue.to_le_bytes());
    }

    /// The heads that were given back, since the driver set the queue up.
    pub(super) fn used(&self, queue: u16) -> Vec<u32> {
        let ring = u64::from(queue) * QUEUE + USED;
        let mut index = [0; 2];
        self.memory.read_exact_at(&mut index, ring + 2).unwrap();
        let head = |slot: u16| {
            let mut head = [0; 4];
            let at = ring + 4 + 8 * u64::from(slot % ENTRIES);
            self.memory.read_exact_at(&mut head, at).unwrap();
            u32::from_le_bytes(head)
        };
        (0..u16::from_le_bytes(index)).map(head).collect()
    }

    /// The head that was given back last.
    pub(super) fn last_used(&self, queue: u16) -> u32 {
        *self.used(queue).last().unwrap()
    }

    /// Serves the device's wakes, as the event loop does, until something is so.
    pub(super) fn serve_until(&mut self, mut so: impl FnMut(&mut Self) -> bool) {
        let late = std::time::Instant::now() + PATIENCE;
        while !so(self) {
            assert!(std::time::Instant::now() < late, "it never came to that");
            let tick = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let wakes = self.device.wakes();
            let mut fds = [PollFd::from_borrowed_fd(wakes[0].as_fd(), PollFlags::IN)];
            let ready = poll(&mut fds, Some(&tick)).unwrap() > 0;
            drop(wakes);
            if ready {
                self.with(|device, context| device.woken(0, context));
            }
        }
    }

    pub(super) fn reload(&mut self) {
        self.with(|device, context| device.reload(context)).unwrap();
    }

    /// Serves the device's wakes that there are.
    pub(super) fn serve(&mut self) {
        self.with(|device, context| device.woken(0, context));
    }

    fn with<R>(&mut self, call: impl FnOnce(&mut VirtioFunction, &mut Context<'_>) -> R) -> R {
        let mut context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        call(&mut self.device, &mut context)
    }
}

fn take(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}
