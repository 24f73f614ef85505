//! The vfio-user codec: headers, commands and payloads, without I/O.
//!
//! Data flows one way through it: bytes are parsed into a [`Header`] and a [`Request`] whose values
//! are already checked against each other, so that nothing behind this module looks at raw lengths
//! again. All integers are in host byte order, as the protocol specifies for `AF_UNIX`.
#![forbid(unsafe_code)]

mod command;
mod device;
mod dma;
mod error;
mod extension;
mod header;
mod irq;
pub mod limits;
mod region;
mod request;
mod version;

#[cfg(test)]
mod tests;

pub use command::Command;
pub use device::{
    DeviceFlags, DeviceInfo, IrqInfo, IrqInfoFlags, PciIrq, PciRegion, RegionFlags, RegionInfo,
    SparseArea,
};
pub use dma::{DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags};
pub use error::{HeaderError, WireError};
pub use extension::{
    DecodeFlags, FaultAccess, FaultReport, FaultVerdict, RegionState, RegionStateQuery,
};
pub use header::{Header, MessageId, MessageKind};
pub use irq::{IrqAction, IrqData, SetIrqs};
pub use region::{RegionAccess, RegionData};
pub use request::{InfoQuery, Request};
pub use version::{BarkeepExtensions, Capabilities, TwinSocket, Version};

pub use rustix::io::Errno;
