//! `libbarkeep_preload.so`: preloaded into a VMM as it was shipped, it completes accesses to BARs
//! that do not decode as Unsupported Requests, as bare metal does: reads return all ones, writes are
//! dropped. Without it the same accesses end the VM, or read 0.
//!
//! It stands between the VMM and the C library. `exports` has the functions that take the C
//! library's place; each asks `Shim`, which sees what the VMM sets up (VMs, virtual CPUs, memory
//! slots, devices, mappings of BARs), and steps in at three places only: when `KVM_RUN` returns, when
//! a BAR's mapping raises `SIGBUS`, and in the stream of a vfio-user device. Everything else passes
//! through untouched, and whatever is not expected does too: it fails open, logged once.

mod descriptors;
mod device;
#[cfg(not(test))]
mod exports;
mod kvm;
mod shim;
mod sigbus;
#[cfg(not(test))]
mod start;
mod status;
mod stream;
mod system;

pub(crate) use shim::Shim;
