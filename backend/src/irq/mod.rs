//! Interrupts as eventfds: what SET_IRQS configures and what a function signals.

mod eventfd;
mod intx;
mod signaller;
mod vectors;

#[cfg(test)]
mod tests;

pub use eventfd::EventFd;
pub use intx::Intx;
pub use vectors::Vectors;

use thiserror::Error;

/// The interrupt wiring of one function.
#[derive(Debug, Default)]
pub struct Interrupts {
    /// The INTx pin.
    pub intx: Intx,
    /// MSI vectors.
    pub msi: Vectors,
}

impl Interrupts {
    /// Wiring for `msi_vectors` MSI vectors and the pin, with nothing connected.
    #[must_use]
    pub fn new(msi_vectors: usize) -> Self {
        Self { intx: Intx::default(), msi: Vectors::new(msi_vectors) }
    }

    /// Forgets every eventfd and mask that the client set.
    pub fn disconnect(&mut self) {
        self.intx.disconnect();
        self.msi.clear();
    }
}

/// Why an interrupt can't be configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IrqError {
    /// The descriptor is not an eventfd.
    #[error("file descriptor is not an eventfd")]
    NotEventfd,
    /// The range leaves the vectors that the function has.
    #[error("vectors {start} to {start}+{count} are not there")]
    Range {
        /// First vector.
        start: u32,
        /// Number of vectors.
        count: u32,
    },
}
