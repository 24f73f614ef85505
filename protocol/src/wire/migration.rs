use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::device::prefix;
use super::limits::MAX_DATA_XFER_SIZE;

bitflags! {
    /// Which migration states a device has beside RUNNING and ERROR
    /// ("VFIO_DEVICE_FEATURE_MIGRATION"). At least `STOP_COPY` is set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MigrationFlags: u64 {
        /// STOP, STOP_COPY and RESUMING.
        const STOP_COPY = 1 << 0;
        /// RUNNING_P2P, which vfio-user does not use.
        const P2P = 1 << 1;
        /// PRE_COPY.
        const PRE_COPY = 1 << 2;
    }
}

/// A state of the migration state machine (`enum vfio_device_mig_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MigrationState {
    /// The device has failed and must be reset.
    Error = 0,
    /// It changes nothing, neither inside nor outside.
    Stop = 1,
    /// It runs.
    Running = 2,
    /// It stands still and its state can be read.
    StopCopy = 3,
    /// It stands still and takes a new state.
    Resuming = 4,
    /// Not used in vfio-user.
    RunningP2p = 5,
    /// It runs and its state can be read.
    PreCopy = 6,
    /// Not used in vfio-user.
    PreCopyP2p = 7,
}

impl MigrationState {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The first arc of the way from `self` to `target`, by the rules of "Direct State Transitions"
    /// and "Complex State Transitions": the shortest way, with neither PRE_COPY nor STOP_COPY inside
    /// of it. `None` when there is no way, and `Some(target)` when the arc ends there. A device
    /// without `pre_copy` has no arcs that touch PRE_COPY.
    #[must_use]
    pub fn step_towards(self, target: Self, pre_copy: bool) -> Option<Self> {
        use MigrationState::{PreCopy, Resuming, Running, Stop, StopCopy};
        if !pre_copy && (self == PreCopy || target == PreCopy) {
            return None;
        }
        Some(match (self, target) {
            (Running | StopCopy | Resuming, Stop)
            | (PreCopy | Stop, Running)
            | (Running, PreCopy)
            | (Stop | PreCopy, StopCopy)
            | (Stop, Resuming) => target,
            (Running, StopCopy | Resuming)
            | (StopCopy, Running | Resuming)
            | (Resuming, Running | StopCopy | PreCopy) => Stop,
            (PreCopy, Stop | Resuming) | (Stop, PreCopy) => Running,
            _ => return None,
        })
    }
}

impl TryFrom<u32> for MigrationState {
    type Error = WireError;

    fn try_from(code: u32) -> Result<Self, WireError> {
        Ok(match code {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            5 => Self::RunningP2p,
            6 => Self::PreCopy,
            7 => Self::PreCopyP2p,
            _ => return Err(WireError::MigrationState(code)),
        })
    }
}

/// Asks for the next bytes of a device's state ("VFIO_USER_MIG_DATA_READ").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigDataRead {
    /// How many bytes, at most `max_data_xfer_size`.
    pub size: u32,
}

/// The next bytes of a device's state: a "VFIO_USER_MIG_DATA_WRITE", or the reply to a
/// "VFIO_USER_MIG_DATA_READ".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigData<'a> {
    /// The bytes. A reply with fewer than were asked for is the last one.
    pub data: &'a [u8],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawMigData {
    argsz: u32,
    size: u32,
}

impl RawMigData {
    fn with_size(size: u32) -> Self {
        Self { argsz: whole(size), size }
    }
}

/// `argsz` of a payload with `size` bytes of data.
fn whole(size: u32) -> u32 {
    size.saturating_add(super::request::argsz_of::<RawMigData>())
}

fn checked_size(size: u32) -> Result<u32, WireError> {
    if size > MAX_DATA_XFER_SIZE { Err(WireError::Transfer(size.into())) } else { Ok(size) }
}

impl MigDataRead {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let raw: RawMigData = prefix(body)?;
        let size = checked_size(raw.size)?;
        // A shorter answer would say that there is no more.
        if raw.argsz < whole(size) {
            return Err(WireError::ArgumentSize(raw.argsz));
        }
        Ok(Self { size })
    }

    /// Appends the request's payload.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(RawMigData::with_size(self.size).as_bytes());
    }

    /// Parses the reply. libvfio-user's server pads the last one to the size that was asked for.
    ///
    /// # Errors
    /// [`WireError`] for a short payload, or for more data than was asked for.
    pub fn parse_reply<'a>(&self, body: &'a [u8]) -> Result<MigData<'a>, WireError> {
        let raw: RawMigData = prefix(body)?;
        if raw.size > self.size {
            return Err(WireError::Count(raw.size.into()));
        }
        let rest = &body[size_of::<RawMigData>()..];
        let (expected, actual) = (raw.size as usize, rest.len());
        let data = rest.get(..expected).ok_or(WireError::Length { expected, actual })?;
        Ok(MigData { data })
    }
}

impl<'a> MigData<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let raw: RawMigData = prefix(body)?;
        let expected = checked_size(raw.size)? as usize;
        let data = &body[size_of::<RawMigData>()..];
        if data.len() != expected {
            return Err(WireError::Length { expected, actual: data.len() });
        }
        Ok(Self { data })
    }

    /// Appends the payload: a write's request or a read's reply.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let size = u32::try_from(self.data.len()).expect("transfers are bounded by the limits");
        out.extend_from_slice(RawMigData::with_size(size).as_bytes());
        out.extend_from_slice(self.data);
    }
}
