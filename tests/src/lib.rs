//! What the tests of this package share.
//!
//! [`backend`] serves functions in this process, [`peer`] speaks to them in bytes of its own making,
//! and [`edu`] drives QEMU's educational device through it. A test that encodes with the codec it
//! tests proves nothing, so nothing here uses `barkeep_protocol`.

pub mod binary;
mod skip;
pub mod backend;
pub mod edu;
pub mod event_counter;
pub mod memory;
pub mod peer;

pub use skip::skip;
