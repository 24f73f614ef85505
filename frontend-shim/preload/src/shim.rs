use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::descriptors::Descriptors;
use crate::device::Devices;
use crate::kvm::Vms;
use crate::sigbus::Signals;
use crate::status::{FailOpen, Status};
use crate::stream::Streams;
use crate::system::{Answer, System};

/// Types of requests of `ioctl`: `KVMIO` and `VFIO_TYPE`.
const KVM: u64 = 0xae;
const VFIO: u64 = b';' as u64;

/// All that is known of the VMM: one for the process.
///
/// Each module adds the part of it that it is about. What a signal handler calls takes no lock and
/// allocates nothing, and says so.
pub(crate) struct Shim<S> {
    pub(crate) system: S,
    pub(crate) descriptors: Descriptors,
    pub(crate) devices: Devices,
    pub(crate) vms: Vms,
    pub(crate) streams: Streams,
    pub(crate) signals: Signals,
    pub(crate) status: Status,
}

impl<S: System> Shim<S> {
    pub(crate) fn new(system: S, status: Status) -> Self {
        Self {
            system,
            descriptors: Descriptors::new(),
            devices: Devices::default(),
            vms: Vms::default(),
            streams: Streams::default(),
            signals: Signals::default(),
            status,
        }
    }

    /// `ioctl` of the VMM.
    ///
    /// # Errors
    /// Those of `ioctl`.
    pub(crate) fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        match request >> 8 & 0xff {
            KVM => self.kvm_ioctl(fd, request, argument),
            VFIO => {
                let answer = self.system.ioctl(fd, request, argument)?;
                self.shielded(|| self.vfio_asked(fd, request));
                Ok(answer)
            }
            _ => self.system.ioctl(fd, request, argument),
        }
    }

    /// Does something of ours beside what the VMM asked for. A panic ends it and not the VMM.
    pub(crate) fn shielded<T>(&self, of_ours: impl FnOnce() -> T) -> Option<T> {
        let answer = catch_unwind(AssertUnwindSafe(of_ours));
        if answer.is_err() {
            self.status.fail_open(FailOpen::Panic);
        }
        answer.ok()
    }
}
