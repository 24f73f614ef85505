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
    /// MSI-X vectors.
    pub msix: Vectors,
    /// VFIO's error notification: one vector. A client may answer it by stopping its VM, so no
    /// Unsupported Request raises it.
    pub error: Vectors,
    /// VFIO's request to give the device back: one vector.
    pub request: Vectors,
}

impl Interrupts {
    /// Wiring for the pin and for so many MSI and MSI-X vectors, with nothing connected.
    #[must_use]
    pub fn new(msi: usize, msix: usize) -> Self {
        Self {
            intx: Intx::default(),
            msi: Vectors::new(msi),
            msix: Vectors::new(msix),
            error: Vectors::new(1),
            request: Vectors::new(1),
        }
    }

    /// Forgets every eventfd and mask that the client set.
    pub fn disconnect(&mut self) {
        let Self { intx, msi, msix, error, request } = self;
        intx.disconnect();
        for vectors in [msi, msix, error, request] {
            vectors.clear();
        }
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
