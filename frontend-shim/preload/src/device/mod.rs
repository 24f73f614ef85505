//! Devices: which host memory is a BAR, and whether the BAR decodes.

pub(crate) mod config;
mod mappings;
mod memory;
mod table;
#[cfg(test)]
mod tests;
mod vfio;
mod windows;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use arc_swap::ArcSwap;

use self::mappings::{Mappings, Writing};
use self::table::{Region, Table};
use self::windows::Windows;
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::status::FailOpen;
use crate::system::System;

/// Which device. No two have the same, one after the other neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceId(pub(crate) u32);

/// Whether a BAR claims its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decode {
    /// It does.
    On,
    /// It does not: an access is an Unsupported Request.
    Off,
    /// The device does not tell: an access is the VMM's.
    Unknown,
}

/// Host memory that is a part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BarMapping {
    pub(crate) device: DeviceId,
    /// Region index, 0 to 5.
    pub(crate) bar: u8,
    /// Host address of the first byte.
    pub(crate) start: usize,
    /// Length in bytes.
    pub(crate) len: usize,
    /// Where in the BAR it starts, in bytes.
    pub(crate) offset: u64,
}

/// A place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BarAddress {
    pub(crate) device: DeviceId,
    /// Region index, 0 to 5.
    pub(crate) bar: u8,
    /// In bytes.
    pub(crate) offset: u64,
}

/// Where a memory BAR is, and was, in guest physical memory. A size of 0: there is no such BAR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placement {
    /// In bytes.
    pub(crate) size: u64,
    /// What its registers say.
    pub(crate) address: u64,
    /// Where it last decoded; 0 for never.
    pub(crate) live: u64,
}

/// Who answers for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The kernel, by this descriptor of a VFIO device.
    Vfio(RawFd),
    /// A vfio-user backend, on the connection with this index.
    VfioUser(u32),
}

/// How often others are let run before a backend's page is given up. One store to it takes nanoseconds.
const PATIENCE: u32 = 1_000;

/// All devices of the process, and their mappings.
///
/// Everything can be read at any time, without a lock. Changes take turns, and one that goes with a
/// change of the kernel's keeps its turn until that is done.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    table: Table,
    mappings: Mappings,
    windows: ArcSwap<Windows>,
    turn: Mutex<Turn>,
    /// The process that this memory belongs to, or 0 as long as nobody said so.
    home: AtomicU32,
}

/// What only one can have at a time: the right to change devices and mappings.
#[derive(Debug, Default)]
pub(crate) struct Turn(());

impl Devices {
    /// Keeps everything as it is, such as over a fork, until the answer is dropped.
    pub(crate) fn hold(&self) -> Writing<'_> {
        // What a panic left half done was never more than one entry behind.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: System> Shim<S> {
    /// Says that this process owns what is here: at the start, and in the child of a fork. The child
    /// of a vfork shares the memory and must not change it; it never says so.
    pub(crate) fn at_home(&self) {
        self.devices.home.store(self.system.process(), Ordering::Relaxed);
    }

    /// Whether this is another process in our memory: what it closes and unmaps is not ours.
    pub(crate) fn elsewhere(&self) -> bool {
        let home = self.devices.home.load(Ordering::Relaxed);
        home != 0 && home != self.system.process()
    }

    /// Which BAR has a byte of host memory. Safe in a signal handler.
    pub(crate) fn mapping_at(&self, host: usize) -> Option<BarMapping> {
        self.devices.mappings.at(host)
    }

    /// The mapping that a range of host memory is inside of, all of it. Safe in a signal handler.
    pub(crate) fn mappings_in(&self, host: usize, len: usize) -> Option<BarMapping> {
        self.devices.mappings.within(host, len)
    }

    /// Whether a BAR decodes now. Safe in a signal handler.
    pub(crate) fn decode(&self, device: DeviceId, bar: u8) -> Decode {
        match self.source(device) {
            Some(Source::Vfio(fd)) => self.vfio_decode(device, fd),
            Some(Source::VfioUser(stream)) => self.user_decode_soon(device, stream, bar),
            None => Decode::Unknown,
        }
    }

    /// Who answers for a device. `None` if it is gone. Safe in a signal handler.
    pub(crate) fn source(&self, device: DeviceId) -> Option<Source> {
        self.devices.table.get(device)?.source()
    }

    /// A VM has a slot with memory of this device.
    pub(crate) fn belongs(&self, device: DeviceId, vm: u32) {
        let writing = self.devices.hold();
        let Some(found) = self.devices.table.get(device) else { return };
        found.set_vm(Some(vm));
        self.refresh(device, &writing);
        self.publish_windows(&writing);
    }

    /// A VM is gone; its number may be another's next.
    pub(crate) fn belongs_no_more(&self, vm: u32) {
        let writing = self.devices.hold();
        for (_, device) in self.devices.table.all().filter(|(_, device)| device.vm() == Some(vm)) {
            device.set_vm(None);
        }
        self.publish_windows(&writing);
    }

    /// The BAR whose window in a VM a guest physical address is in. Windows are where BARs last
    /// decoded, as long as their registers have not changed since. Takes no lock and makes no system
    /// call, but may do both after a vfio-user device changed, and wait for its server; so nobody who
    /// calls this holds a lock.
    pub(crate) fn window_at(&self, vm: u32, gpa: u64) -> Option<BarAddress> {
        let mut windows = self.devices.windows.load();
        let changed = |(stream, epoch): &(u32, u64)| self.user_epoch(*stream) != *epoch;
        let mut streams = windows.epochs().iter().map(|(stream, _)| *stream);
        if streams.any(|stream| self.user_wants_look(stream)) {
            windows.epochs().iter().for_each(|(stream, _)| self.user_look(*stream));
        }
        if windows.epochs().iter().any(changed) {
            self.publish_windows(&self.devices.hold());
            windows = self.devices.windows.load();
        }
        windows.at(vm, gpa, || self.is_only_vm(vm))
    }

    /// Host memory is a part of a BAR, as if the VMM had mapped it.
    #[cfg(test)]
    pub(crate) fn add_mapping(&self, mapping: BarMapping) {
        self.put_mapping(&mapping, &self.devices.hold());
    }

    /// A device showed. `None` if there are too many.
    pub(crate) fn add_device(&self, source: Source) -> Option<DeviceId> {
        let writing = self.devices.hold();
        let device = self.add_source(source, 0, &[Region::default(); 6], &writing);
        if let (Some(device), Source::VfioUser(stream)) = (device, source) {
            self.status.device_came(device.place(), &format!("vfio-user, connection {stream}"));
        }
        self.publish_windows(&writing);
        device
    }

    /// A device is gone: nothing is known of its BARs' decoding any more.
    pub(crate) fn remove_device(&self, device: DeviceId) {
        let writing = self.devices.hold();
        if let Some(found) = self.devices.table.get(device) {
            found.gone(&writing);
            self.retire(&writing);
        }
        self.publish_windows(&writing);
    }

    /// A descriptor of a device is about to be closed; the VMM may have another one.
    pub(crate) fn device_closes(&self, device: u32, fd: RawFd) {
        let _writing = self.devices.hold();
        if let Some(found) = self.devices.table.get(DeviceId(device))
            && found.source() == Some(Source::Vfio(fd))
        {
            found.use_descriptor(self.descriptors.another(fd, Descriptor::Device(device)));
        }
    }

    /// The VMM has a descriptor of a device, maybe after it had none for a moment.
    pub(crate) fn device_opened(&self, device: u32, fd: RawFd) {
        let _writing = self.devices.hold();
        if let Some(found) = self.devices.table.get(DeviceId(device)) {
            found.use_if_none(fd);
        }
    }

    /// The last descriptor of a device was closed.
    pub(crate) fn device_closed(&self) {
        let writing = self.devices.hold();
        self.retire(&writing);
        self.publish_windows(&writing);
    }

    /// What a backend's page says, or will say once it's written: at a moment at which it does not say
    /// anything, an access would be the VMM's.
    fn user_decode_soon(&self, id: DeviceId, stream: u32, bar: u8) -> Decode {
        let has_bar = || self.devices.table.get(id).is_some_and(|device| device.has_bar(bar));
        for _ in 0..PATIENCE {
            let decode = self.user_decode(stream, bar);
            if decode != Decode::Unknown || !has_bar() {
                return decode;
            }
            thread::yield_now();
        }
        Decode::Unknown
    }

    fn add_source(
        &self,
        source: Source,
        config: u64,
        bars: &[Region; 6],
        writing: &Writing<'_>,
    ) -> Option<DeviceId> {
        let device = self.devices.table.add(source, config, bars, writing);
        if device.is_none() {
            self.status.fail_open(FailOpen::TooManyDevices);
        }
        device
    }

    /// Adds a mapping, in the place of whatever was there.
    fn put_mapping(&self, mapping: &BarMapping, writing: &Writing<'_>) {
        self.take_mappings(mapping.start, mapping.len, writing);
        if !self.devices.mappings.insert(mapping, writing) {
            self.status.fail_open(FailOpen::TooManyMappings);
        }
    }

    fn take_mappings(&self, start: usize, len: usize, writing: &Writing<'_>) -> Vec<BarMapping> {
        let (taken, room) = self.devices.mappings.remove(start, len, writing);
        if room.is_err() {
            self.status.fail_open(FailOpen::TooManyMappings);
        }
        taken
    }

    fn placements(&self, device: DeviceId) -> Option<[Placement; 6]> {
        let found = self.devices.table.get(device)?;
        if let Source::VfioUser(stream) = found.source()?
            && let Some(placements) = self.user_placements(stream)
        {
            found.set_placements(&placements);
        }
        // Of a page that is being written, what it said before.
        Some(found.placements())
    }

    /// Makes room for other devices where nothing refers to one any more.
    fn retire(&self, writing: &Writing<'_>) {
        for (id, device) in self.devices.table.all() {
            if device.source().is_none() && !self.devices.mappings.any_of(id) {
                device.leave(writing);
                self.status.device_went(id.place());
            }
        }
    }

    /// Makes the windows anew of what is known.
    fn publish_windows(&self, _: &Writing<'_>) {
        let mut windows = Windows::default();
        for (id, device) in self.devices.table.all() {
            let source = device.source();
            if let Some(Source::VfioUser(stream)) = source {
                // Before the rest is read: a change meanwhile shows.
                windows.add_epoch(stream, self.user_epoch(stream));
            }
            let Some(placements) = self.placements(id) else { continue };
            for (bar, placement) in (0..).zip(&placements).filter(|(_, bar)| bar.live != 0) {
                let decodes = match source {
                    Some(Source::VfioUser(stream)) => self.user_decode(stream, bar) == Decode::On,
                    _ => device.decoded(),
                };
                windows.add((id, bar), placement, decodes, device.vm());
            }
        }
        self.devices.windows.store(windows.sorted().into());
    }
}
