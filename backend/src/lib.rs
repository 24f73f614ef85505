//! PCI functions in a process of their own, served over vfio-user.
//!
//! Data flows in one direction for each request: bytes become a frame, a frame a request, the
//! session dispatches it to a [`server::HostedFunction`], which asks [`pci`] whether the access is
//! claimed at all and only then the [`devices::Device`]. What a configuration write changed comes
//! back as plain data ([`pci::Effects`]) and is applied when the device is no longer borrowed.
//!
//! ```text
//! pci, dma, irq, state  <-  devices  <-  server
//! ```

pub mod config;
pub mod devices;
pub mod dma;
pub mod irq;
mod log_limit;
pub mod pci;
pub mod server;
#[cfg(test)]
mod skip;
pub mod socket_path;
pub mod state;
pub mod supervisor;
