//! Another program in place of the running one, without an end for any client.

mod handover;

pub use handover::{Handover, HandoverError};
