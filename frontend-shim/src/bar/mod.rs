//! Where BARs lie in the guest's address space, and the memory slots of those that are mapped.

mod function;
mod mapping;
mod table;

#[cfg(test)]
mod tests;

pub use function::{AttachError, AttachedFunction, BarInfo, SuspendOrder};
pub use table::{AddressSpace, BarWindow, Piece, WindowTable};
