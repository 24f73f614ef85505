//! What the tests of this package share.
//!
//! [`backend`] serves functions in this process, [`peer`] speaks to them in bytes of its own making,
//! and [`edu`] drives QEMU's educational device through it. A test that encodes with the codec it
//! tests proves nothing, so none of these uses `barkeep_protocol`. [`virtio`] drives virtio devices
//! through the shim's client, for which that protocol is a means. [`binary`] finds what was built,
//! [`supervised`] runs it with workers that a test kills, [`service_manager`] stands for systemd,
//! [`skip`](skip()) says what this machine can't test, and [`figure`] what a test has measured.

pub mod backend;
pub mod binary;
pub mod edu;
pub mod event_counter;
mod figures;
pub mod memory;
pub mod peer;
mod recorded;
pub mod service_manager;
mod skip;
pub mod supervised;
pub mod virtio;

pub use figures::figure;
pub use skip::skip;
