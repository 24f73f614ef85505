//! What crosses the socket between a VMM and a barkeep sidecar.
//!
//! [`wire`] is the vfio-user codec: pure data in, pure data out, no I/O. [`transport`] moves frames
//! and the file descriptors that travel with them, and [`page`] is what one side reads in the memory of the
//! other. The protocol itself is specified in QEMU's
//! `docs/interop/vfio-user.rst`; barkeep's extensions in this repository's `docs/protocol.md`.

pub mod page;
pub mod transport;
pub mod wire;
