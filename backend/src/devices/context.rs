use std::sync::Arc;

use super::transfers::{Transfer, Transfers};
use crate::dma::{DmaError, DmaGuard, DmaTable, Iova, WindowInfo};
use crate::irq::{EventFd, Interrupts};
use crate::pci::{Function, MsiOutcome};

/// The world as a device reaches it during one access.
///
/// Every way out passes the function's own enables: Bus Master Enable gates memory and MSI,
/// Interrupt Disable gates the pin, and MSI silences it (PCI 6.2.2 and 6.8.2).
#[derive(Debug)]
pub struct Context<'a> {
    function: &'a mut Function,
    interrupts: &'a mut Interrupts,
    dma: &'a DmaTable,
    transfers: &'a mut Transfers,
    running: bool,
}

impl<'a> Context<'a> {
    /// The world of `function`.
    pub fn new(
        function: &'a mut Function,
        interrupts: &'a mut Interrupts,
        dma: &'a DmaTable,
        transfers: &'a mut Transfers,
    ) -> Self {
        Self { function, interrupts, dma, transfers, running: true }
    }

    /// The same while the function is stopped, or not: a stopped one masters nothing.
    #[must_use]
    pub fn running(self, running: bool) -> Self {
        Self { running, ..self }
    }

    /// The same for a while, to be given away.
    pub fn reborrow(&mut self) -> Context<'_> {
        let Self { function, interrupts, dma, transfers, running } = self;
        Context { function, interrupts, dma, transfers, running: *running }
    }

    /// Whether the function may access memory and send messages: Bus Master Enable is set, it is in
    /// D0, and it runs.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.running && self.function.bus_master()
    }

    /// Guest memory as it is now, for a device that accesses it through `vm-memory`. The guard may
    /// be held until [`Device::quiesce`](super::Device::quiesce), across accesses.
    ///
    /// # Errors
    /// [`DmaError::BusMasterDisabled`].
    pub fn memory(&self) -> Result<DmaGuard, DmaError> {
        self.check_bus_master()?;
        Ok(self.dma.handle().memory())
    }

    /// Begins a transfer, whatever kind of memory it is about. Its end is told through
    /// [`Device::dma_done`](super::Device::dma_done): before the access under way is answered if the
    /// memory is shared, later if the client must be asked. Transfers are done in the order in
    /// which they were begun; the device bounds how many there are.
    pub fn start_dma(&mut self, transfer: Transfer) {
        self.transfers.begin(transfer);
    }

    /// Reads guest memory that the client shares.
    ///
    /// # Errors
    /// [`DmaError`] when bus mastering is off or the address can't be read. `data` may then be
    /// partly filled.
    pub fn dma_read(&self, address: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        self.check_bus_master()?;
        self.dma.read(address, data)
    }

    /// Writes guest memory that the client shares.
    ///
    /// # Errors
    /// [`DmaError`] when bus mastering is off or the address can't be written.
    pub fn dma_write(&self, address: Iova, data: &[u8]) -> Result<(), DmaError> {
        self.check_bus_master()?;
        self.dma.write(address, data)
    }

    /// Drives the INTx pin. The level is kept while the pin is disabled, and shows in the Status
    /// register.
    pub fn set_intx(&mut self, asserted: bool) {
        if let Some(level) = self.function.set_intx(asserted) {
            self.interrupts.intx.set_level(level);
        }
    }

    /// Whether the driver enabled MSI: the choice of signalling is the driver's.
    #[must_use]
    pub fn msi_enabled(&self) -> bool {
        self.function.msi_enabled()
    }

    /// Sends an MSI message. A masked vector stays pending; with MSI or bus mastering off, nothing
    /// happens.
    pub fn raise_msi(&mut self, vector: u8) {
        if self.function.raise_msi(vector) == MsiOutcome::Deliver {
            self.interrupts.msi.signal(usize::from(vector));
        }
    }

    /// Whether the driver enabled MSI-X.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.function.msix_enabled()
    }

    /// Sends an MSI-X message. A masked vector stays pending; with MSI-X or bus mastering off,
    /// nothing happens.
    pub fn raise_msix(&mut self, vector: u16) {
        if self.function.raise_msix(vector) == MsiOutcome::Deliver {
            self.interrupts.msix.signal(usize::from(vector));
        }
    }

    /// The eventfd that stands for an MSI-X message of this vector: the client's own. Somebody else
    /// may signal it in this function's place for as long as it is so, which ends when the device is
    /// [rewired](super::Device::rewired). `None` while the message would not be delivered at once, or
    /// the client connected nothing: then [`raise_msix`](Self::raise_msix) knows what to do.
    #[must_use]
    pub fn msix_route(&self, vector: u16) -> Option<&Arc<EventFd>> {
        let delivers = self.bus_master() && self.function.msix_delivers(vector);
        delivers.then(|| self.interrupts.msix.eventfd(vector.into())).flatten()
    }

    /// The client's windows, whether bus mastering is on or not. Their files are there for devices
    /// that [need them](super::Device::needs_window_files).
    pub fn windows(&self) -> impl Iterator<Item = WindowInfo<'_>> {
        self.dma.windows()
    }

    fn check_bus_master(&self) -> Result<(), DmaError> {
        if self.bus_master() { Ok(()) } else { Err(DmaError::BusMasterDisabled) }
    }
}
