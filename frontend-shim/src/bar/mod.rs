//! Where BARs lie in the guest's address space, and the memory slots of those that are mapped.

mod backend;
mod doorbells;
mod function;
mod mapping;
#[cfg(test)]
#[cfg(feature = "model-check")]
mod model_check;
#[cfg(test)]
#[cfg(not(feature = "model-check"))]
mod tests;
mod written;

pub use crate::fault::{AddressSpace, BarWindow, Piece, WindowTable};
pub use backend::Backend;
pub use function::{
    AttachError, AttachedFunction, BarInfo, Outages, ReconnectError, SuspendOrder, TrackingError,
};
