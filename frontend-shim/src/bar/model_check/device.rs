//! A backend in memory: one PCI function with a trapped BAR0 and a BAR2 that may be mapped. When its
//! process has died, another may be started, with memory of its own.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceFlags, DeviceInfo, FaultReport, FaultVerdict, PciRegion, RegionFlags,
    RegionInfo, RegionState, SparseArea,
};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::bar::Backend;
use crate::client::ClientError;
use crate::sync::{AtomicU64, Ordering};

/// BAR2: the one that is mapped.
pub(super) const BAR2: u8 = 2;
pub(super) const BAR2_SIZE: u64 = 0x1_0000;
pub(super) const BAR0_SIZE: u64 = 0x1000;
/// What a sparse BAR2 leaves out, as around an MSI-X table.
const HOLE: SparseArea = SparseArea { offset: 0x4000, size: 0x1000 };

pub(super) const COMMAND: u16 = 0x04;
pub(super) const BARS: u16 = 0x10;
pub(super) const PMCSR: u16 = 0x44;
/// Device Control, with Initiate FLR in bit 15.
pub(super) const DEVICE_CONTROL: u16 = 0x68;
const MEMORY: u8 = 1 << 1;

/// What a backend and the memory that it shares are like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// It offers the extensions, and looks at its Command register itself.
    pub(super) barkeep: bool,
    pub(super) backing: Backing,
    /// BAR2 is mapped in two parts.
    pub(super) sparse: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// As vfio-pci: it refuses at once when the function does not decode.
    Refusing,
    /// As a memfd: it goes on to work.
    Open,
    /// It refuses always, whatever the backend says.
    Broken,
}

/// What a guest does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    /// Of a value that no other write has.
    Write(u32),
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) index: usize,
    pub(super) kind: Kind,
    /// Of std and never held for long: threads change where `turn` is touched.
    state: Mutex<DeviceState>,
    turn: AtomicU64,
}

#[derive(Debug)]
pub(super) struct DeviceState {
    config: Vec<u8>,
    /// The process that serves, or that served last; from 0 on.
    process: u64,
    /// The last one that the VMM is known to have for its backend.
    pub(super) resumed: u64,
    pub(super) dead: bool,
    /// It dies when it has done what is asked of it next, before it answers.
    pub(super) dies_answering: bool,
    /// A request has failed for that.
    pub(super) noticed: bool,
    epoch: u64,
    /// Every write that reached the device.
    pub(super) applied: Vec<u32>,
    /// What the guest wants: the last it wrote.
    pub(super) wanted: bool,
    pub(super) placed: u64,
    /// The same, of the process before.
    placed_before: u64,
    /// Somebody else changed decode, or the addresses.
    pub(super) decode_behind: bool,
    address_behind: bool,
    /// Command and BARs before a reset by somebody else.
    saved: Vec<u8>,
}

impl Device {
    pub(super) fn new(index: usize, kind: Kind) -> Self {
        let mut config = vec![0; 0x100];
        config[0x06] = 1 << 4;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x60]);
        config[0x60..0x62].copy_from_slice(&[0x10, 0x00]);
        let state = DeviceState {
            config,
            process: 0,
            resumed: 0,
            dead: false,
            dies_answering: false,
            noticed: false,
            epoch: 0,
            applied: Vec::new(),
            wanted: false,
            placed: 0,
            placed_before: 0,
            decode_behind: false,
            address_behind: false,
            saved: Vec::new(),
        };
        Self { index, kind, state: Mutex::new(state), turn: AtomicU64::new(0) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, DeviceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks it after any other thread may have run.
    fn arrive(&self) -> MutexGuard<'_, DeviceState> {
        self.turn.fetch_add(1, Ordering::Relaxed);
        self.lock()
    }

    /// What reads of this address of a BAR return.
    pub(super) fn value(&self, bar: u8, offset: u64) -> u32 {
        let index = u32::try_from(self.index).unwrap();
        0xd000_0000 | index << 20 | u32::from(bar) << 16 | u32::try_from(offset).unwrap()
    }

    /// A guest access through a slot; `None` if the memory refuses. `of_process` asks the host's page
    /// tables, which don't change between the answer and the access, whose memory it is.
    pub(super) fn touch(
        &self,
        address: u64,
        offset: u64,
        access: Access,
        of_process: impl Fn() -> Option<u32>,
    ) -> Option<u32> {
        let mut state = self.lock();
        let process = u64::from(of_process()?);
        if process != state.process || state.dead {
            assert!(process >= state.resumed, "{access:?} lands in memory of a process before");
            // Nobody is there any more to see a write.
            return Some(self.value(BAR2, offset));
        }
        match self.kind.backing {
            Backing::Broken => return None,
            Backing::Refusing if !state.decodes() => return None,
            Backing::Refusing | Backing::Open => {}
        }
        // Whatever only the guest does, no access reaches a function that does not claim it.
        let known = |changed_behind: bool| !changed_behind && !state.dead;
        if known(state.decode_behind) {
            assert!(state.decodes(), "{access:?} at {address:#x} lands without decode");
        }
        if known(state.address_behind) {
            let bar = state.address(BAR2);
            assert_eq!(bar + offset, address, "{access:?} lands in a BAR that is elsewhere");
        }
        Some(self.complete(&mut state, BAR2, offset, access))
    }

    fn complete(&self, state: &mut DeviceState, bar: u8, offset: u64, access: Access) -> u32 {
        if let Access::Write(value) = access {
            state.applied.push(value);
        }
        self.value(bar, offset)
    }

    /// Somebody else, behind the VMM's back, sets decode.
    pub(super) fn decode_behind(&self, on: bool) {
        let mut state = self.arrive();
        state.decode_behind = true;
        state.epoch += 1;
        state.config[usize::from(COMMAND)] = if on { MEMORY } else { 0 };
    }

    /// Somebody else resets the function, as its driver does: what was set up is saved.
    pub(super) fn reset_behind(&self) {
        let mut state = self.arrive();
        (state.decode_behind, state.address_behind) = (true, true);
        state.saved = state.config[..0x28].to_vec();
        state.reset();
    }

    pub(super) fn restore_behind(&self) {
        let mut state = self.arrive();
        let saved = std::mem::take(&mut state.saved);
        state.epoch += 1;
        state.config[..saved.len()].copy_from_slice(&saved);
    }

    pub(super) fn die(&self) {
        self.arrive().dead = true;
    }

    pub(super) fn die_answering(&self) {
        self.arrive().dies_answering = true;
    }

    /// It does not die of what it does next.
    pub(super) fn live_on(&self) {
        self.lock().dies_answering = false;
    }

    /// Another process serves the function, from power-on; `None` while one does.
    pub(super) fn start_again(self: &Arc<Self>) -> Option<Link> {
        let mut state = self.arrive();
        if !state.dead {
            return None;
        }
        state.process += 1;
        (state.dead, state.noticed, state.dies_answering) = (false, false, false);
        (state.decode_behind, state.address_behind) = (false, false);
        state.reset();
        state.epoch = 0;
        if state.placed != 0 {
            state.placed_before = state.placed;
        }
        (state.wanted, state.placed) = (false, 0);
        state.saved.clear();
        Some(Link { device: Arc::clone(self), process: state.process })
    }
}

/// A connection to one of the processes that serve a device, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Link {
    device: Arc<Device>,
    process: u64,
}

impl Link {
    pub(super) fn first(device: &Arc<Device>) -> Self {
        Self { device: Arc::clone(device), process: 0 }
    }

    pub(super) fn process(&self) -> u64 {
        self.process
    }

    /// Whether its process has died: what an attendant sees.
    pub(super) fn is_over(&self) -> bool {
        let state = self.device.arrive();
        state.dead || state.process != self.process
    }

    /// Makes a request; as the last thing, the process may die.
    fn request<T>(&self, serve: impl FnOnce(&mut DeviceState) -> T) -> Result<T, ClientError> {
        let mut state = self.device.arrive();
        state.noticed |= state.dead && state.process == self.process;
        if state.dead || state.process != self.process {
            return Err(ClientError::Gone);
        }
        let done = serve(&mut state);
        if std::mem::take(&mut state.dies_answering) {
            (state.dead, state.noticed) = (true, true);
            return Err(ClientError::Lost);
        }
        Ok(done)
    }
}

impl DeviceState {
    pub(super) fn decodes(&self) -> bool {
        self.config[usize::from(COMMAND)] & MEMORY != 0
            && self.config[usize::from(PMCSR)] & 0b11 == 0
            && !self.dead
    }

    pub(super) fn address(&self, bar: u8) -> u64 {
        let at = usize::from(BARS) + 4 * usize::from(bar);
        u32::from_le_bytes(self.config[at..at + 4].try_into().unwrap()).into()
    }

    /// Whether the guest has put BAR2 there, as far as the VMM knows: it may not have heard yet that
    /// another process serves.
    pub(super) fn is_placed_at(&self, address: u64) -> bool {
        let unheard = self.resumed < self.process;
        address == self.placed || unheard && address == self.placed_before
    }

    /// The BAR and offset at an address, whether it decodes or not.
    pub(super) fn find(&self, address: u64) -> Option<(u8, u64)> {
        [(0, BAR0_SIZE), (BAR2, BAR2_SIZE)].into_iter().find_map(|(bar, size)| {
            let offset = address.checked_sub(self.address(bar))?;
            (offset < size).then_some((bar, offset))
        })
    }

    fn reset(&mut self) {
        self.epoch += 1;
        self.config[usize::from(COMMAND)] = 0;
        self.config[usize::from(PMCSR)] = 0;
        self.config[usize::from(BARS)..0x28].fill(0);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.epoch += 1;
        for (at, byte) in (usize::try_from(offset).unwrap()..).zip(data) {
            match u16::try_from(at).unwrap() {
                COMMAND => self.config[at] = byte & MEMORY,
                PMCSR => self.config[at] = byte & 0b11,
                // BAR0 is of 4 KiB, BAR2 of 64 KiB; the others don't exist.
                0x11 => self.config[at] = byte & 0xf0,
                0x12 | 0x13 | 0x1a | 0x1b => self.config[at] = *byte,
                0x69 if byte & 0x80 != 0 => {
                    self.reset();
                    (self.wanted, self.placed) = (false, 0);
                }
                _ => {}
            }
        }
    }
}

impl Backend for Link {
    fn name(&self) -> String {
        format!("model {}.{}", self.device.index, self.process)
    }

    fn is_dead(&self) -> bool {
        let state = self.device.lock();
        state.process != self.process || state.noticed
    }

    fn extensions(&self) -> BarkeepExtensions {
        let barkeep = self.device.kind.barkeep;
        let extensions = BarkeepExtensions::default();
        BarkeepExtensions { memory_fault: barkeep, region_state: barkeep, ..extensions }
    }

    fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        let flags = DeviceFlags::PCI | DeviceFlags::RESET;
        Ok(DeviceInfo { flags, num_regions: PciRegion::COUNT, num_irqs: 5 })
    }

    fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), ClientError> {
        let mut flags = RegionFlags::READ | RegionFlags::WRITE;
        let mut info = RegionInfo { flags, index, size: 0, file_offset: 0, sparse: Vec::new() };
        match index {
            0 => info.size = BAR0_SIZE,
            2 => {
                flags |= RegionFlags::MMAP;
                (info.flags, info.size) = (flags, BAR2_SIZE);
                if self.device.kind.sparse {
                    info.sparse = parts(true);
                }
                return Ok((info, Some(memory(self.process))));
            }
            _ => {}
        }
        Ok((info, None))
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ClientError> {
        let device = &self.device;
        self.request(|state| {
            let bar = u8::try_from(region).unwrap();
            if region == PciRegion::Config.index() {
                let at = usize::try_from(offset).unwrap();
                data.copy_from_slice(&state.config[at..at + data.len()]);
            } else if device.kind.barkeep && !state.decodes() {
                data.fill(0xff);
            } else {
                let value = device.complete(state, bar, offset, Access::Read);
                data.copy_from_slice(&value.to_le_bytes());
            }
        })
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let device = &self.device;
        if region == PciRegion::Config.index() {
            let mut state = device.arrive();
            match u16::try_from(offset).unwrap() {
                COMMAND => state.wanted = data[0] & MEMORY != 0,
                0x18 => state.placed = u32::from_le_bytes(data.try_into().unwrap()).into(),
                _ => {}
            }
        }
        self.request(|state| {
            if region == PciRegion::Config.index() {
                state.write_config(offset, data);
            } else if !device.kind.barkeep || state.decodes() {
                let value = u32::from_le_bytes(data.try_into().unwrap());
                device.complete(state, u8::try_from(region).unwrap(), offset, Access::Write(value));
            }
        })
    }

    fn reset(&self) -> Result<(), ClientError> {
        self.request(|state| {
            state.reset();
            (state.wanted, state.placed) = (false, 0);
        })
    }

    fn memory_fault(&self, report: &FaultReport) -> Result<FaultVerdict, ClientError> {
        let barkeep = self.device.kind.barkeep;
        self.request(|state| {
            let epoch = state.epoch;
            match (state.decodes(), report.region == u32::from(BAR2)) {
                (false, _) => FaultVerdict::UnsupportedRequest { epoch },
                (true, true) => FaultVerdict::Map { epoch },
                (true, false) => FaultVerdict::Trap { epoch },
            }
        })
        .and_then(|verdict| {
            if barkeep { Ok(verdict) } else { Err(ClientError::NotOffered("memory_fault")) }
        })
    }

    fn region_state(&self, _: u32) -> Result<RegionState, ClientError> {
        let barkeep = self.device.kind.barkeep;
        self.request(|state| {
            let decode = u32::from(state.decodes());
            RegionState { decode, epoch: state.epoch, ..RegionState::default() }
        })
        .and_then(|state| {
            if barkeep { Ok(state) } else { Err(ClientError::NotOffered("region_state")) }
        })
    }
}

/// The parts of BAR2 that are mapped.
pub(super) fn parts(sparse: bool) -> Vec<SparseArea> {
    let behind = HOLE.offset + HOLE.size;
    match sparse {
        false => vec![SparseArea { offset: 0, size: BAR2_SIZE }],
        true => vec![
            SparseArea { offset: 0, size: HOLE.offset },
            SparseArea { offset: behind, size: BAR2_SIZE - behind },
        ],
    }
}

/// One file for all functions in their first process, one for those in their second, and so on. What an
/// access returns does not depend on it: its words are the number of the process.
fn memory(process: u64) -> OwnedFd {
    static MEMORY: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());
    let mut files = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let index = usize::try_from(process).unwrap();
    while files.len() <= index {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("model-check", flags).unwrap();
        let word = u32::try_from(files.len()).unwrap().to_le_bytes();
        let words = word.repeat(usize::try_from(BAR2_SIZE).unwrap() / word.len());
        assert_eq!(rustix::io::write(&file, &words).unwrap(), words.len());
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        files.push(file);
    }
    files[index].try_clone().unwrap()
}
