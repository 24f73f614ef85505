//! A driver for virtio functions, over the shim's client and without a VM.
//!
//! [`Function`] is the PCI side as virtio 1.2 section 4.1 lays it out, [`Driver`] the device with its
//! queues set up (3.1.1), and [`Memory`] what the function may reach. Like the rest of this package's
//! drivers it takes nothing from the program that it tests: numbers are the specification's.

mod driver;
mod function;
mod load;
mod memory;
mod queue;
pub mod requests;

pub use driver::{DEADLINE, Driver, Event, Interrupts, Kicks, Setup};
pub use function::{Area, Function, common, status};
pub use load::Load;
pub use memory::{DATA, HEADERS, Memory, RINGS, Window};
pub use queue::{Part, Queue, Used, raw_descriptor};

/// Feature bits of transport and queues (6).
pub mod feature {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_RESET: u64 = 1 << 40;
}
