//! The checks, by the kind of guest they run in.

pub(crate) mod direct;
pub(crate) mod vfio;

mod decode;
mod identity;
mod shared_memory;
