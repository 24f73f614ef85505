//! VMs of KVM: what the VMM believes of its slots, what the kernel has, and what `KVM_RUN` returns.

/// All VMs of the process.
#[derive(Debug, Default)]
pub(crate) struct Vms {}
