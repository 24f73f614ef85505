//! Virtio devices of real processes over vhost-user.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]

mod blk;
mod front_end;
mod hostile;
mod net;
mod rng;
mod sessions;
mod sidecar;
