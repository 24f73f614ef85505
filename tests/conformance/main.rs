//! The wire format, byte by byte, against QEMU's `docs/interop/vfio-user.rst`.
//!
//! Requests are laid out by hand and replies are taken apart by hand. One module a command; a table
//! where a command has many ways to be wrong, one row a case. Sections of the specification are
//! named in quotes.

mod clients;
mod config_space;
mod decode;
mod device_info;
mod dma;
mod extensions;
mod framing;
mod interrupts;
mod irq_requests;
mod msi_vectors;
mod region_access;
mod region_info;
mod reset;
mod version;
