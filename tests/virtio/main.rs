//! virtio devices of real `barkeep serve` processes, driven through the shim's client without a VM.
//!
//! The driver waits for interrupts and never looks without one, so a lost kick and a lost interrupt
//! fail a test.
#![expect(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod blk;
mod blk_load;
mod bridge;
mod console;
mod disturbances;
mod malformed;
mod migration;
mod net;
mod rng;
mod sidecar;
mod transport;
