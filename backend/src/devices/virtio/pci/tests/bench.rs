//! A function with the world around it, and a driver.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::super::layout::common as at;
use super::super::{CoreBacking, VirtioFunction};
use super::core::{Echo, QUEUE_SIZE};
use crate::devices::virtio::crash::tests::{kill_at, spare, survives};
use crate::devices::virtio::spec::{descriptor, feature, status};
use crate::devices::{Context, Device, Transfers};
use crate::dma::{DmaAccess, DmaTable, Iova};
use crate::irq::{EventFd, Interrupts};
use crate::pci::{BarIndex, Effects, Function, FunctionState, ResetKind, spec};
use crate::state::Scratch;

pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
/// Where guest memory is, and how much there is.
pub(super) const MEMORY: u64 = 0x10_0000;
const MEMORY_SIZE: u64 = 0x10_0000;
/// Of each queue: descriptors, then available and used ring, then buffers.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
const QUEUE: u64 = 0x10000;
const COMMAND_ON: u16 = 0b110;
pub(super) const NO_VECTOR: u64 = 0xffff;
pub(super) const ALL_SET: u8 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

pub(super) struct Bench {
    pub(super) device: VirtioFunction,
    pub(super) core: Echo,
    pub(super) function: Function,
    interrupts: Interrupts,
    dma: DmaTable,
    transfers: Transfers,
    memory: File,
    msix: Vec<OwnedFd>,
    pin: OwnedFd,
    available: Vec<u16>,
    used: Vec<u16>,
    /// If its process may be killed.
    life: Option<Life>,
}

/// What outlives the process of a function.
#[derive(Clone)]
pub(super) struct Life {
    scratch: Scratch,
    /// What was saved at the end of the last access that changed something: registers and device.
    saved: Option<(FunctionState, Vec<u8>)>,
    revision: Option<u64>,
    /// After how many points each process is killed.
    kills: VecDeque<u64>,
    killed: usize,
    /// After how many of them somebody went on.
    gone_on: usize,
}

impl Bench {
    /// At power-on, decoding and mastering the bus.
    pub(super) fn new(queues: usize) -> Self {
        Self::with_memory(queues, File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()))
    }

    fn with_memory(queues: usize, memory: File) -> Self {
        let core = Echo::new(queues);
        let backing = CoreBacking::new(Box::new(core.clone())).unwrap();
        let mut device = VirtioFunction::new(Box::new(backing)).unwrap();
        device.set_name("test");
        let function = Function::new(device.spec()).unwrap();
        let vectors = queues + 1;
        let mut interrupts = Interrupts::new(0, vectors);
        let fd = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let ours = |fd: &OwnedFd| Some(EventFd::new(fd.try_clone().unwrap()).unwrap());
        let msix: Vec<OwnedFd> = (0..vectors).map(|_| fd()).collect();
        for (vector, fd) in msix.iter().enumerate() {
            interrupts.msix.set_eventfd(vector, ours(fd)).unwrap();
        }
        let pin = fd();
        interrupts.intx.set_eventfd(ours(&pin));
        let mut bench = Self {
            device,
            core,
            function,
            interrupts,
            dma: DmaTable::new(8),
            transfers: Transfers::default(),
            memory,
            msix,
            pin,
            available: vec![0; queues],
            used: vec![0; queues],
            life: None,
        };
        bench.map_memory();
        bench.command(COMMAND_ON);
        bench
    }

    /// With a driver that accepted `features`, besides VERSION_1, and enabled every queue; MSI-X is
    /// on, with a vector for each queue and the last for the configuration.
    pub(super) fn driven(queues: usize, features: u64) -> Self {
        let mut bench = Self::new(queues);
        bench.enable_msix(true);
        bench.drive(features);
        bench
    }

    /// Sets the device up as [`driven`](Self::driven) does, but for MSI-X.
    pub(super) fn drive(&mut self, features: u64) {
        self.negotiate(features | feature::VERSION_1);
        self.set(at::CONFIG_MSIX_VECTOR, 2, self.available.len() as u64);
        for queue in 0..self.available.len() {
            self.set_up_queue(u16::try_from(queue).unwrap());
        }
        self.set(at::DEVICE_STATUS, 1, ALL_SET.into());
    }

    /// Up to FEATURES_OK, which is in the status that is returned if the device agreed.
    pub(super) fn negotiate(&mut self, features: u64) -> u8 {
        self.set(at::DEVICE_STATUS, 1, 1);
        self.set(at::DEVICE_STATUS, 1, 3);
        for (select, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(at::DRIVER_FEATURE_SELECT, 4, select);
            self.set(at::DRIVER_FEATURE, 4, bits);
        }
        self.set(at::DEVICE_STATUS, 1, 11);
        self.status()
    }

    /// Tells the device where a queue is, enables it, and begins at its start.
    pub(super) fn set_up_queue(&mut self, queue: u16) {
        let base = ring(queue);
        self.set(at::QUEUE_SELECT, 2, queue.into());
        self.set(at::QUEUE_MSIX_VECTOR, 2, queue.into());
        self.set(at::QUEUE_DESC, 8, base);
        self.set(at::QUEUE_DRIVER, 8, base + AVAILABLE);
        self.set(at::QUEUE_DEVICE, 8, base + USED);
        self.put(base + AVAILABLE, &[0; 4]);
        self.put(base + USED, &[0; 4]);
        self.available[usize::from(queue)] = 0;
        self.used[usize::from(queue)] = 0;
        self.set(at::QUEUE_ENABLE, 2, 1);
    }

    /// Makes a request available, whose answer has so much room. Nothing is kicked.
    pub(super) fn send(&mut self, queue: u16, data: &[u8]) -> u16 {
        let index = self.available[usize::from(queue)] % (QUEUE_SIZE / 2);
        let (first, second) = (2 * index, 2 * index + 1);
        let buffer = ring(queue) + BUFFERS + u64::from(index) * 0x100;
        self.put(buffer, data);
        let length = u32::try_from(data.len()).unwrap();
        self.describe(queue, first, buffer, length, descriptor::NEXT, second);
        self.describe(queue, second, buffer + 0x80, length, descriptor::WRITE, 0);
        self.make_available(queue, first);
        first
    }

    pub(super) fn describe(
        &mut self,
        queue: u16,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(ring(queue) + u64::from(index) * descriptor::SIZE, &bytes);
    }

    pub(super) fn make_available(&mut self, queue: u16, head: u16) {
        let base = ring(queue) + AVAILABLE;
        let position = self.available[usize::from(queue)];
        self.put(base + 4 + 2 * u64::from(position % QUEUE_SIZE), &head.to_le_bytes());
        self.available[usize::from(queue)] = position.wrapping_add(1);
        self.put(base + 2, &position.wrapping_add(1).to_le_bytes());
    }

    /// `used_event`, or `flags` of the available ring.
    pub(super) fn set_used_event(&mut self, queue: u16, index: u16) {
        let at = ring(queue) + AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
        self.put(at, &index.to_le_bytes());
    }

    /// Which requests came back since the last call, and what was written for them.
    pub(super) fn used(&mut self, queue: u16) -> Vec<(u16, Vec<u8>)> {
        let base = ring(queue) + USED;
        let index = u16::from_le_bytes(self.get(base + 2, 2).try_into().unwrap());
        let mut found = Vec::new();
        while self.used[usize::from(queue)] != index {
            let position = self.used[usize::from(queue)];
            self.used[usize::from(queue)] = position.wrapping_add(1);
            let entry = self.get(base + 4 + 8 * u64::from(position % QUEUE_SIZE), 8);
            let head = u16::from_le_bytes([entry[0], entry[1]]);
            let written = usize::from(entry[4]);
            let buffer = ring(queue) + BUFFERS + u64::from(head / 2) * 0x100 + 0x80;
            found.push((head, self.get(buffer, written)));
        }
        found
    }

    /// A write to the queue's page for notifications.
    pub(super) fn kick(&mut self, queue: u16) {
        self.write(BarIndex::BAR0, 0x4000 + 0x1000 * u64::from(queue), &queue.to_le_bytes());
    }

    /// What the event loop does when a wake of the device's is signalled.
    pub(super) fn wake(&mut self, index: usize) {
        self.turn(|device, context| device.woken(index, context));
    }

    /// The index of the core's own wake.
    pub(super) fn core_wake(&self) -> usize {
        self.available.len()
    }

    pub(super) fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_all_at(data, address - MEMORY).unwrap();
    }

    pub(super) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_exact_at(&mut data, address - MEMORY).unwrap();
        data
    }

    /// Writes a field of the common configuration.
    pub(super) fn set(&mut self, offset: u64, width: usize, value: u64) {
        self.write(BarIndex::BAR0, offset, &value.to_le_bytes()[..width]);
    }

    /// Reads one.
    pub(super) fn field(&mut self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.read(BarIndex::BAR0, offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    pub(super) fn status(&mut self) -> u8 {
        u8::try_from(self.field(at::DEVICE_STATUS, 1)).unwrap()
    }

    pub(super) fn isr(&mut self) -> u8 {
        u8::try_from(self.field(ISR, 1)).unwrap()
    }

    pub(super) fn read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.with(|device, context| device.bar_read(bar, offset, data, context));
    }

    pub(super) fn write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.turn(|device, context| device.bar_write(bar, offset, data, context));
    }

    pub(super) fn with<R>(
        &mut self,
        call: impl FnOnce(&mut VirtioFunction, &mut Context<'_>) -> R,
    ) -> R {
        let mut context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers);
        call(&mut self.device, &mut context)
    }

    pub(super) fn command(&mut self, value: u16) {
        self.config_write(spec::header::COMMAND, &value.to_le_bytes());
    }

    pub(super) fn bus_master(&mut self, on: bool) {
        self.command(if on { COMMAND_ON } else { 0b010 });
    }

    pub(super) fn enable_msix(&mut self, on: bool) {
        let at = self.capability(spec::msix::CAPABILITY_ID);
        let control = if on { spec::msix::CONTROL_ENABLE } else { 0 };
        self.config_write(at + spec::msix::MESSAGE_CONTROL, &control.to_le_bytes());
    }

    /// Where the first capability with this ID is.
    pub(super) fn capability(&self, id: u8) -> usize {
        self.capabilities().find(|at| self.config(*at, 1)[0] == id).unwrap()
    }

    pub(super) fn capabilities(&self) -> impl Iterator<Item = usize> {
        let next = |at: usize| Some(usize::from(self.config(at, 1)[0])).filter(|at| *at != 0);
        std::iter::successors(next(spec::header::CAPABILITIES_POINTER), move |at| next(at + 1))
    }

    pub(super) fn config(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.function.config_read(offset, &mut data);
        data
    }

    pub(super) fn config_write(&mut self, offset: usize, data: &[u8]) {
        let effects = self.function.config_write(offset, data);
        self.apply(&effects);
    }

    pub(super) fn reset_function(&mut self, kind: ResetKind) {
        let effects = self.function.reset(kind);
        self.apply(&effects);
    }

    /// What the owner of a function does with effects.
    fn apply(&mut self, effects: &Effects) {
        if effects.reset.is_some() {
            self.device.quiesce();
            self.device.reset();
        }
        for vector in effects.msix.deliver.iter() {
            self.interrupts.msix.signal(vector.into());
        }
        if let Some(level) = effects.intx {
            self.interrupts.intx.set_level(level);
        }
        if effects.reset.is_none() {
            self.with(|device, context| device.effects_applied(effects, context));
        }
        if effects.msix.enabled.is_some() {
            self.with(|device, context| device.rewired(context));
        }
    }

    /// Signals of each MSI-X vector since the last call.
    pub(super) fn messages(&self) -> Vec<u64> {
        self.msix.iter().map(count).collect()
    }

    /// Edges of the pin since the last call; it stays masked until then.
    pub(super) fn edges(&mut self) -> u64 {
        let edges = count(&self.pin);
        self.interrupts.intx.unmask();
        edges
    }

    pub(super) fn map_memory(&mut self) {
        ftruncate(&self.memory, MEMORY_SIZE).unwrap();
        let file = Some((self.memory.try_clone().unwrap().into(), 0));
        self.dma.map(Iova(MEMORY), MEMORY_SIZE, DmaAccess::all(), file).unwrap();
        self.with(|device, context| device.rewired(context));
    }

    pub(super) fn unmap_memory(&mut self) {
        self.device.quiesce();
        self.dma.unmap_all().unwrap();
        self.with(|device, context| device.rewired(context));
    }

    /// Another process takes over what this one had, which is stopped.
    pub(super) fn moved(&mut self) -> Self {
        let other = self.successor();
        self.moved_to(other)
    }

    pub(super) fn moved_to(&mut self, mut other: Self) -> Self {
        (other.available, other.used) = (self.available.clone(), self.used.clone());
        self.device.quiesce();
        let registers = self.function.save();
        let state = self.device.saved().unwrap().save();
        let _ = other.function.restore(&registers).unwrap();
        other.device.saved().unwrap().restore(&state).unwrap();
        other
    }

    /// From now on its process is killed after so many points, and the next ones likewise.
    pub(super) fn is_mortal(&mut self, kills: &[u64]) {
        let saved = self.device.saved().unwrap();
        let scratch = Scratch::private(saved.scratch_words()).unwrap();
        saved.set_scratch(scratch.clone());
        let mut kills = VecDeque::from(kills.to_vec());
        kill_at(kills.pop_front().unwrap_or(u64::MAX));
        self.life =
            Some(Life { scratch, saved: None, revision: None, kills, killed: 0, gone_on: 0 });
    }

    /// How often it was killed. It is not any more.
    pub(super) fn is_spared(&mut self) -> usize {
        spare();
        self.life.take().unwrap().killed
    }

    /// What the server does with one thing that happened: it is done, and what changed is saved; or it
    /// is done again where somebody was killed.
    pub(super) fn turn(&mut self, call: impl Fn(&mut VirtioFunction, &mut Context<'_>)) {
        let Some(life) = &self.life else { return self.with(call) };
        let killed = life.gone_on;
        let attempt = |bench: &mut Self| {
            let life = bench.life.as_ref().unwrap();
            if life.killed > life.gone_on {
                bench.go_on();
            }
            bench.with(&call);
        };
        while survives(|| attempt(self)).is_none() {
            self.succeed();
        }
        let registers = self.function.save();
        let saved = self.device.saved().unwrap();
        let life = self.life.as_mut().unwrap();
        let revision = saved.revision();
        life.gone_on = life.killed;
        if revision != life.revision || life.saved.is_none() || life.killed > killed {
            life.saved = Some((registers, saved.save()));
            life.revision = revision;
        } else if let Some((of_function, _)) = &mut life.saved {
            *of_function = registers;
        }
    }

    /// It is killed while nothing happens, and somebody goes on.
    pub(super) fn is_killed(&mut self) {
        self.succeed();
        self.turn(|_, _| {});
    }

    /// Likewise, and this happens before somebody goes on.
    pub(super) fn is_killed_and(&mut self, meanwhile: impl FnOnce(&mut Self)) {
        self.succeed();
        meanwhile(self);
        self.turn(|_, _| {});
    }

    /// Likewise, but what was saved since `life` was not.
    pub(super) fn is_killed_and_has(&mut self, life: Life) {
        self.succeed();
        let killed = self.life.as_ref().unwrap().killed;
        self.life = Some(Life { killed, ..life });
        self.turn(|_, _| {});
    }

    pub(super) fn life(&self) -> Life {
        self.life.clone().unwrap()
    }

    pub(super) fn scratch(&self) -> Scratch {
        self.life().scratch
    }

    pub(super) fn file(&self) -> OwnedFd {
        self.memory.try_clone().unwrap().into()
    }

    /// The descriptor that the next request starts with.
    pub(super) fn next_head(&self, queue: u16) -> u16 {
        2 * (self.available[usize::from(queue)] % (QUEUE_SIZE / 2))
    }

    /// Another process takes the place of one that was killed.
    fn succeed(&mut self) {
        let mut life = self.life.take().unwrap();
        life.killed += 1;
        let next = life.kills.pop_front().unwrap_or(u64::MAX);
        // What was registered with the client stays.
        let mut other = self.successor();
        std::mem::swap(&mut other.interrupts, &mut self.interrupts);
        std::mem::swap(&mut other.msix, &mut self.msix);
        std::mem::swap(&mut other.pin, &mut self.pin);
        other.core.state().holds = self.core.state().holds;
        other.life = Some(life);
        *self = other;
        kill_at(next);
    }

    /// It begins where the last one was.
    fn go_on(&mut self) {
        let life = self.life.clone().unwrap();
        let saved = self.device.saved().unwrap();
        saved.set_scratch(life.scratch);
        if let Some((registers, state)) = &life.saved {
            saved.restore(state).unwrap();
            let _ = self.function.restore(registers).unwrap();
        }
        self.resume();
    }

    /// Another function at power-on, with the same guest.
    pub(super) fn successor(&self) -> Self {
        let queues = self.available.len();
        let mut other = Self::with_memory(queues, self.memory.try_clone().unwrap());
        (other.available, other.used) = (self.available.clone(), self.used.clone());
        other
    }

    pub(super) fn resume(&mut self) {
        self.with(|device, context| device.saved().unwrap().resume(context));
    }
}

/// Where a queue's memory is.
pub(super) fn ring(queue: u16) -> u64 {
    MEMORY + u64::from(queue) * QUEUE
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}
