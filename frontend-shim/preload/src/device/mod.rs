//! Devices: which host memory is a BAR, and whether the BAR decodes.

/// All devices of the process.
#[derive(Debug, Default)]
pub(crate) struct Devices {}

/// Which device, in the order in which they showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceId(pub(crate) u32);

/// Whether a BAR claims its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decode {
    /// It does.
    On,
    /// It does not: an access is an Unsupported Request.
    Off,
    /// The device does not tell: an access is the VMM's.
    Unknown,
}

/// Host memory that is a part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BarMapping {
    pub(crate) device: DeviceId,
    /// Region index, 0 to 5.
    pub(crate) bar: u8,
    /// Host address of the first byte.
    pub(crate) start: usize,
    /// Length in bytes.
    pub(crate) len: usize,
    /// Where in the BAR it starts, in bytes.
    pub(crate) offset: u64,
}
