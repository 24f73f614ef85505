//! Devices of the kernel's: VFIO.

use std::os::fd::RawFd;

use super::config::{self, HEADER};
use super::mappings::Writing;
use super::table::{Device, Region};
use super::{Decode, DeviceId, Source};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::status::FailOpen;
use crate::system::System;

/// Requests of `linux/vfio.h`, all `_IO(';', ..)`.
const VFIO_DEVICE_GET_INFO: u64 = 0x3b6b;
const VFIO_DEVICE_GET_REGION_INFO: u64 = 0x3b6c;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;
const VFIO_DEVICE_PCI_HOT_RESET: u64 = 0x3b71;
const VFIO_DEVICE_FEATURE: u64 = 0x3b75;
const VFIO_DEVICE_FLAGS_PCI: u32 = 1 << 1;
const CONFIG_REGION: u32 = 7;

/// `struct vfio_device_info`, as the first kernels had it: argsz, flags, regions, interrupts.
const DEVICE_INFO_LEN: usize = 16;
/// `struct vfio_region_info`: argsz, flags, index, place of capabilities, size, offset.
const REGION_INFO_LEN: usize = 32;

impl<S: System> Shim<S> {
    /// An `ioctl` of the VMM with a request of VFIO's (type `;`) succeeded.
    pub(crate) fn vfio_asked(&self, fd: RawFd, request: u64) {
        match request {
            VFIO_DEVICE_GET_REGION_INFO => self.adopt(fd),
            // They change the configuration space, of other devices as well.
            VFIO_DEVICE_RESET | VFIO_DEVICE_PCI_HOT_RESET | VFIO_DEVICE_FEATURE => {
                if let Some(Descriptor::Device(_)) = self.descriptors.get(fd) {
                    self.refresh_all();
                }
            }
            _ => {}
        }
    }

    /// The VMM is about to write to a device's descriptor. If that may change whether it decodes: whether it does
    /// before, which is for [`Self::device_written`].
    pub(crate) fn device_to_be_written(
        &self,
        device: u32,
        offset: u64,
        len: usize,
    ) -> Option<Decode> {
        let id = DeviceId(device);
        let found = self.devices.table.get(id).filter(|found| decides(found, offset, len))?;
        let Some(Source::Vfio(fd)) = found.source() else { return None };
        let decode = self.vfio_decode(id, fd);
        if decode == Decode::Off {
            self.decode_may_come_back(id);
        }
        Some(decode)
    }

    /// The VMM has written to a device's configuration space. What was known before the write is told by the
    /// caller: another thread may have looked at the device since.
    pub(crate) fn device_written(&self, device: u32, before: Decode) {
        let id = DeviceId(device);
        let Some(found) = self.devices.table.get(id) else { return };
        let writing = self.devices.hold();
        self.refresh(id, &writing);
        self.publish_windows(&writing);
        let decodes = found.decoded();
        drop(writing);
        if decodes && before != Decode::On {
            self.decode_came_back(id);
        }
        if !decodes && before != Decode::Off {
            self.decode_went(id);
        }
    }

    /// Reads what a device tells about its BARs' places. What it can't tell stays as it was.
    pub(super) fn refresh(&self, id: DeviceId, _: &Writing<'_>) {
        let Some(device) = self.devices.table.get(id) else { return };
        let Some(Source::Vfio(fd)) = device.source() else { return };
        let mut header = [0; HEADER];
        if self.system.pread(fd, &mut header, device.config()) != Ok(HEADER) {
            return;
        }
        let decodes = self.vfio_decode(id, fd) == Decode::On;
        device.set_decoded(decodes);
        let known = device.placements();
        for (index, address) in config::addresses(&header).into_iter().enumerate() {
            let address = address.unwrap_or(0);
            let here = decodes && config::plausible(address, known[index].size);
            device.place(index, address, if here { address } else { known[index].live });
        }
    }

    /// Safe in a signal handler.
    pub(super) fn vfio_decode(&self, id: DeviceId, fd: RawFd) -> Decode {
        let Some(device) = self.devices.table.get(id) else { return Decode::Unknown };
        let decode = self.ask_decode(device, fd);
        // Closed meanwhile, the number may have been another file's.
        let same = self.descriptors.get(fd) == Some(Descriptor::Device(id.0)) && device.is(id);
        decode.filter(|_| same).unwrap_or(Decode::Unknown)
    }

    fn ask_decode(&self, device: &Device, fd: RawFd) -> Option<Decode> {
        let word = |at: u64| {
            let mut data = [0; 2];
            let read = self.system.pread(fd, &mut data, device.config().checked_add(at)?);
            (read == Ok(2)).then(|| u16::from_le_bytes(data))
        };
        let pmcsr = match device.power() {
            Some(power) => Some(word(power)?),
            None => None,
        };
        Some(config::decode(word(config::COMMAND)?, pmcsr))
    }

    fn refresh_all(&self) {
        let writing = self.devices.hold();
        for (id, _) in self.devices.table.all() {
            self.refresh(id, &writing);
        }
        self.publish_windows(&writing);
    }

    /// A descriptor has regions: if it is a PCI device of VFIO's, it's followed from now on.
    fn adopt(&self, fd: RawFd) {
        if matches!(self.descriptors.get(fd), Some(Descriptor::Device(_))) || !self.is_vfio(fd) {
            return;
        }
        let Some(region) = self.region(fd, CONFIG_REGION).filter(|region| region.size > 0) else {
            return self.status.fail_open(FailOpen::DeviceUnreadable);
        };
        // A BAR that isn't there has no size, and one that can't be asked for isn't there.
        let bars = std::array::from_fn(|bar| {
            u32::try_from(bar).ok().and_then(|bar| self.region(fd, bar)).unwrap_or_default()
        });
        let config = region.offset;
        let mut header = [0; HEADER];
        if self.system.pread(fd, &mut header, config) != Ok(HEADER) {
            return self.status.fail_open(FailOpen::DeviceUnreadable);
        }
        let power = self.power_register(fd, config, &header);
        let writing = self.devices.hold();
        if matches!(self.descriptors.get(fd), Some(Descriptor::Device(_))) {
            return;
        }
        let Some(id) = self.add_source(Source::Vfio(fd), config, &bars, &writing) else {
            return;
        };
        if let Some(device) = self.devices.table.get(id) {
            device.set_power(power);
            let ids = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            self.status
                .device_came(id.place(), &format!("vfio {:04x}:{:04x}", ids & 0xffff, ids >> 16));
            if !self.descriptors.set(fd, Descriptor::Device(id.0)) {
                device.gone(&writing);
                self.retire(&writing);
                self.status.fail_open(FailOpen::TooManyDescriptors);
            }
        }
        self.refresh(id, &writing);
        self.publish_windows(&writing);
    }

    fn is_vfio(&self, fd: RawFd) -> bool {
        // Where there is no /proc, the device's own word must do.
        let named = self.system.link(fd).map_or(true, |link| {
            link == b"anon_inode:[vfio-device]" || link.starts_with(b"/dev/vfio/")
        });
        let mut info = [0; DEVICE_INFO_LEN];
        info[0] = 16;
        named
            && self.system.ask(fd, VFIO_DEVICE_GET_INFO, &mut info).is_ok()
            && word(&info, 4) & VFIO_DEVICE_FLAGS_PCI != 0
    }

    fn region(&self, fd: RawFd, index: u32) -> Option<Region> {
        let mut info = [0; REGION_INFO_LEN];
        info[0] = 32;
        info[8..12].copy_from_slice(&index.to_le_bytes());
        self.system.ask(fd, VFIO_DEVICE_GET_REGION_INFO, &mut info).ok()?;
        let long = |at| u64::from(word(&info, at + 4)) << 32 | u64::from(word(&info, at));
        Some(Region { size: long(16), offset: long(24) })
    }

    fn power_register(&self, fd: RawFd, config: u64, header: &[u8; HEADER]) -> Option<u8> {
        let byte = |at: u8| {
            let mut data = [0];
            let read = self.system.pread(fd, &mut data, config.checked_add(at.into())?);
            (read == Ok(1)).then_some(data[0])
        };
        config::power_register(header, byte)
    }
}

/// Whether a write changes what the configuration space tells about decoding.
fn decides(device: &Device, offset: u64, len: usize) -> bool {
    let Some(first) = offset.checked_sub(device.config()) else { return false };
    let overlaps = |from: u64, to: u64| first < to && first.saturating_add(len as u64) > from;
    let power = device.power().is_some_and(|power| overlaps(power, power + 2));
    overlaps(config::COMMAND, config::COMMAND + 2)
        || overlaps(config::BARS, config::BARS_END)
        || power
}

fn word(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]])
}
