//! What VMs need of the rest of the shim.

use std::os::fd::RawFd;

use barkeep_protocol::wire::{FaultAccess, FaultVerdict};

use crate::Shim;
use crate::descriptors::Descriptor;
use crate::device::{BarAddress, BarMapping, Decode, DeviceId, Source};
use crate::status::Status;
use crate::system::System;

/// The kernel underneath, the devices beside, and who counts.
pub(super) trait Around {
    type System: System;

    fn system(&self) -> &Self::System;
    fn status(&self) -> &Status;

    /// Does something of ours; `None` if it panicked.
    fn shielded<T>(&self, of_ours: impl FnOnce() -> T) -> Option<T>;

    /// A descriptor of a VM.
    fn descriptor_of(&self, vm: u32) -> Option<RawFd>;

    /// The mapping of a BAR that a range of host memory is inside of.
    fn mapping(&self, host: u64, len: u64) -> Option<BarMapping>;

    /// What is known of a device's decoding may be old: asks again, and may have to wait. To be called without
    /// a lock.
    fn look(&self, device: DeviceId);

    /// Whether a BAR decodes.
    fn decode(&self, device: DeviceId, bar: u8) -> Decode;

    /// The same where a guest's access failed; a backend may be asked for it.
    fn verdict(&self, place: BarAddress, access: FaultAccess) -> Decode;

    /// The BAR in whose window an address of the guest is.
    fn window_at(&self, vm: u32, guest: u64) -> Option<BarAddress>;

    /// Completes an access to a BAR that does not decode, and counts it.
    fn complete(&self, place: BarAddress, data: &mut [u8], write: bool);

    /// A slot of the VM has memory of the device.
    fn belongs(&self, device: DeviceId, vm: u32);
}

impl<S: System> Around for Shim<S> {
    type System = S;

    fn system(&self) -> &S {
        &self.system
    }

    fn status(&self) -> &Status {
        &self.status
    }

    fn shielded<T>(&self, of_ours: impl FnOnce() -> T) -> Option<T> {
        Shim::shielded(self, of_ours)
    }

    fn descriptor_of(&self, vm: u32) -> Option<RawFd> {
        self.descriptors.another(-1, Descriptor::Vm(vm))
    }

    fn mapping(&self, host: u64, len: u64) -> Option<BarMapping> {
        self.mappings_in(usize::try_from(host).ok()?, usize::try_from(len).ok()?)
    }

    fn look(&self, device: DeviceId) {
        if let Some(Source::VfioUser(stream)) = self.source(device) {
            self.user_look(stream);
        }
    }

    fn decode(&self, device: DeviceId, bar: u8) -> Decode {
        Shim::decode(self, device, bar)
    }

    fn verdict(&self, place: BarAddress, access: FaultAccess) -> Decode {
        match Shim::verdict(self, place.device, place.bar, place.offset, access) {
            Some(FaultVerdict::UnsupportedRequest { .. }) => Decode::Off,
            // It decodes. That the VMM has mapped what is to be trapped is between the two.
            Some(FaultVerdict::Map { .. } | FaultVerdict::Trap { .. }) => Decode::On,
            None => Shim::decode(self, place.device, place.bar),
        }
    }

    fn window_at(&self, vm: u32, guest: u64) -> Option<BarAddress> {
        Shim::window_at(self, vm, guest)
    }

    fn complete(&self, place: BarAddress, data: &mut [u8], write: bool) {
        Shim::complete(self, place.device, place.bar, place.offset, data, write);
    }

    fn belongs(&self, device: DeviceId, vm: u32) {
        Shim::belongs(self, device, vm);
    }
}
