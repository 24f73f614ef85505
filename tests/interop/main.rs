//! Against the other Rust implementation: the crate `vfio_user` of rust-vmm.
//!
//! Where it deviates from the specification, the comment says so and the test asserts what really
//! happens: it is what its users see.

mod their_client;
mod their_server;
