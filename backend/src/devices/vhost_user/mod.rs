//! A virtio function whose queues a vhost-user daemon serves, in a process of its own.
//!
//! This process is the daemon's frontend: it hands on the client's memory, the eventfds of the
//! doorbells and those of the interrupts, and is not there while requests are served, unless the
//! daemon keeps no track of them (docs/decisions/0017-vhost-user-bridge.md). Sections in quotation
//! marks are those of QEMU's `docs/interop/vhost-user.rst`.

mod bridge;
mod channel;
mod config;
mod daemon;
mod exchange;
mod inflight;
mod kinds;
mod memory;
mod options;
mod relay;
mod rings;
mod upkeep;
mod wakes;

#[cfg(test)]
mod tests;

pub use bridge::Bridge;
