//! VMs of KVM: what the VMM believes of its slots, what the kernel has, and what `KVM_RUN` returns.

use std::os::fd::RawFd;

use crate::Shim;
use crate::system::System;

/// All VMs of the process.
#[derive(Debug, Default)]
pub(crate) struct Vms {}

impl<S: System> Shim<S> {
    /// Whether a VM is the only one of the process.
    pub(crate) fn is_only_vm(&self, vm: u32) -> bool {
        let _ = vm;
        true
    }

    /// A virtual CPU's descriptor was mapped.
    pub(crate) fn vcpu_mapped(&self, fd: RawFd, start: usize, len: usize) {
        let _ = (fd, start, len);
    }

    /// Host memory is about to be unmapped, or mapped anew. Called for all memory, so it must be quick.
    pub(crate) fn unmapped(&self, start: usize, len: usize) {
        let _ = (start, len);
    }

    /// The last descriptor of a VM is closed.
    pub(crate) fn vm_closed(&self, vm: u32) {
        let _ = vm;
    }

    /// The last descriptor of a virtual CPU is closed.
    pub(crate) fn vcpu_closed(&self, vcpu: u32) {
        let _ = vcpu;
    }
}
