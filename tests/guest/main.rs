//! Guests on real hypervisors, and real `barkeep serve` processes behind their BARs.
//!
//! Each test says which hypervisor it ran on. Those that need KVM are skipped where it is missing.

mod demo;
mod faults;
mod programs;
mod sidecar;
