//! virtio over PCI (4.1): a [`VirtioFunction`] is the device behind a PCI function, and a
//! [`Backing`] serves its queues.

mod backing;
mod driver;
mod world;

pub use backing::Backing;
pub use world::World;
