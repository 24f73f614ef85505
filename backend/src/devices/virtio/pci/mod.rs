//! virtio over PCI (4.1): a [`VirtioFunction`] is the device behind a PCI function, and a
//! [`Backing`] serves its queues.

mod backing;
mod common;
mod core_backing;
mod driver;
mod function;
mod layout;
mod records;
mod saved;
mod world;

#[cfg(test)]
mod tests;

pub use backing::Backing;
pub use core_backing::CoreBacking;
pub(in crate::devices) use core_backing::adopted;
pub use function::VirtioFunction;
pub use records::Records;
pub use world::World;
