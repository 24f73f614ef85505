//! The vfio-user codec: headers, commands and payloads, without I/O.
//!
//! Data flows one way through it: bytes are parsed into a [`Header`] and a [`Request`] whose values
//! are already checked against each other, so that nothing behind this module looks at raw lengths
//! again. All integers are in host byte order, as the protocol specifies for `AF_UNIX`.
#![forbid(unsafe_code)]

mod bitmap;
mod command;
mod device;
mod dma;
mod dma_message;
mod error;
mod extension;
mod feature;
mod header;
mod io_fds;
mod irq;
pub mod limits;
mod migration;
mod region;
mod request;
mod version;
mod write_multi;

#[cfg(test)]
mod tests;

pub use bitmap::{PageBitmap, PageBitmapMut};
pub use command::Command;
pub use device::{
    DeviceFlags, DeviceInfo, IrqInfo, IrqInfoFlags, PciIrq, PciRegion, RegionFlags, RegionInfo,
    SparseArea,
};
pub use dma::{BitmapRequest, DmaAccess, DmaMap, DmaUnmap, DmaUnmapFlags};
pub use dma_message::{DmaData, DmaLayout, DmaReadReply, DmaTransfer, ServerRequest};
pub use error::{HeaderError, WireError};
pub use extension::{
    DecodeFlags, DecodePageInfo, DecodePageQuery, FaultAccess, FaultReport, FaultVerdict,
    RegionState, RegionStateQuery,
};
pub use feature::{
    DeviceFeature, DmaLogging, DmaLoggingQuery, FeatureIndex, FeatureMethods, FeatureRequest,
    LoggingRange, MigDeviceState,
};
pub use header::{Header, MessageId, MessageKind};
pub use io_fds::{IoFd, IoFdKind, IoFdLayout, IoFds, IoFdsQuery, IoFdsReply, IoRegionFlags};
pub use irq::{IrqAction, IrqData, SetIrqs};
pub use migration::{MigData, MigDataRead, MigrationFlags, MigrationState};
pub use region::{RegionAccess, RegionData};
pub use request::{InfoQuery, Request};
pub use version::{
    BarkeepExtensions, Capabilities, MigrationCapability, Offer, TwinSocket, Version,
};
pub use write_multi::{RegionWrites, SmallWrite};

pub use rustix::io::Errno;
