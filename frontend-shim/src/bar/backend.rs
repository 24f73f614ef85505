use std::fmt;
use std::os::fd::OwnedFd;

use barkeep_protocol::wire::{
    BarkeepExtensions, DeviceInfo, FaultReport, FaultVerdict, IrqInfo, RegionInfo, RegionState,
};

use crate::client::{Client, ClientError, Doorbell};

/// Whoever owns a function, as [`AttachedFunction`](super::AttachedFunction) talks to it. A process
/// behind a [`Client`], and in model-checked tests a function in memory.
///
/// Once [`is_dead`](Self::is_dead) is true it stays so, and every request fails at once. If it answers
/// again, that is another one ([`AttachedFunction::resume`](super::AttachedFunction::resume)).
pub trait Backend: fmt::Debug + Send + Sync {
    /// Who it is, for logs.
    fn name(&self) -> String;

    /// Whether it is gone for this session.
    fn is_dead(&self) -> bool;

    /// The barkeep extensions that it offers.
    fn extensions(&self) -> BarkeepExtensions;

    /// Nothing more is asked of it: it has gone, as the VMM has learned by itself.
    fn give_up(&self) {}

    /// What the device is.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn device_info(&self) -> Result<DeviceInfo, ClientError>;

    /// What a region is, with the file to map if it can be mapped.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), ClientError>;

    /// What an interrupt index is. Only asked about functions that may be reconnected.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        let _ = index;
        Err(ClientError::NotOffered("interrupts"))
    }

    /// Reads `data.len()` bytes of a region. On an error, `data` is unchanged.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ClientError>;

    /// Writes to a region. When it returns, the backend has done it.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError>;

    /// Resets the function.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn reset(&self) -> Result<(), ClientError>;

    /// Forwards a memory fault (extension `memory_fault`).
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks the extension, and as for every request.
    fn memory_fault(&self, report: &FaultReport) -> Result<FaultVerdict, ClientError>;

    /// Decode, epoch and counters of a region (extension `region_state`).
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks the extension, and as for every request.
    fn region_state(&self, region: u32) -> Result<RegionState, ClientError>;

    /// Where in a region a write need not be forwarded, because an eventfd tells as much. Only asked of
    /// a server with barkeep's extensions: others take the question for the end of the session.
    ///
    /// # Errors
    /// [`ClientError`], as for every request.
    fn doorbells(&self, region: u32) -> Result<Vec<Doorbell>, ClientError> {
        let _ = region;
        Ok(Vec::new())
    }
}

impl Backend for Client {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn give_up(&self) {
        self.end_session();
    }

    fn is_dead(&self) -> bool {
        self.is_dead()
    }

    fn extensions(&self) -> BarkeepExtensions {
        self.extensions()
    }

    fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        self.device_info()
    }

    fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), ClientError> {
        self.region_info(index)
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        self.irq_info(index)
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ClientError> {
        self.region_read(region, offset, data)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.region_write(region, offset, data)
    }

    fn reset(&self) -> Result<(), ClientError> {
        self.reset()
    }

    fn memory_fault(&self, report: &FaultReport) -> Result<FaultVerdict, ClientError> {
        self.memory_fault(report)
    }

    fn region_state(&self, region: u32) -> Result<RegionState, ClientError> {
        self.region_state(region)
    }

    fn doorbells(&self, region: u32) -> Result<Vec<Doorbell>, ClientError> {
        self.doorbells(region)
    }
}
