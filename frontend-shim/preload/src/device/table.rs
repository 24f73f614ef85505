use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use super::mappings::Writing;
use super::{DeviceId, Placement, Source};

const LIMIT: u32 = 256;
const NO_VM: u32 = u32::MAX;
const NO_DESCRIPTOR: RawFd = -1;

/// [`Device::kind`], before the numbers that say which connection.
const GONE: u32 = 0;
const VFIO: u32 = 1;
const FIRST_STREAM: u32 = 2;

/// Devices by id. A device's place is taken again once nothing refers to it, by one with another id.
#[derive(Debug)]
pub(super) struct Table {
    devices: Box<[Device]>,
}

/// What is known of a device. All of it can be read in a signal handler.
#[derive(Debug)]
pub(super) struct Device {
    /// One more than the id, or 0 for a place that is free.
    name: AtomicU32,
    /// The id of the next device in this place.
    next: AtomicU32,
    kind: AtomicU32,
    /// One of the VMM's own, so that the device closes when the VMM closes it.
    fd: AtomicI32,
    /// Where the configuration space is in the descriptor, in bytes.
    config: AtomicU64,
    /// Where PMCSR is in the configuration space, or 0.
    power: AtomicU32,
    vm: AtomicU32,
    /// Whether BARs decoded when their places were read.
    decoded: AtomicBool,
    /// Where they were when it was last looked.
    bars: [Bar; 6],
}

#[derive(Debug, Default)]
struct Bar {
    /// Where the BAR is in the descriptor of a VFIO device, in bytes.
    offset: AtomicU64,
    size: AtomicU64,
    address: AtomicU64,
    live: AtomicU64,
}

/// Where regions are in the descriptor of a VFIO device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self { devices: (0..LIMIT).map(Device::free).collect() }
    }
}

impl Table {
    pub(super) fn get(&self, id: DeviceId) -> Option<&Device> {
        let device = self.devices.get(id.place() as usize)?;
        device.is(id).then_some(device)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (DeviceId, &Device)> {
        self.devices.iter().filter_map(|device| Some((device.id()?, device)))
    }

    /// Adds a device, whose BARs are nowhere yet. `None` if there is no room.
    pub(super) fn add(
        &self,
        source: Source,
        config: u64,
        bars: &[Region; 6],
        _: &Writing<'_>,
    ) -> Option<DeviceId> {
        let device = self.devices.iter().find(|device| device.id().is_none())?;
        let id = DeviceId(device.next.load(Ordering::Relaxed));
        // As many as fit in a descriptor's word.
        device.next.store((id.0 + LIMIT) & ((1 << 28) - 1), Ordering::Relaxed);
        device.fill(id, source, config, bars);
        Some(id)
    }
}

impl DeviceId {
    /// Which place the device has: a small number, that another one has after it.
    pub(super) fn place(self) -> u32 {
        self.0 % LIMIT
    }
}

impl Device {
    fn free(first: u32) -> Self {
        Self {
            name: AtomicU32::new(0),
            next: AtomicU32::new(first),
            kind: AtomicU32::new(GONE),
            fd: AtomicI32::new(NO_DESCRIPTOR),
            config: AtomicU64::new(0),
            power: AtomicU32::new(0),
            vm: AtomicU32::new(NO_VM),
            decoded: AtomicBool::new(false),
            bars: Default::default(),
        }
    }

    fn fill(&self, id: DeviceId, source: Source, config: u64, bars: &[Region; 6]) {
        for (bar, region) in self.bars.iter().zip(bars) {
            bar.offset.store(region.offset, Ordering::Relaxed);
            bar.size.store(region.size, Ordering::Relaxed);
            bar.address.store(0, Ordering::Relaxed);
            bar.live.store(0, Ordering::Relaxed);
        }
        self.config.store(config, Ordering::Relaxed);
        self.power.store(0, Ordering::Relaxed);
        self.vm.store(NO_VM, Ordering::Relaxed);
        self.decoded.store(false, Ordering::Relaxed);
        let (kind, fd) = match source {
            Source::Vfio(fd) => (VFIO, fd),
            Source::VfioUser(stream) => (stream.saturating_add(FIRST_STREAM), NO_DESCRIPTOR),
        };
        self.fd.store(fd, Ordering::Relaxed);
        self.kind.store(kind, Ordering::Relaxed);
        // Who sees the name sees the rest.
        self.name.store(id.0 + 1, Ordering::Release);
    }

    /// Makes room for another device.
    pub(super) fn leave(&self, _: &Writing<'_>) {
        self.name.store(0, Ordering::Release);
    }

    /// Nobody answers any more.
    pub(super) fn gone(&self, _: &Writing<'_>) {
        self.kind.store(GONE, Ordering::Release);
        self.fd.store(NO_DESCRIPTOR, Ordering::Release);
        for bar in &self.bars {
            bar.live.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn is(&self, id: DeviceId) -> bool {
        self.id() == Some(id)
    }

    fn id(&self) -> Option<DeviceId> {
        self.name.load(Ordering::Acquire).checked_sub(1).map(DeviceId)
    }

    pub(super) fn source(&self) -> Option<Source> {
        match self.kind.load(Ordering::Acquire) {
            GONE => None,
            VFIO => match self.fd.load(Ordering::Acquire) {
                NO_DESCRIPTOR => None,
                fd => Some(Source::Vfio(fd)),
            },
            stream => Some(Source::VfioUser(stream - FIRST_STREAM)),
        }
    }

    /// The VMM closes the descriptor that was used, and has another one or none.
    pub(super) fn use_descriptor(&self, fd: Option<RawFd>) {
        self.fd.store(fd.unwrap_or(NO_DESCRIPTOR), Ordering::Release);
    }

    /// The VMM has a descriptor of a VFIO device, maybe the first.
    pub(super) fn use_if_none(&self, fd: RawFd) {
        let none = NO_DESCRIPTOR;
        let _ = self.fd.compare_exchange(none, fd, Ordering::Release, Ordering::Relaxed);
    }

    pub(super) fn config(&self) -> u64 {
        self.config.load(Ordering::Relaxed)
    }

    /// Where PMCSR is in the configuration space.
    pub(super) fn power(&self) -> Option<u64> {
        match self.power.load(Ordering::Relaxed) {
            0 => None,
            at => Some(at.into()),
        }
    }

    pub(super) fn set_power(&self, at: Option<u8>) {
        self.power.store(at.map_or(0, u32::from), Ordering::Relaxed);
    }

    pub(super) fn vm(&self) -> Option<u32> {
        Some(self.vm.load(Ordering::Relaxed)).filter(|vm| *vm != NO_VM)
    }

    pub(super) fn set_vm(&self, vm: Option<u32>) {
        self.vm.store(vm.unwrap_or(NO_VM), Ordering::Relaxed);
    }

    pub(super) fn decoded(&self) -> bool {
        self.decoded.load(Ordering::Relaxed)
    }

    pub(super) fn set_decoded(&self, decoded: bool) {
        self.decoded.store(decoded, Ordering::Relaxed);
    }

    /// Which BAR has a place in the descriptor, and where in the BAR it is.
    pub(super) fn bar_at(&self, offset: u64) -> Option<(u8, u64)> {
        (0_u8..).zip(&self.bars).find_map(|(index, bar)| {
            let inside = offset.checked_sub(bar.offset.load(Ordering::Relaxed))?;
            (inside < bar.size.load(Ordering::Relaxed)).then_some((index, inside))
        })
    }

    pub(super) fn placements(&self) -> [Placement; 6] {
        std::array::from_fn(|index| {
            let bar = &self.bars[index];
            Placement {
                size: bar.size.load(Ordering::Relaxed),
                address: bar.address.load(Ordering::Relaxed),
                live: bar.live.load(Ordering::Relaxed),
            }
        })
    }

    /// What a backend says of its BARs.
    pub(super) fn set_placements(&self, placements: &[Placement; 6]) {
        for (bar, placement) in self.bars.iter().zip(placements) {
            bar.size.store(placement.size, Ordering::Relaxed);
            bar.address.store(placement.address, Ordering::Relaxed);
            bar.live.store(placement.live, Ordering::Relaxed);
        }
    }

    /// Safe in a signal handler.
    pub(super) fn has_bar(&self, bar: u8) -> bool {
        self.bars.get(usize::from(bar)).is_some_and(|bar| bar.size.load(Ordering::Relaxed) > 0)
    }

    pub(super) fn place(&self, index: usize, address: u64, live: u64) {
        if let Some(bar) = self.bars.get(index) {
            bar.address.store(address, Ordering::Relaxed);
            bar.live.store(live, Ordering::Relaxed);
        }
    }
}
