//! Guests on real hypervisors, and real `barkeep serve` processes behind their BARs.
//!
//! Each test says which hypervisor it ran on. Those that need KVM are skipped where it is missing.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic in a test is a failed test, and its output is shown with its name"
)]

mod demo;
mod faults;
mod interrupts;
mod on_both;
mod outages;
mod plain;
mod programs;
mod returns;
mod sidecar;
