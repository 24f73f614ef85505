//! The wire format, byte by byte, against QEMU's `docs/interop/vfio-user.rst`.
//!
//! Requests are laid out by hand and replies are taken apart by hand. One module a command; a table
//! where a command has many ways to be wrong, one row a case. Sections of the specification are
//! named in quotes.
#![expect(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod clients;
mod config_space;
mod decode;
mod decode_page;
mod device_info;
mod dirty_pages;
mod dma;
mod doorbells;
mod extensions;
mod framing;
mod interrupts;
mod irq_requests;
mod message_dma;
mod migration;
mod msi_vectors;
mod options;
mod region_access;
mod region_info;
mod reset;
mod shared_bar;
mod version;
mod write_multi;
