//! Devices: which host memory is a BAR, and whether the BAR decodes.

use std::os::fd::RawFd;

use crate::Shim;
use crate::system::System;

/// Which device, in the order in which they showed.
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

/// All devices of the process.
#[derive(Debug, Default)]
pub(crate) struct Devices {}

impl<S: System> Shim<S> {
    /// Which BAR has a byte of host memory. Safe in a signal handler.
    pub(crate) fn mapping_at(&self, host: usize) -> Option<BarMapping> {
        let _ = host;
        None
    }

    /// The mapping that a range of host memory is inside of, all of it. Safe in a signal handler.
    pub(crate) fn mappings_in(&self, host: usize, len: usize) -> Option<BarMapping> {
        let _ = (host, len);
        None
    }

    /// Whether a BAR decodes now. Safe in a signal handler.
    pub(crate) fn decode(&self, device: DeviceId, bar: u8) -> Decode {
        let _ = (device, bar);
        Decode::Unknown
    }

    /// Who answers for a device. `None` if it is gone. Safe in a signal handler.
    pub(crate) fn source(&self, device: DeviceId) -> Option<Source> {
        let _ = device;
        None
    }

    /// A VM has a slot with memory of this device.
    pub(crate) fn belongs(&self, device: DeviceId, vm: u32) {
        let _ = (device, vm);
    }

    /// The BAR whose window in a VM a guest physical address is in. Windows are where BARs last
    /// decoded, as long as their registers have not changed since. Takes no lock and makes no system
    /// call, but may do both after a vfio-user device changed.
    pub(crate) fn window_at(&self, vm: u32, gpa: u64) -> Option<BarAddress> {
        let _ = (vm, gpa);
        None
    }

    /// Host memory is a part of a BAR. The hook of `mmap` does this by itself.
    pub(crate) fn add_mapping(&self, mapping: BarMapping) {
        let _ = mapping;
    }

    /// A device showed. `None` if there are too many.
    pub(crate) fn add_device(&self, source: Source) -> Option<DeviceId> {
        let _ = source;
        None
    }

    /// A device is gone: nothing is known of its BARs' decoding any more.
    pub(crate) fn remove_device(&self, device: DeviceId) {
        let _ = device;
    }

    /// An `ioctl` of the VMM with a request of VFIO's (type `;`) succeeded.
    pub(crate) fn vfio_asked(&self, fd: RawFd, request: u64) {
        let _ = (fd, request);
    }
}
