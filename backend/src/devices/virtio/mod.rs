//! virtio devices (virtio 1.2).
//!
//! A [`Core`] is a device without a transport: it works on queues in guest memory, whoever found
//! them. `pci` makes a function of it, and the vhost-user server lends it to a VMM's own function.

pub mod blk;
mod chain;
pub mod console;
mod core;
mod crash;
mod inflight;
pub mod models;
pub mod net;
pub mod pci;
mod queue;
pub mod rate_limit;
pub mod rng;
pub mod spec;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use chain::{Buffers, Chain};
pub use core::{Core, DeviceError, InFlight, Io, MemoryGuard};
pub use inflight::{Record, RecordError, Words, record_words};
pub use queue::{QueueAccess, QueueError, needs_interrupt, recover};
